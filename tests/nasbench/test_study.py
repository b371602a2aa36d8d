"""The verb `search`: what it evaluates, keeps, continues and refuses. Killed and parallel workers: test_worker.py."""

from __future__ import annotations

import errno
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import nasbench as nb
import nasbench.study
import nasbench.worker
from nasbench import training
from nasbench.data import Data, load
from nasbench.errors import DataError, ResumeError, SettingError, StudyError, TableError, WeightsError
from nasbench.files import sha256
from nasbench.objective import Objective, TrialRun
from nasbench.result import SearchResult
from nasbench.storage import open_storage
from nasbench.strategies import History, RegularizedEvolution, Strategy
from search_spaces import Arch, ArchError, NASBench201, ResNet
from search_spaces.base import Choices, SearchSpace

SPACE = NASBench201()
SMALL = NASBench201(channels=4, cells=1)
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 64, "device": "cpu", "progress": False}
CELL = "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"
SAME = "|skip_connect~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|none~2|"  # computes what CELL computes
OTHER = "|none~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|none~2|"


@dataclass(frozen=True)
class Dice(SearchSpace):
    """Two dice: 36 architectures, or fewer."""

    sides: int = 6

    @cached_property
    def choices(self) -> Choices:
        return {"a": tuple(range(1, self.sides + 1)), "b": tuple(range(1, self.sides + 1))}

    def build(self, arch: Arch) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class Listed(Strategy):
    """Proposes these architectures, by index, one after the other."""

    indices: tuple[int, ...]

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        return space.at(self.indices[len(history)])


def points(arch: Arch) -> dict[str, float]:
    a, b = int(arch["a"] or 0), int(arch["b"] or 0)
    return {"score": a * b + a / 10, "cost": (a - 3) ** 2 + b}


class Judge:
    """An objective that remembers its calls, and lets a test step in before any of them."""

    def __init__(self, before: Callable[[int], None] = lambda call: None) -> None:
        self.calls: list[Arch] = []
        self.before = before

    def __call__(self, arch: Arch) -> dict[str, float]:
        self.calls.append(arch)
        self.before(len(self.calls))
        return points(arch)


def roll(
    judge: Any, strategy: Any = "random", *, trials: int = 12, space: SearchSpace | None = None, **settings: Any
) -> SearchResult:
    """Search `Dice` for a high score."""
    given = {"objectives": {"score": "maximize"}, "progress": False} | settings
    return nb.search(space or Dice(), judge, strategy, trials=trials, **given)


def kept(folder: Path, name: str = "dice") -> dict[str, Any]:
    """Settings of a study in a folder, with a journal: its trials cost a tenth of SQLite's."""
    return {"study": name, "folder": folder, "storage": f"{folder}/all.log"}


def essence(result: SearchResult) -> list[tuple[Any, ...]]:
    """All of a study that must not depend on interruptions."""
    return [(t.number, t.arch, t.state, dict(t.metrics), t.copied_from, t.reason, t.finished) for t in result.trials]


def weights(folder: Path | None) -> dict[int, str]:
    assert folder is not None
    return {int(path.parent.name): sha256(path) for path in folder.glob("trials/*/weights.safetensors")}


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have their own tests, and take longer than most searches here."""
    monkeypatch.setattr(SearchResult, "report", lambda self, path=None: None)
    monkeypatch.setattr(SearchResult, "plot", lambda self, path=None: None)


@pytest.fixture(scope="module")
def data() -> Data:
    return load("digits", train_images=200)


@pytest.fixture(scope="module")
def table() -> nb.Table:
    rng = np.random.default_rng(0)
    return nb.Table(SPACE, {"val_accuracy": rng.random(SPACE.size), "test_accuracy": rng.random(SPACE.size)})


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """Six trials of an evolution on digits; tests must leave its folder as it is."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SearchResult, "report", lambda self, path=None: None)
        patch.setattr(SearchResult, "plot", lambda self, path=None: None)
        return nb.search(SMALL, data, trials=6, population=4, folder=folder, study="digits", **QUICK)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every training that was begun."""
    begun: list[int] = []
    fit = training.fit

    def counting(*args: Any, **settings: Any) -> Any:
        begun.append(settings["seed"])
        return fit(*args, **settings)

    monkeypatch.setattr(training, "fit", counting)
    return begun


class Clock:
    """Stands in for the module `time` in the study and its worker: it goes on by `tick` when it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick
        monkeypatch.setattr(nasbench.study, "time", self)
        monkeypatch.setattr(nasbench.worker, "time", self)

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# Data, tables, functions -------------------------------------------------------------------------------------------


def test_a_search_on_images(trained: SearchResult, data: Data) -> None:
    assert [t.number for t in trained.trials] == [0, 1, 2, 3, 4, 5]
    assert trained.space == SMALL.bind(data)
    for t in trained.trials:
        assert t.state == "complete"
        assert set(t.metrics) == {"val_accuracy", "val_loss", "params", "macs"}
        assert t.seconds is not None
        assert t.seconds > 0
    assert trained.best.metrics["val_accuracy"] == max(t.metrics["val_accuracy"] for t in trained.trials)
    assert trained.conditions["objective"]["data"]["fingerprint"] == data.fingerprint
    assert trained.conditions["objectives"] == {"val_accuracy": "maximize"}


