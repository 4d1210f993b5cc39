"""Evaluation: bounds and evidence with their errors, latents, the scorecard, and pictures."""

from typing import TYPE_CHECKING, Any

from ppl_models.evaluate.bounds import elbo, iwae_bound, log_evidence
from ppl_models.evaluate.comparison import compare, score
from ppl_models.evaluate.completion import Perplexity, halves, perplexity, unigram_perplexity
from ppl_models.evaluate.estimate import Estimate
from ppl_models.evaluate.gradients import GradientVariance, gradient_variance
from ppl_models.evaluate.latent import active_units, encode, generate, reconstruct
from ppl_models.evaluate.predictions import Prediction, predict
from ppl_models.evaluate.scorecard import Scorecard

if TYPE_CHECKING:  # what draws is imported when it is asked for: see __getattr__
    from ppl_models.evaluate.pictures import (
        plot_interpolation,
        plot_latents,
        plot_reconstructions,
        plot_samples,
    )

__all__ = [
    "Estimate",
    "GradientVariance",
    "Perplexity",
    "Prediction",
    "Scorecard",
    "active_units",
    "compare",
    "elbo",
    "encode",
    "generate",
    "gradient_variance",
    "halves",
    "iwae_bound",
    "log_evidence",
    "perplexity",
    "plot_interpolation",
    "plot_latents",
    "plot_reconstructions",
    "plot_samples",
    "predict",
    "reconstruct",
    "score",
    "unigram_perplexity",
]


def __getattr__(name: str) -> Any:
    if name in __all__ and name.startswith("plot_"):
        from ppl_models.evaluate import pictures

        return getattr(pictures, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
