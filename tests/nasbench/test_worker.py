"""Workers that are killed, and workers side by side: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

import nasbench as nb
from nasbench.files import sha256
from nasbench.strategies import distributions
from search_spaces import NASBench201

TRAIN = """
    import sys, torch
    torch.set_num_threads(1)
    import nasbench as nb
    from nasbench.objective import TrainObjective
    from search_spaces import NASBench201
    TrainObjective.checkpoint_every = 0.0
    data = nb.data.load(DATA, train_images=IMAGES)
    result = nb.search(NASBench201(channels=4, cells=1), data, "evolution", trials=TRIALS, epochs=EPOCHS, batch_size=16,
                       population=3, study="study", folder=sys.argv[1], seed=3, progress=False)
"""
LOOK_UP = """
    import sys, time, os
    import nasbench as nb
    from search_spaces import NASBench201
    space = NASBench201()
    def score(arch):
        with open(sys.argv[1] + "/log", "a") as log:
            log.write(f"{os.getpid()} {space.to_string(arch)}\\n")
        time.sleep(PAUSE)
        code = space.encode(arch)
        return {"score": sum(code) + code[0] * code[3] / 7, "cost": sum(c * c for c in code)}
    nb.search(space, score, STRATEGY, objectives=OBJECTIVES, trials=TRIALS, study="study", folder=sys.argv[1], seed=3,
              progress=False, storage=STORAGE)
