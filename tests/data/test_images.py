"""Images: sizes, splits, values, labels, and that they stand upright."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from sklearn.datasets import load_digits
from torch.testing import assert_close

from ppl_models.data import Dataset, cache, images, load
from ppl_models.data.cache import digest


def test_the_split_is_1437_rows_to_train_and_360_to_test() -> None:
    digits = load("digits")
    assert digits.x.shape == (1437, 64)
    assert digits.y.shape == (1437,)
    assert digits.x_test.shape == (360, 64)
    assert digits.y_test.shape == (360,)
    assert digits.image_shape == (8, 8)
    assert digits.classes == 10
    assert (digits.name, digits.binarize) == ("digits", None)


def test_every_row_of_the_source_is_in_one_part_with_its_label() -> None:
    digits = load("digits")
    bunch = load_digits()
    source = np.column_stack([bunch.data, bunch.target])
    ours = torch.cat(
        [
            torch.cat([digits.x * 16, digits.y[:, None].float()], 1),
            torch.cat([digits.x_test * 16, digits.y_test[:, None].float()], 1),
        ]
    ).numpy()
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], source[np.lexsort(source.T)])
    # No image is twice in the source, so the two parts are disjoint.
    assert len(np.unique(source, axis=0)) == len(source)


def test_the_split_has_the_same_share_of_each_class() -> None:
    digits = load("digits")
    count = torch.bincount(torch.cat([digits.y, digits.y_test]))
    expected = count * 360 / 1797
    assert ((torch.bincount(digits.y_test) - expected).abs() < 1).all()


def test_the_split_is_always_the_same() -> None:
    first, second = load("digits"), load("digits", binarize="threshold")
    assert torch.equal(first.y, second.y)
    assert torch.equal((first.x >= 0.5).float(), second.x)
    assert torch.equal((first.x_test >= 0.5).float(), second.x_test)
    # Sums weighted by position: any other order or split moves them.
    place = torch.arange(1, 361)
    assert int((first.y_test * place).sum()) == 283622
    assert int(((first.x_test * 16).sum(1).long() * place).sum()) == 20286355


def test_values_are_grey_in_the_unit_interval_or_zero_and_one() -> None:
    grey, binary = load("digits"), load("digits", binarize="threshold")
    assert torch.equal(grey.x.unique() * 16, torch.arange(17.0, dtype=torch.float32))
    assert binary.x.unique().tolist() == binary.x_test.unique().tolist() == [0.0, 1.0]
    assert binary.binarize == "threshold"
    for data in (grey, binary):
        assert data.x.dtype == data.x_test.dtype == torch.float32
        assert data.y.dtype == data.y_test.dtype == torch.int64


def test_loading_draws_nothing_from_the_random_streams() -> None:
    state = torch.get_rng_state()
    random = np.random.mtrand._rand  # the global stream that scikit-learn may use
    numpy_state = random.get_state()[1].copy()
    load("digits")
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(random.get_state()[1], numpy_state)


MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def mnist(load_at_hand) -> Dataset:
    return load_at_hand("mnist", "mnist/train-images-idx3-ubyte.gz")


def test_mnist_is_what_was_published(mnist) -> None:
    assert (mnist.x.shape, mnist.x_test.shape) == ((60000, 784), (10000, 784))
    assert mnist.y.bincount().tolist() == MNIST_TRAIN
    assert mnist.y_test.bincount().tolist() == MNIST_TEST
    assert mnist.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert (mnist.x.min().item(), mnist.x.max().item()) == (0, 1)
    # Mean and scale as everybody normalises with.
    assert mnist.x.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert mnist.x.std().item() == pytest.approx(0.3081, abs=5e-5)
    # The first five, row 5 of 28, from pixel 12 on.
    row = (mnist.x[0].reshape(28, 28)[5, 12:] * 255).round().int().tolist()
    assert row == [3, 18, 18, 18, 126, 136, 175, 26, 166, 255, 247, 127, 0, 0, 0, 0]
    assert (mnist.image_shape, mnist.classes, mnist.binarize) == ((28, 28), 10, None)
    assert mnist.x.dtype == torch.float32
    assert mnist.y.dtype == torch.int64


def test_binarized_mnist_is_a_draw_of_the_digits_of_mnist(mnist, load_at_hand) -> None:
    place = "binarized_mnist/binarized_mnist_packbits.npz"
    static = load_at_hand("binarized_mnist", place, binarize="static")
    parts = (static.x, static.x_valid, static.x_test)
    assert [tuple(part.shape) for part in parts] == [(50000, 784), (10000, 784), (10000, 784)]
    assert all(part.dtype == torch.float32 for part in parts)
    assert all(bool(((part == 0) | (part == 1)).all()) for part in parts)
    assert (static.name, static.binarize, static.classes) == ("binarized_mnist", "static", None)
    assert static.y is static.y_test is static.y_valid is None
    # The training and validation rows are the digits that are published as training rows, in
    # another order, and each pixel of each was drawn with its grey value.
    for drawn, p in (((static.x, static.x_valid), mnist.x), ((static.x_test,), mnist.x_test)):
        counts = sum(part.sum(0, dtype=torch.float64) for part in drawn)
        total = p.sum(0, dtype=torch.float64)
        variance = total - p.square().sum(0, dtype=torch.float64)
        assert bool(((counts - total).abs() <= 5 * variance.clamp(min=0).sqrt() + 1e-3).all())


def test_mnist_drawn_statically_is_larochelles_file(load_at_hand) -> None:
    place = "binarized_mnist/binarized_mnist_packbits.npz"
    static = load_at_hand("mnist", place, binarize="static")
    assert (static.name, len(static.x)) == ("binarized_mnist", 50000)
    assert [int(part[:10].sum()) for part in (static.x, static.x_valid, static.x_test)] == [
        1142,
        815,
        1327,
    ]


def test_the_published_texts_of_binarized_mnist_are_unpacked_rightly(at_hand) -> None:
    path = at_hand("binarized_mnist", "binarized_mnist/binarized_mnist_packbits.npz")
    part, file = "test", images._BINARIZED[2]
    with np.load(path) as kept:
        packed = kept[part]
    text = np.full((len(packed), 784 * 2), ord(" "), dtype=np.uint8)
    text[:, ::2] = np.unpackbits(packed, axis=1) + ord("0")
    text[:, -1] = ord("\n")
    content = text.tobytes()
    # The very bytes that are published, so what is made of them is what is made of a download.
    assert file.digests == (f"sha256:{digest(content, 'sha256')}",)
    np.testing.assert_array_equal(images.packed_amat(content), packed)


def test_fashion_mnist_is_what_was_published(load_at_hand) -> None:
    fashion = load_at_hand("fashion_mnist", "fashion_mnist/train-images-idx3-ubyte.gz")
    assert (fashion.x.shape, fashion.x_test.shape) == ((60000, 784), (10000, 784))
    assert fashion.y.bincount().tolist() == [6000] * 10
    assert fashion.y_test.bincount().tolist() == [1000] * 10
    assert fashion.x.mean().item() == pytest.approx(0.2860, abs=1e-4)


def test_omniglot_is_what_was_published(load_at_hand) -> None:
    omniglot = load_at_hand("omniglot", "omniglot/chardata.mat")
    assert (omniglot.x.shape, omniglot.x_test.shape) == ((24345, 784), (8070, 784))
    assert omniglot.y.unique().tolist() == list(range(50))


def upright(image: torch.Tensor) -> bool:
    """Whether a mean face is nearer to its mirror image than to itself upside down."""
    return bool((image - image.flip(1)).square().sum() < (image - image.flip(0)).square().sum() / 2)


def test_olivetti_has_eight_and_two_pictures_of_each_upright(load_at_hand, at_hand) -> None:
    olivetti = load_at_hand("olivetti", "olivetti/olivettifaces.mat")
    assert (olivetti.x.shape, olivetti.x_test.shape) == ((320, 4096), (80, 4096))
    assert olivetti.y.bincount().tolist() == [8] * 40
    assert olivetti.y_test.bincount().tolist() == [2] * 40
    assert (olivetti.image_shape, olivetti.classes) == ((64, 64), 40)
    raw = loadmat(at_hand("olivetti", "olivetti/olivettifaces.mat"))["faces"] / 255
    picture = olivetti.x[8].reshape(64, 64).numpy()  # the first of the second person
    np.testing.assert_allclose(picture[3:5, 7], raw[7 * 64 + 3 : 7 * 64 + 5, 10], rtol=1e-6)
    np.testing.assert_allclose(olivetti.x_test[1].sum(), raw[:, 9].sum(), rtol=1e-5)
    mean = olivetti.x.mean(0).reshape(64, 64)
    assert upright(mean)
    assert not upright(mean.T)
    assert mean[:32].sum() > mean[32:].sum()  # foreheads are bright and lie above


def test_frey_faces_are_upright_and_each_frame_is_in_one_part(load_at_hand, at_hand) -> None:
    frey = load_at_hand("frey_faces", "frey_faces/frey_rawface.mat")
    assert (frey.x.shape, frey.x_test.shape) == ((1572, 560), (393, 560))
    assert (frey.image_shape, frey.y, frey.classes) == ((28, 20), None, None)
    raw = loadmat(at_hand("frey_faces", "frey_faces/frey_rawface.mat"))["ff"].T
    ours = (torch.cat([frey.x, frey.x_test]) * 255).round().numpy().astype(np.uint8)
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], raw[np.lexsort(raw.T)])
    mean = frey.x.mean(0).reshape(28, 20)
    # Rows of 20: neighbours below each other differ little, as they would not in rows of 28.
    rough = [frey.x.mean(0).reshape(s).diff(dim=0).abs().mean() for s in ((28, 20), (20, 28))]
    assert rough[0] < rough[1] / 2
    assert mean[:8].mean() > mean[-8:].mean() + 0.05  # a bright forehead, and a chin over shadow


def test_the_split_of_frey_faces_is_always_the_same(load_at_hand) -> None:
    frey = load_at_hand("frey_faces", "frey_faces/frey_rawface.mat")
    place = torch.arange(1, 394)
    assert int(((frey.x_test * 255).round().long().sum(1) * place).sum()) == 6715004525


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_idx_files_are_decoded() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.testing.assert_array_equal(images.decode_idx(idx(array)), array)
    for bad in (b"\0\0\x0d\x01" + bytes(8), b"PK", idx(array)[:-1]):
        with pytest.raises(ValueError, match=r"."):
            images.decode_idx(bad)


def test_fashion_mnist_is_read_from_four_files(empty_cache, monkeypatch) -> None:
    x = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    arrays = (x, np.array([3, 9], np.uint8), x[:1] + np.uint8(1), np.array([4], np.uint8))
    files = []
    (empty_cache / "fashion_mnist").mkdir(parents=True)
    for file, array in zip(images._FASHION, arrays, strict=True):
        content = gzip.compress(idx(array))
        (empty_cache / file.place).write_bytes(content)
        files.append(replace(file, digests=(f"md5:{digest(content, 'md5')}",)))
    monkeypatch.setattr(images, "_FASHION", tuple(files))
    fashion = load("fashion_mnist")
    assert_close(fashion.x * 255, torch.from_numpy(x.reshape(2, 784)).float())
    assert_close(fashion.x_test[0, 0].item(), 1 / 255)
    assert (fashion.y.tolist(), fashion.y_test.tolist()) == ([3, 9], [4])


def test_omniglot_is_read_upright_from_its_file(empty_cache, monkeypatch) -> None:
    image = np.linspace(0, 1, 784).reshape(28, 28)
    target = np.eye(50)[:, [7, 2]]
    stored = {
        "data": np.stack([image.T.ravel(), image.ravel()], axis=1),  # down the columns
        "testdata": image.T.reshape(784, 1),
        "target": target,
        "testtarget": target[:, 1:],
    }
    buffer = io.BytesIO()
    savemat(buffer, stored)
    (empty_cache / "omniglot").mkdir(parents=True)
    (empty_cache / "omniglot/chardata.mat").write_bytes(buffer.getvalue())
    digests = (f"git:{digest(buffer.getvalue(), 'git')}",)
    monkeypatch.setattr(images, "_OMNIGLOT", replace(images._OMNIGLOT, digests=digests))
    omniglot = load("omniglot")
    assert_close(omniglot.x[0].reshape(28, 28), torch.from_numpy(image).float())
    assert_close(omniglot.x[1].reshape(28, 28), torch.from_numpy(image.T).float())
    assert_close(omniglot.x_test[0], omniglot.x[0])
    assert (omniglot.y.tolist(), omniglot.y_test.tolist()) == ([7, 2], [2])


def test_a_corrupt_file_of_mnist_is_told_and_fetched_again(
    at_hand, empty_cache, monkeypatch
) -> None:
    at_hand("mnist", "mnist/train-images-idx3-ubyte.gz")
    for file in images._MNIST:
        source = at_hand("mnist", file.place)
        (empty_cache / file.place).parent.mkdir(parents=True, exist_ok=True)
        (empty_cache / file.place).write_bytes(source.read_bytes())
    spoilt = empty_cache / images._MNIST[3].place
    whole = spoilt.read_bytes()
    spoilt.write_bytes(whole[:1000])
    monkeypatch.setattr(cache, "_download", lambda url, label: whole)
    with pytest.warns(
        UserWarning, match=r"^mnist: \S+t10k-labels\S+ is corrupt: expected md5:ec29"
    ):
        assert load("mnist").y_test.bincount().tolist() == MNIST_TEST
    assert spoilt.read_bytes() == whole