def test_the_best_network_is_the_one_that_was_validated(trained: SearchResult, data: Data) -> None:
    best = trained.best
    scores = nb.validate(best.build(), data)
    assert scores == {name: best.metrics[name] for name in ("val_accuracy", "val_loss")}
    assert sum(p.numel() for p in best.build().parameters()) == best.metrics["params"]


def test_the_folder_keeps_the_study_the_result_and_the_best_weights(trained: SearchResult) -> None:
    assert trained.folder is not None
    found = {str(p.relative_to(trained.folder)) for p in trained.folder.rglob("*") if p.is_file()}
    best = f"trials/{trained.best.number}/weights.safetensors"
    assert found == {"study.db", "study.lock", "result.json", best}
    loaded = SearchResult.load(trained.folder / "result.json")
    assert essence(loaded) == essence(trained)
    assert loaded.conditions == json.loads(json.dumps(trained.conditions))


def test_other_trials_have_no_weights_but_a_network(trained: SearchResult) -> None:
    lost = next(t for t in trained.trials if t is not trained.best and t.copied_from is None)
    with pytest.raises(
        WeightsError, match=rf"trial {lost.number} has no weights at .*: only the best trials keep thei"
    ):
        lost.build()
    assert lost.build(weights=False)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_search_leaves_the_global_random_numbers_alone(data: Data, tmp_path: Path) -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    before = state()
    nb.search(SMALL, data, "tpe", trials=1, folder=tmp_path, **QUICK)
    assert state() == before