"""


def script(tmp_path: Path, text: str, **values: Any) -> Path:
    """Write a program with its placeholders filled in."""
    text = textwrap.dedent(text)
    for name, value in values.items():
        text = text.replace(name, repr(value))
    path = tmp_path / "program.py"
    path.write_text(text)
    return path


def start(program: Path, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(program), str(folder)],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def kill_when(process: subprocess.Popen[str], ready: Any, after: float = 0.0) -> None:
    """Kill a process as soon as `ready()` holds, plus some seconds; fail if it ended by itself."""
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.005)
    time.sleep(after)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def outcome(folder: Path) -> list[tuple[Any, ...]]:
    """Everything of a study that must not depend on interruptions."""
    result = nb.SearchResult.load(folder / "study" / "result.json")
    return [(t.number, t.arch, t.state, dict(t.metrics), t.copied_from, t.finished) for t in result.trials]


def best_weights(folder: Path) -> str:
    (weights,) = (folder / "study").glob("trials/*/weights.safetensors")
    return sha256(weights)


def killed_in_training(tmp_path: Path, program: Path, kills: int) -> None:
    """Compare a study that was killed inside training with an unbroken one."""
    rng = random.Random(kills)
    for _ in range(kills):
        before = set((tmp_path / "broken").glob("study/trials/*/checkpoint-*.pt"))
        process = start(program, tmp_path / "broken")

        def in_a_new_trial(before: set[Path] = before) -> bool:
            return bool(set((tmp_path / "broken").glob("study/trials/*/checkpoint-*.pt")) - before)

        kill_when(process, in_a_new_trial, rng.uniform(0, 0.05))
    finish(start(program, tmp_path / "broken"))
    finish(start(program, tmp_path / "whole"))
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert best_weights(tmp_path / "broken") == best_weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_study_killed_inside_training_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    program = script(tmp_path, TRAIN, DATA="digits", IMAGES=200, TRIALS=4, EPOCHS=3)
    killed_in_training(tmp_path, program, kills=1)


@pytest.mark.slow
def test_a_study_killed_three_times_inside_training_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    program = script(tmp_path, TRAIN, DATA="digits", IMAGES=400, TRIALS=8, EPOCHS=3)
    killed_in_training(tmp_path, program, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "objectives"),
    [
        ("random", {"score": "maximize"}),
        ("evolution", {"score": "maximize"}),
        ("tpe", {"score": "maximize"}),
        ("nsga2", {"score": "maximize", "cost": "minimize"}),
    ],
)
def test_a_study_killed_between_lookups_ends_as_the_unbroken_one(
    tmp_path: Path, strategy: str, objectives: dict[str, str]
) -> None:
    values = {"STRATEGY": strategy, "OBJECTIVES": objectives, "TRIALS": 80, "STORAGE": None}
    slow = script(tmp_path, LOOK_UP, PAUSE=0.01, **values)
    log = tmp_path / "broken" / "log"
    for count in (15, 33, 58):
        kill_when(
            start(slow, tmp_path / "broken"),
            lambda: log.exists() and len(log.read_text().splitlines()) >= count,  # noqa: B023
        )
    finish(start(slow, tmp_path / "broken"))
    finish(start(slow, tmp_path / "whole"))
    assert len(outcome(tmp_path / "whole")) == 80
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_two_workers_finish_exactly_the_trials_each_once(tmp_path: Path) -> None:
    objectives = {"score": "maximize"}
    program = script(
        tmp_path, LOOK_UP, PAUSE=0.25, STRATEGY="evolution", OBJECTIVES=objectives, TRIALS=24, STORAGE=None
    )
    workers = [start(program, tmp_path), start(program, tmp_path)]
    for worker in workers:
        finish(worker)
    trials = nb.SearchResult.load(tmp_path / "study" / "result.json").trials
    assert [t.number for t in trials] == list(range(24))
    assert {t.state for t in trials} == {"complete"}
    evaluations = [line.split(" ")[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(set(evaluations)) == 2, "both took part"
    # An architecture that was proposed twice is looked up, unless both workers had it at once.
    assert 24 - sum(t.copied_from is not None for t in trials) == len(evaluations)


@pytest.mark.parametrize("storage", [None, pytest.param("study.log", marks=pytest.mark.slow)])
def test_a_killed_workers_trial_is_adopted_by_the_other(tmp_path: Path, storage: str | None) -> None:
    objectives = {"score": "maximize"}
    program = script(tmp_path, LOOK_UP, PAUSE=0.4, STRATEGY="random", OBJECTIVES=objectives, TRIALS=16, STORAGE=storage)
    victim, heir = start(program, tmp_path), start(program, tmp_path)
    log = tmp_path / "log"

    def both_at_work() -> bool:
        lines = log.read_text().splitlines() if log.exists() else []
        return len({line.split(" ")[0] for line in lines}) == 2 and lines[-1].startswith(f"{victim.pid} ")

    kill_when(victim, both_at_work)
    finish(heir)
    trials = nb.SearchResult.load(tmp_path / "study" / "result.json").trials
    assert [t.number for t in trials] == list(range(16))
    assert {t.state for t in trials} == {"complete"}
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    begun = Counter(arch for _, arch in lines)
    left = [arch for pid, arch in lines if pid == str(victim.pid)][-1]
    assert begun[left] == 2, "the trial that the victim left was evaluated by the heir"
    assert all(count == 1 for arch, count in begun.items() if arch != left)


def test_a_silent_workers_trial_on_another_host_is_adopted(tmp_path: Path) -> None:
    space = NASBench201()
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/x.db", heartbeat_interval=1, grace_period=2)

    def search(trials: int) -> nb.SearchResult:
        return nb.search(
            space,
            lambda arch: {"score": space.index(arch)},
            "random",
            objectives={"score": "maximize"},
            trials=trials,
            study="shared",
            storage=storage,
            folder=tmp_path,
            progress=False,
        )

    first = search(1)
    study = optuna.load_study(study_name="shared", storage=storage)
    lost = study.ask(distributions(space))
    lost.set_user_attr("worker", "elsewhere/1")
    storage.record_heartbeat(lost._trial_id)
    time.sleep(3.5)
    result = search(3)
    assert [t.number for t in result.trials] == [0, 1, 2]
    assert {t.state for t in result.trials} == {"complete"}
    assert result.trials[0].arch == first.trials[0].arch
