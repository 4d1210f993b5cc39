"""Saved runs: a folder with what was trained, how, and how it went."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch
from pyro import poutine
from torch import Tensor, nn

from guides.registry import BLOCKS
from ppl_models.core import recipe
from ppl_models.core.batch import as_batch, check_device, check_programs, parameter_like
from ppl_models.core.modes import evaluating
from ppl_models.core.module import NamedModule
from ppl_models.core.random import seeded
from ppl_models.core.sites import describe_program
from ppl_models.core.store import own_parameters, scratch_store, unchanged_on_error
from ppl_models.core.types import Batch
from ppl_models.infer import Fit

FORMAT = "ppl-models run"
VERSION = 1  # of the format: raise it when an older library could not read what is written
CONFIG = "config.json"
PACKAGES = ("ppl-models", "torch", "pyro-ppl", "zuko")


@dataclass(frozen=True)
class Run:
    """A run read back.

    Attributes:
        path: Its folder.
        model: The model, trained.
        guide: The guide, trained.
        fit: How the training went.
        info: What was saved along with it.
        config: All that config.json says.
    """

    path: Path
    model: Callable[..., Any] = field(repr=False)
    guide: Callable[..., Any] = field(repr=False)
    fit: Fit
    info: dict[str, Any]
    config: dict[str, Any] = field(repr=False)


def save_run(path: str | Path, result: Fit, *, info: Mapping[str, Any] | None = None) -> Path:
    """Save a trained model and its guide in a folder.

    The folder gets `config.json`, the parameters as safetensors, and the bound of each step as CSV.
    Whatever happens meanwhile, the folder holds a whole run: the one that was there before, or the
    new one. Nothing is pickled. What `pyro.param` made for a model or guide that is a function is
    saved with it, and so are the first two rows of the data, which some guides need to be rebuilt.

    Arguments:
        path: The folder, made if it is missing; a run in it is replaced.
        result: What `fit` returned.
        info: Anything that JSON can hold, to be found again as `Run.info`.

    Returns:
        The folder.

    Raises:
        ValueError: If `path` is a file, or `info` is not for JSON.
        OSError: If it cannot be written. What was there before is as it was.

    Example:
        >>> import tempfile
        >>> from guides import Amortized
        >>> from ppl_models import PPCA
        >>> from ppl_models.infer import fit
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> result = fit(model, Amortized(model), model(size=64), steps=3, seed=0)
        >>> folder = save_run(tempfile.mkdtemp(), result)
        >>> load_run(folder).model
        PPCA()
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_run: path must be a folder, but '{path}' is a file.")
    tensors: dict[str, Tensor] = {}
    model, guide = result.model, result.guide
    described = {
        "model": _described("model", model, tensors),
        "guide": _described("guide", guide, tensors),
    }
    example = tuple(value.detach() for value in result.example)
    tensors |= {f"example:{i}": value for i, value in enumerate(example)}
    if not all(isinstance(program, NamedModule) for program in (model, guide)):
        with scratch_store():
            asked = _asked(model, guide, _tiled(example, result.settings["rows"]))
        tensors |= {f"store:{name}": value for name, value in asked.items()}
    # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    history = pd.DataFrame({"bound": result.bounds.numpy()}, index=range(1, result.steps + 1))
    contents = {
        # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
        "parameters": (".safetensors", safetensors.torch.save(tensors)),
        "history": (".csv", history.to_csv(index_label="step").encode()),
    }
    files = {}
    for kind, (ending, content) in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        name = f"{kind}-{digest[:12]}{ending}"
        files[kind] = {"name": name, "bytes": len(content), "sha256": digest}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        **described,
        "training": {
            "settings": result.settings,
            "epochs": result.epochs,
            "parameters": result.parameters,
            "seconds": result.seconds,
            "compiled": result.compiled,
            "interrupted": result.interrupted,
        },
        "info": dict(info or {}),
        "files": files,
    }
    try:
        config["digest"] = _digest(config)
        text = json.dumps(config, indent=2, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save_run: info must be something that JSON can hold: {error}."
        ) from error
    _write(path, {files[kind]["name"]: content for kind, (_, content) in contents.items()}, text)
    return path


