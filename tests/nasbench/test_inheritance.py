"""Trials that start from the trained network of another: what they get, what is kept for them, what if it is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nasbench as nb
from nasbench import training
from nasbench.data import Data
from nasbench.objective import WEIGHTS, Parent, TrainObjective, TrialRun
from nasbench.recipe import Recipe
from nasbench.strategies import History, Proposal, Strategy
from search_spaces import NASBench201, PlainCNN, SearchSpace

SPACE = PlainCNN(widths=(4, 6, 8, 12, 16), fc_widths=(16, 32), blocks=2, slots=4, fc_slots=2)
EAS: dict[str, Any] = {"widen": 1, "deepen": 1, "batch": 2, "restart": 3, "hidden": 4}


@pytest.fixture(scope="module")
def data() -> Data:
    return nb.data.load("digits", train_images=200)


def search(data: Data, folder: Path, trials: int = 6, space: SearchSpace = SPACE, **settings: Any) -> nb.SearchResult:
    settings = {"strategy": "eas", "epochs": 1, "batch_size": 32, "seed": 1, **settings}
    if settings["strategy"] == "eas":
        settings = {**EAS, **settings}
    return nb.search(space, data, trials=trials, study="s", folder=folder, device="cpu", progress=False, **settings)


def essence(result: nb.SearchResult) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.arch, t.state, dict(t.metrics), t.copied_from, t.parent, t.note, t.reason) for t in result.trials
    ]


def kept(folder: Path) -> dict[int, bytes]:
    return {int(p.parent.name): p.read_bytes() for p in (folder / "s").glob(f"trials/*/{WEIGHTS}")}


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[nb.SearchResult, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return search(data, folder), folder


@dataclass(frozen=True)
class Grow(Strategy):
    """The start, and then one child of it."""

    keep: bool = True
    parent: int = 0

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Proposal:
        start = space.start  # type: ignore[attr-defined]
        if not history:
            return Proposal(start)
        child = space.deepened(space.widened(start, 0, 0), 1, 0, 3)  # type: ignore[attr-defined]
        return Proposal(child | {"block0_filters3": 6 + 2 * len(history)}, parent=self.parent)

    def keeps(self, space: SearchSpace, history: History) -> set[int]:
        return {0} if self.keep else set()


# What a child gets -------------------------------------------------------------------------------------------------


def test_a_child_starts_from_its_parents_network(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[dict[str, float]] = []
    fit = training.fit

    def watched(model: torch.nn.Module, *args: Any, **settings: Any) -> torch.nn.Module:
        began.append(training.validate(model, data))
        return fit(model, *args, **settings)

    monkeypatch.setattr(training, "fit", watched)
    result = search(data, tmp_path, 2, strategy=Grow(), epochs=15)
    first, child = result.trials
    assert (first.parent, child.parent) == (None, 0)
    assert began[1]["val_loss"] == pytest.approx(first.metrics["val_loss"], abs=0.05)  # but for the noise
    assert began[1]["val_loss"] < began[0]["val_loss"] / 2
    assert child.metrics["params"] > first.metrics["params"]
    space = SPACE.bind(data)
    grown = result.trials[1]
    assert (
        grown.build(weights=False).state_dict().keys() == space.build(space.canonical(grown.arch)).state_dict().keys()
    )


def test_a_childs_start_is_a_function_of_parent_and_seed(data: Data, tmp_path: Path) -> None:
    objective = TrainObjective(SPACE.bind(data), data, Recipe(epochs=1, batch_size=32), device="cpu")
    run = TrialRun()
    run.folder = tmp_path
    objective(SPACE.start, run)
    child = SPACE.deepened(SPACE.start, 0, 0, 3)
    assert child is not None
    parent = Parent(0, SPACE.start, tmp_path / WEIGHTS)
    state = torch.get_rng_state()
    first, again, other = (objective._network(child, seed, parent).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    old = load_file(tmp_path / WEIGHTS)
    assert torch.equal(first["block0.layer0.conv.weight"], old["block0.layer0.conv.weight"])
    # With noise: without it channels that were doubled would never become different.
    new = first["block0.layer1.conv.weight"]
    assert (new != 0).all()
    assert torch.allclose(new[:, :, 1, 1], torch.eye(len(new)), atol=0.01)


# Studies -----------------------------------------------------------------------------------------------------------


def test_the_front_door(data: Data, whole: tuple[nb.SearchResult, Path]) -> None:
    result, folder = whole
    assert len(result.complete) == 6
    assert result.trials[0].arch == SPACE.start
    first = max(result.trials[:4], key=lambda t: (t.metrics["val_accuracy"], -t.number))
    assert [t.parent for t in result.trials] == [None, 0, 0, 0, first.number, first.number]
    assert kept(folder).keys() == {first.number, result.best.number}  # the parent of the next, and the best
    assert nb.validate(result.best.build(), data)["val_accuracy"] == result.best.metrics["val_accuracy"]
    assert result.rows()[1]["parent"] == 0
    assert "grown from" in result.report().read_text()
    assert essence(search(data, folder)) == essence(result)


def test_a_repeated_child_is_looked_up(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **s: fits.append(1) or fit(*a, **s))
    tiny = PlainCNN(widths=(4, 8), fc_widths=(8,), kernels=(3,), blocks=1, slots=1, fc_slots=1)
    result = search(data, tmp_path, 6, tiny, deepen=0, restart=100)
    assert len(fits) == len({t.arch for t in result.trials}) == 2
    copies = [t for t in result.trials if t.copied_from is not None]
    assert len(copies) == 4
    assert all(t.metrics == result.trials[t.copied_from].metrics for t in copies if t.copied_from is not None)


class Killed(BaseException):
    """Stands for `kill -9`: nobody catches it."""


@pytest.mark.parametrize("dies", [(1, 2), (2, 0), (4, 3)], ids=str)
def test_a_search_killed_inside_a_childs_training_ends_as_the_unbroken_one(
    data: Data,
    whole: tuple[nb.SearchResult, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dies: tuple[int, int],
) -> None:
    monkeypatch.setattr(TrainObjective, "checkpoint_every", 0.0)
    trained: list[int] = []
    fit = training.fit

    class Kill(training.Callback):
        def on_step(self, run: training.Run) -> None:
            if (len(trained) - 1, run.step) == dies:
                raise Killed

    def deadly(*args: Any, callbacks: Any, **settings: Any) -> Any:
        trained.append(1)
        return fit(*args, callbacks=[*callbacks, Kill()], **settings)

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", deadly)
        if dies[1]:
            with pytest.raises(Killed):
                search(data, tmp_path / "broken")
        else:  # between making the network and its first step
            patch.setattr(
                TrainObjective,
                "_network",
                lambda self, arch, seed, parent, own=TrainObjective._network: (
                    (_ for _ in ()).throw(Killed)
                    if parent and len(trained) == dies[0]
                    else own(self, arch, seed, parent)
                ),
            )
            with pytest.raises(Killed):
                search(data, tmp_path / "broken")
    assert essence(search(data, tmp_path / "broken")) == essence(whole[0])
    assert kept(tmp_path / "broken") == kept(whole[1])


@pytest.mark.slow
def test_a_child_of_a_running_trial_waits_for_it(data: Data, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import sys, torch
            torch.set_num_threads(1)
            import nasbench as nb
            from search_spaces import PlainCNN
            data = nb.data.load("digits", train_images=200)
            nb.search({SPACE!r}, data, "eas", trials=5, epochs=3, batch_size=16, study="s", folder=sys.argv[1], seed=1,
                      device="cpu", progress=False, **{EAS!r})
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(nb.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([sys.executable, str(program), str(tmp_path)], env=environment) for _ in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    result = nb.SearchResult.load(tmp_path / "s" / "result.json")
    assert [t.state for t in result.trials] == ["complete"] * 5
    assert [t.parent for t in result.trials][:4] == [None, 0, 0, 0]  # the start was trained once


@pytest.mark.slow
def test_a_search_killed_by_the_system_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import sys, torch
            torch.set_num_threads(1)
            import nasbench as nb
            from nasbench.objective import TrainObjective
            from search_spaces import PlainCNN
            TrainObjective.checkpoint_every = 0.0
            data = nb.data.load("digits", train_images=300)
            nb.search({SPACE!r}, data, "eas", trials=8, epochs=3, batch_size=16, study="s", folder=sys.argv[1], seed=1,
                      device="cpu", progress=False, **{EAS!r})
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(nb.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, str(program), str(folder)], env=environment)

    for number in (1, 3, 5):
        process = start(tmp_path / "broken")
        checkpoint = tmp_path / "broken" / "s" / "trials" / str(number) / "checkpoint-1.pt"
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "broken").wait() == start(tmp_path / "whole").wait() == 0
    broken, whole = (nb.SearchResult.load(tmp_path / name / "s" / "result.json") for name in ("broken", "whole"))
    assert essence(broken) == essence(whole)
    assert kept(tmp_path / "broken") == kept(tmp_path / "whole")


# What goes wrong ---------------------------------------------------------------------------------------------------


def test_without_its_parents_weights_a_trial_fails_and_says_why(data: Data, tmp_path: Path) -> None:
    search(data, tmp_path, 1, strategy=Grow(keep=True))
    (tmp_path / "s" / "trials" / "0" / WEIGHTS).unlink()
    with pytest.raises(nb.StudyError, match="trial 1: WeightsError: the trial inherits from trial 0, which has no"):
        search(data, tmp_path, 2, strategy=Grow(keep=True))


def test_a_parent_that_never_was_fails_the_trial(data: Data, tmp_path: Path) -> None:
    with pytest.raises(nb.StudyError, match="inherits from trial 99, which has no weights: there is none of this"):
        search(data, tmp_path, 2, strategy=Grow(parent=99))


def test_a_space_that_does_not_grow_fails_the_trial(data: Data, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Child(Strategy):
        def propose(self, space: SearchSpace, history: History, rng: Random) -> Proposal:
            return Proposal(space.sample(rng), parent=0 if history else None)

    with pytest.raises(nb.StudyError, match="networks of NASBench201 cannot grow. Use PlainCNN or DenseNet"):
        search(data, tmp_path, 3, NASBench201(channels=4, cells=1), strategy=Child())


def test_a_child_that_is_no_growth_fails_the_trial(data: Data, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Child(Strategy):
        def propose(self, space: SearchSpace, history: History, rng: Random) -> Proposal:
            start = space.start  # type: ignore[attr-defined]
            return Proposal(start | {"block0_kernel0": 5}, parent=0) if history else Proposal(start)

    with pytest.raises(nb.StudyError, match="cannot grow to .* a layer keeps its kernel"):
        search(data, tmp_path, 2, strategy=Child())


def test_eas_refuses_other_spaces_before_any_work(data: Data, tmp_path: Path) -> None:
    with pytest.raises(nb.SettingError, match="those of NASBench201 cannot grow"):
        search(data, tmp_path, 3, NASBench201(channels=4, cells=1))
    assert not list(tmp_path.iterdir())


def test_eas_refuses_what_has_no_tangent_before_any_work(data: Data, tmp_path: Path) -> None:
    with pytest.raises(nb.SettingError, match=r"the objective is minimised. Use reward=\"score\""):
        search(data, tmp_path, 3, objectives="val_loss")
    assert not list(tmp_path.iterdir())


def test_a_function_knows_no_weights_and_needs_none() -> None:
    result = nb.search(
        SPACE, lambda arch: {"score": 0.5}, "eas", objectives={"score": "maximize"}, trials=5, progress=False, **EAS
    )
    assert [t.parent for t in result.trials] == [None, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["plain_cnn", "PlainCNN"])
def test_a_saved_result_finds_its_space(data: Data, tmp_path: Path, name: str) -> None:
    from search_spaces import space

    assert space(name, slots=4) == PlainCNN(slots=4)
    result = nb.search(SPACE, lambda arch: {"score": 0.5}, "random", objectives={"score": "maximize"}, trials=2,
                       progress=False)  # fmt: skip
    assert nb.SearchResult.from_json(result.to_json()).space == SPACE
