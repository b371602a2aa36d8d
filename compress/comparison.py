"""Several compressed models in one table and one figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressionError
from compress.reporting import Report, conditions
from compress.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = {  # heading: number, how it is written
    "params": ("params", ","),
    "weights": ("weights", ","),
    "non-zeros": ("nonzeros", ","),
    "macs": ("macs", ","),
    "bytes": ("bytes", ","),
    "bits a weight": ("bits_per_weight", ".3g"),
    "latency ms": ("latency_ms", ".3g"),
    "within": ("latency_iqr_ms", ".2g"),
    "difference": ("max_difference", ".3g"),
    "val_accuracy": ("val_accuracy", ".4f"),
}
_PLACES = [(0, 8), (0, -8), (6, 8), (-6, 8), (6, -8), (-6, -8), (6, 0), (-6, 0)]
_PLACES += [(x, y) for far in range(18, 100, 10) for x in (0, far, -far) for y in (far, -far)]
"""Where a label may be, in points from its own: the first that is free. A line leads to those far away."""
_LONGEST = 32  # letters of a label; of a longer name the middle is left out


@dataclass(frozen=True)
class Comparison:
    """What several models are, as their files have them; made by `report`. Prints as a table.

    Attributes:
        reports: of each model by name, the first of "baseline" if one was given.
    """

    reports: Mapping[str, Report]

    def to_dict(self) -> dict[str, dict[str, int | float | str]]:
        """Return the numbers of every model by name."""
        return {name: found.to_dict() for name, found in self.reports.items()}

    def __str__(self) -> str:
        numbers = self.to_dict()
        shown = {title: how for title, how in _COLUMNS.items() if any(how[0] in row for row in numbers.values())}
        rows = [["", *shown, "runtime"]]
        for name, row in numbers.items():
            texts = [format(row[key], form) if key in row else "" for key, form in shown.values()]
            rows.append([name, *texts, str(row["runtime"])])
        lines = [aligned(rows)]
        if "difference" in shown:
            lines.append("difference: the largest of an output from the baseline's")
        lines += dict.fromkeys(
            conditions(found.latency, found.runtime) for found in self.reports.values() if found.latency
        )
        notes: dict[str, list[str]] = {}
        for name, found in self.reports.items():
            if found.note:
                notes.setdefault(found.note, []).append(name)
        return "\n".join([*lines, *(f"{', '.join(names)}: {note}" for note, names in notes.items())])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw accuracy over bytes, and over latency if it was measured; return the figure.

        Where no data were given, the largest difference of an output stands for the accuracy.

        Args:
            path: the picture to write, as PNG, PDF or SVG by its ending.

        Raises:
            CompressionError: there was neither data nor a baseline.
            OSError: the file cannot be written.
        """
        from nasbench.style import look, new_figure, save_figure

        key = "val_accuracy"
        points = {name: row for name, row in self.to_dict().items() if key in row}
        if not points:
            key = "max_difference"
            points = {name: row | {key: row.get(key, 0.0)} for name, row in self.to_dict().items()}
            if not any(found.max_difference is not None for found in self.reports.values()):
                raise CompressionError(
                    "a plot is of accuracy, or of differences of outputs, over size: give compress.report data=, or "
                    "baseline= and example=."
                )
        timed = all("latency_ms" in row for row in points.values())
        with look():
            figure = new_figure(4.4 if not timed else 8.2, 3.4, layout="constrained")
            panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
            for axes, name in zip(panels, ("bytes", "latency_ms"), strict=False):
                _draw(axes, points, name, key)
            if len({found.runtime for found in self.reports.values()}) > 1:
                figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
            for axes, name in zip(panels, ("bytes", "latency_ms"), strict=False):
                _label(axes, {own: (float(row[name]), float(row[key])) for own, row in points.items()})
            save_figure(figure, path)
        return figure


def _draw(axes: Axes, points: Mapping[str, Mapping[str, Any]], name: str, key: str) -> None:
    """Draw the models as points, with their spread where it is a time."""
    from nasbench.style import SERIES, name_axis

    for runtime, colour in zip(("torch", "onnxruntime"), SERIES, strict=False):
        rows = [row for row in points.values() if row["runtime"] == runtime]
        if rows:
            x, y = [row[name] for row in rows], [row[key] for row in rows]
            axes.scatter(x, y, s=28, color=colour, linewidths=0, label=f"run by {runtime}", zorder=3)
            if name == "latency_ms":
                half = [row["latency_iqr_ms"] / 2 for row in rows]
                axes.errorbar(x, y, xerr=half, fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
    axes.margins(0.12, 0.1)
    axes.set_xlim(left=0)
    name_axis(axes.xaxis, name, -1)
    if name == "bytes":
        name_axis(axes.yaxis, key, 1)
        if key == "max_difference":
            axes.set_ylabel("largest difference of an output")


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names beside the points, each where it covers nothing."""
    from matplotlib.transforms import Bbox

    from nasbench.style import MUTED, plain

    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed from here on shall stay where it is
    inside = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform([*points.values()])]
    for name, point in points.items():
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7.5, "color": MUTED}
        if len(name) > _LONGEST:
            name = f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 :]}"
        for place in _PLACES:
            side = {-1: "right", 0: "center", 1: "left"}[(place[0] > 0) - (place[0] < 0)]
            text = axes.annotate(plain(name), point, place, ha=side, **style)
            box = text.get_window_extent()
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if place == _PLACES[-1] or (fits and not box.count_overlaps(taken)):
                taken.append(box)
                if max(map(abs, place)) > 10:
                    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 5, "shrinkB": 3}
                    axes.annotate("", point, place, textcoords="offset points", arrowprops=line)
                break
            text.remove()
