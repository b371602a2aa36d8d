"""Comparisons: equal runs, counted by hand; what is asked wrongly is refused before any work."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import optuna
import pytest
from torch import nn

import nasbench as nb
from nasbench.comparison import Comparison, compare
from nasbench.data import from_arrays
from nasbench.errors import SettingError, StudyError
from nasbench.result import SearchResult
from nasbench.strategies import History, OptunaStrategy, Proposal, RegularizedEvolution, Strategy
from nasbench.table import Table
from search_spaces import PlainCNN
from search_spaces.base import Arch, Choices, SearchSpace


@dataclass(frozen=True)
class Digits(SearchSpace):
    """Numbers of three digits to the base four, and a network as wide as the number is high."""

    classes: int | None = None

    @cached_property
    def choices(self) -> Choices:
        return dict.fromkeys("abc", (0, 1, 2, 3))

    def build(self, arch: Arch) -> nn.Module:
        width = 1 + self.index(arch)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, self.classes or 2))


@dataclass(frozen=True)
class Scripted(Strategy):
    """Proposes architectures by their numbers, in this order."""

    numbers: tuple[int, ...]

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch | Proposal:
        return space.at(self.numbers[len(history)])


SPACE = Digits()
RNG = np.random.default_rng(0)
TABLE = Table(SPACE, {"val_accuracy": RNG.random(64), "test_accuracy": RNG.random(64)})


def number(arch: Arch) -> dict[str, float]:
    return {"score": SPACE.index(arch), "square": SPACE.index(arch) ** 2}


def made(values: Any, reports: Any = None, direction: str = "maximize", seconds: float = 1.0) -> Comparison:
    """A comparison of random search and others with these (strategies, seeds, trials) values."""
    values = np.array(values, float)
    names = ("random", "first", "second", "third")[: len(values)]
    return Comparison(
        names=names,
        seeds=tuple(range(values.shape[1])),
        objective="score",
        direction=direction,
        values=values,
        choices=tuple(tuple(SPACE.at(7) for _ in row) for row in values),
        seconds=np.full(values.shape[:2], seconds),
        report=None if reports is None else "test",
        reports=None if reports is None else np.array(reports, float),
        conditions={"space": {"space": "Digits"}, "data": "a table"},
    )


def ends(*finals: list[float], direction: str = "maximize") -> Comparison:
    """A comparison whose runs have one trial each."""
    return made([[[value] for value in row] for row in finals], direction=direction)


# Running -----------------------------------------------------------------------------------------------------------


def test_every_run_is_the_search_of_its_strategy_and_seed() -> None:
    compared = compare(
        ["evolution", "tpe"], SPACE, TABLE, trials=15, seeds=(3, 8), report="test_accuracy", progress=False
    )
    assert (compared.names, compared.seeds, compared.trials) == (("random", "evolution", "tpe"), (3, 8), 15)
    assert (compared.objective, compared.direction) == ("val_accuracy", "maximize")
    assert compared.curves.shape == (3, 2, 15)
    assert compared.reports is not None
    for i, name in enumerate(compared.names):
        for j, seed in enumerate(compared.seeds):
            result = nb.search(SPACE, TABLE, name, trials=15, seed=seed, progress=False)
            values = [trial.metrics["val_accuracy"] for trial in result.complete]
            assert compared.values[i, j].tolist() == values
            assert compared.curves[i, j].tolist() == [max(values[: k + 1]) for k in range(15)]
            assert compared.choices[i][j] == result.best.arch
            chosen = [max(result.complete[: k + 1], key=lambda t: t.metrics["val_accuracy"]).arch for k in range(15)]
            assert compared.reports[i, j].tolist() == [TABLE.query(arch, "test_accuracy") for arch in chosen]
    assert (compared.seconds > 0).all()


def test_random_search_is_always_there_once_and_first() -> None:
    settings: dict[str, Any] = {"objectives": {"score": "maximize"}, "trials": 2, "seeds": 2, "progress": False}
    assert compare(["evolution"], SPACE, number, **settings).names == ("random", "evolution")
    assert compare(["evolution", "random"], SPACE, number, **settings).names == ("random", "evolution")
    assert compare(["random"], SPACE, number, **settings).names == ("random",)


def test_names_come_from_the_mapping_or_the_strategy() -> None:
    settings: dict[str, Any] = {"objectives": {"score": "maximize"}, "trials": 2, "seeds": 2, "progress": False}
    listed = compare([Scripted((1, 2)), OptunaStrategy("tpe", n_startup_trials=3)], SPACE, number, **settings)
    assert listed.names == ("random", "Scripted", "tpe")
    mapped = compare({"old": RegularizedEvolution(aging=False), "new": "evolution"}, SPACE, number, **settings)
    assert mapped.names == ("random", "old", "new")
    assert [mapped.conditions["strategies"][name]["aging"] for name in ("old", "new")] == [False, True]


def test_the_choice_is_the_first_of_equals_and_its_report_goes_with_it() -> None:
    def last_digit(arch: Arch) -> dict[str, Any]:
        return {"score": arch["c"], "number": SPACE.index(arch)}

    script = Scripted((4, 1, 9, 5, 2, 6))  # last digits 0 1 1 1 2 2, and lower is better below
    settings: dict[str, Any] = {"trials": 6, "seeds": 2, "report": "number", "progress": False}
    up = compare([script], SPACE, last_digit, objectives={"score": "maximize"}, **settings)
    assert up.curves[1, 0].tolist() == [0, 1, 1, 1, 2, 2]
    assert up.reports is not None
    assert up.reports[1, 0].tolist() == [4, 1, 1, 1, 2, 2]
    down = compare([script], SPACE, last_digit, objectives={"score": "minimize"}, **settings)
    assert down.curves[1, 1].tolist() == [0] * 6
    assert down.reported is not None
    assert down.reported[1].tolist() == [4, 4]
    assert down.choices[1] == (SPACE.at(4), SPACE.at(4))


def test_failed_and_forbidden_trials_are_in_no_curve() -> None:
    def odd_only(arch: Arch) -> dict[str, Any]:
        if arch["c"] in (0, 2):
            raise RuntimeError("even")
        return number(arch)

    settings: dict[str, Any] = {"objectives": {"score": "maximize"}, "trials": 12, "seeds": 2, "progress": False}
    compared = compare(["random"], SPACE, odd_only, **settings)
    assert (compared.values % 2 == 1).all()
    limited = compare(["random"], SPACE, number, constraints="square<1600", **settings)
    assert limited.values.max() < 40
    assert not np.isnan(limited.values).any()


def test_a_run_with_nothing_more_to_propose_keeps_its_last_value() -> None:
    compared = compare(["grid"], SPACE, TABLE, trials=70, seeds=2, report="test_accuracy", progress=False)
    assert np.isnan(compared.values[1]).sum() == 2 * 6
    arch, best = TABLE.best("val_accuracy")
    assert (compared.curves[1, :, -7:] == best).all()
    assert compared.reports is not None
    assert (compared.reports[1, :, -7:] == TABLE.query(arch, "test_accuracy")).all()
    assert np.isfinite([row["mean"] for row in compared.summary()]).all()


def test_ctrl_c_ends_the_comparison_and_not_one_run() -> None:
    calls = []

    def pressed(arch: Arch) -> dict[str, float]:
        calls.append(arch)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return number(arch)

    with pytest.raises(KeyboardInterrupt):
        compare(["evolution"], SPACE, pressed, objectives={"score": "maximize"}, trials=5, seeds=2, progress=False)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_named_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SearchResult, "report", lambda self, path=None: path)
    monkeypatch.setattr(SearchResult, "plot", lambda self, path=None: None)
    calls = []

    def counted(arch: Arch) -> dict[str, float]:
        calls.append(arch)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return number(arch)

    settings: dict[str, Any] = {"objectives": {"score": "maximize"}, "trials": 2, "seeds": 2, "progress": False}
    strategies = [Scripted((4, 8))]
    unbroken = compare(strategies, SPACE, number, **settings)
    with pytest.raises(KeyboardInterrupt):
        compare(strategies, SPACE, counted, study="mine", folder=tmp_path, **settings)
    resumed = compare(strategies, SPACE, counted, study="mine", folder=tmp_path, **settings)
    assert resumed.values.tolist() == unbroken.values.tolist()
    assert resumed.choices == unbroken.choices
    assert len(calls) == 8 + 1  # the one that was interrupted had no result
    names = {"mine-random-0", "mine-random-1", "mine-Scripted-0", "mine-Scripted-1"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_training_reports_the_test_accuracy_of_the_trained_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SearchResult, "report", lambda self, path=None: path)
    monkeypatch.setattr(SearchResult, "plot", lambda self, path=None: None)
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    labels = (images.mean((1, 2)) > 127).astype(int)
    data = from_arrays(images, labels, images, labels, name="noise")
    compared = compare(
        ["random"],
        SPACE,
        data,
        trials=2,
        seeds=2,
        report="test_accuracy",
        study="tiny",
        folder=tmp_path,
        progress=False,
        device="cpu",
        epochs=1,
        batch_size=16,
    )
    assert compared.reported is not None
    assert compared.reports is not None
    assert np.isnan(compared.reports[:, :, :-1]).all()
    for i, name in enumerate(compared.names):
        for j in (0, 1):
            study = SearchResult.load(tmp_path / f"tiny-{name}-{j}" / "result.json", SPACE.bind(data))
            assert study.best.arch == compared.choices[i][j]
            assert compared.reported[i, j] == nb.evaluate(study.best.build(), data)["test_accuracy"]
    assert "noise" in str(compared)
    assert len(compared.plot().axes) == 2


# Summary -----------------------------------------------------------------------------------------------------------


def test_summary_is_what_a_hand_would_count() -> None:
    rows = ends([1, 2, 3, 4, 5], [2, 4, 6, 8, 10], [1, 2, 3, 4, 5.5], [0, 4, 1, 2, 11]).summary()
    assert [row["strategy"] for row in rows] == ["random", "first", "second", "third"]
    assert [row["mean"] for row in rows] == [3, 6, 3.1, 3.6]
    assert [row["median"] for row in rows] == [3, 6, 3, 2]
    assert rows[1]["std"] == pytest.approx(10**0.5)  # squares of -4 -2 0 2 4 add up to 40, over n - 1 = 4
    # Ranks by seed, ties shared; random: 2.5 3.5 2.5 2.5 4, first: 1 1.5 1 1 2, second: 2.5 3.5 2.5 2.5 3.
    assert [row["rank"] for row in rows] == pytest.approx([3.0, 1.3, 2.8, 2.9])
    # Five differences, all above zero: of the 2^5 equally likely signs, two are as far from even.
    assert rows[0]["p"] is None
    assert rows[1]["p"] == pytest.approx(2 / 32)
    assert rows[2]["p"] == 1.0  # four ties say nothing, and one difference alone can go either way
    assert [row["seconds"] for row in rows] == [5, 5, 5, 5]


def test_lower_ranks_first_when_minimising() -> None:
    rows = ends([1, 2], [2, 3], direction="minimize").summary()
    assert [row["rank"] for row in rows] == [1, 2]


def test_equal_runs_have_p_one() -> None:
    assert ends([1, 2, 3], [1, 2, 3]).summary()[1]["p"] == 1.0


def test_reports_have_their_own_figures() -> None:
    compared = made([[[1], [2]], [[3], [4]]], reports=[[[10], [30]], [[20], [50]]])
    random, first = compared.summary()
    assert (random["report_mean"], random["report_median"], random["report_p"]) == (20, 20, None)
    assert (first["report_mean"], first["report_p"]) == (35, 0.5)
    assert "report_mean" not in ends([1, 2], [3, 4]).summary()[0]


def test_text_is_an_aligned_table_with_budget_seeds_and_table() -> None:
    lines = str(made(np.arange(24).reshape(2, 3, 4), reports=np.arange(24).reshape(2, 3, 4))).splitlines()
    assert lines[0] == "Digits, a table, 4 trials, 3 seeds: maximize score"
    assert lines[1].split() == ["strategy", "score", "median", "p", "test", "median", "p", "rank", "seconds"]
    assert lines[2].split() == ["random", *2 * ["7.000", "±", "4.0", "7.000", "-"], "2.00", "3.0"]
    assert lines[3].startswith("first ")
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[4].endswith("cannot fall below 0.25 with 3 seeds")  # 2 of 2^3 signs


# Files -------------------------------------------------------------------------------------------------------------


def test_json_gives_everything_back(tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((2, 3, 4))
    values[1, 2, 2:] = np.nan
    reports = np.full((2, 3, 4), np.nan)
    reports[:, :, -1] = 0.1
    for compared in (made(values, reports), made(values, direction="minimize")):
        loaded = Comparison.load(compared.save(tmp_path / "new" / "comparison.json"))
        for name in ("values", "seconds", "curves", "reports", "reported"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(compared, name))
        for name in ("names", "seeds", "objective", "direction", "choices", "report", "conditions"):
            assert getattr(loaded, name) == getattr(compared, name)
        assert str(loaded) == str(compared)
        assert type(loaded.choices[0][0]) is Arch


def changed(**changes: Any) -> str:
    entry = json.loads(ends([1, 2], [3, 4]).to_json())
    return json.dumps({name: value for name, value in (entry | changes).items() if value != "gone"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ends([1, 2], [3, 4]).to_json()[:-20], r"cannot be read \(JSONDecodeError"),
        ("[1, 2]", "cannot be read"),
        ("{}", r"cannot be read \(KeyError: 'format'\)"),
        (changed(format=99), "format 99 is newer than 1: update nasbench"),
        (changed(values="gone"), "cannot be read .*values"),
        (changed(more=1), "unexpected keyword argument 'more'"),
        (changed(names=["a", "b"]), "cannot be read"),
        (changed(seeds=[0, 1, 2]), "2 strategies with 3 seeds have values"),
        (changed(values=None), "cannot be read"),
    ],
)
def test_what_is_no_comparison_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(StudyError, match=message):
        Comparison.load(tmp_path / "c.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"cannot read a comparison from .*none.json.*Name a file that save\(\) wrote"):
        Comparison.load(tmp_path / "none.json")


# Drawing -----------------------------------------------------------------------------------------------------------


def lines(axes: Any) -> Mapping[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_figure_has_mean_curves_with_random_in_grey(tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((3, 4, 30))
    compared = made(values, values.cumsum(axis=2))
    figure = compared.plot(tmp_path / "figure.png")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["random", "first", "second"]
    for i, name in enumerate(compared.names):
        np.testing.assert_allclose(lines(left)[name].get_ydata(), compared.curves[i].mean(axis=0))
        np.testing.assert_allclose(lines(right)[name].get_ydata(), compared.reports[i].mean(axis=0))  # type: ignore[index]
        assert lines(left)[name].get_color() == lines(right)[name].get_color()
    red, green, blue = (lines(left)["random"].get_color()[i : i + 2] for i in (1, 3, 5))
    assert red == green == blue
    assert len({line.get_color() for line in lines(left).values()}) == 3
    assert "standard error" in figure.get_suptitle()
    assert (left.get_ylabel(), right.get_ylabel()) == ("best score so far", "test of the choice so far")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("reported", "label"), [(True, "test of the choice"), (False, "best score")])
def test_without_reports_over_time_the_second_panel_shows_single_seeds(reported: bool, label: str) -> None:
    values = np.random.default_rng(1).random((2, 5, 6))
    reports = np.full((2, 5, 6), np.nan)
    reports[:, :, -1] = values[:, :, 0]
    compared = made(values, reports if reported else None)
    right = compared.plot().axes[1]
    assert right.get_ylabel() == label
    shown = compared.reported if compared.reported is not None else compared.curves[:, :, -1]
    dots = [line.get_ydata() for line in right.get_lines() if len(line.get_ydata()) == 5]
    np.testing.assert_array_equal(dots, shown)
    assert [text.get_text() for text in right.get_xticklabels()] == ["random", "first"]


# Bad input ---------------------------------------------------------------------------------------------------------


def never(arch: Arch) -> dict[str, float]:
    raise AssertionError("work was done")


@pytest.mark.parametrize(
    ("strategies", "changes", "message"),
    [
        ([], {}, "there are no strategies to compare. Name at least one"),
        ({}, {}, "there are no strategies"),
        ("evolution", {}, r"strategies='evolution': give a list"),
        (3, {}, r"strategies=3: give a list"),
        (["evolutoin"], {}, "no strategy is called 'evolutoin'; did you mean 'evolution'"),
        (["cmaes"], {}, "Optuna's 'cmaes' is not offered"),
        (["tpe", "tpe"], {}, "two strategies are called 'tpe'. Name them"),
        ([RegularizedEvolution(population=20), "evolution"], {}, "two strategies are called 'evolution'"),
        ([optuna.samplers.TPESampler()], {}, "is no strategy.*cannot be seeded anew"),
        ([None], {}, "None is no strategy"),
        ({"random": "evolution"}, {}, "'random' is the name of random search, but was given to 'evolution'"),
        ({"a/b": "evolution"}, {"study": "s"}, "study 's' of strategy 'a/b' cannot be a folder name"),
        (["tpe"], {"objectives": ("score", "square")}, "ranked by one objective, not score, square"),
        (["tpe"], {"objectives": {"a": "maximize", "b": "minimize"}}, "ranked by one objective, not a, b"),
        (["tpe"], {"objectives": {"score": "up"}}, "has direction 'up'"),
        (["tpe"], {"objectives": None}, "name what to optimise"),
        (["tpe"], {"trials": 0}, "trials=0: each run needs"),
        (["tpe"], {"trials": -3}, "trials=-3: each run needs"),
        (["tpe"], {"trials": 2.5}, "trials=2.5: each run needs a whole number"),
        (["tpe"], {"seeds": 1}, "1 seed: a comparison needs several"),
        (["tpe"], {"seeds": 0}, "0 seed: a comparison needs several"),
        (["tpe"], {"seeds": [7]}, "1 seed: a comparison needs several"),
        (["tpe"], {"seeds": [1, 1, 2]}, r"seeds=\[1, 1, 2\]: give how many, or different"),
        (["tpe"], {"seeds": [0.5, 1]}, "give how many, or different whole numbers"),
        (["tpe"], {"seeds": True}, "seeds=True: give how many"),
        (["tpe"], {"seeds": "12"}, "seeds='12': give how many"),
        (["tpe"], {"population": 20}, "compare has no setting 'population'.*A strategy carries its own settings"),
        (["tpe"], {"epoch": 20}, "compare has no setting 'epoch'; did you mean 'epochs'"),
        (["tpe"], {"timeout": 20}, "compare has no setting 'timeout'"),
        (["tpe"], {"epochs": 20}, "'epochs' is about training, but nothing is trained"),
        (["eas"], {}, "strategy 'eas' grows networks"),
    ],
)
def test_bad_input_is_refused_before_any_work(strategies: Any, changes: dict[str, Any], message: str) -> None:
    settings = {"objectives": {"score": "maximize"}, "trials": 3, "seeds": 2, "progress": False} | changes
    with pytest.raises(SettingError, match=message):
        compare(strategies, SPACE, never, **settings)


def test_a_direction_that_a_strategy_cannot_follow_is_refused_before_any_work() -> None:
    with pytest.raises(SettingError, match="the objective is minimised"):
        compare(["eas"], PlainCNN(), never, objectives={"score": "minimize"}, trials=3, seeds=2, progress=False)


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
UNTESTED = from_arrays(IMAGES, np.arange(40) % 2, name="untested")
HOLES = Table(SPACE, {"val_accuracy": np.ones(64), "other": [float("nan"), *[1.0] * 63]})


@pytest.mark.parametrize(
    ("data", "report", "message"),
    [
        (TABLE, "test_acuracy", "there is no metric 'test_acuracy' to report; did you mean 'test_accuracy'"),
        (HOLES, "other", "'other' was not measured for 1 rows of the table"),
        (UNTESTED, "val_accuracy", "there is no metric 'val_accuracy' to report.*Known: test_accuracy, test_loss"),
        (UNTESTED, "test_accuracy", "untested has no test images, so 'test_accuracy' cannot be reported"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_before_any_work(
    data: Any, report: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nb.comparison, "search", never)
    with pytest.raises(SettingError, match=message):
        compare(["random"], SPACE, data, report=report, trials=3, seeds=2, progress=False)


def test_a_report_that_a_function_does_not_return_is_told_after_its_first_run() -> None:
    calls = []

    def counted(arch: Arch) -> dict[str, float]:
        calls.append(arch)
        return number(arch)

    with pytest.raises(SettingError, match="did not return 'sqare' to report; did you mean 'square'"):
        compare(
            ["tpe"], SPACE, counted, objectives={"score": "maximize"}, report="sqare", trials=3, seeds=2, progress=False
        )
    assert len(calls) <= 3


def test_a_comparison_in_which_every_trial_fails_says_why() -> None:
    def broken(arch: Arch) -> dict[str, float]:
        raise RuntimeError("no such thing")

    with pytest.raises(StudyError, match="no such thing"):
        compare(["tpe"], SPACE, broken, objectives={"score": "maximize"}, trials=6, seeds=2, progress=False)


REAL = Path(__file__).parents[3] / "shared" / "data" / "nasbench201.npz"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the measured tables of ../shared/data are not here")
def test_evolution_beats_random_search_on_nasbench201() -> None:
    table = Table.load(REAL)
    objective = {"cifar10_val_12": "maximize"}
    compared = compare(
        ["evolution"], table.space, table, objectives=objective, report="cifar10_test_200", trials=300, progress=False
    )
    random, evolution = compared.summary()
    assert evolution["mean"] > random["mean"]
    assert evolution["median"] > random["median"]
    assert evolution["p"] < 0.01
