"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from ppl_models.core.checks import check_count, check_known
from ppl_models.data import images, tables, text
from ppl_models.data.dataset import Binarize, Dataset, check_binarize

_IMAGES: dict[str, Callable[[], Dataset]] = {
    "digits": images.digits,
    "mnist": images.mnist,
    "fashion_mnist": images.fashion_mnist,
    "binarized_mnist": images.binarized_mnist,
    "omniglot": images.omniglot,
    "olivetti": images.olivetti,
    "frey_faces": images.frey_faces,
}
_OTHERS: dict[str, Callable[[], Dataset]] = {
    "newsgroups": text.newsgroups,
    "reuters": text.reuters,
    "oil_flow": tables.oil_flow,
    "german_credit": tables.german_credit,
}
_UCI = {f"uci/{name}": name for name in tables.UCI}
NAMES = (*_IMAGES, *_OTHERS, *_UCI)


def load(name: str = "digits", *, binarize: Binarize | None = None, split: int = 0) -> Dataset:
    """Load a data set in its fixed split, from the cache or else from its public address.

    The cache is the folder that the environment variable `PPL_MODELS_DATA` names, or else the
    system's place for caches. What is fetched is checked against a published hash; a file that is
    corrupt is told and fetched again. `digits` comes with scikit-learn and is never fetched.

    Arguments:
        name: One of

            - digits (1437 rows to train, 360 to test; 8 x 8; 10 classes), split by class
            - mnist, fashion_mnist (60000, 10000; 28 x 28; 10 classes), split as published
            - binarized_mnist (50000, 10000 to validate, 10000; 28 x 28), Larochelle's static
              binarisation: in its own order, without labels. Its test rows come class by class:
              take a random part of them, not the first
            - omniglot (24345, 8070; 28 x 28; 50 alphabets), split as in Burda et al. (2016)
            - olivetti (320, 80; 64 x 64; 40 people), 8 and 2 pictures of each
            - frey_faces (1572, 393; 28 x 20), split at random: neighbouring frames are near
              duplicates, so test rows are close to training rows
            - newsgroups (11214, 100 to validate, 7531; counts of 3072 words), with the two halves
              of each test document in `halves`
            - reuters (316, 79; counts of 4258 words)
            - oil_flow (1000, 1000 to validate, 1000; 12 gauges; 3 classes)
            - german_credit (800, 200; 24 columns; good 0 or bad 1), split by class
            - uci/boston, uci/concrete, uci/energy, uci/wine, uci/yacht: a continuous y, in raw
              units; see `Dataset.standardized`

        binarize: For images. None leaves grey values in [0, 1]. "threshold": 1 where the value is
            at least 0.5. "dynamic": x is drawn anew for each epoch of `fit`, with the value as the
            probability of a one; x_test is drawn once. "static": one draw, always the same; for
            mnist that is Larochelle's, so it returns binarized_mnist. Three binarisations of MNIST
            are three data sets: their likelihoods are nats apart and are never compared.
        split: Which of the 20 splits of uci/*, 0 to 19.

    Raises:
        ValueError: If the name is unknown, or an argument does not fit the data set.
        OSError: If a file is not in the cache and cannot be fetched, with its address and where
            to put it.

    Example:
        >>> load("digits", binarize="threshold")
        Dataset digits: 1437 rows + 360 test, 64 values in [0, 1], images of 8 x 8, \
binary (threshold), 10 classes
    """
    check_known("data set", name, NAMES)
    check_binarize(name, binarize)
    check_count("load", "split", split, least=0)
    if name not in _IMAGES and binarize is not None:
        raise ValueError(f"{name}: {binarize=} needs images. Leave binarize=None.")
    if name in _UCI:
        if split >= tables.SPLITS:
            raise ValueError(f"load: split must be 0 to {tables.SPLITS - 1}, got {split}.")
        return tables.uci(_UCI[name], split)
    if split != 0:
        raise ValueError(f"load: {name} has one split; only uci/* have several, got {split=}.")
    if name in _OTHERS:
        return _OTHERS[name]()
    if name == "mnist" and binarize == "static":
        return images.binarized_mnist()
    if name == "binarized_mnist":
        if binarize not in (None, "static"):
            raise ValueError(
                f"load: binarized_mnist is a static binarisation, got {binarize=}. For another one "
                f"load('mnist', binarize={binarize!r})."
            )
        return images.binarized_mnist()
    return _IMAGES[name]().binarized(binarize)
