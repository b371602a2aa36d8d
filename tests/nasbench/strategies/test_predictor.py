"""LINAS fits once in a generation, measures what its predictors find best, and says how well they ranked."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from torch import nn

import nasbench as nb
from nasbench.errors import SettingError
from nasbench.pareto import dominates, front
from nasbench.strategies import History, Linas, PastTrial, Proposal, distributions, kendall_taus
from nasbench.strategies.predictor import Encoder, Generation, Predictor, best_first, nsga2
from search_spaces.base import Arch, Choices, Option, SearchSpace


@dataclass(frozen=True)
class Mixed(SearchSpace):
    """Decisions of names and of numbers; perhaps some assignments break a rule, or only the first decisions count."""

    decisions: int = 12
    ruled: bool = False
    inert: int = 0

    @cached_property
    def choices(self) -> Choices:
        kinds: tuple[tuple[Option, ...], ...] = (("x", "y", "z"), (8, 16, 64), (None, 0.5), ("only",))
        return {f"d{i}": kinds[i % 4] for i in range(self.decisions)}

    def build(self, arch: Arch) -> nn.Module:
        raise NotImplementedError

    def is_valid(self, arch: Arch) -> bool:
        """If rules are on, the first decision is not z."""
        return not (self.ruled and arch["d0"] == "z")

    def canonical(self, arch: Arch) -> Arch:
        last = list(self.choices)[self.decisions - self.inert :]
        return arch | {name: self.choices[name][0] for name in last}


SPACE = Mixed()
SMALL = Linas(population=10, evaluations=200)


def cost(arch: Arch) -> float:
    """What is lower for small numbers."""
    return sum(option for option in arch.values() if isinstance(option, int)) / 64


def quality(arch: Arch) -> float:
    """A sum over decisions, with one pair that belongs together: the best has y everywhere and 64."""
    values = list(arch.values())
    return values.count("y") + cost(arch) - values.count(None) / 2 + (values[0] == values[4 % len(values)])


def walk(
    strategy: Linas,
    space: SearchSpace,
    steps: int,
    score: Callable[[Arch], tuple[float, ...]] = lambda arch: (quality(arch),),
    seed: int = 0,
    history: History | None = None,
) -> History:
    history = History() if history is None else history
    for number in range(len(history), steps):
        proposal = strategy.propose(space, history, Random(f"{seed}/{number}"))
        if isinstance(proposal, Arch):
            proposal = Proposal(proposal)
        history.append(PastTrial(number, proposal.arch, score(proposal.arch), note=proposal.note))
    return history


# The search --------------------------------------------------------------------------------------------------------


def test_a_generation_is_fitted_once_after_random_ones_and_measured_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []

    class Counted(Predictor):
        def __init__(self, features: Any, values: Any) -> None:
            fits.append(len(values))
            super().__init__(features, values)

    monkeypatch.setitem(Linas.propose.__globals__, "Predictor", Counted)
    history = walk(SMALL, SPACE, 35)
    assert fits == [10, 20, 30]
    notes = [trial.note for trial in history]
    assert notes[:10] == [None] * 10
    assert [note["generation"] for note in notes[10:] if note] == [1] * 10 + [2] * 10 + [3] * 5
    for start in (10, 20):
        predicted = [note["predicted"][0] for note in notes[start : start + 10] if note]
        assert statistics.mean(predicted[:5]) > statistics.mean(predicted[5:])


def test_every_generation_is_better_than_random() -> None:
    means = []
    for seed in range(3):
        history = walk(SMALL, SPACE, 40, seed=seed)
        means.append([statistics.mean(t.score for t in history[k : k + 10]) for k in range(0, 40, 10)])
    random, first, second, third = np.mean(means, axis=0)
    assert first > random + 1
    assert max(second, third) > first


def test_several_objectives_are_followed_in_their_own_directions() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=SMALL.sampler(SPACE))
    for _ in range(60):
        trial = study.ask(distributions(SPACE))
        study.tell(trial, (quality(Arch(trial.params)), cost(Arch(trial.params))))
    scores = [(t.values[0], -t.values[1]) for t in study.trials]
    late = [i for i in front(scores) if i >= 10]
    assert len(late) >= 0.7 * len(front(scores))
    assert sum(any(dominates(new, old) for new in scores[30:]) for old in scores[:10]) >= 8
    assert min(s[1] for s in scores) == -3 * 8 / 64 or max(s[0] for s in scores) > 6  # it went to the ends
    alone = optuna.create_study(direction="minimize", sampler=SMALL.sampler(SPACE))
    for _ in range(40):
        trial = alone.ask(distributions(SPACE))
        alone.tell(trial, cost(Arch(trial.params)))
    assert statistics.mean(t.value for t in alone.trials[20:] if t.value is not None) < 1


def test_nothing_is_measured_twice_and_rules_are_kept() -> None:
    space = Mixed(ruled=True)
    history = walk(SMALL, space, 50)
    assert len({trial.arch for trial in history}) == 50
    assert all(trial.arch in space for trial in history)


def test_of_architectures_that_are_the_same_one_is_measured() -> None:
    space = Mixed(decisions=12, inert=4)
    history = walk(SMALL, space, 50)
    predicted = [space.canonical(trial.arch) for trial in history[10:]]
    assert len(set(predicted)) == 40
    assert set(predicted).isdisjoint({space.canonical(trial.arch) for trial in history[:10]})


def test_pending_and_refused_architectures_are_passed_over() -> None:
    history = walk(SMALL, SPACE, 10)
    asked: list[Arch] = []
    for number in range(30):
        proposal = SMALL.propose(SPACE, history, Random(number))
        assert isinstance(proposal, Proposal)
        if number % 2:
            history.tried.add(proposal.arch)  # refused by a constraint
        else:
            history.pending.append(proposal.arch)  # running elsewhere
        asked.append(proposal.arch)
    assert len(set(asked)) == 30


def test_an_architecture_that_fails_again_and_again_stops_nothing() -> None:
    study = optuna.create_study(direction="maximize", sampler=SMALL.sampler(SPACE))
    failing: list[Arch] = []
    rows = [0]
    while sum(trial.state == TrialState.COMPLETE for trial in study.trials) < 30:
        trial = study.ask(distributions(SPACE))
        arch = Arch(trial.params)
        if trial.number >= 10 and len(failing) < 3 and arch not in failing:
            failing.append(arch)
        if arch in failing:
            study.tell(trial, state=TrialState.FAIL)
            rows[-1] += 1
        else:
            study.tell(trial, quality(arch))
            rows.append(0)
    assert max(rows) < 5 or sum(rows) < 40
    assert all(trial.number < 100 for trial in study.trials)


def test_infinite_scores_are_left_out() -> None:
    history = History(PastTrial(i, SPACE.sample(Random(i)), (float("inf"),)) for i in range(10))
    assert isinstance(SMALL.propose(SPACE, history, Random(0)), Arch)  # as if nothing had finished
    walk(SMALL, SPACE, 20, history=history)
    assert isinstance(SMALL.propose(SPACE, history, Random(0)), Proposal)


def test_beside_infinite_scores_all_that_was_measured_is_known() -> None:
    space, strategy = Mixed(decisions=7), Linas(population=10, evaluations=160)  # of 162
    infinite = [PastTrial(i, space.at(i), (float("inf"),)) for i in range(5)]
    history = History([*infinite, *walk(strategy, space, 10)])
    codes = {code.tobytes() for code in Generation(strategy, space, history, 1, 0)._codes}
    assert len(codes) > 100
    assert codes.isdisjoint(np.array(space.encode(trial.arch)).tobytes() for trial in history)


def test_equal_scores_and_trials_of_others_do_no_harm() -> None:
    history = History(PastTrial(i, SPACE.sample(Random(i)), (0.5,), note={"path": [1]}) for i in range(10))
    proposal = SMALL.propose(SPACE, history, Random(0))
    assert isinstance(proposal, Proposal)
    assert proposal.note == {"generation": 1, "kendall_tau": None, "predicted": [0.5]}


def test_a_small_space_is_measured_whole_and_then_again() -> None:
    space = Mixed(decisions=3)  # 18 architectures
    history = walk(Linas(population=4, evaluations=40), space, 25)
    assert {trial.arch for trial in history} == set(space.archs())
    assert len({trial.arch for trial in history[:18]}) == 18


def test_a_replay_proposes_the_same() -> None:
    history = walk(SMALL, SPACE, 38)
    for end in (10, 19, 20, 33):
        again = walk(SMALL, SPACE, 38, history=History(history[:end]))
        assert again[:] == history[:]


def test_histories_and_settings_do_not_mix() -> None:
    a, b = SMALL, Linas(population=10, evaluations=100)
    history, other = walk(a, SPACE, 25), walk(a, SPACE, 25, seed=1)
    expected = a.propose(SPACE, History(history[:]), Random(0))
    a.propose(SPACE, other, Random(0))
    b.propose(SPACE, history, Random(0))
    assert a.propose(SPACE, history, Random(0)) == expected


def test_a_replay_with_refused_architectures_proposes_the_same() -> None:
    strategy, history = Linas(population=5, evaluations=50), History()
    events: list[PastTrial | Arch] = []
    for number in range(60):
        proposal = strategy.propose(SPACE, history, Random(number))
        if number % 3 == 0:
            assert strategy.propose(SPACE, replayed(events), Random(number)) == proposal, f"cut before trial {number}"
        if isinstance(proposal, Arch):
            proposal = Proposal(proposal)
        if sum(SPACE.encode(proposal.arch)) % 2:  # hard to learn
            events.append(proposal.arch)
            history.refuse(proposal.arch)
        else:
            events.append(PastTrial(number, proposal.arch, (quality(proposal.arch),), note=proposal.note))
            history.append(events[-1])
    assert len(history.refused) > 15
    assert len(history) > 15


def replayed(events: list[PastTrial | Arch]) -> History:
    history = History()
    for event in events:
        history.refuse(event) if isinstance(event, Arch) else history.append(event)
    return history


def test_what_would_be_refused_is_learned() -> None:
    # The better half breaks the bound: without learning it, nothing but refusals would follow.
    space = Mixed(decisions=60)

    def metrics(arch: Arch) -> dict[str, float]:
        return {"quality": quality(arch), "cost": cost(arch)}

    result = nb.search(
        space,
        metrics,
        Linas(population=20, evaluations=1000),
        objectives={"quality": "maximize"},
        constraints="cost<6.5",
        trials=60,
        progress=False,
    )
    assert len(result.complete) == 60
    assert len(result.trials) < 300
    scores = [trial.metrics["quality"] for trial in result.complete]
    assert statistics.mean(scores[40:]) > statistics.mean(scores[:20]) + 3
    assert result.best.metrics["cost"] > 5
    assert kendall_taus(result.trials).keys() == {1}


# NSGA-II -----------------------------------------------------------------------------------------------------------

WIDE = Mixed(decisions=60)
_RNG = np.random.default_rng(0)
WEIGHTS = [_RNG.normal(size=(len(options), 2)) for options in WIDE.choices.values()]


def weighed(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two objectives, and that nothing is refused."""
    both = np.stack([WEIGHTS[d][codes[:, d]] for d in range(codes.shape[1])]).sum(axis=0)
    return np.concatenate([both, np.ones((len(codes), 1))], axis=1)


