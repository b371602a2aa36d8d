"""A DARTS search on CIFAR-10 images, and the found cell trained alone beside random cells of equal size.

    python -m nasbench.benchmarks.darts_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. For every seed one search finds a cell; it and a random cell whose
network has the same number of parameters to within five per cent are then trained from scratch in the same way, on
training and validation images, and tested once. Sizes are those that two processor cores can do in minutes, far below
the published ones. Three processes run at a time, on one thread each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks.common import in_processes, record, train_from_scratch
from search_spaces import DARTS


def main() -> None:
    """Search and train for every seed, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=2500, help="of the search; a fifth of them validate")
    parser.add_argument("--epochs", type=int, default=8, help="of the search")
    parser.add_argument("--cells", type=int, default=5, help="in the supernet")
    parser.add_argument("--channels", type=int, default=8, help="of the supernet and of the networks")
    parser.add_argument("--arch-lr", type=float, default=0.01, help="larger than published: the searches are short")
    parser.add_argument("--train-images", type=int, default=5000, help="of the trainings from scratch")
    parser.add_argument("--train-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("SEED", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        Path(options.child[1]).write_text(json.dumps(search_and_train(options, int(options.child[0]))))
        return
    jobs = [(str(seed),) for seed in range(options.seeds)]
    runs = [found for _, found in in_processes(__file__, jobs, at_once=3)]
    runs.sort(key=lambda run: run["seed"])
    gains = [run["found"]["test_accuracy"] - run["random"]["test_accuracy"] for run in runs]
    figures = {
        "found_test_accuracy": [run["found"]["test_accuracy"] for run in runs],
        "random_test_accuracy": [run["random"]["test_accuracy"] for run in runs],
        "gain_mean": round(mean(gains), 4),
        "gain_deviation": round(stdev(gains), 4) if len(gains) > 1 else None,
        "search_seconds_mean": round(mean(run["search_seconds"] for run in runs), 1),
        "runs": runs,
    }
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "seeds", "child")}
    record(__file__, figures, seeds=range(options.seeds), threads_of_a_process=1, **settings)


def search_and_train(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Search, choose a random cell of equal size, train both, test both."""
    space = DARTS(channels=options.channels, cells=options.cells)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skip connections take over")
        result = nb.search(
            space,
            nb.data.load(options.data, train_images=options.images),
            "darts",
            epochs=options.epochs,
            batch_size=32,
            arch_lr=options.arch_lr,
            seed=seed,
            study="study",
            folder=folder,
            device="cpu",
            progress=False,
        )
    seconds = time.perf_counter() - started
    space = result.space  # type: ignore[assignment]
    found = result.best.arch
    data = nb.data.load(options.data, train_images=options.train_images)
    target = params(space, found)
    rng = Random(f"random cell {seed}")
    other = next(a for a in (space.sample(rng) for _ in range(100_000)) if abs(params(space, a) / target - 1) <= 0.05)
    entry: dict[str, Any] = {"seed": seed, "search_seconds": round(seconds, 1)}
    for name, arch in (("found", found), ("random", other)):
        settings = {"epochs": options.train_epochs, "batch_size": 64, "lr": 0.05, "split": "train+val"}
        model = train_from_scratch(space, arch, data, seed, **settings)
        entry[name] = {
            "test_accuracy": round(nb.evaluate(model, data)["test_accuracy"], 4),
            "params": params(space, arch),
            "skips_in_normal_cell": sum(v == "skip_connect" for k, v in arch.items() if k.startswith("normal")),
            "arch": dict(arch),
        }
    return entry


def params(space: DARTS, arch: Any) -> int:
    """Return the number of parameters of an architecture's network."""
    with torch.device("meta"):
        return sum(p.numel() for p in space.build(arch).parameters())


if __name__ == "__main__":
    main()
