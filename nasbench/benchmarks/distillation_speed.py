"""What distillation costs: a step with live teachers and one with cached labels, against a plain training step.

    python -m nasbench.benchmarks.distillation_speed cifar10.npz [--rounds 5]

`cifar10.npz` holds x_train, y_train, x_test, y_test. A ResNet of three blocks learns from two twice as wide, one epoch
at a time, all variants in turns in one process on one thread; times are process time. The goals are 1.10 times a plain
step plus the teachers' forward passes, and 1.05 times a plain step with cached labels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.benchmarks.common import record


def main() -> None:
    """Time every variant, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="cifar10.npz")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="of the student's first block")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = nb.data.load(options.data, train_images=options.images)
    student = small_runs.resnet8(options.width, data, 0)
    teachers = [small_runs.resnet8(2 * options.width, data, seed).eval() for seed in (1, 2)]
    steps = data.steps(options.batch)
    plain: dict[str, Any] = {"epochs": 1, "batch_size": options.batch, "seed": 0, "device": "cpu", "progress": False}

    def forwards() -> None:
        with torch.no_grad():
            for x, _ in data.train_batches(options.batch, seed=0, epoch=0):
                for teacher in teachers:
                    teacher(x)

    def batches() -> None:
        for _ in data.train_batches(options.batch, seed=0, epoch=0):
            pass

    with tempfile.TemporaryDirectory() as folder:
        labels = compress.soft_labels(
            teachers, data, Path(folder) / "labels.safetensors", epochs=1, batch_size=options.batch, progress=False
        )
        runs: dict[str, Callable[[], object]] = {
            "plain": lambda: nb.fit(small_runs.resnet8(options.width, data, 0), data, **plain),
            "teachers' forward passes": forwards,
            "batches alone": batches,
            "distilled": lambda: compress.distill(student, teachers, data=data, **plain),
            "cached": lambda: compress.distill(student, labels=labels, data=data, **plain),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.rounds + 1):
            for name, run in runs.items():
                started = time.process_time()
                run()
                if turn:
                    times[name].append(time.process_time() - started)
    ratios = {
        "distilled to plain plus teachers": median(
            own / (a + b - c)
            for own, a, b, c in zip(
                times["distilled"],
                times["plain"],
                times["teachers' forward passes"],
                times["batches alone"],
                strict=True,
            )
        ),
        "cached to plain": median(a / b for a, b in zip(times["cached"], times["plain"], strict=True)),
    }
    figures = {
        "milliseconds of a step": {name: round(1e3 * median(own) / steps, 2) for name, own in times.items()},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
    }
    settings = {name: getattr(options, name) for name in ("images", "batch", "width", "rounds")}
    record(__file__, figures, clock="process time", **settings)


if __name__ == "__main__":
    main()
