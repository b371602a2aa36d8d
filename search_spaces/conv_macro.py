"""The convolutional macro space of TangleNAS: four convolutions, each with a kernel size and a width."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, Choices, Mixture, SearchSpace
from search_spaces.entangled import (
    Axis,
    EntangledConvBN,
    EntangledLinear,
    EntangledSupernet,
    KernelAxis,
    Span,
    check_kernels,
)
from search_spaces.operations import ConvBN

LAYERS = 4


@dataclass(frozen=True)
class ConvMacro(SearchSpace):
    """Kernel size and width of four convolutions: 6,561 architectures by default.

    Each layer is a convolution, batch norm and ReLU; the first three are followed by a 2x2 max pool. Then mean over the
    image and a linear layer. Layer l has `kernel{l}` and `width{l}`, whose options are `widths` times 2^l. The last
    layer sees an eighth of an image's side: of 8x8 one pixel, on which all kernels are the same.

    Args:
        kernels: options of kernel sizes: odd, ascending.
        widths: options of channels of the first layer, ascending; they double at every layer.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.

    Raises:
        ArchError: a setting is no positive integer; options are missing, repeated or do not ascend; a kernel is even.

    Example:
        >>> import torch
        >>> space = ConvMacro(widths=(4, 8), classes=10, in_channels=1)
        >>> space.size
        1296
        >>> arch = space.at(0)
        >>> arch
        Arch(kernel0=3, kernel1=3, kernel2=3, kernel3=3, width0=4, width1=8, width2=16, width3=32)
        >>> space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source: the convolutional toy space of Sukthanker et al., Weight-Entanglement Meets Gradient-Based Neural
    Architecture Search, 2023, arXiv:2312.10440. The choices are theirs, the network is not: theirs has no batch norm,
    two pools, dropout, a fifth convolution and four linear layers. So accuracies do not carry over.
    """

    kernels: tuple[int, ...] = (3, 5, 7)
    widths: tuple[int, ...] = (8, 16, 32)
    classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        self.require_options("kernels", "widths")
        check_kernels(self.kernels)
        self.require_positive("classes", "in_channels")

    @cached_property
    def choices(self) -> Choices:
        kernels = {f"kernel{i}": self.kernels for i in range(LAYERS)}
        return kernels | {f"width{i}": self.widths_of(i) for i in range(LAYERS)}

    def widths_of(self, layer: int) -> tuple[int, ...]:
        """Return the options of a layer's channels."""
        return tuple(width * 2**layer for width in self.widths)

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the architecture as a chain of its layers."""
        arch = self.check(arch)
        steps = [f"layer {i}: {arch[f'kernel{i}']}x{arch[f'kernel{i}']}, {arch[f'width{i}']}" for i in range(LAYERS)]
        return [(a, b, "") for a, b in pairwise(["input", *steps, "output"])]

    def build(self, arch: Arch) -> nn.Module:
        """Return the network, initialised by torch's layers: (B, in_channels, H, W) images to (B, classes) logits.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        code = self.encode(self.check(arch))
        self.require("classes", "in_channels")
        assert self.classes is not None and self.in_channels is not None
        kernels = [self.kernels[k] for k in code[:LAYERS]]
        widths = [self.widths_of(i)[k] for i, k in enumerate(code[LAYERS:])]
        inputs = [self.in_channels, *widths]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(LAYERS):
            layer = ConvBN(inputs[i], widths[i], kernels[i])
            layer.add_module("relu", nn.ReLU())
            if i < LAYERS - 1:
                layer.add_module("pool", _pool())
            parts[f"layer{i}"] = layer
        linear = nn.Linear(widths[-1], self.classes)
        parts["head"] = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=linear))
        return nn.Sequential(parts)

    def supernet(self, *, recompute: bool = False) -> ConvMacroSupernet:
        """Return a fresh network of the largest layers, of which all architectures are parts.

        Args:
            recompute: save memory: compute the inside of each layer again in the backward pass.

        Raises:
            ArchError: the space is not bound to data.

        Example:
            >>> import torch
            >>> space = ConvMacro(widths=(4, 8), classes=10, in_channels=1)
            >>> supernet, arch = space.supernet(), space.at(700)
            >>> x = torch.randn(2, 1, 8, 8)
            >>> torch.allclose(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x), atol=1e-5)
            True
        """
        return ConvMacroSupernet(self, recompute=recompute)


class ConvMacroSupernet(EntangledSupernet):
    """All networks of a `ConvMacro` space. A width is weighed by the layer behind, which reads it."""

    def __init__(self, space: ConvMacro, *, recompute: bool = False) -> None:
        space.require("classes", "in_channels")
        assert space.classes is not None and space.in_channels is not None
        axes: dict[str, Axis] = {f"kernel{i}": KernelAxis(space.kernels) for i in range(LAYERS)}
        axes |= {f"width{i}": Axis(space.widths_of(i)) for i in range(LAYERS)}
        super().__init__(space, axes, recompute=recompute)
        widths = [space.widths_of(i)[-1] for i in range(LAYERS)]
        inputs = [space.in_channels, *widths]
        for i in range(LAYERS):
            self.add_module(f"layer{i}", _Layer(inputs[i], widths[i], space.kernels[-1], pool=i < LAYERS - 1))
        self.head = nn.ModuleDict({"linear": EntangledLinear(widths[-1], space.classes)})

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        spans = self.spans(mixture)
        inputs: Span | None = None
        for i in range(LAYERS):
            width = spans[f"width{i}"]
            x = self.inside(self.get_submodule(f"layer{i}"), x, width, inputs, spans[f"kernel{i}"])
            inputs = width
        logits: Tensor = self.head["linear"](x.mean((2, 3)), inputs=inputs)
        return logits


class _Layer(EntangledConvBN):
    """One entangled convolution with batch norm, ReLU and perhaps a pool."""

    def __init__(self, c_in: int, c_out: int, kernel: int, pool: bool) -> None:
        super().__init__(c_in, c_out, kernel)
        self.pool = _pool() if pool else nn.Identity()

    def forward(
        self, x: Tensor, out: Span | None = None, inputs: Span | None = None, kernel: Span | None = None
    ) -> Tensor:
        pooled: Tensor = self.pool(F.relu(super().forward(x, out, inputs, kernel)))
        return pooled


def _pool() -> nn.Module:
    return nn.MaxPool2d(2, ceil_mode=True)  # an odd image keeps its last row; one of a single pixel stays as it is
