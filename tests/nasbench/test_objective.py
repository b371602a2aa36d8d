"""Objectives: metrics of an architecture, trained, looked up or computed; constraints; what to optimise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nasbench as nb
from nasbench import training
from nasbench.data import Data, load
from nasbench.errors import SettingError
from nasbench.objective import (
    WEIGHTS,
    Constraint,
    FunctionObjective,
    TableObjective,
    TrainObjective,
    TrialRun,
    checked,
    resolve,
    save_weights,
)
from nasbench.recipe import Recipe
from search_spaces import NASBench201

SPACE = NASBench201()
CELL = "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"
SAME = "|skip_connect~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|none~2|"  # computes what CELL computes


@pytest.fixture(scope="module")
def data() -> Data:
    return load("digits", train_images=200)


@pytest.fixture(scope="module")
def table() -> nb.Table:
    numbers = np.arange(SPACE.size, dtype=np.float64)
    return nb.Table(SPACE, {"val_accuracy": np.stack([numbers, numbers + 1], 1), "score": -numbers})


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all trainings, in order."""
    seeds: list[int] = []
    fit = training.fit

    def counting(*args: Any, **settings: Any) -> Any:
        seeds.append(settings["seed"])
        return fit(*args, **settings)

    monkeypatch.setattr(training, "fit", counting)
    return seeds


def trainer(data: Data, *, epochs: int = 1, **settings: Any) -> TrainObjective:
    space = NASBench201(channels=4, cells=1).bind(data)
    return TrainObjective(space, data, Recipe(epochs=epochs, batch_size=32), device="cpu", **settings)


def trial_in(folder: Path | None) -> TrialRun:
    run = TrialRun()
    run.folder = folder
    return run


# Trained -----------------------------------------------------------------------------------------------------------


def test_training_reports_these_metrics_and_no_others(data: Data) -> None:
    objective = trainer(data)
    metrics = objective(SPACE.parse(CELL), TrialRun())
    assert set(metrics) == {"val_accuracy", "val_loss", "params", "macs"}
    torch.manual_seed(0)
    network = objective.space.build(objective.key(SPACE.parse(CELL)))
    assert metrics["params"] == sum(p.numel() for p in network.parameters())
    nb.fit(network, data, objective.recipe, seed=0, device="cpu", progress=False)
    assert nb.validate(network, data) == {name: metrics[name] for name in ("val_accuracy", "val_loss")}


def test_metrics_are_a_function_of_the_canonical_architecture(data: Data) -> None:
    assert SPACE.parse(CELL) != SPACE.parse(SAME)
    objective = trainer(data)
    torch.manual_seed(5)
    first = objective(SPACE.parse(CELL), TrialRun())
    torch.manual_seed(6)
    assert objective(SPACE.parse(SAME), TrialRun()) == first
    assert objective.key(SPACE.parse(SAME)) == objective.key(SPACE.parse(CELL))
    assert trainer(data, seeds=(1,))(SPACE.parse(CELL), TrialRun()) != first


def test_training_leaves_the_global_random_numbers_alone(data: Data) -> None:
    before = torch.get_rng_state()
    trainer(data)(SPACE.parse(CELL), TrialRun())
    assert torch.equal(torch.get_rng_state(), before)


def test_expensive_metrics_are_measured_where_they_are_wanted(data: Data) -> None:
    objective = trainer(data)
    objective.want(["val_accuracy", "latency_ms", "bytes", "peak_bytes"])
    assert objective.extra == ("bytes", "peak_bytes", "latency_ms")
    metrics = objective(SPACE.parse(CELL), TrialRun())
    assert set(metrics) == {"val_accuracy", "val_loss", "params", "macs", "bytes", "peak_bytes", "latency_ms"}
    assert metrics["bytes"] > 4 * metrics["params"]  # the batch norms' buffers are stored too
    assert metrics["latency_ms"] > 0


def test_a_preview_trains_nothing(data: Data, fits: list[int]) -> None:
    objective = trainer(data)
    arch = SPACE.parse(CELL)
    assert objective.preview(arch, ["val_accuracy"]) == {}
    known = objective.preview(arch, ["macs", "val_accuracy", "params", "bytes"])
    assert set(known) == {"macs", "params", "bytes"}
    assert fits == []
    metrics = objective(arch, TrialRun())
    assert {name: metrics[name] for name in ("macs", "params")} == {name: known[name] for name in ("macs", "params")}


def test_several_seeds_give_means_and_keep_each_run(data: Data, tmp_path: Path) -> None:
    singles = [trainer(data, seeds=(seed,))(SPACE.parse(CELL), TrialRun()) for seed in (3, 4)]
    run = trial_in(tmp_path)
    metrics = trainer(data, seeds=(3, 4))(SPACE.parse(CELL), run)
    assert set(metrics) == {"val_accuracy", "val_loss", "params", "macs"}
    for name in ("val_accuracy", "val_loss"):
        assert [r[name] for r in run.runs] == [single[name] for single in singles]
        assert metrics[name] == sum(single[name] for single in singles) / 2
    assert all(set(r) == {"val_accuracy", "val_loss", "seconds"} and r["seconds"] > 0 for r in run.runs)


