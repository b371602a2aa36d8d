"""Figures that show what they should, and a page that needs nothing but itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from torch import nn

import nasbench as nb
from nasbench import drawing, style
from nasbench.drawing import draw_importances, draw_search
from nasbench.report import write_report
from nasbench.result import SearchResult, Trial
from search_spaces import Arch, NASBench201, ResNet, SearchSpace

SPACE = ResNet()


def complete(number: int, arch: int | None = None, **changes: Any) -> Trial:
    """A finished trial; keywords that are no fields of a trial are its metrics."""
    fields = {k: changes.pop(k) for k in ("copied_from", "seconds", "runs") if k in changes}
    return Trial(number, SPACE.at(number if arch is None else arch), "complete", changes, finished=number, **fields)


def unfinished(number: int, state: str, reason: str) -> Trial:
    return Trial(number, SPACE.at(number), state, reason=reason, finished=number)


def points(figure: Figure, label: str) -> list[tuple[float, float]]:
    """The dots that the legend calls so."""
    axes = figure.axes[0]
    (dots,) = [c for c in axes.collections if c.get_label() == label]
    return [(float(x), float(y)) for x, y in np.asarray(dots.get_offsets())]


def line(figure: Figure, label: str) -> list[tuple[float, float]]:
    (found,) = [x for x in figure.axes[0].lines if x.get_label() == label]
    return list(zip(np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist(), strict=True))


def labels(figure: Figure) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


# A search ----------------------------------------------------------------------------------------------------------

MIXED = [
    complete(0, score=0.5),
    complete(1, score=0.4),
    unfinished(2, "failed", "ValueError: no"),
    complete(3, score=0.7),
    complete(4, arch=1, score=0.4, copied_from=1),
    unfinished(5, "pruned", "params = 9 breaks params<5"),
    complete(6, score=0.6),
]


def test_one_objective_shows_every_trial_and_the_best_so_far() -> None:
    figure = draw_search(SearchResult(SPACE, {"score": "maximize"}, MIXED))
    assert points(figure, "trial") == [(1, 0.5), (2, 0.4), (4, 0.7), (7, 0.6)]
    assert points(figure, "copied") == [(5, 0.4)]
    assert line(figure, "best so far") == [(1, 0.5), (2, 0.5), (4, 0.7), (5, 0.7), (7, 0.7), (7, 0.7)]
    assert [x for x, _ in line(figure, "failed")] == [3]
    assert [x for x, _ in line(figure, "pruned")] == [6]
    assert labels(figure) == {"trial", "copied", "best so far", "failed", "pruned"}
    assert "0.7000" in {text.get_text() for text in figure.axes[0].texts}
    assert figure.axes[0].get_ylabel() == "score (higher is better)"


def test_a_minimised_objective_falls() -> None:
    trials = [complete(i, latency_ms=v) for i, v in enumerate([3.0, 4.0, 2.0])]
    figure = draw_search(SearchResult(SPACE, {"latency_ms": "minimize"}, trials))
    assert [y for _, y in line(figure, "best so far")] == [3.0, 3.0, 2.0, 2.0]
    assert figure.axes[0].get_ylabel() == "latency (ms)"


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_a_hopeless_trial_is_marked_at_the_edge_and_does_not_flatten_the_others(direction: str, sign: int) -> None:
    trials = [complete(i, score=sign * (0.9 + i / 1000)) for i in range(20)] + [complete(20, score=sign * -50.0)]
    figure = draw_search(SearchResult(SPACE, {"score": direction}, trials))
    assert len(points(figure, "trial")) == 20
    ((x, y),) = points(figure, "off the scale")
    low, high = figure.axes[0].get_ylim()
    assert x == 21
    assert low < y < high
    assert high - low < 0.1


def test_trials_stand_in_order_of_completion() -> None:
    trials = [replace(complete(0, score=0.1), finished=1), replace(complete(1, score=0.2), finished=0)]
    figure = draw_search(SearchResult(SPACE, {"score": "maximize"}, trials))
    assert sorted(points(figure, "trial")) == [(1, 0.2), (2, 0.1)]
    assert [y for _, y in line(figure, "best so far")] == [0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("cost", "shape", "front"),
    [("minimize", "steps-post", [(1, 0.5), (2, 0.7), (4, 0.8)]), ("maximize", "steps-pre", [(4, 0.8)])],
)
def test_two_objectives_show_the_pareto_front(cost: str, shape: str, front: list[tuple[float, float]]) -> None:
    values = [(0.5, 1), (0.7, 2), (0.6, 3), (0.8, 4)]
    trials = [complete(i, score=score, cost=size) for i, (score, size) in enumerate(values)]
    result = SearchResult(SPACE, {"score": "maximize", "cost": cost}, trials)
    figure = draw_search(result)
    assert points(figure, "Pareto front") == front
    assert sorted(points(figure, "Pareto front") + points(figure, "dominated")) == [(c, s) for s, c in values]
    (steps,) = figure.axes[0].lines
    assert steps.get_drawstyle() == shape


def test_a_third_objective_is_the_colour() -> None:
    trials = [complete(i, score=i, cost=i, latency_ms=5.0 - i) for i in range(4)]
    goals = {"score": "maximize", "cost": "minimize", "latency_ms": "minimize"}
    figure = draw_search(SearchResult(SPACE, goals, trials))
    (dots,) = figure.axes[0].collections
    assert np.asarray(dots.get_array()).tolist() == [5, 4, 3, 2]
    assert figure.axes[1].get_ylabel() == "latency (ms)"
    assert not figure.axes[0].lines


def test_large_numbers_are_short() -> None:
    trials = [complete(i, val_accuracy=i / 9, params=300_000 * (i + 1)) for i in range(4)]
    figure = draw_search(SearchResult(SPACE, {"val_accuracy": "maximize", "params": "minimize"}, trials))
    figure.canvas.draw()
    assert "600k" in {text.get_text() for text in figure.axes[0].get_xticklabels()}


@pytest.mark.parametrize("goals", [["a"], ["a", "b"], ["a", "b", "c"]])
@pytest.mark.parametrize("trials", [[], [unfinished(0, "failed", "x")]], ids=["none", "failed"])
def test_a_search_without_results_is_drawn_too(goals: list[str], trials: list[Trial]) -> None:
    figure = draw_search(SearchResult(SPACE, dict.fromkeys(goals, "maximize"), trials))
    assert "no trial completed" in {text.get_text() for text in figure.axes[0].texts}


def test_names_are_no_formulas() -> None:
    trials = [complete(i, **{"a$b$": float(i), "$c$": float(i)}) for i in range(3)]
    figure = draw_search(SearchResult(SPACE, {"a$b$": "maximize", "$c$": "minimize"}, trials))
    figure.canvas.draw()
    assert figure.axes[0].get_ylabel() == "a$b$ (higher is better)"


def test_a_figure_shows_itself_without_pyplot_and_leaves_no_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    before = dict(matplotlib.rcParams)
    figure: Any = draw_search(SearchResult(SPACE, {"score": "maximize"}, MIXED))
    nb.draw(SPACE, SPACE.at(3))
    image, size = figure._repr_png_()
    assert image.startswith(b"\x89PNG")
    assert size == {"width": 560, "height": 300}
    assert dict(matplotlib.rcParams) == before


def test_a_users_own_style_does_not_show(tmp_path: Path) -> None:
    result = SearchResult(SPACE, {"score": "maximize"}, MIXED)
    result.plot(tmp_path / "plain.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "white", "axes.grid": False}):
        result.plot(tmp_path / "dark.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


# Importances -------------------------------------------------------------------------------------------------------


def random_search(count: int, space: SearchSpace = SPACE, **metrics: Any) -> SearchResult:
    rng = Random(0)
    archs = list(dict.fromkeys(space.sample(rng) for _ in range(3 * count)))[:count]
    trials = [
        Trial(i, arch, "complete", {k: f(arch) for k, f in metrics.items()}, finished=i, seconds=0.5 * i)
        for i, arch in enumerate(archs)
    ]
    return SearchResult(space, dict.fromkeys(metrics, "maximize"), trials)


def bars(figure: Figure | None) -> dict[str, float]:
    assert figure is not None
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    return dict(zip(names, (bar.get_width() for bar in axes.patches), strict=True))  # type: ignore[attr-defined]


def test_the_decision_that_decides_is_the_most_important() -> None:
    result = random_search(60, score=lambda arch: 10.0 * arch["width1"] + arch["depth0"])
    shares = bars(draw_importances(result))
    assert next(iter(shares)) == "width1"
    assert shares["width1"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == bars(draw_importances(result))


@pytest.mark.parametrize("count", [0, 1, 19])
def test_few_trials_have_no_importances(count: int) -> None:
    assert draw_importances(random_search(count, score=lambda arch: float(arch["width1"]))) is None


def test_copies_are_not_counted_as_evidence() -> None:
    trials = [complete(i, arch=i % 19, score=float(i % 19)) for i in range(60)]
    assert draw_importances(SearchResult(SPACE, {"score": "maximize"}, trials)) is None


def test_a_constant_objective_has_no_importances() -> None:
    assert draw_importances(random_search(30, score=lambda arch: 1.0)) is None


@dataclass(frozen=True)
class Wide(SearchSpace):
    """Twenty yes-or-no decisions."""

    @property
    def choices(self) -> Mapping[str, tuple[int, ...]]:
        return {f"d{i}": (0, 1) for i in range(20)}

    def build(self, arch: Arch) -> nn.Module:
        return nn.Identity()


def test_the_least_important_decisions_are_summed_up() -> None:
    shares = bars(draw_importances(random_search(40, Wide(), score=lambda arch: float(arch["d3"]))))
    assert next(iter(shares)) == "d3"
    assert list(shares)[-1] == "5 others"
    assert len(shares) == 16


# The page ----------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Reads a page strictly: every element is closed, nothing is loaded from elsewhere, no id occurs twice."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert {"script", "link", "iframe", "object"}.isdisjoint(self.tags)
        assert not re.search(r"url\((?!#)|@import", text)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def note(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:image/png;base64,"))
            if name == "id":
                self.ids.append(value or "")


def page_of(result: SearchResult, tmp_path: Path) -> Checker:
    return Checker(write_report(result, tmp_path / "page.html").read_text())


def cost(arch: Arch) -> int:
    return 1000 * sum({"nor_conv_3x3": 9, "nor_conv_1x1": 1}.get(str(op), 0) for op in arch.values())


def measure(arch: Arch) -> dict[str, float]:
    if list(arch.values()).count("none") > 2:
        raise RuntimeError(f"nothing left of {cost(arch)} <weights>")
    return {"val_accuracy": 0.5 + cost(arch) / 200_000 - 0.05 * (arch["e03"] == "none"), "params": cost(arch)}


def test_the_page_of_a_real_search(tmp_path: Path) -> None:
    options: Any = {"objectives": "val_accuracy", "constraints": "params<2e4", "population": 8}
    result = nb.search(NASBench201(), measure, "evolution", trials=40, seed=2, progress=False, **options)
    page = page_of(result, tmp_path)
    best = result.best
    assert "The strategy 'evolution' tried " in page.text
    assert "architectures of NASBench201 (15,625 in all), each scored by" in page.text
    found = f"Found: {best.metrics['val_accuracy']:.4f}, in trial {best.number}."
    assert f"Sought: highest validation accuracy. {found}" in page.text
    assert page.tags.count("figure") == 3
    assert page.tags.count("svg") == 3 + 1 + 1 + 1  # architectures, progress, accuracy against params, importances
    headings = ["Best architectures", "Best trials", "Progress", "Trade-offs", "What matters", "Trials", "Conditions"]
    assert [heading for heading in headings if heading not in page.text] == []
    states = [t.state for t in result.trials]
    assert f"{states.count('pruned')} pruned, {states.count('failed')} failed." in page.text
    assert "breaks params<20000" in page.text
    assert "RuntimeError: nothing left of " in page.text
    words = ["evolution, population 8", "seed", "torch", "threads", "NASBench201, channels 16"]
    assert [word for word in words if word not in page.text] == []


def test_the_page_of_a_search_with_two_objectives(tmp_path: Path) -> None:
    options: Any = {"objectives": ["val_accuracy", "params"]}
    result = nb.search(NASBench201(), measure, "random", trials=40, seed=0, progress=False, **options)
    page = page_of(result, tmp_path)
    count = len(result.pareto())
    assert f"Found: {count} architectures that no other beats" in page.text
    assert page.tags.count("figure") == min(6, len({result.space.canonical(t.arch) for t in result.pareto()}))
    assert page.tags.count("svg") == page.tags.count("figure") + 1 + 1 + 1  # progress, the front once, importances


def test_the_best_are_distinct_in_canonical_form(tmp_path: Path) -> None:
    space = NASBench201()
    same = ["|none~0|+|none~0|none~1|+|{}~0|none~1|none~2|", "|skip_connect~0|+|none~0|none~1|+|none~0|{}~1|none~2|"]
    cells = [space.parse(text.format(op)) for op in ("nor_conv_3x3", "nor_conv_1x1") for text in same]
    trials = [Trial(i, arch, "complete", {"score": -i}, finished=i) for i, arch in enumerate(cells)]
    page = page_of(SearchResult(space, {"score": "maximize"}, trials), tmp_path)
    assert [n for n in range(4) if f"Trial {n}" in page.text] == [0, 2]


def test_everything_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>&\"$"
    trials = [complete(i, **{bad: float(i), "val_accuracy": i / 30, "macs": i}) for i in range(25)]
    trials.append(unfinished(25, "failed", f"ValueError: {bad} \udcff"))
    conditions = {"strategy": {"name": bad}, bad: {bad: [bad]}, "objective": {"kind": "function", "function": bad}}
    page = page_of(SearchResult(SPACE, {bad: "maximize"}, trials, conditions=conditions), tmp_path)
    assert page.text.count(bad) > 5


def test_reasons_that_differ_in_numbers_are_one_row(tmp_path: Path) -> None:
    reasons = ["params = 1.5e+06 breaks params<1e6", "params = 2000000 breaks params<1e6", "macs = 3 breaks macs<1e6"]
    trials = [unfinished(i, "pruned", reason) for i, reason in enumerate(reasons)]
    page = page_of(SearchResult(SPACE, {"score": "maximize"}, trials), tmp_path)
    assert "params = 1.5e+06 breaks params<1e6 (and similar)" in page.text
    assert "2000000" not in page.text
    assert "macs = 3 breaks macs<1e6" in page.text


def test_the_page_says_what_copies_seconds_and_seeds_were(tmp_path: Path) -> None:
    runs = [{"score": 0.4}, {"score": 0.6}]
    trials = [
        complete(0, score=0.5, seconds=30.0, runs=runs),
        complete(1, score=0.25, seconds=7200.0),
        complete(2, arch=0, score=0.5, seconds=0.0, copied_from=0, runs=runs),
    ]
    page = page_of(SearchResult(SPACE, {"score": "maximize"}, trials), tmp_path)
    assert "3 complete (1 of them copied from an equal architecture), 0 pruned, 0 failed." in page.text
    assert "Evaluating took 2 h 0 min in all, 60 min for the median trial, 2 h 0 min for the longest." in page.text
    assert "0.5000 ± 0.14" in page.text  # the standard deviation of 0.4 and 0.6
    assert "± their standard deviation" in page.text


def test_the_same_result_gives_the_same_page_and_its_colours_follow_the_reader(tmp_path: Path) -> None:
    result = SearchResult(SPACE, {"score": "maximize"}, MIXED)
    text = write_report(result, tmp_path / "one.html").read_text()
    assert text == write_report(SearchResult.from_json(result.to_json()), tmp_path / "two.html").read_text()
    assert "prefers-color-scheme:dark" in text
    for colour, _ in style.COLOURS.values():
        assert text.count(colour) == 1  # in the style sheet only


def test_a_search_without_results_has_a_page_too(tmp_path: Path) -> None:
    page = page_of(SearchResult(SPACE, {"a": "maximize", "b": "minimize"}, []), tmp_path)
    assert (
        "The search tried 0 architectures of ResNet (729 in all). Sought: highest a and lowest b. No trial" in page.text
    )
    assert page.tags.count("svg") == 1


def test_very_many_dots_become_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(drawing, "MANY", 5)
    result = SearchResult(SPACE, {"score": "maximize"}, MIXED)
    assert "data:image/png;base64," in write_report(result, tmp_path / "page.html").read_text()


def test_the_page_lies_in_the_studys_folder(tmp_path: Path) -> None:
    result = SearchResult(SPACE, {"score": "maximize"}, MIXED, folder=tmp_path / "study")
    assert write_report(result) == tmp_path / "study" / "report.html"
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["report.html"]


def test_without_a_folder_a_path_is_needed() -> None:
    with pytest.raises(nb.SettingError, match="no folder for a report. Name a file: result.report"):
        write_report(SearchResult(SPACE, {"score": "maximize"}, MIXED))


# One-shot searches -------------------------------------------------------------------------------------------------


WEIGHTS = dict.fromkeys(NASBench201().sites, [0.2] * 5)
MEASURED = {"val_accuracy": 0.9, "params": 1000, "macs": 2000, "table_value": 0.8, "rank": 3}


def one_shot(
    trials: int = 1, *, name: str = "darts", weights: Mapping[str, Any] = WEIGHTS, epochs: int = 3, planned: int = 3
) -> SearchResult:
    space = NASBench201()
    found = [
        Trial(i, space.at(9 + i), "complete", MEASURED, finished=i, seconds=2.5, space=space) for i in range(trials)
    ]
    recipe, data = {"epochs": planned}, {"name": "digits"}
    conditions = {"strategy": {"name": name}, "objective": {"kind": "supernet", "data": data, "recipe": recipe}}
    rows: list[dict[str, Any]] = [{"epoch": e, "train_loss": 2 / e, "seconds": 30.0 * e} for e in range(1, epochs + 1)]
    if weights:
        rows = [row | {"probabilities": weights, "rank": row["epoch"]} for row in rows]
    return SearchResult(space, {"val_accuracy": "maximize"}, found, conditions=conditions, epochs=rows)


def test_the_page_of_a_one_shot_search_shows_its_epochs_instead_of_one_trial(tmp_path: Path) -> None:
    page = page_of(one_shot(), tmp_path)
    said = (
        "tried 1 architecture of NASBench201 (15,625 in all), with the shared weights of a supernet trained on digits"
    )
    assert f"{said} for 3 epochs. Sought: highest validation accuracy. Found: 0.9000, in trial 0." in page.text
    assert "Search of NASBench201 on digits" in page.text
    assert "Architecture weights over epochs" in page.text
    assert "Thicker: the option that leads" in page.text
    assert "true rank of the choice" in page.text
    assert "Progress" not in page.text
    assert "Trade-offs" not in page.text
    assert page.tags.count("svg") == 2  # the architecture and its epochs


def test_the_page_says_what_the_supernet_cost(tmp_path: Path) -> None:
    assert "Training the supernet took 2 min.Evaluating took 2.5 s." in page_of(one_shot(), tmp_path).text
    text = page_of(one_shot(2), tmp_path).text
    assert "Training the supernet took 2 min.Evaluating took 5.0 s in all, 2.5 s for the median trial" in text
    scored = one_shot()
    scored.epochs[-1]["scoring_seconds"] = 12.0
    said = "Training the supernet took 2 min, 12.0 s of it for scoring its choice after every epoch."
    assert said in page_of(scored, tmp_path).text
    unknown = one_shot()
    for epoch in unknown.epochs:
        del epoch["seconds"]
    assert "Training the supernet" not in page_of(unknown, tmp_path).text


def test_what_a_table_says_of_the_choice_is_said_in_words(tmp_path: Path) -> None:
    text = page_of(one_shot(), tmp_path).text
    assert "value in the table 0.8000 · rank in the table 3" in text
    assert "multiply-addsvalue in the tablerank in the tabletime" in text
    own = page_of(SearchResult(SPACE, {"score": "maximize"}, [complete(0, score=0.5, rank=7.0)]), tmp_path).text
    assert "rank 7.000" in own
    assert "in the table" not in own


def test_the_page_of_a_supernet_without_architecture_weights_shows_its_loss_alone(tmp_path: Path) -> None:
    page = page_of(one_shot(4, name="spos", weights={}), tmp_path)
    assert "Supernet training" in page.text
    assert "training loss" in page.text
    assert "Architecture weights" not in page.text
    assert "Thicker" not in page.text
    assert "Progress" in page.text
    assert "Trade-offs" in page.text


def test_the_page_shows_the_weights_of_edges_in_the_readers_colours(tmp_path: Path) -> None:
    edges = {site: [1 / len(options)] * len(options) for site, options in NASBench201().edge_sites.items()}
    text = write_report(one_shot(weights={**WEIGHTS, **edges}), tmp_path / "page.html").read_text()
    page = Checker(text)
    assert "edges into 3" in page.text
    assert "The weight of an edge scales all that it carries." in page.text
    assert "The weight of an edge" not in page_of(one_shot(), tmp_path).text
    for colour, _ in style.COLOURS.values():
        assert text.count(colour) == 1  # in the style sheet only


def test_a_paused_search_shows_its_epochs(tmp_path: Path) -> None:
    for name, weights, title in (("darts", WEIGHTS, "Architecture weights"), ("spos", {}, "Supernet training")):
        page = page_of(one_shot(0, name=name, weights=weights, epochs=2, planned=50), tmp_path)
        said = f"The strategy '{name}' has trained a supernet of NASBench201 (15,625 architectures) on digits"
        assert f"{said} for 2 of 50 epochs; nothing was evaluated yet. Sought: highest validation acc" in page.text
        assert title in page.text
        assert "None yet.Training the supernet took 1 min." in page.text
        for absent in ("tried", "No trial completed", "no trial completed", "Progress", "0 complete"):
            assert absent not in page.text
        assert page.tags.count("svg") == 1
    trained = page_of(one_shot(0), tmp_path)
    assert "on digits for 3 epochs; nothing was evaluated yet." in trained.text


def test_a_one_shot_search_whose_trial_failed_says_so(tmp_path: Path) -> None:
    result = one_shot(0)
    result.trials = [Trial(0, result.space.at(9), "failed", reason="ValueError: no")]
    text = page_of(result, tmp_path).text
    assert "tried 1 architecture of NASBench201" in text
    assert "No trial completed." in text
    assert "0 complete, 0 pruned, 1 failed." in text
    assert "Architecture weights over epochs" in text


def test_several_objectives_of_a_paused_search_are_no_empty_plots(tmp_path: Path) -> None:
    result = one_shot(0)
    result.objectives = {"val_accuracy": "maximize", "params": "minimize"}
    page = page_of(result, tmp_path)
    assert page.tags.count("svg") == 1
    assert "Sought: highest validation accuracy and lowest parameters." in page.text


def test_the_plot_of_a_one_shot_search_is_its_epochs() -> None:
    for trials in (0, 1):
        assert draw_search(one_shot(trials)).axes[0].get_title(loc="left") == "e01"
    assert draw_search(one_shot(2)).axes[0].get_xlabel() == "finished trials"
    paused = draw_search(one_shot(0, name="spos", weights={}))
    assert [axes.get_title(loc="left") for axes in paused.axes] == ["training loss"]


def test_the_page_of_several_trials_with_epochs_shows_both(tmp_path: Path) -> None:
    text = page_of(one_shot(2), tmp_path).text
    assert "Architecture weights over epochs" in text
    assert "Progress" in text
