"""Strategies on NAS-Bench-201, by the fair protocol: search on 12-epoch validation, report 200-epoch test accuracy.

    python -m nasbench.benchmarks.compare_nasbench201 [--table PATH] [--trials 300] [--seeds 20]

Needs the measured accuracies, ``nasbench201.npz``: by default in ``../shared/data``. Writes the figures and a picture
beside this file. Several minutes, most of them TPE's and NSGA-II's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.strategies import OptunaStrategy, Strategy

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "nasbench201.npz"
STRATEGIES = ("random", "evolution", "local_search", "tpe", "nsga2")
OBJECTIVE, REPORT = "cifar10_val_12", "cifar10_test_200"


def regret(comparison: nb.Comparison, table: nb.Table) -> dict[str, float]:
    """Return how far the mean choice of each strategy stays below the table's best, in points of the report metric."""
    best = table.best(REPORT)[1]
    assert comparison.reported is not None
    return dict(zip(comparison.names, (best - comparison.reported.mean(axis=1)).round(3).tolist(), strict=True))


def reached(comparison: nb.Comparison) -> dict[str, int | None]:
    """Return after how many trials each strategy's mean is where random search's ends; None: never."""
    means = comparison.curves.mean(axis=1)
    there = means >= means[comparison.names.index("random"), -1]
    return {n: int(np.argmax(t)) + 1 if t.any() else None for n, t in zip(comparison.names, there, strict=True)}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the summary with four significant digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def compare_and_record(
    script: str,
    strategies: Sequence[str] | Mapping[str, Strategy | OptunaStrategy],
    table_file: Path,
    trials: int,
    seeds: int | Sequence[int],
) -> None:
    """Compare strategies on the table by this protocol; write figures and a picture beside a script."""
    torch.set_num_threads(1)
    table = nb.Table.load(table_file)
    comparison = nb.compare(
        strategies,
        table.space,
        table,
        trials=trials,
        seeds=seeds,
        objectives={OBJECTIVE: "maximize"},
        report=REPORT,
    )
    print(comparison)
    comparison.plot(Path(script).with_suffix(".png"))
    figures = {
        "summary": [rounded(row) for row in comparison.summary()],
        "trials_to_reach_the_end_of_random": reached(comparison),
        "report_below_best": regret(comparison, table),
    }
    record(
        script,
        figures,
        seeds=comparison.seeds,
        table=table_file.name,
        trials=trials,
        strategies=comparison.conditions["strategies"],
        objective=OBJECTIVE,
        report=REPORT,
        test="two-sided Wilcoxon signed-rank against random, paired by seed",
    )


def main() -> None:
    """Compare, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=SHARED, help="nasbench201.npz")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    compare_and_record(__file__, STRATEGIES, options.table, options.trials, options.seeds)


if __name__ == "__main__":
    main()
