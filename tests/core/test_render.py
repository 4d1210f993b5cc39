"""Graphs of programs are those known by hand, and the picture holds each of their parts."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from guides import Amortized, Local
from guides.registry import PAIRS
from ppl_models import PPCA, VAE, render
from ppl_models.core.picture import Picture
from ppl_models.core.render import Graph, graph_of
from ppl_models.core.sites import argument_names


def schools(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("schools", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros_like(theta), 1.0))
        shift = pyro.deterministic("shift", 2 * theta)
        with pyro.plate("pupils", 4):
            ability = pyro.sample("ability", dist.Normal(shift, 1.0))
            pyro.sample("y", dist.Normal(ability, scale), obs=y)


def schools_guide(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("tau", dist.LogNormal(mu, 1.0))
    with pyro.plate("schools", 3):
        pyro.sample("theta", dist.Normal(y.mean(0), 1.0))
        pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 1.0))
        with pyro.plate("pupils", 4):
            pyro.sample("ability", dist.Normal(0.0, 1.0))


def parts(graph: Graph) -> tuple[dict[str, tuple[Any, ...]], set[tuple[str, str]]]:
    nodes = {n.name: (n.kind, n.distribution, n.plates) for n in graph.nodes.values()}
    return nodes, set(graph.edges)


def drawn(picture: Any, what: str) -> set[str]:
    (ax,) = picture.axes
    return {p.get_gid() for p in ax.patches if p.get_gid().startswith(what)}


def test_the_graph_of_ppca() -> None:
    model = PPCA(data_dim=5, latent_dim=2)
    x = model(size=7)
    graph = graph_of(model, x)
    assert parts(graph) == (
        {"z": ("latent", "Normal", ("data",)), "x": ("observed", "Normal", ("data",))},
        {("z", "x")},
    )
    assert graph.plates == {"data": "data: 7"}
    assert graph.arrows


def test_the_graph_of_nested_plates_reads_through_deterministic_sites_and_past_blanks() -> None:
    graph = graph_of(schools, torch.randn(4, 3))
    both = ("schools", "pupils")
    assert parts(graph) == (
        {
            "mu": ("latent", "Normal", ()),
            "tau": ("latent", "HalfCauchy", ()),
            "theta": ("latent", "Normal", ("schools",)),
            "scale": ("latent", "LogNormal", ("schools",)),
            "ability": ("latent", "Normal", both),
            "y": ("observed", "Normal", both),
        },
        {
            ("mu", "theta"),
            ("tau", "theta"),
            ("theta", "ability"),
            ("ability", "y"),
            ("scale", "y"),
        },
    )
    assert graph.plates == {"schools": "schools: 3", "pupils": "pupils: 4"}


def test_the_guide_reads_its_data() -> None:
    graph = graph_of(schools_guide, torch.randn(4, 3), plate="pupils")
    assert graph.nodes["y"].kind == "given"
    assert graph.nodes["y"].plates == ("pupils",)  # as many rows
    assert set(graph.edges) == {("mu", "tau"), ("y", "theta")}
    model = VAE(data_dim=4, latent_dim=2, hidden=(3,))
    x = model(size=5)
    assert set(graph_of(Amortized(model), x, names=["x"]).edges) == {("x", "z")}
    assert set(graph_of(Local(model, rows=5), x).nodes) == {"z"}


def test_covariates_are_given_and_global_latents_are_outside() -> None:
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    graph = graph_of(regression, torch.randn(5, 2), torch.randn(5))
    assert {n.name: (n.kind, n.plates) for n in graph.nodes.values()} == {
        "w": ("latent", ()),
        "y": ("observed", ("data",)),
        "x": ("given", ("data",)),
    }
    assert set(graph.edges) == {("w", "y"), ("x", "y")}


def test_loops_factors_marks_and_subsamples_are_told() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("pull", -(w**2))
        h = w
        for t in pyro.plate("time", 3):
            h = pyro.sample(f"z_{t}", dist.Normal(w, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as chosen:
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(h + k, 1.0), obs=x[chosen])

    graph = graph_of(model, torch.randn(5))
    assert {n.name: n.kind for n in graph.nodes.values()} == {
        "w": "latent",
        "pull": "factor",
        **dict.fromkeys(["z_0", "z_1", "z_2"], "latent"),
        "k": "enumerated",
        "x": "observed",
    }
    assert graph.plates == {"time": "time: loop of 3", "data": "data: 2 of 5"}
    edges = {("w", child) for child in ("pull", "z_0", "z_1", "z_2")}
    assert set(graph.edges) == edges | {("z_2", "x"), ("k", "x")}
    picture = render(model, None, torch.randn(5))
    places = [t for t in picture.axes[0].texts if t.get_text().startswith("z_")]
    across = sorted(places, key=lambda text: text.get_position()[0])
    assert [text.get_text() for text in across] == ["z_0", "z_1", "z_2"]


def test_the_picture_holds_the_nodes_edges_and_plates_of_both() -> None:
    y = torch.randn(4, 3)
    picture = render(schools, schools_guide, y)
    assert isinstance(picture, Picture)
    for panel, program in (("model", schools), ("guide", schools_guide)):
        graph = graph_of(program, y)
        assert drawn(picture, f"{panel} node") == {f"{panel} node {name}" for name in graph.nodes}
        assert drawn(picture, f"{panel} edge") == {
            f"{panel} edge {a} -> {b}" for a, b in graph.edges
        }
        assert drawn(picture, f"{panel} plate") == {
            f"{panel} plate schools",
            f"{panel} plate schools/pupils",
        }
    said = {text.get_text() for text in picture.axes[0].texts}
    assert {"model: schools", "guide: schools_guide", "pupils: 4", "HalfCauchy"} <= said
    fills = {p.get_gid(): p.get_facecolor()[0] for p in picture.axes[0].patches}
    assert fills["model node y"] < 0.9
    assert fills["model node theta"] == 1.0


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_every_pair_is_drawn(pair: Any) -> None:
    model = pair.model()
    batch = pair.batch(model, 4)
    guide = pair.guide(model, 4)
    picture = render(model, guide, *batch)
    assert picture._repr_png_().startswith(b"\x89PNG")
    graph = graph_of(model, *batch)
    latents = {name for name, node in graph.nodes.items() if node.kind == "latent"}
    (data,) = (name for name, node in graph.nodes.items() if node.kind == "observed")
    nearest = {a for a, b in graph.edges if b == data} & latents
    assert nearest
    assert drawn(picture, "model edge") >= {f"model edge {z} -> {data}" for z in nearest}
    nodes = drawn(picture, "guide node")
    read = {f"guide node {name}" for name in (data, *argument_names(model, len(batch)))}
    assert nodes - read == {f"guide node {z}" for z in latents}
    reads = {edge for edge in drawn(picture, "guide edge") if f"edge {data} -> " in edge}
    assert bool(reads) is not isinstance(guide, Local) or not pair.row_wise
    assert (f"guide node {data}" in nodes) is bool(reads)


def inside(inner: Any, outer: Any) -> bool:
    low, high = (inner.min >= outer.min).all(), (inner.max <= outer.max).all()
    return bool(low and high)


def test_twenty_nodes_keep_apart_and_each_is_in_its_own_plates_alone() -> None:
    def big(x: Tensor) -> None:
        h = [pyro.sample(f"h{i}", dist.Normal(0.0, 1.0)) for i in range(4)]
        features = pyro.plate("features", 3, dim=-1)
        with features:
            w = pyro.sample("w", dist.Normal(h[0], h[1].exp()))
        with pyro.plate("data", len(x), dim=-2):
            z = [pyro.sample(f"z{i}", dist.Normal(h[i % 4], 1.0)) for i in range(8)]
            u = [pyro.sample(f"u{i}", dist.Normal(z[i] + z[i * i % 8], 1.0)) for i in range(6)]
            with features:
                pyro.sample("x", dist.Normal(w * u[0] + u[5] + h[3], 1.0), obs=x)

    x = torch.randn(5, 3)
    graph = graph_of(big, x)
    assert len(graph.nodes) == 20
    picture = render(big, None, x)
    (ax,) = picture.axes
    picture.draw_without_rendering()
    boxes = {p.get_gid(): p.get_window_extent() for p in ax.patches}
    nodes = {name: boxes[f"model node {name}"] for name in graph.nodes}
    names = list(nodes)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not nodes[a].overlaps(nodes[b]), (a, b)
    for name, box in boxes.items():
        if name.startswith("model plate"):
            path = tuple(name.removeprefix("model plate ").split("/"))
            for node in graph.nodes.values():
                belongs = node.plates[: len(path)] == path
                assert inside(nodes[node.name], box) is belongs, (node, path)
                assert bool(nodes[node.name].overlaps(box)) is belongs, (node, path)
    for text in ax.texts:
        assert inside(text.get_window_extent(), picture.bbox), text


def test_a_program_that_refuses_tracked_tensors_has_no_arrows_and_the_picture_says_so() -> None:
    def picky(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if type(z) is not Tensor:
                raise TypeError
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.zeros(3)
    graph = graph_of(picky, x)
    assert not graph.arrows
    assert set(graph.nodes) == {"z", "x"}
    assert graph.edges == frozenset()
    picture = render(picky, None, x)
    assert "arrows unknown: picky" in picture.axes[0].texts[-1].get_text()


def test_a_program_that_fails_raises_its_own_error_once() -> None:
    def torn(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        x @ torch.ones(9, 9)

    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        render(torn, None, torch.zeros(3, 2))
    assert error.value.__context__ is None
    assert len(error.value.__notes__) == 1


def test_drawing_changes_nothing() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)

    model = Model()
    x = torch.randn(6, 2)
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    render(model, None, x)
    assert torch.equal(torch.get_rng_state(), stream)
    assert len(pyro.get_param_store()) == 0
    for name, value in model.named_parameters():
        assert value is before[name]
        assert type(value) is nn.Parameter
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_what_an_earlier_module_left_in_the_store_stays_out_of_this_one() -> None:
    class Model(pyro.nn.PyroModule):
        def __init__(self, width: int) -> None:
            super().__init__("same")
            self.weight = pyro.nn.PyroParam(torch.randn(width, 2))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(x @ self.weight, 1.0).to_event(1))

    with pyro.poutine.trace():
        Model(5)(torch.randn(6, 5))  # its weight, of another width, is under the same name
    before = dict(pyro.get_param_store().items())
    graph = graph_of(Model(2), torch.randn(6, 2))
    assert set(graph.edges) == {("x (given)", "x")}
    assert dict(pyro.get_param_store().items()).keys() == before.keys()


def test_it_is_drawn_into_axes_that_are_given() -> None:
    from ppl_models.core.picture import picture

    figure = picture(3, 2)
    ax = figure.subplots()
    assert render(schools, schools_guide, torch.randn(4, 3), ax=ax) is figure
    assert max(text.get_fontsize() for text in ax.texts) < 11


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="render: model must be a Pyro model.*the class PPCA"):
        render(PPCA, None)
    with pytest.raises(ValueError, match="render: guide must be a Pyro guide"):
        render(schools, Amortized, torch.zeros(4, 3))
