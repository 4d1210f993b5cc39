"""Draws from a posterior, and how far to trust them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from arviz_stats.base.array import array_stats
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:  # what draws is imported when it is asked for
    from matplotlib.figure import Figure

    from ppl_models.core.picture import Canvas


class Posterior(Mapping[str, Tensor]):
    """Draws of each latent site, shape (chains, draws, *batch, *event).

    Arguments:
        draws: The draws of each site.
        divergences: Divergent transitions of each chain, shape (chains,).
        accept: Mean acceptance probability of each chain, shape (chains,).
        seconds: Time taken, warm-up included, in seconds.
        warmup: Transitions spent on adaptation in each chain.

    Raises:
        ValueError: If the sites disagree on chains and draws.

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
        warmup: int = 0,
    ) -> None:
        shapes = {name: tuple(value.shape[:2]) for name, value in draws.items()}
        if not shapes or len(set(shapes.values())) > 1:
            raise ValueError(
                "Posterior: every site needs the same chains and draws in its first two "
                f"dimensions, got {shapes}."
            )
        self._draws = dict(draws)
        self.chains, self.draws = next(iter(shapes.values()))
        self.divergences = torch.zeros(self.chains) if divergences is None else divergences
        self.accept = torch.full((self.chains,), torch.nan) if accept is None else accept
        self.seconds = seconds
        self.warmup = warmup

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
        """Rank-normalised split R-hat of each element: above 1.01, chains have not mixed."""
        return self._each(array_stats.rhat)

    def mcse(self) -> dict[str, Tensor]:
        """Monte Carlo standard error of each posterior mean."""
        return self._each(array_stats.mcse)

    def summary(self) -> pd.DataFrame:
        """Tabulate each element: mean, its error, sd, quantiles, and diagnostics."""
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
            "r_hat": self.rhat(),
        }
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

        Arguments:
            sites: As in `plot`.
            limit: As in `plot`.
            figure: As in `plot`.

        Raises:
            ValueError: As `plot`.
        """
        from ppl_models.infer.plots import plot_pairs

        return plot_pairs(self, sites=sites, limit=limit, figure=figure)

    def __str__(self) -> str:
        table = self.summary()
        formats: dict[Any, Callable[[float], str]] = dict.fromkeys(table.columns, "{:.3g}".format)
        formats |= {"ess_bulk": "{:.0f}".format, "ess_tail": "{:.0f}".format}
        formats |= {"r_hat": "{:.3f}".format}
        worst = float(table["r_hat"].to_numpy().max())
        lines = [
            f"{self.chains} chains of {self.draws} draws after {self.warmup} of warm-up",
            f"{self.seconds:.1f} s, {int(self.divergences.sum())} divergences",
            table.to_string(formatters=formats, max_rows=40),
        ]
        least = float(table["ess_bulk"].to_numpy().min())
        if poorly_mixed(worst, least, self.chains):
            lines.append(
                f"R-hat reaches {worst:.3f} and ESS falls to {least:.0f}: good are below 1.01 and "
                f"above {100 * self.chains}. Run longer; if that does not help, look for several "
                "modes."
            )
        if self.divergences.sum() > 0:
            lines.append(
                "Divergences: part of the posterior was too curved for the step size. Raise "
                "target_accept, or reparametrise the model."
            )
        return "\n".join(lines)

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


def poorly_mixed(rhat: float, ess: float, chains: int) -> bool:
    """Whether R-hat and ESS say that draws are not to be trusted."""
    # Among many elements one is above 1.01 by chance, however good the draws.
    return rhat > 1.05 or (rhat > 1.01 and ess < 100 * chains)


def element_names(name: str, shape: torch.Size) -> list[str]:
    """Name each element of a site as the summary does: `z[0,1]`."""
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in product(*map(range, shape))]
