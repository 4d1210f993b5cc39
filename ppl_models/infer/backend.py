"""What the step compiler uses of torch that torch calls private, all of it in this file.

It traces a function into a graph of tensor operations, and turns such a graph into a shared
object: Inductor writes the kernels and the code that calls them, a compiler of C++ builds them
together with the loop below, and `Library` runs many steps in one call, without Python.

Lowering runs in a process of its own (this file, run as a script), because Inductor changes global
settings and holds the interpreter for seconds. It imports torch only.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

TESTED = ("2.13",)  # torch versions on which the compiled step is tested
# Operators that take many instructions an element, and those that move nothing.
CALLS = {"acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "digamma", "erf",
         "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p", "log2",
         "logaddexp", "polygamma", "pow", "sigmoid", "sin", "sinh", "tan", "tanh"}  # fmt: skip
DIVIDES = {"div", "reciprocal", "rsqrt", "sqrt"}
VIEWS = {"expand", "permute", "squeeze", "unsqueeze", "view"}
PRODUCTS = {f"aoti_torch_cpu_{name}_out" for name in ("mm", "addmm", "bmm", "baddbmm")}
_CALL = (
    r"    (?:(?P<check>AOTI_TORCH_ERROR_CODE_CHECK\()?)"
    rf"(?P<name>cpp_fused\w*|{'|'.join(sorted(PRODUCTS))})\((?P<arguments>.*?)\)(?(check)\));$"
)
REPEATED = 4  # elements that share a value, from which on it is stored
SHORT = 24  # terms of a sum, and rows and columns, up to which a product is written out


class Unsupported(Exception):
    """Why a graph cannot be compiled, in words for the user."""


def compiles_here() -> str | None:
    """Return why the compiled step is not offered on this torch, if it is not."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version in TESTED:
        return None
    return f"the compiler is tested on torch {', '.join(TESTED)}, this is {torch.__version__}"


