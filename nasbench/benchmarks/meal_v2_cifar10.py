"""MEAL V2 on CIFAR-10 images: a trained student trained on by its labels, and by an ensemble of teachers without them.

    python -m nasbench.benchmarks.meal_v2_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. Teachers are two ResNets of three blocks, the student one of a
quarter of their width; all are trained on the same images with their labels first. Then the student is trained on for
equally many steps: with labels, or distilled in each mode of the discriminator, from live teachers or from cached
labels (all classes of every crop, or the five or two likeliest). One more is distilled with random labels in the data:
its weights are compared with those of the student that had the right ones. Two processes run at a time, on one
thread each.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.images import ImageData

MODES = ("off", "joint", "reversed", "alternate")
KEPT = (10, 5, 2)  # classes in a cached label


def main() -> None:
    """Train every seed, and record."""
    parser = small_runs.arguments(__doc__, images=2000, epochs=8)
    parser.add_argument("--width", type=int, default=16, help="of the teachers' first block")
    parser.add_argument("--more", type=int, default=8, help="epochs that students are trained on for")
    options = parser.parse_args()
    if small_runs.did_child(options, run):
        return
    runs = small_runs.run_all(__file__, ["all"], options.seeds)["all"]
    figures: dict[str, Any] = {}
    for name in runs[0]["test_accuracy"]:
        own = [one["test_accuracy"][name] for one in runs]
        figures[name] = {"test_accuracy": small_runs.spread(own), "by_seed": own}
        if name.startswith(("distilled", "cached")):
            gains = [value - one["test_accuracy"]["with labels"] for value, one in zip(own, runs, strict=True)]
            figures[name]["gain_over_labels"] = small_runs.spread(gains)
    for key in ("random labels give equal weights", "all cached classes give equal weights", "seconds"):
        figures[key] = [one[key] for one in runs]
    small_runs.record_runs(__file__, figures, options)


def run(options: Any, _: str, seed: int) -> dict[str, Any]:
    """Train teachers and students of one seed; return test accuracies, and which weights are equal."""
    started = time.perf_counter()
    data = nb.data.load(options.data, train_images=options.images)
    assert isinstance(data, ImageData)
    accuracy: dict[str, float] = {}

    def fitted(model: nn.Module, own: int, epochs: int, lr: float = 0.1) -> nn.Module:
        recipe: dict[str, Any] = {"epochs": epochs, "batch_size": options.batch, "lr": lr}
        return nb.fit(model, data, seed=own, device="cpu", progress=False, **recipe)

    def tested(model: nn.Module) -> float:
        return round(nb.evaluate(model, data)["test_accuracy"], 4)

    teachers = []
    for own in (1000 + seed, 2000 + seed):
        teachers.append(fitted(small_runs.resnet8(options.width, data, own), own, options.epochs))
        accuracy[f"teacher {len(teachers)}"] = tested(teachers[-1])
    student = fitted(small_runs.resnet8(options.width // 4, data, seed), seed, options.epochs)
    accuracy["student"] = tested(student)
    twin = small_runs.resnet8(options.width // 4, data, seed)
    twin.load_state_dict(student.state_dict())
    accuracy["with labels"] = tested(fitted(twin, seed, options.more, lr=0.01))

    settings = {"data": data, "epochs": options.more, "seed": seed, "batch_size": options.batch, "device": "cpu"}
    settings["progress"] = False
    distilled = {mode: compress.distill(student, teachers, mode=mode, **settings) for mode in MODES}
    for mode, model in distilled.items():
        accuracy[f"distilled, discriminator {mode}"] = tested(model)
    other = compress.distill(student, teachers, **(settings | {"data": mislabelled(data, seed)}))
    found: dict[str, Any] = {"random labels give equal weights": equal(other, distilled["off"])}
    with tempfile.TemporaryDirectory() as folder:
        for kept in KEPT:
            labels = compress.soft_labels(
                teachers,
                data,
                Path(folder) / f"{kept}.safetensors",
                k=kept,
                epochs=options.more,
                seed=seed,
                batch_size=options.batch,
                progress=False,
            )
            model = compress.distill(student, labels=labels, **settings)
            accuracy[f"cached, {kept} classes"] = tested(model)
            if kept == data.classes:
                found["all cached classes give equal weights"] = equal(model, distilled["off"])
    return found | {"test_accuracy": accuracy, "seconds": round(time.perf_counter() - started, 1)}


def mislabelled(data: ImageData, seed: int) -> ImageData:
    """Return the same images in the same order with random labels."""
    twin = copy.copy(data)
    generator = torch.Generator().manual_seed(seed)
    twin._labels = torch.randint(data.classes, data._labels.shape, generator=generator)
    return twin


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two networks have the same numbers to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


if __name__ == "__main__":
    main()
