"""Evolution, local search and grid do what their papers and docstrings say."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from torch import nn

import nasbench as nb
from nasbench.errors import SettingError, SpaceExhausted
from nasbench.strategies import Grid, History, LocalSearch, PastTrial, RegularizedEvolution, Strategy, distributions
from search_spaces.base import Arch, ArchError, Choices, SearchSpace
from search_spaces.nasbench201 import NASBench201


@dataclass(frozen=True)
class Letters(SearchSpace):
    """Four decisions of five letters each."""

    options: str = "abcde"

    @cached_property
    def choices(self) -> Choices:
        return dict.fromkeys(("one", "two", "three", "four"), tuple(self.options))

    def build(self, arch: Arch) -> nn.Module:
        raise NotImplementedError

    def word(self, word: str) -> Arch:
        return self.arch(dict(zip(self.choices, word, strict=True)))


@dataclass(frozen=True)
class Still(Letters):
    """Mutation changes nothing, so that a proposal shows its parent."""

    def mutate(self, arch: Arch, rng: Random) -> Arch:
        return arch


@dataclass(frozen=True)
class Pairs(SearchSpace):
    """Eighteen assignments, sixteen of them valid, in ten classes: the order of a and b makes no difference."""

    @cached_property
    def choices(self) -> Choices:
        return {"a": (0, 1, 2), "b": (0, 1, 2), "c": ("x", "y")}

    def build(self, arch: Arch) -> nn.Module:
        raise NotImplementedError

    def is_valid(self, arch: Arch) -> bool:
        """Not both are 2."""
        return (arch["a"], arch["b"]) != (2, 2)

    def canonical(self, arch: Arch) -> Arch:
        a, b = sorted((arch["a"], arch["b"]))  # type: ignore[type-var]
        return arch | {"a": a, "b": b}


LETTERS, STILL = Letters(), Still()


def word(arch: Arch) -> str:
    return "".join(map(str, arch.values()))


def distance(a: Arch, b: Arch) -> int:
    return sum(a[decision] != b[decision] for decision in a)


def history_of(*scored: tuple[str, float]) -> History:
    return History(PastTrial(i, LETTERS.word(text), (score,)) for i, (text, score) in enumerate(scored))


def walk(
    strategy: Strategy, space: SearchSpace, score: Callable[[Arch], float], steps: int, seed: int = 0
) -> list[PastTrial]:
    """Search without Optuna: propose and score, one after the other."""
    history = History()
    for number in range(steps):
        arch = strategy.propose(space, history, Random(f"{seed}/{number}"))
        assert isinstance(arch, Arch)
        history.append(PastTrial(number, arch, (score(arch),)))
    return list(history)


@pytest.mark.parametrize("strategy", [RegularizedEvolution(4, 2, crossover=0.5), LocalSearch(), Grid()], ids=repr)
def test_proposals_keep_the_rules_of_the_space(strategy: Strategy) -> None:
    space = Pairs()
    for seed in range(5):
        for trial in walk(strategy, space, lambda arch: space.index(arch) * 7 % 5, 10, seed):
            assert trial.arch in space


@pytest.mark.parametrize("strategy", [RegularizedEvolution(2, 2, crossover=0.5), LocalSearch(), Grid()], ids=repr)
def test_proposals_depend_on_arguments_only_and_leave_the_history_alone(strategy: Strategy) -> None:
    def history() -> History:
        return history_of(("aaaa", 0.1), ("bbbb", 0.3), ("bbbc", 0.2))

    one, two = history(), history()
    assert strategy.propose(LETTERS, one, Random(5)) == strategy.propose(LETTERS, two, Random(5))
    assert strategy.propose(LETTERS, one, Random(5)) == strategy.propose(LETTERS, history(), Random(5))
    assert (list(one), one.pending, one.tried) == (list(history()), [], history().tried)


# Regularised evolution ---------------------------------------------------------------------------------------------


def test_evolution_begins_at_random() -> None:
    strategy = RegularizedEvolution(population=3, sample=3)
    for history in (History(), history_of(("aaaa", 0.0), ("aaaa", 1.0))):
        for seed in range(5):
            assert strategy.propose(LETTERS, history, Random(seed)) == LETTERS.sample(Random(seed))


def test_evolution_mutates_one_decision_of_the_best() -> None:
    strategy = RegularizedEvolution(population=3, sample=3)
    history = history_of(("aaaa", 0.1), ("bbbb", 0.9), ("cccc", 0.5))
    children = {strategy.propose(LETTERS, history, Random(seed)) for seed in range(200)}
    assert all(distance(child, LETTERS.word("bbbb")) == 1 for child in children)
    assert len(children) == 4 * 4  # every decision, every other option


@pytest.mark.parametrize(("aging", "parent"), [(True, "cccc"), (False, "aaaa")])
def test_the_oldest_dies_or_else_the_worst(aging: bool, parent: str) -> None:
    strategy = RegularizedEvolution(population=3, sample=3, aging=aging)
    history = history_of(("aaaa", 0.9), ("bbbb", 0.1), ("cccc", 0.8), ("dddd", 0.2))
    assert {strategy.propose(STILL, history, Random(seed)) for seed in range(20)} == {LETTERS.word(parent)}


@pytest.mark.parametrize(("aging", "alive"), [(True, "cde"), (False, "ace")])
def test_the_population_has_its_size(aging: bool, alive: str) -> None:
    strategy = RegularizedEvolution(population=3, sample=1, aging=aging)
    history = history_of(("aaaa", 0.9), ("bbbb", 0.1), ("cccc", 0.8), ("dddd", 0.2), ("eeee", 0.7))
    parents = {word(strategy.propose(STILL, history, Random(seed))) for seed in range(100)}
    assert parents == {letter * 4 for letter in alive}


def test_age_counts_from_completion() -> None:
    # Trial 0 finished last, so it is the youngest whatever its number.
    history = History(
        PastTrial(number, LETTERS.word(text), (score,))
        for number, text, score in [(2, "cccc", 0.9), (1, "bbbb", 0.3), (0, "aaaa", 0.5)]
    )
    strategy = RegularizedEvolution(population=2, sample=2)
    assert word(strategy.propose(STILL, history, Random(0))) == "aaaa"


def test_of_equal_scores_the_older_stay_where_the_worst_dies() -> None:
    strategy = RegularizedEvolution(population=2, sample=1, aging=False)
    history = history_of(("aaaa", 0.5), ("bbbb", 0.5), ("cccc", 0.5))
    assert {word(strategy.propose(STILL, history, Random(seed))) for seed in range(50)} == {"aaaa", "bbbb"}


@pytest.mark.parametrize("sample", [1, 2, 3, 4])
def test_tournaments_are_drawn_without_replacement(sample: int) -> None:
    # The k-th best of n wins if it is drawn and none of the better ones is.
    scored = [("aaaa", 0.1), ("bbbb", 0.4), ("cccc", 0.2), ("dddd", 0.3)]
    history, n, draws = history_of(*scored), 4, 4000
    strategy = RegularizedEvolution(population=n, sample=sample)
    wins = Counter(word(strategy.propose(STILL, history, Random(seed))) for seed in range(draws))
    left = 1.0
    for rank, (text, _) in enumerate(sorted(scored, key=lambda pair: -pair[1])):
        chance = left * min(1.0, sample / (n - rank))
        left -= chance
        spread = (draws * chance * (1 - chance)) ** 0.5
        assert abs(wins[text] - draws * chance) <= 4 * spread, text


def test_crossover_takes_from_both_parents_and_then_mutates_one_decision() -> None:
    a, b = LETTERS.word("aaaa"), LETTERS.word("bbbb")
    strategy = RegularizedEvolution(population=2, sample=1, crossover=1.0)
    history = history_of(("aaaa", 0.1), ("bbbb", 0.9))
    children = [strategy.propose(LETTERS, history, Random(seed)) for seed in range(300)]
    foreign = [sum(option not in "ab" for option in map(str, child.values())) for child in children]
    assert set(foreign) == {0, 1}
    assert foreign.count(1) > 150  # three in four mutations leave both parents' options
    mixed = [child for child in children if distance(child, a) > 1 and distance(child, b) > 1]
    assert len(mixed) > 50
    # Without the mutation, only the parents' options, each in turn.
    crossed = {strategy.propose(STILL, history, Random(seed)) for seed in range(300)}
    assert crossed == {LETTERS.word(f"{w}{x}{y}{z}") for w in "ab" for x in "ab" for y in "ab" for z in "ab"}


def test_crossover_is_of_winners() -> None:
    strategy = RegularizedEvolution(population=4, sample=3, crossover=1.0)
    history = history_of(("aaaa", 0.1), ("bbbb", 0.9), ("cccc", 0.8), ("dddd", 0.2))
    crossed = {strategy.propose(STILL, history, Random(seed)) for seed in range(300)}
    assert set("".join(map(word, crossed))) == {"b", "c"}  # the others can win no tournament of three


def test_crossover_happens_by_chance() -> None:
    history = history_of(("aaaa", 0.1), ("bbbb", 0.9))

    def crossed(chance: float) -> int:
        strategy = RegularizedEvolution(population=2, sample=1, crossover=chance)
        children = (word(strategy.propose(STILL, history, Random(seed))) for seed in range(1000))
        return sum(len(set(child)) == 2 for child in children)

    assert crossed(0.0) == 0
    # Two tournaments find different parents in half of the cases, and those leave a mixture in 14 of 16.
    expected = 1000 * 7 / 16
    assert abs(crossed(1.0) - expected) < 65
    assert abs(crossed(0.5) - expected / 2) < 55


def test_pending_and_repeated_members_do_no_harm() -> None:
    history = history_of(*[("aaaa", 0.5)] * 10)
    history.pending = [LETTERS.word("aaab")]
    child = RegularizedEvolution().propose(LETTERS, history, Random(0))
    assert isinstance(child, Arch) and distance(child, LETTERS.word("aaaa")) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"population": 0}, "draws sample=3 of population=0 members. Choose 1 <= sample <= population"),
        ({"population": 2}, "draws sample=3 of population=2 members"),
        ({"sample": 0}, "draws sample=0"),
        ({"sample": 11}, "draws sample=11 of population=10"),
        ({"crossover": -0.1}, r"crossover=-0\.1 is a chance\. Choose a number from 0 to 1"),
        ({"crossover": 1.5}, r"crossover=1\.5 is a chance"),
        ({"crossover": float("nan")}, "crossover=nan is a chance"),
        ({"population": 12.5}, r"population=12\.5"),
        ({"population": "20"}, "population='20'"),
    ],
)
def test_settings_of_evolution_are_checked_at_once(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        RegularizedEvolution(**settings)


def test_nothing_to_mutate_is_said() -> None:
    space = Letters("a")
    history = History([PastTrial(0, space.word("aaaa"), (0.5,))])
    with pytest.raises(ArchError, match="one architecture only"):
        RegularizedEvolution(population=1, sample=1).propose(space, history, Random(0))


@pytest.mark.slow
def test_evolution_beats_random_search() -> None:
    space = NASBench201()
    code = np.indices([5] * 6).reshape(6, -1).T / 4  # options of every architecture, in the order of space.index
    best, weights = np.array([0.75, 0.25, 1.0, 0.5, 0.0, 0.75]), np.array([3, 1, 2, 1, 2, 1])
    bumps = 0.02 * np.sin(5 * code @ np.array([1.0, 2.0, 3.0, 5.0, 7.0, 11.0]))
    accuracy = np.exp(-((code - best) ** 2 @ weights) / 2) + bumps
    table = nb.Table(space, {"val_accuracy": accuracy})

    def found(strategy: str, seed: int, **settings: Any) -> float:
        result = nb.search(space, table, strategy, trials=60, seed=seed, progress=False, **settings)
        return result.best.metrics["val_accuracy"]

    evolved = [found("evolution", seed, population=10, sample=5) for seed in range(20)]
    drawn = [found("random", seed) for seed in range(20)]
    assert statistics.median(evolved) > statistics.median(drawn)
    assert sum(e > d for e, d in zip(evolved, drawn, strict=True)) >= 14


# Local search ------------------------------------------------------------------------------------------------------


def rugged(arch: Arch) -> float:
    """A landscape with many local maxima and many ties."""
    code = LETTERS.encode(arch)
    return float((3 * code[0] + 5 * code[1] + code[0] * code[2]) % 7 + code[3] % 2)


@pytest.mark.parametrize("seed", range(3))
def test_local_search_climbs_to_the_first_better_neighbour_and_restarts_when_all_were_tried(seed: int) -> None:
    trials = walk(LocalSearch(), LETTERS, rugged, 150, seed)
    moves = restarts = 0
    here: PastTrial | None = None
    tried: set[Arch] = set()
    for trial in trials:
        left = [] if here is None else [n for n in LETTERS.neighbours(here.arch) if n not in tried]
        if left:
            assert trial.arch in left  # a neighbour, and never one a second time
        elif here is not None:
            restarts += 1
            assert trial.arch == LETTERS.sample(Random(f"{seed}/{trial.number}"))
        if here is None or not left or trial.score > here.score:
            moves += bool(left)
            here = trial
        tried.add(trial.arch)
    assert moves >= 5
    assert restarts >= 3


def test_the_first_climb_ends_at_a_local_maximum() -> None:
    for seed in range(3):
        trials = walk(LocalSearch(), LETTERS, rugged, 90, seed)
        top, seen = trials[0], {trials[0].arch}
        for trial in trials[1:]:
            if all(neighbour in seen for neighbour in LETTERS.neighbours(top.arch)):
                break
            seen.add(trial.arch)
            top = max(top, trial, key=lambda t: t.score)
        else:
            pytest.fail("the climb did not end")
        assert rugged(top.arch) >= max(map(rugged, LETTERS.neighbours(top.arch)))


def test_an_equal_neighbour_is_no_reason_to_move() -> None:
    history = history_of(("aaaa", 0.5), ("aaab", 0.5))
    steps = {LocalSearch().propose(LETTERS, history, Random(seed)) for seed in range(200)}
    assert all(distance(step, LETTERS.word("aaaa")) == 1 for step in steps)
    assert len(steps) == 15


def test_the_first_improvement_is_taken_even_if_a_better_one_was_left_untried() -> None:
    history = history_of(("aaaa", 0.5), ("aaab", 0.6))
    steps = {LocalSearch().propose(LETTERS, history, Random(seed)) for seed in range(300)}
    expected = set(LETTERS.neighbours(LETTERS.word("aaab"))) - {LETTERS.word("aaaa")}
    assert steps == expected


def test_a_neighbour_that_was_tried_in_an_earlier_climb_is_not_tried_again() -> None:
    space = Letters("ab")
    first = [("aaaa", 0.9), ("aaab", 0.1), ("aaba", 0.1), ("abaa", 0.1), ("baaa", 0.1)]
    history = history_of(*first, ("aabb", 0.0))  # a restart beside two that are known
    steps = {word(LocalSearch().propose(space, history, Random(seed))) for seed in range(50)}
    assert steps == {"abbb", "babb"}


def test_workers_side_by_side_try_different_neighbours() -> None:
    space = Letters("ab")
    history = history_of(("aaaa", 0.9))
    history.pending = [space.word(text) for text in ("aaab", "aaba", "abaa")]
    assert {word(LocalSearch().propose(space, history, Random(seed))) for seed in range(20)} == {"baaa"}
    history.pending.append(space.word("baaa"))  # nothing is left to try beside this one: rather anything than waiting
    assert LocalSearch().propose(space, history, Random(3)) == space.sample(Random(3))


def test_a_trial_from_elsewhere_does_not_divert_a_climb() -> None:
    history = history_of(("aaaa", 0.5), ("cccc", 0.9), ("aaab", 0.4))
    step = LocalSearch().propose(LETTERS, history, Random(0))
    assert isinstance(step, Arch) and distance(step, LETTERS.word("aaaa")) == 1


def test_a_refused_neighbour_counts_as_tried() -> None:
    # A constraint prunes all neighbours of the start: the climb is over, and another begins.
    space = Letters("ab")
    study = optuna.create_study(direction="maximize", sampler=LocalSearch().sampler(space, seed=0))
    trial = study.ask(distributions(space))
    start = Arch(trial.params)
    study.tell(trial, 0.5)
    refused = []
    for _ in range(4):
        trial = study.ask(distributions(space))
        refused.append(Arch(trial.params))
        study.tell(trial, state=TrialState.PRUNED)
    assert Counter(refused) == Counter(space.neighbours(start))
    study.add_trial(study_trial(space, opposite(space, start), 0.1))  # the new start
    step = Arch(study.ask(distributions(space)).params)
    assert distance(step, opposite(space, start)) == 1


def opposite(space: Letters, arch: Arch) -> Arch:
    return space.word(word(arch).translate(str.maketrans("ab", "ba")))


def study_trial(space: SearchSpace, arch: Arch, value: float) -> optuna.trial.FrozenTrial:
    return optuna.create_trial(params=dict(arch), distributions=distributions(space), value=value)


# Grid --------------------------------------------------------------------------------------------------------------


def test_grid_proposes_each_class_once_in_order_and_then_stops() -> None:
    space = Pairs()
    study = optuna.create_study(sampler=Grid().sampler(space))
    with pytest.raises(SpaceExhausted, match="all 10 architectures of Pairs were proposed"):
        study.optimize(lambda trial: len([trial.suggest_categorical(d, o) for d, o in space.choices.items()]), 20)
    archs = [Arch(trial.params) for trial in study.trials if trial.state == TrialState.COMPLETE]
    expected = [(a, b, c) for a in range(3) for b in range(a, 3) for c in "xy" if (a, b) != (2, 2)]
    assert [tuple(arch.values()) for arch in archs] == expected
    assert {space.canonical(arch) for arch in space.archs()} == set(archs)


def test_grid_passes_over_what_is_running() -> None:
    space = Pairs()
    study = optuna.create_study(sampler=Grid().sampler(space))
    trials = [study.ask(distributions(space)) for _ in range(10)]
    assert len({Arch(trial.params) for trial in trials}) == 10
    with pytest.raises(SpaceExhausted):
        study.ask(distributions(space))


def test_grid_tries_a_failed_architecture_again() -> None:
    space = Pairs()
    study = optuna.create_study(sampler=Grid().sampler(space))
    first, second = study.ask(distributions(space)), study.ask(distributions(space))
    study.tell(first, state=TrialState.FAIL)
    study.tell(second, 0.5)
    again = study.ask(distributions(space))
    assert Arch(again.params) == Arch(first.params) == space.at(0)


def test_grid_goes_on_after_a_refused_architecture() -> None:
    # What a constraint or a pruner stopped would be stopped again, and the grid would never get past it.
    space = Pairs()
    study = optuna.create_study(sampler=Grid().sampler(space))
    archs = []
    for number in range(10):
        trial = study.ask(distributions(space))
        archs.append(Arch(trial.params))
        study.tell(trial, None if number % 3 == 0 else 0.5, state=TrialState.PRUNED if number % 3 == 0 else None)
    assert len(set(archs)) == 10
    with pytest.raises(SpaceExhausted):
        study.ask(distributions(space))


def test_grid_starts_at_once_in_a_space_too_large_to_list() -> None:
    # 5**40 architectures: a list of all of them would never be finished.
    space = Long()
    first = Grid().propose(space, History(), Random(0))
    assert first == space.at(0)
    assert Grid().propose(space, History([PastTrial(0, first, (0.5,))]), Random(0)) == space.at(1)


@dataclass(frozen=True)
class Long(Letters):
    """Forty decisions."""

    @cached_property
    def choices(self) -> Choices:
        return {f"edge{i}": tuple(self.options) for i in range(40)}

    def archs(self) -> Iterator[Arch]:
        for index in range(1000):
            yield self.at(index)
        pytest.fail("the grid lists the whole space before it proposes anything")
