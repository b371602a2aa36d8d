"""One-shot searches side by side: what is drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nasbench as nb
from nasbench import SearchResult, plot_anytime
from nasbench.errors import SettingError
from search_spaces import NASBench201


def epochs(*values: float | None, each: float = 10.0, **more: Any) -> list[dict[str, Any]]:
    """Epochs of ten seconds each, two of which went into scores."""
    return [
        {"epoch": i, "val_accuracy": value, "seconds": each * i, "scoring_seconds": 2.0 * i} | more
        for i, value in enumerate(values, start=1)
    ]


def result(rows: list[dict[str, Any]]) -> SearchResult:
    return SearchResult(NASBench201(), {"val_accuracy": "maximize"}, [], epochs=rows)


def test_mean_and_spread_over_seeds_are_drawn_against_epochs(tmp_path: Path) -> None:
    runs = [epochs(0.2, 0.4, 0.6), epochs(0.4, 0.4, 0.8)]
    figure = plot_anytime({"drnas": [result(run) for run in runs], "spos": runs[:1]}, tmp_path / "a.png")
    (axes,) = figure.axes
    drnas, spos = axes.lines
    assert list(drnas.get_xdata()) == [1, 2, 3]
    assert list(drnas.get_ydata()) == pytest.approx([0.3, 0.4, 0.7])
    assert list(spos.get_ydata()) == [0.2, 0.4, 0.6]
    (band,) = axes.collections  # one search has no spread
    corners = band.get_paths()[0].vertices
    half = 0.1 * np.sqrt(2)
    assert {tuple(np.round(c, 6)) for c in corners} >= {(1, round(0.3 - half, 6)), (1, round(0.3 + half, 6)), (2, 0.4)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["drnas", "spos"]
    assert axes.get_ylabel() == "validation accuracy, with shared weights"
    assert axes.get_title(loc="left") == "mean ± standard deviation of several searches"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert nb.plot_anytime is plot_anytime


def test_seconds_are_means_without_those_of_the_scores() -> None:
    runs = [epochs(0.2, 0.4), epochs(0.4, 0.6, each=20.0)]
    (axes,) = plot_anytime({"drnas": runs}, against="seconds").axes
    assert list(axes.lines[0].get_xdata()) == [(8 + 18) / 2, (16 + 36) / 2]
    assert axes.get_xlabel() == "seconds of the search, scoring left out"
    long = [[{"epoch": 1, "val_accuracy": 0.5, "seconds": 36_000.0}]]
    (axes,) = plot_anytime({"drnas": long}, against="seconds").axes
    assert list(axes.lines[0].get_xdata()) == [10]
    assert axes.get_xlabel() == "hours of the search, scoring left out"


def test_a_search_that_ended_early_keeps_its_last_value() -> None:
    (axes,) = plot_anytime({"darts": [epochs(0.2, 0.4), epochs(None, 0.6, 0.8)]}).axes
    assert list(axes.lines[0].get_xdata()) == [2, 3]  # from where both have a value
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.5, 0.6])


def test_one_result_needs_no_list_and_epochs_of_json_will_do() -> None:
    (axes,) = plot_anytime({"a": result(epochs(0.2, 0.4)), "b": epochs(0.3), "c": (epochs(0.1),)}).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.2, 0.4], [0.3], [0.1]]


def test_other_numbers_of_the_choice_are_drawn_better_ones_above() -> None:
    (axes,) = plot_anytime({"darts": epochs(0.1, 0.2, rank=500)}, metric="rank").axes
    bottom, top = axes.get_ylim()
    assert bottom > top >= 0
    assert axes.get_ylabel() == "true rank of the choice"


@pytest.mark.parametrize("many", [1, 8, 16])
def test_any_number_of_names_differ(many: int) -> None:
    figure = plot_anytime({f"${i}_$": epochs(i / 20, i / 20) for i in range(many)})
    figure.canvas.draw()
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == many


@pytest.mark.parametrize(
    ("searches", "settings", "message"),
    [
        ({}, {}, "there is nothing to draw: give the results by name"),
        ([epochs(0.5)], {}, "there is nothing to draw: give the results by name"),
        ({"darts": []}, {}, "there are no results of 'darts': leave it out"),
        ({"darts": 3}, {}, "there are no results of 'darts': leave it out, or give a list"),
        ({"darts": ["darts.json"]}, {}, "the result of 'darts' is 'darts.json': give a SearchResult, or its list of"),
        ({"random": result([])}, {}, "the result of 'random' has no epochs: only one-shot searches record them"),
        ({"darts": [epochs(0.5), []]}, {}, "result 1 of 'darts' has no epochs"),
        (
            {"darts": [epochs(0.5), epochs(None)]},
            {},
            "the epochs of result 1 of 'darts' have no 'val_accuracy': search",
        ),
        ({"darts": epochs(0.5)}, {"metric": "rank"}, "have no 'rank': search again with table="),
        ({"darts": epochs(0.5)}, {"metric": "acc"}, "have no 'acc': they have epoch, val_accuracy, seconds"),
        ({"darts": epochs(0.5)}, {"against": "time"}, "against='time', but it must be 'epoch' or 'seconds'"),
        ({"a": [{"epoch": 1, "val_accuracy": 0.5}]}, {"against": "seconds"}, "epochs of the result of 'a' have no 's"),
        ({"a": [{"val_accuracy": 0.5}]}, {}, "epochs of the result of 'a' have no 'epoch': give them as the search"),
    ],
)
def test_what_cannot_be_drawn_is_said(searches: Any, settings: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        plot_anytime(searches, tmp_path / "a.png", **settings)
    assert not (tmp_path / "a.png").exists()
