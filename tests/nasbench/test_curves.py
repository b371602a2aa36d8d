"""A one-shot search over its epochs: every site has a panel, every option its colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from nasbench.curves import draw_epochs
from nasbench.result import SearchResult
from nasbench.style import INK, MUTED
from search_spaces import Arch, NASBench201, SearchSpace

CELL = NASBench201()


@dataclass(frozen=True)
class Sites(SearchSpace):
    """Sites as they are told."""

    options: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def choices(self) -> Mapping[str, tuple[str, ...]]:
        return dict.fromkeys(self.names, self.options)

    def build(self, arch: Arch) -> nn.Module:
        return nn.Identity()


TWO_CELLS = Sites(
    ("none", "skip_connect", *(f"op{i}" for i in range(6))),
    tuple(f"{kind}_{i}_{j}" for kind in ("normal", "reduce") for j in range(2, 6) for i in range(j)),
)


def searched(space: SearchSpace, count: int = 4, **more: Any) -> SearchResult:
    """Epochs in which the last option of every site rises from an equal share."""
    epochs = []
    for epoch in range(1, count + 1):
        shares = {}
        for site, options in space.sites.items():
            others = (1 - epoch / (count + 1)) / len(options)
            shares[site] = [others] * (len(options) - 1) + [1 - others * (len(options) - 1)]
        epochs.append({"epoch": epoch, "probabilities": shares} | {k: v[epoch - 1] for k, v in more.items()})
    return SearchResult(space, {"val_accuracy": "maximize"}, [], epochs=epochs)


def titled(figure: Figure) -> dict[str, Axes]:
    figure.canvas.draw()
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_every_site_has_a_panel_with_a_line_for_every_option() -> None:
    panels = titled(draw_epochs(searched(CELL)))
    assert list(panels) == list(CELL.sites)
    for axes in panels.values():
        assert len(axes.lines) == 5
        assert list(axes.lines[4].get_xdata()) == [1, 2, 3, 4]
        assert list(axes.lines[4].get_ydata()) == pytest.approx([0.36, 0.52, 0.68, 0.84])  # 1 - 4/5 (1 - e/5)
        assert max(line.get_linewidth() for line in axes.lines[:4]) < axes.lines[4].get_linewidth()
        assert axes.get_ylim() == pytest.approx((0, 1.08 * 0.84))


def test_an_option_has_one_colour_in_all_panels_and_in_the_legend() -> None:
    figure = draw_epochs(searched(CELL))
    colours = [[to_hex(line.get_color()) for line in axes.lines] for axes in titled(figure).values()]
    assert len({tuple(row) for row in colours}) == 1
    assert len(set(colours[0])) == 5
    (legend,) = figure.subfigs[0].legends
    names = {
        text.get_text(): to_hex(h.get_color()) for text, h in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert names == dict(zip(CELL.sites["e01"], colours[0], strict=True))
    assert names["none"] == MUTED
    assert names["skip_connect"] == INK


def test_two_kinds_of_cells_are_two_blocks() -> None:
    figure = draw_epochs(searched(TWO_CELLS))
    assert [part.get_suptitle() for part in figure.subfigs] == ["", "normal cell", "reduce cell"]
    for part in figure.subfigs[1:]:
        assert [axes.get_title(loc="left") for axes in part.axes][:3] == ["0 → 2", "1 → 2", "0 → 3"]
        assert len(part.axes) == 14
        figure.canvas.draw()
        found = [axes.get_tightbbox() for axes in part.axes]
        assert not [1 for i, a in enumerate(found) for b in found[:i] if a and b and a.padded(-1).overlaps(b)]


def test_more_options_than_colours_differ_in_dashes() -> None:
    space = Sites(tuple(f"op{i}" for i in range(12)), ("a", "b"))
    axes = draw_epochs(searched(space)).axes[0]
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in axes.lines}) == 12


def test_rank_losses_and_eigenvalue_are_drawn_where_they_are_known() -> None:
    losses = {"train_loss": [2.0, 1.5, 1.2, 1.0], "arch_loss": [None] * 4, "eigenvalue": [None] * 4}
    ranks = {"rank": [9000, None, 30, 1], "rank_of": [15625] * 4}
    panels = titled(draw_epochs(searched(CELL, **losses, **ranks)))
    assert list(panels)[6:] == ["true rank of the choice, of 15,625", "training loss"]
    rank, loss = list(panels.values())[6:]
    assert (rank.get_yscale(), rank.get_xlabel()) == ("log", "epoch")
    assert list(rank.lines[0].get_ydata()) == [9000, 30, 1]
    bottom, top = rank.get_ylim()
    assert bottom > 9000
    assert 0 < top < 1
    assert [text.get_text() for text in rank.texts] == ["1"]
    assert [line.get_label() for line in loss.lines] == ["weights"]
    losses |= {"arch_loss": [2.0] * 4, "eigenvalue": [0.1, 0.2, 0.3, 0.4]}
    panels = titled(draw_epochs(searched(CELL, **losses)))
    assert list(panels)[6:] == ["training loss", "largest eigenvalue"]
    assert len(panels["training loss"].lines) == 2


@pytest.mark.parametrize("count", [1, 2, 50])
def test_any_number_of_epochs_is_drawn(count: int) -> None:
    figure = draw_epochs(searched(CELL, count, rank=[5] * count))
    figure.canvas.draw()
    ticks = figure.axes[0].get_xticks()
    assert (ticks[0], ticks[-1]) == (1, count)


def test_a_search_without_epochs_says_so() -> None:
    figure = draw_epochs(SearchResult(CELL, {"val_accuracy": "maximize"}, []))
    assert [text.get_text() for part in figure.subfigs for text in part.texts] == ["no epoch finished"]


def test_epochs_without_architecture_weights_show_the_rest() -> None:
    epochs = [{"epoch": e, "probabilities": {}, "train_loss": 1.0 / e, "arch_loss": None} for e in (1, 2)]
    figure = draw_epochs(SearchResult(CELL, {"val_accuracy": "maximize"}, [], epochs=epochs))
    assert list(titled(figure)) == ["training loss"]


def test_a_search_that_diverged_is_drawn() -> None:
    result = searched(CELL)
    result.epochs[-1]["probabilities"] = dict.fromkeys(CELL.sites, [nan] * 5)
    draw_epochs(result).canvas.draw()
