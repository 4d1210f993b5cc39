"""Graphs of programs as plate diagrams: a layout in layers, drawn in inches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from ppl_models.core.picture import GREY, axes_for, drawing, figure_of
from ppl_models.core.render import Graph, Node

WIDTH, HEIGHT = 1.3, 0.6  # of a node
COLUMN = 1.6  # from node to node
PAD = 0.16  # from what a plate holds to its border
LABEL = 0.22  # room for the name of a plate
MARGIN = 0.35  # around a diagram
TITLE = 0.45
BENDS = (0.0, *(side * i / 10 for i in range(1, 8) for side in (1, -1)))

Point: TypeAlias = tuple[float, float]
Path: TypeAlias = tuple[str, ...]  # names of nested plates, the outermost first


@dataclass
class _Box:
    """Nodes that move together: one node, or a plate with what is in it.

    `places` says where its nodes are, from left to right of its middle; `rows` which rows it takes.
    """

    path: Path
    places: dict[str, float]
    rows: tuple[int, int]
    half: float


@dataclass
class _Layout:
    graph: Graph
    points: dict[str, Point] = field(default_factory=dict)
    #: left, bottom, right, top of each plate
    plates: dict[Path, tuple[float, float, float, float]] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def draw_graphs(graphs: Mapping[str, Graph], *, ax: Axes | None = None) -> Figure:
    """Draw graphs side by side, under the titles that are their keys: see `render`."""
    layouts = {title: _layout(graph) for title, graph in graphs.items()}
    widths = [max(layout.width, 2.6) + 2 * MARGIN for layout in layouts.values()]
    height = max(layout.height for layout in layouts.values()) + 2 * MARGIN + TITLE
    note = _legend(graphs.values())
    width = max(sum(widths), 0.062 * len(note) + 2 * MARGIN)
    room = 0.3
    with drawing():
        ax = axes_for(ax, width, height + room)
        box = ax.get_window_extent().transformed(figure_of(ax).dpi_scale_trans.inverted())
        scale = min(1.0, box.width / width, box.height / (height + room))
        ax.set(xlim=(0, width), ylim=(-room, height), aspect="equal")
        ax.set_axis_off()
        left = (width - sum(widths)) / 2
        for (title, layout), wide in zip(layouts.items(), widths, strict=True):
            heading = f"{title}: {layout.graph.program}"
            ax.text(left + MARGIN, height - 0.15, heading, va="top", fontsize=11 * scale)
            if left > 0.1:
                ax.plot([left, left], [0.1, height - 0.1], color="#dddddd", lw=0.8)
            middle = left + (wide - layout.width) / 2
            top = height - TITLE - MARGIN
            _draw(ax, title, layout, (middle, top), scale)
            left += wide
        ax.text(MARGIN, 0.0, note, va="top", color=GREY, fontsize=8 * scale, gid="legend")
        return figure_of(ax)


def _legend(graphs: Iterable[Graph]) -> str:
    graphs = list(graphs)
    kinds = {node.kind for graph in graphs for node in graph.nodes.values()}
    words = {
        "observed": "shaded: observed",
        "given": "shaded box: an argument",
        "enumerated": "dashed: summed out",
        "factor": "black box: a factor",
    }
    said = [words[kind] for kind in words if kind in kinds]
    unknown = [graph.program for graph in graphs if not graph.arrows]
    if unknown:
        said.append(f"arrows unknown: {', '.join(unknown)} does not run on tracked tensors")
    return "; ".join(said)


# Layout


def _layout(graph: Graph) -> _Layout:
    rows = _rows(graph)
    top = _pack((), graph, rows, list(graph.nodes))
    paths = {
        node.plates[:i] for node in graph.nodes.values() for i in range(1, 1 + len(node.plates))
    }
    depth = max(map(len, paths), default=0)
    pitch = HEIGHT + 0.5 + depth * (PAD + LABEL / 2)
    layout = _Layout(graph)
    layout.points = {name: (x, -pitch * rows[name]) for name, x in top.places.items()}
    for path in paths:
        inside = [n.name for n in graph.nodes.values() if n.plates[: len(path)] == path]
        deeper = max(len(graph.nodes[name].plates) for name in inside) - len(path)
        pad = PAD * (deeper + 1)
        xs = [layout.points[name][0] for name in inside]
        ys = [layout.points[name][1] for name in inside]
        layout.plates[path] = (
            min(xs) - WIDTH / 2 - pad,
            min(ys) - HEIGHT / 2 - pad - LABEL * (deeper + 1),
            max(xs) + WIDTH / 2 + pad,
            max(ys) + HEIGHT / 2 + pad,
        )
    boxes = [
        *layout.plates.values(),
        *(
            (x - WIDTH / 2, y - HEIGHT / 2, x + WIDTH / 2, y + HEIGHT / 2)
            for x, y in layout.points.values()
        ),
    ] or [(0.0, 0.0, 0.0, 0.0)]
    west, south = min(box[0] for box in boxes), min(box[1] for box in boxes)
    east, north = max(box[2] for box in boxes), max(box[3] for box in boxes)
    layout.width, layout.height = east - west, north - south
    # From here on the top left corner is (0, 0).
    layout.points = {name: (x - west, y - north) for name, (x, y) in layout.points.items()}
    layout.plates = {
        path: (a - west, b - north, c - west, d - north)
        for path, (a, b, c, d) in layout.plates.items()
    }
    return layout


def _rows(graph: Graph) -> dict[str, int]:
    """Put each node below its parents, and one without parents just above its first child."""
    if not graph.arrows:
        return {node.name: int(node.kind == "observed") for node in graph.nodes.values()}
    parents = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    children = {name: [b for a, b in graph.edges if a == name] for name in graph.nodes}
    rows: dict[str, int] = {}

    def row(name: str) -> int:
        if name not in rows:
            rows[name] = max((row(parent) + 1 for parent in parents[name]), default=0)
        return rows[name]

    for name in graph.nodes:
        row(name)
    for name in graph.nodes:
        if not parents[name] and children[name]:
            rows[name] = min(rows[child] for child in children[name]) - 1
    return rows


def _pack(path: Path, graph: Graph, rows: Mapping[str, int], names: Sequence[str]) -> _Box:
    """Place nodes and plates beside each other, each as near as can be to what it is tied to."""
    boxes = []
    inner: dict[str, list[str]] = {}
    for name in names:
        plates = graph.nodes[name].plates
        if len(plates) > len(path):
            inner.setdefault(plates[len(path)], []).append(name)
        else:
            boxes.append(_Box(path, {name: 0.0}, (rows[name], rows[name]), COLUMN / 2))
    for plate, members in inner.items():
        boxes.append(_pack((*path, plate), graph, rows, members))
    # The widest first, in the middle; then from the top.
    boxes.sort(key=lambda box: (-len(box.places) if len(box.places) > 1 else 0, box.rows))
    placed: list[tuple[_Box, float]] = []
    places: dict[str, float] = {}
    while boxes:
        # Boxes with the same parents are alike: they stay in the order of the program.
        alike = [box for box in boxes if _kin(box, graph) == _kin(boxes[0], graph)]
        boxes = [box for box in boxes if box not in alike]
        wish = _wish(alike[0], graph, places)
        free: list[tuple[_Box, float]] = []
        for box in alike:
            free.append((box, _nearest(wish, box, [*placed, *free])))
        for box, x in zip(alike, sorted(x for _, x in free), strict=True):
            placed.append((box, x))
            places |= {name: x + offset for name, offset in box.places.items()}
    left = min((x - box.half for box, x in placed), default=0.0)
    right = max((x + box.half for box, x in placed), default=0.0)
    middle = (left + right) / 2
    spans = [row for box, _ in placed for row in box.rows] or [0]
    return _Box(
        path,
        {name: x - middle for name, x in places.items()},
        (min(spans), max(spans)),
        (right - left) / 2 + (PAD if path else 0.0),
    )


def _kin(box: _Box, graph: Graph) -> Any:
    """Return what two boxes must share to change places."""
    parents = {a for a, b in graph.edges if b in box.places}
    single = next(iter(box.places)) if len(box.places) > 1 else ""
    return single, box.rows, box.half, frozenset(parents)


def _wish(box: _Box, graph: Graph, places: Mapping[str, float]) -> float:
    """Where a box would be right above or below what it is tied to."""
    ties = [(a, b) for edge in graph.edges for a, b in (edge, edge[::-1])]
    wishes = [places[b] - box.places[a] for a, b in ties if a in box.places and b in places]
    return sum(wishes) / len(wishes) if wishes else 0.0


def _nearest(wish: float, box: _Box, placed: Sequence[tuple[_Box, float]]) -> float:
    """Return the free place that is nearest to a wish."""
    beside = [
        (x, other.half + box.half)
        for other, x in placed
        if other.rows[0] <= box.rows[1] and box.rows[0] <= other.rows[1]
    ]
    tries = [wish, *(x + side * room for x, room in beside for side in (-1, 1))]
    free = [t for t in tries if all(abs(t - x) >= room - 1e-9 for x, room in beside)]
    return min(free, key=lambda t: (abs(t - wish), t))


# Drawing


def _draw(ax: Axes, title: str, layout: _Layout, corner: Point, scale: float) -> None:
    points = {name: (corner[0] + x, corner[1] + y) for name, (x, y) in layout.points.items()}
    for path, (left, bottom, right, top) in sorted(layout.plates.items()):
        left, right = left + corner[0], right + corner[0]
        bottom, top = bottom + corner[1], top + corner[1]
        plate = FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="#00000006",
            edgecolor=GREY,
            lw=0.9 * scale,
            gid=f"{title} plate {'/'.join(path)}",
        )
        ax.add_patch(plate)
        label = layout.graph.plates[path[-1]]
        place: dict[str, Any] = {"ha": "right", "va": "bottom", "color": GREY}
        size = _fitting(label, right - left - 0.2, 8.0) * scale
        ax.text(right - 0.1, bottom + 0.05, label, fontsize=size, **place)
    shapes = {
        name: _draw_node(ax, title, node, points[name], scale)
        for name, node in layout.graph.nodes.items()
    }
    for a, b in sorted(layout.graph.edges):
        bend, clear = _bend(points, a, b)
        arrow = FancyArrowPatch(
            points[a],
            points[b],
            patchA=shapes[a],
            patchB=shapes[b],
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=11 * scale,
            shrinkA=0,
            shrinkB=0,
            lw=1.0 * scale,
            color="#333333",
            zorder=1 if clear else 5,  # over the node in its way: below, it would seem to end there
            gid=f"{title} edge {a} -> {b}",
        )
        ax.add_patch(arrow)


def _draw_node(ax: Axes, title: str, node: Node, point: Point, scale: float) -> Patch:
    look: dict[str, Any] = {
        "facecolor": "#cfcfcf" if node.kind in ("observed", "given") else "white",
        "edgecolor": "#333333",
        "lw": 1.1 * scale,
        "ls": "--" if node.kind == "enumerated" else "-",
        "gid": f"{title} node {node.name}",
        "zorder": 3,
    }
    x, y = point
    if node.kind in ("given", "factor"):
        high = 0.4
        if node.kind == "factor":
            look |= {"facecolor": "#333333"}
        shape: Patch = Rectangle((x - 0.55, y - high / 2), 1.1, high, **look)
    else:
        shape = Ellipse(point, WIDTH, HEIGHT, **look)
    ax.add_patch(shape)
    ink = "white" if node.kind == "factor" else "black"
    second = node.distribution if node.kind not in ("given", "factor") else ""
    place: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4}
    size = _fitting(node.name, 0.85 * WIDTH if second else 1.0, 10.5) * scale
    ax.text(x, y + (0.09 if second else 0.0), node.name, color=ink, fontsize=size, **place)
    if second:
        size = _fitting(second, 0.8 * WIDTH, 8.0) * scale
        ax.text(x, y - 0.13, second, color="#555555", fontsize=size, **place)
    return shape


def _fitting(text: str, width: float, size: float) -> float:
    """Return the size of letters, in points, with which a text fits into a width in inches."""
    return min(size, 72 * width / (0.58 * max(len(text), 1)))


def _bend(points: Mapping[str, Point], a: str, b: str) -> tuple[float, bool]:
    """Choose the least curved arrow that keeps off other nodes, and say whether there is one."""
    west = min(x for x, _ in points.values()) - WIDTH / 2 - PAD
    east = max(x for x, _ in points.values()) + WIDTH / 2 + PAD
    others = [point for name, point in points.items() if name not in (a, b)]

    def hits(bend: float) -> float:
        way = list(_curve(points[a], points[b], bend))
        out = any(not west < x < east for x, _ in way)
        return out / 2 + sum(
            any(math.hypot((x - u) / (0.53 * WIDTH), (y - v) / (0.55 * HEIGHT)) < 1 for x, y in way)
            for u, v in others
        )

    best = min(BENDS, key=lambda bend: (hits(bend), abs(bend)))
    return best, hits(best) < 1


def _curve(start: Point, end: Point, bend: float) -> Iterator[Point]:
    """Yield points of the arc that matplotlib calls `arc3`, a quadratic Bezier curve."""
    (x1, y1), (x2, y2) = start, end
    cx, cy = (x1 + x2) / 2 + bend * (y2 - y1), (y1 + y2) / 2 - bend * (x2 - x1)
    for i in range(1, 40):
        t = i / 40
        u, v, w = (1 - t) ** 2, 2 * t * (1 - t), t**2
        yield u * x1 + v * cx + w * x2, u * y1 + v * cy + w * y2