def test_nsga2_finds_the_best_of_45_decisions() -> None:
    looked_at = []

    def predict(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        looked_at.append(codes)
        return weighed(codes)[:, [0, 2]]

    measured = np.array([WIDE.encode(WIDE.sample(Random(i))) for i in range(50)])
    codes, scores = nsga2(WIDE, predict, measured, Linas(), np.random.default_rng(0))
    assert len(codes) == sum(map(len, looked_at)) == 10_000
    assert len({code.tobytes() for code in [*codes, *measured]}) == 10_050
    np.testing.assert_array_equal(scores, weighed(codes)[:, [0, 2]])
    assert (np.diff(scores[:50, 0]) <= 0).all()
    assert scores[0, 0] == scores.max()
    best = sum(weights[:, 0].max() for weights in WEIGHTS)
    assert scores[0, 0] > 0.98 * best
    assert statistics.mean(scores[:50, 0]) > 0.9 * best


def test_nsga2_finds_a_wide_front() -> None:
    measured = np.zeros((0, 60), np.int64)
    _, scores = nsga2(WIDE, weighed, measured, Linas(), np.random.default_rng(0))
    found = scores[:50, :2]
    assert len(front(found.tolist())) == 50
    for weight in (0.1, 0.5, 0.9):  # the ends and the middle, against the best of each weighted sum
        direction = np.array([weight, 1 - weight])
        best = sum((weights @ direction).max() for weights in WEIGHTS)
        assert (found @ direction).max() > 0.85 * best


def test_nsga2_looks_at_no_more_than_it_may_and_at_less_in_a_small_space() -> None:
    none = np.zeros((0, 60), np.int64)
    codes, _ = nsga2(WIDE, weighed, none, Linas(population=20, evaluations=130), np.random.default_rng(0))
    assert len(codes) == 130
    space = Mixed(decisions=4)
    codes, _ = nsga2(space, weighed, none[:, :4], Linas(population=20, evaluations=130), np.random.default_rng(0))
    assert len(codes) == len({code.tobytes() for code in codes}) == 18
    everything = np.array([space.encode(arch) for arch in space.archs()])
    codes, _ = nsga2(space, weighed, everything, Linas(population=20, evaluations=130), np.random.default_rng(0))
    assert len(codes) == 0


def test_children_differ_as_often_as_they_should() -> None:
    settings = Linas(population=2, evaluations=300, crossover=0.0, mutation=0.2)

    def first_are_best(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.stack([-np.arange(len(codes)), np.ones(len(codes))], axis=1)

    codes, _ = nsga2(WIDE, first_are_best, np.zeros((0, 60), np.int64), settings, np.random.default_rng(0))
    sizes = np.array([len(options) for options in WIDE.choices.values()])
    parents, children = codes[:2], codes[2:]
    distances = np.array([(parents != child).sum(axis=1).min() for child in children])
    assert abs(distances.mean() - 0.2 * (sizes > 1).sum()) < 1
    assert (codes < sizes).all()


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_order_is_by_fronts(objectives: int) -> None:
    scores = np.random.default_rng(objectives).integers(0, 6, (40, objectives)).astype(float)
    order = best_first(with_all_accepted(scores))
    assert sorted(order.tolist()) == list(range(40))
    rank = {}
    left = set(range(40))
    for level in itertools.count():
        first = {i for i in left if not any(dominates(scores[j], scores[i]) for j in left)}
        rank |= dict.fromkeys(first, level)
        left -= first
        if not left:
            break
    levels = [rank[i] for i in order.tolist()]
    assert levels == sorted(levels)


def test_within_a_front_the_ends_and_the_lonely_come_first() -> None:
    scores = np.array([[0.0, 10.0], [1.0, 9.0], [1.5, 8.5], [6.0, 4.0], [10.0, 0.0]])
    # distances of the inner ones: (1.5 + 1.5)/10, (5 + 5)/10, (8.5 + 8.5)/10
    assert best_first(with_all_accepted(scores)).tolist() == [0, 4, 3, 2, 1]


@pytest.mark.parametrize("objectives", [1, 2])
def test_what_would_be_refused_comes_last_the_likeliest_to_be_accepted_first(objectives: int) -> None:
    scores = np.arange(6.0)[:, None].repeat(objectives, axis=1)
    accepted = np.array([[0.2, 0.1, -0.3, -0.1, 0.0, -2.0]]).T
    assert best_first(np.concatenate([scores, accepted], axis=1)).tolist() == [4, 1, 0, 3, 2, 5]


def with_all_accepted(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([scores, np.ones((len(scores), 1))], axis=1)


# Predictors --------------------------------------------------------------------------------------------------------


def test_every_option_has_a_column_and_numbers_are_numbers_too() -> None:
    space = Mixed(decisions=4)
    features = Encoder(space)(np.array([space.encode(arch) for arch in space.archs()]))
    assert features.shape == (18, 3 + (3 + 1) + 2)
    assert (features[:, [0, 1, 2]].sum(axis=1) == 1).all()
    arch = space.arch(d0="y", d1=16, d2=0.5, d3="only")
    row = Encoder(space)(np.array([space.encode(arch)]))[0]
    assert row.tolist() == [0, 1, 0, 0, 1, 0, (16 - 8) / (64 - 8), 0, 1]


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-6, 0.0), (1e6, -3e6)])
def test_predictors_rank_what_they_have_not_seen_in_any_unit(scale: float, shift: float) -> None:
    archs = [SPACE.sample(Random(i)) for i in range(300)]
    features = Encoder(SPACE)(np.array([SPACE.encode(arch) for arch in archs]))
    values = np.array([quality(arch) for arch in archs]) * scale + shift
    predicted = Predictor(features[:200], values[:200])(features[200:])
    assert np.corrcoef(predicted, values[200:])[0, 1] > 0.9
    assert abs(predicted - values[200:]).mean() < 0.5 * scale