def trace(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Run a function once, and return the graph of the tensor operations that it ran."""
    from torch.fx import config
    from torch.fx.experimental import proxy_tensor

    # What torch would note at each operation takes most of the time, and nobody reads it.
    with (
        mock.patch.object(proxy_tensor, "extract_val", _nothing),
        mock.patch.object(config, "do_not_emit_stack_traces", True),
    ):
        return proxy_tensor.make_fx(function, tracing_mode="real")(*inputs)


def _nothing(value: Any, **_: Any) -> None:
    """Note nothing about a value."""


@contextlib.contextmanager
def sources_forgotten() -> Iterator[None]:
    """Forget the sources of graphs that a block makes: torch keeps each for ever, for tracebacks."""
    from torch.fx.graph_module import _loader

    before = set(_loader.eval_cache)
    try:
        yield
    finally:
        for name in set(_loader.eval_cache) - before:
            del _loader.eval_cache[name]
            linecache.cache.pop(name, None)


LinAlgError: type[RuntimeError] = getattr(torch.linalg, "LinAlgError")  # noqa: B009 - not exported


def recording() -> bool:
    """Whether a trace is being made."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def untraced() -> contextlib.AbstractContextManager[Any]:
    """Inside a trace: compute with real values, out of sight of the trace."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def without_python(graph: GraphModule, *inputs: Tensor) -> Callable[..., Any]:
    """Return the graph as a function that torch runs without the interpreter of Python, if it can.

    It is a function of TorchScript, which is on its way out of torch: where it is gone, the graph
    itself serves, at half the speed. `torch.jit.trace` would keep each function for ever.
    """
    private: Any = torch._C
    optimized_execution: Any = vars(torch.jit).get("optimized_execution", contextlib.nullcontext)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            script, _ = private._create_graph_by_tracing(
                lambda *given: graph.forward(*given), inputs, lambda value: "", True, False
            )
            function = private._create_function_from_graph("step", script)
    except Exception:  # noqa: BLE001 - whatever it takes offence at
        return graph.forward

    def run(*given: Tensor) -> Any:
        # TorchScript's own optimisations join matrix products, which changes their rounding.
        with optimized_execution(False):
            return function(*given)

    return run


def is_hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether code of the user's runs before or after each step of an optimiser."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


class Library:
    """A compiled step, loaded.

    Arguments:
        path: The shared object.
        inputs: What the step reads and changes, in the order of its arguments.
    """

    def __init__(self, path: Path, inputs: Sequence[Tensor]) -> None:
        self._library = ctypes.CDLL(str(path))
        self._run = self._library.ppl_models_run
        self._run.restype = ctypes.c_long
        self._error = self._library.ppl_models_error
        self._error.restype = ctypes.c_char_p
        self._inputs = tuple(inputs)  # kept alive: the library holds their addresses
        private: Any = torch._C
        capsules = private._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._handles = (ctypes.c_void_p * len(inputs))(*(address(c, None) for c in capsules))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            delete = self._library.ppl_models_delete
            for handle in getattr(self, "_handles", ()):
                delete(ctypes.c_void_p(handle))
            _ctypes.dlclose(self._library._handle)

    def run(
        self, index: Tensor | None, order: Tensor | None, rates: Tensor, lrs: Tensor
    ) -> tuple[Tensor, str]:
        """Run steps until one has a bound that is not finite.

        Arguments:
            index: The input that tells the rows of a step, shape (B,), or None for all rows.
            order: Rows of all these steps, shape (steps * B,), int64.
            rates: The input with the learning rate of each group, shape (G,), float64.
            lrs: Learning rates of all these steps, shape (steps, G), float64.

        Returns:
            The bounds of the steps taken, shape (<= steps,), float64, and what failed, if anything.
        """
        steps, groups = lrs.shape
        bounds = torch.empty(steps, dtype=torch.float64)
        done = self._run(
            self._handles,
            ctypes.c_int(len(self._inputs)),
            ctypes.c_long(steps),
            ctypes.c_void_p(None if index is None else index.data_ptr()),
            ctypes.c_void_p(None if order is None else order.data_ptr()),
            ctypes.c_long(0 if index is None else len(index)),
            ctypes.c_void_p(rates.data_ptr()),
            ctypes.c_void_p(lrs.data_ptr()),
            ctypes.c_int(groups),
            ctypes.c_void_p(bounds.data_ptr()),
        )
        if done < 0:
            return bounds[:0], self._error().decode(errors="replace") or "no reason was told"
        return bounds[:done], ""


class Replay:
    """A step on a GPU, captured once and replayed: the same interface as `Library`.

    Arguments:
        step: The step, a function of `inputs`, which it changes in place.
        inputs: Tensors on one GPU.
    """

    def __init__(self, step: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = tuple(inputs)
        before = [value.clone() for value in inputs]
        stream = torch.cuda.get_rng_state(inputs[0].device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(3):  # libraries set themselves up in the first calls
                step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._bound = step(*inputs)
        for value, old in zip(inputs, before, strict=True):
            value.copy_(old)
        torch.cuda.set_rng_state(stream, inputs[0].device)

    def run(
        self, index: Tensor | None, order: Tensor | None, rates: Tensor, lrs: Tensor
    ) -> tuple[Tensor, str]:
        """Run steps; see `Library.run`. Steps after one that is not finite are run, and cut off."""
        steps = len(lrs)
        bounds = torch.empty(steps, dtype=torch.float64, device=self._bound.device)
        moved = lrs.to(self._bound.device)
        for step in range(steps):
            if index is not None and order is not None:
                index.copy_(order[step * len(index) :][: len(index)])
            if lrs.shape[1]:
                rates.copy_(moved[step])
            self._graph.replay()
            bounds[step].copy_(self._bound)
        found = bounds.cpu()
        wrong = (~torch.isfinite(found)).nonzero()
        return (found[: int(wrong[0]) + 1] if len(wrong) else found), ""


_LOOP = r"""
static thread_local std::string ppl_models_message;
extern "C" const char* ppl_models_error() { return ppl_models_message.c_str(); }
extern "C" void ppl_models_delete(AtenTensorHandle handle) { aoti_torch_delete_tensor_object(handle); }

extern "C" long ppl_models_run(
    AtenTensorHandle* inputs, int n_inputs, long many, int64_t* index, const int64_t* order,
    long rows, double* rates, const double* lrs, int groups, double* bounds) {
  std::vector<AtenTensorHandle> handles(n_inputs);
  steps = Steps{0, many, index, order, rows, rates, lrs, groups, bounds};
  try {
    while (LOOPS_WITHIN ? steps.done == 0 && many > 0 : steps.begin()) {
      for (int i = 0; i < n_inputs; ++i)
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(inputs[i], &handles[i]));
      AtenTensorHandle output;
      run_impl(handles.data(), &output, nullptr, nullptr);
      RAIIAtenTensorHandle bound(output);
      if (LOOPS_WITHIN) break;
      void* value;
      AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(bound.get(), &value));
      if (!steps.end(static_cast<double*>(value))) break;
    }
  } catch (const std::exception& error) {
    ppl_models_message = error.what();
    return -1;
  }
  return steps.done;
}
"""

_HEADERS = r"""
#include <cmath>
#include <cstring>
#include <string>
#include <vector>
#include <torch/csrc/inductor/aoti_runtime/utils.h>
#include <torch/csrc/inductor/aoti_runtime/scalar_to_tensor.h>
#include <torch/csrc/inductor/cpp_wrapper/device_internal/cpu.h>
#include <c10/util/generic_math.h>
using DeviceStreamType = void*;
using namespace torch::aot_inductor;
namespace { constexpr bool _check_aoti_runtime_check_inputs_env() { return false; } }
[[maybe_unused]] static int64_t align(int64_t bytes) { return (bytes + 63) & -64; }

