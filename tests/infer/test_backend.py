"""What is done to a graph before it is compiled: the same numbers, for less work."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from ppl_models.infer import backend


def graph_of(function: Any, *inputs: Tensor) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def shapes(graph: torch.fx.GraphModule, name: str) -> list[tuple[int, ...]]:
    return [
        tuple(node.meta["val"].shape)
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target.overloadpacket.__name__ == name
    ]


def normal(x: Tensor, scale: Tensor) -> Tensor:
    """A normal density, less a constant, as `broadcast_all` has it: the scale of each row."""
    wide = scale.unsqueeze(1).expand(x.shape)
    return (-((x / wide) ** 2) / 2 - wide.log()).sum(1)


def test_a_shared_scale_has_one_logarithm() -> None:
    x, scale = torch.randn(3, 50), torch.rand(3) + 0.5
    graph = graph_of(normal, x, scale)
    assert shapes(graph, "log") == [(3, 50)]
    backend._broadcast_late(graph)
    assert shapes(graph, "log") == [(3, 1)]
    backend._store_repeated(graph)
    assert shapes(graph, "stored") == [(3, 1)]
    assert_close(graph(x, scale), normal(x, scale))


def test_two_values_are_broadcast_together() -> None:
    def function(one: Tensor, other: Tensor) -> Tensor:
        return one.expand(4, 5, 6) * other.expand(4, 5, 6)

    one, other = torch.randn(4, 1, 1), torch.randn(1, 5, 1)
    graph = graph_of(function, one, other)
    backend._broadcast_late(graph)
    assert shapes(graph, "mul") == [(4, 5, 1)]
    assert torch.equal(graph(one, other), function(one, other))


def test_each_element_keeps_a_draw_of_its_own() -> None:
    def function(p: Tensor) -> Tensor:
        return torch.bernoulli(p.expand(1000, 4)).mean(0)

    p = torch.full((1, 4), 0.5)
    graph = graph_of(function, p)
    backend._broadcast_late(graph)
    assert shapes(graph, "bernoulli") == [(1000, 4)]


def test_an_activation_is_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return h.sum() + (1 - h**2).sum()

    x = torch.randn(20, 5)
    graph = graph_of(function, x)
    backend._store_repeated(graph)
    (tanh,) = (node for node in graph.graph.nodes if "tanh" in node.name)
    assert [node.name.partition("_")[0] for node in tanh.users] == ["stored"]
    assert_close(graph(x), function(x))


def test_a_square_is_not_worth_its_memory() -> None:
    def function(x: Tensor) -> Tensor:
        square = x**2
        return square.sum() + (1 - square).prod()

    graph = graph_of(function, torch.randn(20, 5))
    backend._store_repeated(graph)
    assert shapes(graph, "pow") == [(20, 5)]
    assert shapes(graph, "stored") == []


def test_tanh_is_right_to_a_few_roundings() -> None:
    near, far = torch.logspace(-300, 0, 20_001), torch.linspace(0.0, 60.0, 20_001)
    x = torch.cat([near, far, torch.tensor([torch.inf, 5e-324, 0.0])])
    x = torch.cat([x, -x])
    assert_close(backend._quick_tanh(x), torch.tanh(x), rtol=5e-16, atol=0.0)
    assert backend._quick_tanh(torch.tensor(torch.nan)).isnan()
    assert backend._quick_tanh(x.float()) is NotImplemented


def test_products_may_be_turned() -> None:
    def function(one: Tensor, other: Tensor) -> Tensor:
        return one @ other

    one, other = torch.randn(300, 7), torch.randn(7, 40)
    ways = Counter(
        backend._fastest(a, b, bias=False) for a, b in ((one, other), (one.float(), other.float()))
    )
    assert set(ways) <= {"mkl", "turned", "onednn"}


def test_arguments_are_split_where_no_bracket_is_open() -> None:
    text = "buf1, wrap(view(arg2_1, 2, a, b, 0L)), (const double*)(buf3.data_ptr()), 1L"
    found = ["buf1", "wrap(view(arg2_1, 2, a, b, 0L))", "(const double*)(buf3.data_ptr())", "1L"]
    assert backend._arguments(text) == found


BODY = """static void run_impl() {
    RAIIAtenTensorHandle buf0(buf0_handle);
    cpp_fused_0((const double*)(arg0_1.data_ptr()), (double*)(buf0.data_ptr()));
    arg0_1.reset();
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(buf1, arg1_1, wrap(view(buf0, 2, a, b, 0L))));
    buf0.reset();
    cpp_fused_1((const double*)(buf1.data_ptr()), (double*)(buf2.data_ptr()));
    buf1.reset();
    output_handles[0] = buf2.release();
}
"""


def test_the_loop_holds_all_calls_and_no_memory_is_freed_before_it() -> None:
    made = backend._looped(BODY)
    assert made is not None
    before, _, after = made.partition("    while (steps.begin())")
    loop, _, after = after.partition("\n")
    calls = ("cpp_fused_0(", "aoti_torch_cpu_mm_out(", "cpp_fused_1(")
    places = [loop.index(call) for call in calls]
    assert places == sorted(places)
    assert not any(call in before or call in after for call in calls)
    assert "reset" not in before
    assert "auto fixed_0_0 = (const double*)(arg0_1.data_ptr());" in before
    assert "auto fixed_1_0 = held(buf1);" in before
    assert "auto fixed_1_2 = wrap(view(buf0, 2, a, b, 0L));" in before
    assert "output_handles[0] = buf2.release();" in after


def test_what_allocates_in_each_step_is_not_looped_within() -> None:
    assert backend._looped(BODY.replace("mm_out", "cholesky")) is None
    assert backend._looped(BODY.replace("wrap(", "StableIValue(")) is None
