"""DASS on CIFAR-10 images: its cell at 95 and 98 % sparsity, against a DARTS cell pruned to the same density.

    python -m nasbench.benchmarks.dass_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. For every seed DARTS finds a cell once, and DASS one at every
density, with equally many epochs of equally many images. The networks of these cells, and of one random cell, are then
trained in the same way: dense, then the scores that say what to prune, then the weights that are left; and tested once.
Every layer is pruned to the same density, depthwise convolutions too. Sizes are those that two processor cores can do
in half an hour, far below the published ones. Two processes run at a time, on one thread each.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from random import Random
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.strategies.dass import train_sparse
from search_spaces import DARTS
from search_spaces.sparse_operations import masks

DENSITIES = (0.05, 0.02)
METHODS = ("dass", "darts", "random")


def main() -> None:
    """Search and train with every method, density and seed, and record."""
    parser = small_runs.arguments(__doc__, images=600, epochs=8, batch=16)
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--arch-lr", type=float, default=0.01, help="larger than published: the searches are short")
    parser.add_argument(
        "--train-images", type=int, default=2500, help="of the trainings of what was found; a fifth is left out"
    )
    parser.add_argument("--train-epochs", type=int, nargs=3, default=[3, 1, 3], help="dense, scores, the weights left")
    options = parser.parse_args()
    if small_runs.did_child(options, search_and_train):
        return
    found = small_runs.run_all(__file__, [f"dass:{d}" for d in DENSITIES] + ["darts", "random"], options.seeds)
    figures: dict[str, Any] = {}
    for d in DENSITIES:
        runs = {"dass": [entry[str(d)] for entry in found[f"dass:{d}"]]}
        runs |= {method: [entry[str(d)] for entry in found[method]] for method in METHODS[1:]}
        figures[f"density {d}"] = {
            method: small_runs.summary(own, None if method == "dass" else runs["dass"]) for method, own in runs.items()
        }
    small_runs.record_runs(__file__, figures, options)


def search_and_train(options: argparse.Namespace, name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Return what was found by density, trained and tested."""
    method, _, density = name.partition(":")
    data = nb.data.load(options.data, train_images=options.train_images)
    space = DARTS(cells=options.cells, channels=options.channels, ops="sparse").bind(data)
    arch = space.sample(Random(f"random cell {seed}")) if method == "random" else search(options, method, density, seed)
    networks = {}
    for d in [float(density)] if density else DENSITIES:
        torch.manual_seed(seed)
        network = space.build(arch)
        settings: dict[str, Any] = {"epochs": options.train_epochs, "lr": (0.05, 0.1, 0.02), "batch_size": 32}
        train_sparse(network, data, d, seed=seed, device="cpu", progress=False, **settings)
        own = masks(network).values()
        networks[str(d)] = {
            "test_accuracy": round(nb.evaluate(network, data)["test_accuracy"], 4),
            "kept_weights": sum(int(mask.sum()) for mask in own),
            "masked_weights": sum(mask.numel() for mask in own),
            "params": sum(p.numel() for p in network.parameters()),
            "arch": dict(arch),
        }
    return networks


def search(options: argparse.Namespace, method: str, density: str, seed: int) -> Any:
    """Return the cell that a search finds."""
    space = DARTS(cells=options.cells, channels=options.channels, ops="sparse" if method == "dass" else "dense")
    settings: dict[str, Any] = {"density": float(density)} if method == "dass" else {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skip connections take over")
        return nb.search(
            space,
            nb.data.load(options.data, train_images=options.images),
            method,
            epochs=options.epochs,
            batch_size=options.batch,
            arch_lr=options.arch_lr,
            seed=seed,
            study="study",
            folder=folder,
            device="cpu",
            progress=False,
            **settings,
        ).best.arch


if __name__ == "__main__":
    main()
