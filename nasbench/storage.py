"""Where studies live: their folders, Optuna storages, and the conditions they are checked against."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import torch
from filelock import FileLock
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage

from nasbench.devices import processor
from nasbench.errors import ResumeError, SettingError, StudyError
from nasbench.objective import Objective
from search_spaces.base import SearchSpace, nearest

CONDITIONS = "nasbench"
"""The study attribute that says what a study was made of."""
_DAMAGED = "If its file is damaged, restore it from a copy, or delete the study's folder and start again."
_CHECKED = ("space", "space_fingerprint", "strategy", "objective", "objectives", "constraints", "pruner", "seed")


def study_folder(
    study: str | optuna.Study | None,
    storage: Any,
    folder: Path,
    space: SearchSpace,
    objective: Objective,
    conditions: Mapping[str, Any],
) -> Path | None:
    """Return the study's folder, or None if nothing is to be kept."""
    if isinstance(study, optuna.Study):
        if isinstance(study._storage, InMemoryStorage) and not objective.trains:
            return None
        name = study.study_name
    elif study is None and storage is None and not objective.trains:
        return None
    elif study is None:
        data = conditions["objective"].get("data", {}).get("name", conditions["objective"]["kind"])
        parts = type(space).__name__.lower(), data, conditions["strategy"]["name"]
        stem = re.sub(r"[^\w.-]", "-", "-".join(parts))
        name = next(n for n in (f"{stem}-{i}" for i in range(1, 1_000_000)) if not (folder / n).exists())
    else:
        name = study
    if not name or Path(name).name != name or name in (".", ".."):
        raise SettingError(f"study name {name!r} cannot be a folder name: use letters, digits, dots and dashes.")
    home = folder / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / "study.lock").open("a"):
            pass
    except OSError as error:
        raise StudyError(
            f"cannot write to the study's folder {home}: {error.strerror}. Choose another with folder=..."
        ) from None
    return home


def open_study(
    study: str | optuna.Study | None,
    storage: Any,
    home: Path | None,
    sampler: BaseSampler,
    pruner: BasePruner,
    conditions: dict[str, Any],
) -> optuna.Study:
    """Return the study: the user's own, one in memory, or one in a storage, made or continued.

    Raises:
        ResumeError: it was written under other conditions, or not by nasbench.
        StudyError: it cannot be read.
        SettingError: a study of the user's own has other directions.
    """
    directions: Any = list(conditions["objectives"].values())
    if isinstance(study, optuna.Study):
        own = [d.name.lower() for d in study.directions]
        if own != directions:
            raise SettingError(f"your Optuna study has directions {own}, the objectives need {directions}.")
        study.sampler, study.pruner = sampler, pruner
        return study
    with quiet():
        if home is None:
            return optuna.create_study(directions=directions, sampler=sampler, pruner=pruner)
        with FileLock(home / "study.lock"):
            return _open_stored(home.name, open_storage(storage, home), sampler, pruner, conditions, directions)


def _open_stored(
    name: str,
    storage: BaseStorage,
    sampler: BaseSampler,
    pruner: BasePruner,
    conditions: dict[str, Any],
    directions: Any,
) -> optuna.Study:
    try:
        known = name in optuna.get_all_study_names(storage)
        opened = (
            optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
            if known
            else optuna.create_study(
                study_name=name, storage=storage, sampler=sampler, pruner=pruner, directions=directions
            )
        )
        if CONDITIONS not in opened.user_attrs:
            if known and opened.get_trials(deepcopy=False):
                raise ResumeError(
                    f"study {name!r} in this storage was not written by nasbench. Choose another name, or pass the "
                    "study itself: study=optuna.load_study(...)."
                )
            own = [d.name.lower() for d in opened.directions]
            if own != directions:
                raise ResumeError(
                    f"study {name!r} has directions {own}, the objectives need {directions}. Choose a new study name."
                )
            opened.set_user_attr(CONDITIONS, conditions)
            return opened
    except StudyError:
        raise
    except Exception as error:
        raise StudyError(
            f"study {name!r} cannot be read ({type(error).__name__}: {error!s:.300}). {_DAMAGED}"
        ) from error
    _check_conditions(name, opened.user_attrs[CONDITIONS], conditions)
    return opened


