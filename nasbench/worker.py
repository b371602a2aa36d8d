"""One worker of a search: claim a trial, evaluate it, store it, until the study has all its trials."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
import torch.distributed as dist
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm

from nasbench.errors import SpaceExhausted, StudyError
from nasbench.objective import WEIGHTS, Constraint, Objective, Parent, TrialRun, checked
from nasbench.pareto import dominates
from nasbench.strategies.base import HistorySampler, Ledger, arch_of, distributions, proposal_of
from search_spaces.base import Arch, ArchError, SearchSpace

FAILURES = 5
VIOLATIONS = 1000
_HERE = platform.node().replace("/", "-")
_FATAL = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM}


class Paused(Exception):
    """The search stops here; the running trial stays as it is and is continued by the next call."""


class Worker:
    """Evaluates trials of one study, alone or beside other workers.

    A running trial holds a file lock in its folder, which the system frees when the process dies, even by `kill -9`.
    Under the study's lock a worker claims an orphan first, else a new trial; when all trials are taken but some still
    run elsewhere it waits, to adopt them should their worker die. A trial whose parent still runs waits too, and no
    other is begun meanwhile.

    Args:
        study: the Optuna study, with its sampler and pruner.
        space: bound to the data.
        objective: turns architectures into metrics.
        objectives: the metrics to optimise, in the order of the study's directions.
        trials: finished trials the study is to have in all.
        constraints: bounds; a violator is stored as pruned and does not count.
        folder: the study's folder; None: nothing is locked or written, the study lives in this process.
        deadline: time.monotonic() at which to pause.
        watched: report a validation accuracy to the study's pruner after every epoch.
        progress: show bars.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        objective: Objective,
        objectives: Sequence[str],
        *,
        trials: int,
        constraints: Sequence[Constraint] = (),
        folder: Path | None = None,
        deadline: float = float("inf"),
        watched: bool = False,
        progress: bool = True,
    ) -> None:
        self.study, self.space, self.objective, self.objectives = study, space, objective, list(objectives)
        self.trials, self.constraints, self.folder, self.deadline = trials, list(constraints), folder, deadline
        self.watched, self.progress = watched, progress
        self.finished = 0
        self._bar: tqdm[Any] | None = None
        self._shown = 0.0
        self.failures: list[str] = []
        self._violations = 0
        self._distributions: dict[str, BaseDistribution] = distributions(space)
        self._ledger = Ledger()
        self._running: list[FrozenTrial] = []
        self._known: dict[Arch, FrozenTrial] = {}
        self._refused: dict[Arch, str] = {}
        self._front: list[FrozenTrial] = []
        self._signs = [1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions]

    def work(self) -> None:
        """Evaluate trials until the study has all of them, the strategy has no more, or time is up.

        Raises:
            StudyError: five trials failed in a row, or a thousand in a row broke a constraint.
        """
        self._catch_up()
        self.failures.clear()  # those of earlier calls: their cause may be mended
        self._violations = 0
        with tqdm(
            total=self.trials,
            initial=min(self.finished, self.trials),
            desc="search",
            unit="trial",
            disable=not self.progress,
        ) as self._bar:
            try:
                while time.monotonic() < self.deadline:
                    with self._claim() as trial:
                        if trial is None:
                            if not self._running:
                                return
                            time.sleep(0.2)
                        else:
                            self._evaluate(trial)
                    self._catch_up()
                    self.show()
                    self._stop_if_hopeless()
            except (Paused, SpaceExhausted):
                self._catch_up()

    def unfinished(self) -> bool:
        """Whether the study has fewer finished trials than it is to have."""
        self._catch_up()
        return self.finished < self.trials

    # Claiming ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _claim(self) -> Iterator[optuna.Trial | None]:
        """Yield an orphan, else a new trial, else None; the trial's lock is held until the block ends."""
        with ExitStack() as held:
            with self._study_lock():
                self._catch_up()
                trial = self._orphan(held)
                left = self.finished + len(self._running) < self.trials
                if trial is None and left and not any(map(self._waits, self._running)):
                    trial = self._ask()
                    if self.folder is not None:
                        held.enter_context(self._trial_lock(trial.number))
                        self._sign_for(trial)
                        if self._waits(self.study._storage.get_trial(trial._trial_id)):
                            trial = None  # an orphan, which will be claimed when its parent is done
            if trial is not None:
                held.enter_context(_heartbeat(self.study, trial))
            yield trial
        if trial is not None and self.folder is not None:
            self._tidy(trial.number)

    def _ask(self) -> optuna.Trial:
        try:
            return self.study.ask(self._distributions)
        except SpaceExhausted as exhausted:
            # Optuna makes the trial before it asks the sampler: it must not stay behind as one that runs.
            for trial in self.study.get_trials(deepcopy=False)[::-1]:
                if trial.state == TrialState.RUNNING and not trial.params:
                    self.study._storage.set_trial_user_attr(trial._trial_id, "violation", str(exhausted))
                    self.study.tell(trial.number, state=TrialState.PRUNED)
                    break
            raise

    def _orphan(self, held: ExitStack) -> optuna.Trial | None:
        if self.folder is None:
            return None
        for running in self._running:
            here = running.user_attrs.get("worker", _HERE).split("/")[0] == _HERE
            if self._waits(running) or (not here and not _stale(self.study, running)):
                continue
            lock = self._trial_lock(running.number)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            # It may have finished between the reading of the study and the taking of its lock.
            if self.study._storage.get_trial(running._trial_id).state != TrialState.RUNNING:
                lock.release()
                continue
            held.callback(lock.release)
            trial = optuna.trial.Trial(self.study, running._trial_id)
            self._sign_for(trial)
            for name, options in self.space.choices.items():  # what its worker had not yet written down
                trial.suggest_categorical(name, options)
            return trial
        return None

    def _waits(self, trial: FrozenTrial) -> bool:
        """Whether a trial inherits from one that still runs."""
        parent = proposal_of(trial).get("parent")
        return parent is not None and any(t.number == parent for t in self._running)

    @staticmethod
    def _sign_for(trial: optuna.Trial) -> None:
        trial.set_user_attr("worker", f"{_HERE}/{os.getpid()}")

    def _study_lock(self) -> Any:
        return FileLock(self.folder / "study.lock") if self.folder is not None else nullcontext()

    def _trial_lock(self, number: int) -> FileLock:
        assert self.folder is not None
        path = self.folder / "trials" / str(number)
        path.mkdir(parents=True, exist_ok=True)
        return FileLock(path / "lock")

    # Evaluating ----------------------------------------------------------------------------------------------------

    def _evaluate(self, trial: optuna.Trial) -> None:
        """Turn a claimed trial into a stored result: complete, pruned or failed, with the reason."""
        started = time.perf_counter()
        run = _Run(trial, self)
        arch = Arch({name: trial.params[name] for name in self._distributions})
        try:
            self._check_rules(arch)
            original = self._known.get(self.objective.key(arch))
            if original is not None:
                metrics = dict(original.user_attrs["metrics"])
                run.runs = original.user_attrs.get("runs", ())
                run.supernet = original.user_attrs.get("supernet")
                trial.set_user_attr("copied_from", original.user_attrs.get("copied_from", original.number))
            else:
                self._check_constraints(self.objective.preview(arch, [c.metric for c in self.constraints]))
                metrics = checked(self.objective(arch, run), self.objectives)
                self._check_constraints(metrics)
        except (Paused, KeyboardInterrupt):
            raise
        except _Violation as violation:
            trial.set_user_attr("violation", str(violation))
            self.study.tell(trial, state=TrialState.PRUNED)
        except optuna.TrialPruned as pruned:
            trial.set_user_attr("reason", str(pruned) or "pruned")
            self.study.tell(trial, state=TrialState.PRUNED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FATAL:
                raise
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            trial.set_user_attr("traceback", traceback.format_exc(limit=-3))
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("metrics", metrics)
            if run.supernet is not None:
                trial.set_user_attr("supernet", dict(run.supernet))
            if len(run.runs) > 0:
                trial.set_user_attr("runs", [dict(r) for r in run.runs])
            trial.set_user_attr("seconds", round(time.perf_counter() - started, 3))
            self.study.tell(trial, [metrics[name] for name in self.objectives])

    def _check_rules(self, arch: Arch) -> None:
        try:
            self.space.check(arch)
        except ArchError as error:
            raise _Violation(str(error)) from error
        if (reason := self._refused.get(self.objective.key(arch))) is not None:
            raise _Violation(reason)

    def _check_constraints(self, metrics: dict[str, Any]) -> None:
        for constraint in self.constraints:
            value = metrics.get(constraint.metric)
            if value is not None and not constraint.holds(value):
                raise _Violation(f"{constraint.metric} = {value:g} breaks {constraint}")

    # Keeping count -------------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        done, running = self._ledger.read(self.study)
        # Without a folder there are no locks: a trial that runs was left by an interrupted call and is not waited for.
        self._running = running if self.folder is not None else []
        for trial in done:
            if trial.state == TrialState.FAIL:
                self.failures.append(f"trial {trial.number}: {trial.user_attrs.get('error', 'failed elsewhere')}")
                continue
            if "violation" in trial.user_attrs:
                self._violations += 1
                arch = arch_of(trial, self.space)
                if arch is not None and arch in self.space:
                    self._refused[self.objective.key(arch)] = trial.user_attrs["violation"]
                continue
            self._violations = 0
            self.failures.clear()
            self.finished += 1
            arch = arch_of(trial, self.space)
            if trial.state == TrialState.COMPLETE and arch is not None and "metrics" in trial.user_attrs:
                self._known.setdefault(self.objective.key(arch), trial)
                self._admit(trial)

    def _admit(self, trial: FrozenTrial) -> None:
        """Keep the front of the best trials; of equal ones the first."""
        new = self._score(trial)
        scores = [self._score(t) for t in self._front]
        if any(old == new or dominates(old, new) for old in scores):
            return
        self._front = [t for t, old in zip(self._front, scores, strict=True) if not dominates(new, old)] + [trial]

    def _score(self, trial: FrozenTrial) -> tuple[float, ...]:
        return tuple(sign * value for sign, value in zip(self._signs, trial.values, strict=True))

    def show(self, text: str = "") -> None:
        """Bring the bar up to date, at most twice a second."""
        if self._bar is None or (text and time.monotonic() - self._shown < 0.5):
            return
        self._shown = time.monotonic()
        best = ""
        if len(self.objectives) == 1 and self._front:
            best = f"best {self.objectives[0]} {self._front[0].value:.4g}"
        self._bar.set_postfix_str(", ".join(filter(None, (best, text))), refresh=bool(text))
        self._bar.update(min(self.finished, self.trials) - self._bar.n)

    def _stop_if_hopeless(self) -> None:
        if len(self.failures) >= FAILURES:
            reasons = "\n  ".join(self.failures[-FAILURES:])
            raise StudyError(
                f"{FAILURES} trials in a row failed, so the search stopped. What they said:\n  {reasons}\n"
                "Mend the cause and run the same line again: finished trials are kept."
            )
        if self._violations >= VIOLATIONS:
            limits = ", ".join(map(str, self.constraints)) or "the space's own rules"
            raise StudyError(
                f"{VIOLATIONS} architectures in a row broke {limits}, so the search stopped. Loosen the constraints "
                "or choose a smaller space."
            )

    def _tidy(self, number: int) -> None:
        """Drop what a finished trial no longer needs, and the weights of trials that are no longer among the best."""
        assert self.folder is not None
        with self._study_lock():
            self._catch_up()
            if any(t.number == number for t in self._running):
                return
            keep = {t.number for t in self._front} | {self._origin(number) for number in self._future_parents()}
            for weights in self.folder.glob(f"trials/*/{WEIGHTS}"):
                if weights.parent.name.isdecimal() and int(weights.parent.name) not in keep | {
                    t.number for t in self._running
                }:
                    shutil.rmtree(weights.parent, ignore_errors=True)
            folder = self.folder / "trials" / str(number)
            if number in keep:
                for path in folder.iterdir():
                    if path.name not in self.objective.keeps:
                        path.unlink()
            else:
                shutil.rmtree(folder, ignore_errors=True)

    # Parents -------------------------------------------------------------------------------------------------------

    def parent_of(self, trial: FrozenTrial) -> Parent | None:
        """Return what a trial is to inherit from, if anything."""
        number = proposal_of(trial).get("parent")
        if number is None:
            return None
        stored = self._stored(number)
        arch = arch_of(stored, self.space) if stored is not None else None
        if arch is None or self.folder is None:
            return Parent(number, arch or Arch({}), None)
        return Parent(number, arch, self.folder / "trials" / str(self._origin(number)) / WEIGHTS)

    def _future_parents(self) -> set[int]:
        """Return the parents of running trials, and the trials that the strategy may yet make parents."""
        running = (proposal_of(t).get("parent") for t in self._running)
        parents = {number for number in running if number is not None}
        sampler = self.study.sampler
        return parents | (sampler.keeps(self.study) if isinstance(sampler, HistorySampler) else set())

    def _stored(self, number: int) -> FrozenTrial | None:
        storage = self.study._storage
        try:
            return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number))
        except KeyError:
            return None

    def _origin(self, number: int) -> int:
        """Return the trial whose weights a trial has: its own, or those of an equal one before it."""
        stored = self._stored(number)
        return number if stored is None else int(stored.user_attrs.get("copied_from", number))


