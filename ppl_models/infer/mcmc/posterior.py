"""Draws from a posterior, and how far to trust them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from arviz_stats.base.array import array_stats
from jaxtyping import Float
from torch import Tensor

from ppl_models.core.checks import check_known
from ppl_models.infer.mcmc.advice import advice, header

if TYPE_CHECKING:  # what draws is imported when it is asked for
    from matplotlib.figure import Figure

    from ppl_models.core.picture import Canvas


class Posterior(Mapping[str, Tensor]):
    """Draws of each latent site, shape (chains, draws, *batch, *event).

    Arguments:
        draws: The draws of each site.
        divergences: Divergent transitions of each chain, shape (chains,); counted from `divergent`
            where that is given.
        accept: Mean acceptance probability of each chain, shape (chains,) or (chains, N).
        seconds: Time taken, warm-up included, in seconds.
        warmup_seconds: That of the warm-up.
        sampling_seconds: That of the draws kept. What is left was for recording and compiling.
        warmup: Transitions spent on adaptation in each chain.
        divergent: Which transitions diverged, shape (chains, draws), or (chains, draws, N) where
            each of N rows was a target of its own, as for all that follows.
        depth: Doublings of each trajectory, shape as `divergent`.
        leapfrogs: Leapfrog steps of each trajectory, shape as `divergent`.
        energy: Minus the log-density of each draw and its momentum, in nats, shape as `divergent`.
        step_size: Of each chain, shape (chains,) or (chains, N).
        max_depth: Doublings at which a trajectory was cut short.
        target_accept: Acceptance probability that the step size was adapted to.
        gradient_noise: Of stochastic gradients alone: the variance that minibatches added to the
            injected noise, as a share of it, in the worst coordinate.
        restarted: How often, in warm-up, a chain went on from the place of another one, having come
            to where next to none of the mass is.
        interrupted: Whether these are the draws that were there when sampling was stopped.
        compiled: Which rung sampling ran on, and why no higher one.
        row_axis: Dimension of the rows in the draws of a site, where it is not the third.
        discrete: Sites whose values are discrete: that they stay is no sign of a stuck chain.

    Raises:
        ValueError: If the sites disagree on chains and draws, or a statistic has another shape.

    Example:
        >>> posterior = Posterior({"z": torch.randn(4, 100, 3)})
        >>> posterior["z"].shape, posterior.rhat()["z"].shape
        (torch.Size([4, 100, 3]), torch.Size([3]))
    """

    def __init__(
        self,
        draws: Mapping[str, Tensor],
        *,
        divergences: Tensor | None = None,
        accept: Tensor | None = None,
        seconds: float = 0.0,
        warmup_seconds: float = 0.0,
        sampling_seconds: float = 0.0,
        warmup: int = 0,
        divergent: Tensor | None = None,
        depth: Tensor | None = None,
        leapfrogs: Tensor | None = None,
        energy: Tensor | None = None,
        step_size: Tensor | None = None,
        max_depth: int | None = None,
        target_accept: float | None = None,
        gradient_noise: float | None = None,
        interrupted: bool = False,
        restarted: int = 0,
        compiled: str = "",
        row_axis: Mapping[str, int] | None = None,
        discrete: Collection[str] = (),
    ) -> None:
        shapes = {name: tuple(value.shape[:2]) for name, value in draws.items()}
        if not shapes or len(set(shapes.values())) > 1:
            raise ValueError(
                "Posterior: every site needs the same chains and draws in its first two "
                f"dimensions, got {shapes}."
            )
        self._draws = dict(draws)
        self.chains, self.draws = next(iter(shapes.values()))
        if divergent is not None:
            divergences = divergent.reshape(self.chains, -1).sum(1)
        self.divergences = torch.zeros(self.chains) if divergences is None else divergences
        self.accept = torch.full((self.chains,), torch.nan) if accept is None else accept
        self.seconds = seconds
        self.warmup_seconds = warmup_seconds
        self.sampling_seconds = sampling_seconds
        self.warmup = warmup
        self.divergent = divergent
        self.depth = depth
        self.leapfrogs = leapfrogs
        self.energy = energy
        self.step_size = step_size
        self.max_depth = max_depth
        self.target_accept = target_accept
        self.gradient_noise = gradient_noise
        self.interrupted = interrupted
        self.restarted = restarted
        self.compiled = compiled
        self.rows = self._check_statistics()
        self._row_axis = dict(row_axis or {})
        self._discrete = frozenset(discrete)

    def _check_statistics(self) -> int | None:
        """Check the shapes of the statistics: how many rows were targets of their own, or None."""
        lead = (self.chains, self.draws)
        shapes = {
            **{name: (tuple(value.shape), lead) for name, value in self.statistics().items()},
            "accept": (tuple(self.accept.shape), lead[:1]),
        }
        if self.step_size is not None:
            shapes["step_size"] = (tuple(self.step_size.shape), lead[:1])
        tails = {name: shape[len(want) :] for name, (shape, want) in shapes.items()}
        wrong = [name for name, (shape, want) in shapes.items() if shape[: len(want)] != want]
        rows = {tail for tail in tails.values() if tail}
        if wrong or len(rows) > 1 or any(len(tail) > 1 for tail in rows):
            raise ValueError(
                f"Posterior: statistics of transitions need shape {lead} or, for N rows that were "
                f"targets of their own, {lead[:-1]} + ({self.draws}, N); accept and step_size the "
                f"same without draws. Got { {name: shape for name, (shape, _) in shapes.items()} }."
            )
        return next(iter(rows))[0] if rows else None

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of each transition that the sampler left, by name."""
        found = {
            "divergent": self.divergent,
            "depth": self.depth,
            "leapfrogs": self.leapfrogs,
            "energy": self.energy,
        }
        return {name: value for name, value in found.items() if value is not None}

    def __getitem__(self, site: str) -> Float[Tensor, "chains draws ..."]:
        return self._draws[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._draws)

    def __len__(self) -> int:
        return len(self._draws)

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of each site."""
        return {name: value.mean((0, 1)) for name, value in self.items()}

    def scale(self) -> dict[str, Tensor]:
        """Posterior standard deviation of each site."""
        return {name: value.flatten(0, 1).std(0) for name, value in self.items()}

    def ess(self, method: str = "bulk") -> dict[str, Tensor]:
        """Effective sample size of each element, for its mean ("bulk") or its tails ("tail")."""
        options = {"prob": (0.05, 0.95)} if method == "tail" else {}
        return self._each(array_stats.ess, method=method, **options)

    def rhat(self) -> dict[str, Tensor]:
        """Rank-normalised split R-hat of each element: above 1.01, chains have not mixed.

        It is infinite where chains stand still at different places, and NaN where all draws are equal.
        """
        found = self._each(array_stats.rhat)
        # Rounding leaves a division by zero finite.
        return {name: value.masked_fill(value > 1e6, torch.inf) for name, value in found.items()}

    def mcse(self, kind: str = "mean") -> dict[str, Tensor]:
        """Monte Carlo standard error of each posterior mean ("mean") or deviation ("sd")."""
        check_known("kind of standard error", kind, ("mean", "sd"))
        return self._each(array_stats.mcse, method=kind)

    def ebfmi(self) -> Tensor:
        r"""Fraction of missing information of each chain by its energies, shape (chains,).

        .. math::

            \frac{\sum_n (E_n - E_{n-1})^2}{\sum_n (E_n - \bar E)^2}

        Near 2 for independent energies; below 0.3 the momenta change the energy too little for the
        tails. With rows that were targets of their own, shape (chains, N).

        Raises:
            ValueError: If there are no energies.

        Source:
            Betancourt (2016). https://arxiv.org/abs/1604.00695
        """
        if self.energy is None:
            raise ValueError(
                "Posterior.ebfmi needs the energy of each transition, which the sampler did not "
                "leave: Posterior(..., energy=...), shape (chains, draws)."
            )
        energy = self.energy.double()
        jumps = energy.diff(dim=1).square().sum(1)
        return jumps / (energy - energy.mean(1, keepdim=True)).square().sum(1)

    @cached_property
    def stuck(self) -> Tensor:
        """Chains in which at least half of the transitions left the draw as it was, (chains,).

        With rows that were targets of their own, shape (chains, N). They are kept in the draws.
        """
        shape = (self.chains,) if self.rows is None else (self.chains, self.rows)
        continuous = {
            name: v
            for name, v in self.items()
            if v.is_floating_point() and v.numel() and name not in self._discrete
        }
        if not continuous or self.draws < 2:
            return torch.zeros(shape, dtype=torch.bool)
        moved = torch.zeros(())
        for name, value in continuous.items():
            if self.rows is None:
                value = value.reshape(self.chains, self.draws, 1, -1)
            else:
                value = value.movedim(self._row_axis.get(name, 2), 2)
                value = value.reshape(self.chains, self.draws, self.rows, -1)
            changed = (value[:, 1:] != value[:, :-1]).any(-1)
            moved = moved.to(changed) | changed if moved.ndim else changed
        return (moved.double().mean(1) <= 0.5).reshape(shape)

    def summary(self) -> pd.DataFrame:
        """Tabulate each element: mean, its error, sd, quantiles, and diagnostics.

        Where the time is known there is a column of `ess_bulk` per second, warm-up included.
        """
        statistics: dict[str, dict[str, Tensor]] = {
            "mean": self.mean(),
            "mcse": self.mcse(),
            "sd": self.scale(),
        }
        for percent in (5, 50, 95):
            statistics[f"{percent}%"] = {
                name: value.flatten(0, 1).double().quantile(percent / 100, dim=0)
                for name, value in self.items()
            }
        statistics |= {
            "ess_bulk": self.ess("bulk"),
            "ess_tail": self.ess("tail"),
        }
        if self.seconds > 0:
            sizes = statistics["ess_bulk"]
            statistics["ess_bulk/s"] = {name: sizes[name] / self.seconds for name in sizes}
        statistics["r_hat"] = self.rhat()
        index = [label for name in self for label in element_names(name, self[name].shape[2:])]
        columns = {
            title: torch.cat([values[name].flatten().double().cpu() for name in self]).numpy()
            for title, values in statistics.items()
        }
        return pd.DataFrame(columns, index=pd.Index(index))

    def plot(
        self,
        *,
        sites: str | Sequence[str] | None = None,
        limit: int = 8,
        figure: Canvas | None = None,
    ) -> Figure:
        """Draw the density and the trace of each element, chain by chain, with R-hat and ESS.

        A title in red is of an element whose draws are not to be trusted.

        Arguments:
            sites: What to draw: names of sites, or of elements such as "z[0,1]"; None for all.
            limit: Elements drawn at most, shared out among the sites. The title counts the rest.
            figure: A figure or subfigure to draw into, such as `plt.figure()` for a window.

        Raises:
            ValueError: If a name is unknown, or `limit` not positive.

        Example:
            >>> figure = Posterior({"z": torch.randn(4, 100, 3)}).plot(sites=["z[0]", "z[2]"])
            >>> [ax.get_title(loc="left") for ax in figure.axes[::2]]
            ['z[0]', 'z[2]']
        """
        from ppl_models.infer.plots import plot_posterior

        return plot_posterior(self, sites=sites, limit=limit, figure=figure)

    def plot_pairs(
        self,
        *,
        sites: str | Sequence[str] | None = None,
        limit: int = 5,
        figure: Canvas | None = None,
    ) -> Figure:
        """Draw each pair of elements as a cloud, with histograms and correlations.

        Draws that came of a divergent transition are red, where it is known which they are.

        Arguments:
            sites: As in `plot`.
            limit: As in `plot`.
            figure: As in `plot`.

        Raises:
            ValueError: As `plot`.
        """
        from ppl_models.infer.plots import plot_pairs

        return plot_pairs(self, sites=sites, limit=limit, figure=figure)

    def predictive(
        self,
        model: Callable[..., Any],
        *arguments: Any,
        sites: str | Sequence[str] | None = None,
        limit: int = 1000,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Draw what the model observes anew, once for each posterior draw of its latents.

        A model that takes `size` is called as `model(size=n)`; any other is called with its
        arguments, and what it observes is drawn instead: covariates stay, a regression `model(x,
        y=None)` needs no `y`, and a time series is predicted one step ahead. The draws are made in
        chunks that keep within a quarter of a gibibyte, all of a chunk at once where the model runs
        under `torch.vmap`.

        Arguments:
            model: The model whose latents these are. Discrete latents that it marks to be summed
                out are drawn from their prior given the others: new rows, not the ones seen.
            arguments: As for `sample`; other rows or covariates will do where no latent is local.
            sites: Observed or deterministic sites to return, by default all.
            limit: Draws at most: more are thinned, evenly over chains and draws.
            seed: An integer isolates and reproduces; None draws from the global random stream.

        Returns:
            For each site its draws, shape (draws, *batch, *event).

        Raises:
            ValueError: If a latent of the model is missing here or has another shape, a site is
                unknown, or `limit` is not positive.

        Example:
            >>> from ppl_models import PPCA
            >>> model = PPCA(data_dim=3, latent_dim=1)
            >>> posterior = Posterior({"z": torch.randn(4, 100, 2, 1)})
            >>> posterior.predictive(model, torch.zeros(2, 3), limit=50)["x"].shape
            torch.Size([50, 2, 3])
        """
        from ppl_models.infer.mcmc.predictive import predictive

        return predictive(self, model, arguments, sites=sites, limit=limit, seed=seed)

    def to_datatree(self) -> Any:
        """Hand the draws and their statistics to ArviZ, under ArviZ's names.

        Groups `posterior` and `sample_stats` (diverging, tree_depth, n_steps, energy, step_size,
        reached_max_treedepth), each (chain, draw, ...).

        Raises:
            ImportError: If arviz-base is not installed.
        """
        from ppl_models.infer.mcmc.datatree import to_datatree

        return to_datatree(self)

    def __str__(self) -> str:
        table = self.summary()
        formats: dict[Any, Callable[[float], str]] = dict.fromkeys(table.columns, "{:.3g}".format)
        for column in ("ess_bulk", "ess_tail", "ess_bulk/s"):
            formats[column] = "{:.0f}".format
        formats["r_hat"] = "{:.3f}".format
        return "\n".join(
            [*header(self), table.to_string(formatters=formats, max_rows=40), *advice(self, table)]
        )

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in self.items()}
        return f"Posterior({shapes}, divergences={int(self.divergences.sum())})"

    def _each(self, statistic: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        result = {}
        for name, value in self.items():
            array = value.detach().double().cpu().numpy()
            with np.errstate(divide="ignore", invalid="ignore"):  # of draws that are all the same
                computed = statistic(array, chain_axis=0, draw_axis=1, **options)
            found = torch.as_tensor(np.asarray(computed), device=value.device)
            result[name] = found.reshape(value.shape[2:])
        return result


def element_names(name: str, shape: torch.Size) -> list[str]:
    """Name each element of a site as the summary does: `z[0,1]`."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape))]
