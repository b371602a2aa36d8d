"""When masks change during a training, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.errors import CompressionError
from search_spaces.arch import nearest

METHODS = ("rigl", "set", "gradual")


@dataclass(frozen=True)
class Schedule:
    """The steps after which masks change: every `interval` from `begin`, before `end`, or at it for "gradual".

    Args:
        method: "rigl", "set" or "gradual".
        steps: how many optimizer steps the whole training has.
        interval: steps from one change to the next.
        begin, end: when masks may change, as shares of `steps`.
        fraction: of "rigl" and "set", the share of weights dropped at first.

    Raises:
        CompressionError: a setting is out of range, or no change falls between `begin` and `end`.

    Example:
        >>> schedule = Schedule("rigl", steps=400, interval=75)
        >>> [step for step in range(1, 401) if schedule.due(step)]
        [75, 150, 225]
        >>> [round(schedule.dropped(step), 3) for step in (0, 75, 150, 225)]
        [0.3, 0.256, 0.15, 0.044]
    """

    method: str
    steps: int
    interval: int = 100
    begin: float = 0.0
    end: float = 0.75
    fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CompressionError(f"no method {self.method!r}; {nearest(self.method, METHODS)}")
        for name in ("steps", "interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompressionError(f"{name} is a number of optimizer steps, 1 or more, got {value!r}.")
        if not 0 <= self.begin < self.end <= 1:
            raise CompressionError(
                f"begin and end are shares of the training, 0 <= begin < end <= 1; got {self.begin!r} and {self.end!r}."
            )
        if not 0 < self.fraction <= 1:
            raise CompressionError(f"fraction is a share of weights, above 0 and at most 1; got {self.fraction!r}.")
        if not self.due(self.first + self.interval):
            raise CompressionError(
                f"the masks would never change: with interval={self.interval} the first change is after step "
                f"{self.first + self.interval:,}, and the last one has to be {self._bound} of {self.steps:,}, "
                "counted in optimizer steps, not in epochs. Train longer, or give a shorter interval."
            )

    @property
    def first(self) -> int:
        """The step from which intervals are counted."""
        return round(self.begin * self.steps)

    @property
    def last(self) -> int:
        """The step where RigL's share of dropped weights would be zero, or that of the last change of "gradual"."""
        end = round(self.end * self.steps)
        return end - (end - self.first) % self.interval if self.method == "gradual" else end

    @property
    def _bound(self) -> str:
        end = round(self.end * self.steps)
        return f"at step {end:,} at the latest" if self.method == "gradual" else f"before step {end:,}"

    def due(self, step: int) -> bool:
        """Say whether masks change after a step; the first one is 1."""
        last = self.last if self.method == "gradual" else self.last - 1
        return self.first < step <= last and (step - self.first) % self.interval == 0

    def dropped(self, step: int) -> float:
        """Return the share of kept weights that "rigl" and "set" drop after a step: a cosine, zero at the end."""
        return self.fraction / 2 * (1 + math.cos(math.pi * step / self.last))

    def kept(self, step: int, start: int, final: int) -> int:
        """Return how many weights "gradual" keeps after a step: the surplus falls with the cube of the time left."""
        return final + round((start - final) * ((self.last - step) / (self.last - self.first)) ** 3)
