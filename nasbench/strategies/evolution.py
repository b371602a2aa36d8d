"""Strategies that walk from good architectures to their neighbours."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar

from nasbench.errors import SettingError, SpaceExhausted
from nasbench.recipe import is_number
from nasbench.strategies.base import History, Strategy
from search_spaces.base import Arch, SearchSpace


@dataclass(frozen=True)
class RegularizedEvolution(Strategy):
    """Tournament selection, one mutation, and death by age.

    After `population` random architectures, each proposal mutates the best of `sample` members drawn without
    replacement from the last `population` finished trials.

    Args:
        population: members alive at once.
        sample: members in a tournament.
        aging: True: the oldest member dies (the paper). False: the worst does, so the population is the best so far.
        crossover: chance that the winner is first crossed with the winner of a second tournament. 0 in the paper.

    Example:
        >>> from search_spaces import NASBench201
        >>> space, history = NASBench201(), History()
        >>> RegularizedEvolution().propose(space, history, Random(0)) in space
        True

    Source: Real et al., AAAI 2019, arXiv:1802.01548, with population 100 and sample 25; the defaults here suit studies
    of tens to hundreds of trials. A worker counts finished trials only, so several workers may draw more than
    `population` random architectures at the start.
    """

    population: int = 10
    sample: int = 3
    aging: bool = True
    crossover: float = 0.0

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (self.sample, self.population))
        if not whole or not 1 <= self.sample <= self.population:
            raise SettingError(
                f"RegularizedEvolution draws sample={self.sample!r} of population={self.population!r} members. "
                "Choose 1 <= sample <= population."
            )
        if not 0 <= self.crossover <= 1:
            raise SettingError(f"crossover={self.crossover} is a chance. Choose a number from 0 to 1.")

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        """Draw at random until the population is full, then mutate a tournament's winner."""
        if len(history) < self.population:
            return space.sample(rng)
        if self.aging:
            members = history[-self.population :]
        else:
            members = heapq.nlargest(self.population, history, key=lambda trial: (trial.score, -trial.number))

        def winner() -> Arch:
            return max(rng.sample(members, self.sample), key=lambda trial: trial.score).arch

        arch = winner()
        if self.crossover and rng.random() < self.crossover:
            arch = space.crossover(arch, winner(), rng)
        return space.mutate(arch, rng)


@dataclass(frozen=True)
class LocalSearch(Strategy):
    """Hill climbing: try the neighbours of the current architecture in random order, move to the first that is better.

    When every neighbour was tried and none is better, the climb starts again from a random architecture.

    Example:
        >>> from nasbench.strategies.base import PastTrial
        >>> from search_spaces import NASBench201
        >>> space = NASBench201()
        >>> start = space.sample(Random(0))
        >>> step = LocalSearch().propose(space, History([PastTrial(0, start, (0.9,))]), Random(1))
        >>> step in list(space.neighbours(start))
        True

    Source: White et al., UAI 2021, arXiv:2005.02960; there all neighbours are evaluated before a move, here the first
    improvement is taken.
    """

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        """Replay the climb from the history, then take its next step."""
        tried = history.tried.difference(trial.arch for trial in history)  # refused by a constraint or a pruner
        score, untried = float("-inf"), set[Arch]()
        for trial in history:
            tried.add(trial.arch)
            if not untried or (trial.arch in untried and trial.score > score):
                score, untried = trial.score, set(space.neighbours(trial.arch)) - tried
            else:
                untried.discard(trial.arch)
        steps = sorted(untried.difference(history.pending), key=space.index)
        return rng.choice(steps) if steps else space.sample(rng)


@dataclass(frozen=True)
class Grid(Strategy):
    """Every architecture of a space once, in the order of `space.index`, one of each canonical class.

    When all were tried the search ends normally, whatever its `trials`.

    Example:
        >>> from search_spaces import NASBench201
        >>> Grid().propose(NASBench201(), History(), Random(0)) == NASBench201().at(0)
        True
    """

    many_objectives: ClassVar[bool] = True

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        """Return the first architecture that is neither finished nor pending."""
        pending = set(history.pending)
        for arch in canonical_archs(space):
            if arch not in history.tried and arch not in pending:
                return arch
        raise SpaceExhausted(
            f"all {len(canonical_archs(space))} architectures of {type(space).__name__} were proposed."
        )


class _Classes:
    """One valid architecture for each canonical class of a space, found as they are asked for."""

    def __init__(self, space: SearchSpace) -> None:
        self._found: list[Arch] = []
        self._rest = (arch for arch in space.archs() if space.canonical(arch) == arch)

    def __iter__(self) -> Iterator[Arch]:
        yield from self._found
        for arch in self._rest:
            self._found.append(arch)
            yield arch

    def __len__(self) -> int:
        return sum(1 for _ in self)


@lru_cache(maxsize=8)
def canonical_archs(space: SearchSpace) -> _Classes:
    """Return one valid architecture for each canonical class of the space, in the order of `space.index`."""
    return _Classes(space)


@dataclass(frozen=True)
class TopEvolution(Strategy):
    """Evolution from the best of all: each generation is half crossovers and half mutations of the `parents` best.

    The first `population` architectures are random. What was tried is not tried again, unless fifty draws find nothing
    new.

    Args:
        population: architectures in a generation.
        parents: how many of the best so far may be parents.
        mutation: probability with which a mutation changes each decision.

    Raises:
        SettingError: a setting out of range.

    Example:
        >>> from search_spaces import NASBench201
        >>> arch = TopEvolution().propose(NASBench201(), History(), Random(0))
        >>> arch in NASBench201()
        True

    Source: Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, arXiv:1904.00420, algorithm 1.
    """

    population: int = 50
    parents: int = 10
    mutation: float = 0.1

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (self.population, self.parents))
        if not whole or self.population < 2 or not 1 <= self.parents <= self.population:
            raise SettingError(
                f"population={self.population!r} and parents={self.parents!r}: a generation has 2 architectures or "
                "more, and at least one of them is a parent. Give whole numbers, 1 <= parents <= population."
            )
        if not is_number(self.mutation) or not 0 < self.mutation <= 1:
            raise SettingError(f"mutation={self.mutation!r}, but it must be a probability above 0, at most 1.")

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        seen = history.tried | set(history.pending)
        generation = len(history) // self.population * self.population  # parents are those of whole generations
        for _ in range(50):
            child = self._draw(space, history, generation, rng)
            if child not in seen:
                break
        return child

    def _draw(self, space: SearchSpace, history: History, generation: int, rng: Random) -> Arch:
        if generation == 0:
            return space.sample(rng)
        best = sorted(history[:generation], key=lambda trial: -trial.score)[: self.parents]
        if rng.random() < 0.5:
            return space.crossover(rng.choice(best).arch, rng.choice(best).arch, rng)
        return self._mutate(space, rng.choice(best).arch, rng)

    def _mutate(self, space: SearchSpace, arch: Arch, rng: Random) -> Arch:
        for _ in range(1000):
            changes = {d: rng.choice(options) for d, options in space.choices.items() if rng.random() < self.mutation}
            if space.is_valid(child := arch | changes) and changes:
                return child
        return space.mutate(arch, rng)