def test_seeds_that_are_done_are_not_trained_again(data: Data, tmp_path: Path, fits: list[int]) -> None:
    class Stop(TrialRun):
        folder = tmp_path

        def check(self) -> None:
            if fits == [3, 4]:
                raise KeyboardInterrupt

    objective = trainer(data, seeds=(3, 4))
    with pytest.raises(KeyboardInterrupt):
        objective(SPACE.parse(CELL), Stop())
    run = trial_in(tmp_path)
    metrics = objective(SPACE.parse(CELL), run)
    assert fits == [3, 4, 4]
    whole = TrialRun()
    assert objective(SPACE.parse(CELL), whole) == metrics
    for seed in (0, 1):
        assert {**run.runs[seed], "seconds": 0} == {**whole.runs[seed], "seconds": 0}


def test_the_weights_of_the_first_seed_are_kept(data: Data, tmp_path: Path) -> None:
    objective = trainer(data, seeds=(3, 4))
    run = trial_in(tmp_path)
    objective(SPACE.parse(CELL), run)
    network = objective.space.build(objective.key(SPACE.parse(CELL)))
    network.load_state_dict(load_file(tmp_path / WEIGHTS))
    assert nb.validate(network, data)["val_accuracy"] == run.runs[0]["val_accuracy"]


def test_test_images_are_read_on_request_only(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = trainer(data, test=True)(SPACE.parse(CELL), TrialRun())
    assert {"test_accuracy", "test_loss"} < set(metrics)

    def forbidden(*_: Any) -> Iterator[Any]:
        raise AssertionError("test images were read")

    monkeypatch.setattr(type(data), "_test_batches", forbidden)
    assert "test_accuracy" not in trainer(data)(SPACE.parse(CELL), TrialRun())


def test_a_watched_trial_reports_after_every_epoch_but_the_last(data: Data) -> None:
    class Watched(TrialRun):
        watched = True

        def __init__(self) -> None:
            self.heard: list[tuple[int, float]] = []

        def report(self, epoch: int, value: float) -> None:
            self.heard.append((epoch, value))

    run = Watched()
    unwatched = trainer(data, epochs=3)(SPACE.parse(CELL), TrialRun())
    assert trainer(data, epochs=3)(SPACE.parse(CELL), run) == unwatched
    assert [epoch for epoch, _ in run.heard] == [1, 2]
    assert all(0 <= value <= 1 for _, value in run.heard)


def test_an_objective_is_made_again_from_its_settings(data: Data) -> None:
    objective = trainer(data, seeds=(2, 7))
    objective.want(["val_accuracy", "bytes"])
    settings = json.loads(json.dumps(objective.settings()))
    again = TrainObjective.from_settings(NASBench201(channels=4, cells=1), settings, device="cpu")
    assert (again.recipe, again.seeds, again.data.fingerprint) == (objective.recipe, (2, 7), data.fingerprint)
    assert again.space == objective.space
    again.want(objective.wanted)
    assert again.settings() == objective.settings()


def test_weights_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    network = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    save_weights(network, tmp_path / "a" / "w.safetensors")
    stored = load_file(tmp_path / "a" / "w.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in network.state_dict().items())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*w\.safetensors.*name a folder you can write to"):
        save_weights(network, tmp_path / "file" / "w.safetensors")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["w.safetensors"]


# Looked up and computed --------------------------------------------------------------------------------------------


def test_a_table_is_asked_for_the_very_architecture_and_the_wanted_metrics(table: nb.Table) -> None:
    objective = TableObjective(table)
    assert (objective.default, objective.names, objective.trains) == ("val_accuracy", ("val_accuracy", "score"), False)
    objective.want(["val_accuracy"])
    for text in (CELL, SAME):
        arch = SPACE.parse(text)
        assert objective(arch, TrialRun()) == {"val_accuracy": SPACE.index(arch) + 0.5}
        assert objective.key(arch) == arch
    assert objective.settings() == {"kind": "table", "table": table.fingerprint}


def test_a_table_without_validation_accuracy_has_no_default(table: nb.Table) -> None:
    other = nb.Table(SPACE, {"score": table.values("score")})
    with pytest.raises(SettingError, match=r'name what to optimise: objectives=\{"score": "maximize"\}. It reports s'):
        resolve(None, TableObjective(other))


def test_a_function_is_known_by_its_name() -> None:
    class Judge:
        def __call__(self, arch: Any) -> dict[str, float]:
            return {"score": len(arch)}

    objective = FunctionObjective(Judge())
    assert objective.settings()["function"].endswith("test_a_function_is_known_by_its_name.<locals>.Judge")
    assert objective(SPACE.parse(CELL), TrialRun()) == {"score": 6}
    assert FunctionObjective(math.hypot).settings() == {"kind": "function", "function": "math.hypot"}  # type: ignore[arg-type]


# Checking metrics --------------------------------------------------------------------------------------------------


def test_checked_metrics_are_plain_numbers() -> None:
    given = {"a": np.float32(0.5), "b": 3, "c": torch.tensor(2.0), "d": np.int64(4), "e": True}
    found = checked(given, ["a", "b"])
    assert found == {"a": 0.5, "b": 3, "c": 2.0, "d": 4.0, "e": 1}
    assert [type(value) for value in found.values()] == [float, int, float, float, int]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("metrics", "match"),
    [
        ({"other": 1.0}, "the objective did not report 'score'; it reported 'other'."),
        ({}, "the objective did not report 'score'"),
        ({"score": math.nan}, "metric 'score' is nan; a metric must be a finite number"),
        ({"score": 1.0, "cost": -math.inf}, "metric 'cost' is -inf; a metric must be a finite number"),
        ({"score": "0.9"}, "metric 'score' is '0.9'; a metric must be a finite number"),
        ({"score": None}, "metric 'score' is None; a metric must be a finite number"),
    ],
)
def test_bad_metrics_are_named(metrics: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        checked(metrics, ["score"])


def test_a_function_that_returns_no_mapping_is_told_what_to_return() -> None:
    with pytest.raises(SettingError, match=r'returned float 0.9, not a mapping of metrics. Return .*\{"score": 0.9\}'):
        FunctionObjective(lambda arch: 0.9)(SPACE.parse(CELL), TrialRun())  # type: ignore[arg-type, return-value]


# Constraints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "below", "at", "above"),
    [
        ("params<1e6", True, False, False),
        (" params <= 1000000 ", True, True, False),
        ("params>1_000_000", False, False, True),
        ("params>=1e6", False, True, True),
    ],
)
def test_a_constraint_bounds_a_metric(text: str, below: bool, at: bool, above: bool) -> None:
    limit = Constraint.parse(text)
    assert limit.metric == "params"
    assert (limit.holds(999_999), limit.holds(1_000_000), limit.holds(1_000_001)) == (below, at, above)