[[maybe_unused]] static RAIIAtenTensorHandle held(AtenTensorHandle tensor) {
  AtenTensorHandle handle;
  AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor, &handle));
  return RAIIAtenTensorHandle(handle);
}

struct Steps {
  long done, many;
  int64_t* index;
  const int64_t* order;
  long rows;
  double* rates;
  const double* lrs;
  int groups;
  double* bounds;
  bool begin() {
    if (done >= many) return false;
    if (index) std::memcpy(index, order + done * rows, rows * sizeof(int64_t));
    for (int group = 0; group < groups; ++group) rates[group] = lrs[done * groups + group];
    return true;
  }
  bool end(const double* bound) {
    bounds[done] = *bound;
    return std::isfinite(bounds[done++]);
  }
};
static thread_local Steps steps;
"""


# What follows runs in the process of the compiler.


def _load_updates() -> Any:
    spec = util.spec_from_file_location("updates", Path(__file__).with_name("updates.py"))
    if spec is None or spec.loader is None:
        raise Unsupported("the updates of the optimisers were not found")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _step(job: dict[str, Any]) -> Callable[..., tuple[Tensor]]:
    scope: dict[str, Any] = {"torch": torch, "device": torch.device}
    scope |= {"inf": float("inf"), "nan": float("nan")}
    exec(job["code"], scope)  # noqa: S102 - written by the process that asks
    forward = scope["forward"]
    step = _load_updates().whole_step

    def call(*inputs: Tensor) -> tuple[Tensor]:
        return (step(lambda *given: forward(None, *given), job, *inputs),)

    return call


def _lower(job: dict[str, Any]) -> str:
    """Return the C++ of a step."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import codecache, config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.set_num_threads(job["threads"])
    torch.set_default_dtype(getattr(torch, job["dtype"]))  # of tensors that the program makes
    mode = FakeTensorMode()
    has_doubles = any(dtype == "float64" for _, _, dtype, _ in job["inputs"])
    width = torch.float64 if has_doubles else torch.float32
    with torch.no_grad(), mode:
        inputs = [
            torch.empty_strided(
                shape, stride, dtype=getattr(torch, dtype), device=torch.device(device)
            )
            for shape, stride, dtype, device in job["inputs"]
        ]
        step = torch.func.functionalize(_step(job), remove="mutations")
        parts = _decompositions(width)
        graph = make_fx(step, decomposition_table=parts, tracing_mode="real")(*inputs)
    graph.graph.eliminate_dead_code()
    _store_masks(graph, width)
    _broadcast_late(graph)
    _store_repeated(graph)
    _route_products(graph, Path(job["choices"]))
    caught: list[tuple[str, str]] = []

    def catch(
        cls: Any, lowered: Any, wrapper: str, kernels: str, *arguments: Any, **options: Any
    ) -> str:
        if lowered.constants:
            raise Unsupported(f"the graph holds constants: {list(lowered.constants)}")
        caught.append((wrapper, kernels))
        return "caught"

    _draw_as_torch_does(graph)
    _call_operators_by_dispatcher()
    _linear_of_anything()
    _tile_by_width()
    codecache.AotCodeCompiler.compile = classmethod(catch)  # pyright: ignore[reportAttributeAccessIssue]
    settings = {
        "fallback_random": True,  # the draws of eager torch
        "reorder_for_peak_memory": False,  # in their order
        "reorder_for_locality": False,  # which puts reads behind writes, so that they are copied
        "joint_graph_constant_folding": False,
        "cpp.threads": job["threads"],
        "fx_graph_cache": False,
        "size_asserts": False,
        "cpp_wrapper": True,
    } | _vectors(job)
    with (
        config.patch(settings),
        tracing(TracingContext(mode)),
        V.set_fake_mode(mode),
        V.set_aot_compilation(True),
    ):
        # Nothing is packaged: what Inductor was about to build is caught.
        compile_fx_inner(
            joint_graph_passes(graph), inputs, cpp_wrapper=True, aot_mode=True, is_inference=True
        )
    return _standalone(*caught[0])


