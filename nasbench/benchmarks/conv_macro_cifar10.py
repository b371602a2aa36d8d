"""One-shot searches of a weight-entangled space on CIFAR-10 images, and what they find trained alone.

    python -m nasbench.benchmarks.conv_macro_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. Every method searches four convolutions (`ConvMacro`) with equally
many epochs of equally many images; after every epoch the architecture that it would choose is scored with shared
weights on validation images, which the plot shows. Then the architecture found, random ones and the largest are trained
from scratch in the same way on training and validation images, and tested once. Sizes are those that two processor
cores can do in half an hour. Two processes run at a time, on one thread each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks.common import in_processes, record, train_from_scratch
from search_spaces import Arch, ConvMacro

METHODS = ("darts", "gdas", "drnas", "spos")
BASELINES = ("random", "largest")


def main() -> None:
    """Search and train with every method and seed, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=5000, help="of the search; a fifth of them validate")
    parser.add_argument("--epochs", type=int, default=12, help="of the search")
    parser.add_argument("--batch", type=int, default=32, help="of the search")
    parser.add_argument("--arch-lr", type=float, default=0.01, help="larger than published: the searches are short")
    parser.add_argument("--candidates", type=int, default=100, help="architectures that spos evaluates")
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16], help="of the first convolution")
    parser.add_argument("--train-images", type=int, default=5000, help="of the trainings from scratch")
    parser.add_argument("--train-epochs", type=int, default=15)
    parser.add_argument("--randoms", type=int, default=3, help="random architectures per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("METHOD", "SEED", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        method, seed, file = options.child
        run = baseline if method in BASELINES else search
        Path(file).write_text(json.dumps(run(options, method, int(seed))))
        return
    jobs = [(method, str(seed)) for seed in range(options.seeds) for method in (*METHODS, *BASELINES)]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in (*METHODS, *BASELINES)}
    for (method, _), found in in_processes(__file__, jobs):
        runs[method].append(found)
    figures = {method: summary(sorted(found, key=lambda run: run["seed"])) for method, found in runs.items()}
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "seeds", "child")}
    record(__file__, figures, seeds=range(options.seeds), threads_of_a_process=1, **settings)
    curves = {method: [run["epochs"] for run in runs[method]] for method in METHODS}
    nb.plot_anytime(curves, Path(__file__).with_suffix(".png"))


def space_of(options: argparse.Namespace) -> ConvMacro:
    """Return the space that is searched."""
    return ConvMacro(widths=tuple(options.widths))


def search(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Search once, train what was found, test it."""
    settings: dict[str, Any] = {"arch_lr": options.arch_lr}
    if method == "spos":
        settings = {"trials": options.candidates, "population": 20, "parents": 5}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = nb.search(
            space_of(options),
            nb.data.load(options.data, train_images=options.images),
            method,
            epochs=options.epochs,
            batch_size=options.batch,
            seed=seed,
            study="study",
            folder=folder,
            device="cpu",
            progress=False,
            **settings,
        )
    kept = ("epoch", "seconds", "scoring_seconds", "train_loss", "arch_loss", "val_accuracy", "arch", "probabilities")
    return {
        "seed": seed,
        "search_seconds": round(time.perf_counter() - started, 1),
        "shared_val_accuracy": round(result.best.metrics["val_accuracy"], 4),
        "trained": [train(options, result.best.arch, seed)],
        "epochs": [{k: rounded(v) for k, v in epoch.items() if k in kept} for epoch in result.epochs],
    }


def baseline(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Train and test random architectures, or the largest."""
    space = space_of(options)
    rng = Random(f"random architectures {seed}")
    archs = [space.at(space.size - 1)] if method == "largest" else [space.sample(rng) for _ in range(options.randoms)]
    return {"seed": seed, "trained": [train(options, arch, seed) for arch in archs]}


def train(options: argparse.Namespace, arch: Arch, seed: int) -> dict[str, Any]:
    """Train one architecture from scratch and test it."""
    data = nb.data.load(options.data, train_images=options.train_images)
    space = space_of(options).bind(data)
    settings = {"epochs": options.train_epochs, "batch_size": 64, "lr": 0.05, "split": "train+val"}
    model = train_from_scratch(space, arch, data, seed, **settings)
    cost = nb.measure(model, data.shape)
    return {
        "arch": dict(arch),
        "test_accuracy": round(nb.evaluate(model, data)["test_accuracy"], 4),
        "params": cost.params,
        "macs": cost.macs,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread over all that was trained, and the runs."""
    accuracies = [network["test_accuracy"] for run in runs for network in run["trained"]]
    found: dict[str, Any] = {
        "test_accuracy_mean": round(mean(accuracies), 4),
        "test_accuracy_deviation": round(stdev(accuracies), 4) if len(accuracies) > 1 else None,
        "macs_mean": round(mean(network["macs"] for run in runs for network in run["trained"])),
    }
    if "search_seconds" in runs[0]:
        found["search_seconds_mean"] = round(mean(run["search_seconds"] for run in runs), 1)
        found["shared_val_accuracy_by_epoch"] = [
            round(mean(run["epochs"][i]["val_accuracy"] for run in runs), 4) for i in range(len(runs[0]["epochs"]))
        ]
    return found | {"runs": runs}


def rounded(value: Any) -> Any:
    """Return numbers with four digits, in lists and mappings too."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
