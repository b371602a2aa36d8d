"""What a black-box strategy is: a pure function from a study's history to the next architecture."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from random import Random
from threading import Lock
from typing import Any, ClassVar, TypeVar, overload

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nasbench.errors import SettingError, StudyError
from search_spaces.base import Arch, Option, SearchSpace

PROPOSAL = "nasbench:proposal"
T = TypeVar("T")


@dataclass(frozen=True)
class Proposal:
    """An architecture with what the strategy wants remembered of it.

    Args:
        arch: the architecture to try.
        parent: number of the trial whose weights it inherits, if any.
        note: small JSON-able facts, stored on the trial and given back in the history.
    """

    arch: Arch
    parent: int | None = None
    note: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PastTrial:
    """A finished trial as strategies see it; `scores` has one number per objective, and higher is always better."""

    number: int
    arch: Arch
    scores: tuple[float, ...]
    parent: int | None = None
    note: Mapping[str, Any] | None = None

    @property
    def score(self) -> float:
        """The score of the only (or first) objective; higher is better."""
        return self.scores[0]


class History(Sequence[PastTrial]):
    """The finished trials in order of completion, append-only; `pending` are the architectures now being evaluated.

    `pending_numbers` are the numbers of the trials that evaluate them, in the same order, where these are known.
    `tried` holds the architecture of every trial that was finished or pruned, for quick membership tests. `refused`
    holds those that were pruned, by a constraint or a pruner, in order, each after the number of trials then finished.

    Example:
        >>> history = History([PastTrial(0, Arch({"a": 1}), (0.5,)), PastTrial(1, Arch({"a": 2}), (0.7,))])
        >>> max(history, key=lambda trial: trial.score).arch
        Arch(a=2)
        >>> Arch({"a": 2}) in history.tried, len(history.pending)
        (True, 0)
    """

    def __init__(
        self, trials: Iterable[PastTrial] = (), pending: Iterable[Arch] = (), pending_numbers: Iterable[int] = ()
    ) -> None:
        self._trials = list(trials)
        self.tried = {trial.arch for trial in self._trials}
        self.pending = list(pending)
        self.pending_numbers = list(pending_numbers)
        self.refused: list[tuple[int, Arch]] = []
        self._recalled: tuple[object, Any] | None = None

    @overload
    def __getitem__(self, index: int) -> PastTrial: ...
    @overload
    def __getitem__(self, index: slice) -> list[PastTrial]: ...
    def __getitem__(self, index: int | slice) -> PastTrial | list[PastTrial]:
        return self._trials[index]

    def __len__(self) -> int:
        return len(self._trials)

    def append(self, trial: PastTrial) -> None:
        """Add a trial that finished after all others."""
        self._trials.append(trial)
        self.tried.add(trial.arch)

    def refuse(self, arch: Arch) -> None:
        """Add the architecture of a trial that was pruned after all others had ended."""
        self.refused.append((len(self._trials), arch))
        self.tried.add(arch)

    def recall(self, key: object, make: Callable[[], T]) -> T:
        """Return what `make` returned the last time, if that was for an equal key, else what it returns now.

        For what takes long to work out of the history; one such thing is kept. It only saves time: what is made must be
        a function of the key and the history.
        """
        if self._recalled is None or self._recalled[0] != key:
            self._recalled = key, make()
        made: T = self._recalled[1]
        return made


class Strategy(ABC):
    """A black-box strategy: a frozen dataclass of settings with one method, `propose`.

    It sees the finished trials and nothing else: no loader, file or clock. All that passes from one proposal to the
    next is the history, so an interrupted study continues exactly as if it had never stopped.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class MutateBest(Strategy):
        ...     def propose(self, space, history, rng):
        ...         if not history:
        ...             return space.sample(rng)
        ...         return space.mutate(max(history, key=lambda trial: trial.score).arch, rng)
        >>> from search_spaces import NASBench201
        >>> study = optuna.create_study(sampler=MutateBest().sampler(NASBench201(), seed=0))
        >>> trial = study.ask(distributions(NASBench201()))
        >>> Arch(trial.params) in NASBench201()
        True
    """

    many_objectives: ClassVar[bool] = False
    """Whether the strategy can follow several objectives at once."""

    @abstractmethod
    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch | Proposal:
        """Return the next architecture to try.

        Args:
            space: what to choose from.
            history: finished trials in order of completion, with `history.pending`.
            rng: fresh for every trial, made from the study's seed and the trial's number.

        Raises:
            SpaceExhausted: there is nothing left to propose; the search then ends normally.
        """

    def refuses(self, space: SearchSpace) -> str | None:
        """Return why the strategy cannot search this space, or None: every space will do, unless it says otherwise."""
        return None

    def refuses_directions(self, directions: Sequence[str]) -> str | None:
        """Return why the strategy cannot follow objectives of these directions, each "maximize" or "minimize", or None.

        Unless it says otherwise, any direction will do, and several if `many_objectives`.
        """
        if len(directions) == 1 or self.many_objectives:
            return None
        return (
            f"{type(self).__name__} follows one objective, the study has {len(directions)}. "
            'Use strategy="nsga2" or "tpe", or keep one objective and make constraints of the others.'
        )

    def keeps(self, space: SearchSpace, history: History) -> set[int]:
        """Return the numbers of finished trials that may yet be a `Proposal`'s parent: their weights are kept.

        Whatever finishes after this, of the trials in the history no other may become a parent. Trials now running, the
        parents of these, and the best so far are kept anyway.
        """
        return set()

    def sampler(self, space: SearchSpace, seed: int = 0) -> BaseSampler:
        """Return the strategy as an Optuna sampler, for `optuna.create_study(sampler=...)`.

        Raises:
            SettingError: the strategy cannot search this space.
        """
        if (reason := self.refuses(space)) is not None:
            raise SettingError(reason)
        return HistorySampler(self, space, seed)

    def settings(self) -> dict[str, Any]:
        """Return the JSON-able settings a study is checked against when it is continued."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return the Optuna distributions of a space: a trial's `params` are then an architecture's options."""
    return {decision: CategoricalDistribution(options) for decision, options in space.choices.items()}


