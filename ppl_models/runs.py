"""Saved runs: a folder with what was trained, how, and how it went."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyro
import safetensors.torch
import torch
from pyro import poutine
from safetensors import SafetensorError
from torch import Tensor, nn

from guides.flows import zuko
from guides.registry import BLOCKS
from ppl_models import __version__
from ppl_models.core import recipe
from ppl_models.core.batch import as_batch, check_device, check_programs, parameter_like
from ppl_models.core.minibatch import minibatch
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
FILE = re.compile(r"(parameters|history)-[0-9a-f]{12}\.(safetensors|csv)")
# Of what decides the numbers.
VERSIONS = {
    "ppl-models": __version__,
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "pyro-ppl": pyro.__version__,
    "zuko": zuko.__version__,
}
TRAINING = ("steps", "epochs", "batch_size", "parameters", "seconds", "compiled", "interrupted")
TRAINING += ("settings",)
PROGRAM = {"kind", "module", "frozen", "rows", "recipe", "yours"}


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
        path: The folder, made if it is missing; a run in it is replaced, other files are left.
        result: What `fit` returned. Parameters are saved as they are now.
        info: Anything that JSON can hold, to be found again as `Run.info`.

    Returns:
        The folder.

    Raises:
        ValueError: If `path` is a file, `info` is not for JSON, or there is something to be saved
            that a file of tensors cannot hold or that is gone from Pyro's parameter store.
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
    if not isinstance(result, Fit):
        raise ValueError(
            f"save_run: result must be what `fit` returned, got {type(result).__name__}. Write "
            "save_run(path, fit(model, guide, x))."
        )
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_run: path must be a folder, but '{path}' is a file.")
    tensors: dict[str, Tensor] = {}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": VERSIONS,
        "model": _described("model", result.model, tensors),
        "guide": _described("guide", result.guide, tensors),
        "objective": _objective(result.objective, tensors),
        "bound": _bound(result, tensors),
        "training": {name: getattr(result, name) for name in TRAINING},
        "info": _as_json(info),
    }
    tensors |= {f"example:{i}": value for i, value in enumerate(result.example)}
    rows = "".join(f"{step},{bound!r}\n" for step, bound in enumerate(result.bounds.tolist(), 1))
    contents: dict[str, bytes] = {}
    files = {}
    for kind, ending, content in (
        ("parameters", "safetensors", _packed(tensors)),
        ("history", "csv", f"step,bound\n{rows}".encode()),
    ):
        digest = hashlib.sha256(content).hexdigest()
        name = f"{kind}-{digest[:12]}.{ending}"
        contents[name] = content
        files[kind] = {"name": name, "bytes": len(content), "sha256": digest}
    config["files"] = files
    config["digest"] = _digest(config)
    _write(path, contents, json.dumps(config, indent=2, allow_nan=False).encode())
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
    executed that the folder names. If the two do not give the bound that they gave when they were
    saved, because a network of yours has changed, say, there is a warning.

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
    config, tensors, history, training = _read(path)
    with unchanged_on_error(), _unchanged_on_error(model, guide), seeded(0):
        own = _made("model", config, tensors, path) if model is None else model
        if model is not None:
            _check_passed("model", own, config, tensors)
        states = {role: _under(f"state:{role}.", tensors) for role in ("model", "guide")}
        _move(own, states["model"], place)
        _fill("model", own, config["model"], states["model"])
        if guide is None:
            mine = _made("guide", config, tensors, path, model=own)
        else:
            mine = _called(guide, own, config) if isinstance(guide, type) else guide
            _check_passed("guide", mine, config, tensors)
            _check_bound(mine, own)
        _move(mine, states["guide"], place)
        like = parameter_like(own, mine)
        at = place or (like.device if like is not None else torch.device("cpu"))
        rows = _under("example:", tensors)
        example = tuple(rows[str(i)].to(at) for i in range(len(rows)))
        fit = Fit(
            model=own,
            guide=mine,
            bounds=torch.tensor(history, dtype=torch.float64),
            example=example,
            **training,
        )
        try:
            # What they make at their first call only is then there to be filled.
            asked, _ = _run(fit)
        except Exception as error:
            raise ValueError(
                f"load_run: the model and guide of '{path}' cannot be run on the rows that were "
                f"saved with them: {error}"
            ) from error
        fit = replace(fit, objective=_learnt(config, tensors, at))
        _copy("what is asked of pyro.param", asked, _under("store:", tensors))
        _fill("guide", mine, config["guide"], states["guide"])
        _, now = _run(fit)
    then, same = config["bound"], at.type == "cpu" and config["versions"] == VERSIONS
    if then is not None and same and not math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-3):
        warnings.warn(
            f"load_run: on the rows that were saved with '{path}', its model and guide give a bound "
            f"of {now:.6g} nats, and gave {then:.6g} when they were saved. They have the same "
            "parameters, so something else has changed: a network, a function, or a buffer or "
            "frozen parameter of a network that a function uses.",
            stacklevel=2,
        )
    return Run(path, own, mine, fit, config["info"], config)


def _described(role: str, program: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Describe a model or a guide, and add its state to `tensors`.

    The recipe is None where the program itself is the user's own; `yours` lists what of it is.
    """
    about: dict[str, Any] = {
        "kind": describe_program(program),
        "module": isinstance(program, nn.Module),
        "frozen": [],
        "rows": 0,
    }
    if isinstance(program, nn.Module):
        tensors |= {f"state:{role}.{name}": v for name, v in program.state_dict().items()}
        about["frozen"] = [n for n, p in program.named_parameters() if not p.requires_grad]
    instead = None
    if role == "guide" and isinstance(program, NamedModule) and type(program) in BLOCKS.values():
        instead = program.arguments()
        traced = instead.pop("model")
        if instead.get("example") is not None:  # two rows of it, repeated, stand in for all
            batch = as_batch(instead["example"], traced)
            about["rows"] = len(batch[0]) if batch else 0
            instead["example"] = tuple(value[:2] for value in batch)
    parts: dict[str, Tensor] = {}
    own: list[str] = []
    spec = recipe.encode(program, BLOCKS, parts, own, at=role, instead=instead)
    tensors |= {f"recipe:{name}": value for name, value in parts.items()}
    return about | {"recipe": spec if "name" in spec else None, "yours": ", ".join(own)}


