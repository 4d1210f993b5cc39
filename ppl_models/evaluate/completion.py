"""Perplexity of held-out words, by document completion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from ppl_models.core.batch import as_batch, check_model, check_programs
from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded, stream
from ppl_models.core.sites import base_distribution, describe_program, stochastic_nodes
from ppl_models.core.store import own_parameters
from ppl_models.core.traces import run_pair
from ppl_models.core.types import Refinable

ROWS = 1000  # documents that are dense, and refined, at once


@dataclass(frozen=True)
class Perplexity:
    """What held-out words were worth.

    Attributes:
        value: exp of the mean of -log p(word): from 1, for words that were certain, to as many words
            as are equally likely.
        se: Its Monte Carlo error, from the draws of the latents; nan for one draw.
        words: Words that were scored.
        documents: Documents that they are of.
    """

    value: float
    se: float
    words: int
    documents: int

    def __str__(self) -> str:
        return (
            f"perplexity {self.value:.1f} +- {self.se:.1f}, "
            f"{self.words:,} words of {self.documents:,} documents"
        )


def perplexity(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    first: Any,
    second: Any,
    *,
    draws: int = 50,
    seed: int | None = None,
    plate: str = "data",
    **refine: Any,
) -> Perplexity:
    r"""Score one half of each document by what the guide infers from the other half.

    .. math::

        \exp\Bigl(-\frac{\sum_{nd} x''_{nd} \log p_{nd}}{\sum_{nd} x''_{nd}}\Bigr), \qquad
        p_{nd} = \mathbb{E}_{q(z \mid x'_n)} \frac{\lambda_{nd}(z)}{\sum_{d'} \lambda_{nd'}(z)}

    with the rates :math:`\lambda` of Poisson counts, which are multinomial given their sum; or the
    probabilities of multinomial ones. Each word is predicted by itself from the first half. A guide
    with parameters for each row is refined to the first half, the model and what rows share held fixed.

    Arguments:
        model: A Pyro model of counts, with a single observed site, Poisson or multinomial.
        guide: Any Pyro guide for it.
        first: Counts that the latents are inferred from, shape (N, D): a tensor, an array, or a sparse
            matrix of torch or SciPy.
        second: Counts that are scored, of the same documents.
        draws: Draws of the latents that probabilities are averaged over.
        seed: An integer isolates and reproduces; None draws from the global random stream.
        plate: Name of the plate over rows.
        refine: Passed on to `guide.refine`, such as `steps=200`.

    Raises:
        ValueError: If halves have different shapes, are no counts or hold no word to score, or the
            model is of something else than counts.

    Source:
        Wallach, Murray, Salakhutdinov & Mimno (2009), section 5.1,
        https://doi.org/10.1145/1553374.1553515

    Example:
        >>> from guides import Amortized
        >>> from ppl_models import DeepExponentialFamily
        >>> model = DeepExponentialFamily(data_dim=6, latent_dims=(2,), shape=1.0)
        >>> x = torch.full((5, 6), 2.0)
        >>> found = perplexity(model, Amortized(model), x, x, draws=3, seed=0)
        >>> found.words, found.value > 1.0
        (60, True)
    """
    check_count("perplexity", "draws", draws)
    check_programs("perplexity", model=model, guide=guide)
    first, second = _sliceable(first), _sliceable(second)
    if first.shape != second.shape or len(first.shape) != 2:
        raise ValueError(
            "perplexity: first and second must be counts of the same documents and words, shape "
            f"(N, D), got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if refine and not isinstance(guide, Refinable):
        raise ValueError(
            f"perplexity: {', '.join(refine)} are for guide.refine, which "
            f"{describe_program(guide)} does not have."
        )
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    total = variance = 0.0
    words = 0
    with own_parameters(model, guide), seeded(seed):
        for start in range(0, first.shape[0], ROWS):
            parts = (_rows(value, start) for value in (first, second))
            seen, scored = (_counts(value, model, guide) for value in parts)
            check_model(model, (seen,), plate=plate, rows=len(seen))
            place = stream(seed, start)
            own = (
                guide.refine(seen, seed=place, **refine) if isinstance(guide, Refinable) else guide
            )
            with seeded(place), evaluating(model, own):
                score, square = _score(model, own, seen, scored, draws)
            total, variance = total + score, variance + square
            words += int(scored.sum())
    if not words:
        raise ValueError("perplexity: second must hold at least one word, got none.")
    value = math.exp(-total / words)
    return Perplexity(value, value * math.sqrt(variance) / words, words, first.shape[0])


def unigram_perplexity(x: Any, second: Any, *, smoothing: float = 1.0) -> float:
    """Score words by how frequent they are in all training documents: what a model has to beat.

    Arguments:
        x: Counts of training documents, shape (N, D).
        second: Counts that are scored, shape (M, D).
        smoothing: What is added to the count of each word, so that none is impossible.

    Raises:
        ValueError: If the two have different columns, are no counts or hold no word to score, or
            `smoothing` is negative, or 0 where a scored word is in no training document.

    Example:
        >>> round(unigram_perplexity(torch.ones(2, 8), torch.ones(3, 8)), 6)
        8.0
    """
    if not isinstance(smoothing, int | float) or not 0.0 <= smoothing < math.inf:
        raise ValueError(
            f"unigram_perplexity: smoothing must be a finite number >= 0, got {smoothing!r}."
        )
    train, scored = (_counts(value).double().sum(0) for value in (x, second))
    if train.shape != scored.shape:
        raise ValueError(
            f"unigram_perplexity: x and second must have the same columns, got {len(train)} and "
            f"{len(scored)}."
        )
    if not scored.sum() > 0:
        raise ValueError("unigram_perplexity: second must hold at least one word, got none.")
    smoothed = train + smoothing
    if unknown := int(((smoothed == 0.0) & (scored > 0.0)).sum()):
        raise ValueError(
            f"unigram_perplexity: smoothing must be > 0, as {unknown} of the scored words are in no "
            f"training document, so without it they are impossible; got {smoothing}."
        )
    probabilities = smoothed / smoothed.sum()
    return math.exp(-torch.xlogy(scored, probabilities).sum().item() / scored.sum().item())


def halves(x: Any, *, seed: int) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """Split the words of each document at random in two halves that sum to it.

    Of an odd number of words, the second half has one more.

    Arguments:
        x: Counts, shape (N, D).
        seed: Of the split; the global random state is left as it is.

    Raises:
        ValueError: If they are no counts.

    Example:
        >>> first, second = halves(torch.tensor([[4.0, 0.0, 3.0]]), seed=0)
        >>> int(first.sum()), int(second.sum())
        (3, 4)
    """
    counts = _counts(x)
    random = np.random.default_rng(seed)
    first = torch.zeros_like(counts)
    for row, half in zip(counts, first, strict=True):
        place = row.nonzero().squeeze(-1)
        present = row[place].long().cpu().numpy()
        drawn = random.multivariate_hypergeometric(present, int(present.sum()) // 2)
        half[place] = torch.from_numpy(drawn).to(half)
    return first, counts - first


def _sliceable(value: Any) -> Any:
    """Return a matrix of which rows can be taken: sparse ones stay sparse."""
    if isinstance(value, Tensor):
        return value if value.layout == torch.strided else value.to_sparse()
    return value.tocsr() if hasattr(value, "tocsr") else np.asarray(value)


def _rows(value: Any, start: int) -> Any:
    """Take the rows of one chunk."""
    stop = min(start + ROWS, value.shape[0])
    if isinstance(value, Tensor) and value.is_sparse:
        return value.index_select(0, torch.arange(start, stop, device=value.device))
    return value[start:stop]


def _counts(value: Any, *programs: Any) -> Tensor:
    """Return counts as a dense tensor."""
    (counts,) = as_batch(value, *programs)
    if counts.ndim != 2 or bool((counts < 0).any()) or bool((counts != counts.round()).any()):
        low, high = counts.min().item(), counts.max().item()
        raise ValueError(
            "counts must be whole numbers from 0, in rows of documents, shape (N, D); got shape "
            f"{tuple(counts.shape)} with values from {low:.4g} to {high:.4g}."
        )
    return counts


def _score(model: Any, guide: Any, seen: Tensor, scored: Tensor, draws: int) -> tuple[float, float]:
    """Return the summed log probability of words, and the variance of its Monte Carlo error."""
    place = scored.nonzero(as_tuple=True)
    times = scored[place].double()
    each = torch.stack([_probabilities(model, guide, seen)[place].double() for _ in range(draws)])
    mean = each.mean(0)
    # To first order: what each draw adds to the sum of logarithms, words of all rows together.
    parts = (each / mean * times).sum(1)
    variance = parts.var().item() / draws if draws > 1 else math.nan
    return (times * mean.log()).sum().item(), variance


def _probabilities(model: Any, guide: Any, seen: Tensor) -> Tensor:
    """Draw latents, and return the probability of each word in each document."""
    pair = run_pair(model, guide, seen)
    observed = [(n, site) for n, site in stochastic_nodes(pair.model) if site["is_observed"]]
    fns = {name: base_distribution(site["fn"]) for name, site in observed}
    match list(fns.values()):
        case [dist.Multinomial() as fn]:
            return fn.probs.expand(seen.shape)
        case [dist.Poisson() as fn]:
            rate = fn.rate.expand(seen.shape)
            return rate / rate.sum(-1, keepdim=True)
    kinds = {name: type(fn).__name__ for name, fn in fns.items()}
    raise ValueError(
        f"perplexity: {describe_program(model)} must have one observed site, Poisson or Multinomial, "
        f"which says how likely each word is; it has {kinds}."
    )
