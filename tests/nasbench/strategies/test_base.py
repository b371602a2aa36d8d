"""A strategy sees each finished trial once, in order of completion, and what it wanted remembered comes back."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from threading import Event, current_thread
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from nasbench.errors import SettingError, StudyError
from nasbench.strategies import History, PastTrial, Proposal, Strategy, distributions
from nasbench.strategies.base import Ledger, arch_of, proposal_of
from search_spaces.base import Arch, SearchSpace
from search_spaces.resnet import ResNet

SPACE = ResNet(depths=(1, 2), widths=(4, 8, 16))


@dataclass(frozen=True)
class View:
    """What a strategy was shown for one proposal."""

    trials: list[PastTrial]
    pending: list[Arch]
    tried: set[Arch]
    draw: float

    @property
    def numbers(self) -> list[int]:
        return [trial.number for trial in self.trials]


@dataclass(frozen=True)
class Watcher(Strategy):
    """Proposes what it is told to, else at random, and keeps what it was shown."""

    proposals: list[Proposal] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch | Proposal:
        self.views.append(View(list(history), list(history.pending), set(history.tried), rng.random()))
        return self.proposals.pop(0) if self.proposals else space.sample(rng)


@dataclass(frozen=True)
class ManyWatcher(Watcher):
    many_objectives = True


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def study(watcher: Watcher) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=watcher.sampler(SPACE))


# In memory, and in a data base that happens to be there too: a ledger reads them in different ways.
both_storages = pytest.mark.parametrize("storage", [None, "sqlite:///:memory:"], ids=["memory", "sqlite"])


def ask(study: optuna.Study) -> optuna.Trial:
    return study.ask(distributions(SPACE))


def run(study: optuna.Study, trials: int) -> None:
    for number in range(trials):
        study.tell(ask(study), float(number))


# History -----------------------------------------------------------------------------------------------------------


def test_a_history_is_a_sequence_that_grows_at_its_end() -> None:
    archs = [SPACE.at(i) for i in (5, 9, 2)]
    trials = [PastTrial(i, arch, (i / 10,)) for i, arch in enumerate(archs)]
    history = History(trials[:2], pending=[archs[2]])
    assert (len(history), history[-1], history[:1], history.pending) == (2, trials[1], trials[:1], [archs[2]])
    assert history.tried == {archs[0], archs[1]}
    history.append(trials[2])
    assert list(history) == trials
    assert history.tried == set(archs)
    history.refuse(SPACE.at(3))
    assert history.refused == [(3, SPACE.at(3))]
    assert history.tried == {*archs, SPACE.at(3)}
    assert list(history) == trials
    assert not History()


def test_what_was_worked_out_of_a_history_is_recalled_while_it_is_of_the_same() -> None:
    history, other, made = History(), History(), []

    def make() -> int:
        made.append(None)
        return len(made)

    found = [h.recall((of, 1), make) for h, of in ((history, "a"), (history, "a"), (history, "b"), (other, "b"))]
    assert found == [1, 1, 2, 3]


def test_the_score_is_that_of_the_first_objective() -> None:
    assert PastTrial(0, SPACE.at(0), (0.25, -7.0)).score == 0.25


def test_distributions_offer_the_options_of_every_decision_in_order() -> None:
    found = distributions(SPACE)
    assert list(found) == list(SPACE.choices)
    assert found["width0"] == CategoricalDistribution((4, 8, 16))


# What a strategy is shown ------------------------------------------------------------------------------------------


def test_the_history_is_in_order_of_completion(watcher: Watcher, study: optuna.Study) -> None:
    trials = [ask(study) for _ in range(5)]
    for number in (2, 0):
        study.tell(trials[number], number / 10)
    ask(study)
    for number in (4, 1, 3):
        study.tell(trials[number], number / 10)
    ask(study)
    assert [view.numbers for view in watcher.views] == [[]] * 5 + [[2, 0], [2, 0, 4, 1, 3]]
    assert [trial.score for trial in watcher.views[-1].trials] == [0.2, 0.0, 0.4, 0.1, 0.3]
    assert all(trial.arch == Arch(trials[trial.number].params) for trial in watcher.views[-1].trials)


def test_the_order_of_completion_survives_a_restart(watcher: Watcher, study: optuna.Study) -> None:
    trials = [ask(study) for _ in range(4)]
    for number in (3, 0, 2, 1):
        study.tell(trials[number], 0.5)
    ask(optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=watcher.sampler(SPACE)))
    assert watcher.views[-1].numbers == [3, 0, 2, 1]


def test_running_trials_are_pending_until_they_finish(watcher: Watcher, study: optuna.Study) -> None:
    first, second = ask(study), ask(study)
    archs = [Arch(first.params), Arch(second.params)]
    ask(study)
    study.tell(first, 0.5)
    ask(study)
    assert [len(view.pending) for view in watcher.views] == [0, 1, 2, 2]
    assert watcher.views[2].pending == archs
    assert watcher.views[3].pending[0] == archs[1]
    assert watcher.views[2].tried == set()
    assert watcher.views[3].tried == {archs[0]}


def test_a_trial_without_parameters_yet_is_not_pending(watcher: Watcher, study: optuna.Study) -> None:
    study._storage.create_new_trial(study._study_id)
    half = study.ask()
    half.suggest_categorical("depth0", SPACE.depths)
    ask(study)
    assert watcher.views[-1].pending == []


def test_failed_and_pruned_trials_are_not_in_the_history(watcher: Watcher, study: optuna.Study) -> None:
    states = [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE]
    for state in states:
        trial = ask(study)
        trial.report(0.5, step=0)
        study.tell(trial, 0.5 if state == TrialState.COMPLETE else None, state=state)
    with pytest.warns(UserWarning, match="nan"):
        study.tell(ask(study), math.nan)  # which Optuna counts as failed
    ask(study)
    assert watcher.views[-1].numbers == [0, 3]
    assert watcher.views[-1].pending == []


def test_minimised_objectives_are_turned_around() -> None:
    watcher = ManyWatcher()
    study = optuna.create_study(directions=["minimize", "maximize", "minimize"], sampler=watcher.sampler(SPACE))
    study.tell(ask(study), [0.25, 0.5, -2.0])
    ask(study)
    (trial,) = watcher.views[-1].trials
    assert trial.scores == (-0.25, 0.5, 2.0)
    assert trial.score == -0.25


def test_two_objectives_are_refused_unless_the_strategy_can_follow_them(watcher: Watcher) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=watcher.sampler(SPACE))
    with pytest.raises(SettingError, match="Watcher follows one objective, the study has 2.*make constraints"):
        ask(study)
    assert watcher.views == []


def test_random_numbers_are_fresh_for_every_trial_and_the_same_for_every_run() -> None:
    def draws(seed: int, *scores: float | None) -> list[float]:
        watcher = Watcher()
        study = optuna.create_study(direction="maximize", sampler=watcher.sampler(SPACE, seed))
        for score in scores:
            study.tell(ask(study), score, state=TrialState.FAIL if score is None else None)
        return [view.draw for view in watcher.views]

    first = draws(0, 0.1, 0.2, 0.3)
    assert len(set(first)) == 3
    assert draws(0, 0.9, None, 0.1) == first  # whatever happened before
    assert not set(draws(1, 0.1, 0.2, 0.3)) & set(first)


def test_a_sampler_that_serves_two_studies_keeps_their_histories_apart(watcher: Watcher) -> None:
    sampler = watcher.sampler(SPACE)
    one, two = (optuna.create_study(direction=d, sampler=sampler) for d in ("maximize", "minimize"))
    run(one, 2)
    run(two, 1)
    run(one, 1)
    run(two, 1)
    assert [view.numbers for view in watcher.views] == [[], [0], [], [0, 1], [0]]


@both_storages
def test_the_history_is_whole_under_hyperband(watcher: Watcher, storage: str | None) -> None:
    # Optuna shows a sampler only the trials of the running trial's bracket.
    def objective(trial: optuna.Trial) -> float:
        score = sum(SPACE.encode({d: trial.suggest_categorical(d, o) for d, o in SPACE.choices.items()}))
        trial.report(score, step=1)
        if trial.should_prune():
            raise optuna.TrialPruned
        return float(score)

    pruner = optuna.pruners.HyperbandPruner(max_resource=9)
    sampler = watcher.sampler(SPACE)
    study = optuna.create_study(
        study_name="brackets", direction="maximize", storage=storage, sampler=sampler, pruner=pruner
    )
    study.optimize(objective, n_trials=8)
    complete = [trial.number for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(complete) > 3
    for number, view in enumerate(watcher.views):
        assert view.numbers == [c for c in complete if c < number]


def test_threads_of_one_study_see_each_finished_trial_once(
    watcher: Watcher, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As under study.optimize(n_jobs=2): one thread has read the trials, and gets on only after another has asked too.
    run(study, 3)
    here, taken, overtaken, read = current_thread(), Event(), Event(), Ledger.read

    def read_slowly(ledger: Ledger, study: optuna.Study) -> Any:
        trials = read(ledger, study)
        if current_thread() is not here:
            taken.set()
            overtaken.wait(timeout=0.3)  # in vain, if a lock keeps the other thread waiting
        return trials

    monkeypatch.setattr(Ledger, "read", read_slowly)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, study)
        assert taken.wait(timeout=30)
        ask(study)
        overtaken.set()
        slow.result()
    ask(study)
    assert [view.numbers for view in watcher.views[-3:]] == [[0, 1, 2]] * 3
    assert len(watcher.views[-1].pending) == 2


# Foreign trials ----------------------------------------------------------------------------------------------------


def foreign(params: dict[str, Any]) -> FrozenTrial:
    kinds = distributions(SPACE)
    found = {name: kinds.get(name, CategoricalDistribution((value,))) for name, value in params.items()}
    return optuna.create_trial(params=params, distributions=found, value=0.75)


def test_trials_that_were_added_by_hand_are_in_the_history(watcher: Watcher, study: optuna.Study) -> None:
    study.add_trial(foreign({**SPACE.at(7), "lr": 0.1}))
    ask(study)
    assert watcher.views[-1].trials == [PastTrial(0, SPACE.at(7), (0.75,))]


@pytest.mark.parametrize(
    "params",
    [{}, {"lr": 0.1}, {"depth0": 1}, {"depth0": 1, "lr": 0.1}],
    ids=["none", "other", "some", "some and other"],
)
def test_trials_that_lack_decisions_stand_for_no_architecture(
    watcher: Watcher, study: optuna.Study, params: dict[str, Any]
) -> None:
    assert arch_of(foreign(params), SPACE) is None
    study.add_trial(foreign(params))
    ask(study)
    assert watcher.views[-1].trials == []


def test_enqueued_architectures_come_first_and_are_in_the_history(watcher: Watcher, study: optuna.Study) -> None:
    study.enqueue_trial(dict(SPACE.at(50)))
    trial = ask(study)
    assert Arch(trial.params) == SPACE.at(50)
    study.tell(trial, 0.5)
    ask(study)
    assert watcher.views[-1].trials == [PastTrial(0, SPACE.at(50), (0.5,))]


# What a strategy answers -------------------------------------------------------------------------------------------


def test_parent_and_note_come_back_in_the_history(watcher: Watcher, study: optuna.Study) -> None:
    note = {"phase": "warm-up", "step": 3, "bias": [0.5, None]}
    watcher.proposals.extend([Proposal(SPACE.at(1)), Proposal(SPACE.at(2), parent=0), Proposal(SPACE.at(3), note=note)])
    run(study, 3)
    ask(optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=watcher.sampler(SPACE)))
    assert watcher.views[-1].trials == [
        PastTrial(0, SPACE.at(1), (0.0,)),
        PastTrial(1, SPACE.at(2), (1.0,), parent=0),
        PastTrial(2, SPACE.at(3), (2.0,), note=note),
    ]


def test_where_the_user_enqueued_some_options_parent_and_note_of_the_proposal_do_not_stand(
    watcher: Watcher, study: optuna.Study
) -> None:
    # Weights of a parent that was chosen for another child would not fit, and the note would teach what is wrong.
    study.enqueue_trial({"depth0": 2})
    watcher.proposals.extend([Proposal(SPACE.at(0), parent=7, note={"step": 1}), Proposal(SPACE.at(1), parent=7)])
    mixed = ask(study)
    arch = Arch(mixed.params)
    assert arch == SPACE.at(0) | {"depth0": 2} != SPACE.at(0)
    assert proposal_of(study._storage.get_trial(mixed._trial_id)) == {}
    study.tell(mixed, 0.0)
    run(study, 1)
    ask(study)
    assert watcher.views[-1].trials == [PastTrial(0, arch, (0.0,)), PastTrial(1, SPACE.at(1), (0.0,), parent=7)]


@both_storages
def test_notes_read_the_same_from_every_storage(storage: str | None) -> None:
    watcher = Watcher([Proposal(SPACE.at(1), note={"path": (1, 2), "counts": {3: 4}})])
    study = optuna.create_study(storage=storage, sampler=watcher.sampler(SPACE))
    run(study, 1)
    ask(study)
    assert watcher.views[-1].trials[0].note == {"path": [1, 2], "counts": {"3": 4}}  # as JSON has it


@pytest.mark.parametrize("note", [{"best": {1, 2}}, {"arch": SPACE.at(0)}], ids=["set", "arch"])
def test_a_note_that_is_no_json_fails_at_once(watcher: Watcher, study: optuna.Study, note: dict[str, Any]) -> None:
    watcher.proposals.append(Proposal(SPACE.at(1), note=note))
    with pytest.raises((TypeError, ValueError), match="JSON"):
        ask(study)
    assert study.trials[0].system_attrs == {}
    assert study.trials[0].params == {}


def test_an_objective_that_asks_for_more_than_the_space_is_refused(study: optuna.Study) -> None:
    trial = ask(study)
    with pytest.raises(
        StudyError, match="Watcher proposes depth0, .*; the objective also asks for 'lr' = Float.*Suggest"
    ):
        trial.suggest_float("lr", 0.01, 0.1)


# Ledger ------------------------------------------------------------------------------------------------------------


@both_storages
def test_a_ledger_gives_each_finished_trial_once(watcher: Watcher, storage: str | None) -> None:
    study = optuna.create_study(direction="maximize", storage=storage, sampler=watcher.sampler(SPACE))
    ledger = Ledger()

    def read() -> tuple[list[int], list[int]]:
        done, running = ledger.read(study)
        return [t.number for t in done], [t.number for t in running]

    assert read() == ([], [])
    trials = [ask(study) for _ in range(4)]
    assert read() == ([], [0, 1, 2, 3])
    study.tell(trials[3], 0.5)
    study.tell(trials[1], state=TrialState.FAIL)
    assert read() == ([3, 1], [0, 2])
    assert read() == ([], [0, 2])
    trials.append(ask(study))
    study.tell(trials[4], 0.5)
    study.tell(trials[0], state=TrialState.PRUNED)
    assert read() == ([4, 0], [2])
    study.tell(trials[2], 0.5)
    assert read() == ([2], [])


def test_a_queued_trial_is_not_running(study: optuna.Study) -> None:
    # A worker that took it for one would wait for it instead of starting it.
    ledger = Ledger()
    study.enqueue_trial(dict(SPACE.at(3)))
    assert ledger.read(study) == ([], [])
    trial = ask(study)
    assert [t.number for t in ledger.read(study)[1]] == [0]
    study.tell(trial, 0.5)
    assert [t.number for t in ledger.read(study)[0]] == [0]


def test_a_ledger_looks_at_a_finished_trial_no_more(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Counter[int]()

    def look(trial: FrozenTrial) -> Any:
        looks[trial.number] += 1
        return vars(trial)["state"]

    def change(trial: FrozenTrial, state: TrialState) -> None:
        vars(trial)["state"] = state

    monkeypatch.setattr(FrozenTrial, "state", property(look, change), raising=False)
    ledger = Ledger()
    open_trial = ask(study)
    for number in range(1, 20):
        run(study, 1)
        looks.clear()
        ledger.read(study)
        assert set(looks) == {0, number}
    study.tell(open_trial, 0.5)
    ledger.read(study)
    looks.clear()
    ledger.read(study)
    assert not looks
