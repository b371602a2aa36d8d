"""Dominance is a strict order, the front is what it leaves standing, and the hypervolume measures it."""

from __future__ import annotations

from itertools import permutations, product
from random import Random
from typing import Any

import pytest

from nasbench.errors import SettingError
from nasbench.pareto import dominates, front, hypervolume

PAIRS = list(product(range(3), repeat=2))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 1), (0, 0), True),
        ((1, 0), (0, 0), True),
        ((1, 1), (1, 1), False),
        ((1, 0), (0, 1), False),
        ((0, 0), (1, 1), False),
        ((0.5,), (0.25,), True),
        ((-1.0, -2.0, 3.0), (-1.0, -2.5, 3.0), True),
        ((float("inf"), 0), (1, 0), True),
    ],
)
def test_dominates(a: tuple[float, ...], b: tuple[float, ...], expected: bool) -> None:
    assert dominates(a, b) is expected


def test_dominance_is_a_strict_partial_order() -> None:
    for a, b, c in product(PAIRS, repeat=3):
        assert not dominates(a, a)
        assert not (dominates(a, b) and dominates(b, a))
        if dominates(a, b) and dominates(b, c):
            assert dominates(a, c)


def test_dominance_needs_equally_many_scores() -> None:
    with pytest.raises(ValueError, match="longer|shorter"):
        dominates((1, 2), (1, 2, 3))


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_front_is_what_no_other_beats(objectives: int) -> None:
    rng = Random(objectives)
    for _ in range(50):
        scores = [tuple(rng.randrange(5) for _ in range(objectives)) for _ in range(rng.randrange(1, 20))]
        best = {
            mine
            for mine in scores
            if not any(other != mine and all(o >= m for o, m in zip(other, mine, strict=True)) for other in scores)
        }
        kept = front(scores)
        assert {scores[i] for i in kept} == best
        assert kept == sorted(scores.index(score) for score in best)  # of equal ones the first, in the order given


def test_front_of_one_objective_is_the_first_maximum() -> None:
    assert front([(1,), (3,), (2,), (3,)]) == [1]


def test_front_holds_the_same_scores_whatever_their_order() -> None:
    scores = [(1, 3), (2, 2), (3, 1), (1, 1), (0, 3)]
    for shuffled in permutations(scores):
        assert {shuffled[i] for i in front(shuffled)} == {(1, 3), (2, 2), (3, 1)}


def test_front_of_nothing_is_empty() -> None:
    assert front([]) == []
    assert front([[0.0, 0.0]]) == [0]


def test_the_hypervolume_of_the_digest() -> None:
    # To be small, below (4, 4): rows of widths 3, 2 and 1.
    assert hypervolume([(-1, -3), (-2, -2), (-3, -1)], (-4, -4)) == 6


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_the_hypervolume_is_the_number_of_dominated_unit_cubes(objectives: int) -> None:
    rng = Random(objectives)
    for _ in range(20):
        points = [tuple(rng.randrange(-1, 5) for _ in range(objectives)) for _ in range(rng.randrange(8))]
        cubes = sum(
            any(all(x > c for x, c in zip(point, corner, strict=True)) for point in points)
            for corner in product(range(5), repeat=objectives)
        )
        assert hypervolume(points, [0] * objectives) == cubes
        shifted = [[x + 2 for x in point] for point in points]
        assert hypervolume(shifted, [2] * objectives) == cubes


def test_points_that_add_nothing_to_a_hypervolume() -> None:
    assert hypervolume([], (0, 0)) == 0
    assert hypervolume([(0, 5), (5, 0), (-1, 9)], (0, 0)) == 0  # not better than the reference everywhere
    assert hypervolume([(2, 2), (2, 2), (1, 2)], (0, 0)) == 4


@pytest.mark.parametrize(
    ("points", "reference", "words"),
    [
        ([(1, float("nan"))], (0, 0), "finite scores"),
        ([(1, float("inf"))], (0, 0), "finite scores"),
        ([(1, 2, 3)], (0, 0), "2 finite scores"),
        ([(1, 2)], (0, float("nan")), "reference of a hypervolume"),
        ([], (), "reference of a hypervolume"),
    ],
)
def test_a_hypervolume_is_of_finite_scores(points: Any, reference: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        hypervolume(points, reference)
