"""Figures of searches: progress, Pareto fronts, importances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna

from nasbench.curves import draw_epochs, is_one_shot
from nasbench.result import SearchResult, Trial
from nasbench.storage import quiet
from nasbench.strategies import distributions
from nasbench.style import ACCENT, INK, MUTED, look, name_axis, new_figure, plain, short_number, word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 20
"""Distinct architectures below which importances would be chance."""
MANY = 2000
"""Dots above which they become one picture inside the SVG."""


@look()
def draw_search(result: SearchResult) -> Figure:
    """Draw a search: with one objective its values and the best so far, with several their Pareto front.

    A one-shot search whose only trial is what it chose, or which is still to choose, is drawn over its epochs
    (`draw_epochs`).

    Of several objectives the first is drawn upwards, the second to the right, the third as colour.

    Example:
        >>> from search_spaces import ResNet
        >>> space = ResNet()
        >>> trials = [Trial(i, space.at(i), "complete", {"score": float(i % 3)}, finished=i) for i in range(5)]
        >>> figure = draw_search(SearchResult(space, {"score": "maximize"}, trials))
        >>> figure.axes[0].get_ylabel()
        'score (higher is better)'
    """
    if is_one_shot(result):
        return draw_epochs(result)
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
    name_axis(axes.yaxis, name, sign)
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
        name_axis(bar.ax.yaxis, names[2], result.sign(names[2]))
    name_axis(axes.xaxis, right, result.sign(right))
    name_axis(axes.yaxis, up, result.sign(up))
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
    axes.set_yticks(range(len(shown)), [plain(decision) for decision, _ in shown], color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"share of what decides {plain(word(name))}")
    return figure
