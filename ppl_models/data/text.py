"""Loaders of texts, as counts of words."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.data.cache import File, read_arrays
from ppl_models.data.dataset import Dataset
from ppl_models.data.split import split_rows

# Training, validation and test documents, and two halves of each test document.
_PARTS = ("tr", "va", "ts", "ts_h1", "ts_h2")
_ETM = "https://github.com/MIND-Lab/OCTIS/raw/master/octis/models/ETM_model/data/20ng"
_NEWSGROUPS = tuple(
    File(f"text_20ng/{name}", f"{_ETM}/{name}")
    for name in (
        "vocab.pkl",
        *(f"bow_{part}_{kind}.mat" for part in _PARTS for kind in ("tokens", "counts")),
    )
)
_LDA = (
    "https://github.com/lda-project/lda/raw/e5715784c530cc9b6f562898701073aa66bcc97d/src/lda/data"
)
_REUTERS = tuple(
    File(f"text_reuters/{name}", f"{_LDA}/{name}", (f"sha256:{sha256}",))
    for name, sha256 in (
        ("reuters.ldac", "4bfe5b21ed263334ddf7af56f7b38632f6ccae7d9441c8b56071167841e71b5e"),
        ("reuters.tokens", "8fc788b258bb76f9e352885cc20971d64e0011b8d74781129d060818930e3d5a"),
    )
)


def newsgroups() -> Dataset:
    """20 Newsgroups as counts of 3072 words, in the preprocessing of ETM (Dieng et al., 2020)."""
    z = read_arrays(
        "newsgroups",
        "text_20ng/20ng_etm_bow.npz",
        "content sha256:def222c3bf099cb5646cb0f767553dbabcb6f0d338de869ed4e39577049233bb",
        ("vocab", *(f"{p}_{kind}" for p in _PARTS for kind in ("indptr", "indices", "counts"))),
        _NEWSGROUPS,
        convert_newsgroups,
    )
    words = len(z["vocab"])
    x, x_valid, x_test, *halves = (
        _dense(z[f"{p}_indptr"], z[f"{p}_indices"], z[f"{p}_counts"], words) for p in _PARTS
    )
    return Dataset(
        name="newsgroups",
        binarize=None,
        x=x,
        y=None,
        x_test=x_test,
        y_test=None,
        x_valid=x_valid,
        vocabulary=tuple(z["vocab"].tolist()),
        halves=(halves[0], halves[1]),
    )


def reuters() -> Dataset:
    """395 dispatches of Reuters as counts of 4258 words, from the package `lda`."""
    z = read_arrays(
        "reuters",
        "text_reuters/reuters_bow.npz",
        "content sha256:21702ae9444fa3bffa714d4728a4e8c7aa8077e63dd9db6a80278c654ac1e370",
        ("indptr", "indices", "counts", "vocab"),
        _REUTERS,
        convert_reuters,
    )
    x = _dense(z["indptr"], z["indices"], z["counts"], len(z["vocab"]))
    train, test = split_rows(len(x), 79, seed=0)
    return Dataset(
        name="reuters",
        binarize=None,
        x=x[train],
        y=None,
        x_test=x[test],
        y_test=None,
        vocabulary=tuple(z["vocab"].tolist()),
    )


def convert_newsgroups(contents: list[bytes]) -> dict[str, np.ndarray]:
    """Make arrays of the pickled vocabulary and the cell arrays of words and counts."""
    from scipy.io import loadmat

    vocabulary, *cells = contents
    arrays = {"vocab": np.array(_plain_pickle(vocabulary))}
    for i, part in enumerate(_PARTS):
        tokens = loadmat(io.BytesIO(cells[2 * i]))["tokens"].ravel()
        counts = loadmat(io.BytesIO(cells[2 * i + 1]))["counts"].ravel()
        documents = [
            list(zip(np.ravel(t).tolist(), np.ravel(c).tolist(), strict=True))
            for t, c in zip(tokens, counts, strict=True)
        ]
        for key, array in _sparse(documents).items():
            arrays[f"{part}_{key}"] = array
    return arrays


def convert_reuters(contents: list[bytes]) -> dict[str, np.ndarray]:
    """Make arrays of lines "distinct word:count word:count ..." and of a list of words."""
    documents, words = (content.decode() for content in contents)
    rows = [
        [(int(word), int(count)) for word, count in (pair.split(":") for pair in line.split()[1:])]
        for line in documents.splitlines()
        if line.strip()
    ]
    return {"vocab": np.array(words.split()), **_sparse(rows)}


def _sparse(documents: list[list[tuple[int, int]]]) -> dict[str, np.ndarray]:
    """Lay out (word, count) pairs document by document, words rising."""
    pairs = [pair for document in documents for pair in sorted(document)]
    ends = np.cumsum([0, *(len(document) for document in documents)])
    return {
        "indptr": ends.astype(np.int32),
        "indices": np.array([word for word, _ in pairs], dtype=np.uint16),
        "counts": np.array([count for _, count in pairs], dtype=np.uint16),
    }


def _dense(ends: np.ndarray, words: np.ndarray, counts: np.ndarray, width: int) -> Tensor:
    x = np.zeros((len(ends) - 1, width), dtype=np.float32)
    x[np.repeat(np.arange(len(ends) - 1), np.diff(ends)), words] = counts
    return torch.from_numpy(x)


class _Plain(pickle.Unpickler):
    """Reads lists, strings and numbers; anything else could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"a vocabulary holds words only, not {module_name}.{global_name}")


def _plain_pickle(content: bytes) -> list[str]:
    try:
        words = _Plain(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError) as error:
        raise ValueError(f"no pickled list of words: {error}") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("a vocabulary must be a list of words")
    return words
