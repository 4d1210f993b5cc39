"""A user's own data: arrays, tables, files, folders of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.core.checks import check_known
from ppl_models.data.dataset import Binarize, Dataset
from ppl_models.data.split import split_rows

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
_SOURCES = (
    "a tensor, a numpy array, a pandas DataFrame, a torch Dataset, or the path of a folder of "
    "images or of a .csv, .tsv, .npy or .npz file"
)
_SIDE = 4096  # pixels; a row of such images has 16 million values


@dataclass(frozen=True)
class _Rows:
    """What was read from a source, before it is checked."""

    x: np.ndarray
    y: Any = None
    columns: tuple[str, ...] | None = None
    whole: bool = False  # whether a table held whole numbers only


def dataset(
    source: Any,
    *,
    y: Any = None,
    test: float = 0.2,
    binarize: Binarize | None = None,
    image_size: int | tuple[int, int] | None = None,
    standardize: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> Dataset:
    """Make a data set with a fixed split of your own data.

    Values become float32 and are otherwise left as they are, except that images of bytes (a folder
    of images, or whole numbers 0 to 255 of any integer dtype in the shapes of images or with
    `image_size`) are scaled to [0, 1]. Images of zeros and ones stay what they are; to keep other
    whole numbers, pass floats.

    Arguments:
        source: One of

            - a tensor or numpy array of rows (N, D), or of grey images (N, H, W) or (N, 1, H, W)
            - a pandas DataFrame of numbers
            - a torch Dataset whose items are rows or images, or (row, label)
            - the path of a folder of images, which are made grey; with one subfolder for each
              class, its names are the labels
            - the path of a .csv or .tsv file with a line of names and columns of numbers; a column
              without a name, such as pandas writes for its index, is left out
            - the path of a .npy file, or of a .npz file with x and, if there are labels, y

        y: Labels or targets, one for each row; or the name of a column of a DataFrame or .csv
            file. A Series beside a DataFrame must have the same index. Strings, whole numbers and booleans are classes, coded 0 to C - 1 in sorted order;
            what they stand for is in `labels`. Floats are a continuous target.
        test: Share of the rows to test, or their number; split by class where there are classes.
        binarize: As in `load`, for values in [0, 1].
        image_size: Side, or height and width, that the images of a folder are resized to; by
            default they must all have one size. For flat rows, their height and width. At most
            4096 a side.
        standardize: Whether to standardise the columns and a continuous y by the training rows.
        seed: Fixes the split.
        name: What to call it; by default the file's name, or "data".

    Raises:
        ValueError: If the source cannot be read, is not all numbers, has missing values or too few
            rows, or an argument does not fit it.

    Example:
        >>> import numpy as np
        >>> x = np.arange(40.0).reshape(20, 2)
        >>> dataset(x, y=["low"] * 10 + ["high"] * 10, name="ramp")
        Dataset ramp: 16 rows + 4 test, 2 values in [0, 39], 2 classes
    """
    size = _size(image_size)
    rows, name = _read(source, y, size, name)
    x, image_shape = _values(rows, size)
    target, labels = _target(rows.y, len(x))
    count = _test_rows(test, len(x))
    train, held = split_rows(
        len(x), count, seed=_seed(seed), classes=None if labels is None else target
    )
    values = torch.from_numpy(x)
    targets = None if target is None else torch.from_numpy(target)
    data = Dataset(
        name=name,
        binarize=None,
        x=values[train],
        y=None if targets is None else targets[train],
        x_test=values[held],
        y_test=None if targets is None else targets[held],
        image_shape=image_shape,
        classes=None if labels is None else len(labels),
        labels=labels,
        columns=rows.columns,
    ).binarized(binarize)
    return data.standardized() if standardize else data


def _read(source: Any, y: Any, size: tuple[int, int] | None, name: str | None) -> tuple[_Rows, str]:
    """Read a source of any kind; the labels that it holds give way to those that are given."""
    import pandas as pd

    called = name or "data"
    if isinstance(source, pd.DataFrame):
        return _from_frame(source, y), called
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        called = name or path.resolve().stem
        if path.is_dir():
            rows = _from_folder(path, size)
        elif path.is_file():
            reader = _READERS.get(path.suffix.lower())
            if reader is None:
                raise ValueError(_no_reader(path))
            rows = reader(path)
        else:
            raise ValueError(f"dataset: there is no file or folder '{path}'.")
        if isinstance(rows, pd.DataFrame):
            return _from_frame(rows, y), called
    elif isinstance(source, torch.utils.data.Dataset):
        rows = _from_torch(source)
    elif isinstance(source, Tensor | np.ndarray | list | tuple):
        rows = _Rows(_array(source))
    else:
        raise ValueError(f"dataset: the source must be {_SOURCES}, got {type(source).__name__}.")
    if isinstance(y, str):
        raise ValueError(
            f"dataset: y={y!r} names a column, which takes a DataFrame or a .csv file. Give the "
            "labels themselves, one for each row."
        )
    return (rows if y is None else _Rows(rows.x, y)), called


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, np.ndarray):
        return values
    try:
        return np.stack([_array(v) if isinstance(v, Tensor) else np.asarray(v) for v in values])
    except (TypeError, ValueError) as error:
        shapes = dict.fromkeys(str(_shape(v)) for v in values)
        raise ValueError(
            "dataset: all rows must be numbers in the same shape, got rows of "
            f"{', '.join(list(shapes)[:3]) or 'nothing'}."
        ) from error


def _shape(row: Any) -> Any:
    return tuple(row.shape) if hasattr(row, "shape") else np.shape(row)


def _from_frame(frame: pd.DataFrame, y: Any) -> _Rows:
    frame = frame.rename(columns=str)
    if isinstance(y, str):
        check_known("column", y, frame.columns)
        y, frame = frame[y], frame.drop(columns=y)
    _check_index(frame, y)
    kinds = {name: dtype.kind for name, dtype in frame.dtypes.items()}
    text = [repr(name) for name, kind in kinds.items() if kind not in "iufb"]
    if text and len(frame):  # without rows, columns are of no type
        raise ValueError(
            f"dataset: all columns must be numbers, but {', '.join(text[:5])} "
            f"{'is' if len(text) == 1 else 'are'} not. Drop them, or encode them, as "
            "pandas.get_dummies does."
        )
    if not kinds:
        raise ValueError("dataset: no columns are left for x.")
    x = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return _Rows(x, y, tuple(map(str, frame.columns)), whole=set(kinds.values()) <= {"i", "u"})


def _check_index(frame: pd.DataFrame, y: Any) -> None:
    """Refuse labels that pandas would put beside other rows than their position does."""
    import pandas as pd

    if not isinstance(y, pd.Series | pd.DataFrame) or len(y) != len(frame):
        return
    if not y.index.equals(frame.index):
        pairs = enumerate(zip(y.index, frame.index, strict=True))
        row, (got, want) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"dataset: y must have the index of the DataFrame, but row {row} is {got!r} in y and "
            f"{want!r} in the DataFrame. Align them with y=y.loc[frame.index]; or, if their rows "
            "are in the same order, give y=y.to_numpy()."
        )


def _from_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    sep = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # by default the surplus fields at the start of a row become the index, without a word
            frame = pd.read_csv(path, sep=sep, index_col=False)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"dataset: '{path}' must be text in UTF-8, got {_line(error)}. Its encoding is likely "
            "another one: read it with pandas and pass the frame: "
            "dataset(pandas.read_csv(path, encoding='cp1252'), ...)."
        ) from error
    except pd.errors.ParserWarning as error:
        start = pd.read_csv(path, sep=sep, nrows=1)
        names = len(start.columns)
        raise ValueError(
            f"dataset: the first line of '{path}' must name every column, but it has {names} "
            f"{'field' if names == 1 else 'fields'} and the next one has "
            f"{names + start.index.nlevels}. {_advice(sep)}"
        ) from error
    except pd.errors.ParserError as error:
        raise ValueError(
            f"dataset: '{path}' is no table: {_line(error)}. {_advice(sep)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"dataset: '{path}' is no table: {_line(error)}.") from error
    if len(frame.columns) == 1 and frame.dtypes.iloc[0].kind not in "iufb":
        name = str(frame.columns[0])
        if any(mark in name for mark in {",", ";", "\t"} - {sep}):
            raise ValueError(
                f"dataset: the columns of '{path}' must be separated by {sep!r}, but there is only "
                f"one, {name!r}. {_advice(sep)}"
            )
    if len(frame.columns) and all(_is_number(name) for name in frame.columns):
        raise ValueError(
            f"dataset: the first line of '{path}' must hold the names of the columns, got numbers."
        )
    return frame.loc[:, ~frame.columns.str.match(r"Unnamed: \d+$")]


def _advice(sep: str) -> str:
    asked = "';'" if sep == "," else "',' or ';'"
    return (
        f"Is the separator {asked}, or the decimal sign ','? Then read it with pandas and pass the "
        "frame: dataset(pandas.read_csv(path, sep=';', decimal=','), ...)."
    )


def _from_npy(path: Path) -> _Rows:
    try:
        return _Rows(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"dataset: '{path}' is no array of numbers: {_line(error)}.") from error


def _from_npz(path: Path) -> _Rows:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            arrays = {key: kept[key] for key in kept.files if key in ("x", "y")}
            found = kept.files
    except Exception as error:
        # A broken zip fails anywhere in zipfile, zlib or numpy, each in its way.
        raise ValueError(f"dataset: '{path}' is no .npz file: {_line(error)}.") from error
    if "x" not in arrays:
        raise ValueError(
            f"dataset: '{path}' must hold an array x, and y if there are labels; got "
            f"{', '.join(found) or 'nothing'}."
        )
    return _Rows(arrays["x"], arrays.get("y"))


def _from_torch(source: Any) -> _Rows:
    try:
        items = [source[i] for i in range(len(source))]
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            "dataset: a torch Dataset must have a length and items by number."
        ) from error
    if not items:
        raise ValueError("dataset: the torch Dataset is empty.")
    pairs: list[Any] = [item if isinstance(item, tuple | list) else (item,) for item in items]
    if {len(pair) for pair in pairs} not in ({1}, {2}):
        raise ValueError(
            "dataset: every item of a torch Dataset must be a row or (row, label), got a tuple of "
            f"{max(len(pair) for pair in pairs)}."
        )
    x = _array([_pixels(pair[0]) for pair in pairs])
    return _Rows(x, [_plain(pair[1]) for pair in pairs] if len(pairs[0]) == 2 else None)


def _from_folder(folder: Path, size: tuple[int, int] | None) -> _Rows:
    groups = {
        sub.name: _images_in(sub)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    groups = {label: paths for label, paths in groups.items() if paths}
    flat = _images_in(folder)
    if flat and groups:
        raise ValueError(
            f"dataset: '{folder}' must hold images, or a subfolder of images for each class; it "
            f"holds both ({flat[0].name} and {next(iter(groups))}/)."
        )
    if not flat and not groups:
        raise ValueError(
            f"dataset: there are no images in '{folder}', nor one folder down; looked for "
            f"{', '.join(sorted(_IMAGES))}."
        )
    paths = flat or [path for group in groups.values() for path in group]
    labels = [label for label, group in groups.items() for _ in group] or None
    images = []
    for path in paths:
        image = _open(path, size)
        if images and image.shape != images[0].shape:
            raise ValueError(
                "dataset: all images must have one size, but {} is {} x {} and {} is {} x {} "
                "(height x width). Give image_size=(height, width) to resize them.".format(
                    paths[0].name, *images[0].shape, path.name, *image.shape
                )
            )
        images.append(image)
    return _Rows(np.stack(images), labels)


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _IMAGES and path.is_file() and not path.name.startswith(".")
    )


def _open(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            grey = _grey(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"dataset: '{path}' is no image that can be read.") from error
    if size is not None and grey.shape != size:
        height, width = size
        resized = Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR)
        grey = np.asarray(resized)
    return grey


def _grey(image: Image.Image) -> np.ndarray:
    """Grey values in [0, 1], height by width."""
    if image.mode.startswith("I"):  # 16 bits, which a conversion to 8 would cut off
        return np.asarray(image, dtype=np.float32) / np.float32(65535)
    return np.asarray(image.convert("L"), dtype=np.float32) / np.float32(255)


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _pixels(value: Any) -> Any:
    """Turn an image, such as the items of torchvision are, into an array."""
    return _grey(value) if hasattr(value, "convert") and hasattr(value, "mode") else value


def _values(rows: _Rows, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Check the rows and lay them flat."""
    x = rows.x
    if x.dtype.kind not in "iufb":
        raise ValueError(f"dataset: the rows must be numbers, got dtype {x.dtype}.")
    image = x.ndim == 3 or (x.ndim == 4 and x.shape[1] == 1)
    if not image and x.ndim != 2:
        raise ValueError(
            "dataset: rows must have the shape (N, D), or (N, H, W) or (N, 1, H, W) for grey "
            f"images, got {tuple(x.shape)}."
        )
    if len(x) < 2 or 0 in x.shape:
        raise ValueError(
            "dataset: at least 2 rows are needed, one to train and one to test, and at least one "
            f"value in each, got shape {tuple(x.shape)}."
        )
    shape = (int(x.shape[-2]), int(x.shape[-1])) if image else None
    if size is not None and shape not in (None, size):
        raise ValueError(
            "dataset: image_size={} does not fit images of {} x {}; only images of a folder are "
            "resized.".format(size, *shape)
        )
    flat = x.reshape(len(x), -1)
    if shape is None and size is not None:
        if size[0] * size[1] != flat.shape[1]:
            raise ValueError(
                f"dataset: image_size={size} takes {size[0] * size[1]} values in each row, got "
                f"{flat.shape[1]}."
            )
        shape = size
    with np.errstate(over="ignore"):
        out = np.array(flat, dtype=np.float32, order="C")
    whole = rows.whole or x.dtype.kind in "iu"
    if shape is not None and whole and out.min() >= 0 and 1 < out.max() <= 255:
        out /= np.float32(255)
    bad = ~np.isfinite(out)
    if bad.any():
        columns = np.flatnonzero(bad.any(axis=0))[:5].tolist()
        named = [repr(rows.columns[c]) if rows.columns else str(c) for c in columns]
        raise ValueError(
            f"dataset: {int(bad.any(axis=1).sum())} of {len(out)} rows have missing or infinite "
            f"values, in column {', '.join(named)}. Fill them, or drop those rows."
        )
    return out, shape


