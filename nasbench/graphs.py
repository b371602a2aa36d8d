"""Architectures as graphs: layers from top to bottom, with every operation a box of its own, so no edge needs a label.

Graphviz's `dot` places the boxes and leads the lines around them; its wheel needs no system package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nasbench.style import ACCENT, INK, LINE, MUTED, PAPER, look, new_figure
from search_spaces.base import SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDS = ("input", "previous", "output")
SIZE = 8
"""Points: height of the letters, here without the shrinking in axes that are given."""
WIDEST = 7.4
"""Inches up to which several graphs stand beside each other."""

Edge = tuple[str, str, str]


@look()
def draw(space: SearchSpace, arch: Mapping[str, Any], ax: Axes | None = None) -> Figure:
    """Draw an architecture as `space.graphs` gives it; return the figure, which is that of `ax` if one is given.

    States have a rim, operations are grey boxes between them. Several graphs have titles.

    Raises:
        ArchError: the architecture is not of this space.

    Example:
        >>> from search_spaces import NASBench201
        >>> figure = draw(NASBench201(), NASBench201().at(15624))
        >>> sorted({text.get_text() for text in figure.axes[0].texts})
        ['1', '2', 'avg_pool_3x3', 'input', 'output']
    """
    graphs = [(title, Layout(edges)) for title, edges in space.graphs(space.check(arch)).items()]
    head = 0.3 if any(title for title, _ in graphs) else 0.0
    widths, heights = [g.size[0] for _, g in graphs], [g.size[1] + head for _, g in graphs]
    beside = sum(widths) + 0.4 * len(graphs) <= WIDEST
    x, y = 0.0, 0.0
    corners = []
    for width, height in zip(widths, heights, strict=True):
        corners.append((x if beside else (max(widths) - width) / 2, y - head))
        x, y = (x + width + 0.4, y) if beside else (x, y - height - 0.25)
    low, high = np.array([0, -max(heights) if beside else y + 0.25]), np.array([x - 0.4 if beside else max(widths), 0])
    low, high, scale = low - 0.08, high + 0.08, 1.0
    if ax is None:
        ax = new_figure(*(high - low)).add_axes((0, 0, 1, 1))
    else:
        room = np.array(ax.get_window_extent().size) / ax.figure.dpi
        scale = min(1.0, *(room / (high - low)))
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()
    for (title, graph), corner in zip(graphs, corners, strict=True):
        graph.draw(ax, np.array(corner), scale)
        if head:
            place = corner[0] + graph.size[0] / 2, corner[1] + 0.12
            style: dict[str, Any] = {"ha": "center", "weight": "bold", "parse_math": False}
            ax.text(*place, title, fontsize=9 * scale, color=INK, **style)
    return ax.figure  # type: ignore[return-value]


class Layout:
    """Where the nodes of one graph stand and how its edges run, in inches; the top left corner is the origin.

    Attributes:
        texts: by node: a state is its name, an operation the number of its edge.
        lines: for every edge the control points of a Bezier spline.
    """

    def __init__(self, edges: Sequence[Edge]) -> None:
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import text_to_path
        from pygraphviz import AGraph

        self.texts: dict[str | int, str] = {}
        for i, (source, target, label) in enumerate(edges):
            self.texts |= {source: source, target: target} | ({i: label} if label else {})
        if not edges:
            self.texts["no operations"] = "no operations"
        graph, font = AGraph(directed=True, ranksep=0.35, nodesep=0.22), FontProperties(size=SIZE)
        graph.node_attr.update(shape="box", height=0.19, fixedsize=True, label="")
        graph.edge_attr.update(dir="none")
        for node, text in self.texts.items():
            width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
            graph.add_node(repr(node), width=width / 72 + 0.1)
        for i, (source, target, label) in enumerate(edges):
            if label:
                graph.add_edge(repr(source), repr(i))
            graph.add_edge(repr(i if label else source), repr(target), weight=2)  # the operation is close to its sum
        graph.add_subgraph([node for node in graph if not graph.in_degree(node)], rank="min")
        graph.layout("dot")
        _, _, width, height = map(float, graph.graph_attr["bb"].split(","))
        self.size = width / 72, height / 72

        def points(item: Any) -> np.ndarray:
            return np.array([point.split(",") for point in item.attr["pos"].split()], float) / 72 - [0, height / 72]

        self.places = {node: points(graph.get_node(repr(node)))[0] for node in self.texts}
        self.lines = [points(edge) for edge in graph.edges()]

    def draw(self, ax: Axes, corner: np.ndarray, scale: float) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        head = f"-|>,head_length={3.2 * scale},head_width={1.5 * scale}"
        line: dict[str, Any] = {"color": MUTED, "linewidth": scale, "shrinkA": 0, "shrinkB": 0, "arrowstyle": head}
        for points in self.lines:
            codes = [Path.MOVETO, *[Path.CURVE4] * (len(points) - 1)]
            ax.add_patch(FancyArrowPatch(path=Path(points + corner, codes), **line))
        for node, text in self.texts.items():
            rim = LINE if isinstance(node, int) else ACCENT if node in ENDS else MUTED
            fill, corners = (LINE, 0.3) if isinstance(node, int) else (PAPER, 0.8)
            box: dict[str, Any] = {
                "boxstyle": f"round,pad=0.35,rounding_size={corners}",
                "fc": fill,
                "ec": rim,
                "lw": 1.1 * scale,
            }
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "parse_math": False}
            x, y = self.places[node] + corner
            ax.text(x, y, text, fontsize=SIZE * scale, bbox=box, **style)