def arch_of(trial: FrozenTrial, space: SearchSpace) -> Arch | None:
    """Return the architecture a trial stands for, or None if its parameters are not (yet) all there."""
    if not space.choices.keys() <= trial.params.keys():
        return None
    return Arch({decision: trial.params[decision] for decision in space.choices})


def proposal_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parent and the note that a strategy wanted remembered of a trial, by these names, if it did.

    They are of what was proposed: where the user enqueued other options there are none.
    """
    stored = trial.system_attrs.get(PROPOSAL, {})
    if any(trial.params.get(decision, option) != option for decision, option in stored.get("arch", {}).items()):
        return {}
    return {key: value for key, value in stored.items() if key in ("parent", "note")}


class Ledger:
    """Reads a study's trials, each finished one only once: a read costs the same at trial 10,000 as at trial 1,000."""

    def __init__(self) -> None:
        self._seen = 0
        self._open: list[int] = []

    def read(self, study: optuna.Study) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        """Return the trials finished since the last read, in order of completion, and those still running."""
        fresh = self._fetch(study)
        running = [t for t in fresh if not t.state.is_finished()]
        self._seen = max([self._seen, *(t.number + 1 for t in fresh)])
        self._open = [t.number for t in running]
        done = [t for t in fresh if t.state.is_finished()]
        done.sort(key=lambda t: (t.datetime_complete, t.number))
        return done, [t for t in running if t.state == TrialState.RUNNING]

    def _fetch(self, study: optuna.Study) -> list[FrozenTrial]:
        """Return the trials that were running at the last read, and those that are new."""
        storage = study._storage
        if not isinstance(storage, InMemoryStorage):
            trials = storage.get_all_trials(study._study_id, deepcopy=False)  # all, where Hyperband shows a bracket
            return [trials[i] for i in (*self._open, *range(self._seen, len(trials)))]
        # A list of all trials, however shallow, would make each read dearer than the last.
        fetched = []
        for number in chain(self._open, count(self._seen)):
            try:
                key = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
            except KeyError:
                break
            fetched.append(storage.get_trial(key))
        return fetched


class HistorySampler(BaseSampler):
    """An Optuna sampler that asks a strategy; made by `Strategy.sampler`."""

    def __init__(self, strategy: Strategy, space: SearchSpace, seed: int = 0) -> None:
        self.strategy = strategy
        self.space = space
        self.seed = seed
        self._study: tuple[str, int] | None = None
        self._distributions = distributions(space)
        self._ledger = Ledger()
        self._history = History()
        self._lock = Lock()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space: an architecture is proposed at once."""
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Option]:
        """Ask the strategy for an architecture, unless a worker that died had already: then parent and note stand."""
        if "arch" in (stored := trial.system_attrs.get(PROPOSAL, {})):
            return dict(stored["arch"])
        with self._lock:  # threads of one study share the history
            history = self._read(study, trial)
            proposal = self.strategy.propose(self.space, history, Random(f"{self.seed}/{trial.number}"))
        if isinstance(proposal, Arch):
            proposal = Proposal(proposal)
        if proposal.parent is not None or proposal.note is not None:
            remembered = {"parent": proposal.parent, "note": proposal.note, "arch": dict(proposal.arch)}
            as_read = json.loads(json.dumps(remembered))  # the same in memory as from a file; no JSON fails here
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, as_read)
        return dict(proposal.arch)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: everything of the space was already proposed."""
        raise StudyError(
            f"{type(self.strategy).__name__} proposes {', '.join(self._distributions)}; the objective also asks for "
            f"{param_name!r} = {param_distribution}. Suggest exactly the space's choices."
        )

    def keeps(self, study: optuna.Study) -> set[int]:
        """Return the numbers of finished trials whose weights the strategy may yet want to inherit."""
        with self._lock:
            return self.strategy.keeps(self.space, self._read(study))

    def _read(self, study: optuna.Study, current: FrozenTrial | None = None) -> History:
        name = (study.study_name, id(study._storage))
        if name != self._study:
            if (reason := self.strategy.refuses_directions([d.name.lower() for d in study.directions])) is not None:
                raise SettingError(reason)
            self._study, self._ledger, self._history = name, Ledger(), History()
        done, running = self._ledger.read(study)
        signs = [1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions]
        for trial in done:
            arch = arch_of(trial, self.space)
            if trial.state == TrialState.COMPLETE and arch is not None:
                scores = tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))
                self._history.append(PastTrial(trial.number, arch, scores, **proposal_of(trial)))
            elif trial.state == TrialState.PRUNED and arch is not None:
                self._history.refuse(arch)
        others = [t for t in running if current is None or t.number != current.number]
        pending = [(t.number, arch) for t in others if (arch := arch_of(t, self.space)) is not None]
        self._history.pending = [arch for _, arch in pending]
        self._history.pending_numbers = [number for number, _ in pending]
        return self._history
