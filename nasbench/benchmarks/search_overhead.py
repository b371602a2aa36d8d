"""What a search adds to a trial: evolution over 6 decisions, in memory. Goal: under 1 ms, at trial 10,000 as at 1,000.

    python -m nasbench.benchmarks.search_overhead [--repeats 5]

The objective is one look into a list, so all the time is the search's. Early are trials 500 to 1,500 and late are 9,000
to 10,000 of the same run. The mean is what a search pays; the median trial leaves out other programs' bursts and
Python's own collections of garbage, and so compares early with late.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import mean, median
from typing import Any, ClassVar

import torch

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.strategies import History, RegularizedEvolution
from search_spaces import NASBench201
from search_spaces.base import Arch, SearchSpace

EARLY, LATE = (500, 1_500), (9_000, 10_000)
CLOCKS = ("processor", "wall")


@dataclass(frozen=True)
class Clocked(RegularizedEvolution):
    """Evolution that notes the processor and wall time at each of its proposals."""

    times: ClassVar[list[tuple[float, float]]] = []

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        """Note the time, then propose."""
        self.times.append((time.process_time(), time.perf_counter()))
        return super().propose(space, history, rng)


def milliseconds(seed: int) -> dict[str, list[list[float]]]:
    """Run one search; return the milliseconds of its early and late trials, by clock."""
    space = NASBench201()
    rng = Random(seed)
    scores = [rng.random() for _ in range(space.size)]
    Clocked.times.clear()
    nb.search(
        space,
        lambda arch: {"score": scores[space.index(arch)]},
        Clocked(),
        objectives={"score": "maximize"},
        trials=LATE[1] + 1,
        seed=seed,
        progress=False,
    )
    steps = [[1e3 * (b - a) for a, b in zip(x, y, strict=True)] for x, y in pairwise(Clocked.times)]
    return {clock: [[s[i] for s in steps[a:b]] for a, b in (EARLY, LATE)] for i, clock in enumerate(CLOCKS)}


def main() -> None:
    """Measure, and write the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    runs = [milliseconds(seed) for seed in range(repeats)]
    figures: dict[str, Any] = {}
    for clock in CLOCKS:
        for name, average in (("mean", mean), ("median", median)):
            early, late = ([average(run[clock][part]) for run in runs] for part in (0, 1))
            figures[f"{clock}_time_of_{name}_trial"] = {
                "early_ms": round(median(early), 3),
                "late_ms": round(median(late), 3),
                "late_to_early": round(median(b / a for a, b in zip(early, late, strict=True)), 2),
                "spread_ms": [round(min(early + late), 3), round(max(early + late), 3)],
            }
    strategy = str(RegularizedEvolution())
    record(__file__, figures, seeds=range(repeats), decisions=6, early=EARLY, late=LATE, strategy=strategy)


if __name__ == "__main__":
    main()
