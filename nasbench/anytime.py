"""One-shot searches side by side: how good what they would choose is, after every epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nasbench.errors import SettingError
from nasbench.result import SearchResult
from nasbench.style import MUTED, SERIES, look, new_figure, plain, save_figure, word

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Run: TypeAlias = SearchResult | Sequence[Mapping[str, Any]]
AGAINST = ("epoch", "seconds")
_DASHES = ("-", (0, (3.5, 1.2)), (0, (1, 1)))
_WORDS = {"table_value": "value in the table of the choice", "rank": "true rank of the choice"}


@look()
def plot_anytime(
    searches: Mapping[str, Run | Sequence[Run]],
    path: str | Path | None = None,
    *,
    against: str = "epoch",
    metric: str = "val_accuracy",
) -> Figure:
    """Draw how good the architecture is that one-shot searches would choose after each epoch; return the figure.

    Lines are means over the results of a name, epoch by epoch, bands their standard deviation (n - 1). A result that
    ended earlier than others keeps its last value.

    Args:
        searches: for every name the results of its searches, one a seed; instead of a result, its list of epochs.
        path: also save it there, as PNG, PDF or SVG by its ending.
        against: "epoch", or "seconds": how long the searches took until then in the mean, the scoring left out.
        metric: a number that was recorded of the choice: "val_accuracy" or "val_loss", with shared weights; where a
            table was given, "table_value" or "rank".

    Raises:
        SettingError: there is nothing to draw, or a result did not record it.

    Example:
        >>> runs = [[{"epoch": e, "val_accuracy": 1 - 0.5 ** (e + seed)} for e in (1, 2, 3)] for seed in (0, 1)]
        >>> axes = plot_anytime({"darts": runs, "spos": runs[0]}).axes[0]
        >>> [float(y) for y in axes.lines[0].get_ydata()]
        [0.625, 0.8125, 0.90625]
    """
    if against not in AGAINST:
        raise SettingError(f"against={against!r}, but it must be {' or '.join(map(repr, AGAINST))}.")
    if not isinstance(searches, Mapping) or not searches:
        raise SettingError("there is nothing to draw: give the results by name, {'darts': [result, result]}.")
    curves = {name: _mean_curve(name, runs, against, metric) for name, runs in searches.items()}
    figure = new_figure(5.6, 3.2, layout="constrained")
    axes = figure.subplots()
    unit, divisor = _unit(max(x[-1] for x, _, _ in curves.values())) if against == "seconds" else ("", 1.0)
    for i, (name, (x, mean, spread)) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "ls": _DASHES[i // len(SERIES) % len(_DASHES)]}
        axes.plot(x / divisor, mean, lw=1.8, label=plain(name), marker="o" if len(x) == 1 else "", ms=4, **style)
        if spread.any():
            axes.fill_between(x / divisor, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
    _name_axes(axes, against, unit, metric)
    figure.legend(loc="outside upper left", ncols=6, handlelength=1.6, columnspacing=1.4)
    if any(spread.any() for _, _, spread in curves.values()):
        axes.set_title("mean ± standard deviation of several searches", loc="left", fontsize=8, color=MUTED, pad=4)
    save_figure(figure, path)
    return figure


def _mean_curve(name: str, runs: Run | Sequence[Run], against: str, metric: str) -> tuple[Floats, Floats, Floats]:
    """Return epochs or mean seconds, mean and spread over these runs, from the first epoch that is known of all."""
    several: Sequence[Any] = [runs] if isinstance(runs, SearchResult) or _is_run(runs) else runs
    if not isinstance(several, Sequence) or not several:
        raise SettingError(f"there are no results of {name!r}: leave it out, or give a list of them.")
    found = []
    for number, run in enumerate(several):
        which = f"result {number} of {name!r}" if len(several) > 1 else f"the result of {name!r}"
        found.append(_curve(which, run, against, metric))
    start = max(curve[0, 0] for curve in found)
    epochs = np.unique(np.concatenate([curve[0][curve[0] >= start] for curve in found]))
    aligned = np.stack([curve[:, np.searchsorted(curve[0], epochs, side="right") - 1] for curve in found])
    _, seconds, values = aligned.swapaxes(0, 1)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(epochs))
    return epochs if against == "epoch" else seconds.mean(axis=0), values.mean(axis=0), spread


def _is_run(runs: object) -> bool:
    """Whether this is the epochs of one run, not several runs."""
    return isinstance(runs, Sequence) and bool(runs) and isinstance(runs[0], Mapping)


def _curve(which: str, run: Any, against: str, metric: str) -> Floats:
    """Return three rows: the epochs of a run that have the metric, the seconds until then, the metric."""
    epochs = run.epochs if isinstance(run, SearchResult) else run
    if isinstance(epochs, str) or not isinstance(epochs, Sequence) or not all(isinstance(e, Mapping) for e in epochs):
        raise SettingError(f"{which} is {run!r:.60}: give a SearchResult, or its list of epochs.")
    if not epochs:
        raise SettingError(
            f"{which} has no epochs: only one-shot searches record them, such as nb.search(space, data, 'darts')."
        )
    known = [e for e in epochs if isinstance(value := e.get(metric), int | float) and isfinite(value)]
    if not known:
        hint = f"they have {', '.join(epochs[-1])}"
        if metric in ("val_accuracy", "val_loss"):
            hint = "search again with the strategy's anytime on, its default"
        elif metric in _WORDS:
            hint = "search again with table="
        raise SettingError(f"the epochs of {which} have no {metric!r}: {hint}.")
    if missing := [name for name in {"epoch", against} if any(name not in e for e in known)]:
        raise SettingError(f"epochs of {which} have no {missing[0]!r}: give them as the search recorded them.")
    rows = [(e["epoch"], e.get("seconds", 0.0) - e.get("scoring_seconds", 0.0), e[metric]) for e in known]
    return np.array(rows, np.float64).T


def _unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which so many seconds are a legible number."""
    return ("seconds", 1.0) if seconds < 300 else ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _name_axes(axes: Axes, against: str, unit: str, metric: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.margins(x=0.02, y=0.06)
    if against == "epoch":
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    else:
        axes.set_xlabel(f"{unit} of the search, scoring left out")
        axes.set_xlim(left=0)
    shared = ", with shared weights" if metric in ("val_accuracy", "val_loss") else ""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_ylabel(_WORDS.get(metric, f"{word(metric)}{shared}"), parse_math=False)
    if metric.endswith("accuracy"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 2):g}%"))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.0) if metric.endswith("accuracy") else high)  # a band may reach further
    if metric == "rank":
        axes.invert_yaxis()  # the best is above
