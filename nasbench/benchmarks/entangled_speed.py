"""Entangled layers and supernets against running every candidate, and against the largest network alone.

    python -m nasbench.benchmarks.entangled_speed [--repeats 9]

The layer has kernels {3, 5, 7} and widths {16, 32, 64} of 64 channels in. *Naive*: nine convolutions, each with its
slice of the shared weight, weighted and added. *Loop*: the nine slices, padded, weighted and added to one weight, then
one convolution. *Ours*: the weight times two staircases, then one convolution. *Plain*: one convolution of the largest
size. Supernets are compared in the same way, block by block, in a weight step (forward, backward, SGD with momentum)
with a soft mixture. Variants take turns on random images, the first turn is dropped; times are processor times on one
thread. Memory: of a layer what is saved for the backward pass, of a supernet the most that is alive at once in a step,
beyond the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasbench.benchmarks.common import record
from nasbench.memory import alive_bytes
from nasbench.strategies import bilevel
from search_spaces import ConvMacro, Mixture, MobileNetV3, ViT
from search_spaces.base import SearchSpace, Supernet
from search_spaces.entangled import Axis, EntangledConv2d, KernelAxis, Span

KERNELS, WIDTHS = (3, 5, 7), (16, 32, 64)
SIZES = ((16, 16), (32, 16), (16, 32))  # images in a batch, side of an image
Step = Callable[[], object]


def turns(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of each step, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            before = time.process_time()
            step()
            if turn:
                times[name].append(1000 * (time.process_time() - before))
    return times


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Return how many times longer one step takes than another: the median over turns."""
    return round(median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 3)


# One layer -----------------------------------------------------------------------------------------------------------


class Layer:
    """The layer in all its variants: one weight, one mixture."""

    def __init__(self) -> None:
        self.conv = EntangledConv2d(64, WIDTHS[-1], KERNELS[-1])
        self.width, self.kernel = Axis(WIDTHS), KernelAxis(KERNELS)
        self.logits = [torch.randn(3, requires_grad=True) for _ in range(2)]

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the widths and of the kernels."""
        a, b = (row.softmax(0) for row in self.logits)
        return a, b

    def slice(self, width: int, kernel: int) -> Tensor:
        """The weight of one candidate."""
        rim = (KERNELS[-1] - kernel) // 2
        return self.conv.weight[:width, :, rim : rim + kernel, rim : rim + kernel]

    def naive(self, x: Tensor) -> Tensor:
        """Every candidate by itself."""
        a, b = self.weights()
        total = x.new_zeros(len(x), WIDTHS[-1], *x.shape[2:])
        for (i, width), (j, kernel) in product(enumerate(WIDTHS), enumerate(KERNELS)):
            y = F.conv2d(x, self.slice(width, kernel), padding=kernel // 2)
            total = total + a[i] * b[j] * F.pad(y, (0, 0, 0, 0, 0, WIDTHS[-1] - width))
        return total

    def looped_weight(self) -> Tensor:
        """The mixed weight, slice by slice."""
        a, b = self.weights()
        total = torch.zeros_like(self.conv.weight)
        for (i, width), (j, kernel) in product(enumerate(WIDTHS), enumerate(KERNELS)):
            rim = (KERNELS[-1] - kernel) // 2
            padded = F.pad(self.slice(width, kernel), (rim, rim, rim, rim, 0, 0, 0, WIDTHS[-1] - width))
            total = total + a[i] * b[j] * padded
        return total

    def our_weight(self) -> Tensor:
        """The mixed weight, by staircases."""
        a, b = self.weights()
        mixture = Mixture({"width": a, "kernel": b})
        return self.conv.mixed_weight(self.width(mixture, "width"), kernel=self.kernel(mixture, "kernel"))

    def loop(self, x: Tensor) -> Tensor:
        """One convolution with the looped weight."""
        return F.conv2d(x, self.looped_weight(), padding=KERNELS[-1] // 2)

    def ours(self, x: Tensor) -> Tensor:
        """One convolution with our weight."""
        return F.conv2d(x, self.our_weight(), padding=KERNELS[-1] // 2)

    def plain(self, x: Tensor) -> Tensor:
        """One convolution of the largest size."""
        return F.conv2d(x, self.conv.weight, padding=KERNELS[-1] // 2)


def saved_megabytes(forward: Callable[[], Tensor]) -> float:
    """Return what a forward leaves for its backward pass in distinct storages, its input and weights among them."""
    storages: dict[int, int] = {}
    held = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return round(sum(storages.values()) / 1e6, 3)


def of_a_layer(repeats: int) -> dict[str, Any]:
    """Compare the layer's variants."""
    torch.manual_seed(0)
    layer = Layer()
    forms = {"naive": layer.naive, "loop": layer.loop, "ours": layer.ours, "plain": layer.plain}
    found: dict[str, Any] = {}
    for batch, side in SIZES:
        x = torch.randn(batch, 64, side, side, requires_grad=True)
        target = torch.randn(batch, WIDTHS[-1], side, side)
        assert (layer.naive(x) - layer.ours(x)).abs().max() < 1e-4
        times = turns({name: partial(backward, form, x, target) for name, form in forms.items()}, repeats)
        saved = {name: saved_megabytes(partial(form, x)) for name, form in forms.items()}
        found[f"batch {batch}, {side}x{side}"] = {
            "naive_over_ours": ratio(times, "naive", "ours"),
            "naive_over_loop": ratio(times, "naive", "loop"),
            "ours_over_plain": ratio(times, "ours", "plain"),
            "saved_ours_over_plain": round(saved["ours"] / saved["plain"], 3),
            "milliseconds": {name: round(median(own), 2) for name, own in times.items()},
            "saved_megabytes": saved,
        }
    inputs = [layer.conv.weight, *layer.logits]
    gradient = torch.randn_like(layer.conv.weight)
    building = turns(
        {
            "loop": lambda: torch.autograd.grad(layer.looped_weight(), inputs, gradient),
            "ours": lambda: torch.autograd.grad(layer.our_weight(), inputs, gradient),
        },
        20 * repeats,
    )
    found["building the weight"] = {
        "loop_over_ours": ratio(building, "loop", "ours"),
        "milliseconds": {name: round(median(own), 3) for name, own in building.items()},
    }
    return found


