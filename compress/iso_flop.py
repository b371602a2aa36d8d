"""Sparse-IFT: larger layers with masks in place of dense ones, at the same number of multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from compress.channel_changes import changed, possible_change
from compress.errors import CompressionError
from compress.larger_layers import doped, factorized, parallel, rank_of, reset
from compress.layer_macs import Example, Macs, assumed_input, macs
from compress.models import copy_of
from compress.norms import norms_behind
from compress.weights import Weight, prunable, weights
from search_spaces.arch import nearest
from search_spaces.channels import Group, analyse
from search_spaces.masks import attach
from search_spaces.memory import free_bytes
from search_spaces.tracing import GrowthError, Trace, copied, name_of, trace

KINDS = ("wide", "parallel", "factorized", "doped")
"""The members of the family."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sparse_ift(
    model: nn.Module,
    kind: str = "wide",
    sparsity: float = 0.75,
    *,
    example: Example | None = None,
    exclude: Sequence[str] = (),
    fan_in_by_density: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Return a network with larger layers of masked weights, and as many multiply-adds as the model has.

    For a layer of i inputs, o outputs and a kernel of p pixels, at sparsity s:

    - "wide": all channels inside the network are 1 / sqrt(1 - s) times as many.
    - "parallel": the sum of round(1 / (1 - s)) such layers, each with its own batch norm.
    - "factorized": a layer of the same kernel and stride to r channels, batch norm, ReLU, and a layer of kernel 1 to o,
      with r = ceil(p i o / ((p i + o)(1 - s))). There is a batch norm between where one comes behind the layer.
    - "doped": the layer itself plus two dense ones as before, nothing between them, r = floor(s p i o / (p i + o)).

    The sparsity sets the sizes. Masks are random, of one density in all layers, and the density is what meets the
    multiply-adds of the model on `example`, those of all that stays dense included; it is near 1 - s. Dense stay the
    convolution that is called first, the layer that is called last, depthwise convolutions, norms, and what cannot be
    followed, replaced or trained. Convolutions on shortcuts get masks but no branches in "parallel", and stay as they
    are in "factorized" and "doped". Grouped and transposed ones become larger in "wide" only.
    `compress.layer_macs.compare_macs` prints what became of every layer. Of vision transformers, "wide" may reach the
    hidden layers of the MLPs only, each on one side: their density is then near sqrt(1 - s).

    The result is to be trained from scratch, with `DynamicSparsity` best: layers that become larger start anew, as
    torch initialises them. What does not change keeps its numbers. Training needs more memory, as there are more
    activations and stored weights, and devices that know no sparse weights pay for the full size: 10 times the
    multiply-adds at s = 0.9.

    Args:
        model: any network that torch.fx can trace, without masks. It stays as it is.
        kind: one of `KINDS`.
        sparsity: the share of masked weights that sets the sizes, in [0, 1); at 0 the result is a copy of the model.
        example: a batch that the model takes; a tuple if it takes several inputs. Default: the first of an image of
            32 x 32, one of 224 x 224 and a vector that it takes. The multiply-adds match for inputs of this size, and
            nearly for others, where those of all layers change alike.
        exclude: names of layers, or of modules that hold layers, that get no mask. In "wide" they become wider still.
        fan_in_by_density: whether masked layers start as Kaiming normal, fan-in times the density, instead.
        seed: of masks and new weights.

    Returns:
        A network of the same class with masks in place, as `compress.prune` leaves them.

    Raises:
        CompressionError: the kind or an excluded name is unknown, the sparsity is not in [0, 1) or too small to change
            anything, the model has masks, cannot be traced, does not take the example, or has no layer to transform;
            what stays dense takes all multiply-adds already; there is not enough memory.

    Example:
        >>> from compress.layer_macs import compare_macs
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> net = net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8, 10))
        >>> wide = sparse_ift(net, kind="wide", sparsity=0.75, example=torch.zeros(1, 3, 16, 16))
        >>> print(compare_macs(net, wide, torch.zeros(1, 3, 16, 16)))
        layer  MACs before    after  ratio  weights before  kept after  density
        0           42,336   84,672  2.000             216         432   1.0000
        2           82,944   57,888  0.698             576         402   0.1745
        4           57,600   40,200  0.698             576         402   0.1745
        7               80      160  2.000              80         160   1.0000
        all        182,960  182,920  1.000           1,448       1,396   0.2685
        of one input: 1 x 3 x 16 x 16
        were masks not used: 647,008 MACs, 3.54 times before

    Source: Thangarasa et al., Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency, ICML
    2024, arXiv:2303.11525. There the density is 1 - s, searched for in "wide" only, and the released code masks the
    dense part of "doped", too, which leaves it far below the multiply-adds.
    """
    if kind not in KINDS:
        raise CompressionError(f"there is no kind {kind!r} of Sparse-IFT; {nearest(kind, KINDS)}")
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise CompressionError(f"the sparsity is a number from 0 up to, but not, 1, got {sparsity!r}.")
    allowed = prunable(model, exclude)
    if sparsity == 0:
        return copy_of(model)
    if kind == "parallel" and round(1 / (1 - sparsity)) < 2:
        raise CompressionError(f"a sparsity of {sparsity} makes 1 branch; two need 1/3 or more.")
    example = assumed_input(model) if example is None else example
    inputs = example if isinstance(example, tuple) else (example,)
    before = macs(model, inputs)
    _check_memory(model, sparsity)
    layers = _transformed(model, allowed, before)
    with _seeded(seed), _refusing(model):
        if kind == "wide":
            new = _wider(model, 1 / math.sqrt(1 - sparsity), inputs)
            found, old = weights(new), weights(model)
            masked = [name for name in layers if found[name].size > old[name].size]
        else:
            new, masked = _replaced(model, kind, sparsity, layers, inputs)
        if not masked:
            raise CompressionError(
                f"{type(model).__name__} has no layer to make larger: all are the first or the last, excluded, "
                "frozen, depthwise, or called in a way that cannot be followed."
            )
        _mask(new, masked, before.dense, macs(new, inputs), fan_in_by_density)
    return new


def _check_memory(model: nn.Module, sparsity: float) -> None:
    parameters = list(model.parameters())
    needed = sum(p.numel() * p.element_size() for p in parameters) / (1 - sparsity)
    free = free_bytes(parameters[0].device)
    if free is not None and needed > free:
        raise CompressionError(
            f"the weights of sparsity={sparsity} would take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free. "
            "Give a smaller one."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _refusing(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except GrowthError as error:
        raise CompressionError(f"{type(model).__name__} cannot be made larger: {error}") from error


def _transformed(model: nn.Module, allowed: Mapping[str, Weight], before: Macs) -> list[str]:
    """Return the layers that become larger, if they can: neither stem nor classifier, frozen nor depthwise."""
    called = [name for name, own in before.items() if own.dense]
    everything = weights(model)
    fixed = {called[-1]}
    if isinstance(everything[called[0]].module, nn.modules.conv._ConvNd):
        fixed.add(called[0])
    return [
        name
        for name in called
        if name in allowed
        and name not in fixed
        and allowed[name].parameter.requires_grad
        and not _is_depthwise(allowed[name].module)
    ]


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.in_channels


# Wide --------------------------------------------------------------------------------------------------------------


def _wider(model: nn.Module, factor: float, inputs: tuple[object, ...]) -> nn.Module:
    """Return a network whose channels are so many times as many, wherever that can be; what changes starts anew."""
    found = analyse(model, inputs)
    rows = {group: _rows(group, factor) for group in found.groups}
    rows = {group: own for group, own in rows.items() if len(own) > group.size}
    change, _ = possible_change(found, rows, inputs)
    new = changed(found, change)
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in change.maps):
        reset(new.get_submodule(name))
    return new


def _rows(group: Group, factor: float) -> list[int]:
    """Return all channels of a group, some of them again: equal shares of each cell, from all over it."""
    unit = math.gcd(*map(len, group.cells))
    more = round((factor - 1) * unit)
    copies = [
        cell[i * len(cell) // count % len(cell)] if count < len(cell) else cell[i % len(cell)]
        for cell in group.cells
        for count in [len(cell) // unit * more]
        for i in range(count)
    ]
    return [*range(group.size), *copies]


# Parallel, factorized, doped ---------------------------------------------------------------------------------------


def _replaced(
    model: nn.Module, kind: str, sparsity: float, layers: Sequence[str], inputs: tuple[object, ...]
) -> tuple[nn.Module, list[str]]:
    """Return a network with other modules for these layers, and the names of the weights to mask."""
    traces = trace(model, inputs)
    norms = norms_behind(traces)
    shortcuts = {str(node.target) for found in traces for node in _shortcuts(found)}
    new = copied(model)
    masked: list[str] = []
    for name in layers:
        layer = new.get_submodule(name) if name in norms else None
        if layer is None or type(layer) not in _LAYERS or getattr(layer, "groups", 1) > 1:
            continue
        if name in shortcuts:
            masked += [name] * (kind == "parallel")
            continue
        norm = new.get_submodule(norms[name]) if norms[name] else None
        larger, parts = _larger(kind, sparsity, layer, norm)
        if larger is None:
            continue
        _put(new, layer, larger.train(layer.training))
        if kind == "parallel" and norm is not None:
            _put(new, norm, nn.Identity().train(norm.training))
        masked += [f"{name}.{part}" for part in parts]
    return new, masked


def _larger(kind: str, sparsity: float, layer: nn.Module, norm: nn.Module | None) -> tuple[nn.Module | None, list[str]]:
    """Return what stands for a layer, and which of its parts get masks; ``None`` where a layer is too small."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if kind == "parallel":
        larger: nn.Module = parallel(layer, norm, round(1 / (1 - sparsity)))
    elif kind == "factorized":
        larger = factorized(layer, norm, math.ceil(rank_of(weight, 1 / (1 - sparsity))))
    else:
        rank = math.floor(rank_of(weight, sparsity))
        return (doped(layer, rank), ["sparse"]) if rank else (None, [])
    return larger, list(weights(larger))


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module where another is, by whatever names it is known."""
    for owner in list(model.modules()):
        for name in [name for name, child in owner._modules.items() if child is old]:
            setattr(owner, name, new)


def _shortcuts(found: Trace) -> Iterator[fx.Node]:
    """Yield the layers on shortcuts: alone between a tensor and a sum, where on the other side there are several."""
    for node in found.graph.nodes:
        sides = node.all_input_nodes
        if name_of(node) not in ("add", "iadd", "add_") or len(sides) != 2:
            continue
        for side, other in (sides, sides[::-1]):
            layers, start = _chain(found, side)
            # The tensor may itself be what a layer gives, and is not among the layers behind it.
            if len(layers) == 1 and sum(found.kinds[n] == "dense" for n in _between(start, other) - {start}) > 1:
                yield layers[0]


def _chain(found: Trace, node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """Return the layers on the way back to where it forks, and what is there."""
    layers = []
    while len(node.all_input_nodes) == 1 and len(node.users) == 1:
        if found.kinds[node] == "dense":
            layers.append(node)
        node = node.all_input_nodes[0]
    return layers, node


def _between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Return the operations on all ways from one to another, both included."""
    after, before = {start}, {end}
    for node in start.graph.nodes:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    for node in reversed(start.graph.nodes):
        if not before.isdisjoint(node.users):
            before.add(node)
    return after & before


