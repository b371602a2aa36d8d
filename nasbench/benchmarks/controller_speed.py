"""What "reinforce", "eas" and "linas" take for themselves. Goals: a trial of "reinforce", its share of the updates
included, under 5 ms with 6 decisions and under 25 ms with 50; 1,000 trials of "reinforce" or "eas" replayed in 10 s.

    python -m nasbench.benchmarks.controller_speed [--trials 1000] [--repeats 3]

Nothing is trained: scores are means of random numbers, one of every option. One thread. Processor time, which other
programs disturb less than the wall clock. Replayed is what a resumed study does before its first proposal. Of LINAS a
generation is what it thinks between 50 trials: fits on all finished trials, and NSGA-II over 10,000 predictions.
"""

from __future__ import annotations

import argparse
import time
from random import Random
from statistics import mean, median
from typing import Any

import torch

from nasbench.benchmarks.common import record
from nasbench.strategies import EAS, History, Linas, PastTrial, Proposal, Reinforce, Strategy
from search_spaces import DenseNet, MobileNetV3, NASBench201, NASNet, PlainCNN
from search_spaces.base import Arch, SearchSpace

SPACES: dict[str, SearchSpace] = {"nasbench201": NASBench201(), "nasnet": NASNet()}
GROWING: dict[str, SearchSpace] = {"plain_cnn": PlainCNN(), "densenet": DenseNet()}
GENERATIONS = 5


class Scores:
    """Means of random numbers, one of every option; of several objectives each has its own."""

    def __init__(self, space: SearchSpace, objectives: int = 1) -> None:
        rng = Random(0)
        self.space = space
        self.tables = [[[rng.random() for _ in o] for o in space.choices.values()] for _ in range(objectives)]

    def __call__(self, arch: Arch) -> tuple[float, ...]:
        """Return a score for every objective."""
        code = self.space.encode(arch)
        return tuple(mean(row[i] for row, i in zip(table, code, strict=True)) for table in self.tables)


def run(strategy: Strategy, scores: Scores, trials: int, seed: int) -> tuple[list[float], list[PastTrial]]:
    """Search; return the seconds of each proposal, and the trials."""
    history, seconds = History(), []
    for number in range(trials):
        started = time.process_time()
        proposal = strategy.propose(scores.space, history, Random(f"{seed}/{number}"))
        seconds.append(time.process_time() - started)
        if isinstance(proposal, Arch):
            proposal = Proposal(proposal)
        history.append(PastTrial(number, proposal.arch, scores(proposal.arch), proposal.parent, proposal.note))
    return seconds, list(history)


def controller(space: SearchSpace, strategy: Strategy, trials: int, repeats: int) -> dict[str, Any]:
    """Return milliseconds of a trial and of a proposal without an update, and seconds of a replay."""
    means, plain, replays = [], [], []
    for seed in range(repeats):
        seconds, past = run(strategy, Scores(space), trials, seed)
        means.append(1e3 * mean(seconds))
        plain.append(1e3 * median(seconds))
        started = time.process_time()
        strategy.propose(space, History(past), Random(0))
        replays.append(time.process_time() - started)
    return {
        "decisions": len(space.choices),
        "trial_with_its_share_of_updates_ms": round(median(means), 2),
        "spread_ms": [round(min(means), 2), round(max(means), 2)],
        "proposal_alone_ms": round(median(plain), 2),
        "replay_s": round(median(replays), 2),
    }


def predictors(objectives: int, repeats: int) -> dict[str, Any]:
    """Return seconds of each generation of LINAS, by the number of trials it was fitted to."""
    space, strategy = MobileNetV3(), Linas()
    size = strategy.population
    runs = [run(strategy, Scores(space, objectives), GENERATIONS * size + 1, seed)[0] for seed in range(repeats)]
    starts = [number * size for number in range(1, GENERATIONS + 1)]
    generations = {f"{start}_trials_s": round(median(seconds[start] for seconds in runs), 2) for start in starts}
    return {"decisions": len(space.choices), **generations}


def main() -> None:
    """Measure, and write the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(Reinforce(batch=2), Scores(NASBench201()), 3, 0)  # what is loaded at the first update and fit is not counted
    run(EAS(batch=1), Scores(PlainCNN()), 3, 0)
    run(Linas(population=5, evaluations=5), Scores(NASBench201()), 6, 0)
    figures = {
        f"{name}_{algorithm}": controller(space, Reinforce(algorithm=algorithm), options.trials, options.repeats)
        for name, space in SPACES.items()
        for algorithm in ("ppo", "reinforce")
    }
    figures |= {
        f"{name}_eas": controller(space, EAS(), options.trials, options.repeats) for name, space in GROWING.items()
    }
    figures |= {f"linas_{objectives}_objectives": predictors(objectives, options.repeats) for objectives in (1, 2)}
    record(__file__, figures, seeds=range(options.repeats), trials=options.trials, clock="processor time")


if __name__ == "__main__":
    main()
