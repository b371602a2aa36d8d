"""Sparse-IFT on CIFAR-10 images: larger sparse layers against the dense ones, at equal multiply-adds.

    python -m nasbench.benchmarks.sparse_ift_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. The dense network is a ResNet of three blocks; every member of the
family replaces its layers at the same number of multiply-adds (of weights that are not zero), is trained in the same
way and for as many steps on training and validation images, with RigL or a mask that stays, and tested once. On dense
hardware the larger networks take longer, and the seconds of training say by how much. The dense network of the width
of "wide" is trained too: what the same hardware time buys. Two processes run at a time, on one thread each.
"""

from __future__ import annotations

from typing import Any

import torch

import compress
import nasbench as nb
from compress.iso_flop import KINDS
from compress.layer_macs import macs
from nasbench.benchmarks import small_runs


def main() -> None:
    """Train every variant with every seed, and record."""
    parser = small_runs.arguments(__doc__, images=5000, epochs=10)
    parser.add_argument("--width", type=int, default=8, help="of the first block of the dense network")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--interval", type=int, default=25, help="steps between two changes of the masks")
    options = parser.parse_args()
    if small_runs.did_child(options, train):
        return
    names = ["dense", "dense of twice the width", *(f"{kind}, rigl" for kind in KINDS), "wide, static"]
    runs = small_runs.run_all(__file__, names, options.seeds)
    figures = {name: small_runs.summary(own, None if name == "dense" else runs["dense"]) for name, own in runs.items()}
    small_runs.record_runs(__file__, figures, options)


def train(options: Any, name: str, seed: int) -> dict[str, Any]:
    """Train one network and test it."""
    data = nb.data.load(options.data, train_images=options.images)
    x = torch.zeros(1, *data.shape)
    dense = small_runs.resnet8(options.width, data, seed)
    kind, _, method = name.partition(", ")
    callbacks: list[nb.Callback] = []
    if kind == "dense":
        model = dense
    elif not method:
        model = small_runs.resnet8(2 * options.width, data, seed)
    else:
        model = compress.sparse_ift(dense, kind=kind, sparsity=options.sparsity, example=x, seed=seed)
        if method == "rigl":
            callbacks = [compress.DynamicCallback("rigl", interval=options.interval, seed=seed)]
    found = small_runs.train(model, data, seed, options, callbacks)
    cost = macs(model, x)
    return found | {"kept_macs": cost.sparse, "macs_to_dense": round(cost.sparse / macs(dense, x).dense, 4)}


if __name__ == "__main__":
    main()
