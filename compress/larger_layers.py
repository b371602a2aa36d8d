"""What stands for a dense layer in Sparse-IFT: more or larger layers, of which most weights are masked later."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.inserted import norm_like

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Parallel(nn.Module):
    """The sum of several layers of the same input.

    Example:
        >>> Parallel([nn.Identity(), nn.ReLU()])(torch.tensor([-1.0, 1.0]))
        tensor([-1.,  2.])
    """

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total: Tensor = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class Doped(nn.Module):
    """A layer plus a product of two small ones, with nothing between these.

    Args:
        sparse: the layer that gets the mask.
        low_rank: the two layers; they stay dense.

    Example:
        >>> low_rank = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
        >>> Doped(nn.Linear(4, 4), low_rank)(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, sparse: nn.Module, low_rank: nn.Module) -> None:
        super().__init__()
        self.sparse = sparse
        self.low_rank = low_rank

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.sparse(x) + self.low_rank(x)
        return total


def parallel(layer: nn.Module, norm: nn.Module | None, branches: int) -> Parallel:
    """Return as many fresh layers of this kind, each with a norm of its own if there is one, else one bias for all."""
    parts: list[nn.Module] = []
    for i in range(branches):
        part = fresh_copy(layer)
        if norm is not None:
            part = nn.Sequential(OrderedDict(layer=part, norm=fresh_copy(norm)))
        elif i:
            part.register_parameter("bias", None)
        parts.append(part)
    return Parallel(parts)


def factorized(layer: nn.Module, norm: nn.Module | None, rank: int) -> nn.Sequential:
    """Return the layer with as many outputs, a norm if it had one, ReLU, and a layer of 1 pixel back."""
    first, second = low_rank(layer, rank, bias=layer.bias is not None)
    parts: OrderedDict[str, nn.Module] = OrderedDict(first=first)
    if norm is not None:
        parts["norm"] = norm_like(norm, rank)
    parts |= {"relu": nn.ReLU(), "second": second}
    return nn.Sequential(parts)


def doped(layer: nn.Module, rank: int) -> Doped:
    """Return a fresh layer of this kind beside a product of this rank."""
    return Doped(fresh_copy(layer), nn.Sequential(*low_rank(layer, rank, bias=False)))


def low_rank(layer: nn.Module, rank: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    """Return two fresh layers: one as the layer (kernel, stride) with as many outputs, and one of 1 pixel back."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    inputs, outputs = weight.shape[1], weight.shape[0]
    pair: list[nn.Module]
    if isinstance(layer, nn.Linear):
        pair = [nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)]
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        settings: dict[str, Any] = {name: getattr(layer, name) for name in names}
        conv = _CONVS[weight.ndim - 2]
        pair = [conv(inputs, rank, bias=False, **settings), conv(rank, outputs, 1, bias=bias)]
    first, second = (part.to(weight.device, weight.dtype) for part in pair)
    return first, second


def rank_of(weight: Tensor, share: float) -> float:
    """Return the rank at which two factors have so many times the weights of a layer.

    Example:
        >>> rank_of(torch.zeros(64, 64, 3, 3), 2.0)  # 2 * 9 * 64 * 64 / (9 * 64 + 64)
        115.2
    """
    outputs, inputs = weight.shape[0], math.prod(weight.shape[1:])
    return round(share * outputs * inputs / (outputs + inputs), 6)  # 1 / (1 - 0.9) is a little more than 10


def fresh_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module, initialised anew."""
    new = copy.deepcopy(module)
    reset(new)
    return new


def reset(module: nn.Module) -> None:
    """Initialise a module anew as torch does, with the same numbers on every device; those without a way stay."""
    start = getattr(module, "reset_parameters", None)
    if start is None:
        return
    tensor = next(iter((*module.parameters(recurse=False), *module.buffers(recurse=False))), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    module.cpu()
    start()
    module.to(device)