@pytest.mark.parametrize("text", ["params<1e+06", "macs<=1234567", "val_accuracy>=0.123456789", "latency_ms<2.5"])
def test_a_constraint_is_written_as_it_is_read(text: str) -> None:
    limit = Constraint.parse(text)
    assert Constraint.parse(str(limit)) == limit


def test_a_round_bound_is_written_shortly() -> None:
    assert str(Constraint.parse("params < 1000000")) == "params<1e+06"


@pytest.mark.parametrize(
    "text",
    [
        *("params", "params<", "<1e6", "params=1e6", "params<<1e6", "params<1e6<2e6", "params<1 macs<2", "1e6>params"),
        *("params<many", "params<nan", "", 5, None),
    ],
)
def test_what_is_no_constraint_is_refused(text: Any) -> None:
    with pytest.raises(SettingError, match=r'is no constraint. Write a metric, a sign and a number: "params<1e6"'):
        Constraint.parse(text)


# What to optimise --------------------------------------------------------------------------------------------------


def test_objectives_are_resolved_to_directions(table: nb.Table, data: Data) -> None:
    function, trained = FunctionObjective(lambda arch: {}), trainer(data)
    assert resolve(None, trained) == {"val_accuracy": "maximize"}
    assert resolve("val_loss", trained) == {"val_loss": "minimize"}
    assert resolve(["val_accuracy", "macs"], trained) == {"val_accuracy": "maximize", "macs": "minimize"}
    assert resolve({"macs": "maximize"}, trained) == {"macs": "maximize"}
    assert resolve({"score": "minimize"}, TableObjective(table)) == {"score": "minimize"}
    assert resolve(("top5_acc", "params"), function) == {"top5_acc": "maximize", "params": "minimize"}
    assert list(resolve(["params", "val_loss", "params"], function)) == ["params", "val_loss"]


@pytest.mark.parametrize(
    ("objectives", "match"),
    [
        ([], 'objectives is empty: name at least one metric, such as "val_accuracy"'),
        ({}, "objectives is empty"),
        ("val_acuracy", "does not report 'val_acuracy'; did you mean 'val_accuracy'"),
        ("score", r'is more \'score\' better\? Say objectives=\{"score": "maximize"\} or "minimize"'),
        ({"score": "up"}, "objective 'score' has direction 'up'; choose \"maximize\" or \"minimize\""),
        ({"score": None}, "is more 'score' better"),
    ],
)
def test_bad_objectives_are_named(table: nb.Table, objectives: Any, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        resolve(objectives, TableObjective(table))


def test_a_function_needs_an_objective() -> None:
    with pytest.raises(SettingError, match=r'name what to optimise: objectives=\{"score": "maximize"\}.$'):
        resolve(None, FunctionObjective(lambda arch: {}))
