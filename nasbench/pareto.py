"""Pareto dominance over scores of which higher is better."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere.

    Example:
        >>> dominates((2, 1), (1, 1)), dominates((2, 1), (1, 2))
        (True, False)
    """
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def front(scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the positions that no other dominates, of equal ones only the first, in the order given.

    Example:
        >>> front([(1, 3), (2, 2), (1, 1), (3, 1), (2, 2)])
        [0, 1, 3]
    """
    kept: list[int] = []
    for i, score in enumerate(scores):
        equal_before = any(tuple(score) == tuple(scores[j]) for j in kept)
        if not equal_before and not any(dominates(other, score) for other in scores):
            kept.append(i)
    return kept
