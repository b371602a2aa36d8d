"""What masks cost while training: a masked step, a RigL update and bytes, against the dense step of the same network.

    python -m nasbench.benchmarks.masked_speed [--repeats 11]

A CIFAR ResNet-20 in batches of 128 and a CIFAR ResNet-18 (11 million weights) in batches of 128 and 8, 90 % sparse
(ERK), with SGD and momentum on random images, one thread. Variants take turns in one process; figures are medians of
process time, and ratios are medians of each turn's ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import compress
from nasbench.benchmarks.common import record
from search_spaces import ResNet

CASES = (("ResNet-20", 128), ("ResNet-18", 128), ("ResNet-18", 8))


def main() -> None:
    """Time every case, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--density", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {f"{name}, batch {batch}": case(name, batch, options) for name, batch in CASES}
    record(__file__, figures, repeats=options.repeats, density=options.density)


def case(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of the variants, ratios to dense, and bytes of the masks."""
    dense = network(name)
    masked = compress.prune(dense, options.density, distribution="erk")
    moving = compress.prune(dense, options.density, distribution="erk")
    x, y = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (batch,))
    sgd = torch.optim.SGD(moving.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    # Every step is one of change: what it takes more than a masked step is the update with its dense gradient.
    rigl = compress.DynamicSparsity(moving, sgd, "rigl", steps=10**6, interval=1)
    steps = {"dense": trainer(dense, x, y), "masked": trainer(masked, x, y), "updating": trainer(moving, x, y, sgd)}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in range(options.repeats + 2):
        order = list(steps) if turn % 2 else list(reversed(steps))
        for variant in order:
            started = time.process_time()
            steps[variant]()
            times[variant].append(time.process_time() - started)
    times = {variant: own[2:] for variant, own in times.items()}
    assert rigl.updates >= options.repeats
    weights = sum(mask.numel() for mask in compress.masks(masked).values())
    return {
        "milliseconds": {variant: round(1e3 * median(own), 1) for variant, own in times.items()},
        "masked_to_dense": ratio(times["masked"], times["dense"]),
        "update_to_dense": round(
            median((u - m) / d for u, m, d in zip(times["updating"], times["masked"], times["dense"], strict=True)), 3
        ),
        "weights": weights,
        "mask_bytes_per_weight": sum(mask.nbytes for mask in compress.masks(masked).values()) / weights,
    }


def ratio(own: list[float], other: list[float]) -> float:
    """Return the median of the turns' ratios."""
    return round(median(a / b for a, b in zip(own, other, strict=True)), 3)


def trainer(model: nn.Module, x: torch.Tensor, y: torch.Tensor, sgd: Any = None) -> Callable[[], None]:
    """Return a function that makes one step."""
    sgd = sgd or torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        sgd.zero_grad()
        cross_entropy(model(x), y).backward()
        sgd.step()

    return step


def network(name: str) -> nn.Module:
    """Return the network with weights of its own, in channels_last."""
    torch.manual_seed(0)
    if name == "ResNet-20":
        space = ResNet(depths=(3,), classes=10, in_channels=3)
        model = space.build(space.at(5))  # 16, 32, 64 channels
    else:
        from torchvision.models import resnet18

        model = resnet18(num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last).train()


if __name__ == "__main__":
    main()
