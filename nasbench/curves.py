"""What a one-shot search did, epoch by epoch: the weights of its options, the rank of its choice, its losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import count, groupby
from math import isfinite
from typing import TYPE_CHECKING, Any

from nasbench.result import SearchResult
from nasbench.style import ACCENT, COLOURS, INK, MUTED, PAPER, SERIES, look, new_figure, plain
from search_spaces.base import Choices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

Epochs = Sequence[Mapping[str, Any]]
DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 1)))
_KINDS = {"reduce": "reduction"}


def is_one_shot(result: SearchResult) -> bool:
    """Whether there are epochs, and at most one complete trial, of which a plot would say nothing."""
    return bool(result.epochs) and len(result.complete) <= 1


def known_sites(result: SearchResult, choices: Choices | None = None) -> list[str]:
    """Return the sites (default: of all) whose architecture weights were recorded, in the order of the space."""
    found = set[str]().union(*(epoch.get("probabilities") or {} for epoch in result.epochs))
    space = result.space
    return [site for site in ({**space.sites, **space.edge_sites} if choices is None else choices) if site in found]


@look()
def draw_epochs(result: SearchResult) -> Figure:
    """Draw a one-shot search over its epochs: one small panel a site with the probability of every option.

    The option that leads in the end is drawn thicker. Where edges have weights of their own, a row of panels shows
    them for each node. Below, as far as they are known: of the architecture that each epoch would have chosen the
    validation accuracy with shared weights and the true rank; the losses, the largest eigenvalue.

    Example:
        >>> from search_spaces import NASBench201
        >>> space = NASBench201()
        >>> result = SearchResult(space, {"val_accuracy": "maximize"}, [])
        >>> result.epochs = [{"epoch": 1, "probabilities": {site: [0.2] * 5 for site in space.sites}}]
        >>> [axes.get_title(loc="left") for axes in draw_epochs(result).axes]
        ['e01', 'e02', 'e12', 'e03', 'e13', 'e23']
    """
    epochs, space = result.epochs, result.space
    sites, edges = known_sites(result, space.sites), known_sites(result, space.edge_sites)
    groups = _groups(sites)
    edges_of: dict[str, list[str]] = {}
    for site in edges:
        kind = site.partition("_")[0]
        edges_of.setdefault(kind if kind in groups else "", []).append(site)
    below = [draw for name, draw in _BELOW.items() if any(e.get(name) is not None for e in epochs)]
    most = max((len(members) for members in groups.values()), default=0)
    columns = 3 if most <= 6 else 4 if most <= 12 else 7
    width = 5.6 if columns == 3 else 7.4
    # The parts of the figure from top to bottom: their heights and what draws them.
    parts: list[tuple[float, Callable[[SubFigure], object]]] = []
    if sites:
        styles = _styles(space.sites[site] for site in sites)
        rows = _legend_rows(styles, width)
        parts.append((0.25 * rows + 0.05, partial(_legend, styles=styles, rows=rows)))
        limits = _limits(_shares(epochs, sites))
        for name, members in groups.items():
            panels = partial(_panels, name=name, sites=members, columns=columns, result=result, styles=styles)
            parts.append((-(-len(members) // columns) + 0.3 * bool(name), partial(panels, limits=limits)))
            if name in edges_of:
                parts.append((1.35, partial(_edges, name=name, sites=edges_of.pop(name), result=result)))
    for name, members in edges_of.items():  # of no group
        parts.append((1.35, partial(_edges, name=name, sites=members, result=result)))
    if scored := any(e.get("val_accuracy") is not None for e in epochs):
        parts.append((1.75, partial(_draw_below, drawn=[_accuracy], epochs=epochs)))
    if below:
        parts.append((1.9, partial(_draw_below, drawn=below, epochs=epochs)))
    if not parts:
        parts.append((1.0, lambda part: part.text(0.5, 0.5, "no epoch finished", ha="center", color=MUTED)))
    heights = [height for height, _ in parts]
    figure = new_figure(width, sum(heights), layout="constrained")
    subfigures = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for subfigure, (_, draw) in zip(subfigures, parts, strict=True):
        draw(subfigure)
    if (sites or edges) and not (scored or below):
        subfigures[-1].supxlabel("epoch", fontsize=8.5)
    return figure


def _shares(epochs: Epochs, sites: Iterable[str]) -> list[float]:
    """Return all probabilities of these sites that are numbers."""
    sites = list(sites)
    return [p for e in epochs for s in sites for p in (e.get("probabilities") or {}).get(s, ()) if isfinite(p)]


def _limits(shares: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of shares: from 0, unless they all lie so near to each other that it hid how."""
    low, high = min(shares, default=0.0), max(shares, default=1.0)
    spread = max(high - low, 0.004)
    if low <= spread / 2:
        return 0.0, min(1.04, 1.08 * high) or 1.0
    middle = (low + high) / 2
    return middle - 0.58 * spread, middle + 0.58 * spread


