"""Where a new layer goes in a network, and what a layer allows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm

from search_spaces.certificates import Padding
from search_spaces.channels import Channels
from search_spaces.tracing import GrowthError, Layer, Trace, kind_of

_MODULES: dict[Any, type[nn.Module]] = {  # activations that are called as functions or methods, as modules
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((F.relu6,), nn.ReLU6),
    **dict.fromkeys((F.gelu,), nn.GELU),
    **dict.fromkeys((F.silu,), nn.SiLU),
    **dict.fromkeys((F.hardswish,), nn.Hardswish),
}


@dataclass(frozen=True)
class Site:
    """Where a new layer goes.

    Attributes:
        module: it goes behind this module.
        norm: name of the layer's batch norm.
        activation: a module of what follows the layer.
        identity: whether the new layer is the identity; else it is a residual branch.
        outside: whether the activation is not in the module but follows it.
        reason: why it is no identity.
    """

    module: str
    norm: str | None
    activation: nn.Module | None
    identity: bool
    outside: bool
    reason: str


def new_site(found: Channels, name: str) -> Site:
    """Return where a new layer goes, the same in evaluation and in training."""
    layer = found.layer(name)
    check_layer(found, layer)
    sites = []
    for traced in found.traces:
        nodes = [node for node, own in traced.layers.items() if own is not None and own.name == name]
        if not nodes and not traced.training:
            raise GrowthError("it is not called in evaluation, where statistics are measured.")
        sites += [_site_in(found, traced, node) for node in nodes]
    site = sites[0]
    if any((other.module, other.norm, other.identity) != (site.module, site.norm, site.identity) for other in sites):
        return Site(name, None, None, False, False, "evaluation and training go on differently behind it")
    return site


def _site_in(found: Channels, traced: Trace, node: fx.Node) -> Site:
    modules = dict(found.model.named_modules(remove_duplicate=False))
    uses = [id(modules[str(other.target)]) for other in traced.graph.nodes if other.op == "call_module"]

    def single(node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if nobody else does."""
        module = modules[str(node.target)] if node.op == "call_module" else None
        return module if module is not None and uses.count(id(module)) == 1 else None

    def follower(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    end, norm, layer = node, None, traced.layers[node]
    after = follower(node)
    module = single(after) if after is not None else None
    normed = isinstance(module, _BatchNorm) and module.track_running_stats and kind_of(module) == "norm"
    if (
        after is not None and normed and layer is not None and layer.axis == 1
    ):  # otherwise it normalises another dimension
        end, norm, after = after, str(after.target), follower(after)
    if after is not None and (known := _activation(after, modules)) is not None:
        outside = single(after) is None
        place = str((end if outside else after).target)
        identity = isinstance(known, nn.ReLU | nn.Hardtanh)  # of which ReLU6 is one
        reason = "" if identity else f"{type(known).__name__} is no ReLU, ReLU6 or Hardtanh"
        return Site(place, norm, known, identity, outside, reason)
    return Site(str(end.target), norm, None, False, True, "no activation follows it alone")


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return a fresh module that does what an activation does, ``None`` if it is none that we know."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = kind_of(module) == "each" and type(module).__module__ == activation.__name__
        return copy.deepcopy(module) if plain and not isinstance(module, nn.RReLU) else None
    make = _MODULES.get(node.target)
    return make() if make is not None else None


def new_kernel(layer: nn.Module, kernel: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the kernel size of a new layer."""
    if isinstance(layer, nn.Linear):
        if kernel is not None:
            raise GrowthError(f"it is a linear layer, which has no kernel; leave kernel={kernel!r} out.")
        return ()
    own: tuple[int, ...] = layer.kernel_size  # type: ignore[assignment]
    if kernel is None:
        return own if all(size % 2 for size in own) else (3,) * len(own)
    sizes = tuple(kernel) if isinstance(kernel, Sequence) else (kernel,) * len(own)
    if len(sizes) != len(own) or any(type(size) is not int or size < 1 or size % 2 == 0 for size in sizes):
        raise GrowthError(f"kernel={kernel!r} is no odd size, or {len(own)} of them; an identity needs a centre.")
    return sizes


def check_layer(found: Channels, layer: Layer) -> None:
    """Refuse layers that cannot be replaced."""
    if layer.is_function:
        raise GrowthError(
            f"it is a weight that is given to {layer.kind}(): only layers that are modules can be replaced."
        )
    for tensor in layer.tensors.values():
        found.check(tensor, found.calls(tensor))


def kernel_grown(conv: nn.Module, kernel: int | Sequence[int]) -> tuple[nn.Module, Padding]:
    """Return a copy of a convolution with a larger kernel and more padding, and the zeros around the kernel.

    Raises:
        GrowthError: it is no convolution, or the kernel is not larger by even numbers.
    """
    if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise GrowthError(f"it is a {type(conv).__name__}: only convolutions grow, and not transposed ones.")
    own = conv.kernel_size
    sizes = tuple(kernel) if isinstance(kernel, Sequence) else (kernel,) * len(own)
    if len(sizes) != len(own) or any(type(size) is not int for size in sizes):
        raise GrowthError(f"its kernel has {len(own)} sizes; give one whole number, or {len(own)}.")
    more = [size - old for size, old in zip(sizes, own, strict=True)]
    if min(more) < 0 or max(more) == 0 or any(size % 2 for size in more):
        raise GrowthError(f"it has {own}; give a size that is larger by an even number, so that it keeps its centre.")
    padding = Padding(tuple(size // 2 for size in reversed(more) for _ in range(2)))
    new = copy.deepcopy(conv)
    new.weight = nn.Parameter(padding.values(conv.weight.detach()))
    new.kernel_size = sizes
    if isinstance(conv.padding, str) and conv.padding == "same":  # torch computes how much that is
        widths = [dilation * (size - 1) for dilation, size in zip(conv.dilation, sizes, strict=True)]
        sides = [side for width in reversed(widths) for side in (width // 2, width - width // 2)]
    else:
        old = (0,) * len(own) if isinstance(conv.padding, str) else conv.padding
        rings = zip(old, conv.dilation, more, strict=True)
        new.padding = tuple(width + dilation * size // 2 for width, dilation, size in rings)
        sides = [width for width in reversed(new.padding) for _ in range(2)]
    new._reversed_padding_repeated_twice = sides  # what padding modes other than zeros use
    return new, padding
