"""Augmented CIFAR-10 batches: our tensor operations against torchvision's DataLoader with PIL transforms, on one core.

    python -m nasbench.benchmarks.augmentation --data cifar10.npz

Both give every image a random crop of 32 pixels with a border of 4, a mirror image at random and the same scaling,
with and without a cutout of 16 pixels, over an epoch of 50,000 images in batches of 128. The usual way cuts with one
slice of the tensor, the fastest we know; "unstored" is what we do for sets too large to keep padded copies of. Variants
take turns and the first turn is dropped. Times are processor times of this process, so that neighbours on the machine
matter little. Without ``--data`` the images are random bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from random import Random
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nasbench.benchmarks.common import record
from nasbench.data import Data, from_arrays, load
from nasbench.splits import Array

IMAGES, BATCH, SIDE = 50_000, 128, 16


class Usual(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 gives them: array, PIL image, transformed tensor, one at a time."""

    def __init__(self, images: Array, labels: Array, cutout: int, rng: Random) -> None:
        from PIL import Image
        from torchvision import transforms as t

        self.images, self.labels, self.cutout, self.rng = images, labels.tolist(), cutout, rng
        pixels = images[:10_000].reshape(-1, 3) / 255
        self.open = Image.fromarray
        self.transform = t.Compose(
            [
                t.RandomCrop(32, 4),
                t.RandomHorizontalFlip(),
                t.ToTensor(),
                t.Normalize(pixels.mean(0).tolist(), pixels.std(0).tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x: Tensor = self.transform(self.open(self.images[index]))
        if self.cutout:
            row, column, half = self.rng.randrange(32), self.rng.randrange(32), self.cutout // 2
            x[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
        return x, self.labels[index]


def usual_epoch(usual: Usual, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return one epoch in the usual way."""
    generator = torch.Generator().manual_seed(epoch)
    return DataLoader(usual, BATCH, shuffle=True, drop_last=True, num_workers=0, generator=generator)


def our_epoch(data: Data, cutout: int, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return one epoch of ours."""
    return data.train_batches(BATCH, seed=0, epoch=epoch, cutout=cutout, split="train+val")


def images_per_second(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return how many images an iterator gives in a second of processor time, its own start included."""
    start = time.process_time()
    count = sum(len(y) for _, y in batches)
    return count / (time.process_time() - start)


def main() -> None:
    """Measure, and write the figures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="npz file with x_train (N, 32, 32, 3) and y_train")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data:
        with np.load(arguments.data, allow_pickle=False) as file:
            images, labels = file["x_train"][:IMAGES], file["y_train"][:IMAGES]
    else:
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(IMAGES) % 10

    ours = from_arrays(images, labels)
    start = time.process_time()
    next(ours.train_batches(BATCH, seed=0, epoch=0))
    setup = time.process_time() - start
    streamed = from_arrays(images, labels)
    streamed.__dict__["_store"] = None
    variants: dict[str, Callable[[int], Iterable[tuple[Tensor, Tensor]]]] = {}
    for name, cutout in (("cutout", SIDE), ("plain", 0)):
        variants[f"usual_{name}"] = partial(usual_epoch, Usual(images, labels, cutout, Random(0)))
        for kind, data in (("ours", ours), ("unstored", streamed)):
            variants[f"{kind}_{name}"] = partial(our_epoch, data, cutout)

    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for epoch in range(arguments.repeats + 1):
        for name, batches in variants.items():
            speeds[name].append(images_per_second(batches(epoch)))
            print(f"turn {epoch}: {name} {speeds[name][-1]:,.0f} images/s", flush=True)
    kept = {name: values[1:] for name, values in speeds.items()}

    digits = load("digits")
    steps = [1e6 * 64 / images_per_second(digits.train_batches(64, seed=0, epoch=epoch)) for epoch in range(31)]
    figures = {
        "images_per_second": {name: round(median(values)) for name, values in kept.items()},
        "spread_images_per_second": {name: [round(min(values)), round(max(values))] for name, values in kept.items()},
        "ratio_to_usual": {
            f"{kind}_{name}": round(
                median(a / b for a, b in zip(kept[f"{kind}_{name}"], kept[f"usual_{name}"], strict=True)), 1
            )
            for kind in ("ours", "unstored")
            for name in ("cutout", "plain")
        },
        "setup_seconds": round(setup, 2),
        "store_megabytes": round(ours._store.numel() / 1e6) if ours._store is not None else 0,
        "digits_microseconds_per_step_of_64": round(median(steps[1:])),
    }
    record(
        __file__,
        figures,
        seeds=[0],
        images=IMAGES,
        batch=BATCH,
        cutout=SIDE,
        turns=arguments.repeats,
        pixels="CIFAR-10" if arguments.data else "random bytes",
        clock="processor time, medians of interleaved turns",
        reference=f"torchvision {version('torchvision')}, pillow {version('pillow')}",
    )


if __name__ == "__main__":
    main()
