"""What a search adds to a trial: evolution over 6 decisions, in memory. Goal: under 1 ms, at trial 10,000 as at 1,000.

    python -m nasbench.benchmarks.search_overhead [--repeats 5]

The objective is one look into a list, so all the time is the search's. Early are trials 500 to 1,500 and late are 9,000
to 10,000 of the same run, so both meet the same load of the machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import ClassVar

import torch

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.strategies import History, RegularizedEvolution
from search_spaces import NASBench201
from search_spaces.base import Arch, SearchSpace

EARLY, LATE = (500, 1_500), (9_000, 10_000)


@dataclass(frozen=True)
class Clocked(RegularizedEvolution):
    """Evolution that notes the processor and wall time at each of its proposals."""

    times: ClassVar[list[tuple[float, float]]] = []

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        """Note the time, then propose."""
        self.times.append((time.process_time(), time.perf_counter()))
        return super().propose(space, history, rng)


def milliseconds(seed: int) -> dict[str, list[float]]:
    """Run one search; return milliseconds per trial, early and late, by clock."""
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
    return {
        clock: [1e3 * (Clocked.times[b][i] - Clocked.times[a][i]) / (b - a) for a, b in (EARLY, LATE)]
        for i, clock in enumerate(("processor", "wall"))
    }


def main() -> None:
    """Measure, and write the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    runs = []
    for seed in range(repeats):
        runs.append(milliseconds(seed))
        print(seed, runs[-1], flush=True)
    figures = {}
    for clock in ("processor", "wall"):
        early, late = zip(*(run[clock] for run in runs), strict=True)
        figures[clock] = {
            "early_ms_per_trial": round(median(early), 3),
            "late_ms_per_trial": round(median(late), 3),
            "late_to_early": round(median(b / a for a, b in zip(early, late, strict=True)), 3),
            "spread_ms": [round(min(*early, *late), 3), round(max(*early, *late), 3)],
        }
    record(
        __file__,
        figures,
        seeds=range(repeats),
        decisions=6,
        early=EARLY,
        late=LATE,
        strategy=str(RegularizedEvolution()),
    )


if __name__ == "__main__":
    main()
