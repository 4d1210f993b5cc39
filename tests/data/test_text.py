"""Texts as counts: sizes, totals, halves; and the formats they come in."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ppl_models.data import Dataset, load, text

NEWSGROUPS = ("newsgroups", "text_20ng/20ng_etm_bow.npz")
REUTERS = ("reuters", "text_reuters/reuters_bow.npz")


@pytest.fixture(scope="module")
def newsgroups(load_at_hand) -> Dataset:
    return load_at_hand(*NEWSGROUPS)


@pytest.fixture(scope="module")
def reuters(load_at_hand) -> Dataset:
    return load_at_hand(*REUTERS)


def test_newsgroups_are_counts_of_3072_words(newsgroups) -> None:
    parts = (newsgroups.x, newsgroups.x_valid, newsgroups.x_test)
    assert [tuple(part.shape) for part in parts] == [(11214, 3072), (100, 3072), (7531, 3072)]
    assert [int(part.sum()) for part in parts] == [919850, 8334, 594276]
    assert [int((part > 0).sum()) for part in parts] == [603211, 5134, 397790]
    assert all(part.dtype == torch.float32 for part in parts)
    assert bool((newsgroups.x == newsgroups.x.round()).all())
    assert len(set(newsgroups.vocabulary)) == 3072
    assert newsgroups.vocabulary[:3] == ("ii", "plate", "duke")
    assert newsgroups.y is newsgroups.y_test is newsgroups.classes is newsgroups.image_shape is None


def test_the_halves_of_a_test_document_are_all_of_it(newsgroups) -> None:
    first, second = newsgroups.halves
    assert torch.equal(first + second, newsgroups.x_test)
    assert (int(first.sum()), int(second.sum())) == (295245, 299031)
    assert bool((first.sum(1) > 0).all())
    assert bool((second.sum(1) > 0).all())


def test_reuters_are_395_dispatches(reuters) -> None:
    assert (reuters.x.shape, reuters.x_test.shape) == ((316, 4258), (79, 4258))
    # As the package `lda` says of it: 84010 words.
    assert int(reuters.x.sum() + reuters.x_test.sum()) == 84010
    assert reuters.vocabulary[:5] == ("church", "pope", "years", "people", "mother")
    assert (len(reuters.vocabulary), reuters.y, reuters.halves) == (4258, None, None)


def test_every_dispatch_is_in_one_part(reuters, at_hand) -> None:
    with np.load(at_hand(*REUTERS)) as kept:
        ends, words, counts = (kept[key] for key in ("indptr", "indices", "counts"))
    source = np.zeros((395, 4258))
    for row in range(395):
        for place in range(ends[row], ends[row + 1]):
            source[row, words[place]] = counts[place]
    ours = torch.cat([reuters.x, reuters.x_test]).numpy()
    assert sorted(ours.tolist()) == sorted(source.tolist())
    place = torch.arange(1, 80)
    assert int((reuters.x_test.sum(1).long() * place).sum()) == 635783


def test_reuters_is_made_of_its_published_files(at_hand, empty_cache) -> None:
    with np.load(at_hand(*REUTERS)) as kept:
        z = dict(kept)
    lines = []
    for row in range(395):
        part = slice(z["indptr"][row], z["indptr"][row + 1])
        pairs = [f"{w}:{c}" for w, c in zip(z["indices"][part], z["counts"][part], strict=True)]
        lines.append(" ".join([str(len(pairs)), *pairs]) + "\n")
    (empty_cache / "text_reuters").mkdir(parents=True)
    # Written from the arrays here, they are the very bytes whose hash is published.
    (empty_cache / "text_reuters/reuters.ldac").write_text("".join(lines))
    (empty_cache / "text_reuters/reuters.tokens").write_text("\n".join(z["vocab"]) + "\n")
    assert len(load("reuters").vocabulary) == 4258
    assert (empty_cache / "text_reuters/reuters_bow.npz").is_file()
    assert int(load("reuters").x_test.sum()) > 0


def test_newsgroups_are_made_of_cell_arrays_and_a_pickled_list(at_hand) -> None:
    with np.load(at_hand(*NEWSGROUPS)) as kept:
        vocabulary = kept["vocab"]
        ends, words, counts = (kept[f"va_{key}"] for key in ("indptr", "indices", "counts"))

    def cells(array: np.ndarray, kind: str) -> bytes:
        """Lists of unequal lengths, words falling: they are written in no special order."""
        lists = [array[ends[i] : ends[i + 1]][::-1].tolist() for i in range(len(ends) - 1)]
        buffer = io.BytesIO()
        savemat(buffer, {kind: np.array(lists, dtype=object)}, do_compression=True)
        return buffer.getvalue()

    contents = [cells(words, "tokens"), cells(counts, "counts")]
    made = text.convert_newsgroups([pickle.dumps(vocabulary.tolist()), *contents * 5])
    assert len(made) == 16
    np.testing.assert_array_equal(made["vocab"], vocabulary)
    for part in ("tr", "va", "ts", "ts_h1", "ts_h2"):
        np.testing.assert_array_equal(made[f"{part}_indptr"], ends)
        np.testing.assert_array_equal(made[f"{part}_indices"], words)
        np.testing.assert_array_equal(made[f"{part}_counts"], counts)


class Evil:
    def __reduce__(self):
        return (print, ("a pickle ran",))


def test_a_pickle_that_is_more_than_a_list_of_words_is_refused(capsys) -> None:
    assert text._plain_pickle(pickle.dumps(["a", "b"])) == ["a", "b"]
    for content, said in (
        (pickle.dumps([Evil()]), "holds words only, not builtins.print"),
        (pickle.dumps(np.array(["a"])), "holds words only, not numpy"),
        (pickle.dumps({"a": 1}), "must be a list of words"),
        (pickle.dumps(["a", 1]), "must be a list of words"),
        (pickle.dumps(["a", "b"])[:-3], "no pickled list of words"),
        (b"", "no pickled list of words"),
    ):
        with pytest.raises(ValueError, match=said):
            text._plain_pickle(content)
    assert capsys.readouterr().out == ""
