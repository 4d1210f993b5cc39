"""What the diagnostics of a run say, in words: how it went, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ppl_models.infer.mcmc.posterior import Posterior

FAR_OFF = 1e15  # where no proper posterior in sensible units has draws
LOW_EBFMI = 0.3  # Betancourt's rule of thumb
DEEP = 0.01  # share of transitions that may be cut short at the depth limit without a word
TARGETS = (0.8, 0.9, 0.95, 0.99)  # each asks for about half the step size of the one before
NAMED = 8  # chains that are listed
LOUD = 0.1  # share that minibatches may add to the noise without a word


def header(posterior: Posterior) -> list[str]:
    """Say what was run and how it went."""
    lines = [
        f"{posterior.chains} chains of {posterior.draws} draws after {posterior.warmup} of warm-up",
        f"{posterior.seconds:.1f} s, {int(posterior.divergences.sum())} divergences",
    ]
    details = []
    if posterior.gradient_noise is not None and math.isfinite(posterior.gradient_noise):
        details.append(f"{posterior.gradient_noise:.1%} of the noise injected added by minibatches")
    share = _share_at_limit(posterior)
    if share is not None:
        details.append(f"{share:.2%} of transitions at the depth limit of {posterior.max_depth}")
    if posterior.energy is not None:
        details.append(f"least E-BFMI {_least(posterior.ebfmi()):.2f}")
    if posterior.compiled.startswith("the program itself"):
        details.append(f"slow, as run by {posterior.compiled}")
    return [*lines, ", ".join(details)] if details else lines


def advice(posterior: Posterior, table: pd.DataFrame) -> list[str]:
    """Say what is wrong with a run and what to do: nothing, if nothing is.

    Arguments:
        posterior: The draws.
        table: Their summary.
    """
    lost = _lost(posterior)
    runs_off = lost or _runs_off(posterior)
    findings = (
        _interrupted(posterior),
        runs_off,
        None if runs_off else _mixing(posterior, table),
        _stuck(posterior),
        _restarted(posterior),
        None if lost else _divergences(posterior),
        None if lost else _noise(posterior),
        None if runs_off else _depth(posterior),
        _energy(posterior),
    )
    return [finding for finding in findings if finding]


def too_long(lost: Sequence[int], chains: int) -> str:
    """Say that chains of stochastic gradients left the finite numbers, and what to do.

    Arguments:
        lost: Which of them, counted from 0.
        chains: How many there are.
    """
    listed = ", ".join(map(str, lost[:NAMED]))
    if len(lost) > NAMED:
        listed += f" and {len(lost) - NAMED} more"
    return (
        f"Diverged: of {chains} chains of SGHMC {listed} (counted from 0) left the finite numbers, "
        "because the steps were too long, and nothing that is said of these draws holds. Halve "
        "step_size until no chain does; start at a fitted guide with init=; or take a larger "
        "batch_size."
    )


def poorly_mixed(rhat: float, ess: float, chains: int) -> bool:
    """Whether R-hat and ESS say that draws are not to be trusted."""
    # Among many elements one is above 1.01 by chance, however good the draws.
    return rhat > 1.05 or (rhat > 1.01 and ess < 100 * chains)


def _interrupted(posterior: Posterior) -> str | None:
    if not posterior.interrupted:
        return None
    return (
        f"Interrupted: these are the draws so far, {posterior.draws} of each chain. What is said "
        "of them holds of them."
    )


def _restarted(posterior: Posterior) -> str | None:
    if not posterior.restarted:
        return None
    times = "once" if posterior.restarted == 1 else f"{posterior.restarted} times"
    return (
        f"Restarted: {times} in warm-up a chain went on from where another one was; it had come to "
        "a place with next to none of the mass, such as a spurious mode. If several modes matter to "
        "you, look at them with fewer than 16 chains, which are left alone."
    )


def _runs_off(posterior: Posterior) -> str | None:
    names = [
        name
        for name, value in posterior.items()
        if value.is_floating_point()
        and not bool((torch.isfinite(value) & (value.abs() < FAR_OFF)).all())
    ]
    if not names:
        return None
    return (
        f"Running off: draws of {', '.join(names)} reach beyond {FAR_OFF:.0e}, or are no numbers. "
        "Most likely the posterior is improper: give what has a flat prior, or none, a proper one. "
        "Nothing that is said of these draws holds."
    )


def _mixing(posterior: Posterior, table: pd.DataFrame) -> str | None:
    worst, least = (table[name].dropna().to_numpy() for name in ("r_hat", "ess_bulk"))
    if posterior.chains == 1 and least.size:
        few = "" if least.min() >= 100 else f" ESS falls to {least.min():.0f}: run longer."
        return f"One chain has no R-hat, and cannot show that it missed a mode: run 4 or more.{few}"
    if not worst.size or not least.size:  # draws that are all the same
        return None
    if not poorly_mixed(worst.max(), least.min(), posterior.chains):
        return None
    return (
        f"R-hat reaches {worst.max():.3f} and ESS falls to {least.min():.0f}: good are below 1.01 "
        f"and above {100 * posterior.chains}. Run longer; if that does not help, look for several "
        "modes."
    )


def _stuck(posterior: Posterior) -> str | None:
    places = posterior.stuck.nonzero().tolist()
    if not places:
        return None
    labels = [
        f"chain {place[0]}" + "".join(f" of row {row}" for row in place[1:]) for place in places
    ]
    listed = ", ".join(labels[:NAMED])
    if len(labels) > NAMED:
        listed += f" and {len(labels) - NAMED} more"
    return (
        f"Stuck: {listed} (of {posterior.stuck.numel()}, counted from 0) stayed where they were in "
        "half of their transitions or more. They are kept in the draws, and spoil them: warm up "
        "longer, start elsewhere, or look for a region where the density is nearly singular."
    )


def _lost(posterior: Posterior) -> str | None:
    if posterior.gradient_noise is None or not bool(posterior.divergences.any()):
        return None
    return too_long(posterior.divergences.nonzero().flatten().tolist(), posterior.chains)


def _noise(posterior: Posterior) -> str | None:
    share = posterior.gradient_noise
    if share is None or share <= LOUD:
        return None
    return (
        f"Noise of minibatches: it adds {share:.0%} to the variance of the noise injected, in the "
        "worst coordinate, so that variances of latents are too large by up to about as much. Make "
        f"step_size shorter by a factor of {(share / LOUD) ** 0.5:.2g}, or batch_size or friction "
        "larger by its square."
    )


def _divergences(posterior: Posterior) -> str | None:
    count = int(posterior.divergences.sum())
    if not count:
        return None
    return (
        f"Divergences: part of the posterior was too curved for the step size, in {count} "
        f"transitions. {_raise_target(posterior.target_accept)} reparametrise the model: where a "
        "scale is a latent, draw z ~ Normal(0, 1) and use loc + scale * z (the non-centred form)."
    )


def _raise_target(target: float | None) -> str:
    if target is None:
        return f"Raise target_accept ({', then '.join(map(str, TARGETS[1:]))}), or"
    higher = [value for value in TARGETS if value > target]
    if not higher:
        return f"With target_accept at {target} already,"
    return f"Raise target_accept from {target} to {higher[0]}, or"


def _depth(posterior: Posterior) -> str | None:
    share = _share_at_limit(posterior)
    if share is None or share < DEEP:
        return None
    limit = posterior.max_depth
    return (
        f"Depth limit: {share:.1%} of the transitions were cut short at {limit} doublings, which "
        f"costs time rather than correctness. Raise max_depth above {limit}, rescale the latents "
        "so that their scales are alike, or use dense=True where they are correlated."
    )


def _energy(posterior: Posterior) -> str | None:
    if posterior.energy is None:
        return None
    values = posterior.ebfmi()
    low = int((values < LOW_EBFMI).sum())
    if not low:
        return None
    unit = "chains" if posterior.rows is None else "chains (of each row)"
    return (
        f"E-BFMI is below {LOW_EBFMI} in {low} of {values.numel()} {unit}, down to "
        f"{_least(values):.2f}: tails are explored slowly. Reparametrise what has heavy tails (a "
        "Cauchy or Student prior as a scale mixture, a hierarchical scale in the non-centred form)."
    )


def _share_at_limit(posterior: Posterior) -> float | None:
    if posterior.depth is None or posterior.max_depth is None:
        return None
    return (posterior.depth >= posterior.max_depth).double().mean().item()


def _least(values: Tensor) -> float:
    finite = _finite(values.flatten().cpu().numpy())  # a chain that never moved has none
    return float(finite.min()) if finite.size else float("nan")


def _finite(values: np.ndarray | Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]
