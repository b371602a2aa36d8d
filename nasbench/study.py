"""The verb `search`: names become objects, a study is opened or continued, workers fill it, a result comes back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
import torch.distributed as dist
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

import search_spaces
from nasbench import strategies
from nasbench.data import Data
from nasbench.errors import SettingError, StudyError
from nasbench.objective import Constraint, FunctionObjective, Objective, TableObjective, TrainObjective, resolve
from nasbench.recipe import Recipe, is_number
from nasbench.result import RESULT, SearchResult, collect
from nasbench.shared_weights import SupernetObjective
from nasbench.storage import environment, open_study, quiet, stored_conditions, study_folder
from nasbench.strategies import OneShot, OptunaStrategy, Strategy
from nasbench.supernets import CHECKPOINT, read_epochs
from nasbench.worker import Paused, Worker
from search_spaces.base import Arch, SearchSpace, nearest

if TYPE_CHECKING:
    from nasbench.table import Table

_PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}
_RECIPE = {field.name for field in dataclasses.fields(Recipe)}


def search(
    space: SearchSpace,
    data: Data | Table | Callable[[Arch], Mapping[str, float]] | Objective,
    strategy: str | Strategy | OptunaStrategy | OneShot | BaseSampler = "evolution",
    *,
    objectives: str | Sequence[str] | Mapping[str, str | None] | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    constraints: str | Sequence[str] = (),
    metrics: str | Sequence[str] = (),
    pruner: str | BasePruner | None = None,
    study: str | optuna.Study | None = None,
    storage: str | BaseStorage | None = None,
    folder: str | Path = "runs",
    seed: int = 0,
    recipe: Recipe | None = None,
    device: str = "auto",
    workers: int = 1,
    table: Table | tuple[Table, str] | None = None,
    progress: bool = True,
    **settings: Any,
) -> SearchResult:
    """Search a space for the architecture that does best, and return all that was tried.

    Run the same line again and the study continues where it was: the trial that was running goes on from its
    checkpoint, and a study that has all its trials returns at once. Ctrl-C returns the result so far.

    Args:
        space: what to search. Its `classes` and `in_channels` are taken from the data where they were left out.
        data: images or a text (`nasbench.data.load`), a `Table` to look results up in, or a function from an
            architecture to a mapping of metrics; or an `Objective`.
        strategy: a name, a strategy, or an Optuna sampler (used as it is: only named strategies resume exactly). Names
            of black-box strategies: "evolution", "top_evolution", "local_search", "reinforce", "linas", "grid",
            "random", "tpe", "gp", "nsga2", "nsga3"; "eas" grows trained networks, of PlainCNN or DenseNet. Of one-shot
            strategies, which train one supernet and read architectures from it: "darts", "gdas", "drnas", "pcdarts",
            "spos"; and "dass", which prunes as it searches: DARTS(ops="sparse").
        objectives: metrics to optimise. A name whose better direction is known, several, or {name: "maximize"}; a
            direction of None is one that the name tells.
            Default with data or a table: "val_accuracy".
        trials: how many finished trials the study is to have in all. Default: 30; a one-shot strategy has its own.
        timeout: seconds after which to stop; the running trial continues in the next call, a supernet from the end of
            its last epoch. Where several processes train one network, a search stops between trials only.
        constraints: bounds such as "params<1e6". Parameters and MACs are checked before anything is trained; a
            violator is stored as pruned and does not count.
        metrics: more metrics to measure: "bytes", "peak_bytes", "latency_ms".
        pruner: "median", "hyperband", "halving" or an Optuna pruner; one objective only.
        study: name of the study, or an Optuna study of your own, whose sampler and pruner these then become. Default:
            a new name for training; nothing is kept of a table or function search.
        storage: an Optuna storage or URL ("sqlite:///x.db", "postgresql://..."), or a journal file ("x.log").
            Default: study.db in the study's folder.
        folder: where study folders lie; a study's is `folder`/NAME.
        seed: of everything random. One worker, interrupted or not, gives the same study for the same seed.
        recipe: how to train; further keywords that `Recipe` has (`epochs=4`) change it. Of a one-shot strategy, how to
            train the supernet; its default is that of the strategy's paper.
        device: where to train: "auto", "cpu", "cuda:0".
        workers: processes that fill the study side by side; needs a data set that can be loaded again by name.
        table: for a one-shot strategy, a table of the same space, and perhaps the name of one of its metrics: after
            each epoch it tells the true rank of the architecture that is decoded. The search learns nothing from it.
            It belongs to the study: give it from the start.
        progress: show bars and say where results went.
        **settings: fields of `Recipe`, or settings of a strategy given by name (`population=20`).

    Raises:
        SettingError: an unknown strategy, metric, setting or budget, before any work.
        ArchError: the space does not fit the data.
        ResumeError: the study was written with other settings.
        StudyError: the study cannot be read, or five trials in a row failed.

    Example:
        >>> from search_spaces import NASBench201
        >>> result = search(NASBench201(), lambda arch: {"score": 1.0}, "random", objectives={"score": "maximize"},
        ...                 trials=3, progress=False)
        >>> len(result.trials)
        3
    """
    _check_budget(trials, timeout, workers, seed)
    table = _reference(table)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    recipe_changes = {k: v for k, v in settings.items() if k in _RECIPE}
    strategy = _strategy(strategy, {k: v for k, v in settings.items() if k not in _RECIPE})
    if isinstance(strategy, OneShot):
        space, objective = _supernet_objective(space, data, strategy, recipe, recipe_changes, seed, device, table)
        trials = _one_shot_trials(strategy, trials)
    elif table is not None:
        raise SettingError(
            "table= tells the true rank of what a one-shot strategy decodes: this strategy decodes none."
        )
    else:
        space, objective = _objective(space, data, recipe, recipe_changes, seed, device)
        trials = 30 if trials is None else trials
    directions = resolve(objectives, objective)
    limits = [Constraint.parse(c) for c in ([constraints] if isinstance(constraints, str) else constraints)]
    _check_metrics([*metrics, *(c.metric for c in limits)], objective)
    objective.want([*directions, *(c.metric for c in limits), *metrics])
    _check_combination(strategy, directions, pruner, objective)
    if workers > 1 and isinstance(objective, SupernetObjective):
        raise SettingError(
            f"workers={workers}, but a one-shot search trains one supernet: leave workers out, or let processes share "
            "its training with torchrun --nproc-per-node N -m nasbench search ..."
        )
    if workers > 1 and not (
        isinstance(objective, TrainObjective) and objective.data.spec and not isinstance(study, optuna.Study)
    ):
        raise SettingError(
            f"workers={workers} starts processes that load the data by name; this objective cannot be loaded by name. "
            "Use nasbench.data.load(...), or start more processes with the same study and storage yourself."
        )
    begun = isinstance(study, str) and (Path(folder) / study / CHECKPOINT).exists()
    if isinstance(objective, SupernetObjective) and not begun:
        objective.check_memory()  # on all ranks, and before anything is written
    if dist.is_initialized() and dist.get_rank() > 0:
        return _follow(objective, space)

    conditions = {
        "space": json.loads(space.to_json()),
        "space_fingerprint": space.fingerprint,
        "objective": objective.settings(),
        "objectives": directions,
        "constraints": [str(c) for c in limits],
        "strategy": strategies.describe(strategy),
        "pruner": pruner if pruner is None or isinstance(pruner, str) else type(pruner).__name__,
        "seed": seed,
        "trials": trials,
        "environment": environment(),
    }
    if isinstance(strategy, BaseSampler):
        sampler = strategy
    elif isinstance(strategy, OneShot):
        assert isinstance(objective, SupernetObjective)
        sampler = strategy.proposer(objective.decoded).sampler(space, seed)
    else:
        sampler = strategy.sampler(space, seed)
    home = study_folder(study, storage, Path(folder), space, objective, conditions)
    opened = open_study(study, storage, home, sampler, _pruner(pruner), conditions)
    helpers = [_spawn(opened, storage, home, trials, device) for _ in range(workers - 1)]
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    worker = Worker(
        opened,
        space,
        objective,
        list(directions),
        trials=trials,
        constraints=limits,
        folder=home,
        deadline=deadline,
        watched=pruner is not None,
        progress=progress,
    )
    try:
        with quiet():
            if worker.unfinished():
                objective.prepare(home, _alarm(deadline), progress)
            worker.work()
    except Paused:
        pass  # time was up while the supernet was in training
    except KeyboardInterrupt:
        print("interrupted: this is the result so far; run the same line again to go on", file=sys.stderr)
    finally:
        for helper in helpers:
            if timeout is not None or sys.exc_info()[0] is not None:
                helper.terminate()
            helper.wait()
        if dist.is_initialized():
            dist.broadcast_object_list([None])
    epochs = read_epochs(home) if isinstance(objective, SupernetObjective) else ()
    result = collect(opened, space, directions, home, conditions, epochs)
    if dist.is_initialized():
        dist.broadcast_object_list([result.to_json()])
    if isinstance(strategy, OneShot) and result.trials and not result.complete:
        warnings.warn(f"nothing was found: {'; '.join({str(t.reason) for t in result.trials})}.", stacklevel=2)
    if home is not None:
        result.save(home / RESULT)
        if result.complete or result.epochs:
            result.report()
            result.plot(home / "search.png")
        if progress:
            print(f"{result!r}\nreport: {home / 'report.html'}", file=sys.stderr)
    return result


# From names to objects ---------------------------------------------------------------------------------------------


def _check_budget(trials: int | None, timeout: float | None, workers: int, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise SettingError(f"seed={seed!r}: a seed is a whole number, 0 or more.")
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise SettingError(f"trials={trials!r}: a search needs a whole number of trials, at least 1.")
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (number and timeout > 0):
        raise SettingError(f"timeout={timeout!r}: give a positive number of seconds, or leave it out.")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SettingError(f"workers={workers!r}: a search needs at least one worker.")


def _strategy(
    strategy: str | Strategy | OptunaStrategy | OneShot | BaseSampler, settings: Mapping[str, Any]
) -> Strategy | OptunaStrategy | OneShot | BaseSampler:
    if isinstance(strategy, str):
        own = strategies.settings_of(strategy)
        if strategy not in strategies.SAMPLERS and (unknown := sorted(settings.keys() - own)):
            raise SettingError(
                f"strategy {strategy!r} has no setting {unknown[0]!r}; {nearest(unknown[0], own | _RECIPE)}"
            )
        return strategies.make(strategy, **settings)
    if settings:
        raise SettingError(
            f"search has no setting {next(iter(settings))!r}; {nearest(next(iter(settings)), _RECIPE)} "
            "A strategy that is given as an object carries its own settings."
        )
    if not isinstance(strategy, Strategy | OptunaStrategy | OneShot | BaseSampler):
        raise SettingError(f"strategy is {strategy!r:.80}: give a name, a Strategy, a OneShot or an Optuna sampler.")
    return strategy


def _reference(table: Table | tuple[Table, str] | None) -> tuple[Table, str] | None:
    """Return a table and the metric that ranks its architectures; a test metric where there is one."""
    from nasbench.table import Table

    if table is None:
        return None
    if isinstance(table, Table):
        names = [name for name in table.metrics if name != "seconds"] or list(table.metrics)
        return table, min(names, key=lambda name: ("test" not in name, "acc" not in name, names.index(name)))
    if isinstance(table, tuple) and len(table) == 2 and isinstance(table[0], Table) and isinstance(table[1], str):
        return table
    raise SettingError(f"table is {table!r:.80}: give a nasbench.Table, or (table, name of a metric).")


def _one_shot_trials(strategy: OneShot, trials: int | None) -> int:
    if strategy.trials == 1 and trials not in (None, 1):
        raise SettingError(
            f"strategy {strategy.name!r} decodes one architecture, but trials={trials}. Leave trials out, or search "
            'the shared weights with strategy="spos".'
        )
    return strategy.trials if trials is None else trials


def _supernet_objective(
    space: SearchSpace,
    data: Any,
    strategy: OneShot,
    recipe: Recipe | None,
    changes: Mapping[str, Any],
    seed: int,
    device: str,
    table: tuple[Table, str] | None,
) -> tuple[SearchSpace, Objective]:
    _check_space(space, recipe)
    if not isinstance(data, Data):
        raise SettingError(
            f"strategy {strategy.name!r} trains a supernet: it needs data, nasbench.data.load(...), not "
            f"{type(data).__name__}. A table may be given beside them, as table=."
        )
    space = space.bind(data)
    if recipe is None:
        recipe = strategy.recipe
        if "lr" in changes and is_number(changes["lr"]):  # the rate at the end keeps its share
            changes = {"lr_end": recipe.lr_end * changes["lr"] / recipe.lr, **changes}
    recipe = dataclasses.replace(recipe, **changes)
    return space, SupernetObjective(space, data, strategy, recipe, seed=seed, device=device, table=table)


def _alarm(deadline: float) -> Callable[[], None]:
    """Return a check that ends the training of a supernet when time is up; several processes cannot stop alone."""

    def check() -> None:
        if time.monotonic() >= deadline and not dist.is_initialized():
            raise Paused

    return check


def _check_space(space: SearchSpace, recipe: Recipe | None) -> None:
    if not isinstance(space, SearchSpace):
        raise SettingError(f"space is {space!r:.80}, not a SearchSpace. Try search_spaces.NASBench201().")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise SettingError(f"recipe is {type(recipe).__name__} {recipe!r:.60}: give a nasbench.Recipe.")


def _objective(
    space: SearchSpace, data: Any, recipe: Recipe | None, changes: Mapping[str, Any], seed: int, device: str
) -> tuple[SearchSpace, Objective]:
    _check_space(space, recipe)
    if isinstance(data, Data):
        space = space.bind(data)
        if hasattr(space, "objective"):
            return space, space.objective(data, recipe=recipe, seed=seed, device=device, **changes)
        if getattr(space, "ops", "dense") != "dense":
            raise SettingError(
                f"{space!r} has sparse operations, which this strategy would train densely. Use "
                'strategy="dass", which learns what to prune, or ops="dense".'
            )
        recipe = dataclasses.replace(recipe or Recipe(), **changes)
        return space, TrainObjective(space, data, recipe, seeds=(seed,), device=device)
    if recipe is not None or changes:
        given = next(iter(changes), "recipe")
        raise SettingError(
            f"{given!r} is about training, but nothing is trained: the metrics come from {type(data).__name__}."
        )
    if isinstance(data, TrainObjective):
        if space.choices != data.space.choices:
            raise SettingError(f"the objective trains {data.space!r}, but the space to search is {space!r}.")
        return data.space, data
    if isinstance(data, Objective):
        return space, data
    from nasbench.table import Table

    if isinstance(data, Table):
        data.check(space)
        return space, TableObjective(data)
    if callable(data):
        return space, FunctionObjective(data)
    raise SettingError(
        f"data is {type(data).__name__} {data!r:.60}: give nasbench.data.load(...), a Table, or a function from an "
        "architecture to metrics."
    )


def _check_metrics(names: Sequence[str], objective: Objective) -> None:
    for name in names:
        if objective.names is not None and name not in objective.names:
            raise SettingError(f"the objective does not report {name!r}; {nearest(name, objective.names)}")


def _check_combination(strategy: Any, directions: Mapping[str, str], pruner: Any, objective: Objective) -> None:
    if isinstance(strategy, Strategy):
        if reason := strategy.refuses_directions(list(directions.values())):
            raise SettingError(reason)
    elif len(directions) > 1 and not getattr(strategy, "many_objectives", True):
        raise SettingError(
            f"{type(strategy).__name__} follows one objective, not {', '.join(directions)}. "
            'Use strategy="nsga2" or "tpe", or make constraints of the others.'
        )
    if pruner is None:
        return
    if dist.is_initialized():
        raise SettingError("a pruner ends trainings on one rank alone: leave it out where several processes train.")
    if len(directions) > 1:
        raise SettingError(f"a pruner follows one objective, not {', '.join(directions)}. Leave pruner out.")
    if isinstance(objective, SupernetObjective):
        raise SettingError("a pruner ends trainings early, but a one-shot search trains one supernet: leave it out.")
    if list(directions) != ["val_accuracy"] or not objective.reports:
        raise SettingError(
            "a pruner compares validation accuracies between epochs: it needs data, trials that are trained, and "
            "objectives='val_accuracy'. Leave it out."
        )
    if not isinstance(pruner, str | BasePruner):
        raise SettingError(f"pruner is {pruner!r:.60}: give a name or an Optuna pruner. {nearest('', _PRUNERS)}")
    if isinstance(pruner, str) and pruner not in _PRUNERS:
        raise SettingError(f"no pruner is called {pruner!r}; {nearest(pruner, _PRUNERS)}")


def _pruner(pruner: str | BasePruner | None) -> BasePruner:
    if isinstance(pruner, str):
        return _PRUNERS[pruner]()
    return pruner or optuna.pruners.NopPruner()


# More processes ----------------------------------------------------------------------------------------------------


def _spawn(study: optuna.Study, storage: Any, home: Path | None, trials: int, device: str) -> subprocess.Popen[bytes]:
    assert home is not None
    url = storage if isinstance(storage, str) else f"sqlite:///{home / 'study.db'}"
    command = [sys.executable, "-m", "nasbench", "worker", "--study", home.name, "--storage", url]
    command += ["--folder", str(home.parent), "--trials", str(trials), "--device", device, "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment)


def join(
    study: str,
    storage: str | None = None,
    *,
    trials: int | None = None,
    folder: str | Path = "runs",
    space: SearchSpace | None = None,
    device: str = "auto",
    timeout: float | None = None,
    progress: bool = True,
) -> SearchResult:
    """Work on a study that another process began: everything it needs is read from the storage.

    Args:
        study: the study's name.
        storage: as for `search`; default: study.db in the study's folder.
        trials: finished trials the study is to have in all.
        space: a space of your own; spaces of `search_spaces` are made by name. No import path is read from the storage.

    Raises:
        StudyError: there is no such study, or its objective cannot be rebuilt here (a function, a table, arrays).
    """
    conditions = stored_conditions(study, storage, folder)
    objective = conditions["objective"]
    strategy = conditions["strategy"]["name"]
    foreign = None
    if objective["kind"] != "train" or not objective["data"]["load"]:
        foreign = f"evaluates a {objective['kind']} objective"
    elif strategy not in strategies.STRATEGIES:
        foreign = f"follows the strategy {strategy}"
    elif conditions["pruner"] is not None and conditions["pruner"] not in _PRUNERS:
        foreign = f"uses the pruner {conditions['pruner']}"
    if foreign:
        raise StudyError(
            f"study {study!r} {foreign} that no other process can rebuild. "
            "Run the same search line in each process instead."
        )
    settings = dict(conditions["space"])
    name = settings.pop("space")
    if space is None:
        space = search_spaces.space(name, **settings)
    chosen = dict(conditions["strategy"])
    return search(
        space,
        TrainObjective.from_settings(space, objective, device=device),
        chosen.pop("name"),
        objectives=conditions["objectives"],
        trials=conditions["trials"] if trials is None else trials,
        timeout=timeout,
        constraints=conditions["constraints"],
        metrics=objective["extra"],
        pruner=conditions["pruner"],
        study=study,
        storage=storage,
        folder=folder,
        seed=conditions["seed"],
        progress=progress,
        **chosen,
    )


def _follow(objective: Objective, space: SearchSpace) -> SearchResult:
    """On ranks above 0: train what rank 0 announces, then receive its result."""
    if not isinstance(objective, TrainObjective | SupernetObjective):
        raise SettingError("data-parallel processes are for training: start a table or function search in one process.")
    objective.follow()
    message: list[Any] = [None]
    dist.broadcast_object_list(message)
    return SearchResult.from_json(message[0], space)
