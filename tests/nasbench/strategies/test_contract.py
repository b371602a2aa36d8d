"""What every strategy must do. A new one gets these tests by its line in STRATEGIES, and in SETTINGS if it has any."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from nasbench.errors import SettingError
from nasbench.strategies import STRATEGIES, LocalSearch, describe, distributions, make
from search_spaces.base import Arch, SearchSpace
from search_spaces.plain_cnn import PlainCNN
from search_spaces.resnet import ResNet

SPACE = ResNet(depths=(1, 2), widths=(4, 8, 16))
SPACES: dict[str, SearchSpace] = {  # of strategies that need one of their own
    "eas": PlainCNN(widths=(4, 8, 16, 32), fc_widths=(8, 16, 32), blocks=2, slots=3, fc_slots=2),
}
# Small settings, so that a dozen trials see every phase of a strategy.
SETTINGS: dict[str, dict[str, Any]] = {
    "evolution": {"population": 4, "sample": 2, "crossover": 0.5},
    "reinforce": {"batch": 3, "policy_lr": 0.05},
    "eas": {"widen": 1, "deepen": 1, "batch": 3, "restart": 5, "hidden": 4},
    "linas": {"population": 4, "evaluations": 40},
    "tpe": {"n_startup_trials": 4},
    "gp": {"n_startup_trials": 2},
    "nsga2": {"population_size": 4},
    "nsga3": {"population_size": 4},
}
TRIALS = {"gp": 4}  # a Gaussian process is slow


class Killed(BaseException):
    """Stands for `kill -9`: nobody catches it."""


@dataclass(frozen=True)
class Case:
    """A strategy by name with small settings, and studies of it."""

    name: str
    objectives: int = 1

    @property
    def trials(self) -> int:
        return TRIALS.get(self.name, 14)

    @property
    def directions(self) -> list[str]:
        return ["maximize", "minimize"][: self.objectives]

    @property
    def space(self) -> SearchSpace:
        return SPACES.get(self.name, SPACE)

    def strategy(self) -> Any:
        return make(self.name, **SETTINGS.get(self.name, {}))

    def study(self, seed: int = 0, storage: Any = None) -> optuna.Study:
        sampler = self.strategy().sampler(self.space, seed)
        return optuna.create_study(
            study_name="study", storage=storage, directions=self.directions, sampler=sampler, load_if_exists=True
        )

    def values(self, arch: dict[str, Any]) -> list[float]:
        """What a trial is told: an accuracy with several peaks, and a cost."""
        code = self.space.encode(arch)
        quality = sum((3 + i) * position for i, position in enumerate(code)) % 11
        return [quality / 11, float(sum(code))][: self.objectives]

    def run(self, study: optuna.Study, trials: int | None = None) -> list[Arch]:
        """Evaluate trials one after the other; return what was proposed."""
        archs = []
        for _ in range(trials or self.trials):
            trial = self.ask(study)
            study.tell(trial, self.values(trial.params))
            archs.append(Arch(trial.params))
        return archs

    def ask(self, study: optuna.Study) -> optuna.Trial:
        return study.ask(distributions(self.space))

    def restarted(self, study: optuna.Study) -> optuna.Study:
        """What another process finds: all that was stored, and nothing else; a new sampler."""
        storage = InMemoryStorage()
        optuna.copy_study(from_study_name=study.study_name, from_storage=study._storage, to_storage=storage)
        return self.study(storage=storage)


CASES = [Case(name) for name in STRATEGIES] + [
    Case(name, objectives=2) for name in STRATEGIES if make(name).many_objectives and name != "gp"
]


@pytest.fixture(params=CASES, ids=lambda case: case.name + "-2" * (case.objectives == 2))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# Proposals ---------------------------------------------------------------------------------------------------------


def test_proposals_are_of_the_space(case: Case) -> None:
    archs = case.run(case.study())
    assert all(arch in case.space for arch in archs)
    assert all(list(arch) == list(case.space.choices) for arch in archs)
    assert len(set(archs)) > len(archs) // 2


def test_a_seed_fixes_the_study(case: Case) -> None:
    first, again, other = (case.run(case.study(seed)) for seed in (3, 3, 4))
    assert first == again
    assert (first == other) is (case.name == "grid")  # there is nothing random in a grid


def test_global_random_numbers_are_neither_used_nor_changed(case: Case) -> None:
    first = case.run(case.study())
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    assert case.run(case.study()) == first
    after = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    assert after[0] == before[0]
    assert str(after[1]) == str(before[1])
    assert torch.equal(after[2], before[2])


# Restarts ----------------------------------------------------------------------------------------------------------


def test_a_study_continues_as_if_unbroken_wherever_it_is_cut(case: Case) -> None:
    study = case.study()
    for number in range(case.trials):
        restarted = case.ask(case.restarted(study))
        trial = case.ask(study)
        assert restarted.params == trial.params, f"cut before trial {number}"
        study.tell(trial, case.values(trial.params))


def test_a_study_continues_as_if_unbroken_with_trials_running_failed_and_finished_out_of_order(case: Case) -> None:
    study = case.study()
    running: list[optuna.Trial] = []
    for number in range(case.trials):
        restarted = case.ask(case.restarted(study))
        running.append(case.ask(study))
        assert restarted.params == running[-1].params, f"cut before trial {number}"
        if len(running) == 2:
            trial = running.pop(number % 2)  # now the older, now the younger
            failed = number % 4 == 3
            study.tell(trial, None if failed else case.values(trial.params), TrialState.FAIL if failed else None)


def test_a_trial_whose_worker_died_is_proposed_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    study = case.study()
    for number in range(case.trials):
        written = (0, 1, 4)[number % 3]
        dying = case.restarted(study)
        with monkeypatch.context() as patch:
            patch.setattr(dying._storage, "set_trial_param", dies_after(written, dying._storage.set_trial_param))
            with pytest.raises(Killed):
                case.ask(dying)
        left = dying.trials[-1]
        assert (left.number, len(left.params)) == (number, written)

        adopter = case.restarted(dying)
        adopted = optuna.trial.Trial(adopter, adopter.trials[-1]._trial_id)  # as a worker claims an orphan
        for name, options in case.space.choices.items():
            adopted.suggest_categorical(name, options)
        trial = case.ask(study)
        assert adopted.params == trial.params, f"trial {number} with {written} parameters written"
        study.tell(trial, case.values(trial.params))


def dies_after(calls: int, function: Any) -> Any:
    left = iter(range(calls))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return function(*args, **kwargs)

    return dying


@pytest.mark.parametrize("case", [Case("evolution"), Case("nsga2", objectives=2)], ids=lambda case: case.name)
def test_a_study_on_disk_continues_as_if_unbroken(case: Case, tmp_path: Path) -> None:
    parts = [case.run(case.study(storage=f"sqlite:///{tmp_path}/study.db"), trials) for trials in (2, 3, 4)]
    assert [arch for part in parts for arch in part] == case.run(case.study(), 9)


# Plain Optuna ------------------------------------------------------------------------------------------------------


def test_a_sampler_serves_plain_optuna(case: Case) -> None:
    def objective(trial: optuna.Trial) -> list[float]:
        return case.values({name: trial.suggest_categorical(name, o) for name, o in case.space.choices.items()})

    study = optuna.create_study(directions=case.directions, sampler=case.strategy().sampler(case.space, seed=0))
    study.optimize(objective, n_trials=case.trials)
    assert [Arch(trial.params) for trial in study.trials] == case.run(case.study())


def test_a_strategy_for_one_objective_refuses_two() -> None:
    for name in STRATEGIES:
        strategy, case = make(name), Case(name)
        if not strategy.many_objectives:
            study = optuna.create_study(directions=["maximize"] * 2, sampler=strategy.sampler(case.space))
            with pytest.raises(SettingError, match=rf"{type(strategy).__name__} follows one objective.* has 2.*nsga2"):
                case.ask(study)


def test_a_space_of_one_option_is_no_special_case() -> None:
    space = ResNet(depths=(1,), widths=(4,))
    for name in set(STRATEGIES) - {"evolution", "eas"}:  # which have nothing to mutate or to grow, and say so
        trial = optuna.create_study(sampler=make(name).sampler(space)).ask(distributions(space))
        assert Arch(trial.params) == space.at(0)


# Names and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_description_is_json_and_makes_the_same_strategy_again(name: str) -> None:
    description = describe(make(name, **SETTINGS.get(name, {})))
    read = json.loads(json.dumps(description))
    assert read == description
    assert read.pop("name") == name
    assert read.items() >= SETTINGS.get(name, {}).items()
    assert describe(make(name, **read)) == description


def test_descriptions_tell_settings_and_strategies_apart() -> None:
    described = [describe(make(name)) for name in STRATEGIES]
    described += [describe(make(name, **settings)) for name, settings in SETTINGS.items()]
    assert len({json.dumps(d) for d in described}) == len(STRATEGIES) + len(SETTINGS)


def test_strategies_of_the_users_own_are_described_by_their_class() -> None:
    @dataclass(frozen=True)
    class Mine(LocalSearch):
        depth: int = 3

    assert describe(Mine(4)) == {"name": f"{__name__}:{Mine.__qualname__}", "depth": 4}
    assert describe(RandomSampler()) == {"name": "optuna:RandomSampler"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("evolutoin", "no strategy is called 'evolutoin'; did you mean 'evolution'"),
        ("local-search", "did you mean 'local_search'"),
        ("nsga", "did you mean 'nsga[23]' or 'nsga[23]'"),
        ("hyperband", "Known: darts, dass, drnas, eas, evolution, .*top_evolution, tpe"),
        ("cmaes", "'cmaes' is not offered: .* cannot handle named options.* Known: .*evolution"),
        ("bruteforce", "'bruteforce' is not offered: .*'grid'"),
    ],
)
def test_make_names_the_nearest_strategies(name: str, expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        make(name)


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("evolution", "populations", "'evolution' has no setting 'populations'; did you mean 'population'"),
        ("evolution", "seed", "has no setting 'seed'; .*Known: aging, crossover, population, sample"),
        ("grid", "population", "'grid' has no setting 'population'"),
        ("tpe", "n_startup_trails", "TPESampler has no option 'n_startup_trails'; did you mean 'n_startup_trials'"),
        ("random", "population", "RandomSampler has no option 'population'"),
    ],
)
def test_make_names_the_nearest_settings(name: str, setting: str, expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        make(name, **{setting: 5})
