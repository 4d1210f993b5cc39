"""One evaluation of an objective and its gradient, as a graph of tensor operations.

The Pyro program runs once, handlers and backward pass and all, while every tensor operation is
recorded. What the program reaches without being passed it, such as parameters, buffers and tensors
in a closure, becomes an input of the graph: the very tensor, so that a later step sees what has
been done to it since.
"""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.infer import util as pyro_util
from pyro.poutine.indep_messenger import IndepMessenger
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule

from ppl_models.infer import backend

LONG = 1500  # nodes, above which a compiler takes minutes


class Untraceable(Exception):
    """Why a program cannot be recorded, in words for the user."""


@dataclass(frozen=True)
class Graph:
    """A recorded evaluation.

    Attributes:
        module: The graph; called with `tensors` and what was passed, it returns what was recorded:
            of `capture` the bound and the gradient of each leaf in `leaves`.
        tensors: What the program reached by itself, in the order of the graph's first inputs.
        leaves: For each gradient, the place of its leaf among the leaves that were given.
        positions: For each gradient, the place of its leaf among `tensors`.
        changed: Places among all inputs of what the graph changes in place.
        run: The graph, or a faster function that computes the same.
    """

    module: GraphModule
    tensors: tuple[Tensor, ...]
    leaves: tuple[int, ...]
    positions: tuple[int, ...]
    changed: tuple[int, ...]
    run: Callable[..., Any]

    @property
    def nodes(self) -> int:
        """Operations in it."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Evaluate it: of `capture` the bound, and the gradient of each leaf that has one."""
        with torch.no_grad():
            return self.run(*self.tensors, *inputs)


def capture(
    evaluate: Callable[..., tuple[Tensor, list[Tensor | None]]],
    leaves: Sequence[Tensor],
    *inputs: Tensor,
) -> Graph:
    """Record an evaluation.

    Arguments:
        evaluate: Computes the bound and the gradient of each leaf, None where there is none.
        leaves: What gradients are taken of.
        inputs: What `evaluate` is called with.

    Raises:
        Untraceable: If it does what depends on values, such as `if z > 0`.
    """
    present: list[int] = []

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        with _written_back():
            bound, gradients = evaluate(*values)
        present.extend(i for i, gradient in enumerate(gradients) if gradient is not None)
        return bound, *(gradient for gradient in gradients if gradient is not None)

    graph = record(flat, *inputs)
    module, tensors = graph.module, [*graph.tensors]
    where = {id(tensor): place for place, tensor in enumerate(tensors)}
    missing = [i for i in present if id(leaves[i]) not in where]
    if missing:
        # A gradient that does not depend on the value: the leaf is an input all the same.
        for i in missing:
            where[id(leaves[i])] = len(tensors)
            _add_input(module.graph, len(tensors))
            tensors.append(leaves[i])
        with backend.sources_forgotten():
            module.recompile()
            run = backend.without_python(module, *(v.detach() for v in tensors), *inputs)
        graph = replace(graph, tensors=tuple(tensors), changed=_changed(module), run=run)
    return replace(
        graph,
        leaves=tuple(present),
        positions=tuple(where[id(leaves[i])] for i in present),
    )