def _objective(objective: Any, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Describe an objective and what its estimator has learnt; None if it is not the library's."""
    parts: dict[str, Tensor] = {}
    own: list[str] = []
    spec = recipe.encode(objective, BLOCKS, parts, own, at="objective")
    if own or "name" not in (spec or {}):
        return None
    tensors |= {f"recipe:{name}": value for name, value in parts.items()}
    return spec


def _learnt(config: Any, tensors: Mapping[str, Tensor], at: torch.device) -> Any:
    """Make the objective again; None if it was not the library's."""
    parts = {name: value.to(at) for name, value in _under("recipe:objective", tensors).items()}
    parts = {f"objective{name}": value for name, value in parts.items()}
    return recipe.decode(config.get("objective"), BLOCKS, parts)


def _bound(result: Fit, tensors: dict[str, Tensor]) -> float | None:
    """Return the bound on the example, if it is one to compare with, and add to `tensors`."""
    known = set(pyro.get_param_store().keys())
    with scratch_store():
        asked, bound = _run(result)
        _, again = _run(result)
    if gone := sorted(set(asked) - known):
        raise ValueError(
            f"save_run: {gone} are not in Pyro's parameter store any more, so what was learnt is "
            "lost. Save before `pyro.clear_param_store()`."
        )
    tensors |= {f"store:{name}": value for name, value in asked.items()}
    like = parameter_like(result.model, result.guide)
    on_cpu = like is None or like.device.type == "cpu"
    return bound if on_cpu and bound == again and math.isfinite(bound) else None


def _run(fit: Fit) -> tuple[dict[str, Tensor], float]:
    """Run model and guide on the example, repeated to as many rows as a step had.

    Returns:
        The unconstrained tensors that they ask `pyro.param` for, by name, and the bound.
    """
    rows, size = fit.settings["batch_size"], fit.settings["rows"]
    batch = _tiled(fit.example, rows)
    index = torch.arange(rows)
    part = minibatch(index, size, plate=fit.settings["plate"]) if rows < size else nullcontext()
    programs = fit.model, fit.guide
    with own_parameters(*programs), seeded(0), evaluating(*programs), part:
        guided = poutine.trace(fit.guide).get_trace(*batch)
        told = poutine.trace(poutine.replay(fit.model, trace=guided)).get_trace(*batch)
        bound = told.log_prob_sum() - guided.log_prob_sum()
        nodes: dict[str, Any] = {**guided.nodes, **told.nodes}
        # Within: Pyro forgets the unconstrained value of a parameter when its store changes.
        asked = {n: v["value"].unconstrained() for n, v in nodes.items() if v["type"] == "param"}
    own = [p for q in programs if isinstance(q, nn.Module) for p in q.parameters()]
    asked = {n: value for n, value in asked.items() if not any(value is p for p in own)}
    return asked, float(bound)


def _tiled(example: Batch, rows: int) -> Batch:
    return tuple(value[torch.arange(rows) % len(value)] for value in example)


def _made(role: str, config: Any, tensors: Mapping[str, Tensor], path: Path, **given: Any) -> Any:
    """Build a model or guide from its recipe."""
    about = config[role]
    if about["yours"]:
        raise ValueError(
            f"load_run: the {role} of '{path}' cannot be made from the folder alone, because this "
            f"is your own: {about['yours']}. Make the {role} as you did before, and pass it: "
            f"load_run({str(path)!r}, {role}=...)."
        )
    try:
        parts = _under("recipe:", tensors)
        if about["rows"]:
            example = recipe.decode(about["recipe"]["arguments"]["example"], BLOCKS, parts)
            given["example"] = _tiled(example, about["rows"])
        return recipe.decode(about["recipe"], BLOCKS, parts, **given)
    except Exception as error:
        raise ValueError(
            f"load_run: the {role} {about['kind']} of '{path}' cannot be made again: {error} "
            f"If it can be made otherwise, pass it: load_run({str(path)!r}, {role}=...)."
        ) from error


def _called(make: Callable[..., Any], model: Any, config: Any) -> Any:
    """Make the guide from its class and the model."""
    if make.__name__ == config["guide"]["kind"]:
        try:
            return make(model)
        except Exception as error:
            raise ValueError(
                f"load_run: {make.__name__}, called with the model alone, said: {error} Make the "
                "guide as you did before, and pass it as guide=..."
            ) from error
    raise ValueError(
        f"load_run: the guide of this run is {_named(config['guide'])}, but guide= is the class "
        f"{make.__name__}. Pass what was trained."
    )


def _check_passed(role: str, program: Any, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a model or guide that is visibly another one than was saved."""
    check_programs("load_run", **{role: program})
    found: dict[str, Tensor] = {}
    saved, here = config[role], _described(role, program, found)
    wants = f"load_run: the {role} of this run is {_named(saved)}"
    # A function may be called otherwise now.
    if (saved["module"] or here["module"]) and _named(saved) != _named(here):
        raise ValueError(f"{wants}, but {role}= is {_named(here)}. Pass what was trained.")
    if saved["recipe"] is None:
        return
    given, parts = here["recipe"]["arguments"], _under("recipe:", found)
    for name, value in saved["recipe"]["arguments"].items():
        then = recipe.show(value, _under("recipe:", tensors))
        now = recipe.show(given.get(name), parts)
        if name != "example" and now != then:
            raise ValueError(
                f"{wants} made with {name}={_short(then)}, but {role}= was made with "
                f"{name}={_short(now)}. Pass one like it, or, if nothing of it is your own, leave "
                f"{role}= out."
            )


def _check_bound(guide: Any, model: Any) -> None:
    """Refuse a guide made for another model: a guide of the library holds on to its own."""
    match getattr(guide, "_model", None):
        case [nn.Module() as other] if all(part is not model for part in other.modules()):
            raise ValueError(
                f"load_run: guide= was made for another {describe_program(other)} than the model "
                "of this run. Make the model first, and pass both: "
                f"load_run(path, model=model, guide={describe_program(guide)}(model))."
            )


def _named(about: Mapping[str, Any]) -> str:
    own = "" if about["recipe"] else "your own "
    return f"{own}{about['kind']}" if about["module"] else f"the function {about['kind']}"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _move(program: Any, saved: Mapping[str, Tensor], place: torch.device | None) -> None:
    """Put a module on its device and in the precision that was saved, with all its buffers."""
    if isinstance(program, nn.Module):
        named = [*program.named_parameters(), *program.named_buffers()]
        kinds = [
            (v.dtype, saved[n].dtype) for n, v in named if n in saved and v.is_floating_point()
        ]
        # Only if it is in another: of several precisions each stays.
        other = kinds and kinds[0][0] != kinds[0][1]
        program.to(device=place, dtype=kinds[0][1] if other else None)


def _fill(role: str, program: Any, about: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Give a module the parameters that were saved."""
    if isinstance(program, nn.Module):
        _copy(f"the {role} {about['kind']}", program.state_dict(keep_vars=True), saved)
        for name, parameter in program.named_parameters():
            parameter.requires_grad_(name not in about["frozen"])


def _copy(what: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
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
        value.data = saved[name].to(value.device)


@contextmanager
def _unchanged_on_error(*programs: Any) -> Iterator[None]:
    """Put modules, and the values in Pyro's parameter store, back as they were if a block fails."""
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    # Copies of the dictionaries in them: of parameters, of buffers, of submodules.
    before = [
        (vars(m), {k: copy(v) if isinstance(v, dict) else v for k, v in vars(m).items()})
        for m in modules
    ]
    tensors: list[Tensor] = list(pyro.get_param_store().get_state()["params"].values())
    tensors += [v for m in modules for v in (*m.parameters(), *m.buffers())]
    values = [(value, value.data, value.requires_grad) for value in tensors]
    try:
        yield
    except BaseException:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)
        for value, data, learns in values:
            value.data = data
            value.requires_grad_(learns)
        raise


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the content of a safetensors file."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"save_run: a run holds dense tensors, but {name} is a "
                f"{getattr(value, 'layout', type(value).__name__)}. Keep it out of the state_dict."
            )
    # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
    copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    try:
        return safetensors.torch.save(copies)
    except (SafetensorError, KeyError) as error:
        kinds = sorted({str(value.dtype) for value in copies.values()})
        raise ValueError(
            f"save_run: safetensors cannot hold a tensor of one of these kinds, {kinds}: {error}."
        ) from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _as_json(info: Any) -> dict[str, Any]:
    if info is not None and not isinstance(info, Mapping):
        raise ValueError(f"save_run: info must be a mapping such as a dict, got {info!r}.")
    try:
        return json.loads(json.dumps(dict(info or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"save_run: info must be something that JSON can hold: {error}."
        ) from error


def _read(
    path: Path,
) -> tuple[dict[str, Any], dict[str, Tensor], Sequence[float], dict[str, Any]]:
    """Read and check all of a run: its config, its tensors, its bounds, how it was trained."""
    config = _read_config(path)
    try:
        tensors = safetensors.torch.load(_read_file(path, config["files"]["parameters"]))
        history = _read_file(path, config["files"]["history"]).decode()
        bounds = [float(row["bound"]) for row in csv.DictReader(history.splitlines())]
        training = {name: config["training"][name] for name in TRAINING}
        for role in ("model", "guide"):
            if missing := PROGRAM - set(config[role]):
                raise KeyError(f"{role} without {sorted(missing)}")
        if not isinstance(config["info"], dict) or "bound" not in config:
            raise KeyError("without info or bound")
        if len(bounds) != training["steps"]:
            raise KeyError(f"{len(bounds)} bounds of {training['steps']} steps")
        return config, tensors, bounds, training
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"load_run: '{path}' is damaged: {error!r}.") from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if path.is_file():
        raise ValueError(f"load_run: path must be the folder of a run, but '{path}' is a file.")
    if not file.is_file():
        raise ValueError(f"load_run: there is no run in '{path}': it has no {CONFIG}.")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_run: '{file}' is damaged: {error}.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"load_run: '{file}' is not from a run of this library.")
    found = config.get("version")
    if type(found) is int and found > VERSION:
        raise ValueError(
            f"load_run: '{path}' has format version {found}, and ppl-models "
            f"{__version__} reads versions up to {VERSION}. Upgrade ppl-models."
        )
    try:
        whole = type(found) is int and found >= 1 and config.pop("digest", None) == _digest(config)
    except ValueError:  # NaN, which Python reads and JSON does not have
        whole = False
    if not whole:
        raise ValueError(f"load_run: '{file}' was changed after it was saved.")
    return config


def _read_file(path: Path, about: Mapping[str, Any]) -> bytes:
    if not FILE.fullmatch(about["name"]):
        raise ValueError(f"load_run: '{path}' is damaged: it has no file {about['name']!r}.")
    file = path / about["name"]
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
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    old, new = _names(path), set(contents)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _put(path / name, content)
        _sync(path)
        _put(path / CONFIG, config)
    except OSError as error:
        raise OSError(
            error.errno,
            f"save_run: cannot write to '{path}': {error.strerror or error}. "
            "What was saved there before is as it was.",
        ) from error
    finally:
        # However it ended, config.json says which run is there; what only the other needs goes.
        with suppress(OSError):
            _sync(path)
            named = _names(path)  # those of another writer, where one came in between
            if named or not (path / CONFIG).exists():
                for name in (old | new) - named:
                    (path / name).unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # refused where something is in it
                folder.rmdir()


def _names(path: Path) -> set[str]:
    """Names of the files of the run in a folder; none if there is no run to be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        names = {about["name"] for about in _read_config(path)["files"].values()}
        return {name for name in names if FILE.fullmatch(name)}
    return set()


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
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make the names in a folder last, where the system can: Windows opens no folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
