"""Loaders of images: digits, MNIST and its kin, faces."""

from __future__ import annotations

import gzip
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.data.cache import File, read, read_arrays
from ppl_models.data.dataset import Dataset
from ppl_models.data.split import split_rows

_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MNIST = tuple(
    File(f"mnist/{name}", f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}", (f"md5:{md5}",))
    for name, md5 in zip(
        _IDX,
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        strict=True,
    )
)
_FASHION = tuple(
    File(
        f"fashion_mnist/{name}",
        f"https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/{name}",
        (f"md5:{md5}",),
    )
    for name, md5 in zip(
        _IDX,
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        strict=True,
    )
)
_BINARIZED = tuple(
    File(
        f"binarized_mnist/binarized_mnist_{part}.amat",
        "https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
        f"binarized_mnist_{part}.amat",
        (f"sha256:{sha256}",),
    )
    for part, sha256 in (
        ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
)
_OMNIGLOT = File(
    "omniglot/chardata.mat",
    "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
    ("git:016a3536ffe5e1d38e42563a18d7a78bfaf643ec",),
)
_OLIVETTI = File(
    "olivetti/olivettifaces.mat",
    "https://ndownloader.figshare.com/files/5976027",
    (
        "sha256:b612fb967f2dc77c9c62d3e1266e0c73d5fca46a4b8906c18e454d41af987794",
        # The same pixels, saved again by another version of the same program.
        "sha256:b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d",
    ),
)
_FREY = File(
    "frey_faces/frey_rawface.mat",
    "https://cs.nyu.edu/~roweis/data/frey_rawface.mat",
    ("md5:5aeb024d42b8a6091f30e5eb18c8a48d",),
)


def digits() -> Dataset:
    """1797 handwritten digits of 8 x 8, which come with scikit-learn; split by class."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.tensor(bunch.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = split_rows(len(images), 360, seed=0, classes=bunch.target)
    return Dataset(
        name="digits",
        binarize=None,
        x=images[train],
        y=labels[train],
        x_test=images[test],
        y_test=labels[test],
        image_shape=(8, 8),
        classes=10,
    )


def mnist() -> Dataset:
    """Handwritten digits of 28 x 28, 60000 and 10000 as published (LeCun & Cortes)."""
    return _from_idx("mnist", read("mnist", _MNIST))


def fashion_mnist() -> Dataset:
    """Pictures of clothes of 28 x 28, 60000 and 10000 as published (Zalando)."""
    return _from_idx("fashion_mnist", read("fashion_mnist", _FASHION))


def binarized_mnist() -> Dataset:
    """Larochelle's static binarisation of MNIST: 50000, 10000 and 10000 rows without labels."""
    parts = ("train", "valid", "test")
    packed = read_arrays(
        "binarized_mnist",
        "binarized_mnist/binarized_mnist_packbits.npz",
        "content sha256:e643191c9e4f1aec2e42425c79eae20dfca039fe74e15bb6b75dfe2758becdf8",
        parts,
        _BINARIZED,
        lambda contents: {
            part: packed_amat(content) for part, content in zip(parts, contents, strict=True)
        },
    )
    x, x_valid, x_test = (
        torch.from_numpy(np.unpackbits(packed[part], axis=1)).float() for part in parts
    )
    return Dataset(
        name="binarized_mnist",
        binarize="static",
        x=x,
        y=None,
        x_test=x_test,
        y_test=None,
        image_shape=(28, 28),
        x_valid=x_valid,
    )


def omniglot() -> Dataset:
    """Characters of 50 alphabets, 28 x 28, in the version and split of Burda et al. (2016)."""
    from scipy.io import loadmat

    content = loadmat(io.BytesIO(read("omniglot", [_OMNIGLOT])[0]))
    x, x_test = (_upright(content[key], 28) for key in ("data", "testdata"))
    y, y_test = (torch.from_numpy(content[key].argmax(axis=0)) for key in ("target", "testtarget"))
    return Dataset(
        name="omniglot",
        binarize=None,
        x=x,
        y=y,
        x_test=x_test,
        y_test=y_test,
        image_shape=(28, 28),
        classes=50,
    )


def olivetti() -> Dataset:
    """Faces of 64 x 64, 40 people; 8 pictures of each to train and 2 to test (AT&T Cambridge)."""
    from scipy.io import loadmat

    pixels = loadmat(io.BytesIO(read("olivetti", [_OLIVETTI])[0]))["faces"]
    x = _upright(pixels / 255.0, 64)
    y = torch.arange(40).repeat_interleave(10)
    test = torch.arange(400) % 10 >= 8
    return Dataset(
        name="olivetti",
        binarize=None,
        x=x[~test],
        y=y[~test],
        x_test=x[test],
        y_test=y[test],
        image_shape=(64, 64),
        classes=40,
    )


def frey_faces() -> Dataset:
    """1965 frames of one face, 28 x 20; neighbouring frames are near duplicates (Roweis)."""
    from scipy.io import loadmat

    pixels = loadmat(io.BytesIO(read("frey_faces", [_FREY])[0]))["ff"]
    x = torch.from_numpy(pixels.T / 255.0).float()
    train, test = split_rows(len(x), 393, seed=0)
    return Dataset(
        name="frey_faces",
        binarize=None,
        x=x[train],
        y=None,
        x_test=x[test],
        y_test=None,
        image_shape=(28, 20),
    )


def decode_idx(content: bytes) -> np.ndarray:
    """Return the array of bytes that an idx file holds."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("no idx file of bytes")
    dims = content[3]
    shape = np.frombuffer(content, ">u4", count=dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape.tolist())


def packed_amat(content: bytes) -> np.ndarray:
    """Return the bits of a text of rows "0 1 ...", eight to a byte."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, 784 * 2)  # each digit, and what ends it
    return np.packbits(rows[:, ::2] == ord("1"), axis=1)


def _from_idx(name: str, contents: list[bytes]) -> Dataset:
    x, y, x_test, y_test = (decode_idx(gzip.decompress(content)) for content in contents)
    return Dataset(
        name=name,
        binarize=None,
        x=_grey(x),
        y=torch.from_numpy(y.astype(np.int64)),
        x_test=_grey(x_test),
        y_test=torch.from_numpy(y_test.astype(np.int64)),
        image_shape=(28, 28),
        classes=10,
    )


def _grey(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255)


def _upright(columns: np.ndarray, side: int) -> Tensor:
    """Turn square images stored down their columns, one image a column, into rows."""
    images = columns.T.reshape(-1, side, side).transpose(0, 2, 1)
    return torch.from_numpy(images.reshape(-1, side * side).astype(np.float32))
