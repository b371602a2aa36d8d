"""Where studies live: folders, storages, and the conditions a study is checked against."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from nasbench.errors import ResumeError, SettingError, StudyError
from nasbench.objective import FunctionObjective
from nasbench.storage import environment, open_storage, open_study, quiet, stored_conditions, study_folder
from search_spaces import NASBench201
from search_spaces.base import Arch

SPACE = NASBench201()
SAMPLER = optuna.samplers.RandomSampler(seed=0)
PRUNER = optuna.pruners.NopPruner()


def score(arch: Arch) -> dict[str, float]:
    return {"score": 1.0}


def made_of(**changes: Any) -> dict[str, Any]:
    """Conditions of a study, as `search` makes them."""
    return {
        "space": {"space": "NASBench201", "channels": 16, "cells": 5},
        "space_fingerprint": "0123456789ab",
        "objective": {
            "kind": "train",
            "data": {"name": "digits", "fingerprint": "a", "load": {"seed": 0}},
            "extra": [],
        },
        "objectives": {"val_accuracy": "maximize"},
        "constraints": [],
        "strategy": {"name": "evolution", "population": 10, "sample": 3},
        "pruner": None,
        "seed": 0,
        "trials": 30,
        "environment": environment(),
    } | changes


def opened(home: Path, conditions: dict[str, Any] | None = None, storage: Any = None) -> optuna.Study:
    home.mkdir(parents=True, exist_ok=True)
    return open_study(home.name, storage, home, SAMPLER, PRUNER, made_of() if conditions is None else conditions)


# Folders -----------------------------------------------------------------------------------------------------------


def folder_of(study: Any, storage: Any = None, *, folder: Path, **changes: Any) -> Path | None:
    objective = FunctionObjective(score)
    objective.trains = changes.get("objective", {}).get("kind") == "train"
    return study_folder(study, storage, folder, SPACE, objective, made_of(**changes))


def test_a_study_that_trains_gets_a_new_folder_each_time(tmp_path: Path) -> None:
    train = {"objective": {"kind": "train", "data": {"name": "my images/2"}}}
    first = folder_of(None, folder=tmp_path / "runs", **train)
    second = folder_of(None, folder=tmp_path / "runs", **train)
    assert first == tmp_path / "runs" / "nasbench201-my-images-2-evolution-1"
    assert second == tmp_path / "runs" / "nasbench201-my-images-2-evolution-2"
    assert second.is_dir()


def test_nothing_is_kept_of_a_study_without_name_that_trains_nothing(tmp_path: Path) -> None:
    function: dict[str, Any] = {"objective": {"kind": "function"}}
    in_memory = optuna.create_study()
    assert folder_of(None, folder=tmp_path, **function) is None
    assert folder_of(in_memory, folder=tmp_path, **function) is None
    assert list(tmp_path.iterdir()) == []
    kept = folder_of(None, "x.log", folder=tmp_path, **function)
    assert kept == tmp_path / "nasbench201-function-evolution-1"
    assert folder_of("mine", folder=tmp_path, **function) == tmp_path / "mine"


@pytest.mark.parametrize("name", ["a/b", "../a", "..", ".", "", "/tmp/a"])
def test_a_study_name_is_a_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError, match=rf"study name '{name}' cannot be a folder name: use letters, digits"):
        folder_of(name, folder=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StudyError, match=r"cannot write to the study's folder .*/file/mine: .* Choose another with fo"):
        folder_of("mine", folder=tmp_path / "file")
    (tmp_path / "mine" / "study.lock").mkdir(parents=True)  # stands for a file that may not be opened
    with pytest.raises(StudyError, match=r"cannot write to the study's folder .*/mine: Is a directory. Choose another"):
        folder_of("mine", folder=tmp_path)


# Storages ----------------------------------------------------------------------------------------------------------


def test_storages_by_url_journal_file_or_object(tmp_path: Path) -> None:
    mine = optuna.storages.InMemoryStorage()
    assert open_storage(mine, tmp_path) is mine
    assert isinstance(open_storage(None, tmp_path), optuna.storages.RDBStorage)
    assert (tmp_path / "study.db").exists()
    for text in ("a.log", "b.journal", f"journal:///{tmp_path}/c"):
        assert isinstance(open_storage(text, tmp_path), optuna.storages.JournalStorage)
    assert isinstance(open_storage(f"sqlite:///{tmp_path}/d.db", tmp_path), optuna.storages.RDBStorage)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.log", "b.journal", "c", "d.db", "study.db"]


@pytest.mark.parametrize(
    ("storage", "error", "match"),
    [
        ("study.db", SettingError, r"storage 'study.db' is neither a URL nor a journal file. Write sqlite:///study.db"),
        ("nosuchdb://x", StudyError, "storage 'nosuchdb://x' cannot be opened"),
        ("sqlite:///no/such/folder/x.db", StudyError, "storage 'sqlite:///no/such/folder/x.db' cannot be opened"),
        ("no/such/folder/x.log", StudyError, "storage 'no/such/folder/x.log' cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named(
    tmp_path: Path, storage: str, error: type[Exception], match: str
) -> None:
    with quiet(), pytest.raises(error, match=match):
        open_storage(storage, tmp_path)


@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_a_damaged_study_says_so(tmp_path: Path, damage: str) -> None:
    opened(tmp_path)
    file = tmp_path / "study.db"
    file.write_bytes(b"this is no database " * 500 if damage == "garbage" else file.read_bytes()[:10_000])
    with pytest.raises(StudyError, match="If its file is damaged, restore it from a copy, or delete the study's fold"):
        opened(tmp_path)


def test_quiet_keeps_the_users_verbosity(capsys: pytest.CaptureFixture[str]) -> None:
    level = optuna.logging.get_verbosity()
    with quiet():
        optuna.create_study()
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert optuna.logging.get_verbosity() == level
    assert capsys.readouterr().err == ""


# Conditions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [None, "study.log"])
def test_a_study_is_continued_under_its_conditions(tmp_path: Path, storage: str | None) -> None:
    study = opened(tmp_path / "mine", storage=storage)
    study.tell(study.ask(), 0.5)
    again = opened(tmp_path / "mine", made_of(trials=99), storage=storage)
    assert len(again.trials) == 1
    assert [d.name for d in again.directions] == ["MAXIMIZE"]
    assert stored_conditions("mine", storage, tmp_path) == made_of()  # those it was begun under


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("space", {"channels": 8}, "written with space channels=16; this call has channels=8"),
        (
            "space_fingerprint",
            "ba9876543210",
            "written with space_fingerprint 0123456789ab; this call has ba9876543210",
        ),
        ("objective", {"kind": "table"}, "written with objective kind=train; this call has kind=table"),
        (
            "objective",
            {"data": {"fingerprint": "b"}},
            "written with objective fingerprint=a; this call has fingerprint=",
        ),
        ("objective", {"extra": ["bytes"]}, r"written with objective extra=\[\]; this call has extra=\['bytes'\]"),
        ("objectives", {"macs": "minimize"}, "written with objectives macs=None; this call has macs=minimize"),
        ("constraints", ["macs<1"], r"written with constraints \[\]; this call has \['macs<1'\]"),
        ("strategy", {"population": 20}, "written with strategy population=10; this call has population=20"),
        ("pruner", "median", "written with pruner None; this call has median"),
        ("seed", 1, "written with seed 0; this call has 1"),
    ],
)
def test_other_conditions_are_refused_and_named(tmp_path: Path, key: str, value: Any, match: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    opened(tmp_path / "mine", storage=storage)
    changed = copy.deepcopy(made_of())
    if isinstance(value, dict):
        for name, setting in value.items():
            changed[key][name] = changed[key].get(name, {}) | setting if isinstance(setting, dict) else setting
    else:
        changed[key] = value
    with pytest.raises(ResumeError, match=f"study 'mine' was {match}") as refusal:
        opened(tmp_path / "mine", changed, storage)
    assert str(refusal.value).endswith("Restore the setting, or choose a new study name.")
    opened(tmp_path / "mine", storage=storage)  # the refusal changed nothing


def test_other_circumstances_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = optuna.storages.InMemoryStorage()
    opened(tmp_path, storage=storage)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.warns(UserWarning, match=rf"continues under other conditions \(threads {threads} before, 99 now\)"):
        opened(tmp_path, storage=storage)


def test_the_data_may_lie_elsewhere(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    opened(tmp_path, storage=storage)
    moved = copy.deepcopy(made_of())
    moved["objective"]["data"]["load"] = {"seed": 0, "root": "/elsewhere"}
    opened(tmp_path, moved, storage)  # the fingerprint says that the images are the same


# Studies of others -------------------------------------------------------------------------------------------------


def foreign(home: Path, direction: str = "maximize", trials: int = 0) -> None:
    home.mkdir()
    with quiet():
        study = optuna.create_study(study_name=home.name, storage=f"sqlite:///{home}/study.db", direction=direction)
    for _ in range(trials):
        study.tell(study.ask(), 1.0)


def test_a_study_that_nasbench_did_not_write_is_left_alone(tmp_path: Path) -> None:
    foreign(tmp_path / "mine", trials=1)
    with pytest.raises(
        ResumeError, match="study 'mine' in this storage was not written by nasbench. Choose another na"
    ):
        opened(tmp_path / "mine")
    with pytest.raises(StudyError, match="study 'mine' was not written by nasbench"):
        stored_conditions("mine", folder=tmp_path)


def test_an_empty_study_of_other_directions_is_not_taken_over(tmp_path: Path) -> None:
    foreign(tmp_path / "mine", direction="minimize")
    with pytest.raises(ResumeError, match="direction"):
        opened(tmp_path / "mine")


def test_a_study_of_the_users_own_is_used_as_it_is() -> None:
    mine = optuna.create_study(direction="maximize")
    assert open_study(mine, None, None, SAMPLER, PRUNER, made_of()) is mine
    assert (mine.sampler, mine.pruner) == (SAMPLER, PRUNER)
    other = optuna.create_study(directions=["maximize", "minimize"])
    message = r"your Optuna study has directions \['maximize', 'minimize'\], the objectives need \['maximize'\]"
    with pytest.raises(SettingError, match=message):
        open_study(other, None, None, SAMPLER, PRUNER, made_of())


def test_a_missing_study_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"there is no study 'mine' in .*/. Name another folder, or give its storage"):
        stored_conditions("mine", folder=tmp_path)
    opened(tmp_path / "digits-1", storage="all.log")
    with pytest.raises(StudyError, match="this storage has no study 'digits-2'; did you mean 'digits-1'"):
        stored_conditions("digits-2", "all.log", tmp_path)
