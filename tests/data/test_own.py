"""One's own data: every kind of source in one line, and every fault in one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from ppl_models.data import Dataset, Dynamic, dataset

ROWS = np.random.default_rng(0).normal(size=(30, 3))


def rejoined(data: Dataset) -> np.ndarray:
    """All rows, in an order of their own."""
    assert isinstance(data.x, torch.Tensor)
    rows = torch.cat([data.x, data.x_test]).numpy()
    return rows[np.lexsort(rows.T)]


def in_order(rows) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    return rows[np.lexsort(rows.T)]


def frame() -> pd.DataFrame:
    table = pd.DataFrame(ROWS, columns=["a", "b", "c"])
    return table.assign(kind=["x", "y", "z"] * 10, price=ROWS.sum(1), count=range(30))


def picture(path: Path, grey: np.ndarray, **arguments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).save(path, **arguments)


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        ROWS.astype(">f4"),
        np.asfortranarray(ROWS)[::1],
        torch.tensor(ROWS),
        torch.tensor(ROWS, requires_grad=True),
        pd.DataFrame(ROWS),
        TensorDataset(torch.tensor(ROWS)),
        ROWS.tolist(),
        list(torch.tensor(ROWS)),
    ],
    ids=lambda source: type(source).__name__,
)
def test_rows_of_every_kind_are_split_and_kept_as_they_are(source) -> None:
    data = dataset(source)
    assert (data.x.shape, data.x_test.shape) == ((24, 3), (6, 3))
    assert data.x.dtype == data.x_test.dtype == torch.float32
    np.testing.assert_allclose(rejoined(data), in_order(ROWS), rtol=1e-6)
    assert (data.name, data.y, data.classes, data.image_shape) == ("data", None, None, None)
    assert torch.equal(data.x, dataset(ROWS).x)


def test_the_seed_fixes_the_split_and_the_source_is_left_alone() -> None:
    source = torch.tensor(ROWS, dtype=torch.float32)
    before, state = source.clone(), torch.get_rng_state()
    first, second, other = (dataset(source, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)
    first.x.zero_()
    assert torch.equal(source, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_may_not_be_written_are_copied() -> None:
    rows = ROWS.astype(np.float32)
    rows.setflags(write=False)
    assert torch.equal(dataset(rows).x, dataset(ROWS).x)
    assert torch.equal(dataset(rows[:, ::-1]).x, dataset(ROWS).x.flip(1))


@pytest.mark.parametrize(("test", "rows"), [(0.2, 6), (0.001, 1), (0.999, 29), (5, 5), (29, 29)])
def test_the_rows_to_test_are_a_share_or_a_number(test, rows) -> None:
    assert len(dataset(ROWS, test=test).x_test) == rows


@pytest.mark.parametrize("test", [0, 0.0, 1.0, 30, -1, True, "half", None, 1.5, np.inf, np.nan])
def test_both_parts_have_a_row(test) -> None:
    with pytest.raises(ValueError, match=r"test must be a share .* At least one row to test is ne"):
        dataset(ROWS, test=test)


@pytest.mark.parametrize(
    ("y", "labels"),
    [
        (["x", "y", "z"] * 10, ("x", "y", "z")),
        (np.array([7, 5, 9] * 10), (5, 7, 9)),
        (torch.tensor([7, 5, 9] * 10, dtype=torch.uint8), (5, 7, 9)),
        (pd.Series(["x", "y", "z"] * 10, dtype="category", index=range(9, 39)), ("x", "y", "z")),
        ([True, False, False] * 10, (False, True)),
        (np.array([[1], [0], [0]] * 10), (0, 1)),
    ],
    ids=["strings", "integers", "tensor", "category", "booleans", "column"],
)
def test_classes_are_coded_and_split_by_share(y, labels) -> None:
    data = dataset(np.arange(30.0)[:, None], y=y)
    assert data.labels == labels
    assert data.classes == len(labels)
    assert data.y.dtype == torch.int64
    values = np.ravel(y)
    for x, coded in ((data.x, data.y), (data.x_test, data.y_test)):
        for row, code in zip(x[:, 0].int().tolist(), coded.tolist(), strict=True):
            assert labels[code] == values[row]
    counts = np.array([(values == label).sum() for label in labels])
    np.testing.assert_array_equal(data.y_test.bincount().numpy(), counts / 5)


def test_floats_are_a_continuous_target() -> None:
    data = dataset(np.arange(30.0)[:, None], y=np.arange(30.0) * 2)
    assert (data.classes, data.labels) == (None, None)
    assert data.y.dtype == torch.float32
    assert torch.equal(data.y, data.x[:, 0] * 2)
    assert torch.equal(data.y_test, data.x_test[:, 0] * 2)


def test_a_class_for_nearly_every_row_is_warned_about(recwarn) -> None:
    with pytest.warns(UserWarning, match=r"16 of them in 30 rows\. .*pass floats.*astype\(float\)"):
        data = dataset(ROWS, y=np.minimum(np.arange(30), 15))
    assert data.classes == 16
    recwarn.clear()
    dataset(ROWS, y=np.minimum(np.arange(30), 14))
    dataset(ROWS, y=[f"row {i}" for i in range(30)])
    dataset(ROWS[:3], y=[True, False, True])
    assert not recwarn.list


def test_a_series_beside_a_frame_has_its_index() -> None:
    table = pd.DataFrame(ROWS, index=range(100, 130))
    target = pd.Series(ROWS[:, 0], index=table.index)
    data = dataset(table, y=target)
    assert torch.equal(data.y, data.x[:, 0])
    mixed = target.sample(frac=1, random_state=0)
    said = (
        r"y must have the index of the DataFrame, but row 0 is \d+ in y .*y=y\.loc\[frame\.index\]"
    )
    with pytest.raises(ValueError, match=said):
        dataset(table, y=mixed)
    with pytest.raises(ValueError, match=said):
        dataset(table, y=target.reset_index(drop=True).to_frame())
    with pytest.raises(ValueError, match=r"for each of the 30 rows, got shape \(29,\)"):
        dataset(table, y=target[1:])
    assert torch.equal(dataset(table, y=mixed.loc[table.index]).y, data.y)
    assert torch.equal(dataset(table, y=target.to_numpy()).y, data.y)
    assert torch.equal(dataset(ROWS, y=target).y, data.y)


def test_a_column_of_a_frame_is_the_target() -> None:
    table = frame()
    data = dataset(table.drop(columns="kind"), y="price", name="prices")
    assert data.name == "prices"
    assert (data.x.shape[1], data.classes) == (4, None)
    assert_close(data.y, data.x[:, :3].sum(1))
    data = dataset(table, y="kind", standardize=True)
    assert data.labels == ("x", "y", "z")
    assert data.x.mean(0).abs().max() < 1e-5
    assert list(table.columns) == ["a", "b", "c", "kind", "price", "count"]
    nullable = table[["a", "count"]].convert_dtypes()
    np.testing.assert_allclose(rejoined(dataset(nullable)), in_order(table[["a", "count"]]))


def test_tables_are_read_from_files(tmp_path) -> None:
    table = frame()
    table.to_csv(tmp_path / "mine.csv")  # with an index, as pandas does
    table.to_csv(tmp_path / "mine.tsv", sep="\t", index=False)
    for name in ("mine.csv", "mine.tsv"):
        data = dataset(tmp_path / name, y="kind")
        assert (data.name, data.x.shape[1], data.labels) == ("mine", 5, ("x", "y", "z"))
        np.testing.assert_allclose(rejoined(data), in_order(table.drop(columns="kind")), rtol=1e-6)
    data = dataset(str(tmp_path / "mine.csv"), y="kind", name="other")
    assert data.name == "other"


def test_the_names_of_the_columns_are_kept(tmp_path) -> None:
    table = frame()
    table.to_csv(tmp_path / "mine.csv")
    for source in (table, tmp_path / "mine.csv"):
        data = dataset(source, y="kind", standardize=True)
        assert data.columns == ("a", "b", "c", "price", "count")
    assert dataset(pd.DataFrame(ROWS)).columns == ("0", "1", "2")
    assert dataset(ROWS).columns is None


def test_arrays_are_read_from_files(tmp_path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    assert torch.equal(dataset(tmp_path / "rows.npy").x, dataset(ROWS).x)
    np.savez(tmp_path / "both.npz", x=ROWS, y=np.arange(30) % 2)
    assert dataset(tmp_path / "both.npz").classes == 2
    assert dataset(tmp_path / "both.npz", y=ROWS[:, 0]).classes is None
    np.savez(tmp_path / "rows.npz", x=ROWS)
    assert dataset(tmp_path / "rows.npz").y is None


@pytest.mark.parametrize("shape", [(20, 4, 5), (20, 1, 4, 5)])
def test_images_are_laid_flat_and_bytes_are_scaled(shape) -> None:
    grey = np.arange(400, dtype=np.uint8).reshape(shape)
    data = dataset(grey)
    assert data.image_shape == (4, 5)
    np.testing.assert_allclose(rejoined(data), in_order(grey.reshape(20, 20) / np.float32(255)))
    floats = dataset(torch.from_numpy(grey).float() / 2)
    np.testing.assert_allclose(rejoined(floats), in_order(grey.reshape(20, 20) / 2))
    flat = dataset(grey.reshape(20, 20), image_size=(4, 5))
    assert flat.image_shape == (4, 5)
    assert torch.equal(flat.x, data.x)
    assert dataset(grey.reshape(20, 20)).x.max() == 255  # counts may be bytes too


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, ">i4"])
def test_bytes_of_any_integer_dtype_are_scaled(dtype, tmp_path) -> None:
    grey = np.arange(400, dtype=np.uint8).reshape(20, 4, 5)
    wide, flat = grey.astype(dtype), pd.DataFrame(grey.reshape(20, 20).astype(dtype))
    flat.to_csv(tmp_path / "pixels.csv", header=[f"p{i}" for i in range(20)], index=False)
    x = dataset(grey).x
    assert torch.equal(dataset(wide).x, x)
    for source in (flat.to_numpy(), flat, tmp_path / "pixels.csv"):
        assert torch.equal(dataset(source, image_size=(4, 5)).x, x)
        assert dataset(source).x.max() == 255  # counts
    assert dataset(wide.astype(float)).x.max() == 255
    assert dataset(wide.astype(np.int64) + 1).x.max() == 256  # no bytes


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_images_of_zeros_and_ones_stay_what_they_are(dtype) -> None:
    binary = (np.arange(400) % 3 == 0).reshape(20, 4, 5).astype(dtype)
    assert dataset(binary).x.unique().tolist() == [0, 1]


def test_images_are_made_binary() -> None:
    grey = torch.rand(40, 3, 3)
    assert isinstance(dataset(grey, binarize="dynamic").x, Dynamic)
    x = dataset(grey, binarize="threshold").x
    assert torch.equal(x, (dataset(grey).x >= 0.5).float())
    with pytest.raises(ValueError, match=r"data: binarize='static' needs grey values in \[0, 1\]"):
        dataset(grey * 3, binarize="static")
    with pytest.raises(ValueError, match=r"data is binary \(static\)"):
        dataset(grey, binarize="static", standardize=True)


class Pictures(TorchDataset):
    """As torchvision has them: an image of PIL, and a number."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int):
        if i >= 10:
            raise IndexError
        return Image.fromarray(np.full((4, 3), 20 * i, np.uint8)), i % 2


