"""Layers that growth puts into a network: they start as what was there, and can become more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from search_spaces.tracing import GrowthError

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Residual(nn.Module):
    """x + gamma * body(x), with one gamma per channel that starts at zero: at first the input, in both modes.

    Args:
        body: what is added; it keeps the shape.
        channels: of the input.
        dimensions: how many dimensions follow the channels: 2 for images, 0 where channels come last.

    Example:
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(Residual(nn.Conv2d(3, 3, 1), 3, 2)(x), x)
        True

    Source: a branch that starts at zero is that of Bachlechner et al., ReZero is All You Need, UAI 2021,
    arXiv:2003.04887, with one weight per channel instead of one per layer.
    """

    def __init__(self, body: nn.Module, channels: int, dimensions: int, **factory: Any) -> None:
        super().__init__()
        self.body = body
        self.gamma = nn.Parameter(torch.zeros(channels, *[1] * dimensions, **factory))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + self.gamma * y


class Branches(nn.Module):
    """The sum of several layers of the same input, each times one weight per channel.

    Args:
        layers: what is summed; all give the same shape.
        weights: what each is multiplied by at first.
        channels: of the output.
        dimensions: how many dimensions follow the channels: 2 for images, 0 where channels come last.

    Example:
        >>> Branches([nn.Identity(), nn.ReLU()], [0.5, 0.5], 3, 0)(torch.tensor([[-1.0, 0.0, 1.0]]))
        tensor([[-0.5000,  0.0000,  1.0000]], grad_fn=<AddBackward0>)

    Source: Cai et al., Path-Level Network Transformation for Efficient Architecture Search, ICML 2018,
    arXiv:1806.02639, section 3.1. Weights are learned here; there they stay what they are.
    """

    def __init__(
        self, layers: Iterable[nn.Module], weights: Sequence[float], channels: int, dimensions: int, **factory: Any
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        sides = [1] * dimensions
        self.weights = nn.ParameterList(torch.full((channels, *sides), weight, **factory) for weight in weights)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for weight, layer in zip(self.weights, self.layers):  # noqa: B905 - torch.jit.script knows no strict=
            total = total + weight * layer(x)
        return total


def layer_like(layer: nn.Module, channels: int, kernel: Sequence[int], bias: bool) -> nn.Module:
    """Return a layer without values from as many channels to as many, of the same kind, groups, device and dtype."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        linear: nn.Module = skip_init(nn.Linear, channels, channels, bias=bias, **place)
        return linear
    padding = tuple(size // 2 for size in kernel)
    settings = {"padding": padding, "groups": layer.groups, "bias": bias, **place}
    conv: nn.Module = skip_init(_CONVS[weight.ndim - 2], channels, channels, tuple(kernel), **settings)
    return conv


def norm_like(norm: nn.Module, channels: int) -> nn.Module:
    """Return a fresh batch norm of the same kind, with weight and bias."""
    buffer = norm.running_mean
    assert isinstance(buffer, Tensor)
    new = type(norm)(channels, eps=norm.eps, momentum=norm.momentum, device=buffer.device, dtype=buffer.dtype)
    assert isinstance(new, nn.Module)
    return new


def to_identity(layer: nn.Module) -> None:
    """Set a layer as `layer_like` makes it to return its input."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.ndim == 2:
        nn.init.eye_(weight)
    else:
        groups = layer.groups
        assert isinstance(groups, int)
        nn.init.dirac_(weight, groups)
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)


def set_randomly(layer: nn.Module, generator: torch.Generator) -> None:
    """Set the weight of a layer as He et al., 2015, and its bias to zero, with the same numbers on every device."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    drawn = torch.empty(weight.shape, dtype=torch.float64)
    nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
    with torch.no_grad():
        weight.copy_(drawn)
    if isinstance(layer.bias, Tensor):
        nn.init.zeros_(layer.bias)


def set_statistics(norm: nn.Module, x: Tensor) -> None:
    """Set a batch norm to return its input, with the statistics of an input (B, C, ...).

    With the default statistics, 0 and 1, it would do so in evaluation only: in training, batch norm takes those of the
    batch.

    Raises:
        GrowthError: the input, or its statistics in the norm's precision, are not finite.
    """
    if not x.numel():
        raise GrowthError("the example is empty, and its new batch norm needs statistics. Give a batch of real data.")
    with torch.no_grad():
        dims = [dim for dim in range(x.ndim) if dim != 1]
        variance, mean = torch.var_mean(x.double(), dims, correction=0)
        eps = norm.eps
        assert isinstance(eps, float)
        variance[variance + eps == 0] = 1.0  # of a constant channel, where nothing may divide by zero
        tensors = {name: getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias")}
        tensors["running_mean"].copy_(mean)
        tensors["running_var"].copy_(variance)
        tensors["weight"].copy_((tensors["running_var"].double() + eps).sqrt())
        tensors["bias"].copy_(tensors["running_mean"])
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise GrowthError("what its new batch norm reads for the example is not finite. Give a batch of real data.")


def check_noise(noise: float) -> None:
    """Refuse what is no standard deviation.

    Raises:
        GrowthError: it is none.
    """
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise GrowthError(f"noise={noise!r} is no standard deviation; give a number, at least 0.")


def add_noise(weight: Tensor, noise: float, generator: torch.Generator, only: Tensor | None = None) -> None:
    """Add noise of a standard deviation in those of the weight, in place; only to some filters if they are given."""
    if noise:
        with torch.no_grad():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
            drawn *= noise * (weight.std() if weight.numel() > 1 else weight.abs())  # a single number has no deviation
            weight += drawn if only is None else drawn * only.to(weight)
