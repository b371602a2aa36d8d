"""The controller of NASNet and LINAS on NAS-Bench-201, beside random search, evolution and TPE.

    python -m nasbench.benchmarks.controller_nasbench201 [--table PATH] [--trials 500] [--seeds 20]

The protocol is that of ``compare_nasbench201``: search on 12-epoch validation accuracy, report 200-epoch test accuracy
of the choice. The learning rate of the controller was chosen on this table among 0.001, 0.002, 0.0035, 0.005 and 0.01,
with other seeds than the ones used here; all else is as published or as usual. Writes the figures and a picture beside
this file. Some minutes, most of them TPE's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.benchmarks.compare_nasbench201 import OBJECTIVE, REPORT, SHARED, reached, regret, rounded
from nasbench.strategies import Linas, OptunaStrategy, RegularizedEvolution, Reinforce, Strategy

STRATEGIES: dict[str, Strategy | OptunaStrategy] = {
    "random": OptunaStrategy("random"),
    "evolution": RegularizedEvolution(),
    "tpe": OptunaStrategy("tpe"),
    "ppo": Reinforce(),
    "reinforce": Reinforce(algorithm="reinforce"),
    "linas": Linas(),
}
FIRST_SEED = 100


def main() -> None:
    """Compare, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=SHARED, help="nasbench201.npz")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = nb.Table.load(options.table)
    comparison = nb.compare(
        STRATEGIES,
        table.space,
        table,
        trials=options.trials,
        seeds=range(FIRST_SEED, FIRST_SEED + options.seeds),
        objectives={OBJECTIVE: "maximize"},
        report=REPORT,
    )
    print(comparison)
    comparison.plot(Path(__file__).with_suffix(".png"))
    figures = {
        "summary": [rounded(row) for row in comparison.summary()],
        "trials_to_reach_the_end_of_random": reached(comparison),
        "report_below_best": regret(comparison, table),
    }
    record(
        __file__,
        figures,
        seeds=comparison.seeds,
        table=options.table.name,
        trials=options.trials,
        strategies=comparison.conditions["strategies"],
        objective=OBJECTIVE,
        report=REPORT,
        test="two-sided Wilcoxon signed-rank against random, paired by seed",
    )


if __name__ == "__main__":
    main()