def _groups(sites: Sequence[str]) -> dict[str, list[str]]:
    """Return the sites of each kind of cell, where all names begin with one: normal_0_2, reduction_0_2, ..."""
    found = {name: list(members) for name, members in groupby(sites, lambda site: site.partition("_")[0])}
    several = 1 < len(found) <= 4 and sum(map(len, found.values())) == len(sites) and min(map(len, found.values())) > 3
    return found if several else {"": list(sites)} if sites else {}


def _styles(choices: Iterable[Iterable[Any]]) -> dict[str, dict[str, Any]]:
    """Return colour and dashes of every option; what does nothing is grey, a skip as dark as text."""
    styles: dict[str, dict[str, Any]] = {}
    number = count()
    for option in dict.fromkeys(str(option) for options in choices for option in options):
        if option in ("none", "None"):
            styles[option] = {"color": MUTED, "linestyle": "-"}
        elif option == "skip_connect":
            styles[option] = {"color": INK, "linestyle": "-"}
        else:
            i = next(number)
            styles[option] = {
                "color": SERIES[i % len(SERIES)],
                "linestyle": DASHES[i // len(SERIES) % len(DASHES)],
            }
    return styles


def _legend_rows(options: Collection[str], width: float) -> int:
    column = 0.5 + 0.062 * max(map(len, options), default=1)
    return -(-len(options) // max(1, int(width / column)))


def _legend(part: SubFigure, styles: Mapping[str, Any], rows: int) -> None:
    lines = _samples(styles)
    part.legend(handles=lines, loc="center left", ncols=-(-len(lines) // rows), handlelength=1.6, columnspacing=1.2)


def _samples(styles: Mapping[str, Any]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], lw=1.8, label=plain(option), **style) for option, style in styles.items()]


def _panels(
    part: SubFigure,
    name: str,
    sites: Sequence[str],
    columns: int,
    result: SearchResult,
    styles: Mapping[str, Mapping[str, Any]],
    limits: tuple[float, float],
) -> None:
    """Draw one small panel for every site; all have the same axes, so those at the left and below have numbers."""
    columns = min(columns, len(sites))
    rows = -(-len(sites) // columns)
    grid = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    if name:
        part.suptitle(f"{plain(_KINDS.get(name, name))} cell", x=0.01, ha="left", fontsize=9, weight="bold")
    for axes in grid.flat[len(sites) :]:
        axes.remove()
        grid[-2, axes.get_subplotspec().colspan.start].tick_params(labelbottom=True)
    for axes, site in zip(grid.flat, sites, strict=False):
        short = re.sub(r"^(\d+)_(\d+)$", r"\1 → \2", site.removeprefix(f"{name}_"))
        _draw_site(axes, site, short, result.space.sites[site], result.epochs, styles, limits)


def _edges(part: SubFigure, name: str, sites: Sequence[str], result: SearchResult) -> None:
    """Draw a row with a panel for every node: the weight of each of its incoming edges, named by where it begins.

    A node of five edges has other shares than one of two, so every panel has its own scale.
    """
    from matplotlib.lines import Line2D

    choices = {site: result.space.edge_sites[site] for site in sites}
    styles = _styles(choices.values())
    lines = [Line2D([], [], linestyle="", label="weights of edges from state"), *_samples(styles)]
    part.legend(handles=lines, loc="outside upper left", ncols=len(lines), handlelength=1.4, columnspacing=1.0)
    for axes, (site, options) in zip(part.subplots(1, len(sites), squeeze=False)[0], choices.items(), strict=True):
        short = re.sub(r"^inputs_?(\w+)$", r"edges into \1", site.removeprefix(f"{name}_"))
        limits = _limits(_shares(result.epochs, [site]))
        _draw_site(axes, site, short, options, result.epochs, styles, limits)


def _draw_site(
    axes: Axes,
    site: str,
    title: str,
    options: Sequence[Any],
    epochs: Epochs,
    styles: Mapping[str, Mapping[str, Any]],
    limits: tuple[float, float],
) -> None:
    """Draw the probability of every option of a site."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    known = [e for e in epochs if site in (e.get("probabilities") or {})]
    x, last = [e["epoch"] for e in known], known[-1]["probabilities"][site]
    for i, option in enumerate(options):
        y = [e["probabilities"][site][i] for e in known]
        leads = last[i] == max(last)
        style = {"lw": 2.0 if leads else 1.1, "zorder": 3 if leads else 2, **styles[str(option)]}
        axes.plot(x, y, marker="o" if len(x) == 1 else "", ms=3, **style)
    axes.set_title(plain(title), loc="left", fontsize=8, pad=2, color=INK)
    axes.set_ylim(*limits)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=2, steps=[1, 2, 4, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 2):g}%"))
    axes.tick_params(labelsize=7)
    _name_epochs(axes, epochs)


def _draw_below(part: SubFigure, drawn: Sequence[Callable[[Axes, Epochs], None]], epochs: Epochs) -> None:
    for draw, axes in zip(drawn, part.subplots(1, len(drawn), squeeze=False)[0], strict=True):
        draw(axes, epochs)
        _name_epochs(axes, epochs)
        axes.set_xlabel("epoch")


def _name_epochs(axes: Axes, epochs: Epochs) -> None:
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    axes.set_xticks(sorted({first, last} if last - first < 4 else {first, (first + last) // 2, last}))
    axes.set_xlim(first - 0.03 * (last - first) - 0.01, last + 0.03 * (last - first) + 0.01)


def _known(epochs: Epochs, name: str) -> tuple[list[int], list[float]]:
    known = [e for e in epochs if e.get(name) is not None]
    return [e["epoch"] for e in known], [e[name] for e in known]


def _accuracy(axes: Axes, epochs: Epochs) -> None:
    """Draw the validation accuracy of the choice; a dot where it is another architecture than the epoch before."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    x, y = _known(epochs, "val_accuracy")
    axes.plot(x, y, color=ACCENT, lw=1.6)
    archs = [e.get("arch") for e in epochs if e.get("val_accuracy") is not None]
    changed = [i for i, arch in enumerate(archs) if i == 0 or arch != archs[i - 1]]
    axes.plot([x[i] for i in changed], [y[i] for i in changed], "o", color=ACCENT, ms=3.5, mec=PAPER, mew=0.6)
    _beside(axes, y[-1], f"{y[-1]:.1%}")
    low, high = min(y), max(y)
    spread = max(high - low, 0.01)
    axes.set_ylim(max(-0.02, low - 0.12 * spread), min(1.02, high + 0.12 * spread))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 2):g}%"))
    dots = "; dots: it changed" if len(changed) > 1 else ""
    title = f"validation accuracy of the choice, with shared weights{dots}"
    axes.set_title(title, loc="left", fontsize=8.5, pad=4)


def _beside(axes: Axes, y: float, text: str) -> None:
    """Write the last value beside the panel, at its height."""
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (1, y), (3, 0), color=ACCENT, annotation_clip=False, **where)


