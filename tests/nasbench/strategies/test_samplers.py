"""Optuna's samplers go by our rules: options are checked at once, and restarts repeat nothing."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import InMemoryStorage

from nasbench.errors import SettingError
from nasbench.strategies import OptunaStrategy, distributions
from nasbench.strategies.samplers import UNFIT
from search_spaces.base import Arch
from search_spaces.resnet import ResNet

SPACE = ResNet(depths=(1, 2), widths=(4, 8, 16))


def run(strategy: OptunaStrategy, trials: int, seed: int = 0, storage: InMemoryStorage | None = None) -> list[Arch]:
    """Go on with a study (a new one, if no storage is given) with a new sampler; return what was proposed."""
    study = optuna.create_study(
        study_name="study",
        direction="maximize",
        storage=storage,
        sampler=strategy.sampler(SPACE, seed),
        load_if_exists=True,
    )
    archs = []
    for _ in range(trials):
        trial = study.ask(distributions(SPACE))
        study.tell(trial, float(sum(SPACE.encode(trial.params))))
        archs.append(Arch(trial.params))
    return archs


# Names and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tpee", "Optuna has no sampler 'tpee' here; did you mean 'tpe'. Known: gp, nsga2, nsga3, random, tpe"),
        ("NSGAIISampler", "Optuna has no sampler 'NSGAIISampler' here; .*Known: gp"),
        ("cmaes", "'cmaes' is not offered: CMA-ES cannot handle named options.* draw at random.*Known: gp"),
        ("qmc", "'qmc' is not offered: quasi-random sequences need numbers.* draw at random"),
        ("bruteforce", "'bruteforce' is not offered: it stops Optuna's own loop.*'grid' tries everything once"),
    ],
)
def test_samplers_that_do_not_fit_are_refused_with_the_reason(name: str, expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        OptunaStrategy(name)


def test_every_unfit_sampler_has_a_reason() -> None:
    for name, reason in UNFIT.items():
        with pytest.raises(SettingError) as caught:
            OptunaStrategy(name)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("tpe", {"n_startup": 5}, "TPESampler has no option 'n_startup'; did you mean 'n_startup_trials'"),
        ("random", {"n_startup_trials": 5}, "RandomSampler has no option 'n_startup_trials'"),
        (
            "nsga2",
            {"populationsize": 5},
            "NSGAIISampler has no option 'populationsize'; did you mean 'population_size'",
        ),
        ("nsga2", {"population_size": 1}, "NSGAIISampler refuses {'population_size': 1}: .*greater than or equal to 2"),
        ("nsga3", {"mutation_prob": 1.5}, "NSGAIIISampler refuses {'mutation_prob': 1.5}: .*mutation_prob"),
    ],
)
def test_wrong_options_are_refused_at_once(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        OptunaStrategy(name, **options)


@pytest.mark.parametrize("name", ["random", "tpe", "gp", "nsga2", "nsga3"])
def test_the_seed_is_the_studys_and_no_option(name: str) -> None:
    with pytest.raises(SettingError, match="has no option 'seed'") as caught:
        OptunaStrategy(name, seed=3)
    known = str(caught.value).partition("Known: ")[2]
    assert "seed" not in known.removesuffix(".").split(", ")


def test_settings_are_the_options_and_cannot_be_changed_through_them() -> None:
    strategy = OptunaStrategy("tpe", n_startup_trials=5, multivariate=True)
    assert strategy.settings() == {"n_startup_trials": 5, "multivariate": True}
    strategy.settings()["n_startup_trials"] = 99
    assert strategy.settings()["n_startup_trials"] == 5
    assert OptunaStrategy("random").settings() == {}


def test_options_reach_the_sampler() -> None:
    early, late = (run(OptunaStrategy("tpe", n_startup_trials=n), 8) for n in (4, 8))
    assert early[:4] == late[:4]  # random draws
    assert early[4:] != late[4:]


def test_options_that_optuna_calls_experimental_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    run(OptunaStrategy("tpe", multivariate=True, group=True, n_startup_trials=2), 4)
    assert [str(warning.message) for warning in recwarn] == []


# Seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2"])
def test_a_restart_does_not_repeat_the_first_proposals(name: str) -> None:
    # With Optuna's own seeded samplers it does: their random numbers start over in every process.
    strategy, storage = OptunaStrategy(name), InMemoryStorage()
    parts = [run(strategy, 4, storage=storage) for _ in range(3)]
    assert parts[0] != parts[1] != parts[2] != parts[0]
    assert [arch for part in parts for arch in part] == run(strategy, 12)


def test_a_proposal_depends_on_the_trials_number_not_on_what_the_sampler_did_before() -> None:
    strategy = OptunaStrategy("random")
    sampler = strategy.sampler(SPACE, seed=1)
    first, second = (optuna.create_study(sampler=sampler) for _ in range(2))
    one = [Arch(first.ask(distributions(SPACE)).params) for _ in range(3)]
    two = [Arch(second.ask(distributions(SPACE)).params) for _ in range(3)]
    assert one == two
    assert len(set(one)) == 3


def test_random_proposals_are_uniform_and_independent() -> None:
    # A new generator for every trial must not show in the draws.
    archs = run(OptunaStrategy("random"), 400)
    for decision, options in SPACE.choices.items():
        counts = Counter(arch[decision] for arch in archs)
        chance = 1 / len(options)
        spread = (len(archs) * chance * (1 - chance)) ** 0.5
        assert all(abs(counts[option] - len(archs) * chance) < 4 * spread for option in options), decision
    pairs = Counter((a["depth0"], b["depth0"]) for a, b in pairwise(archs))
    assert all(abs(pairs[x, y] - len(archs) / 4) < 4 * (len(archs) * 3 / 16) ** 0.5 for x in (1, 2) for y in (1, 2))
    assert len(set(archs)) > 150  # of 216: 182 are expected


def test_studies_of_other_seeds_share_no_draws() -> None:
    # Seeds are hashed with the trial's number: seed 0 of trial 1 is not seed 1 of trial 0.
    zero, one = (run(OptunaStrategy("random"), 12, seed) for seed in (0, 1))
    assert zero[1:] != one[:-1]
    assert sum(a == b for a, b in zip(zero, one, strict=True)) <= 2


def test_options_outside_the_space_are_sampled_too() -> None:
    study = optuna.create_study(sampler=OptunaStrategy("random").sampler(SPACE, seed=0))
    rates = []
    for _ in range(3):
        trial = study.ask({**distributions(SPACE), "rate": FloatDistribution(0.0, 1.0)})
        assert {name: trial.params[name] for name in SPACE.choices} in SPACE
        rates.append(trial.params["rate"])
        study.tell(trial, 0.5)
    assert len(set(rates)) == 3
    assert all(0 <= rate <= 1 for rate in rates)


def test_tpe_learns_from_the_history() -> None:
    # The score is the sum of positions, at most 9; by chance it is 4.5.
    archs = run(OptunaStrategy("tpe", n_startup_trials=10), 60)
    scores = [sum(SPACE.encode(arch)) for arch in archs]
    assert sum(scores[40:]) / 20 > sum(scores[:10]) / 10 + 1.5
