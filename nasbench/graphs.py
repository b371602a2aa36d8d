"""Architectures as graphs: layers from top to bottom, with every operation a box of its own, so no edge needs a label.

A layered layout after Sugiyama. networkx has the layers but neither orders nor routes anything: its
`multipartite_layout` leads edges through boxes. Libraries that do are heavy (pygraphviz unpacks to 108 MB) or young.

Source: Sugiyama, Tagawa and Toda, 1981; positions as in Gansner et al., 1993, by least squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from nasbench.style import ACCENT, INK, LINE, MUTED, PAPER, look, new_figure
from search_spaces.base import SearchSpace

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDS = ("input", "previous", "output")
ROW, HALF, GAP, BEND = 0.46, 0.11, 0.14, 0.1
"""Inches: between layers, half the height of a box, between neighbours, room for a line that passes a layer."""
WIDEST = 7.4
"""Inches up to which several graphs stand beside each other."""

Edge = tuple[str, str, str]
Layers = list[list[Any]]


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
    """Where the nodes of one graph stand and how its edges run, in inches; the top left corner is the origin."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        import networkx as nx

        self.texts: dict[Any, str] = {}
        graph = nx.DiGraph()
        for i, (source, target, label) in enumerate(edges):
            self.texts |= {source: source, target: target}
            nx.add_path(graph, [source, (i, label), target] if label else [source, target])
            if label:
                self.texts[i, label] = label
        if not edges:
            graph.add_node("no operations")
            self.texts["no operations"] = "no operations"
        # An edge that closes a cycle is laid out the other way round, and drawn as it is.
        graph.remove_edges_from([(node, node) for node in self.texts])
        self.turned = set[tuple[Any, Any]]()
        while not nx.is_directed_acyclic_graph(graph):
            source, target = nx.find_cycle(graph)[-1][:2]
            graph.remove_edge(source, target)
            graph.add_edge(target, source)
            self.turned.add((target, source))
        self.routes = _in_layers(graph)
        layers = _ordered(graph)
        columns = _columns(graph, layers, self.width)
        self.places = {node: np.array([columns[node], -i * ROW - HALF]) for i, row in enumerate(layers) for node in row}
        left = min(columns[node] - self.width(node) / 2 for node in columns)
        for place in self.places.values():
            place[0] -= left
        right = max(place[0] + self.width(node) / 2 for node, place in self.places.items())
        self.size = float(right), (len(layers) - 1) * ROW + 2 * HALF

    def width(self, node: Any) -> float:
        return 0.064 * len(self.texts[node]) + 0.18 if node in self.texts else BEND

    def draw(self, ax: Axes, corner: np.ndarray, scale: float) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        head = f"-|>,head_length={3.2 * scale},head_width={1.5 * scale}"
        line: dict[str, Any] = {"color": MUTED, "linewidth": scale, "shrinkA": 0, "shrinkB": 0, "arrowstyle": head}
        for (source, target), chain in self.routes.items():
            points = self._curve(chain) + corner
            if (source, target) in self.turned:
                points = points[::-1]
            codes = [Path.MOVETO, *[Path.CURVE4] * (len(points) - 1)]
            ax.add_patch(FancyArrowPatch(path=Path(points, codes), **line))
        for node, text in self.texts.items():
            rim = LINE if isinstance(node, tuple) else ACCENT if node in ENDS else MUTED
            fill, corners = (LINE, 0.3) if isinstance(node, tuple) else (PAPER, 0.8)
            box: dict[str, Any] = {
                "boxstyle": f"round,pad=0.35,rounding_size={corners}",
                "fc": fill,
                "ec": rim,
                "lw": 1.1 * scale,
            }
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "parse_math": False}
            x, y = self.places[node] + corner
            ax.text(x, y, text, fontsize=8 * scale, bbox=box, **style)

    def _curve(self, chain: Sequence[Any]) -> np.ndarray:
        """Return control points of a smooth line from box to box through all bends, which goes down and never back."""
        from scipy.interpolate import PchipInterpolator

        points = np.array([self.places[node] for node in chain])
        points[0, 1] -= HALF
        points[-1, 1] += HALF
        slopes = PchipInterpolator(-points[:, 1], points[:, 0]).derivative()(-points[:, 1])
        thirds = np.stack([slopes, -np.ones(len(points))], axis=1)
        steps = -np.diff(points[:, 1], axis=0)[:, None] / 3
        bezier = np.stack([points[:-1] + steps * thirds[:-1], points[1:] - steps * thirds[1:], points[1:]], axis=1)
        return np.concatenate([points[:1], bezier.reshape(-1, 2)])