def test_the_kind_of_predictor_fits_the_problem() -> None:
    rng = np.random.default_rng(0)
    features = rng.integers(0, 2, (120, 12)).astype(float)
    linear = features @ rng.normal(size=12)
    parity = np.cos(np.pi * features[:, :2].sum(axis=1))  # no sum of columns says this
    assert type(Predictor(features, linear + 0.3 * rng.normal(size=120)).model).__name__ == "Ridge"
    assert type(Predictor(features, parity).model).__name__ == "SVR"


def test_few_or_equal_values_can_be_fitted() -> None:
    features = np.eye(3)[[0, 1]]
    assert Predictor(features, np.array([0.5, 0.5]))(np.eye(3)).tolist() == [0.5] * 3
    assert np.isfinite(Predictor(features, np.array([0.0, 1.0]))(np.eye(3))).all()


def test_kendall_taus_are_of_predicted_and_measured() -> None:
    history = walk(SMALL, SPACE, 45, score=lambda arch: (quality(arch), -cost(arch)))
    taus = kendall_taus(history)
    assert taus.keys() == {1, 2, 3}
    for generation, both in taus.items():
        trials = history[10 * generation : 10 * generation + 10]
        for objective, tau in enumerate(both):
            pairs = [(t.note["predicted"][objective], t.scores[objective]) for t in trials if t.note]
            signs = [np.sign((a[0] - b[0]) * (a[1] - b[1])) for a, b in itertools.combinations(pairs, 2)]
            ties = [sum(a[i] == b[i] for a, b in itertools.combinations(pairs, 2)) for i in (0, 1)]
            expected = sum(signs) / ((45 - ties[0]) * (45 - ties[1])) ** 0.5
            assert tau == pytest.approx(expected, abs=1e-4)
    assert all(tau is not None and tau > 0.3 for tau in taus[3])
    assert kendall_taus([SimpleNamespace(note=None), SimpleNamespace(note={"path": [1]})]) == {}


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"population": 1}, "population=1, but it must be a whole number, at least 2"),
        ({"population": 20.0}, r"population=20\.0"),
        ({"evaluations": 49}, "evaluations=49, but it must be a whole number, at least population=50"),
        ({"crossover": 1.5}, r"crossover=1\.5, but it must be a number from 0 to 1"),
        ({"mutation": 0}, "mutation=0, but it must be a number above 0, at most 1, or None"),
        ({"mutation": float("nan")}, "mutation=nan"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        Linas(**settings)