def _vectors(job: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of Inductor that choose narrower vectors, if they are asked for."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": 256} if job["narrow"] and pick_vec_isa().bit_width() > 256 else {}


def _draws(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())


def _decompositions(width: torch.dtype) -> dict[Any, Any]:
    """What is taken apart before it is compiled: no draws, whose parts would draw otherwise."""
    from torch._inductor.decomposition import select_decomp_table

    aten: Any = torch.ops.aten
    parts = {op: parts for op, parts in select_decomp_table().items() if not _draws(op)}
    both, either = partial(_both, width), partial(_either, width)
    return parts | {
        aten.mm.default: _short_product,
        aten.addmm.default: _short_sum,
        aten.pow.Scalar: _whole_power,
        aten.tanh.default: _quick_tanh,
        aten.bitwise_and.Tensor: both,
        aten.logical_and.default: both,
        aten.bitwise_or.Tensor: either,
        aten.logical_or.default: either,
    }


def _short_product(one: Tensor, other: Tensor) -> Any:
    """Write a short product out: a loop among loops, where a call would cost more than the work."""
    (rows, inner), columns = one.shape, other.shape[1]
    if rows * inner * columns > SHORT**3:
        return NotImplemented
    return (one.unsqueeze(2) * other.unsqueeze(0)).sum(1)


