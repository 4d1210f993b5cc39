"""What a guide for a deep exponential family needs beside the generic ones: a start, an encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from guides import families
from guides.amortized import Amortized
from guides.base import SiteGuide, key
from guides.local import Local
from ppl_models.core.batch import as_batch, check_model
from ppl_models.core.checks import check_count, checked_sizes
from ppl_models.core.random import seeded
from ppl_models.core.sites import describe_program
from ppl_models.deep_exponential_family import DeepExponentialFamily
from ppl_models.parts.nn import mlp

LEAST = 0.01  # of the mean of all columns: what a column of zeros starts from


class LogCounts(nn.Module):
    """A tanh network that reads log(1 + x): an encoder for counts, whose range is wide.

    Of values below 0 it reads -log(1 - x). Rows of any shape are flattened.

    Arguments:
        data_dim: Columns of the counts, or elements of a row.
        hidden: Units of each tanh layer, at least one.

    Raises:
        ValueError: If these are no positive integers.

    Example:
        >>> LogCounts(6, (8,))(torch.ones(5, 6)).shape
        torch.Size([5, 8])
    """

    def __init__(self, data_dim: int, hidden: Sequence[int] = (200,)) -> None:
        super().__init__()
        check_count("LogCounts", "data_dim", data_dim)
        hidden = checked_sizes("LogCounts", "hidden", hidden, least=1)
        self._sizes = data_dim, hidden
        self.net = mlp(data_dim, hidden)

    def arguments(self) -> dict[str, Any]:
        """Return what it was made with, by name: what a saved run rebuilds it from."""
        return dict(zip(("data_dim", "hidden"), self._sizes, strict=True))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N H"]:
        """Return features of rows."""
        return self.net((x.sign() * x.abs().log1p()).reshape(len(x), -1))


def start_near(
    guide: SiteGuide, x: Any, *, spread: float = 0.3, seed: int | None = None
) -> SiteGuide:
    """Set guide and model to a start at which the model's means are near those of the data.

    Gamma layers start at mean 1, gamma weights at what keeps it from layer to layer and puts the
    columns of the data at their means, each unit up to a random factor that tells units apart.
    Intercepts do the same where weights are normal, and these start near 0. From numbers that know
    nothing of the data, rates may start orders of magnitude away, and bounds as far below.

    Arguments:
        guide: `guides.Local` or `guides.Amortized` of a `DeepExponentialFamily`, whose gamma sites
            have the families Normal or Gamma; it is changed in place, and so are the parameters of its
            model.
        x: The data.
        spread: Standard deviation of each gamma site, relative to its mean, and of the logarithm of
            the random factors; for normal weights divided by the root of the units above.
        seed: An integer isolates and reproduces; None draws from the global random stream.

    Returns:
        The guide.

    Raises:
        ValueError: If the guide is not for such a model, a gamma site has another family, `spread` is
            not in (0, 1], or the data are not what the model describes.

    Example:
        >>> model = DeepExponentialFamily(data_dim=6, latent_dims=(3, 2))
        >>> x = torch.full((5, 6), 40.0)
        >>> guide = start_near(Local(model, rows=5), x, seed=0)
        >>> z, w = guide.q("z1", x).mean, guide.q("w0").mean
        >>> bool(((z @ w / x).log().abs() < 1.0).all())
        True
    """
    model = guide._model[0] if isinstance(guide, SiteGuide) else None
    if not isinstance(model, DeepExponentialFamily) or not isinstance(guide, Local | Amortized):
        raise ValueError(
            "start_near: a guides.Local or guides.Amortized of a DeepExponentialFamily is required, "
            f"got {describe_program(guide)}"
            f"{'' if model is None else f' of {describe_program(model)}'}."
        )
    if not 0.0 < spread <= 1.0:
        raise ValueError(f"start_near: spread must be in (0, 1], got {spread}.")
    for name, site in guide._sites.items():
        if _is_gamma(model, name) and not isinstance(
            guide.families[name], families.Normal | families.Gamma
        ):
            raise ValueError(
                f"start_near: gamma site '{site.name}' must have family Normal or Gamma, got "
                f"{guide.families[name].name}. Leave it at its own start."
            )
    (batch,) = as_batch(x, model, guide)
    check_model(model, (batch,), plate=guide.plate, rows=len(batch))
    columns = batch.mean(0)
    if model.families[0] == "poisson":  # words that no document has
        mean = columns.mean()
        columns = columns.clamp(min=LEAST * torch.where(mean > 0.0, mean, torch.ones_like(mean)))
    with torch.no_grad(), seeded(seed):
        for level in range(len(model.latent_dims)):
            _start_layer(guide, model, level, columns, spread)
        for name in guide.local_sites():
            if _is_gamma(model, name):
                _start_local(guide, name, spread)
    return guide


def _start_layer(
    guide: SiteGuide, model: DeepExponentialFamily, level: int, columns: Tensor, spread: float
) -> None:
    """Start the weights to a layer and its intercepts."""
    name, above = f"w{level}", model.sizes[level + 1]
    want = columns if level == 0 else torch.ones_like(columns[:1]).expand(model.sizes[level])
    noise = spread * torch.randn(above, len(want)).to(want)
    if model.gamma_weights(level):
        mean = want / above * noise.exp()
        if model.latent_weights:
            numbers = _numbers(guide.families[name], mean.flatten(), spread)
            guide.global_parameters[key(name)].copy_(numbers)
        else:
            model.free_weights[str(level)].copy_(mean.log())
        return
    model.intercepts[str(level)].copy_(_intercept(model.families[level], want, level))
    loc = noise / math.sqrt(above)
    if not model.latent_weights:
        model.free_weights[str(level)].copy_(loc)
    elif isinstance(guide.families[name], families.Normal):
        scale = torch.full_like(loc, spread / math.sqrt(above))
        numbers = torch.cat([loc.flatten(), 2.0 * scale.log().flatten()])
        guide.global_parameters[key(name)].copy_(numbers)


def _start_local(guide: SiteGuide, name: str, spread: float) -> None:
    """Start a gamma layer at mean 1."""
    units = guide._sites[name].event_shape[-1]
    if isinstance(guide, Local):
        table = guide.row_parameters[key(name)]
        mean = (spread * torch.randn(len(table), units).to(table)).exp()
        table.copy_(_numbers(guide.families[name], mean, spread))
        return
    assert isinstance(guide, Amortized)
    *_, last = (m for m in guide.heads[key(name)].modules() if isinstance(m, nn.Linear))
    last.weight.mul_(spread)  # what the network says of a row starts small beside the start of all
    last.bias.copy_(_numbers(guide.families[name], last.bias.new_ones(units), spread))


def _is_gamma(model: DeepExponentialFamily, name: str) -> bool:
    level = int(name[1:])
    return model.gamma_weights(level) if name[0] == "w" else model.families[level] == "gamma"


def _numbers(family: families.Family, mean: Tensor, spread: float) -> Tensor:
    """Return the numbers of a family that has this mean and relative standard deviation."""
    square = torch.full_like(mean, spread**2)
    if isinstance(family, families.Gamma):
        above = 1.0 / square - family.min_concentration
        return torch.cat([above.log(), -square.log() - mean.log()], -1)
    square = square.log1p()  # of the logarithm of a log-normal variable
    return torch.cat([mean.log() - square / 2.0, square.log()], -1)


def _intercept(family: str, mean: Tensor, level: int) -> Tensor:
    """Return what a layer has that mean at, where the layer above adds nothing."""
    if family == "bernoulli":
        return (mean.clamp(LEAST, 1.0 - LEAST) if level == 0 else mean / 2.0).logit()
    if family == "normal":
        return mean if level == 0 else torch.zeros_like(mean)
    return mean + (-(-mean).expm1()).log()  # the inverse of softplus
