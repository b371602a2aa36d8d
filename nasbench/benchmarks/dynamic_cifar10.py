"""Dynamic sparsity on CIFAR-10 images: RigL, SET and gradual pruning against a mask that stays, at equal density.

    python -m nasbench.benchmarks.dynamic_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. The network is a ResNet of three blocks with ERK densities; all
variants train in the same way for equally many steps on training and validation images, and are tested once. Two
processes run at a time, on one thread each.
"""

from __future__ import annotations

from typing import Any

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs

METHODS = ("static", "set", "rigl", "gradual")
DENSITIES = (0.1, 0.05)


def main() -> None:
    """Train every variant with every seed, and record."""
    parser = small_runs.arguments(__doc__, images=5000, epochs=15)
    parser.add_argument("--width", type=int, default=16, help="of the first block")
    parser.add_argument("--interval", type=int, default=50, help="steps between two changes of the masks")
    options = parser.parse_args()
    if small_runs.did_child(options, train):
        return
    names = ["dense:1", *(f"{method}:{density}" for density in DENSITIES for method in METHODS)]
    runs = small_runs.run_all(__file__, names, options.seeds)
    figures = {"dense": small_runs.summary(runs["dense:1"])}
    for density in DENSITIES:
        static = runs[f"static:{density}"]
        for method in METHODS:
            figures[f"{method}, density {density}"] = small_runs.summary(
                runs[f"{method}:{density}"], None if method == "static" else static
            )
    small_runs.record_runs(__file__, figures, options)


def train(options: Any, name: str, seed: int) -> dict[str, Any]:
    """Train one network and test it."""
    method, density = name.split(":")
    data = nb.data.load(options.data, train_images=options.images)
    model = small_runs.resnet8(options.width, data, seed)
    if method == "dense":
        return small_runs.train(model, data, seed, options)
    target = compress.densities(model, float(density), "erk")
    model = compress.prune(model, 1.0 if method == "gradual" else target, seed=seed)
    if method == "static":
        return small_runs.train(model, data, seed, options)
    settings = {"density": target} if method == "gradual" else {}
    callback = compress.DynamicCallback(method, interval=options.interval, seed=seed, **settings)
    return small_runs.train(model, data, seed, options, [callback])


if __name__ == "__main__":
    main()