def test_a_torch_dataset_gives_rows_and_labels() -> None:
    data = dataset(Pictures(), test=2)
    assert (data.image_shape, data.labels) == ((4, 3), (0, 1))
    assert_close(data.x[:, 0] * 255 / 20 % 2, data.y.float(), atol=1e-4, rtol=0)
    pairs = TensorDataset(torch.tensor(ROWS), torch.arange(30) % 3)
    assert dataset(pairs).classes == 3
    assert dataset(TensorDataset(torch.tensor(ROWS), torch.tensor(ROWS[:, 0]))).classes is None
    assert dataset(pairs, y=ROWS[:, 0]).classes is None


def test_a_folder_of_images_is_read_in_order_and_scaled(tmp_path) -> None:
    for i in range(10):
        picture(tmp_path / "mine" / f"{i:02d}.png", np.full((4, 6), 25 * i, np.uint8))
    (tmp_path / "mine" / "notes.txt").write_text("no image")
    (tmp_path / "mine" / ".hidden.png").write_text("no image")
    data = dataset(tmp_path / "mine", y=np.arange(10) * 25.0)
    assert (data.name, data.image_shape, data.x.shape) == ("mine", (4, 6), (8, 24))
    assert_close(data.x[:, 5] * 255, data.y)
    resized = dataset(str(tmp_path / "mine"), image_size=(2, 3))
    assert resized.image_shape == (2, 3)
    np.testing.assert_allclose(rejoined(resized)[:, 0], np.arange(10) * 25 / 255, atol=1e-6)
    assert dataset(tmp_path / "mine", image_size=5).image_shape == (5, 5)