def _in_layers(graph: nx.DiGraph) -> dict[tuple[Any, Any], list[Any]]:
    """Give every node its layer, just above what follows it but sources on top, and every edge a bend in each between.

    Return for every edge its nodes: both ends, and the bends between them, which are nodes too.
    """
    import networkx as nx

    layers = list(nx.topological_generations(graph.reverse()))[::-1]
    layer = {node: i if graph.in_degree(node) else 0 for i, nodes in enumerate(layers) for node in nodes}
    routes = {}
    for a, b in list(graph.edges):
        routes[a, b] = [a, *((a, b, i) for i in range(layer[a] + 1, layer[b])), b]
        graph.remove_edge(a, b)
        nx.add_path(graph, routes[a, b])
        layer |= {node: layer[a] + i for i, node in enumerate(routes[a, b])}
    nx.set_node_attributes(graph, layer, "layer")
    return routes


def _ordered(graph: nx.DiGraph, starts: int = 20, sweeps: int = 8) -> Layers:
    """Return the layers, each ordered so that few edges cross: every node near the mean of its neighbours.

    The best of several starts; over 65 random cells of DARTS 1.43 crossings in the mean, with a hundred starts 1.42.
    """
    rng, nodes = Random(0), list(graph)
    count = 1 + max(graph.nodes[node]["layer"] for node in nodes)
    best: tuple[int, Layers] | None = None
    for _ in range(starts):
        layers: Layers = [[] for _ in range(count)]
        for node in nodes:
            layers[graph.nodes[node]["layer"]].append(node)
        for sweep in range(sweeps):
            down = sweep % 2 == 0
            near = graph.pred if down else graph.succ
            for i in range(1, count) if down else range(count - 2, -1, -1):
                place = {node: j for j, node in enumerate(layers[i - 1 if down else i + 1])}
                own = {node: j for j, node in enumerate(layers[i])}
                means = {n: sum(place[m] for m in near[n]) / len(near[n]) if near[n] else own[n] for n in own}
                layers[i] = sorted(own, key=means.__getitem__)
            crossings = _crossings(graph, layers)
            if best is None or crossings < best[0]:
                best = crossings, layers.copy()
            if not crossings:
                return layers
        rng.shuffle(nodes)
    assert best is not None
    return best[1]


def _crossings(graph: nx.DiGraph, layers: Layers) -> int:
    place = {node: j for nodes in layers for j, node in enumerate(nodes)}
    count = 0
    for nodes in layers:
        edges = [(place[a], place[b]) for a in nodes for b in graph.succ[a]]
        count += sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(edges) for c, d in edges[:i])
    return count


def _columns(graph: nx.DiGraph, layers: Layers, width: Any) -> dict[Any, float]:
    """Return where every node stands across: edges as upright as neighbours in a layer, who keep a gap, let them be."""
    import networkx as nx
    from scipy.optimize import lsq_linear

    nodes = [node for row in layers for node in row]
    across = nx.incidence_matrix(graph, nodes, oriented=True).toarray().T
    # A node stands at the sum of the gaps to its left, which have a lower bound; the first gap of a layer is free.
    sums, low = np.zeros((len(nodes), len(nodes))), np.full(len(nodes), -np.inf)
    place = {node: i for i, node in enumerate(nodes)}
    for row in layers:
        for j, node in enumerate(row):
            sums[place[node], place[row[0]] : place[node] + 1] = 1
            if j:
                low[place[node]] = (width(row[j - 1]) + width(node)) / 2 + GAP
    bends = [sum(isinstance(n, tuple) and len(n) == 3 for n in edge) for edge in graph.edges]
    weights = np.sqrt(1 + 3 * np.array(bends, float))[:, None]
    little = 1e-3 * sums  # the graph as a whole stands at 0
    system = np.concatenate([weights * (across @ sums), little])
    gaps = lsq_linear(system, np.zeros(len(system)), bounds=(low, np.inf)).x
    return dict(zip(nodes, (sums @ gaps).tolist(), strict=True))
