"""What the generic guides share: a distribution for each latent, laid out in the model's plates."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from guides import families
from guides.conditionals import (
    Conditional,
    DiagonalNormal,
    FullCovariance,
    LowRankCovariance,
)
from guides.families import Family
from ppl_models.core.batch import as_batch
from ppl_models.core.checks import check_known, check_positive
from ppl_models.core.module import NamedModule
from ppl_models.core.sites import (
    Site,
    SiteTable,
    base_support,
    describe_program,
    example_batch,
    moving_support,
    site_table,
    value_support,
)
from ppl_models.core.types import Distribution

Families = Family | Mapping[str, Family] | None


class SiteGuide(NamedModule):
    """A guide built from a model alone: each latent gets a family, in the model's own plates.

    The latents of a row are sampled in the order of the model; what the numbers of each family are
    is left to `parameters_of`. Global latents have free numbers, a mean-field family each.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        family: Families,
        example: Any,
        plate: str,
    ) -> None:
        kind = type(self).__name__
        super().__init__()
        batch = as_batch(example_batch(model, example), model)
        table = site_table(model, *batch, plate=plate)
        table.check_plates()
        if not table.latents:
            raise ValueError(
                f"{kind}: {describe_program(model)} leaves nothing to infer; its sites are "
                f"{[site.name for site in table]}, all observed or enumerated."
            )
        for site in table.locals:
            if site.data_dim is None:
                raise ValueError(
                    f"{kind}: site '{site.name}' is in a sequential plate, a Python loop over "
                    f"rows. Write `with pyro.plate('{plate}', len(x)):`, so that one site holds "
                    "all rows."
                )
        _check_supports(table, site_table(model, *_turned(batch), plate=plate, seed=1))
        if table.locals and table.subsamples_itself:
            raise ValueError(
                f"{kind}: plate '{plate}' subsamples by itself, so the guide cannot know which rows "
                f"it drew. Write the plain `pyro.plate('{plate}', len(x))`, and pass batch_size to "
                "`fit`."
            )
        self.plate = plate
        self._sites = {site.name: site for site in table.latents}
        self._plate_dims = table.plate_dims
        self._example = batch
        self._model = [model]  # in a list: the model is not a submodule of its guide
        # Before anything is drawn: an unknown name, or a support that a family cannot serve.
        self.families = _families(kind, self._sites, family)
        self.conditionals = nn.ModuleDict(
            {key(name): chosen.build(self._sites[name]) for name, chosen in self.families.items()}
        )
        self.global_parameters = nn.ParameterDict(
            {
                key(site.name): expanded(self.conditional(site.name).initial(), site.batch_shape)
                for site in table.globals
            }
        )
        values = [*batch, *(site.value for site in table)]
        floats = [value for value in values if value.is_floating_point()]
        # The precision and the device of the model: none where it speaks of integers only.
        self._like = floats[0].new_empty(0) if floats else torch.empty(0)
        self.to(device=self._like.device, dtype=self._like.dtype)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """Sample every latent, given a batch; returns the draws by site."""
        draws: dict[str, Tensor] = {}
        plates: dict[str, pyro.plate] = {}
        for name, site in self._sites.items():
            with ExitStack() as entered:
                for frame in site.plates:
                    if frame.name not in plates:
                        size = len(batch[0]) if frame.name == self.plate else frame.size
                        plates[frame.name] = pyro.plate(frame.name, size, dim=frame.dim)
                    entered.enter_context(plates[frame.name])
                draws[name] = pyro.sample(name, self.q(name, *batch, **draws))
        return draws

    def q(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Distribution:
        """Return the distribution of a latent: the only place that says what it is.

        Arguments:
            site: Name of the latent.
            batch: The data.
            earlier: Draws of the latents before it, by name.
        """
        conditional = self.conditional(site)
        if not self._sites[site].local:
            return conditional(self.global_parameters[key(site)])
        parameters = self.parameters_of(site, *batch, **earlier)
        return conditional(self._in_plates(self._sites[site], parameters))

    @abc.abstractmethod
    def parameters_of(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Tensor:
        """Return the numbers of a local latent's family, shape (*lead, N, others * size).

        `lead` are dimensions to the left of the model's plates, such as particles, and `others`
        the sizes of the plates that a row is in beside the one over rows.
        """

    def numbers(self, site: str) -> int:
        """Numbers that one row of a local latent takes."""
        return math.prod(_other_plates(self._sites[site])) * self.conditional(site).size

    def start_around(self, values: Mapping[str, Tensor], *, scale: float = 0.05) -> None:
        """Place global latents around values, such as the weights that a network was made with.

        Arguments:
            values: One for each site, as `bayesian(...).starts()` returns them.
            scale: Standard deviation, on the unconstrained space.

        Raises:
            ValueError: If a site is unknown or its family is no normal, a value has another shape,
                or `scale` is not positive.
        """
        kind = type(self).__name__
        check_positive(kind, "scale", scale)
        check_values(f"{kind}: start_around", values)
        normals = (DiagonalNormal, LowRankCovariance, FullCovariance)
        found = {}
        for name, value in values.items():
            check_known("latent", name, self._sites)
            conditional, site = self.conditional(name), self._sites[name]
            if site.local or not isinstance(conditional, normals):
                raise ValueError(
                    f"{kind}: start_around places global latents of a normal family, and '{name}' "
                    f"is {site.role} with family {self.families[name].name}."
                )
            if value.shape != site.event_shape:
                raise ValueError(
                    f"{kind}: the value for '{name}' must have shape {tuple(site.event_shape)}, "
                    f"got {tuple(value.shape)}."
                )
            found[key(name)] = conditional.around(value.detach(), scale)
        with torch.no_grad():
            for name, numbers in found.items():
                self.global_parameters[name].copy_(numbers)

    def local_sites(self) -> list[str]:
        """Names of the latents that each row has for itself, in order."""
        return [name for name, site in self._sites.items() if site.local]

    def conditional(self, site: str) -> Conditional:
        """Return the module that turns the numbers of a latent into its distribution."""
        return self.conditionals[key(site)]  # pyright: ignore[reportReturnType]

    def _in_plates(self, site: Site, parameters: Tensor) -> Tensor:
        """Move rows to the dimension of their plate: (*lead, N, others * P) to (*plates, P)."""
        dims = len(site.batch_shape)
        others = _other_plates(site)
        *lead, rows, _ = parameters.shape
        grid = parameters.reshape(*lead, rows, *others, self.conditional(site.name).size)
        assert site.data_dim is not None
        grid = grid.movedim(len(lead), len(lead) + dims + site.data_dim)
        if lead:  # particles are to the left of the plates of all sites
            gap = self._plate_dims - dims
            grid = grid.reshape(*lead, *(1,) * gap, *grid.shape[len(lead) :])
        return grid

    def flat(self, site: str, value: Tensor) -> Tensor:
        """Lay out draws of a local latent row by row: (*plates, *event) to (*lead, N, F)."""
        about = self._sites[site]
        base, _ = base_support(about.support)
        events = len(about.event_shape)
        if isinstance(base, constraints.integer_interval):
            upper = int(torch.as_tensor(base.upper_bound).max())
            if upper < 1000:  # codes of a few categories are not quantities
                value = nn.functional.one_hot(value.long(), upper + 1)
                events += 1
        value = value.to(self._like.dtype)
        dims = len(about.batch_shape)
        assert about.data_dim is not None
        if value.ndim > dims + events:  # particles: drop the gap between them and the plates
            gap = self._plate_dims - dims
            cut = value.ndim - events - self._plate_dims
            value = value.reshape(*value.shape[:cut], *value.shape[cut + gap :])
        value = value.movedim(about.data_dim - events, -dims - events)
        return (
            value.flatten(value.ndim - dims - events + 1) if dims + events > 1 else value[..., None]
        )


def check_values(caller: str, values: Any) -> None:
    """Refuse what is no mapping from names of sites to tensors."""
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(
            f"{caller} takes a dict with a tensor for each site, such as bayesian(net).starts(), got "
            f"{values if isinstance(values, Mapping) else type(values).__name__}."
        )


def _turned(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value.flip(0) for value in batch)


def _check_supports(one: SiteTable, other: SiteTable) -> None:
    """Refuse a support that is another one at other draws and with other rows."""
    for site in one.latents:
        if site.discrete:
            continue
        bounds = [vars(base_support(value_support(table[site.name]))[0]) for table in (one, other)]
        for name, bound in bounds[0].items():
            if not isinstance(bound, Tensor | float | int):
                continue
            if not torch.equal(torch.as_tensor(bound), torch.as_tensor(bounds[1][name])):
                raise ValueError(moving_support(site))


def _families(kind: str, sites: Mapping[str, Site], family: Families) -> dict[str, Family]:
    """Choose a family for each site: the user's, or the default of its support."""
    given = dict(family) if isinstance(family, Mapping) else {}
    if unknown := sorted(set(given) - set(sites)):
        raise ValueError(
            f"{kind}: family names {unknown}, but the latents of the model are {sorted(sites)}."
        )
    if isinstance(family, Family):
        given = {name: family for name, site in sites.items() if site.local} or dict.fromkeys(
            sites, family
        )
    elif family is not None and not isinstance(family, Mapping):
        raise ValueError(
            f"{kind}: family must be a `families.Family` such as families.Normal(), or a dict from "
            f"site names to those, got {family!r}."
        )
    return {name: given.get(name) or families.default(site) for name, site in sites.items()}


def _other_plates(site: Site) -> list[int]:
    """Sizes of the plate dimensions of a row, beside the one over rows."""
    sizes = list(site.batch_shape)
    if site.data_dim is not None:
        del sizes[site.data_dim]
    return sizes


def key(site: str) -> str:
    """Name a site among the submodules of a guide, where dots and method names are taken."""
    return "site_" + site.replace(".", "/")


def expanded(values: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """Repeat the numbers of one element over plates."""
    return values.expand(*batch_shape, -1).clone()