class _Violation(Exception):
    """A constraint is broken."""


class _Run(TrialRun):
    """What the objective sees of its trial."""

    def __init__(self, trial: optuna.Trial, worker: Worker) -> None:
        self._trial, self._worker, self._deadline = trial, worker, worker.deadline
        self.watched = worker.watched
        self.folder = worker.folder / "trials" / str(trial.number) if worker.folder is not None else None
        self.parent = worker.parent_of(trial.study._storage.get_trial(trial._trial_id))

    def show(self, text: str) -> None:
        self._worker.show(f"trial {self._trial.number}: {text}")

    def check(self) -> None:
        # One rank of several cannot leave a training alone: then the search stops between two trials only.
        if time.monotonic() >= self._deadline and not dist.is_initialized():
            raise Paused

    def report(self, epoch: int, value: float) -> None:
        known = self._trial.study._storage.get_trial(self._trial._trial_id).intermediate_values
        if epoch not in known:  # a continued trial may pass an epoch that it had reported before
            self._trial.report(value, epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"stopped by the pruner after epoch {epoch} at {value:.4f}")


@contextmanager
def _heartbeat(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Record a sign of life while the block runs, for workers on other hosts, if the storage can."""
    storage: Any = study._storage
    interval = storage.get_heartbeat_interval() if hasattr(storage, "get_heartbeat_interval") else None
    if interval is None:
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            storage.record_heartbeat(trial._trial_id)
            ended.wait(interval)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _stale(study: optuna.Study, trial: FrozenTrial) -> bool:
    storage: Any = study._storage
    if not hasattr(storage, "get_heartbeat_interval") or storage.get_heartbeat_interval() is None:
        return False
    return trial._trial_id in storage._get_stale_trial_ids(study._study_id)
