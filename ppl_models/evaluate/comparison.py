"""How good is a guide? Several, on the same model and data, beside a sampler that needs none."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_models.core.batch import as_batch, check_device, check_model, has_dynamic
from ppl_models.core.checks import check_count
from ppl_models.core.modes import evaluating
from ppl_models.core.random import seeded, stream
from ppl_models.core.sites import SiteTable, describe_program
from ppl_models.core.store import own_parameters, scratch_store
from ppl_models.core.types import Batch, Points, Refinable
from ppl_models.evaluate.bounds import elbo, log_evidence
from ppl_models.evaluate.latent import active_units
from ppl_models.evaluate.scorecard import Entry, Reference, Scorecard
from ppl_models.infer import NUTS, Fit, Posterior, fit, sample

DEFAULT_REFERENCE = NUTS()
GUIDE_DRAWS = 500  # draws from a guide, to compare its moments with the reference


def compare(
    model: Callable[..., Any],
    guides: Mapping[str, Callable[..., Any]],
    data: Any,
    test: Any,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str | None = None,
    particles: int = 1000,
    reference: NUTS | None = DEFAULT_REFERENCE,
    reference_rows: int = 64,
    chains: int = 4,
    draws: int = 500,
    warmup: int = 500,
    plate: str = "data",
    progress: bool | None = None,
    **options: Any,
) -> Scorecard:
    """Train a model with each of several guides from the same start, and score them on test rows.

    The model is left as it was; each entry of the scorecard has a trained copy.

    Arguments:
        model: Any Pyro model.
        guides: By name, a factory that makes a guide from the model, such as `Amortized`, or a
            guide that was made for this very model.
        data: Training rows, as in `fit`.
        test: Test rows. A guide with parameters for each row is refined on them.
        steps: Optimisation steps.
        epochs: Passes over the training rows, instead of `steps`.
        batch_size: Rows in a step.
        lr: Learning rate.
        seed: Of all draws; every guide starts from it.
        device: Where to work.
        particles: Draws for log p(x); a tenth of them for the ELBO.
        reference: The sampler beside the guides; None leaves it out.
        reference_rows: Test rows that it runs on.
        chains: Its chains.
        draws: Draws from each.
        warmup: Transitions for its adaptation.
        plate: Name of the plate over rows.
        progress: Whether to show bars; None shows them on a terminal.
        options: Passed on to `fit`.

    Ctrl-C while a guide is trained ends the comparison with those that are done.

    Raises:
        ValueError: If there is no guide, or as `fit`, `elbo` and `sample` do.

    Example:
        >>> from guides import Amortized, Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> guides = {"exact": Exact, "amortized": Amortized}
        >>> x = model(size=64)
        >>> card = compare(model, guides, x[:48], x[48:], steps=5, reference=None)
        >>> abs(card["exact"].gap) < 1e-3
        True
    """
    if not isinstance(guides, Mapping) or not guides:
        raise ValueError("compare: guides must name at least one guide, such as {'a': Amortized}.")
    check_device(device)
    settings = {"lr": lr, "steps": steps, "epochs": epochs, "batch_size": batch_size}
    training = {k: v for k, v in settings.items() if v is not None} | options
    # Once, as a torch Dataset may be slow or random; what is drawn anew is left to `fit`.
    data = data if has_dynamic(data) else as_batch(data, model)
    rows_test = as_batch(test, model)
    check_count("compare", "particles", particles, least=2)
    check_count("compare", "reference_rows", reference_rows)
    check_model(model, rows_test, plate=plate, rows=_rows(rows_test))
    entries, missing = [], []
    for name, make in guides.items():
        with _fresh(model, make, rows_test) as (own, mine):
            with seeded(seed):
                guide = mine if isinstance(mine, nn.Module) else _made(name, mine, own)
            result = fit(
                own,
                guide,
                data,
                seed=seed,
                device=device,
                plate=plate,
                progress=_label(name, progress),
                **training,
            )
            if result.interrupted and not options.get("callbacks"):  # by Ctrl-C
                if not entries:
                    raise KeyboardInterrupt
                missing = list(guides)[len(entries) :]
                break
            entries.append(
                _score(
                    name,
                    own,
                    result,
                    rows_test,
                    particles=particles,
                    plate=plate,
                    seed=seed,
                    reference=reference,
                    reference_rows=reference_rows,
                    chains=chains,
                    draws=draws,
                    warmup=warmup,
                    progress=progress,
                )
            )
    card = _card(entries, rows_test, reference_rows, reference, seed=seed, particles=particles)
    if missing:
        note = f"Interrupted: {', '.join(missing)} would have followed."
        card = replace(card, notes=(*card.notes, note))
    return card


def score(
    result: Fit,
    test: Any,
    *,
    name: str | None = None,
    particles: int = 1000,
    seed: int = 0,
    reference: NUTS | None = DEFAULT_REFERENCE,
    reference_rows: int = 64,
    chains: int = 4,
    draws: int = 500,
    warmup: int = 500,
    progress: bool | None = None,
) -> Scorecard:
    """Say how good a trained guide is, on test rows: the scorecard of one guide.

    Model and guide are left as they are; a guide with parameters for each row is refined on the
    test rows in a copy.

    Arguments:
        result: What `fit` returned, or `load_run(path).fit`.
        test: Test rows.
        name: What to call the guide.
        particles: Draws for log p(x); a tenth of them for the ELBO.
        seed: Of all draws.
        reference: The sampler beside the guide; None leaves it out.
        reference_rows: Test rows that it runs on.
        chains: Its chains.
        draws: Draws from each.
        warmup: Transitions for its adaptation.
        progress: Whether to show bars; None shows them on a terminal.

    Raises:
        ValueError: As `elbo` and `sample` do.

    Example:
        >>> from guides import Exact
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> x = model(size=64)
        >>> result = fit(model, Exact(model), x[:48], steps=5, seed=0)
        >>> abs(score(result, x[48:], reference=None)["Exact"].gap) < 1e-3
        True
    """
    plate, batch = result.settings["plate"], as_batch(test, result.model, result.guide)
    check_count("score", "particles", particles, least=2)
    check_count("score", "reference_rows", reference_rows)
    check_model(result.model, batch, plate=plate, rows=_rows(batch))
    entry = _score(
        describe_program(result.guide) if name is None else name,
        result.model,
        result,
        batch,
        particles=particles,
        plate=plate,
        seed=seed,
        reference=reference,
        reference_rows=reference_rows,
        chains=chains,
        draws=draws,
        warmup=warmup,
        progress=progress,
    )
    return _card([entry], batch, reference_rows, reference, seed=seed, particles=particles)


def _card(
    entries: list[Entry],
    test: Batch,
    reference_rows: int,
    reference: NUTS | None,
    *,
    seed: int,
    particles: int,
) -> Scorecard:
    """Put entries together, with what was the same for all and what to beware of."""
    first = entries[0].fit
    same = {
        "data": f"{first.settings['rows']} training and {_rows(test)} test rows",
        "batch size": first.batch_size,
        "steps": first.steps,
        "lr": first.settings["lr"],
        "seed": seed,
        "particles": particles,
    }
    if first.settings["fixed_model"]:
        same["model"] = "fixed"
    notes = _notes(entries, min(reference_rows, _rows(test)) if reference is not None else None)
    if len({entry.fit.steps for entry in entries}) > 1:
        del same["steps"]
        counts = ", ".join(f"{entry.name} {entry.fit.steps}" for entry in entries)
        notes.insert(0, f"Not the same: steps, {counts}.")
    return Scorecard(tuple(entries), same, tuple(notes))


def _made(name: str, make: Callable[..., Any], model: Callable[..., Any]) -> Any:
    """Call a factory, and see that what it made is a guide for this copy of the model."""
    try:
        guide = make(model)
    except TypeError as error:
        raise ValueError(
            f"compare: guides['{name}'] must be a factory, called with the model, or a guide that "
            f"is a module, but {describe_program(make)}(model) said: {error}. For a guide that is "
            "a function write `lambda model: guide`."
        ) from error
    if not callable(guide):
        raise ValueError(
            f"compare: guides['{name}'] must return a guide when called with the model, got "
            f"{guide!r}. For a guide that is a function write `lambda model: guide`."
        )
    known = getattr(guide, "_model", [model])
    if isinstance(model, nn.Module) and known[0] is not model:
        raise ValueError(
            f"compare: guides['{name}'] made a guide for another model than the one it was called "
            "with. Each guide is trained with its own copy: write `lambda model: Local(model, ...)`."
        )
    return guide


def _score(
    name: str,
    model: Callable[..., Any],
    result: Fit,
    test: Batch,
    *,
    particles: int,
    plate: str,
    seed: int,
    reference: NUTS | None,
    reference_rows: int,
    progress: bool | None,
    **sampling: Any,
) -> Entry:
    guide: Any = result.guide
    test = as_batch(test, model, guide)  # where the training has put them
    table = check_model(model, test, plate=plate, rows=_rows(test))
    start = time.perf_counter()
    on_test: Any = guide
    refined = False
    if isinstance(guide, Refinable) and table.locals:
        refined = True
        label = _label(f"{name}: test rows", progress)
        on_test = guide.refine(*test, seed=seed, progress=label)
    else:
        with own_parameters(model, guide), seeded(seed), evaluating(model, guide):
            guide(*test)
    seconds = time.perf_counter() - start
    units = active_units(model, on_test, *test, seed=seed, plate=plate) if table.locals else (0, 0)
    options: dict[str, Any] = {"seed": seed, "plate": plate}
    bound = elbo(model, on_test, *test, particles=max(2, particles // 10), **options)
    options["seed"] = stream(seed, 1)  # independent of the bound: their errors add up in the gap
    evidence = None
    if bound.rows is not None:
        evidence = log_evidence(model, on_test, *test, particles=particles, **options)
    beside = None
    if reference is not None and _samplable(table):
        few = tuple(value[:reference_rows] for value in test)
        posterior = sample(
            model,
            *few,
            sampler=reference,
            rows=True,
            seed=seed,
            plate=plate,
            progress=_label(f"{name}: NUTS", progress),
            **sampling,
        )
        beside = _beside(posterior, model, on_test, test, table, len(few[0]), seed)
    return Entry(
        name=name,
        model=model,
        guide=guide,
        fit=result,
        elbo=bound,
        evidence=evidence,
        active=units,
        parameters=result.parameters,
        test_seconds=seconds,
        refined=refined,
        reference=beside,
    )


def _rows(batch: Batch) -> int:
    return len(batch[0]) if batch else 1


def _samplable(table: SiteTable) -> bool:
    return not table.globals and all(not site.discrete for site in table.latents)


def _beside(
    posterior: Posterior,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    test: Batch,
    table: SiteTable,
    rows: int,
    seed: int,
) -> Reference:
    """Compare moments of the guide with those of the reference, site by site."""
    drawn: dict[str, list[Tensor]] = {name: [] for name in posterior}
    with own_parameters(model, guide), seeded(seed), evaluating(model, guide):
        for _ in range(GUIDE_DRAWS):
            trace = poutine.trace(guide).get_trace(*test)
            for name, values in drawn.items():
                value: Any = trace.nodes[name]["value"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
                axis = (table[name].data_dim or 0) - len(table[name].event_shape)
                values.append(value.narrow(axis, 0, rows).flatten())
    errors, noises, ratios = [], [], []
    mcse = posterior.mcse()
    for name, values in drawn.items():
        own = torch.stack(values).double()
        mean, scale = (v[name].flatten().double() for v in (posterior.mean(), posterior.scale()))
        errors.append((own.mean(0) - mean) / scale)
        noise = mcse[name].flatten().square() + own.var(0) / len(own)
        noises.append(noise / scale.square())
        ratios.append((own.std(0) / scale).log())
    return Reference(
        mean_error=torch.cat(errors).square().mean().sqrt().item(),
        noise=torch.cat(noises).mean().sqrt().item(),
        scale_ratio=torch.cat(ratios).mean().exp().item(),
        posterior=posterior,
    )


@contextmanager
def _fresh(
    model: Callable[..., Any], make: Callable[..., Any], batch: Batch
) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Give copies of a model and of a guide or its factory, and put back what is no module's own.

    Modules are copied, a guide together with the model that it knows. What a function asks of
    `pyro.param` or `pyro.module` cannot be: its values are put back after the block.
    """
    memo: dict[int, Any] = {}
    own, mine = (
        copy.deepcopy(program, memo) if isinstance(program, nn.Module) else program
        for program in (model, make)
    )
    store = pyro.get_param_store()
    state: Any = store.get_state()
    leaves = list({id(v): v for v in (*state["params"].values(), *_asked(model, batch))}.values())
    before = [leaf.detach().clone() for leaf in leaves]
    try:
        with store.scope(copy.copy(state)):
            yield own, mine
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)


