"""DenseNets, which can grow: the second space of EAS."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Choices, Option
from search_spaces.growth import DEEPEN_NOISE, GrowingSpace, Growth, Layer, align

BOTTLENECK = 4


@dataclass(frozen=True)
class DenseNet(GrowingSpace):
    """Growth rates of the layers of a DenseNet-BC, block by block: about 10^30 by default.

    Every layer reads all before it in its block: batch norm, ReLU, 1x1 convolution to four times its growth rate,
    batch norm, ReLU, 3x3 convolution to its growth rate. Layer i of block b has the growth rate `block{b}_growth{i}`;
    the first of a block is always there, the others are not if it is 0. The first convolution has twice the growth
    rate of the first layer. Between blocks, a 1x1 convolution halves the channels and a mean the image. `canonical`
    moves the layers of a block together. A search that grows begins with `start`: `layers_of_start` layers in every
    block, of the smallest growth rate; with 6 layers of 40 that is L=40, k=40.

    Args:
        growths: options of growth rates, ascending.
        blocks: how many blocks.
        slots: how many layers a block may have.
        layers_of_start: how many layers a block of `start` has.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.

    Raises:
        ArchError: a setting is no positive integer; options are missing or do not ascend; a start that does not fit.

    Example:
        >>> space = DenseNet(growths=(4, 6, 8), layers_of_start=2, slots=4, classes=10, in_channels=1)
        >>> space.layers(space.start)
        [['g4', 'g4'], ['g4', 'g4'], ['g4', 'g4']]
        >>> space.build(space.start)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993; grown as in Cai et al.,
    Efficient Architecture Search by Network Transformation, AAAI 2018, arXiv:1707.04873. A new layer copies the one
    before it, as in the released code; the noise spares the weights that are zero, there it does not.
    """

    growths: tuple[int, ...] = (40, 44, 48, 52, 56, 60, 64)
    blocks: int = 3
    slots: int = 12
    layers_of_start: int = 6
    classes: int | None = None
    in_channels: int | None = None

    widenings = 10
    between = "transition"

    def __post_init__(self) -> None:
        self.require_options("growths")
        self.require_positive("blocks", "slots", "layers_of_start", "classes", "in_channels")
        if self.layers_of_start > self.slots:
            raise ArchError(f"layers_of_start={self.layers_of_start} do not fit into slots={self.slots} of a block.")

    @cached_property
    def choices(self) -> Choices:
        return {
            f"block{b}_growth{i}": self.growths if i == 0 else (0, *self.growths)
            for b in range(self.blocks)
            for i in range(self.slots)
        }

    def build(self, arch: Arch) -> nn.Module:
        """Return the network, initialised by torch's layers: (B, in_channels, H, W) images to (B, classes) logits.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        blocks = self._packed(self.check(arch))
        self.require("classes", "in_channels")
        assert self.classes is not None and self.in_channels is not None
        c = 2 * blocks[0][0].width
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(self.in_channels, c, 3, padding=1, bias=False))
        for b, block in enumerate(blocks):
            if b:
                parts[f"transition{b}"] = _transition(c)
                c //= 2
            inputs = [c + sum(layer.width for layer in block[:i]) for i in range(len(block) + 1)]
            c = inputs.pop()
            layers = {f"layer{i}": DenseLayer(n, block[i].width) for i, n in enumerate(inputs)}
            parts[f"block{b}"] = nn.Sequential(OrderedDict(layers))
        head = OrderedDict(norm=nn.BatchNorm2d(c), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        parts["head"] = nn.Sequential(head | {"linear": nn.Linear(c, self.classes)})
        return nn.Sequential(parts)

    # Growth --------------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> Arch:
        """`layers_of_start` layers of the smallest growth rate in every block."""
        return self._arch([[Layer(self.growths[0])] * self.layers_of_start] * self.blocks)

    @property
    def slots_of_blocks(self) -> tuple[int, ...]:
        """As many layers in every block."""
        return (self.slots,) * self.blocks

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """gGROWTH."""
        return tuple(f"g{growth}" for growth in self.growths)

    def widths_of(self, block: int) -> tuple[int, ...]:
        """Return `growths`, of every block."""
        return self.growths

    def kernels_of(self, block: int) -> tuple[int, ...]:
        """Return that there is no choice: a new layer is a copy of the one before it."""
        return ()

    def _word(self, layer: Layer) -> str:
        """Return the word of `vocabulary` for a layer."""
        return f"g{layer.width}"

    def _packed(self, arch: Arch) -> list[list[Layer]]:
        """Return the layers that are there, block by block."""
        growths = ([arch[f"block{b}_growth{i}"] for i in range(self.slots)] for b in range(self.blocks))
        return [[Layer(int(g)) for g in block if g] for block in growths]

    def _arch(self, blocks: list[list[Layer]]) -> Arch:
        """Return the architecture with these layers."""
        values: dict[str, Option] = {}
        for b, block in enumerate(blocks):
            for i, layer in enumerate(block + [Layer(0)] * (self.slots - len(block))):
                values[f"block{b}_growth{i}"] = layer.width
        return Arch(values)

    def _grow(self, growth: Growth, arch: Arch, child: Arch) -> None:
        """Follow the channels through every concatenation, as the smaller network numbers them there."""
        old, new = self._packed(arch), self._packed(child)
        assert self.in_channels is not None and self.classes is not None
        carried = growth.extend(2 * old[0][0].width, 2 * new[0][0].width)
        growth.layer("stem", "stem", carried, torch.arange(self.in_channels))
        channels = 2 * old[0][0].width  # of the smaller network, here
        for b in range(self.blocks):
            if b:
                halved = growth.extend(channels // 2, len(carried) // 2)
                growth.norm(f"transition{b}.norm", f"transition{b}.norm", carried)
                growth.layer(f"transition{b}.conv", f"transition{b}.conv", halved, carried)
                carried, channels = halved, channels // 2
            for i, group in enumerate(align(old[b], new[b])):
                source, width = f"block{b}.layer{i}", old[b][i].width
                for j in group:
                    name, wider = f"block{b}.layer{j}", new[b][j].width
                    known = carried < channels  # a copy also reads the layer it copies, which that did not
                    middle = growth.extend(BOTTLENECK * width, BOTTLENECK * wider)
                    out = growth.extend(width, wider) if j == group[0] else growth.draw(width, wider)
                    growth.norm(f"{name}.norm1", f"{source}.norm1", carried, known)
                    growth.layer(f"{name}.conv1", f"{source}.conv1", middle, carried, known)
                    growth.norm(f"{name}.norm2", f"{source}.norm2", middle)
                    growth.layer(f"{name}.conv2", f"{source}.conv2", out, middle)
                    if j != group[0]:
                        growth.noisy.append((f"{name}.conv2", 0, DEEPEN_NOISE))
                    carried = torch.cat([carried, channels + out])
                channels += width
        growth.norm("head.norm", "head.norm", carried)
        growth.layer("head.linear", "head.linear", torch.arange(self.classes), carried)


class DenseLayer(nn.Module):
    """Put what a layer makes of its input behind it: (B, c, H, W) to (B, c + growth, H, W).

    Example:
        >>> DenseLayer(8, 4)(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 12, 5, 5])
    """

    def __init__(self, c: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c)
        self.conv1 = nn.Conv2d(c, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(inner)))], dim=1)


def _transition(c: int) -> nn.Sequential:
    conv = nn.Conv2d(c, c // 2, 1, bias=False)
    return nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(c), relu=nn.ReLU(), conv=conv, pool=nn.AvgPool2d(2)))
