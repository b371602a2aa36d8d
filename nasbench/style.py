"""The house's look: colours by day and by night, fonts, axes and numbers of every figure.

Nothing here depends on the clock: the same figure gives the same picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, LINE, ACCENT, PAPER = "#1c2530", "#6c7887", "#e4e8ed", "#2f6bde", "#ffffff"
COLOURS = {  # name on the page: by day, by night
    "ink": (INK, "#e7ebf1"),
    "muted": (MUTED, "#98a4b4"),
    "line": (LINE, "#2c3541"),
    "accent": (ACCENT, "#7fabff"),
    "paper": (PAPER, "#12161c"),
    "orange": ("#d4690b", "#ff9f4a"),
    "green": ("#1d8757", "#4fcb90"),
    "red": ("#c8324f", "#ff7d93"),
    "purple": ("#7b46cf", "#b698ff"),
    "teal": ("#0b8797", "#45cadb"),
    "gold": ("#a17c00", "#e3c24a"),
    "pink": ("#c24aa0", "#f48cd6"),
}
SERIES = [COLOURS[name][0] for name in ("accent", "orange", "green", "red", "purple", "teal", "gold", "pink")]
"""Colours of lines that are told apart by colour, in this order."""
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


def save_figure(figure: Figure, path: str | Path | None, dpi: int = 150) -> None:
    """Write a figure to a file, whole or not at all: as PNG, PDF or SVG by its ending. None: nowhere."""
    if path is not None:
        with atomic_write(target := Path(path)) as temporary:
            figure.savefig(temporary, format=target.suffix.lstrip(".") or "png", dpi=dpi)


def name_axis(axis: Axis, name: str, sign: float) -> None:
    """Label an axis with words and unit; large numbers as 20k or 1.5M."""
    from matplotlib.ticker import EngFormatter

    better = "higher is better" if sign > 0 else "lower is better"
    axis.set_label_text(_WORDS.get(name, f"{name} ({better})"), parse_math=False)
    if max(map(abs, axis.get_view_interval())) >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=""))


def plain(text: str) -> str:
    """Return text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def word(name: str) -> str:
    return _WORDS.get(name, name)


def short_number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"
