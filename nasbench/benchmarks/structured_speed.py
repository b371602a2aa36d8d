"""What channel pruning gains where nothing but dense layers is used: size, multiply-adds and time of smaller networks.

    python -m nasbench.benchmarks.structured_speed [--repeats 15]

The CIFAR ResNet-18 (3x3 first convolution, no max pooling) in evaluation on random 32x32 images, whole, and with half
and a quarter of the channels of every group, in both memory formats, one thread. Variants take turns in one process;
milliseconds are medians of process time, speed-ups medians of each turn's ratio to the whole network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.structured import prune_channels
from nasbench.benchmarks.common import record

SHARES = {"dense": 1.0, "half": 0.5, "quarter": 0.25}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WARM_UP = 2


def main() -> None:
    """Time every variant, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="turns that count")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    image = torch.zeros(1, 3, 32, 32)
    whole = network()
    models = {name: prune_channels(whole, share, example=image) for name, share in SHARES.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    macs = {name: multiply_adds(model, image) for name, model in models.items()}
    figures: dict[str, Any] = {
        "parameters": sizes,
        "parameters_to_dense": {name: round(size / sizes["dense"], 4) for name, size in sizes.items()},
        "macs": macs,
        "macs_to_dense": {name: round(own / macs["dense"], 4) for name, own in macs.items()},
    }
    for batch in options.batches:
        figures[f"batch_{batch}"] = {key: timed(models, batch, key, options.repeats) for key in FORMATS}
    record(__file__, figures, repeats=options.repeats, clock="process time", pixels="random")


def network() -> nn.Module:
    """Return the ResNet-18 for 32x32 images, in evaluation."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model.eval()  # type: ignore[no-any-return]


def multiply_adds(model: nn.Module, image: torch.Tensor) -> int:
    """Return those of one image."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return int(counter.get_total_flops()) // 2


def timed(models: Mapping[str, nn.Module], batch: int, memory: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a batch, and how many times faster the variants are than the first."""
    layout: Any = {"memory_format": FORMATS[memory]}
    x = torch.randn(batch, 3, 32, 32).contiguous(**layout)
    with torch.inference_mode():
        times = in_turns({name: partial(model.to(**layout), x) for name, model in models.items()}, repeats)
    first = next(iter(times.values()))
    return {
        "milliseconds": {name: round(1e3 * median(own), 2) for name, own in times.items()},
        "speed_up": {
            name: round(median(a / b for a, b in zip(first, own, strict=True)), 2) for name, own in times.items()
        },
    }


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the process seconds of each, taken in turns, forth and back."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + WARM_UP):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            started = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - started)
    return {name: own[WARM_UP:] for name, own in times.items()}


if __name__ == "__main__":
    main()