def _short_sum(bias: Tensor, one: Tensor, other: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = _short_product(one, other)
    if product is NotImplemented or (beta, alpha) != (1, 1):
        return NotImplemented
    return product + bias


def _quick_tanh(x: Tensor) -> Any:
    """Take a few roundings for two thirds of the time: in double precision a network waits for it."""
    if x.dtype != torch.float64:
        return NotImplemented
    e = torch.expm1(2.0 * x.clamp(max=20.0))  # 1 - tanh(20) is far below a rounding
    return e / (e + 2.0)


def _whole_power(base: Any, exponent: Tensor) -> Any:
    """Keep whole numbers whole: as a C function `pow.Scalar` takes and returns floats."""
    if exponent.is_floating_point() or not isinstance(base, int):
        return NotImplemented
    return torch.pow(torch.full_like(exponent, base), exponent)


def _draw_as_torch_does(graph: GraphModule) -> None:
    """Have each draw made by torch, by a call that returns it.

    Inductor's own way for `bernoulli` draws in place, and then reads the place too early.
    """
    from torch._inductor import lowering

    aten: Any = torch.ops.aten
    fine = {aten.normal_functional.default, aten.randn.default, aten.rand.default}
    for node in graph.graph.nodes:
        if node.op == "call_function" and _draws(node.target) and node.target not in fine:
            own: Any = lowering.fallback_handler(node.target, add_to_fallback_set=False)
            lowering.lowerings[node.target] = own


def _both(width: torch.dtype, one: Tensor, other: Tensor) -> Any:
    """Combine masks as floats: vectorised code combines bools element by element, on the stack."""
    if one.dtype != torch.bool or other.dtype != torch.bool:
        return NotImplemented
    return torch.minimum(one.to(width), other.to(width)) > 0.0


def _either(width: torch.dtype, one: Tensor, other: Tensor) -> Any:
    if one.dtype != torch.bool or other.dtype != torch.bool:
        return NotImplemented
    return torch.maximum(one.to(width), other.to(width)) > 0.0


def _stored() -> Any:
    """Return an operator that has its argument written to memory, where it would be inlined."""
    from torch._inductor import lowering

    if not hasattr(torch.ops.ppl_models, "stored"):
        torch.library.define("ppl_models::stored", "(Tensor x) -> Tensor")
        torch.library.impl("ppl_models::stored", "default", torch.clone)

    def store(x: Any) -> Any:
        x.realize()
        return x

    stored: Any = torch.ops.ppl_models.stored
    lowering.lowerings[stored] = lowering.lowerings[stored.default] = store
    return stored.default


def _broadcast_late(graph: GraphModule) -> None:
    """Compute on values before they are broadcast, not after it: the logarithm of a shared scale."""
    from torch.fx.node import map_arg

    aten: Any = torch.ops.aten
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        inputs = node.all_input_nodes
        if node.target is aten.view.default and inputs[0].meta["val"].shape == value.shape:
            node.replace_all_uses_with(inputs[0])
            continue
        narrow = {
            source: source.args[0]
            for source in inputs
            if source.target is aten.expand.default
            and source.args[0].meta["val"].ndim == value.ndim == source.meta["val"].ndim
        }
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        is_pointwise &= not _draws(node.target)  # each element is to have a draw of its own
        others = (source for source in inputs if source not in narrow)
        if not is_pointwise or not narrow or any(other.meta["val"].ndim for other in others):
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.node_copy(node)
            for source, before in narrow.items():
                made.replace_input_with(source, before)
            args, kwargs = map_arg((made.args, made.kwargs), lambda source: source.meta["val"])
            made.meta["val"] = node.target(*args, **kwargs)
            if made.meta["val"].numel() == value.numel():
                graph.graph.erase_node(made)
                continue
            wide = graph.graph.call_function(aten.expand.default, (made, list(value.shape)))
        wide.meta["val"] = made.meta["val"].expand(value.shape)
        node.replace_all_uses_with(wide)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _store_repeated(graph: GraphModule) -> None:
    """Store what takes long and is used repeatedly: inlined, it would be computed repeatedly.

    A scale that all rows share would have its logarithm taken by each of them, and the activation
    of a unit would be computed for the next layer and again for its own gradient.
    """
    stored = _stored()

    def store(node: torch.fx.Node) -> None:
        with graph.graph.inserting_after(node):
            made = graph.graph.call_function(stored, (node,))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    costly: set[Any] = set()  # nodes that would be inlined, with something slow in them
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        packet = getattr(node.target, "overloadpacket", None)
        name = getattr(packet, "__name__", "")
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not is_pointwise and name not in VIEWS:
            continue
        for source in node.all_input_nodes:
            if source in costly and source.meta["val"].numel() * REPEATED <= value.numel():
                store(source)
                costly.discard(source)
        is_power = name == "pow" and node.args[1] in (1, 2, 3)  # which are multiplications
        is_call = name in CALLS and not is_power
        if is_call and len(node.users) > 1:
            store(node)
        elif is_call or name in DIVIDES or any(source in costly for source in node.all_input_nodes):
            costly.add(node)
    graph.recompile()


def _store_masks(graph: GraphModule, width: torch.dtype) -> None:
    """Store masks that are used more than once as floats, which are read and written in vectors."""
    aten: Any = torch.ops.aten
    stored = _stored()
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
        if node.op != "call_function" or not is_mask or len(node.users) < 2:
            continue
        users, made = list(node.users), node
        for target, *given in (
            (torch.ops.prims.convert_element_type.default, width),
            (stored,),
            (aten.gt.Scalar, 0.0),
        ):
            with graph.graph.inserting_after(made):
                made = graph.graph.call_function(target, (made, *given))
            made.meta["val"] = value if target is aten.gt.Scalar else value.to(width)
        for user in users:
            user.replace_input_with(node, made)
    graph.recompile()


def _route_products(graph: GraphModule, choices: Path) -> None:
    """Compute each matrix product in the way that was the fastest when timed.

    Single precision may be computed by oneDNN, double precision as the transpose of the product of
    transposes. What was found is kept, so that the same product is always computed in the same way.
    """
    aten: Any = torch.ops.aten
    known = _read_choices(choices)
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default):
            continue
        bias, one, other = (None, *node.args[:2]) if len(node.args) == 2 else node.args[:3]
        values = [factor.meta["val"] for factor in (one, other)]
        is_plain = not node.kwargs and (bias is None or bias.meta["val"].ndim == 1)
        dtypes = {value.dtype for value in values}
        if not is_plain or dtypes not in ({torch.float32}, {torch.float64}):
            continue
        if dtypes == {torch.float64} and bias is not None:
            continue
        work = values[0].shape[0] * values[0].shape[1] * values[1].shape[1]
        if work < 2**16:
            continue  # too short to be timed
        shapes = "; ".join(f"{tuple(v.shape)} {v.stride()}" for v in values)
        kind = "double; " if dtypes == {torch.float64} else ""
        key = f"{kind}{shapes}; bias {bias is not None}; threads {torch.get_num_threads()}"
        if key not in known:
            known[key] = _fastest(*values, bias=bias is not None)
        if known[key] == "mkl":
            continue
        with graph.graph.inserting_before(node):
            if known[key] == "onednn":
                given = (one, _turned(graph, other), bias, "none", [], "")
                linear: Any = torch.ops.mkldnn._linear_pointwise.default
                routed = graph.graph.call_function(linear, given)
                routed.meta["val"] = node.meta["val"]
            else:
                given = (_turned(graph, other), _turned(graph, one))
                made = graph.graph.call_function(aten.mm.default, given)
                made.meta["val"] = node.meta["val"].permute(1, 0)
                routed = _turned(graph, made)
        node.replace_all_uses_with(routed)
        graph.graph.erase_node(node)
    graph.recompile()
    # A product that two processes time at once is timed twice; the later note stands.
    known = _read_choices(choices) | known
    note = choices.with_name(f".{choices.name}-{os.getpid()}")
    note.write_text(json.dumps(known, indent=0, sort_keys=True))
    os.replace(note, choices)