def test_subfolders_are_classes(tmp_path) -> None:
    for i in range(10):
        picture(tmp_path / ("cat" if i % 2 else "ape") / f"{i}.png", np.full((2, 2), i, np.uint8))
    (tmp_path / "empty").mkdir()
    data = dataset(tmp_path)
    assert data.labels == ("ape", "cat")
    assert_close((data.x[:, 0] * 255) % 2, data.y.float())


def test_pictures_of_every_mode_become_grey_and_upright(tmp_path) -> None:
    half = np.full((4, 6), 128, np.uint8)
    half[:2] = 0  # dark above
    Image.fromarray(half).save(tmp_path / "a.png")
    Image.fromarray(np.stack([half] * 3, axis=2)).save(tmp_path / "b.png")
    Image.fromarray(half.astype(np.uint16) * 257).save(tmp_path / "c.png")  # 16 bits
    turned = Image.Exif()
    turned[274] = 3  # stored upside down, and says so
    Image.fromarray(np.stack([half[::-1]] * 3, axis=2)).save(tmp_path / "d.png", exif=turned)
    Image.fromarray(half).convert("P").save(tmp_path / "e.gif")
    data = dataset(tmp_path)
    np.testing.assert_allclose(rejoined(data), np.tile(half.ravel() / 255, (5, 1)), atol=1e-6)


