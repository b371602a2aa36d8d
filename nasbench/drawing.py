"""Figures of searches and graphs of architectures, in one look.

Nothing here depends on the clock: the same result gives the same picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from nasbench.result import SearchResult, Trial
from nasbench.storage import quiet
from nasbench.strategies import distributions
from search_spaces.base import SearchSpace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, LINE, ACCENT, PAPER = "#1c2530", "#6c7887", "#e4e8ed", "#2f6bde", "#ffffff"
COLOURS = {  # name on the page: by day, by night
    "ink": (INK, "#e7ebf1"),
    "muted": (MUTED, "#98a4b4"),
    "line": (LINE, "#2c3541"),
    "accent": (ACCENT, "#7fabff"),
    "paper": (PAPER, "#12161c"),
}
_WORDS = {
    "val_accuracy": "validation accuracy",
    "val_loss": "validation loss",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "params": "parameters",
    "macs": "multiply-adds",
    "bytes": "size (bytes)",
    "peak_bytes": "peak activations (bytes)",
    "latency_ms": "latency (ms)",
    "seconds": "time (s)",
}
ENOUGH = 20
"""Distinct architectures below which importances would be chance."""
MANY = 2000
"""Dots above which they become one picture inside the SVG."""


# Figures -----------------------------------------------------------------------------------------------------------


@contextmanager
def look() -> Iterator[None]:
    """Draw in the house's style, whatever the user's own style is; nothing of it stays."""
    import matplotlib

    style: dict[Any, Any] = {
        "font.size": 8.5,
        "text.color": INK,
        "figure.facecolor": PAPER,
        "savefig.facecolor": "auto",
        "axes.facecolor": "none",
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "axes.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.labelcolor": MUTED,
        "svg.fonttype": "none",
        "svg.hashsalt": "nasbench",
    }
    with matplotlib.rc_context(style):
        yield


@cache
def _chart() -> type[Figure]:
    from matplotlib.figure import Figure

    class Chart(Figure):
        """A figure that shows itself in a notebook even where pyplot was never imported."""

        def _repr_png_(self) -> tuple[bytes, dict[str, float]]:
            data = BytesIO()
            self.savefig(data, format="png", dpi=200)
            width, height = self.get_size_inches()
            return data.getvalue(), {"width": 100 * width, "height": 100 * height}

    return Chart


def new_figure(width: float, height: float, **settings: Any) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _chart()(figsize=(width, height), **settings)
    FigureCanvasAgg(figure)
    return figure


@look()
def draw_search(result: SearchResult) -> Figure:
    """Draw a search: with one objective its values and the best so far, with several their Pareto front.

    Of several objectives the first is drawn upwards, the second to the right, the third as colour.

    Example:
        >>> from search_spaces import ResNet
        >>> space = ResNet()
        >>> trials = [Trial(i, space.at(i), "complete", {"score": float(i % 3)}, finished=i) for i in range(5)]
        >>> figure = draw_search(SearchResult(space, {"score": "maximize"}, trials))
        >>> figure.axes[0].get_ylabel()
        'score (higher is better)'
    """
    names = list(result.objectives)
    return draw_progress(result, names[0]) if len(names) == 1 else draw_front(result, names)


def draw_progress(result: SearchResult, name: str) -> Figure:
    """Draw every trial's value over the order of completion, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(5.6, 3.0, layout="constrained")
    axes = figure.subplots()
    sign = result.sign(name)
    done = sorted(result.trials, key=lambda t: (t.finished, t.number))
    place = {t.number: i for i, t in enumerate(done, start=1)}
    complete = [t for t in done if t.state == "complete"]
    scores = {t.number: sign * t.metrics[name] for t in complete}  # higher is better

    def dots(trials: Sequence[Trial], label: str, **style: Any) -> None:
        if trials:
            x, y = [place[t.number] for t in trials], [sign * max(scores[t.number], floor) for t in trials]
            axes.scatter(x, y, alpha=0.55, label=label, rasterized=len(done) > MANY, **style)

    if complete:
        # A few hopeless trials shall not flatten all others: the scale ends a bit below the better nine tenths.
        top, tenth = max(scores.values()), float(np.quantile(list(scores.values()), 0.1))
        floor = max(min(scores.values()), tenth - (top - tenth))
        shown = [t for t in complete if scores[t.number] >= floor]
        new = {"color": MUTED, "linewidths": 0, "s": 16}
        dots([t for t in shown if t.copied_from is None], "trial", **new)
        copy = {"facecolors": "none", "edgecolors": MUTED, "s": 16}
        dots([t for t in shown if t.copied_from is not None], "copied", **copy)
        worse = [t for t in complete if scores[t.number] < floor]
        dots(worse, "off the scale", marker="v" if sign > 0 else "^", **new)
        best = np.maximum.accumulate(list(scores.values()))
        x = [place[number] for number in scores]
        axes.step(
            [*x, len(done)], sign * np.array([*best, top]), where="post", color=ACCENT, lw=1.8, label="best so far"
        )
        peak = x[int(np.argmax(best))], sign * top
        axes.plot(*peak, "o", color=ACCENT, ms=5)
        above = (0, 5) if sign > 0 else (0, -12)
        axes.annotate(short_number(peak[1]), peak, above, textcoords="offset points", color=ACCENT, ha="center")
        margin = 0.08 * (top - floor) or 0.1 * abs(top) or 1.0
        axes.set_ylim(*sorted((sign * (floor - margin), sign * (top + 2 * margin))))
    else:
        axes.text(0.5, 0.5, "no trial completed", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_yticks([])
    for state, marker in (("pruned", "|"), ("failed", "x")):
        if at := [place[t.number] for t in done if t.state == state]:
            foot = axes.get_xaxis_transform()
            axes.plot(at, [0.03] * len(at), marker, color=MUTED, ms=5, mew=0.9, label=state, transform=foot)
    edge = max(0.5, 0.012 * len(done))
    axes.set_xlim(1 - edge, max(len(done), 1) + edge)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_xlabel("finished trials")
    _name_axis(axes.yaxis, name, sign)
    if done:
        figure.legend(loc="outside upper left", ncols=6, handletextpad=0.3, columnspacing=1.2)
    return figure


def draw_front(result: SearchResult, names: Sequence[str]) -> Figure:
    """Draw the trials that no other beats in these metrics, and faintly all others."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    figure = new_figure(5.6, 3.5, layout="constrained")
    axes = figure.subplots()
    up, right = names[:2]
    front = sorted(result.pareto(*names), key=lambda t: (t.metrics[right], t.metrics[up]))
    chosen = {t.number for t in front}
    rest = [t for t in result.complete if t.number not in chosen and up in t.metrics and right in t.metrics]
    x, y = [t.metrics[right] for t in front], [t.metrics[up] for t in front]
    if rest:
        others = [t.metrics[right] for t in rest], [t.metrics[up] for t in rest]
        axes.scatter(
            *others, s=14, color=MUTED, alpha=0.35, linewidths=0, label="dominated", rasterized=len(rest) > MANY
        )
    if not front:
        axes.text(0.5, 0.5, "no trial completed", transform=axes.transAxes, ha="center", color=MUTED)
    elif len(names) == 2:
        # Towards the right more is given up, or less: the front holds up to the next point, or from the one before.
        axes.step(x, y, where="post" if result.sign(right) < 0 else "pre", color=ACCENT, lw=1.4, alpha=0.6)
        axes.scatter(x, y, s=30, color=ACCENT, linewidths=0, zorder=3, label="Pareto front")
    else:
        values = [t.metrics[names[2]] for t in front]
        seen_by_day_and_night = ListedColormap(colormaps["viridis"](np.linspace(0.25, 0.92, 200)))
        dots = axes.scatter(x, y, s=36, c=values, cmap=seen_by_day_and_night, zorder=3, label="Pareto front")
        bar = figure.colorbar(dots, ax=axes, pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        _name_axis(bar.ax.yaxis, names[2], result.sign(names[2]))
    _name_axis(axes.xaxis, right, result.sign(right))
    _name_axis(axes.yaxis, up, result.sign(up))
    axes.margins(0.06)
    if front:
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.4)
    return figure


@look()
def draw_importances(result: SearchResult) -> Figure | None:
    """Draw how much each decision matters for the first objective; None where too few trials could tell.

    Mean decrease in impurity of a seeded random forest that is fitted to the complete trials. Optuna's default,
    PED-ANOVA, takes samples to be spread evenly, which those of a search are not: over six searches of 100 trials by
    evolution in the NAS-Bench-201 table its shares rank like the whole table's with correlation -0.1, these with 0.8.

    Source: Breiman et al., Classification and Regression Trees, 1984; as in `optuna.importance`.
    """
    from matplotlib.ticker import PercentFormatter
    from optuna.importance import MeanDecreaseImpurityImportanceEvaluator, get_param_importances

    name, direction = next(iter(result.objectives.items()))
    values = {t.arch: t.metrics[name] for t in result.complete}
    if len(values) < ENOUGH or len(set(values.values())) == 1:
        return None
    kinds = distributions(result.space)
    trials = [
        optuna.trial.create_trial(params=dict(arch), distributions=kinds, value=value) for arch, value in values.items()
    ]
    with quiet():
        study = optuna.create_study(direction="maximize" if direction == "maximize" else "minimize")
        study.add_trials(trials)
        try:
            shares = get_param_importances(study, evaluator=MeanDecreaseImpurityImportanceEvaluator(seed=0))
        except (ValueError, RuntimeError):
            return None
    shown = list(shares.items())[:15]
    if len(shown) < len(shares):
        shown.append((f"{len(shares) - 15} others", sum(list(shares.values())[15:])))
    figure = new_figure(5.6, 0.7 + 0.24 * len(shown), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(shown)), [share for _, share in shown], color=ACCENT, height=0.6)
    axes.bar_label(bars, [f"{share:.0%}" for _, share in shown], padding=4, color=MUTED)
    axes.set_yticks(range(len(shown)), [_plain(decision) for decision, _ in shown], color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"share of what decides {_plain(word(name))}")
    return figure


def _name_axis(axis: Axis, name: str, sign: float) -> None:
    """Label an axis with words and unit; large numbers as 20k or 1.5M."""
    from matplotlib.ticker import EngFormatter

    better = "higher is better" if sign > 0 else "lower is better"
    axis.set_label_text(_WORDS.get(name, f"{name} ({better})"), parse_math=False)
    if max(map(abs, axis.get_view_interval())) >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=""))


def _plain(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


# Architectures -----------------------------------------------------------------------------------------------------


@look()
def draw_arch(space: SearchSpace, arch: Mapping[str, Any], ax: Axes | None = None) -> Figure:
    """Draw an architecture as `space.graph` gives it; return the figure, which is that of `ax` if one is given.

    Nodes stand in topological layers: side by side where edges have labels, else one below the other.

    Raises:
        ArchError: the architecture is not of this space.

    Example:
        >>> from search_spaces import NASBench201
        >>> figure = draw_arch(NASBench201(), NASBench201().at(15624))
        >>> sorted({text.get_text() for text in figure.axes[0].texts} - {""})
        ['1', '2', 'avg_pool_3x3', 'input', 'output']
    """
    edges = space.graph(space.check(arch))
    places = _places(edges) or {"no operations": np.zeros(2)}
    boxes = {node: _box(place, node, pad=0.09) for node, place in places.items()}
    routes = _routes(edges, places, dict(boxes))
    everything = np.array([*boxes.values(), *(box for _, _, box in routes)])
    low, high = everything[:, :2].min(axis=0), everything[:, 2:].max(axis=0)
    for curve, _, _ in routes:
        low, high = np.minimum(low, curve.min(axis=0)), np.maximum(high, curve.max(axis=0))
    low, high = low - 0.1, high + 0.1
    if ax is None:
        figure = new_figure(*(high - low))
        ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()

    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "parse_math": False}
    frame = {"boxstyle": "round,pad=0.5", "facecolor": PAPER, "linewidth": 1.2}
    texts = {}
    for node, (x, y) in places.items():
        edge = ACCENT if node in ("input", "output") else MUTED
        texts[node] = ax.text(x, y, node, fontsize=9, bbox=frame | {"edgecolor": edge}, **style)
    for (source, target, label), (_, bend, box) in zip(edges, routes, strict=True):
        arrow = {
            "arrowstyle": "-|>,head_length=0.45,head_width=0.18",
            "connectionstyle": f"arc3,rad={bend}",
            "patchA": texts[source].get_bbox_patch(),
            "patchB": texts[target].get_bbox_patch(),
            "shrinkA": 0,
            "shrinkB": 1,
            "color": MUTED,
            "linewidth": 1.1,
        }
        ax.annotate("", tuple(places[target]), tuple(places[source]), arrowprops=arrow)
        if label:
            x, y = (box[:2] + box[2:]) / 2
            ax.text(x, y, label, fontsize=8, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}, **style)
    return ax.figure  # type: ignore[return-value]


Graph = Sequence[tuple[str, str, str]]
Route = tuple[np.ndarray, float, np.ndarray]
"""The points of an arrow, how much it bends, and the box of its label."""


def _places(edges: Graph) -> dict[str, np.ndarray]:
    """Return where every node stands, in inches."""
    import networkx as nx

    graph = nx.DiGraph([(source, target) for source, target, _ in edges])
    if not nx.is_directed_acyclic_graph(graph):
        return {node: place * len(graph) / 3 for node, place in nx.circular_layout(graph).items()}
    layers = list(nx.topological_generations(graph))
    longest = max((len(label) for *_, label in edges), default=0)
    gap = 0.35 + 0.066 * longest  # room for a label and the head of its arrow
    beside = 0.95 if longest else 0.5 + 0.08 * max(map(len, graph), default=0)
    places, x = {}, 0.0
    for i, layer in enumerate(layers):
        half = 0.036 * max(map(len, layer)) + 0.09
        x += half
        for j, node in enumerate(layer):
            offset = (j - (len(layer) - 1) / 2) * beside
            places[node] = np.array([x, -offset] if longest else [offset, -0.5 * i])
        x += half + gap
    return places


def _box(middle: np.ndarray, text: str, pad: float) -> np.ndarray:
    """Return left, bottom, right and top of a text, in inches."""
    half = np.array([0.036 * len(text) + pad, 0.07 + pad])
    return np.concatenate([middle - half, middle + half])


def _routes(edges: Graph, places: Mapping[str, np.ndarray], boxes: dict[str, np.ndarray]) -> list[Route]:
    """Choose for every edge how to bend: as little as it can without meeting nodes, labels or other arrows.

    The shortest edge chooses first.
    """
    t = np.linspace(0, 1, 41)[:, None]
    found: dict[int, Route] = {}
    for i in sorted(range(len(edges)), key=lambda i: float(np.linalg.norm(places[edges[i][1]] - places[edges[i][0]]))):
        source, target, label = edges[i]
        a, b = places[source], places[target]
        options: list[tuple[float, Route]] = []
        for bend in (0, -0.25, 0.25, -0.4, 0.4, -0.55, 0.55, -0.7, 0.7, -0.9, 0.9):
            control = (a + b) / 2 + bend * np.array([b[1] - a[1], a[0] - b[0]])  # as matplotlib's arc3
            curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * control + t**2 * b
            met = {name for name, box in boxes.items() if _inside(curve, box).any()} - {source, target}
            crossed = sum(_touch(other, curve) for other, _, _ in found.values())
            cost = 100 * len(met & places.keys()) + 10 * len(met) + crossed + 0.1 * abs(bend)
            outside = ~(_inside(curve, boxes[source]) | _inside(curve, boxes[target]))
            seen = curve[outside] if outside.any() else curve
            for place in (0.5, 0.25, 0.75):
                box = _box(seen[int(place * len(seen))], label or "-", pad=0.04)
                clash = 100 * sum(_overlap(box, other) for other in boxes.values())
                clash += 10 * sum(int(_inside(other, box).any()) for other, _, _ in found.values())
                options.append((cost + clash + abs(place - 0.5), (curve, bend, box)))
        _, found[i] = min(options, key=lambda option: option[0])
        boxes[f"label of {i}"] = found[i][2]
    return [found[i] for i in range(len(edges))]


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[:2] < other[2:]).all() and (other[:2] < one[2:]).all())


def _inside(curve: np.ndarray, box: np.ndarray) -> np.ndarray:
    return np.asarray(((curve > box[:2]) & (curve < box[2:])).all(axis=1))


def _touch(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrows come close to each other anywhere but near their ends."""
    distances = np.linalg.norm(one[6:-6, None] - other[None, 6:-6], axis=2)
    return bool(distances.min() < 0.1)


def word(name: str) -> str:
    return _WORDS.get(name, name)


def short_number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"
