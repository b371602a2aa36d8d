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

from nasbench.benchmarks.compare_nasbench201 import SHARED, compare_and_record
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
    compare_and_record(
        __file__, STRATEGIES, options.table, options.trials, range(FIRST_SEED, FIRST_SEED + options.seeds)
    )


if __name__ == "__main__":
    main()