def load_run(
    path: str | Path,
    *,
    model: Callable[..., Any] | None = None,
    guide: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
) -> Run:
    """Read a run back: the model and the guide as they were saved.

    What the library has by name it builds by itself. Your own network, class or function is yours
    to pass in, as it was made the first time: its parameters are set here. Nothing is imported or
    executed that the folder names.

    Arguments:
        path: The folder.
        model: The model, where it is or has something of your own. A module is filled in place; what
            a function asks of `pyro.param` is put into Pyro's parameter store.
        guide: The guide, likewise, or the class of a guide, such as `pyro.infer.autoguide.AutoNormal`,
            which is then called with the model.
        device: Where to put them, by default the CPU.

    Raises:
        ValueError: If there is no run, it is damaged or from a newer library, something of your own
            is missing, or what was passed is not what was saved. Nothing has changed then.

    Example:
        See `save_run`.
    """
    path, place = Path(path), check_device(device)
    config = _read_config(path)
    tensors = safetensors.torch.load(_read(path, config, "parameters"))
    history = pd.read_csv(BytesIO(_read(path, config, "history")), float_precision="round_trip")
    training = dict(config["training"])
    settings = training["settings"]
    example = tuple(tensors[f"example:{i}"] for i in range(_count(tensors, "example:")))
    for role, passed in (("model", model), ("guide", guide)):
        if passed is not None:
            _check_passed(role, passed, config[role])
    with unchanged_on_error(), _put_back_on_error() as changed, seeded(0):
        own = _made("model", config, tensors, path) if model is None else model
        check_programs("load_run", model=own)
        _fill("model", own, config, tensors, place, changed)
        if guide is None:
            mine = _made("guide", config, tensors, path, model=own)
        else:
            mine = guide(own) if isinstance(guide, type) else guide
        check_programs("load_run", guide=mine)
        like = parameter_like(own, mine)
        example = tuple(
            value.to(place or (like.device if like is not None else "cpu")) for value in example
        )
        if not all(isinstance(program, NamedModule) for program in (own, mine)):
            # Runs both, so that what they make at their first call is there to be filled.
            asked = _asked(own, mine, _tiled(example, settings["rows"]))
            saved = {
                k.removeprefix("store:"): v for k, v in tensors.items() if k.startswith("store:")
            }
            _copy("pyro.param", asked, saved, changed)
        _fill("guide", mine, config, tensors, place, changed)
    fit = Fit(
        model=own,
        guide=mine,
        bounds=torch.tensor(history["bound"].to_numpy(), dtype=torch.float64),
        steps=len(history),
        batch_size=settings["batch_size"],
        example=example,
        **training,
    )
    return Run(path, own, mine, fit, config["info"], config)


def _described(role: str, program: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe a model or a guide, and add its state to `tensors`."""
    about: dict[str, Any] = {"kind": describe_program(program), "recipe": None, "frozen": []}
    if isinstance(program, nn.Module):
        state = program.state_dict()
        tensors |= {f"state:{role}.{name}": value for name, value in state.items()}
        about["frozen"] = [n for n, p in program.named_parameters() if not p.requires_grad]
    parts: dict[str, Tensor] = {}
    try:
        about["recipe"] = _recipe(role, program, parts)
        tensors |= {f"recipe:{name}": value for name, value in parts.items()}
    except recipe.NoRecipe as error:
        about["yours"] = str(error)
    return about


def _recipe(role: str, program: Any, parts: dict[str, Tensor]) -> Any:
    instead = None
    if role == "guide" and isinstance(program, NamedModule):
        instead = program.arguments()
        instead.pop("model", None)
        if instead.get("example") is not None:
            instead["example"] = tuple(value[:2] for value in as_batch(instead["example"]))
    return recipe.encode(program, BLOCKS, parts, at=role, instead=instead)


def _made(role: str, config: Any, tensors: Mapping[str, Tensor], path: Path, **given: Any) -> Any:
    about = config[role]
    if about["recipe"] is None:
        raise ValueError(
            f"load_run: {about['yours']}, so the {role} {about['kind']} of '{path}' cannot be made "
            f"from the folder alone. Make it as you did before, and pass it: "
            f"load_run({str(path)!r}, {role}=...)."
        )
    parts = {k.removeprefix("recipe:"): v for k, v in tensors.items() if k.startswith("recipe:")}
    return recipe.decode(about["recipe"], BLOCKS, parts, **given)


def _check_passed(role: str, program: Any, about: dict[str, Any]) -> None:
    """Refuse a model or guide that is visibly another one than was saved."""
    kind = program.__name__ if isinstance(program, type) else describe_program(program)
    wants = f"load_run: the {role} of this run is {about['kind']}"
    if isinstance(program, nn.Module | type) and kind != about["kind"]:
        raise ValueError(f"{wants}, but {role}= is {kind}. Pass what was trained.")
    if about["recipe"] is None or isinstance(program, type):
        return
    with suppress(recipe.NoRecipe):
        here = _recipe(role, program, {})["arguments"]
        for name, saved in about["recipe"]["arguments"].items():
            if name != "example" and here.get(name) != saved:
                raise ValueError(
                    f"{wants} made with {name}={saved}, but {role}= was made with "
                    f"{name}={here.get(name)}. Pass one like it, or leave {role}= out."
                )


def _fill(
    role: str,
    program: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    place: torch.device | None,
    changed: list[tuple[Tensor, Tensor, bool]],
) -> None:
    """Give a module the parameters that were saved, in the precision they were saved in."""
    if not isinstance(program, nn.Module):
        return
    prefix = f"state:{role}."
    saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    own = program.state_dict(keep_vars=True)
    like = next((v for v in saved.values() if v.is_floating_point()), None)
    if place is not None:
        before = [*program.parameters(), *program.buffers()]
        changed += [(value, value.data, value.requires_grad) for value in before]
        program.to(place)
    _copy(f"{role} {config[role]['kind']}", own, saved, changed)
    for buffer in program.buffers():
        if like is not None and buffer.is_floating_point() and buffer.dtype != like.dtype:
            changed.append((buffer, buffer.data, False))
            buffer.data = buffer.data.to(like.dtype)
    for name, parameter in program.named_parameters():
        parameter.requires_grad_(name not in config[role]["frozen"])


def _copy(
    what: str,
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    changed: list[tuple[Tensor, Tensor, bool]],
) -> None:
    """Copy saved values over a program's own, after a look that all of them fit."""
    faults = [f"{name} is not in the run" for name in own if name not in saved]
    faults += [f"{name} is only in the run" for name in saved if name not in own]
    faults += [
        f"{name} has shape {tuple(own[name].shape)}, in the run {tuple(saved[name].shape)}"
        for name in own
        if name in saved and own[name].shape != saved[name].shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"load_run: {what} is not what was saved: {'; '.join(faults[:3])}{more}. Make it as it "
            "was made before it was trained."
        )
    for name, value in own.items():
        changed.append((value, value.data, value.requires_grad))
        value.data = saved[name].to(value.device)


@contextmanager
def _put_back_on_error() -> Iterator[list[tuple[Tensor, Tensor, bool]]]:
    """Put tensors back as they were, should the block fail."""
    changed: list[tuple[Tensor, Tensor, bool]] = []
    try:
        yield changed
    except BaseException:
        for value, before, learns in reversed(changed):
            value.data = before
            if value.is_leaf:
                value.requires_grad_(learns)
        raise


def _asked(model: Any, guide: Any, batch: Batch) -> dict[str, Tensor]:
    """Run both, and return the unconstrained tensors that they ask `pyro.param` for, by name."""
    own = [p for q in (model, guide) if isinstance(q, nn.Module) for p in q.parameters()]
    with own_parameters(model, guide), seeded(0), evaluating(model, guide):
        guided = poutine.trace(guide).get_trace(*batch)
        told = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*batch)
    nodes = {**guided.nodes, **told.nodes}
    asked = {n: v["value"].unconstrained() for n, v in nodes.items() if v["type"] == "param"}
    own += [p for q in (model, guide) if isinstance(q, nn.Module) for p in q.parameters()]
    return {name: value for name, value in asked.items() if not any(value is p for p in own)}


