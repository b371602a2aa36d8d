"""Pareto dominance over scores of which higher is better, and the volume that a set of them dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nasbench.errors import SettingError


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


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Return the volume between a reference and all that the points dominate, exactly, for any number of objectives.

    A larger volume is a better set of points. Volumes compare only if they have one reference, fixed before any point
    was seen: a worse reference gives more weight to the ends of a front. A point that is not better than the reference
    everywhere adds nothing.

    Args:
        points: scores, one for each objective, of which higher is better. Give the negative of what is to be small.
        reference: the worst scores that are still of use.

    Raises:
        SettingError: a number is NaN or infinite, or a point has more or fewer scores than the reference.

    Example:
        >>> hypervolume([(-1, -3), (-2, -2), (-3, -1)], reference=(-4, -4))  # to be small: (1, 3), (2, 2), (3, 1)
        6.0

    Source: Zitzler and Thiele, IEEE TEC 1999. Computed by slices along the last objective, as in While et al., A Faster
    Algorithm for Calculating Hypervolume, IEEE TEC 2006.
    """
    if not all(map(math.isfinite, reference)) or not reference:
        raise SettingError(
            f"the reference of a hypervolume is {tuple(reference)}: give one finite number an objective."
        )
    above = []
    for point in points:
        if len(point) != len(reference) or not all(map(math.isfinite, point)):
            raise SettingError(
                f"{tuple(point)} has no hypervolume: a point has {len(reference)} finite scores, like the reference."
            )
        above.append([float(x) - float(r) for x, r in zip(point, reference, strict=True)])
    return _volume([point for point in above if min(point) > 0])


def _volume(points: list[list[float]]) -> float:
    """Return the volume between the origin and what positive points dominate."""
    points = [points[i] for i in front(points)]
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return points[0][0]
    points.sort(key=lambda point: -point[-1])
    heights = [point[-1] for point in points] + [0.0]
    slices = (
        (heights[i] - heights[i + 1]) * _volume([point[:-1] for point in points[: i + 1]])
        for i in range(len(points))
        if heights[i] > heights[i + 1]
    )
    return math.fsum(slices)
