"""One-shot searches of NAS-Bench-201 on CIFAR-10 images, with the benchmark's table beside them.

    python -m nasbench.benchmarks.one_shot_nasbench201 cifar10.npz nasbench201.npz [--epochs 12] [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test, `nasbench201.npz` the strings `arch` and `cifar10_test_200`. Every
method trains a small supernet on the same few images for equally many epochs and never sees the table, which only tells
how good the found cell is: its test accuracy when trained alone for 200 epochs, in percent, and its rank among 15,625.
Two searches run at a time, each in a process of its own on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

import nasbench as nb
from nasbench.benchmarks.common import in_processes, record
from search_spaces import NASBench201

METRIC = "cifar10_test_200"
METHODS: dict[str, dict[str, Any]] = {  # name -> strategy and its settings
    "darts": {"strategy": "darts"},
    "darts, second order, finite difference": {"strategy": "darts", "second_order": True},
    "darts, second order, exact": {"strategy": "darts", "second_order": True, "hessian": "exact"},
    "gdas": {"strategy": "gdas"},
    "drnas": {"strategy": "drnas"},
    "pcdarts": {"strategy": "pcdarts"},
    "spos": {"strategy": "spos"},
}


def main() -> None:
    """Search with every method and seed, and record what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("table")
    parser.add_argument("--images", type=int, default=2500, help="a fifth of them validate")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--arch-lr", type=float, default=0.01, help="larger than published: the searches are short")
    parser.add_argument("--candidates", type=int, default=100, help="cells that spos evaluates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "SEED", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, seed, file = options.child
        Path(file).write_text(json.dumps(search(options, method, int(seed))))
        return
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    jobs = [(method, str(seed)) for seed in range(options.seeds) for method in METHODS]
    for (method, _), found in in_processes(__file__, jobs):
        runs[method].append(found)
    values = nb.Table.load(options.table, space=NASBench201()).values(METRIC)
    quantiles = np.quantile(values, (0.05, 0.5, 0.95))
    figures = {
        "of_all_cells": {
            "mean": round(float(values.mean()), 2),
            "deviation": round(float(values.std()), 2),
            "quantiles_5_50_95": [round(float(q), 2) for q in quantiles],
            "best": round(float(values.max()), 2),
        },
        "methods": {method: summary(found) for method, found in runs.items()},
    }
    record(
        __file__,
        figures,
        seeds=range(options.seeds),
        threads_of_a_search=1,
        space=NASBench201(channels=8, cells=1).to_json(),
        metric=f"{METRIC} of the found cell: a search never sees it",
        **{name: getattr(options, name) for name in ("images", "epochs", "batch", "arch_lr", "candidates")},
    )


def search(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Search once and return what was found."""
    torch.set_num_threads(1)
    settings = dict(METHODS[method])
    if settings["strategy"] == "spos":
        settings |= {"trials": options.candidates, "population": 20, "parents": 5}
    else:
        settings["arch_lr"] = options.arch_lr
    data = nb.data.load(options.data, train_images=options.images)
    table = nb.Table.load(options.table, space=NASBench201())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skip connections take over")
        result = nb.search(
            NASBench201(channels=8, cells=1),
            data,
            epochs=options.epochs,
            batch_size=options.batch,
            seed=seed,
            study="study",
            folder=folder,
            table=(table, METRIC),
            device="cpu",
            progress=False,
            **settings,
        )
    best = result.best
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "test_200": round(best.metrics["table_value"], 2),
        "rank": int(best.metrics["rank"]),
        "cell": NASBench201().to_string(best.arch),
        "skips": sum(option == "skip_connect" for option in best.arch.values()),
        "shared_val_accuracy": round(best.metrics["val_accuracy"], 4),
        "ranks_over_epochs": [epoch["rank"] for epoch in result.epochs if "rank" in epoch],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread over seeds, and the runs."""
    found = [run["test_200"] for run in runs]
    return {
        "test_200_mean": round(mean(found), 2),
        "test_200_deviation": round(stdev(found), 2) if len(found) > 1 else None,
        "seconds_mean": round(mean(run["seconds"] for run in runs), 1),
        "runs": sorted(runs, key=lambda run: run["seed"]),
    }


if __name__ == "__main__":
    main()