def _check_conditions(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    for conditions in (old, new):  # data are known by their fingerprint, wherever they lie
        conditions["objective"].get("data", {}).pop("load", None)
    for key in _CHECKED:
        if old.get(key) != new[key]:
            was, now = _difference(old.get(key), new[key])
            raise ResumeError(
                f"study {name!r} was written with {key} {was}; this call has {now}. "
                "Restore the setting, or choose a new study name."
            )
    before = old.get("environment", {})
    changed = [f"{k} {before.get(k)} before, {v} now" for k, v in new["environment"].items() if before.get(k) != v]
    if changed:
        warnings.warn(
            f"study {name!r} continues under other conditions ({'; '.join(changed)}): results may differ in the last "
            "bits from an unbroken run.",
            stacklevel=5,
        )


def _difference(old: Any, new: Any) -> tuple[str, str]:
    """Return only the entries that differ, for a message."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if len(keys) == 1 and isinstance(old.get(keys[0]), dict) and isinstance(new.get(keys[0]), dict):
            return _difference(old[keys[0]], new[keys[0]])
        return ", ".join(f"{k}={old.get(k)}" for k in keys), ", ".join(f"{k}={new.get(k)}" for k in keys)
    return str(old), str(new)


def environment() -> dict[str, Any]:
    """Return what results depend on in the last bits, besides the settings."""
    return {
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "optuna": version("optuna"),
        "processor": processor(),
    }


def open_storage(storage: str | BaseStorage | None, home: Path) -> BaseStorage:
    """Return the Optuna storage for a URL, a journal file or None (study.db in the study's folder).

    Raises:
        StudyError: the storage cannot be opened.
    """
    if isinstance(storage, BaseStorage):
        return storage
    text = str(storage) if storage is not None else f"sqlite:///{home / 'study.db'}"
    try:
        if text.startswith("journal:///") or text.endswith((".log", ".journal")):
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            return JournalStorage(JournalFileBackend(text.removeprefix("journal:///")))
        if "://" not in text:
            raise SettingError(
                f"storage {text!r} is neither a URL nor a journal file. Write sqlite:///{text}, postgresql://..., or a "
                "name that ends in .log."
            )
        sqlite = text.startswith("sqlite")
        return optuna.storages.RDBStorage(
            text,
            heartbeat_interval=None if sqlite else 60,
            grace_period=None if sqlite else 180,
            engine_kwargs={"connect_args": {"timeout": 60}} if sqlite else None,
        )
    except SettingError:
        raise
    except Exception as error:
        raise StudyError(
            f"storage {text!r} cannot be opened ({type(error).__name__}: {error!s:.300}). {_DAMAGED}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from logging every trial beside our bar."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Hh]eartbeat.*")  # we record heartbeats ourselves
            yield
    finally:
        optuna.logging.set_verbosity(level)


def stored_conditions(study: str, storage: str | None = None, folder: str | Path = "runs") -> dict[str, Any]:
    """Return what a stored study was made of.

    Raises:
        StudyError: there is no such study, or nasbench did not write it.
    """
    home = Path(folder) / study
    if storage is None and not (home / "study.db").exists():
        raise StudyError(f"there is no study {study!r} in {Path(folder)}/. Name another folder, or give its storage.")
    with quiet():
        opened = open_storage(storage, home)
        try:
            names = optuna.get_all_study_names(opened)
            if study not in names:
                raise StudyError(f"this storage has no study {study!r}; {nearest(study, names)}")
            attrs = optuna.load_study(study_name=study, storage=opened).user_attrs
        except StudyError:
            raise
        except Exception as error:
            raise StudyError(f"study {study!r} cannot be read ({type(error).__name__}: {error!s:.300}).") from error
    if CONDITIONS not in attrs:
        raise StudyError(f"study {study!r} was not written by nasbench.")
    return dict(attrs[CONDITIONS])