def _read_choices(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _turned(graph: GraphModule, node: torch.fx.Node) -> torch.fx.Node:
    turned = graph.graph.call_function(torch.ops.aten.permute.default, (node, [1, 0]))
    turned.meta["val"] = node.meta["val"].permute(1, 0)
    return turned


def _fastest(one: Tensor, other: Tensor, *, bias: bool) -> str:
    """Time a product in all ways."""
    a, b = (torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).normal_() for v in (one, other))
    c = torch.zeros(b.shape[1], dtype=b.dtype) if bias else None
    linear = torch.ops.mkldnn._linear_pointwise
    ways: dict[str, Callable[[], Tensor]] = {
        "mkl": lambda: torch.mm(a, b) if c is None else torch.addmm(c, a, b)
    }
    if a.dtype == torch.float64:
        ways["turned"] = lambda: torch.mm(b.t(), a.t())
    elif torch.backends.mkldnn.is_available():
        ways["onednn"] = lambda: linear(a, b.t(), c, "none", [], "")
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(7):
        for name, way in ways.items():
            way()
            start = time.perf_counter()
            for _ in range(5):
                way()
            best[name] = min(best[name], time.perf_counter() - start)
    best["mkl"] *= 0.9  # another way is to be clearly faster
    return min(best, key=best.__getitem__)


def _linear_of_anything() -> None:
    """Let oneDNN take weights that change, and operands as they lie: it reads any strides."""
    from torch._inductor import lowering, mkldnn_ir
    from torch._inductor.fx_passes import mkldnn_fusion
    from torch._inductor.ir import TensorBox

    mkldnn_fusion._mkldnn_fusion_init = lambda *args: None  # fuses with constant weights only
    linear: Any = mkldnn_ir.LinearUnary
    linear.require_contiguous = classmethod(lambda cls, value: value)

    def lower(x: Any, w: Any, b: Any, attr: str, scalars: Any, algorithm: str) -> Any:
        return TensorBox.create(linear.create(x, w, b, attr, scalars, algorithm))

    operator = torch.ops.mkldnn._linear_pointwise
    lowering.lowerings[operator] = lowering.lowerings[operator.default] = lower