def test_folders_that_cannot_be_read_say_why(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there are no images in '.*', nor one folder down"):
        dataset(tmp_path)
    picture(tmp_path / "a.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(ValueError, match=r"at least 2 rows are needed"):
        dataset(tmp_path)
    picture(tmp_path / "b.png", np.zeros((5, 6), np.uint8))
    said = r"a\.png is 4 x 6 and b\.png is 5 x 6 .*Give image_size"
    with pytest.raises(ValueError, match=said):
        dataset(tmp_path)
    assert len(dataset(tmp_path, image_size=4).x) == 1
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"c\.png' is no image that can be read"):
        dataset(tmp_path, image_size=4)
    (tmp_path / "c.png").unlink()
    picture(tmp_path / "cats" / "a.png", np.zeros((4, 6), np.uint8))
    with pytest.raises(ValueError, match=r"it holds both \(a\.png and cats/\)"):
        dataset(tmp_path, image_size=4)


def test_files_that_cannot_be_read_say_why(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"there is no file or folder '.*none\.csv'"):
        dataset(tmp_path / "none.csv")
    for name in ("x.pt", "x.pkl"):
        (tmp_path / name).write_bytes(b"?")
        with pytest.raises(
            ValueError, match=r"is a pickle, which may run code .* Load it yourself"
        ):
            dataset(tmp_path / name)
    (tmp_path / "x.doc").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"x\.doc' is of no known kind"):
        dataset(tmp_path / "x.doc")
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.npy' is no array of numbers: Object arrays"):
        dataset(tmp_path / "x.npy")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"x\.npz' is no \.npz file"):
        dataset(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=ROWS)
    with pytest.raises(ValueError, match=r"must hold an array x.*got images"):
        dataset(tmp_path / "x.npz")
    (tmp_path / "x.csv").write_text("1,2\n3,4\n5,6\n")
    with pytest.raises(ValueError, match=r"first line of '.*' must hold the names"):
        dataset(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"x\.csv' is no table: No columns"):
        dataset(tmp_path / "x.csv")