def _asked(model: Callable[..., Any], batch: Batch) -> list[Tensor]:
    """Return the tensors that a model written as a function asks Pyro for."""
    if isinstance(model, nn.Module):
        return []
    with scratch_store(), seeded(0), torch.no_grad():
        poutine.trace(model).get_trace(*batch)
        state: Any = pyro.get_param_store().get_state()
    return list(state["params"].values())


def _notes(entries: list[Entry], rows: int | None) -> list[str]:
    notes = []
    if refined := [entry.name for entry in entries if entry.refined]:
        notes.append(f"Not the same: {', '.join(refined)} was refined on the test rows.")
    if points := [entry.name for entry in entries if isinstance(entry.guide, Points)]:
        notes.append(f"ELBO of {', '.join(points)} is no bound: points have no density.")
    beside = [entry for entry in entries if entry.reference is not None]
    for entry in beside:
        assert entry.reference is not None
        posterior = entry.reference.posterior
        worst = max(value.max().item() for value in posterior.rhat().values())
        notes.append(
            f"NUTS for {entry.name}: {rows} rows, {posterior.chains} chains of {posterior.draws}, "
            f"R-hat up to {worst:.2f}, {int(posterior.divergences.sum())} divergences, "
            f"{posterior.seconds:.0f} s; by noise alone mean err would be "
            f"{entry.reference.noise:.2f}."
            + (" Its chains disagree: raise draws and warmup." if worst > 1.05 else "")
        )
    if rows is not None and len(beside) < len(entries):
        notes.append("NUTS was not run where a latent is discrete or shared by all rows.")
    for entry in entries:
        if entry.evidence is not None and -entry.evidence.bias > max(0.05, 3 * entry.evidence.se):
            notes.append(
                f"log p(x) under {entry.name} is low by at least {-entry.evidence.bias:.2f} nats: few "
                "particles carry the weight. Raise particles."
            )
    return notes


def _label(name: str, progress: bool | None) -> bool | str | None:
    """Name a bar, where bars are shown at all."""
    return name if progress else progress
