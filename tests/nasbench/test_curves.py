"""A one-shot search over its epochs: every site has a panel, every option its colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from nasbench.curves import draw_epochs, is_one_shot, known_sites
from nasbench.result import SearchResult, Trial
from nasbench.style import INK, MUTED
from search_spaces import DARTS, Arch, NASBench201, SearchSpace

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
    assert [part.get_suptitle() for part in figure.subfigs] == ["", "normal cell", "reduction cell"]
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
    (label,) = rank.texts
    assert label.get_text() == "1"
    assert label.get_window_extent().x0 > rank.bbox.x1  # beside the panel, clear of the line
    assert not label.get_window_extent().overlaps(loss.get_tightbbox())  # type: ignore[arg-type]
    assert [line.get_label() for line in loss.lines] == ["weights"]
    assert loss.get_legend() is None
    losses |= {"arch_loss": [2.0] * 4, "eigenvalue": [0.1, 0.2, 0.3, 0.4]}
    panels = titled(draw_epochs(searched(CELL, **losses)))
    assert list(panels)[6:] == ["training loss", "largest eigenvalue"]
    assert len(panels["training loss"].lines) == 2
    assert panels["training loss"].get_legend() is not None


def test_the_accuracy_of_the_choice_has_a_row_of_its_own_with_dots_where_it_changed() -> None:
    archs = [{"e01": "none"}, {"e01": "none"}, {"e01": "skip_connect"}, {"e01": "skip_connect"}]
    scores = {"val_accuracy": [0.2, 0.5, 0.45, 0.6], "arch": archs, "train_loss": [2.0, 1.5, 1.2, 1.0]}
    figure = draw_epochs(searched(CELL, **scores))
    panels = titled(figure)
    title = "validation accuracy of the choice, with shared weights; dots: it changed"
    assert list(panels)[6:] == [title, "training loss"]
    axes = panels[title]
    line, dots = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3, 4], [0.2, 0.5, 0.45, 0.6])
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([1, 3], [0.2, 0.45])
    low, high = axes.get_ylim()
    assert 0 < low < 0.2
    assert 0.6 < high < 0.7
    assert [text.get_text() for text in axes.texts] == ["60.0%"]
    found = [a.get_tightbbox() for a in figure.axes]
    assert not [1 for i, a in enumerate(found) for b in found[:i] if a and b and a.padded(-1).overlaps(b)]


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1.0, 1.0], [None, 0.9]])
def test_any_accuracies_of_the_choice_are_drawn(values: list[float | None]) -> None:
    epochs = [{"epoch": i, "val_accuracy": value} for i, value in enumerate(values, start=1)]
    (axes,) = draw_epochs(SearchResult(CELL, {"val_accuracy": "maximize"}, [], epochs=epochs)).axes
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    assert low < min(v for v in values if v is not None) <= max(v for v in values if v is not None) < high <= 1.02


@pytest.mark.parametrize(
    ("weights", "architecture", "top"),
    [
        ([2.0, 1.5, 1.2, 1.0], [None] * 4, 2.16),
        ([2.0, 1.5, 1.2, 1.0], [2.5, 1.0, 1.0, 1.0], 2.7),
        ([2.0, 1.5, nan, inf], [None] * 4, 2.16),
        ([nan] * 4, [None] * 4, 1.0),
        ([0.0] * 4, [None] * 4, 1.0),
    ],
)
def test_losses_end_below_the_edge(weights: list[float], architecture: list[float | None], top: float) -> None:
    panels = titled(draw_epochs(searched(CELL, train_loss=weights, arch_loss=architecture)))
    assert panels["training loss"].get_ylim() == pytest.approx((0, top))


def shares(space: SearchSpace, *rows: list[float]) -> SearchResult:
    """Epochs in which all sites have the same probabilities."""
    epochs = [{"epoch": i, "probabilities": dict.fromkeys(space.sites, row)} for i, row in enumerate(rows, start=1)]
    return SearchResult(space, {"val_accuracy": "maximize"}, [], epochs=epochs)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ([0.6, 0.1, 0.1, 0.1, 0.1], (0, 0.648)),
        ([0.24, 0.19, 0.19, 0.19, 0.19], (0.186, 0.244)),
        ([0.2, 0.2, 0.2, 0.2, 0.2], (0.19768, 0.20232)),
        ([1.0, 0.0, 0.0, 0.0, 0.0], (0, 1.04)),
    ],
)
def test_the_axis_begins_where_the_spread_shows(last: list[float], expected: tuple[float, float]) -> None:
    panels = titled(draw_epochs(shares(CELL, [0.2] * 5, last)))
    assert [axes.get_ylim() for axes in panels.values()] == [pytest.approx(expected)] * 6
    axes = panels["e01"]
    low, high = axes.get_ylim()
    labels = [t.get_text() for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if low <= y <= high]
    assert len(set(labels)) == len(labels) >= 2
    for label, y in zip(labels, [y for y in axes.get_yticks() if low <= y <= high], strict=True):
        assert label.endswith("%")
        assert float(label[:-1]) == pytest.approx(100 * y)


def with_edges(space: SearchSpace) -> SearchResult:
    """Epochs in which the last edge of every node gets heavier."""
    result = searched(space)
    for epoch in result.epochs:
        for site, options in space.edge_sites.items():
            others = (1 - 0.1 * epoch["epoch"]) / len(options)
            rest = [others] * (len(options) - 1)
            epoch["probabilities"][site] = [*rest, 1 - sum(rest)]
    return result


def test_the_weights_of_edges_are_a_row_below_each_cell() -> None:
    space = DARTS(channels=4, cells=3, classes=10, in_channels=1)
    result = with_edges(space)
    figure = draw_epochs(result)
    assert [part.get_suptitle() for part in figure.subfigs] == ["", "normal cell", "", "reduction cell", ""]
    for part, kind in ((figure.subfigs[2], "normal"), (figure.subfigs[4], "reduce")):
        figure.canvas.draw()
        assert [axes.get_title(loc="left") for axes in part.axes] == [f"edges into {node}" for node in (2, 3, 4, 5)]
        (legend,) = part.legends
        texts = [text.get_text() for text in legend.get_texts()]
        assert texts == ["weights of edges from state", "0", "1", "2", "3", "4"]
        named = dict(zip(texts, (to_hex(h.get_color()) for h in legend.get_lines()), strict=True))
        for node, axes in enumerate(part.axes, start=2):
            recorded = [epoch["probabilities"][f"{kind}_inputs{node}"] for epoch in result.epochs]
            assert [list(line.get_ydata()) for line in axes.lines] == [list(row) for row in zip(*recorded, strict=True)]
            assert [to_hex(line.get_color()) for line in axes.lines] == [named[str(state)] for state in range(node)]
            low, high = axes.get_ylim()
            assert low < min(map(min, recorded)) < max(map(max, recorded)) < high
        found = [axes.get_tightbbox() for axes in part.axes]
        assert not [1 for i, a in enumerate(found) for b in found[:i] if a and b and a.padded(-1).overlaps(b)]
        assert not [1 for box in found if box and box.padded(-1).overlaps(legend.get_window_extent())]


def test_the_weights_of_edges_of_one_cell_follow_its_operations() -> None:
    titles = list(titled(draw_epochs(with_edges(CELL))))
    assert titles == [*CELL.sites, "edges into 2", "edges into 3"]
    alone = with_edges(CELL)
    for epoch in alone.epochs:
        epoch["probabilities"] = {site: epoch["probabilities"][site] for site in CELL.edge_sites}
    assert known_sites(alone) == ["inputs2", "inputs3"]
    assert list(titled(draw_epochs(alone))) == ["edges into 2", "edges into 3"]


def test_a_search_is_one_shot_until_a_second_trial_completes() -> None:
    trials = [Trial(i, CELL.at(i), "complete", {"val_accuracy": 0.5}, finished=i) for i in range(2)]
    failed = Trial(2, CELL.at(2), "failed", reason="x", finished=2)
    epochs = searched(CELL).epochs
    for found, expected in (([], True), ([failed], True), (trials[:1], True), ([trials[0], failed], True)):
        assert is_one_shot(SearchResult(CELL, {"val_accuracy": "maximize"}, found, epochs=epochs)) is expected
    assert not is_one_shot(SearchResult(CELL, {"val_accuracy": "maximize"}, trials, epochs=epochs))
    assert not is_one_shot(SearchResult(CELL, {"val_accuracy": "maximize"}, trials[:1]))


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
    assert len(figure.subfigs) == 1


def test_a_search_that_diverged_is_drawn() -> None:
    result = searched(CELL)
    result.epochs[-1]["probabilities"] = dict.fromkeys(CELL.sites, [nan] * 5)
    draw_epochs(result).canvas.draw()