def _tiled(example: Batch, rows: int) -> Batch:
    """Repeat the example to as many rows as the data had: a stand-in for them."""
    return tuple(value[torch.arange(rows) % len(value)] for value in example)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in tensors)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"load_run: there is no run in '{path}': it has no {CONFIG}.")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"load_run: '{file}' is damaged: {error}.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"load_run: '{file}' is not from a run of this library.")
    if not isinstance(config.get("version"), int) or config["version"] > VERSION:
        raise ValueError(
            f"load_run: '{path}' has format version {config.get('version')}, written by ppl-models "
            f"{config.get('versions', {}).get('ppl-models')}; this is ppl-models "
            f"{version('ppl-models')}, which reads versions up to {VERSION}. Upgrade it."
        )
    if config.pop("digest", None) != _digest(config):
        raise ValueError(f"load_run: '{file}' was changed after it was saved.")
    return config


def _read(path: Path, config: dict[str, Any], kind: str) -> bytes:
    about = config["files"][kind]
    file = path / Path(about["name"]).name
    if not file.is_file():
        raise ValueError(f"load_run: '{file}' is missing; the run cannot be read without it.")
    content = file.read_bytes()
    if len(content) != about["bytes"]:
        raise ValueError(
            f"load_run: '{file}' is truncated or was changed: it has {len(content)} of "
            f"{about['bytes']} bytes."
        )
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError(f"load_run: '{file}' was changed after it was saved: its sha256 differs.")
    return content


def _digest(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, contents: Mapping[str, bytes], config: bytes) -> None:
    """Write a run so that at every moment its folder holds a whole one: config.json comes last."""
    new = not path.exists()
    before = set(_names(path))
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _put(path / name, content)
        _put(path / CONFIG, config)
    except OSError as error:
        for name in set(contents) - before:
            (path / name).unlink(missing_ok=True)
        if new:
            with suppress(OSError):
                path.rmdir()
        raise OSError(
            f"save_run: cannot write to '{path}': {error.strerror or error}. "
            "What was saved there before is as it was."
        ) from error
    for name in before - set(contents):
        (path / name).unlink(missing_ok=True)


def _names(path: Path) -> list[str]:
    """Names of the files of the run in a folder; none if there is no run to be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        config = _read_config(path)
        return [Path(about["name"]).name for about in config["files"].values()]
    return []


def _put(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
