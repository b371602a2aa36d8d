"""Every convolution of twelve networks widened and deepened: exactly, or refused with the reason; and its time.

    python -m nasbench.benchmarks.net2net_table [--models resnet18 ...] [--repeats 9]

Networks of torchvision without trained weights, with random statistics and weights in their batch norms (with those
that they are made with, forgetting to carry them over would not be noticed), on random 64x64 images. Every convolution
of the traced graph is widened by about a half, or if that cannot be exact doubled; and deepened. Errors are the largest
difference of outputs in evaluation, and that relative to the largest output. Times: widening a layer
of a ResNet-50 against a deep copy of it and a traced forward pass (torch.fx.symbolic_trace, then one batch), in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasbench.benchmarks.common import in_processes, record
from search_spaces.channels import analyse
from search_spaces.net2net import GrowthError, deepen, widen

MODELS = (
    *("resnet18", "resnet50", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2", "mobilenet_v3_small"),
    *("shufflenet_v2_x1_0", "efficientnet_b0", "squeezenet1_1", "regnet_y_400mf", "convnext_tiny"),
)


def network(name: str, seed: int = 0) -> nn.Module:
    """Return a network of torchvision in evaluation mode, with random batch norms and 10 classes."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        more = {"init_weights": False} if name == "googlenet" else {}
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10, **more)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        for weight, parameter in model.named_parameters():
            if weight.endswith("layer_scale"):  # of ConvNeXt: at its 1e-6, errors would be as small
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def convolutions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Return the convolutions that a model calls in evaluation, with their numbers of channels."""
    (evaluation, *_) = analyse(model, example).traces
    layers = [layer for layer in evaluation.layers.values() if layer is not None and len(layer.shape) == 4]
    return {layer.name: layer.outputs for layer in layers}


def wider(model: nn.Module, name: str, channels: int, example: Tensor) -> nn.Module:
    """Return the model with a layer widened by about a half, else doubled."""
    try:
        return widen(model, name, channels + channels // 16 * 8 + (channels < 16), example=example)
    except GrowthError as error:
        if "multiples of" not in str(error):
            raise
        return widen(model, name, 2 * channels, example=example)


def errors(model: nn.Module, grown: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the largest difference, and the same relative to the largest output."""
    with torch.no_grad():
        before, after = model(x), grown(x)
    difference = float((before - after).abs().max())
    return difference, difference / float(before.abs().max())


def check(name: str) -> dict[str, Any]:
    """Return what became of every convolution of a network."""
    single = network(name)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = convolutions(single, x)
    row: dict[str, Any] = {"convolutions": len(found)}
    actions: dict[str, Callable[[nn.Module, str, Tensor], nn.Module]] = {
        "widened": lambda model, layer, x: wider(model, layer, found[layer], x),
        "deepened": lambda model, layer, x: deepen(model, layer, example=x),
    }
    for action, grow in actions.items():
        refused: Counter[str] = Counter()
        worst = {"float64": 0.0, "float64_relative": 0.0, "float32_relative": 0.0}
        for layer in found:
            for model, images, which in (
                (copy.deepcopy(single).double(), x.double(), "float64"),
                (single, x, "float32"),
            ):
                try:
                    grown = grow(model, layer, images)
                except GrowthError as error:
                    if which == "float64":
                        refused[str(error).partition(": ")[2]] += 1
                    continue
                absolute, relative = errors(model, grown, images)
                worst[f"{which}_relative"] = max(worst[f"{which}_relative"], relative)
                if which == "float64":
                    worst[which] = max(worst[which], absolute)
        row[action] = len(found) - sum(refused.values())
        row[f"{action}_refused"] = dict(refused)
        row[f"{action}_error"] = {which: float(f"{value:.1e}") for which, value in worst.items()}
    return row


def milliseconds(repeats: int) -> dict[str, Any]:
    """Return the times of widening a layer of a ResNet-50, and of a deep copy and a traced forward."""
    model = network("resnet50")
    x = torch.randn(2, 3, 64, 64)

    def plain() -> None:
        copy.deepcopy(model)
        with torch.no_grad():
            fx.symbolic_trace(model)(x)

    steps: dict[str, Callable[[], object]] = {
        "copy_and_traced_forward": plain,
        "widen": lambda: widen(model, "layer2.1.conv1", 192, example=x),
        "widen_tied": lambda: widen(model, "layer3.0.conv3", 1280, example=x),
        "deepen": lambda: deepen(model, "layer2.1.conv1", example=x),
    }
    times: dict[str, list[float]] = {step: [] for step in steps}
    for turn in range(repeats + 1):
        for step, run in steps.items():
            before = time.process_time()
            run()
            if turn:
                times[step].append(1000 * (time.process_time() - before))
    base = times["copy_and_traced_forward"]
    return {
        "milliseconds": {step: round(median(values)) for step, values in times.items()},
        "ratio": {
            step: round(median(a / b for a, b in zip(values, base, strict=True)), 2) for step, values in times.items()
        },
    }


def main() -> None:
    """Measure, and write the table beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        Path(options.child[1]).write_text(json.dumps(check(options.child[0])))
        return
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"resnet50": milliseconds(options.repeats)}  # alone on the machine, before the table
    table = {job[0]: row for job, row in in_processes(__file__, [(name,) for name in options.models])}
    figures["table"] = {name: table[name] for name in options.models}
    record(
        __file__,
        figures,
        seeds=[0],
        image=[3, 64, 64],
        batch=2,
        turns=options.repeats,
        clock="processor time, medians of interleaved turns",
        versions_torchvision=version("torchvision"),
        pixels="random",
    )


if __name__ == "__main__":
    main()