def _tile_by_width() -> None:
    """Take as many doubles at once as one register holds, where there are no more of them.

    Inductor counts in floats: two registers of doubles, of which a few chains leave one empty.
    """
    from torch._inductor.codegen import cpp as code
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    cpp: Any = code
    whole = cpp.TilingSelect.select_tiling
    if getattr(whole, "by_width", False):
        return

    def select(self: Any, bodies: Any, sizes: Any) -> Any:
        factors, indices, stats = whole(self, bodies, sizes)
        found = cpp._get_dtype_from_loopbodies(cpp._get_loop_body(bodies))
        if len(indices) == 1 and found <= {torch.float64, torch.int64}:
            width = pick_vec_isa().bit_width() // 64
            loops = max(sizes, key=lambda size: len(size[1]))
            if (*loops[0], *loops[1])[indices[0]] <= width:
                factors = [width]
        return factors, indices, stats

    select.by_width = True  # pyright: ignore[reportFunctionMemberAccess]
    cpp.TilingSelect.select_tiling = select


def _call_operators_by_dispatcher() -> None:
    """Call operators that have no C entry through the dispatcher, not through a model container."""
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    whole: Any = CppWrapperCpu.generate_fallback_kernel_with_runtime_lookup
    if getattr(whole, "by_dispatcher", False):
        return

    def lookup(
        self: Any, name: str, kernel: str, get_args: Any, op: Any, raw_args: Any, outputs: Any
    ) -> None:
        self._get_args = get_args
        whole(self, name, kernel, get_args, op, raw_args, outputs)

    def call(self: Any, op: Any, raw_args: Any, output_args: Any, outputs: Any) -> None:
        if not isinstance(op, torch._ops.OpOverload):
            raise Unsupported(f"operator {op} cannot be called from compiled code")
        if any(out is not None and not isinstance(out, str) for out in output_args):
            raise Unsupported(f"operator {op} returns lists of tensors")
        if _is_plain(self, op, raw_args):
            self.generate_fallback_kernel_with_runtime_lookup_nopython(
                self._get_args, op, output_args, outputs
            )
            return
        given = len(raw_args)
        if any(value is not None for value in raw_args[given:]):
            raise Unsupported(f"operator {op} cannot be called from compiled code")
        self.generate_fallback_kernel_with_runtime_lookup_boxed(op, raw_args, output_args, outputs)

    lookup.by_dispatcher = True  # pyright: ignore[reportFunctionMemberAccess]
    patched: Any = CppWrapperCpu
    patched.generate_fallback_kernel_with_runtime_lookup = lookup
    patched.generate_fallback_kernel_with_runtime_lookup_aot = call


def _is_plain(wrapper: Any, op: Any, values: Sequence[Any]) -> bool:
    """Whether a call needs no header of ATen's, which take seconds to read."""
    if wrapper._compatible_with_stableivalue(op):
        return True
    named = zip(op._schema.arguments, values, strict=False)
    absent = {a.name for a, value in named if value is None and "Generator" in str(a.type)}
    plain = (torch.BoolType, torch.FloatType, torch.IntType, torch.TensorType)
    return (
        bool(absent)
        and all(a.name in absent or isinstance(a.type, plain) for a in op._schema.arguments)
        and all(isinstance(r.type, torch.TensorType) for r in op._schema.returns)
    )