def record(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Graph:
    """Record any function of tensors.

    Arguments:
        function: Returns tensors; what it does to `inputs` in place becomes part of the graph.
        inputs: What it is called with.

    Raises:
        Untraceable: As `capture`.
    """
    with backend.sources_forgotten():
        try:
            with recordable():
                module = backend.trace(function, *inputs)
        except Exception as error:
            raise Untraceable(_reason(error)) from error
        tensors = _lift(module)
        _simplify(module)
        run = backend.without_python(module, *(v.detach() for v in tensors), *inputs)
    return Graph(module, tuple(tensors), leaves=(), positions=(), changed=_changed(module), run=run)


def _lift(module: GraphModule) -> list[Tensor]:
    """Make an input of every tensor that the graph holds, first of all inputs; and list them."""
    graph = module.graph
    places: dict[tuple[Any, ...], Any] = {}
    tensors: list[Tensor] = []
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        if not isinstance(value, Tensor):
            raise Untraceable(f"it calls a higher-order operation ({node.target})")
        if value.layout != torch.strided:
            raise Untraceable(f"it uses a tensor of layout {value.layout}")
        # `p` and `p.detach()` are the same input; the one that was a leaf stands for both.
        key = (
            value.untyped_storage().data_ptr() or id(value),
            value.storage_offset(),
            tuple(value.shape),
            value.stride(),
            value.dtype,
        )
        if key not in places:
            places[key] = (_add_input(graph, len(tensors)), len(tensors))
            tensors.append(value)
        placeholder, place = places[key]
        if value.requires_grad and not tensors[place].requires_grad:
            tensors[place] = value
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    for name in [name for name in vars(module) if name.startswith("_tensor_constant")]:
        delattr(module, name)
    module.recompile()
    return tensors


def _add_input(graph: Any, place: int) -> Any:
    """Add an input behind those that were added before, and before all others."""
    nodes = iter(graph.nodes)
    for _ in range(place):
        next(nodes)
    with graph.inserting_before(next(nodes)):
        return graph.placeholder(f"given_{place}")


def _simplify(module: GraphModule) -> None:
    """Compute nothing twice and nothing for nothing; the values stay the same to the last bit.

    Two results that are equal when they are made are one, unless either is drawn, or is changed
    in place later on: such as two sums that begin with the same term.
    """
    graph = module.graph
    graph.eliminate_dead_code()
    owner, written = _owners(graph.nodes)
    first: dict[tuple[Any, str], Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        touched = {owner.get(value, value) for value in (node, *node.all_input_nodes)}
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if drawn or touched & written:
            continue
        same = first.setdefault((node.target, repr((node.args, node.kwargs))), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def _owners(nodes: Any) -> tuple[dict[Any, Any], set[Any]]:
    """Return of whom each result is a view, or it itself again, and who is changed in place."""
    owner: dict[Any, Any] = {}
    written: set[Any] = set()
    for node in nodes:
        if node.target is operator.getitem:
            owner[node] = owner.get(node.args[0], node.args[0])
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema is not None else ()):
            value = (
                node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            )
            if argument.alias_info is None or not isinstance(value, torch.fx.Node):
                continue
            owner.setdefault(node, owner.get(value, value))
            if argument.alias_info.is_write:
                written.add(owner.get(value, value))
        if node.target in _BATCH_NORM:
            # Its schema does not say that it updates running means and variances.
            written |= {owner.get(v, v) for v in node.args[3:5] if isinstance(v, torch.fx.Node)}
    return owner, written


def _changed(module: GraphModule) -> tuple[int, ...]:
    """Which inputs an in-place operation changes, itself or through a view."""
    nodes = module.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    _, written = _owners(nodes)
    return tuple(place for place, node in enumerate(inputs) if node in written)


_BATCH_NORM = {torch.ops.aten.native_batch_norm.default}


def _reason(error: BaseException) -> str:
    """Say which line of whose program cannot be recorded, and why."""
    if isinstance(error, Untraceable):
        return str(error)
    own = Path(__file__).resolve().parents[1]
    libraries = ("torch", "pyro", "contextlib", "unittest", "zuko", "opt_einsum")
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        if any(name in parts or f"{name}.py" in parts for name in libraries):
            continue
        if own in Path(frame.filename).parents or frame.filename.startswith("<"):
            continue
        place = f", at {Path(frame.filename).name}:{frame.lineno} `{frame.line}`"
        break
    text = str(error).strip().splitlines()
    what = text[0] if text else type(error).__name__
    if "inplace" in what or "doesn't match the broadcast shape" in what:
        return (
            f"it writes in place into a tensor that is not a function of the latents{place}; "
            "torch.stack and torch.where make a new one"
        )
    number = ("value out of a tracing tensor", "data-dependent", ".item()")
    if any(words in what.lower() for words in number):
        sampler = _sampler(error)
        if sampler:
            return (
                f"{sampler} draws in a loop whose length depends on the values{place}; only another "
                "distribution, which draws without one, can be recorded"
            )
        return (
            f"it takes a Python number out of a tensor{place}: the path then depends on values; "
            "torch.where chooses between tensors without"
        )
    return f"{type(error).__name__}: {what[:300]}{place}"


def _sampler(error: BaseException) -> str | None:
    """Name the distribution whose own sampler failed."""
    tb = error.__traceback__
    while tb is not None:
        frame: FrameType = tb.tb_frame
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name in {"sample", "rsample"} and isinstance(owner, Distribution):
            inner = "distributions" in frame.f_code.co_filename
            if inner and not isinstance(owner, torch.distributions.Independent):
                return type(owner).__name__
        tb = tb.tb_next
    return None


@contextmanager
def recordable() -> Iterator[None]:
    """Neutralise, for a block, what Pyro does with values besides arithmetic."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if not name.startswith(("pyro.", "ppl_models.", "guides.")):
                continue
            for attribute, replacement in _NEUTRAL.items():
                if attribute in vars(module):
                    stack.enter_context(patch.object(module, attribute, replacement))
        stack.enter_context(patch.object(Tensor, "item", _item))
        stack.enter_context(patch.object(Tensor, "__format__", _format))
        stack.enter_context(patch.object(Tensor, "__repr__", _repr))
        stack.enter_context(unvalidated())
        stack.enter_context(patch.object(IndepMessenger, "__iter__", _sequential))
        for name in ("tolist", "numpy", "__array__"):
            stack.enter_context(patch.object(Tensor, name, _by_value))
        stack.enter_context(patch.object(pyro_util, "torch", _TorchOfDice()))
        stack.enter_context(patch.object(Tensor, "masked_select", _masked))
        yield


def _item(value: Tensor) -> Tensor:
    """The value as a tensor: what Pyro takes out is for reports, which are in double precision."""
    detached = value.detach()
    return detached.double() if detached.is_floating_point() else detached


_plain_item, _plain_format, _plain_repr = Tensor.item, Tensor.__format__, Tensor.__repr__


def _format(value: Tensor, spec: str) -> str:
    """Turn a value into text: a number that has none yet, as in a recording, has no text either."""
    with suppress(RuntimeError, TypeError), patch.object(Tensor, "item", _plain_item):
        return _plain_format(value.detach(), spec)
    return "tensor"


def _repr(value: Tensor, **options: Any) -> str:
    with suppress(RuntimeError, TypeError), patch.object(Tensor, "item", _plain_item):
        return _plain_repr(value, **options)
    return "tensor"


_NEUTRAL: dict[str, Callable[..., Any]] = {
    "torch_item": lambda value: _item(value) if isinstance(value, Tensor) else value,
    "warn_if_nan": lambda value, *rest, **options: value,
    "warn_if_inf": lambda value, *rest, **options: value,
}

_init = Distribution.__init__


@contextmanager
def unvalidated() -> Iterator[None]:
    """Have distributions check nothing, for a block: also those that were told to when made."""
    with (
        pyro.validation_enabled(False),
        patch.object(Distribution, "__init__", _unvalidated),
        patch.object(Distribution, "_validate_sample", lambda self, value: None),
    ):
        yield


def _unvalidated(
    self: Any,
    batch_shape: Any = torch.Size(),  # noqa: B008 - as in torch
    event_shape: Any = torch.Size(),  # noqa: B008
    validate_args: bool | None = None,
) -> None:
    _init(self, batch_shape, event_shape, validate_args=False)


def _sequential(self: Any) -> Iterator[Any]:
    """Loop over a sequential plate with numbers of Python, not with tensors."""
    size, part = self.size, getattr(self, "subsample_size", self.size)
    if part not in (None, size):
        raise Untraceable(
            f"plate '{self.name}' draws {part} of its {size} rows and loops over them; as a "
            "context, `with pyro.plate(...)`, it can be recorded"
        )
    self._vectorized = False
    self.dim = None
    for row in range(size):
        self.next_context()
        with self:
            yield row


def _by_value(value: Tensor, *rest: Any, **options: Any) -> Any:
    """Refuse what reads memory: the graph would go on using what was read."""
    raise RuntimeError("a value out of a tracing tensor")


@contextmanager
def _written_back() -> Iterator[None]:
    """Write into parameters what a block puts in their places: the graph goes on reading them."""
    store: Any = pyro.get_param_store()
    before = dict(store._params)
    yield
    for name, value in list(store._params.items()):
        if name not in before:
            raise Untraceable(
                f"pyro.param '{name}' is made by a step itself; make it before the training, by "
                "an evaluation of the objective"
            )
        old = before[name]
        if value is not old:
            with torch.no_grad():
                old.copy_(value.detach())
            store._param_to_name.pop(value)
            store._params[name], store._param_to_name[old] = old, name


def _masked(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))


class _TorchOfDice:
    """torch, as `pyro.infer.util` sees it: it then masks costs without looking at the mask."""

    class _C:
        @staticmethod
        def _get_tracing_state() -> bool:
            return True

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
