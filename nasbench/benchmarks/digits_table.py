"""Measure the shipped table: every NAS-Bench-201 cell on scanned digits, 3 seeds. About two core-hours; resumable.

    python -m nasbench.benchmarks.digits_table [--workers 2] [--folder runs]

Two epochs on purpose: cells still differ by more than seeds do. After ten, all are alike and a table would hold noise.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.table import SHIPPED
from search_spaces import NASBench201

SEEDS = 3
SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 64}


def main() -> None:
    """Build the table with one thread a worker, save it in the package and record its spreads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default="runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    space = NASBench201(channels=8, cells=1)
    data = nb.data.load("digits")
    table = nb.Table.build(
        space,
        data,
        seeds=SEEDS,
        folder=options.folder,
        storage=f"{options.folder}/digits-table.log",  # a journal takes a seventh of SQLite's time per trial
        workers=options.workers,
        device="cpu",
        **SETTINGS,
    )
    path = table.save(SHIPPED / "nasbench201-digits.npz")
    figures = {
        "rows": len(table),
        "architectures": space.size,
        "bytes": path.stat().st_size,
        "core_hours": round(float(table.values("seconds").sum()) * SEEDS / 3600, 3),
        "spreads": table.conditions["spreads"],
    }
    record(__file__, figures, seeds=range(SEEDS), space=space.to_json(), data=data.name, recipe=SETTINGS)


if __name__ == "__main__":
    main()