def _rank(axes: Axes, epochs: Epochs) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    x, y = _known(epochs, "rank")
    of = next((e["rank_of"] for e in epochs if e.get("rank_of")), None)
    axes.set_yscale("log")
    axes.plot(x, y, drawstyle="steps-mid", color=ACCENT, lw=1.4, alpha=0.6)
    axes.plot(x[-1:], y[-1:], "o", color=ACCENT, ms=5)
    _beside(axes, y[-1], f"{y[-1]:,}")
    axes.set_ylim(max(10, *y) * 1.6, 0.6)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_tick_params(which="minor", size=0)
    axes.set_title(f"true rank of the choice{f', of {of:,}' if of else ''}", loc="left", fontsize=8.5, pad=4)


def _losses(axes: Axes, epochs: Epochs) -> None:
    losses: list[float] = []
    for name, label, colour in (("train_loss", "weights", INK), ("arch_loss", "architecture", ACCENT)):
        x, y = _known(epochs, name)
        if y:
            axes.plot(x, y, color=colour, lw=1.6, label=label, marker="o" if len(x) == 1 else "", ms=4)
        losses += filter(isfinite, y)
    axes.set_title("training loss", loc="left", fontsize=8.5, pad=4)
    axes.set_ylim(0, 1.08 * max(losses, default=0.0) or 1.0)
    if len(axes.lines) > 1:
        axes.legend(loc="best", handlelength=1.4)


def _eigenvalue(axes: Axes, epochs: Epochs) -> None:
    x, y = _known(epochs, "eigenvalue")
    axes.plot(x, y, color=COLOURS["purple"][0], lw=1.6, marker="o" if len(x) == 1 else "", ms=4)
    axes.set_title("largest eigenvalue", loc="left", fontsize=8.5, pad=4)


_BELOW = {"rank": _rank, "train_loss": _losses, "eigenvalue": _eigenvalue}
