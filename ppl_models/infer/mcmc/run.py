"""Sample a posterior by Markov chain Monte Carlo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.infer
import torch
from torch import Tensor, nn

from ppl_models.core.batch import (
    as_batch,
    check_device,
    check_model,
    check_programs,
    moved,
    parameter_like,
)
from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluation_mode
from ppl_models.core.random import seeded, stream
from ppl_models.core.sites import SiteTable, describe, describe_program
from ppl_models.core.store import own_parameters
from ppl_models.infer.mcmc.posterior import Posterior
from ppl_models.infer.progress import progress_bar

_DIAGNOSTICS = ("divergences", "acceptance rate")


@dataclass(frozen=True)
class NUTS:
    """The no-U-turn sampler.

    Arguments:
        target_accept: Acceptance probability that the step size is adapted to.
        max_depth: A trajectory has at most `2 ** max_depth` leapfrog steps.
        dense: Adapt a full mass matrix, not only a diagonal.

    Source:
        Hoffman & Gelman (2014). https://jmlr.org/papers/v15/hoffman14a.html
    """

    target_accept: float = 0.8
    max_depth: int = 10
    dense: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.target_accept < 1.0:
            raise ValueError(f"NUTS: target_accept must be in (0, 1), got {self.target_accept}.")
        if self.max_depth < 1:
            raise ValueError(f"NUTS: max_depth must be at least 1, got {self.max_depth}.")

    def chain(
        self,
        program: Callable[[], Any],
        *,
        warmup: int,
        draws: int,
        on_draw: Callable[[int, str], None],
    ) -> tuple[dict[str, Tensor], int, float]:
        """Run one chain: draws of each site, divergences, and mean acceptance probability."""
        kernel = pyro.infer.NUTS(
            program,
            target_accept_prob=self.target_accept,
            max_tree_depth=self.max_depth,
            full_mass=self.dense,
        )

        def hook(kernel: Any, _: Any, stage: str, number: int) -> None:
            done = number if stage.lower().startswith("warmup") else warmup + number
            on_draw(done + 1, f"step {kernel.step_size:.3g}, {stage.lower()}")

        mcmc = pyro.infer.MCMC(
            kernel,
            num_samples=draws,
            warmup_steps=warmup,
            disable_progbar=True,
            hook_fn=hook,
        )
        mcmc.run()
        samples = {name: value.detach() for name, value in mcmc.get_samples().items()}
        diagnostics = mcmc.diagnostics()
        found = {name: diagnostics[name]["chain 0"] for name in _DIAGNOSTICS}
        return samples, len(found["divergences"]), float(found["acceptance rate"])


def sample(
    model: Callable[..., Any],
    *batch: Any,
    sampler: NUTS | None = None,
    chains: int = 4,
    draws: int = 1000,
    warmup: int = 1000,
    rows: bool = False,
    seed: int | None = None,
    device: torch.device | str | None = None,
    plate: str = "data",
    progress: bool | str | None = None,
) -> Posterior:
    r"""Sample the posterior of a model's latents, its parameters fixed.

    Arguments:
        model: Any Pyro model with continuous latents. Discrete ones must be marked for enumeration.
        batch: The data that it is conditioned on; nothing for a model without arguments.
        sampler: By default `NUTS()`.
        chains: Independent chains.
        draws: Draws kept from each chain.
        warmup: Transitions before that, for adaptation.
        rows: False samples the joint posterior of all latents. True says that each row's local
            latents are a target of their own, given the parameters; a model with global latents
            is refused. (All rows are one joint target for now: the same posterior.)
        seed: An integer isolates and reproduces; None draws from the global random stream.
        device: Where to sample, by default where the model's parameters are. A module is moved.
        plate: Name of the plate over rows.
        progress: Whether to show a bar, or a label for it; None shows it on a terminal.

    Returns:
        Draws of each site, shape (chains, draws, *batch, *event).

    Raises:
        ValueError: If an argument is out of range, the data are not what the model describes, a
            latent is discrete, there is none, or `rows` does not apply.

    Source:
        Hoffman & Gelman (2014). https://jmlr.org/papers/v15/hoffman14a.html

    Example:
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=3, latent_dim=1)
        >>> sample(model, model(size=2), chains=2, draws=5, warmup=5, rows=True, seed=0)
        Posterior({'z': (2, 5, 2, 1)}, divergences=0)
    """
    for name, value, least in (("chains", chains, 1), ("draws", draws, 4), ("warmup", warmup, 0)):
        check_count("sample", name, value, least)
    check_programs("sample", model=model)
    if not isinstance(sampler, NUTS | None):
        raise ValueError(f"sample: sampler must be an instance such as NUTS(), got {sampler!r}.")
    place = check_device(device)
    arguments = as_batch(batch, model, device=place)
    sampler = NUTS() if sampler is None else sampler
    start = time.perf_counter()
    with (
        moved(place, model),
        own_parameters(model),
        _frozen(model),
        _default_dtype(parameter_like(model)),
        torch.enable_grad(),
        evaluation_mode(model),
        seeded(seed),
    ):
        size = len(arguments[0]) if arguments else 1
        table = check_model(model, arguments, plate=plate, rows=size)
        _check_latents(model, table, rows=rows)
        base = seed if seed is not None else int(torch.randint(2**31, ()))
        label = progress if isinstance(progress, str) else "sample"
        show = True if isinstance(progress, str) else progress
        results = []
        with progress_bar(chains * (warmup + draws), label, show) as bar:
            for chain in range(chains):
                done = chain * (warmup + draws)
                # A stream for each chain: chain k does not depend on the number of chains.
                with seeded(stream(base, chain)):
                    results.append(
                        sampler.chain(
                            lambda: model(*arguments),
                            warmup=warmup,
                            draws=draws,
                            on_draw=lambda number, status, done=done: bar(done + number, status),
                        )
                    )
    return Posterior(
        {name: torch.stack([draw[name] for draw, _, _ in results]) for name in results[0][0]},
        divergences=torch.tensor([divergences for _, divergences, _ in results]),
        accept=torch.tensor([accept for _, _, accept in results]),
        seconds=time.perf_counter() - start,
        warmup=warmup,
    )


def _check_latents(model: Callable[..., Any], table: SiteTable, *, rows: bool) -> None:
    name = describe_program(model)
    if not table.latents:
        raise ValueError(
            f"sample: {name} has no latent left to sample; its sites are "
            f"{[site.name for site in table]}, all observed or enumerated."
        )
    for site in table.latents:
        if site.discrete:
            raise ValueError(
                f"sample: NUTS needs continuous latents, but site '{site.name}' is discrete "
                f"({describe(site.support)}). Mark it to be summed out, "
                "pyro.sample(..., infer={'enumerate': 'parallel'}), or fit a guide instead."
            )
    if rows and not table.row_wise:
        raise ValueError(
            f"sample: rows=True needs a model with a plate over rows, but no site of {name} is "
            f"inside plate '{table.plate}'. Use rows=False for the joint posterior."
        )
    if rows and table.globals:
        raise ValueError(
            "sample: rows=True takes each row's latents by themselves, but "
            f"{[site.name for site in table.globals]} are shared by all rows of {name}. "
            "Use rows=False for the joint posterior."
        )


@contextmanager
def _default_dtype(like: Tensor | None) -> Iterator[None]:
    """Let Pyro's sampler work in the precision of the model: it takes torch's default."""
    before = torch.get_default_dtype()
    if like is not None:
        torch.set_default_dtype(like.dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Spare the sampler the gradients of parameters."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