def _target(y: Any, rows: int) -> tuple[np.ndarray | None, tuple[str | int, ...] | None]:
    """Code classes 0 to C - 1 with the labels behind them; leave floats as they are."""
    if y is None:
        return None, None
    import pandas as pd

    values = _array(y) if isinstance(y, Tensor) else y
    series = pd.Series(np.ravel(values) if isinstance(values, np.ndarray) else values)
    if np.shape(values) not in ((rows,), (rows, 1)):
        raise ValueError(
            f"dataset: y must hold one label or target for each of the {rows} rows, got shape "
            f"{tuple(np.shape(values))}."
        )
    missing = int(series.isna().sum())
    if missing:
        raise ValueError(f"dataset: {missing} of {rows} labels or targets are missing.")
    if series.dtype.kind == "f":
        target = series.to_numpy(
            dtype=np.float32, copy=True
        )  # pandas shares what may not be written
        if not np.isfinite(target).all():
            raise ValueError("dataset: targets must be finite.")
        return target, None
    items = series.tolist()
    if not all(isinstance(item, str | Integral | np.bool_) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise ValueError(
            f"dataset: y must hold strings or whole numbers (classes) or floats, got {kinds}."
        )
    if len({isinstance(item, str) for item in items}) > 1:
        raise ValueError("dataset: y mixes strings and numbers; use one of the two.")
    labels = sorted(set(items))
    if len(labels) > rows / 2 and not isinstance(labels[0], str | bool | np.bool_):
        warnings.warn(
            f"dataset: y holds whole numbers, which are classes, and {len(labels)} of them in "
            f"{rows} rows. If they are a quantity, pass floats, which are a continuous target: "
            "y.astype(float), or 3.0 in place of 3 in a file.",
            stacklevel=3,
        )
    code = {label: i for i, label in enumerate(labels)}
    return np.array([code[item] for item in items], dtype=np.int64), tuple(labels)


def _test_rows(test: float, rows: int) -> int:
    """Turn a share or a number into a number that leaves a row on both sides."""
    right = isinstance(test, Real) and not isinstance(test, bool)
    if right and isinstance(test, Integral) and 1 <= test < rows:
        return int(test)
    if right and 0 < test < 1:
        return min(max(1, round(float(test) * rows)), rows - 1)
    raise ValueError(
        "dataset: test must be a share between 0 and 1 or a number of rows from 1 to "
        f"{rows - 1}, got {test!r}. At least one row to test is needed: what a model is worth "
        "shows on rows it has not seen."
    )


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair: Any = (size, size) if isinstance(size, Integral) else size
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(v, Integral) and 1 <= int(v) <= _SIDE for v in pair)
    ):
        raise ValueError(
            f"dataset: image_size must be a side or (height, width), each from 1 to {_SIDE} "
            f"pixels, got {size!r}."
        )
    return int(pair[0]), int(pair[1])


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"dataset: seed must be an integer from 0 to 2**32 - 1, got {seed!r}.")
    return int(seed)


def _no_reader(path: Path) -> str:
    if path.suffix.lower() in (".pt", ".pth", ".pkl", ".pickle"):
        return (
            f"dataset: '{path}' is a pickle, which may run code when it is read. Load it yourself, "
            "and pass the tensor or array."
        )
    return f"dataset: '{path}' is of no known kind. The source must be {_SOURCES}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".csv": _from_table,
    ".tsv": _from_table,
    ".npy": _from_npy,
    ".npz": _from_npz,
}