ADVICE = r".*sep=';', decimal=','\), \.\.\.\)\.$"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "a,b\n1,2,3\n4,5,6\n", r"it has 2 fields and the next one has 3\."),
        ("x.csv", "a,b\n1,2,3,4\n4,5,6,7\n", r"it has 2 fields and the next one has 4\."),
        ("x.csv", "height;weight\n1,80;80,5\n1,7;60,1\n", r"it has 1 field and the next one has 3"),
        ("x.csv", "a,b\n0,2,3\n1,5,6\n", r"it has 2 fields and the next one has 3\."),
        ("x.csv", "a,b\n1,2\n4,5,6\n", r"Expected 2 fields in line 3, saw 3\."),
        ("x.csv", "a;b\n1;2\n3;4\n", r"separated by ',', but there is only one, 'a;b'\."),
        ("x.csv", "a\tb\n1\t2\n3\t4\n", r"only one, 'a\\tb'\."),
        ("x.tsv", "a,b\n1,2\n3,4\n", r"separated by '\\t', .* Is the separator ',' or ';'"),
        ("x.tsv", "a\tb\n1\t2\t3\n3\t4\t5\n", r"it has 2 fields and the next one has 3\."),
    ],
)
def test_tables_with_other_marks_are_refused_with_how_to_read_them(
    tmp_path, name, text, said
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said + ADVICE):
        dataset(tmp_path / name)


def test_tables_in_another_encoding_are_refused_with_how_to_read_them(tmp_path) -> None:
    for encoding in ("cp1252", "utf-16"):
        (tmp_path / "x.csv").write_text("größe,b\n1,2\n3,4\n", encoding=encoding)
        with pytest.raises(ValueError, match=r"must be text in UTF-8.*encoding='cp1252'\)"):
            dataset(tmp_path / "x.csv")


