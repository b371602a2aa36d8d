"""What a one-shot search did, epoch by epoch: the weights of its options, the rank of its choice, its losses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, groupby
from math import isfinite
from typing import TYPE_CHECKING, Any

from nasbench.result import SearchResult
from nasbench.style import ACCENT, COLOURS, INK, MUTED, SERIES, look, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Epochs = Sequence[Mapping[str, Any]]
DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 1)))


def is_one_shot(result: SearchResult) -> bool:
    """Whether there are epochs, and a single trial, of which a plot would say nothing."""
    return bool(result.epochs) and len(result.complete) == 1


@look()
def draw_epochs(result: SearchResult) -> Figure:
    """Draw a one-shot search over its epochs: one small panel a site with the probability of every option.

    The option that leads in the end is drawn thicker. Below, as far as they are known: the true rank of the
    architecture that each epoch would have chosen, the losses, the largest eigenvalue.

    Example:
        >>> from search_spaces import NASBench201
        >>> space = NASBench201()
        >>> result = SearchResult(space, {"val_accuracy": "maximize"}, [])
        >>> result.epochs = [{"epoch": 1, "probabilities": {site: [0.2] * 5 for site in space.sites}}]
        >>> [axes.get_title(loc="left") for axes in draw_epochs(result).axes]
        ['e01', 'e02', 'e12', 'e03', 'e13', 'e23']
    """
    epochs = result.epochs
    sites = [s for s in result.space.sites if any(s in (e.get("probabilities") or {}) for e in epochs)]
    groups = _groups(sites)
    below = [draw for name, draw in _BELOW.items() if any(e.get(name) is not None for e in epochs)]
    most = max((len(members) for members in groups.values()), default=0)
    columns = 3 if most <= 6 else 4 if most <= 12 else 7
    width = 5.6 if columns == 3 else 7.4
    heights = [1.0 * -(-len(members) // columns) + 0.3 * bool(name) for name, members in groups.items()]
    options = list(dict.fromkeys(str(option) for site in sites for option in result.space.sites[site]))
    styles = dict(zip(options, _styles(options), strict=True))
    rows = _legend_rows(options, width)
    heights = [0.25 * rows + 0.05] * bool(sites) + heights + [1.9] * bool(below)
    if not heights:
        heights = [1.0]
    figure = new_figure(width, sum(heights), layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if sites:
        _legend(next(parts), styles, rows)
    known = (p for e in epochs for s in sites for p in (e.get("probabilities") or {}).get(s, ()) if isfinite(p))
    top = min(1.04, 1.08 * max(known, default=1.0))
    for name, members in groups.items():
        part = next(parts)
        _panels(part, name, members, columns, epochs, result, styles, top)
    if below:
        part = next(parts)
        for draw, axes in zip(below, part.subplots(1, len(below), squeeze=False)[0], strict=True):
            draw(axes, epochs)
            _name_epochs(axes, epochs)
            axes.set_xlabel("epoch")
    elif sites:
        part.supxlabel("epoch", fontsize=8.5)
    else:
        next(parts).text(0.5, 0.5, "no epoch finished", ha="center", color=MUTED)
    return figure


def _groups(sites: Sequence[str]) -> dict[str, list[str]]:
    """Return the sites of each kind of cell, where all names begin with one: normal_0_2, reduction_0_2, ..."""
    found = {name: list(members) for name, members in groupby(sites, lambda site: site.partition("_")[0])}
    several = 1 < len(found) <= 4 and sum(map(len, found.values())) == len(sites) and min(map(len, found.values())) > 3
    return found if several else {"": list(sites)} if sites else {}


def _styles(options: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield colour and dashes of every option; what does nothing is grey, a skip as dark as text."""
    number = count()
    for option in options:
        if option in ("none", "None"):
            yield {"color": MUTED, "linestyle": "-"}
        elif option == "skip_connect":
            yield {"color": INK, "linestyle": "-"}
        else:
            i = next(number)
            yield {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i // len(SERIES) % len(DASHES)]}


def _legend_rows(options: Sequence[str], width: float) -> int:
    column = 0.5 + 0.062 * max(map(len, options), default=1)
    return -(-len(options) // max(1, int(width / column)))


def _legend(part: SubFigure, styles: Mapping[str, Any], rows: int) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], lw=1.8, label=plain(option), **style) for option, style in styles.items()]
    part.legend(handles=lines, loc="center left", ncols=-(-len(lines) // rows), handlelength=1.6, columnspacing=1.2)


def _panels(
    part: SubFigure,
    name: str,
    sites: Sequence[str],
    columns: int,
    epochs: Epochs,
    result: SearchResult,
    styles: Mapping[str, Mapping[str, Any]],
    top: float,
) -> None:
    """Draw one small panel for every site; all have the same axes, so those at the left and below have numbers."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = min(columns, len(sites))
    rows = -(-len(sites) // columns)
    grid = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    if name:
        part.suptitle(f"{plain(name)} cell", x=0.01, ha="left", fontsize=9, weight="bold")
    for axes in grid.flat[len(sites) :]:
        axes.remove()
        grid[-2, axes.get_subplotspec().colspan.start].tick_params(labelbottom=True)
    for axes, site in zip(grid.flat, sites, strict=False):
        known = [e for e in epochs if site in (e.get("probabilities") or {})]
        x, last = [e["epoch"] for e in known], known[-1]["probabilities"][site]
        for i, option in enumerate(result.space.sites[site]):
            y = [e["probabilities"][site][i] for e in known]
            leads = last[i] == max(last)
            style = {"lw": 2.0 if leads else 1.1, "zorder": 3 if leads else 2, **styles[str(option)]}
            axes.plot(x, y, marker="o" if len(x) == 1 else "", ms=3, **style)
        short = re.sub(r"^(\d+)_(\d+)$", r"\1 → \2", site.removeprefix(f"{name}_"))
        axes.set_title(plain(short), loc="left", fontsize=8, pad=2, color=INK)
        axes.set_ylim(0, top)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=2, steps=[1, 2, 5]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.tick_params(labelsize=7)
        _name_epochs(axes, epochs)


def _name_epochs(axes: Axes, epochs: Epochs) -> None:
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    axes.set_xticks(sorted({first, last} if last - first < 4 else {first, (first + last) // 2, last}))
    axes.set_xlim(first - 0.03 * (last - first) - 0.01, last + 0.03 * (last - first) + 0.01)


def _known(epochs: Epochs, name: str) -> tuple[list[int], list[float]]:
    known = [e for e in epochs if e.get(name) is not None]
    return [e["epoch"] for e in known], [e[name] for e in known]


def _rank(axes: Axes, epochs: Epochs) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    x, y = _known(epochs, "rank")
    of = next((e["rank_of"] for e in epochs if e.get("rank_of")), None)
    axes.set_yscale("log")
    axes.plot(x, y, drawstyle="steps-mid", color=ACCENT, lw=1.4, alpha=0.6)
    axes.plot(x[-1:], y[-1:], "o", color=ACCENT, ms=5)
    late: dict[str, Any] = {"ha": "right", "va": "bottom"}
    axes.annotate(f"{y[-1]:,}", (x[-1], y[-1]), (-4, 5), textcoords="offset points", color=ACCENT, **late)
    axes.set_ylim(max(10, *y) * 1.6, 0.6)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_tick_params(which="minor", size=0)
    axes.set_title(f"true rank of the choice{f', of {of:,}' if of else ''}", loc="left", fontsize=8.5, pad=4)


def _losses(axes: Axes, epochs: Epochs) -> None:
    for name, label, colour in (("train_loss", "weights", INK), ("arch_loss", "architecture", ACCENT)):
        x, y = _known(epochs, name)
        if y:
            axes.plot(x, y, color=colour, lw=1.6, label=label, marker="o" if len(x) == 1 else "", ms=4)
    axes.set_title("training loss", loc="left", fontsize=8.5, pad=4)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", handlelength=1.4)


def _eigenvalue(axes: Axes, epochs: Epochs) -> None:
    x, y = _known(epochs, "eigenvalue")
    axes.plot(x, y, color=COLOURS["purple"][0], lw=1.6, marker="o" if len(x) == 1 else "", ms=4)
    axes.set_title("largest eigenvalue", loc="left", fontsize=8.5, pad=4)


_BELOW = {"rank": _rank, "train_loss": _losses, "eigenvalue": _eigenvalue}