def _standalone(wrapper: str, kernels: str) -> str:
    """Take the function that runs a step out of the model container around it: it builds faster."""
    end = "} // AOTInductorModel::run_impl"
    begin = "void AOTInductorModel::run_impl("
    if begin not in wrapper or end not in wrapper:
        raise Unsupported("Inductor wrote code of an unknown form")
    body = wrapper[wrapper.index(begin) : wrapper.index(end)] + "}\n"
    body = body.replace(begin, "static void run_impl(")
    body = body.replace("this->device_idx_", "0")
    body = body.replace("__check_inputs_outputs(input_handles, output_handles);", "")
    body = re.sub(r".*\bauto& kernels = .*\n", "", body)
    if "this->" in body or "constants_" in body or "proxy_executor," in body.split("{", 1)[1]:
        raise Unsupported("the graph needs a model container")
    cached = "\n".join(re.findall(r"^CACHE_TORCH_\w+\([^)]*\);", wrapper, re.MULTILINE))
    extra = "\n".join(
        line
        for line in re.findall(r"^\s*(#include <[^>]+>)", wrapper, re.MULTILINE)
        if "aoti_runtime/" not in line and "aoti_include/" not in line
    )
    if "StableIValue" in body:
        extra += "\n#include <torch/csrc/stable/stableivalue_conversions.h>"
    looped = _looped(body)
    loop = _LOOP.replace("LOOPS_WITHIN", "false" if looped is None else "true")
    return "\n".join((kernels, extra, _HEADERS, cached, looped or body, loop))


def _looped(body: str) -> str | None:
    """Put the loop over steps into the function, if all it calls are kernels and matrix products.

    Then buffers are allocated once for all steps, and addresses are looked up once.
    """
    out = re.findall(r"^    output_handles\[0\] = (\w+)\.release\(\);$", body, re.MULTILINE)
    asked = set(re.findall(r"\baoti_torch_\w+", body)) - {"aoti_torch_empty_strided", *PRODUCTS}
    if len(out) != 1 or asked or "StableIValue" in body:
        return None
    lines: list[str] = []
    calls: list[str] = []
    end = 0  # where the last call stood
    for line in body.splitlines():
        found = re.match(_CALL, line)
        if found is None:
            if not re.fullmatch(r"\s*\w+\.reset\(\);", line):  # its memory is needed again
                lines.append(line)
            continue
        given = []
        for i, value in enumerate(_arguments(found["arguments"])):
            name = f"fixed_{len(calls)}_{i}"
            if re.fullmatch(r"(buf|arg)\d+(_\d+)?", value):  # which may be given away further down
                value = f"held({value})"
            lines.append(f"    auto {name} = {value};")
            given.append(name)
        call = f"{found['name']}({', '.join(given)})"
        calls.append(f"{found['check']}{call});" if found["check"] else f"{call};")
        end = len(lines)
    if not calls:
        return None
    bound = f"    auto fixed_bound = (const double*)({out[0]}.data_ptr());"
    loop = f"    while (steps.begin()) {{ {' '.join(calls)} if (!steps.end(fixed_bound)) break; }}"
    return "\n".join((*lines[:end], bound, loop, *lines[end:], ""))


def _arguments(text: str) -> list[str]:
    """Split the arguments of a call."""
    found, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            found.append("")
        else:
            found[-1] += sign
    return [value.strip() for value in found]


def _build(source: str, out: Path, job: dict[str, Any]) -> None:
    """Build a shared object, and put it in its place in one move."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as folder:
        path = Path(folder, "step.cpp")
        path.write_text(source)
        with config.patch(_vectors(job)):
            isa = pick_vec_isa()
        options = CppTorchOptions(vec_isa=isa, aot_mode=False, warning_all=False)
        builder = CppBuilder("step", str(path), BuildOption=options, output_dir=folder)
        slow = {"-g1", "-pedantic", "-fno-omit-frame-pointer", "-ltorch_python"}
        command = [word for word in builder.get_command_line().split() if word not in slow]
        command[:1] = job["cxx"]
        command.append("-w")  # warnings of torch's headers take a second
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise Unsupported(f"the C++ compiler failed: {done.stderr.strip()[-2000:]}")
        os.replace(builder.get_target_file_path(), out)


def _serve() -> None:
    """Read jobs, one path a line, and answer each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints must not come between the answers
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            job = json.loads(Path(line.strip()).read_text())
            _build(_lower(job), Path(job["out"]), job)
            answer = {"error": None}
        except Exception as error:  # noqa: BLE001 - whatever torch raises, training goes on
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Unsupported):
                cause = cause.__cause__ or cause.__context__
            first = str(cause or error).strip().splitlines() or [type(error).__name__]
            answer = {"error": first[0][:500], "detail": traceback.format_exc()[-4000:]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