# Masks -------------------------------------------------------------------------------------------------------------


def _mask(model: nn.Module, names: Sequence[str], budget: int, cost: Macs, fan_in_by_density: bool) -> None:
    """Attach random masks of the density at which the model has so many multiply-adds."""
    dense = sum(cost[name].dense for name in names)
    density = (budget - (cost.dense - dense)) / dense
    if density <= 0:
        raise CompressionError(
            f"what stays dense takes {cost.dense - dense:,} multiply-adds in the larger network, and the model has "
            f"{budget:,} in all. Give a smaller sparsity, or exclude less."
        )
    found, rest = weights(model), 0.0
    for name in sorted(names, key=lambda name: -cost[name].dense / cost[name].size):
        size, per_weight = cost[name].size, cost[name].dense / cost[name].size
        # Rounded up or down, whichever makes up for what was rounded before; layers of few pixels come last.
        ideal = density * size
        keep = max(1, min(math.ceil(ideal), max(math.floor(ideal), round(ideal + rest / per_weight))))
        rest += (ideal - keep) * per_weight
        weight = found[name]
        if fan_in_by_density:
            _kaiming(weight.parameter, keep / size)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.randperm(size, dtype=torch.int32)[:keep]] = True
        attach(weight.module, weight.attribute, mask.view(weight.shape))
        weight.module.train(weight.module.training)  # what attach adds, too
    if abs(rest) > 0.01 * budget:
        raise CompressionError(
            f"the layers are so small that masks can only meet {budget:,} multiply-adds up to {abs(rest):,.0f}. Give a "
            "smaller sparsity."
        )


def _kaiming(parameter: nn.Parameter, density: float) -> None:
    drawn = torch.empty(parameter.shape)
    nn.init.kaiming_normal_(drawn, nonlinearity="relu")
    with torch.no_grad():
        parameter.copy_(drawn / math.sqrt(density))
