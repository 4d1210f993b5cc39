"""Perplexity against probabilities that are known, and splits of documents in halves."""

from __future__ import annotations

import math
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from torch import Tensor

from guides import Amortized, Local, families
from ppl_models import PPCA, DeepExponentialFamily
from ppl_models.evaluate import completion, halves, perplexity, unigram_perplexity

WEIGHTS = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.5, 2.5]])  # words of two topics
SHAPE = 0.7


def topics() -> DeepExponentialFamily:
    """Two topics without a word in common: what is left of a document says nothing of the other."""
    model = DeepExponentialFamily(4, (2,), latent_weights=False, shape=SHAPE)
    with torch.no_grad():
        model.free_weights["0"].copy_(WEIGHTS.log().clamp(min=-700.0))
    return model.requires_grad_(False).double()


def posterior(x: Tensor) -> None:
    """The exact posterior: two gamma variables of one rate, whose share is a beta variable."""
    words = x @ (WEIGHTS.to(x) > 0).mT.to(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z1", dist.Gamma(SHAPE + words, SHAPE + 4.0).to_event(1))


def documents(rows: int = 30) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    rates = dist.Gamma(SHAPE, SHAPE).sample((rows, 2)) @ WEIGHTS.double()
    return torch.poisson(rates).double(), torch.poisson(rates).double()


def truth(first: Tensor, second: Tensor) -> float:
    """The perplexity with E[z_k / sum z] = (a + n_k) / (2 a + n)."""
    words = first @ (WEIGHTS > 0).mT.double()
    shares = (SHAPE + words) / (2 * SHAPE + words.sum(1, keepdim=True))
    probabilities = shares @ WEIGHTS.double() / 4.0
    return math.exp(-torch.xlogy(second, probabilities).sum() / second.sum())


def test_it_is_that_of_the_exact_shares_of_topics() -> None:
    first, second = documents()
    found = perplexity(topics(), posterior, first, second, draws=2000, seed=0)
    assert abs(found.value - truth(first, second)) < 5 * found.se
    assert found.se < 0.01
    assert (found.words, found.documents) == (int(second.sum()), 30)


def test_its_error_is_that_of_repetitions() -> None:
    first, second = documents()
    found = [perplexity(topics(), posterior, first, second, draws=20, seed=s) for s in range(60)]
    values = torch.tensor([each.value for each in found])
    claimed = sum(each.se for each in found) / 60
    # The scale of 60 values is off by a factor of 1 +- 1 / sqrt(120), one standard deviation.
    assert abs(values.std().item() / claimed - 1) < 5 / math.sqrt(120)


def test_it_refines_a_guide_with_parameters_of_each_row() -> None:
    first, second = documents()
    model = topics()
    guide = Local(model, rows=3, family=families.Gamma())  # of other rows
    found = perplexity(model, guide, first, second, draws=500, seed=0, steps=500, lr=0.1)
    assert abs(found.value - truth(first, second)) < 5 * found.se + 0.01


def test_chunks_of_documents_change_errors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = documents()
    monkeypatch.setattr(completion, "ROWS", 7)
    found = perplexity(topics(), posterior, first, second, draws=2000, seed=0)
    assert abs(found.value - truth(first, second)) < 5 * found.se
    assert found.words == int(second.sum())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # so says torch
def test_sparse_matrices_score_as_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = documents()
    monkeypatch.setattr(completion, "ROWS", 7)
    want = perplexity(topics(), posterior, first, second, draws=3, seed=0)
    forms: list[Any] = [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: scipy.sparse.csr_matrix(x.numpy()),
        lambda x: scipy.sparse.coo_array(x.numpy()),
        lambda x: x.numpy().astype("int64"),
    ]
    for form in forms:
        assert perplexity(topics(), posterior, form(first), form(second), draws=3, seed=0) == want
        assert unigram_perplexity(form(first), form(second)) == unigram_perplexity(first, second)
        assert torch.equal(halves(form(first), seed=0)[0], halves(first, seed=0)[0])


def test_multinomial_counts_are_scored_by_their_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Multinomial(int(x[0].sum()), probs), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = torch.tensor([[2.0, 1.0, 1.0], [0.0, 4.0, 0.0]]).double()
    found = perplexity(model, guide, x, x, draws=2, seed=0)
    want = math.exp(-torch.xlogy(x, probs).sum() / x.sum())
    assert abs(found.value - want) < 1e-12
    assert found.se < 1e-12


def test_one_unit_with_the_frequencies_of_words_is_the_unigram() -> None:
    torch.manual_seed(3)
    x, second = torch.poisson(torch.rand(20, 5) * 6).double(), torch.ones(4, 5).double()
    model = DeepExponentialFamily(5, (1,), latent_weights=False)
    with torch.no_grad():
        model.free_weights["0"].copy_((x.sum(0, keepdim=True) + 1.0).log())
    found = perplexity(model, Amortized(model, hidden=(3,)), second, second, draws=3, seed=0)
    assert abs(found.value - unigram_perplexity(x, second)) < 1e-9
    share = (x.sum(0) + 0.5) / (x.sum() + 2.5)
    assert abs(unigram_perplexity(x, second, smoothing=0.5) - (-share.log().mean()).exp()) < 1e-9


def test_halves_sum_to_the_whole_and_are_drawn_word_by_word() -> None:
    x = torch.tensor([[5.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).double()
    first, second = halves(x, seed=0)
    assert torch.equal(first + second, x)
    assert first.sum(1).tolist() == [4.0, 0.0, 0.0]
    many = torch.stack([halves(x[:1], seed=seed)[0][0] for seed in range(2000)])
    n, total = x[0], x[0].sum()
    mean = 4 * n / total  # hypergeometric: 4 of 9 words
    spread = (4 * (n / total) * (1 - n / total) * (total - 4) / (total - 1)).sqrt()
    assert bool(((many.mean(0) - mean).abs() <= 5 * spread / math.sqrt(2000)).all())
    assert bool(((many.std(0) - spread).abs() < 0.1).all())


def test_the_random_stream_is_left_alone() -> None:
    (first, second), model = documents(), topics()
    state = torch.get_rng_state()
    perplexity(model, posterior, first, second, draws=2, seed=0)
    halves(first, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"same documents and words.*\(3, 4\) and \(3, 5\)"),
        (torch.ones(4), torch.ones(4), r"shape \(N, D\), got \(4,\)"),
        (torch.ones(3, 4), -torch.ones(3, 4), "whole numbers from 0.*from -1 to -1"),
        (torch.ones(3, 4) / 2, torch.ones(3, 4), "whole numbers from 0.*from 0.5 to 0.5"),
        (torch.ones(3, 4), torch.zeros(3, 4), "second must hold at least one word"),
        (torch.ones(3, 5), torch.ones(3, 5), "data_dim=4 columns"),
    ],
    ids=["columns", "no rows", "negative", "fractional", "no words", "of another model"],
)
def test_what_cannot_be_scored_is_refused(first: Tensor, second: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        perplexity(topics(), posterior, first, second, draws=2)


def test_what_says_nothing_of_words_is_refused() -> None:
    x, ppca = torch.ones(3, 4), PPCA(4, 2)
    with pytest.raises(ValueError, match=r"PPCA must have one observed site, Poisson or Multinom"):
        perplexity(ppca, Amortized(ppca), x, x)
    with pytest.raises(ValueError, match=r"steps are for guide\.refine, which posterior"):
        perplexity(topics(), posterior, x, x, steps=3)
    with pytest.raises(ValueError, match="same columns, got 4 and 3"):
        unigram_perplexity(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one word"):
        unigram_perplexity(x, torch.zeros(2, 4))
    for smoothing in (-1.0, math.inf, "1"):
        with pytest.raises(ValueError, match="smoothing must be a finite number >= 0"):
            unigram_perplexity(x, x, smoothing=cast(Any, smoothing))
    rare = torch.tensor([[2.0, 0.0, 0.0, 2.0]])
    assert unigram_perplexity(rare, rare, smoothing=0.0) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="smoothing must be > 0, as 2 of the scored words"):
        unigram_perplexity(rare, x, smoothing=0.0)
    with pytest.raises(ValueError, match="whole numbers"):
        halves(x / 3, seed=0)