def test_a_search_in_a_table_keeps_nothing(table: nb.Table, tmp_path: Path) -> None:
    result = nb.search(SMALL, table, trials=60, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert result.folder is None
    assert all(dict(t.metrics) == {"val_accuracy": table.query(t.arch, "val_accuracy")} for t in result.trials)
    with pytest.raises(WeightsError, match="was not trained here, its metrics were looked up or computed"):
        result.best.build()
    asked = nb.search(SMALL, table, trials=3, metrics=["test_accuracy"], progress=False)
    assert set(asked.trials[0].metrics) == {"val_accuracy", "test_accuracy"}


def test_a_table_is_asked_for_the_very_architecture_and_images_for_its_function(
    table: nb.Table, data: Data, tmp_path: Path, fits: list[int]
) -> None:
    strategy = Listed(tuple(SPACE.index(SPACE.parse(text)) for text in (CELL, SAME, CELL, OTHER)))
    looked_up = nb.search(SPACE, table, strategy, trials=4, progress=False)
    assert [t.copied_from for t in looked_up.trials] == [None, None, 0, None]
    assert [t.metrics["val_accuracy"] for t in looked_up.trials] == [
        table.query(text, "val_accuracy") for text in (CELL, SAME, CELL, OTHER)
    ]
    trained = nb.search(SMALL, data, strategy, trials=4, **kept(tmp_path), **QUICK)
    assert len(fits) == 2
    assert [t.copied_from for t in trained.trials] == [None, 0, 0, None]
    assert trained.trials[0].metrics == trained.trials[1].metrics == trained.trials[2].metrics
    if trained.best.number == 0:
        x = torch.rand(2, *data.shape)
        assert torch.equal(trained.trials[0].build()(x), trained.trials[1].build()(x))


def test_a_search_of_a_function_keeps_nothing(tmp_path: Path) -> None:
    judge = Judge()
    result = roll(judge)
    assert list(tmp_path.iterdir()) == []
    assert (len(result.trials), result.folder) == (12, None)
    assert all(dict(t.metrics) == points(t.arch) for t in result.trials)
    assert result.best.metrics["score"] == max(points(arch)["score"] for arch in judge.calls)


def test_the_seed_decides() -> None:
    first, again, other = (essence(roll(Judge(), "evolution", seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_metrics_that_cost_time_are_measured_when_asked(data: Data, tmp_path: Path) -> None:
    result = nb.search(
        SMALL, data, "random", trials=1, metrics=["bytes"], constraints="latency_ms<1e9", **kept(tmp_path), **QUICK
    )
    (only,) = result.trials
    assert set(only.metrics) == {"val_accuracy", "val_loss", "params", "macs", "bytes", "latency_ms"}


def test_one_more_metric_may_be_given_as_a_word(table: nb.Table) -> None:
    result = nb.search(SPACE, table, trials=1, metrics="test_accuracy", progress=False)
    assert result.best.metrics.keys() == {"val_accuracy", "test_accuracy"}


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    class Priced(Objective):
        """Knows the cost beforehand, and writes into the trial's folder."""

        names = ("score", "cost")
        judged: list[Arch] = []  # noqa: RUF012

        def settings(self) -> dict[str, Any]:
            return {"kind": "priced"}

        def preview(self, arch: Arch, names: Sequence[str]) -> dict[str, float]:
            return {"cost": points(arch)["cost"]}

        def __call__(self, arch: Arch, run: TrialRun) -> dict[str, float]:
            assert run.folder is not None
            (run.folder / "note").write_text("seen")
            self.judged.append(arch)
            return points(arch)

    result = roll(Priced(), "random", trials=5, constraints=["cost<5"], **kept(tmp_path))
    assert len(result.complete) == 5
    broken = [t for t in result.trials if t.state == "pruned"]
    assert broken, "no architecture broke the constraint: choose another seed"
    assert {t.arch for t in broken}.isdisjoint(Priced.judged)
    assert all(t.reason == f"cost = {points(t.arch)['cost']:g} breaks cost<5" for t in broken)
    assert not list(tmp_path.rglob("note"))


# Continuing --------------------------------------------------------------------------------------------------------


def test_the_same_line_again_returns_at_once(trained: SearchResult, data: Data, fits: list[int]) -> None:
    assert trained.folder is not None
    again = nb.search(SMALL, data, trials=6, population=4, folder=trained.folder.parent, study="digits", **QUICK)
    assert fits == []
    assert essence(again) == essence(trained)
    fewer = nb.search(SMALL, data, trials=2, population=4, folder=trained.folder.parent, study="digits", **QUICK)
    assert fits == []
    assert essence(fewer) == essence(trained)


@pytest.mark.parametrize("storage", [None, "all.log", "sqlite:///all.db"])
def test_more_trials_go_on_where_it_was(tmp_path: Path, storage: str | None) -> None:
    judge, whole = Judge(), Judge()
    place: dict[str, Any] = {"storage": storage, "study": "dice", "folder": tmp_path}
    first = roll(judge, "evolution", trials=8, population=3, **place)
    assert len(judge.calls) + sum(t.copied_from is not None for t in first.trials) == 8
    assert (tmp_path / "dice" / "study.db").exists() == (storage is None)
    longer = roll(judge, "evolution", trials=14, population=3, **place)
    assert essence(longer)[:8] == essence(first)
    assert essence(longer) == essence(roll(whole, "evolution", trials=14, population=3))
    assert judge.calls == whole.calls


@pytest.mark.parametrize(
    ("strategy", "storage"),
    [
        *itertools.product(("random", "tpe", "nsga2", "nsga3", "evolution", "local_search", "grid"), ("journal",)),
        ("evolution", None),
        pytest.param("gp", "journal", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_search_ends_as_the_unbroken_one(
    tmp_path: Path, strategy: str, storage: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(call: int) -> None:
        if call in (4, 5, 11):
            raise KeyboardInterrupt

    judge, whole = Judge(interrupt), Judge()
    place = kept(tmp_path) | ({} if storage else {"storage": None})
    results = [roll(judge, strategy, trials=16, **place) for _ in range(4)]
    assert "interrupted: this is the result so far; run the same line again to go on" in capsys.readouterr().err
    assert 3 <= len(results[0].trials) == len(results[1].trials) < len(results[2].trials) < len(results[3].trials) == 16
    unbroken = roll(whole, strategy, trials=16, **kept(tmp_path, "whole"))
    assert essence(results[3]) == essence(unbroken)
    assert [len(list(group)) for _, group in itertools.groupby(judge.calls)].count(
        2
    ) == 1  # calls 4 and 5 are one trial
    assert [arch for arch, _ in itertools.groupby(judge.calls)] == whole.calls


def test_a_timeout_ends_the_search_between_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def takes_a_second(call: int) -> None:
        clock.now += 1.0

    place = kept(tmp_path) | {"timeout": 3.5, "strategy": "grid"}
    judge = Judge(takes_a_second)
    assert [len(roll(judge, trials=10, **place).trials) for _ in range(4)] == [4, 8, 10, 10]
    result = roll(judge, trials=10, **place)
    assert [t.seconds for t in result.trials] == [1.0] * 10
    assert [t.number for t in result.trials] == list(range(10))
    assert len(judge.calls) == 10


def test_a_timeout_inside_training_is_continued_there(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[int]
) -> None:
    def search(name: str, **settings: Any) -> SearchResult:
        recipe = QUICK | {"epochs": 2, "batch_size": 32}
        settings |= recipe | kept(tmp_path, name)
        return nb.search(SMALL, data, trials=3, population=2, sample=1, **settings)

    whole = search("whole")
    assert len(fits) == 3
    Clock(monkeypatch, tick=1.0)
    results = [search("broken", timeout=20)]
    while len(results[-1].trials) < 3:
        results.append(search("broken", timeout=20))
        assert len(results) < 20, "it does not get on"
    assert len(fits) > 3 + 3, "no call was stopped inside a training"
    assert essence(results[-1]) == essence(whole)
    assert weights(results[-1].folder) == weights(whole.folder)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_ctrl_c_inside_training_is_continued_there(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    check = nasbench.worker._Run.check

    def interrupt(run: Any) -> None:
        nonlocal steps
        steps += 1
        check(run)
        if steps == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(nasbench.worker._Run, "check", interrupt)

    def search(name: str) -> SearchResult:
        recipe = QUICK | {"epochs": 2, "batch_size": 32}  # 5 steps an epoch
        return nb.search(SMALL, data, "random", trials=2, **kept(tmp_path, name), **recipe)

    assert len(search("broken").trials) == 0
    assert (tmp_path / "broken" / "trials" / "0" / "checkpoint-0.pt").exists()
    broken = search("broken")
    assert steps == 2 * 2 * 5 + 1, "the hook of step 7 is called again, and no step is made twice"
    whole = search("whole")
    assert essence(broken) == essence(whole)
    assert weights(broken.folder) == weights(whole.folder)


def test_an_exhausted_space_ends_the_search_normally(tmp_path: Path) -> None:
    judge = Judge()
    for _ in range(2):
        result = roll(judge, "grid", trials=100, space=Dice(3), **kept(tmp_path))
        assert [t.arch for t in result.trials] == list(Dice(3).archs())
    assert len(judge.calls) == 9


def test_a_full_disk_ends_the_search_at_once_and_costs_no_trial(tmp_path: Path) -> None:
    def full(call: int) -> None:
        if call == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    judge = Judge(full)
    place = kept(tmp_path)
    with pytest.raises(OSError, match="No space left on device"):
        roll(judge, "grid", trials=6, **place)
    result = roll(judge, "grid", trials=6, **place)
    assert [t.state for t in result.trials] == ["complete"] * 6
    assert judge.calls[2] == judge.calls[3]


def test_a_checkpoint_that_cannot_be_written_ends_the_search_at_once(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[int]
) -> None:
    import nasbench.files

    def search() -> SearchResult:
        return nb.search(SMALL, data, "random", trials=2, **kept(tmp_path), **QUICK)

    replace = nasbench.files.os.replace

    def full(source: Any, target: Any) -> None:
        if "checkpoint" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(nasbench.files.os, "replace", full)
        with pytest.raises((OSError, ValueError), match="No space left on device"):
            search()
    assert len(fits) == 1
    assert [t.state for t in search().trials] == ["complete"] * 2


# Duplicates, failures, constraints ---------------------------------------------------------------------------------


def test_an_architecture_is_evaluated_once() -> None:
    judge = Judge()
    result = roll(judge, trials=60)
    assert len(judge.calls) == len(set(judge.calls)) < 36
    copies = [t for t in result.trials if t.copied_from is not None]
    assert len(copies) == 60 - len(judge.calls)
    for t in copies:
        original = result.trials[t.copied_from]
        assert (original.arch, original.metrics, original.copied_from) == (t.arch, t.metrics, None)
        assert original.number < t.number


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: {"score": math.nan}, "SettingError: metric 'score' is nan; a metric must be a finite number"),
        (lambda: {"score": -math.inf}, "SettingError: metric 'score' is -inf"),
        (lambda: {"scores": 1.0}, "SettingError: the objective did not report 'score'; it reported 'scores'"),
        (lambda: {"score": "good"}, "SettingError: metric 'score' is 'good'"),
        (lambda: 0.5, "SettingError: the objective returned float 0.5, not a mapping of metrics"),
        (lambda: {"score": 1.0, "cost": math.nan}, "SettingError: metric 'cost' is nan"),
    ],
)
def test_a_failed_trial_is_stored_with_its_reason(answer: Callable[[], Any], reason: str) -> None:
    calls = itertools.count()

    def judge(arch: Arch) -> Any:
        return answer() if next(calls) == 1 else points(arch)

    result = roll(judge, "grid", trials=3)
    assert [t.state for t in result.trials] == ["complete", "failed", "complete", "complete"]
    failed = result.trials[1]
    assert failed.reason is not None
    assert failed.reason.startswith(reason)
    assert failed.metrics == {}


def test_five_failures_in_a_row_end_the_search_and_a_later_call_goes_on(tmp_path: Path) -> None:
    def fail(call: int) -> None:
        if 3 <= call <= 7:
            raise RuntimeError(f"call {call} met a bug")

    judge = Judge(fail)
    place = kept(tmp_path)
    with pytest.raises(StudyError, match="5 trials in a row failed, so the search stopped") as stop:
        roll(judge, "grid", trials=5, **place)
    for number in range(2, 7):
        assert f"trial {number}: RuntimeError: call {number + 1} met a bug" in str(stop.value)
    assert "Mend the cause and run the same line again: finished trials are kept." in str(stop.value)
    assert len(judge.calls) == 7
    result = roll(judge, "grid", trials=5, **place)
    assert [t.state for t in result.trials] == ["complete"] * 2 + ["failed"] * 5 + ["complete"] * 3
    assert len(judge.calls) == 10


def test_an_error_of_the_objective_about_an_architecture_is_a_failure() -> None:
    def judge(arch: Arch) -> dict[str, float]:
        return {"score": SPACE.index(arch)}

    with pytest.raises(
        StudyError, match=r"(?s)5 trials in a row failed.*ArchError: an architecture of NASBench201 need"
    ):
        roll(judge)


def test_failures_that_are_not_in_a_row_do_not_end_the_search() -> None:
    def fail(call: int) -> None:
        if call % 5:
            raise RuntimeError

    result = roll(Judge(fail), trials=4, space=Dice(40))
    assert [t.state for t in result.trials].count("failed") == 16


def test_a_constraint_on_size_is_checked_before_training(data: Data, tmp_path: Path, fits: list[int]) -> None:
    indices = tuple(SPACE.index(SPACE.parse(text)) for text in (CELL, OTHER))

    @dataclass(frozen=True)
    class Turns(Strategy):
        """Proposes one and the other in turns, of all trials."""

        def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
            return space.at(indices[round(rng.random())])

    big, small = (
        sum(p.numel() for p in SMALL.bind(data).build(SPACE.parse(text)).parameters()) for text in (CELL, OTHER)
    )
    limit = (big + small) // 2
    result = nb.search(SMALL, data, Turns(), trials=3, constraints=f"params<{limit}", **kept(tmp_path), **QUICK)
    pruned = [t for t in result.trials if t.state == "pruned"]
    assert len(result.complete) == 3
    assert pruned, "no violator was proposed: choose another seed"
    assert {t.reason for t in pruned} == {f"params = {big:g} breaks params<{limit:g}"}
    assert {t.metrics["params"] for t in result.complete} == {small}
    assert len(fits) == 1


def test_a_constraint_on_what_is_reported_is_checked_after() -> None:
    judge = Judge()
    result = roll(judge, trials=20, constraints=["cost<=6", "score>3"])
    assert len(result.complete) == 20
    assert all(t.metrics["cost"] <= 6 and t.metrics["score"] > 3 for t in result.complete)
    pruned = [t for t in result.trials if t.state == "pruned"]
    assert all("breaks cost<=6" in (t.reason or "") or "breaks score>3" in (t.reason or "") for t in pruned)
    assert {t.arch for t in pruned} == {a for a in judge.calls if points(a)["cost"] > 6 or points(a)["score"] <= 3}


def test_a_violator_is_evaluated_once_too() -> None:
    judge = Judge()
    roll(judge, trials=40, space=Dice(4), constraints="score>4")
    assert len(judge.calls) == len(set(judge.calls))


@pytest.mark.parametrize("strategy", ["grid", "local_search"])
def test_strategies_that_walk_a_list_get_past_violators(strategy: str) -> None:
    judge = Judge()
    result = roll(judge, strategy, trials=9 if strategy == "grid" else 30, space=Dice(4), constraints="score>4")
    good = {arch for arch in Dice(4).archs() if points(arch)["score"] > 4}
    assert {t.arch for t in result.complete} <= good
    assert len(result.complete) == (9 if strategy == "grid" else 30)


def test_a_thousand_violators_in_a_row_end_the_search() -> None:
    with pytest.raises(
        StudyError, match="1000 architectures in a row broke score<0, so the search stopped. Loosen the"
    ):
        roll(Judge(), trials=1, space=Dice(2), constraints="score<0")


# Several objectives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["nsga2", "tpe", "random", "grid"])
def test_several_objectives_give_a_front(strategy: str) -> None:
    result = roll(Judge(), strategy, objectives={"score": "maximize", "cost": "minimize"}, trials=30)
    assert len(result.complete) == 30

    def beats(a: nb.Trial, b: nb.Trial) -> bool:
        better = a.metrics["score"] >= b.metrics["score"] and a.metrics["cost"] <= b.metrics["cost"]
        return better and a.metrics != b.metrics

    front = {t.arch for t in result.trials if not any(beats(other, t) for other in result.trials)}
    assert len(front) > 1
    assert {t.arch for t in result.pareto()} == front
    assert len(result.pareto()) == len(front)
    with pytest.raises(StudyError, match="there is no single best for score, cost"):
        _ = result.best


def test_weights_of_the_whole_front_are_kept(data: Data, tmp_path: Path) -> None:
    result = nb.search(
        SMALL,
        data,
        "nsga2",
        objectives=["val_accuracy", "params"],
        trials=4,
        **kept(tmp_path),
        population_size=4,
        **QUICK,
    )
    assert weights(result.folder).keys() == {t.number for t in result.pareto()}
    for t in result.pareto():
        assert nb.validate(t.build(), data)["val_accuracy"] == t.metrics["val_accuracy"]


# Pruners -----------------------------------------------------------------------------------------------------------


class OddOnesOut(optuna.pruners.BasePruner):
    """Ends every second trial after its second epoch."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return trial.number % 2 == 1 and trial.last_step == 2


def test_pruned_trials_count_and_leave_their_values(data: Data, tmp_path: Path) -> None:
    recipe = QUICK | {"epochs": 4}
    result = nb.search(SMALL, data, "random", trials=4, pruner=OddOnesOut(), **kept(tmp_path), **recipe)
    assert [t.state for t in result.trials] == ["complete", "pruned", "complete", "pruned"]
    assert (result.trials[1].metrics, result.trials[1].copied_from) == ({}, None)
    stored = optuna.load_study(study_name="dice", storage=open_storage(f"{tmp_path}/all.log", tmp_path)).trials
    assert [list(t.intermediate_values) for t in stored] == [[1, 2, 3], [1, 2], [1, 2, 3], [1, 2]]
    last = stored[1].intermediate_values[2]
    assert result.trials[1].reason == f"stopped by the pruner after epoch 2 at {last:.4f}"
    with pytest.raises(WeightsError, match="trial 1 is pruned"):
        result.trials[1].build()
    assert weights(result.folder).keys() == {result.best.number}


@pytest.mark.parametrize(
    ("pruner", "strategy"),
    [
        ("median", {"population": 2, "sample": 1}),
        ("halving", {"population": 2, "sample": 1}),
        ("hyperband", {"population": 2, "sample": 1}),
        ("hyperband", {"strategy": "tpe", "n_startup_trials": 2}),
    ],
)
def test_pruners_by_name_do_not_disturb_resuming(
    data: Data, tmp_path: Path, pruner: str, strategy: dict[str, Any]
) -> None:
    def search(folder: str, trials: int) -> SearchResult:
        # The study has one name in two folders: Optuna's hyperband deals trials into brackets by it.
        settings = QUICK | {"epochs": 3} | strategy | kept(tmp_path / folder)
        return nb.search(SMALL, data, trials=trials, pruner=pruner, **settings)

    search("broken", 3)
    broken = search("broken", 6)
    assert len(broken.trials) == 6
    assert {t.state for t in broken.trials} <= {"complete", "pruned"}
    assert essence(broken) == essence(search("whole", 6))


def test_a_function_may_prune() -> None:
    def judge(arch: Arch) -> dict[str, float]:
        if arch["a"] == arch["b"]:
            raise optuna.TrialPruned("a double")
        return points(arch)

    result = roll(judge, "grid", trials=9, space=Dice(3))
    assert [t.arch for t in result.trials] == list(Dice(3).archs())
    doubles = [t for t in result.trials if t.arch["a"] == t.arch["b"]]
    assert [(t.state, t.reason) for t in doubles] == [("pruned", "a double")] * 3
    assert len(result.complete) == 6


# Studies and samplers of one's own ---------------------------------------------------------------------------------


def test_an_optuna_study_of_ones_own(tmp_path: Path) -> None:
    mine = optuna.create_study(direction="maximize")
    judge = Judge()
    first = roll(judge, "evolution", trials=6, study=mine)
    assert list(tmp_path.iterdir()) == []
    assert [t.value for t in mine.trials] == [t.metrics["score"] for t in first.trials]
    assert [Arch(t.params) for t in mine.trials] == [t.arch for t in first.trials]
    assert mine.best_params == dict(first.best.arch)
    longer = roll(judge, "evolution", trials=12, study=mine)
    assert essence(longer) == essence(roll(Judge(), "evolution", trials=12))


def test_an_optuna_study_of_ones_own_keeps_networks_in_a_folder(data: Data, tmp_path: Path) -> None:
    mine = optuna.create_study(study_name="mine", direction="maximize")
    result = nb.search(SMALL, data, "random", trials=1, study=mine, folder=tmp_path, **QUICK)
    assert result.folder == tmp_path / "mine"
    assert nb.validate(result.best.build(), data)["val_accuracy"] == mine.best_value


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler(seed=5), optuna.samplers.TPESampler(seed=5)])
def test_an_optuna_sampler_of_ones_own(sampler: optuna.samplers.BaseSampler) -> None:
    result = roll(Judge(), sampler, trials=15)
    assert len(result.complete) == 15
    assert result.conditions["strategy"] == {"name": f"optuna:{type(sampler).__name__}"}


def test_a_strategy_object_is_what_its_name_makes() -> None:
    by_name = roll(Judge(), "evolution", population=4, sample=2)
    by_object = roll(Judge(), RegularizedEvolution(population=4, sample=2))
    assert essence(by_name) == essence(by_object)
    assert by_name.conditions["strategy"] == by_object.conditions["strategy"]


# Refusing to continue ----------------------------------------------------------------------------------------------


def copied(trained: SearchResult, tmp_path: Path) -> dict[str, Any]:
    """Return where a copy of the trained study lies."""
    assert trained.folder is not None
    shutil.copytree(trained.folder, tmp_path / "digits")
    return {"study": "digits", "folder": tmp_path, "trials": 6, **QUICK}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"space": NASBench201(channels=8, cells=1)}, "written with space channels=4; this call has channels=8"),
        ({"seed": 7}, r"written with objective seeds=\[0\]; this call has seeds=\[7\]"),
        ({"lr": 0.05}, "written with objective lr=0.1; this call has lr=0.05"),
        ({"population": 5}, "written with strategy population=4; this call has population=5"),
        ({"strategy": "local_search"}, "written with strategy name=evolution, .*this call has name=local_search"),
        (
            {"objectives": "val_loss"},
            "written with objectives val_accuracy=maximize.*; this call has .*val_loss=minimize",
        ),
        ({"constraints": "params<1e6"}, r"written with constraints \[\]; this call has \['params<1e\+06'\]"),
        ({"metrics": ["bytes"]}, r"written with objective extra=\[\]; this call has extra=\['bytes'\]"),
        ({"pruner": "median"}, "written with pruner None; this call has median"),
    ],
)
def test_a_study_of_other_settings_is_not_continued(
    trained: SearchResult, data: Data, fits: list[int], changes: dict[str, Any], match: str
) -> None:
    assert trained.folder is not None
    given: dict[str, Any] = {"space": SMALL, "strategy": "evolution", "population": 4, "trials": 9} | changes
    if given["strategy"] != "evolution":
        del given["population"]
    with pytest.raises(ResumeError, match=f"study 'digits' was {match}"):
        nb.search(data=data, study="digits", folder=trained.folder.parent, **QUICK, **given)
    assert fits == []


def test_a_study_of_another_split_is_not_continued(trained: SearchResult, fits: list[int]) -> None:
    assert trained.folder is not None
    other = load("digits", train_images=200, seed=1)
    with pytest.raises(ResumeError, match=rf"written with objective fingerprint=.*fingerprint={other.fingerprint}"):
        nb.search(SMALL, other, trials=9, population=4, study="digits", folder=trained.folder.parent, **QUICK)
    assert fits == []


def test_a_study_of_another_function_is_not_continued(tmp_path: Path) -> None:
    roll(points, trials=1, **kept(tmp_path))
    with pytest.raises(
        ResumeError, match=r"written with objective function=.*\.points; this call has function=.*Judge"
    ):
        roll(Judge(), trials=2, **kept(tmp_path))


def test_other_threads_are_a_warning_at_the_users_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roll(points, trials=1, study="dice", folder=tmp_path)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.warns(UserWarning, match=rf"'dice' continues .*threads {threads} before, 99 now") as warned:
        nb.search(Dice(), points, "random", objectives={"score": "maximize"}, trials=1, study="dice", folder=tmp_path,
                  progress=False)  # fmt: skip
    assert warned[0].filename == __file__


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_a_damaged_study_says_what_to_do(tmp_path: Path, damage: str) -> None:
    roll(points, trials=2, study="dice", folder=tmp_path)
    file = tmp_path / "dice" / "study.db"
    file.write_bytes(b"no database " * 900 if damage == "garbage" else file.read_bytes()[:20_000])
    with pytest.raises(StudyError, match=r"restore it from a copy, or delete the study's folder and start again"):
        roll(points, trials=4, study="dice", folder=tmp_path)


def test_a_study_of_others_is_left_alone(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/all.db"
    theirs = optuna.create_study(study_name="dice", storage=storage)
    theirs.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    with pytest.raises(
        ResumeError, match="study 'dice' in this storage was not written by nasbench. Choose another name"
    ):
        roll(points, trials=4, study="dice", storage=storage, folder=tmp_path)
    assert len(theirs.trials) == 2


# Joining -----------------------------------------------------------------------------------------------------------


def test_join_needs_the_name_only(trained: SearchResult, tmp_path: Path, fits: list[int]) -> None:
    copied(trained, tmp_path)
    again = nb.join("digits", folder=tmp_path, device="cpu", progress=False)
    assert fits == []
    assert [e[:4] for e in essence(again)] == [e[:4] for e in essence(trained)]
    longer = nb.join("digits", folder=tmp_path, trials=7, device="cpu", progress=False)
    assert len(longer.trials) == 7
    assert len(fits) <= 1


def test_join_says_what_it_cannot_do(table: nb.Table, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="there is no study 'dice' in .*/. Name another folder, or give its storage"):
        nb.join("dice", folder=tmp_path)
    roll(points, trials=1, study="dice", folder=tmp_path)
    with pytest.raises(
        StudyError, match="'dice' evaluates a function objective that no other process can rebuild. Run"
    ):
        nb.join("dice", folder=tmp_path)
    nb.search(SPACE, table, trials=1, study="table", folder=tmp_path, progress=False)
    with pytest.raises(StudyError, match="'table' evaluates a table objective that no other process can rebuild"):
        nb.join("table", folder=tmp_path)


@pytest.mark.parametrize("trials", [0, -1])
def test_join_needs_a_number_of_trials(trained: SearchResult, trials: int) -> None:
    assert trained.folder is not None
    with pytest.raises(SettingError, match=f"trials={trials}: a search needs a whole number of trials, at least 1"):
        nb.join("digits", folder=trained.folder.parent, trials=trials, progress=False)


@pytest.mark.parametrize("own", [{"strategy": Listed((3,))}, {"strategy": "random", "pruner": OddOnesOut()}])
def test_join_says_where_an_object_has_to_be_given(data: Data, tmp_path: Path, own: dict[str, Any]) -> None:
    nb.search(SMALL, data, trials=1, **own, **kept(tmp_path), **QUICK)
    with pytest.raises(StudyError, match="Run the same search line in each process instead"):
        nb.join("dice", f"{tmp_path}/all.log", folder=tmp_path, device="cpu", progress=False)


# What a person sees ------------------------------------------------------------------------------------------------


def test_progress_is_shown_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roll(points, trials=3, **kept(tmp_path, "quiet"))
    assert capsys.readouterr() == ("", "")
    roll(points, "grid", trials=3, **kept(tmp_path, "loud"), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
    assert "best score 3.1" in shown.err
    assert f"report: {tmp_path / 'loud' / 'report.html'}" in shown.err


# Bad input, before any work ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kit(data: Data, table: nb.Table) -> SimpleNamespace:
    arrays = nb.data.from_arrays(np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2)
    return SimpleNamespace(data=data, table=table, arrays=arrays)


def asked(**changes: Any) -> Callable[[SimpleNamespace], dict[str, Any]]:
    """A search in the table, with changes; strings that begin with "kit." are taken from there."""

    def fill(kit: SimpleNamespace) -> dict[str, Any]:
        given = {"space": SPACE, "data": "kit.table", "trials": 2, "progress": False} | changes
        return {
            k: getattr(kit, v.removeprefix("kit.")) if isinstance(v, str) and v.startswith("kit.") else v
            for k, v in given.items()
        }

    return fill


TRAIN: dict[str, Any] = {"space": SMALL, "data": "kit.data", **QUICK}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    # budgets
    ({"trials": 0}, SettingError, "trials=0: a search needs a whole number of trials, at least 1"),
    ({"trials": -3}, SettingError, "trials=-3: a search needs a whole number of trials"),
    ({"trials": True}, SettingError, "trials=True: a search needs a whole number of trials"),
    ({"trials": 2.0}, SettingError, "trials=2.0: a search needs a whole number of trials"),
    ({"timeout": 0}, SettingError, "timeout=0: give a positive number of seconds, or leave it out"),
    ({"timeout": -1.5}, SettingError, "timeout=-1.5: give a positive number of seconds"),
    ({"timeout": math.nan}, SettingError, "timeout=nan: give a positive number of seconds"),
    ({"workers": 0}, SettingError, "workers=0: a search needs at least one worker"),
    ({"workers": True}, SettingError, "workers=True: a search needs at least one worker"),
    ({"workers": 2}, SettingError, "workers=2 starts processes that load the data by name; this objective cannot"),
    (
        {"workers": 2, "data": points, "objectives": "cost_acc"},
        SettingError,
        "workers=2 starts processes that load the data by name",
    ),
    (
        TRAIN | {"workers": 2, "data": "kit.arrays"},
        SettingError,
        "workers=2 starts processes that load the data by name",
    ),
    (TRAIN | {"seed": -1}, SettingError, "seed=-1"),
    # spaces and data
    (
        {"space": "nasbench201"},
        SettingError,
        r"space is 'nasbench201', not a SearchSpace. Try search_spaces.NASBench201",
    ),
    ({"space": NASBench201}, SettingError, "space is <class '.*NASBench201'>, not a SearchSpace"),
    ({"space": ResNet()}, TableError, "this is a table of NASBench201, asked about ResNet"),
    (
        TRAIN | {"space": NASBench201(classes=7)},
        ArchError,
        "was made with classes=7, the data has 10. Leave classes out",
    ),
    (TRAIN | {"space": NASBench201(in_channels=3)}, ArchError, "was made with in_channels=3, the data has 1"),
    ({"data": "digits"}, SettingError, r"data is str 'digits': give nasbench.data.load\(...\), a Table, or a function"),
    ({"data": None}, SettingError, "data is NoneType None: give nasbench.data.load"),
    ({"data": np.zeros(3)}, SettingError, "data is ndarray .*: give nasbench.data.load"),
    # strategies and settings
    ({"strategy": "evolutoin"}, SettingError, "no strategy is called 'evolutoin'; did you mean 'evolution'"),
    ({"strategy": "cmaes"}, SettingError, "Optuna's 'cmaes' is not offered: CMA-ES cannot handle named options"),
    (
        {"strategy": RegularizedEvolution},
        SettingError,
        "strategy is <class .*: give a name, a Strategy, a OneShot or an Optuna samp",
    ),
    ({"populatoin": 5}, SettingError, "'evolution' has no setting 'populatoin'; did you mean 'population'"),
    ({"population": 0}, SettingError, "RegularizedEvolution draws sample=3 of population=0 members"),
    (
        {"strategy": "tpe", "n_startup": 5},
        SettingError,
        "TPESampler has no option 'n_startup'; did you mean 'n_startup_tr",
    ),
    (TRAIN | {"epoch": 2}, SettingError, "'epoch'; did you mean 'epochs'"),
    (
        {"strategy": RegularizedEvolution(), "population": 5},
        SettingError,
        "search has no setting 'population'; .*A strategy that is given as an object carries its own settings",
    ),
    ({"epochs": 3}, SettingError, "'epochs' is about training, but nothing is trained: the metrics come from Table"),
    (
        {"recipe": nb.Recipe(), "data": points},
        SettingError,
        "'recipe' is about training, but nothing is trained: .* func",
    ),
    (TRAIN | {"epochs": 0}, SettingError, "recipe: epochs=0, but it must be a whole number, 1 or more"),
    (TRAIN | {"recipe": {"lr": 0.1}}, SettingError, "recipe is dict"),
    (TRAIN | {"device": "gpu"}, SettingError, "gpu"),
    # objectives, metrics, constraints
    ({"objectives": []}, SettingError, "objectives is empty: name at least one metric"),
    ({"objectives": "val_acuracy"}, SettingError, "does not report 'val_acuracy'; did you mean 'val_accuracy'"),
    ({"objectives": {"val_accuracy": "up"}}, SettingError, 'direction \'up\'; choose "maximize" or "minimize"'),
    ({"data": points}, SettingError, r'name what to optimise: objectives=\{"score": "maximize"\}'),
    ({"data": points, "objectives": "score"}, SettingError, r"is more 'score' better\? Say objectives="),
    (
        {"objectives": ["val_accuracy", "test_accuracy"]},
        SettingError,
        'RegularizedEvolution follows one .*Use strategy="ns',
    ),
    ({"metrics": ["test_acuracy"]}, SettingError, "does not report 'test_acuracy'; did you mean 'test_accuracy'"),
    ({"constraints": "params"}, SettingError, "'params' is no constraint. Write a metric, a sign and a number"),
    (
        {"constraints": ["val_accuracy>0", "params<1"]},
        SettingError,
        "the objective does not report 'params'; .*Known: tes",
    ),
    # pruners
    ({"pruner": "median"}, SettingError, "a pruner compares validation accuracies between epochs: it needs data"),
    (TRAIN | {"pruner": "medain"}, SettingError, "no pruner is called 'medain'; did you mean 'median'"),
    (TRAIN | {"pruner": 3}, SettingError, "pruner"),
    (TRAIN | {"pruner": "median", "objectives": "macs"}, SettingError, "a pruner compares validation accuracies"),
    (
        TRAIN | {"pruner": "median", "strategy": "nsga2", "objectives": ["val_accuracy", "macs"]},
        SettingError,
        "a pruner follows one objective, not val_accuracy, macs. Leave pruner out",
    ),
    # places
    ({"study": "a/b"}, SettingError, "study name 'a/b' cannot be a folder name"),
    ({"storage": "study.db"}, SettingError, "storage 'study.db' is neither a URL nor a journal file. Write sqlite:///"),
    ({"storage": "sqlite:////no/such/x.db"}, StudyError, "storage 'sqlite:////no/such/x.db' cannot be opened"),
    (
        {"study": optuna.create_study()},
        SettingError,
        r"has directions \['minimize'\], the objectives need \['maximize'\]",
    ),
    ({"study": "a", "folder": __file__}, StudyError, "cannot write to the study's folder .*test_study.py/a"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BAD, ids=[match[:40] for *_, match in BAD])
def test_bad_input_is_named_before_any_work(
    kit: SimpleNamespace, fits: list[int], changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        nb.search(**asked(**changes)(kit))
    assert fits == []


def test_names_of_spaces_and_data_are_checked_where_they_are_made() -> None:
    from search_spaces import space

    with pytest.raises(ArchError, match="no search space 'nasbench21'; did you mean 'nasbench201'"):
        space("nasbench21")
    with pytest.raises(DataError, match="no data set 'digit', .*did you mean 'digits'"):
        load("digit")