def test_a_mark_at_the_end_of_each_line_is_no_column(tmp_path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2,\n3,4,\n")
    np.testing.assert_array_equal(rejoined(dataset(tmp_path / "x.csv")), [[1, 2], [3, 4]])


def test_one_column_of_numbers_may_have_any_name(tmp_path) -> None:
    (tmp_path / "x.csv").write_text("weight; kg\n1\n2\n")
    assert dataset(tmp_path / "x.csv").columns == ("weight; kg",)


def holes(*rows: int) -> np.ndarray:
    x = ROWS.copy()
    x[list(rows), 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        (3, {}, r"the source must be a tensor, .* got int"),
        (ROWS[:1], {}, r"at least 2 rows are needed, .*got shape \(1, 3\)"),
        (ROWS[:0], {}, r"at least 2 rows are needed"),
        (ROWS[:, :0], {}, r"at least one value in each"),
        ([], {}, r"all rows must be numbers in the same shape, got rows of nothing"),
        (ROWS[:, 0], {}, r"rows must have the shape \(N, D\), or .*got \(30,\)"),
        (np.zeros((9, 3, 4, 4)), {}, r"grey images, got \(9, 3, 4, 4\)"),
        ([[1, 2], [3]], {}, r"in the same shape, got rows of \(2,\), \(1,\)"),
        ([torch.zeros(2), torch.zeros(3)], {}, r"got rows of \(2,\), \(3,\)"),
        (np.array([["a"], ["b"]]), {}, r"the rows must be numbers, got dtype <U1"),
        (ROWS + 1j, {}, r"the rows must be numbers, got dtype complex"),
        (holes(3, 5), {}, r"2 of 30 rows have missing or infinite values, in column 1\."),
        (pd.DataFrame(holes(3), columns=list("abc")), {}, r"1 of 30 rows .* in column 'b'"),
        (ROWS * 1e300, {}, r"missing or infinite values"),
        (frame(), {}, r"all columns must be numbers, but 'kind' is not\. Drop them, or encode"),
        (frame(), {"y": "prise"}, r"no column 'prise'\. Did you mean 'price'\?"),
        (frame()[["kind"]], {"y": "kind"}, r"no columns are left for x"),
        (ROWS, {"y": "kind"}, r"y='kind' names a column, which takes a DataFrame"),
        (ROWS, {"y": [1, 2]}, r"one label or target for each of the 30 rows, got shape \(2,\)"),
        (ROWS, {"y": np.zeros((30, 2))}, r"for each of the 30 rows, got shape \(30, 2\)"),
        (ROWS, {"y": 3}, r"for each of the 30 rows, got shape \(\)"),
        (ROWS, {"y": holes(2, 4)[:, 1]}, r"2 of 30 labels or targets are missing"),
        (ROWS, {"y": [None] + ["a"] * 29}, r"1 of 30 labels or targets are missing"),
        (ROWS, {"y": [np.inf] + [0.0] * 29}, r"targets must be finite"),
        (ROWS, {"y": ["a", 1] * 15}, r"y mixes strings and numbers"),
        (ROWS, {"y": [object()] * 30}, r"y must hold strings or whole numbers .*got object"),
        (ROWS, {"image_size": (2, 2)}, r"image_size=\(2, 2\) takes 4 values in each row, got 3"),
        (ROWS.reshape(15, 2, 3), {"image_size": 4}, r"does not fit images of 2 x 3"),
        (ROWS, {"image_size": (0, 3)}, r"image_size must be a side or \(height, width\)"),
        (ROWS, {"image_size": (4097, 3)}, r"each from 1 to 4096 pixels, got \(4097, 3\)"),
        (ROWS, {"image_size": 10**9}, r"each from 1 to 4096 pixels, got 1000000000"),
        (ROWS, {"image_size": "big"}, r"image_size must be a side or \(height, width\)"),
        (ROWS, {"seed": -1}, r"seed must be an integer from 0"),
        (ROWS, {"binarize": "often"}, r"data: binarize must be None, 'threshold'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_to_do(source, arguments, said) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        dataset(source, **arguments)
    assert "\n" not in str(caught.value)


def test_torch_datasets_that_cannot_be_read_say_why() -> None:
    class Endless(IterableDataset):
        def __iter__(self):
            yield torch.zeros(2)

    class Rows(TorchDataset):
        def __init__(self, items: list) -> None:
            self.items = items

        def __len__(self) -> int:
            return len(self.items)

        def __getitem__(self, i: int):
            return self.items[i]

    with pytest.raises(ValueError, match="a torch Dataset must have a length and items by number"):
        dataset(Endless())
    with pytest.raises(ValueError, match="the torch Dataset is empty"):
        dataset(Rows([]))
    with pytest.raises(ValueError, match=r"must be a row or \(row, label\), got a tuple of 3"):
        dataset(Rows([(1, 2, 3)] * 4))
    with pytest.raises(ValueError, match=r"got rows of \(2,\), \(3,\)"):
        dataset(Rows([torch.zeros(2), torch.zeros(3)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_continuous_target_in_a_tensor_is_taken_in_any_precision(dtype) -> None:
    y = torch.linspace(0, 1, 20).to(dtype)
    data = dataset(torch.rand(20, 3), y=y)
    got = torch.cat([data.y, data.y_test]).sort().values
    assert torch.equal(got, y.float())