def backward(form: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> None:
    """Go forward and backward."""
    (form(x) * target).sum().backward()


# Whole supernets -----------------------------------------------------------------------------------------------------


def candidates(span: Span) -> list[tuple[Tensor, Span]]:
    """Return every option of a span by itself, with its weight in the mixture."""
    found = []
    for i, size in enumerate(span.sizes):
        stairs, rim = span.stairs[i : i + 1], (span.size - size) // 2
        square = stairs.dim() == 3
        stairs = stairs[:, rim : rim + size, rim : rim + size] if square else stairs[:, :size]
        found.append((span.weights[i], Span((size,), torch.ones(1), stairs, slice(i, i + 1))))
    return found


def naive_layer(layer: nn.Module, x: Tensor, width: Span, inputs: Span | None, kernel: Span) -> Tensor:
    """A layer of `ConvMacro`, every kernel and width by itself."""
    total: Tensor | None = None
    for (a, out), (b, size) in product(candidates(width), candidates(kernel)):
        y = layer(x, out, None if inputs is None else inputs.plain, size)
        y = a * b * F.pad(y, (0, 0, 0, 0, 0, width.size - out.size))
        total = y if total is None else total + y
    assert total is not None
    return total


def naive_residual(block: nn.Module, x: Tensor, kernel: Span, hidden: Span) -> Tensor:
    """A block of `MobileNetV3`, every kernel and expansion by itself."""
    pairs = product(candidates(kernel), candidates(hidden))
    return torch.stack([a * b * block(x, size, count) for (a, size), (b, count) in pairs]).sum(0)


def naive_transformer(block: nn.Module, x: Tensor, width: Span, heads: Span, ratio: Span) -> Tensor:
    """A block of `ViT`, every width, number of heads and MLP ratio by itself."""
    total: Tensor | None = None
    for (a, size), (b, count), (c, hidden) in product(*map(candidates, (width, heads, ratio))):
        y = a * b * c * F.pad(block(x[..., : size.size], size, count, hidden), (0, width.size - size.size))
        total = y if total is None else total + y
    assert total is not None
    return total


SUPERNETS: dict[str, tuple[SearchSpace, Callable[..., Tensor], int]] = {  # name -> space, naive block, batch
    "ConvMacro": (ConvMacro(classes=10, in_channels=3), naive_layer, 64),
    "MobileNetV3": (MobileNetV3(stem="cifar", classes=10, in_channels=3), naive_residual, 32),
    "ViT": (ViT(classes=10, in_channels=3, image_size=32), naive_transformer, 32),
}


class Alone(nn.Module):
    """A network by itself, called like a supernet."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Return the logits; the mixture is not looked at."""
        logits: Tensor = self.network(x)
        return logits


def of_supernets(repeats: int) -> dict[str, Any]:
    """Compare weight steps and their memory."""
    found: dict[str, Any] = {}
    for name, (space, naive, batch) in SUPERNETS.items():
        torch.manual_seed(0)
        ours = space.supernet()
        variants: dict[str, nn.Module] = {
            "naive": copy.deepcopy(ours),
            "ours": ours,
            "largest": Alone(space.build(space.at(space.size - 1))),
        }
        setattr(variants["naive"], "inside", naive)  # noqa: B010 - in place of its method
        mixture = Mixture({site: torch.randn(len(options)).softmax(0) for site, options in space.sites.items()})
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        steps, memory = {}, {}
        for variant, network in variants.items():
            network.train().to(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
            images = x.contiguous(memory_format=torch.channels_last)
            steps[variant] = partial(weight_step, network, mixture, (images, y), optimizer)
            gradients = partial(weight_gradients, network, mixture)
            memory[variant] = max(alive_bytes(network, gradients, (3, 32, 32), batch))
        times = turns(steps, repeats)
        found[name] = {
            "space": space.to_json(),
            "batch": batch,
            "naive_over_ours": ratio(times, "naive", "ours"),
            "ours_over_largest": ratio(times, "ours", "largest"),
            "memory_naive_over_ours": round(memory["naive"] / memory["ours"], 3),
            "memory_ours_over_largest": round(memory["ours"] / memory["largest"], 3),
            "milliseconds": {variant: round(median(own), 1) for variant, own in times.items()},
            "megabytes": {variant: round(size / 1e6, 1) for variant, size in memory.items()},
        }
        print(name, found[name], flush=True)
    return found


def weight_gradients(network: nn.Module, mixture: Mixture, x: Tensor, y: Tensor) -> None:
    """Go forward and backward."""
    bilevel.weight_gradients(cast("Supernet", network), mixture, (x, y))


def weight_step(
    network: nn.Module, mixture: Mixture, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Change the weights on a batch."""
    weight_gradients(network, mixture, *batch)
    optimizer.step()


def main() -> None:
    """Compare, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="turns that count for a layer")
    parser.add_argument("--supernet-repeats", type=int, default=5, help="turns that count for a supernet")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"layer": of_a_layer(options.repeats), "supernets": of_supernets(options.supernet_repeats)}
    record(
        __file__, figures, repeats=options.repeats, supernet_repeats=options.supernet_repeats, clock="processor time"
    )


if __name__ == "__main__":
    main()
