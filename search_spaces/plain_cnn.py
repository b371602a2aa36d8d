"""Plain chains of convolutions, pools and fully connected layers, which can grow: the first space of EAS."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from search_spaces.base import Arch, Choices, Option
from search_spaces.entangled import check_kernels
from search_spaces.growth import DEEPEN_NOISE, GrowingSpace, Growth, Layer, align, spread
from search_spaces.operations import ConvBN


@dataclass(frozen=True)
class PlainCNN(GrowingSpace):
    """Blocks of convolutions with 2x2 max pools between them, then fully connected layers: about 10^54 by default.

    Every layer is followed by batch norm and ReLU. Layer i of block b has `block{b}_filters{i}` and
    `block{b}_kernel{i}`; the first of a block is always there, the others are not if their filters are 0. Before the
    fully connected layers, of which `fc{i}` is the width or 0, stands the mean over the image, and behind them a linear
    layer to the classes. `canonical` moves the layers of a block together and resets the kernels of those that are
    not there. A search that grows begins with `start`: one 3x3 convolution in every block, of 16, 32, 64 and 128
    filters, and one fully connected layer of 256 units.

    Args:
        widths: options of filters, ascending.
        fc_widths: options of units of a fully connected layer, ascending.
        kernels: options of kernel sizes: odd, ascending.
        blocks: how many blocks; images are halved between them, so they need 2^(blocks - 1) pixels a side.
        slots: how many convolutions a block may have.
        fc_slots: how many fully connected layers there may be.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.

    Raises:
        ArchError: a setting is no positive integer; options are missing or do not ascend; a kernel is even.

    Example:
        >>> space = PlainCNN(classes=10, in_channels=3)
        >>> space.layers(space.start)
        [['conv-16-3'], ['conv-32-3'], ['conv-64-3'], ['conv-128-3'], ['fc-256']]
        >>> space.build(space.start)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: Cai et al., Efficient Architecture Search by Network Transformation, AAAI 2018, arXiv:1707.04873, section 4.
    There the last pool is 4x4, the mean over what is left of a 32x32 image; here it is the mean over any image. There
    are no limits on a block's layers there, and dropout follows the convolutions when images are not augmented.
    """

    widths: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)
    fc_widths: tuple[int, ...] = (64, 128, 256, 384, 512, 640, 768, 896, 1024)
    kernels: tuple[int, ...] = (1, 3, 5)
    blocks: int = 4
    slots: int = 6
    fc_slots: int = 3
    classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        self.require_options("widths", "fc_widths", "kernels")
        check_kernels(self.kernels)
        self.require_positive("blocks", "slots", "fc_slots", "classes", "in_channels")

    @cached_property
    def choices(self) -> Choices:
        found: dict[str, tuple[Option, ...]] = {}
        for b in range(self.blocks):
            for i in range(self.slots):
                found[f"block{b}_filters{i}"] = self.widths if i == 0 else (0, *self.widths)
                found[f"block{b}_kernel{i}"] = self.kernels
        return found | {f"fc{i}": (0, *self.fc_widths) for i in range(self.fc_slots)}

    def build(self, arch: Arch) -> nn.Module:
        """Return the network, initialised by torch's layers: (B, in_channels, H, W) images to (B, classes) logits.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        *convs, fcs = self._packed(self.check(arch))
        self.require("classes", "in_channels")
        assert self.classes is not None and self.in_channels is not None
        c = self.in_channels
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for b, block in enumerate(convs):
            layers: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.MaxPool2d(2)) if b else OrderedDict()
            for i, (width, kernel) in enumerate(block):
                layers |= {f"layer{i}": ConvBN(c, width, kernel), f"relu{i}": nn.ReLU()}
                c = width
            parts[f"block{b}"] = nn.Sequential(layers)
        head: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
        for i, (width, _) in enumerate(fcs):
            layer = OrderedDict(linear=nn.Linear(c, width, bias=False), norm=nn.BatchNorm1d(width))
            head |= {f"fc{i}": nn.Sequential(layer), f"relu{i}": nn.ReLU()}
            c = width
        head["linear"] = nn.Linear(c, self.classes)
        parts["head"] = nn.Sequential(head)
        return nn.Sequential(parts)

    # Growth --------------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> Arch:
        """16, 32, 64 and 128 filters, 3x3, and 256 units; of other widths the smallest, doubled as far as they go."""
        kernel = min(self.kernels, key=lambda k: abs(k - 3))
        first = self.widths[0]
        blocks = [[Layer(_up_to(first * 2**b, self.widths), kernel)] for b in range(self.blocks)]
        return self._arch([*blocks, [Layer(_up_to(first * 2**self.blocks, self.fc_widths))]])

    @property
    def slots_of_blocks(self) -> tuple[int, ...]:
        """The convolutions of every block, then the fully connected layers."""
        return (self.slots,) * self.blocks + (self.fc_slots,)

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """conv-FILTERS-KERNEL and fc-UNITS."""
        convs = [f"conv-{width}-{kernel}" for width in self.widths for kernel in self.kernels]
        return (*convs, *(f"fc-{width}" for width in self.fc_widths))

    def widths_of(self, block: int) -> tuple[int, ...]:
        """Return `widths`, or `fc_widths` of the block after the last, that of the fully connected layers."""
        return self.widths if block < self.blocks else self.fc_widths

    def kernels_of(self, block: int) -> tuple[int, ...]:
        """Return `kernels`, or none of fully connected layers."""
        return self.kernels if block < self.blocks else ()

    def _word(self, layer: Layer) -> str:
        """Return the word of `vocabulary` for a layer."""
        return f"conv-{layer.width}-{layer.kernel}" if layer.kernel else f"fc-{layer.width}"

    def _packed(self, arch: Arch) -> list[list[Layer]]:
        """Return the layers that are there, block by block, the fully connected ones last."""
        blocks = []
        for b in range(self.blocks):
            slots = [(arch[f"block{b}_filters{i}"], arch[f"block{b}_kernel{i}"]) for i in range(self.slots)]
            blocks.append([Layer(int(w), int(k)) for w, k in slots if w])  # type: ignore[arg-type]
        fcs = [arch[f"fc{i}"] for i in range(self.fc_slots)]
        return [*blocks, [Layer(int(width)) for width in fcs if width]]

    def _arch(self, blocks: list[list[Layer]]) -> Arch:
        """Return the architecture with these layers."""
        values: dict[str, Option] = {}
        *convs, fcs = blocks
        for b, block in enumerate(convs):
            for i, (width, kernel) in enumerate(block + [Layer(0, self.kernels[0])] * (self.slots - len(block))):
                values |= {f"block{b}_filters{i}": width, f"block{b}_kernel{i}": kernel}
        widths = [layer.width for layer in fcs] + [0] * (self.fc_slots - len(fcs))
        return Arch(values | {f"fc{i}": width for i, width in enumerate(widths)})

    def _grow(self, growth: Growth, arch: Arch, child: Arch) -> None:
        """Wider layers first, then new ones that do nothing, then those wider where they have to be."""
        old, new = self._packed(arch), self._packed(child)
        groups = [align(*pair) for pair in zip(old, new, strict=True)]

        def name(block: int, layer: int, part: str = "layer") -> str:
            if block < self.blocks:
                return f"block{block}.{part}{layer}"
            return f"head.{'fc' if part == 'layer' else part}{layer}"

        followed = [(b, i) for b, block in enumerate(groups) for i, group in enumerate(block) if len(group) > 1]
        moments = growth.moments([name(b, i, "relu") for b, i in followed])
        assert self.in_channels is not None and self.classes is not None
        into = torch.arange(self.in_channels)  # of the larger network's channels, those of the smaller they carry
        for b, block in enumerate(groups):
            conv = "conv" if b < self.blocks else "linear"
            for i, group in enumerate(block):
                between = min(new[b][j].width for j in group)  # the width at which new layers are put in
                base = growth.extend(old[b][i].width, between)
                previous = torch.arange(0)
                for j in group:
                    own = growth.extend(between, new[b][j].width)
                    if j == group[0]:
                        growth.layer(f"{name(b, j)}.{conv}", f"{name(b, i)}.{conv}", base[own], into)
                        growth.norm(f"{name(b, j)}.norm", f"{name(b, i)}.norm", base[own])
                    else:
                        mean, variance = moments[name(b, i, "relu")]
                        weight = spread(torch.eye(between, dtype=mean.dtype, device=mean.device), own, previous)
                        if kernel := new[b][j].kernel:
                            centred = weight.new_zeros(*weight.shape, kernel, kernel)
                            centred[:, :, kernel // 2, kernel // 2] = weight
                            weight = centred
                        growth.state[f"{name(b, j)}.{conv}.weight"] = weight
                        growth.noisy.append((f"{name(b, j)}.{conv}", 0, DEEPEN_NOISE))
                        growth.identity_norm(f"{name(b, j)}.norm", (mean, variance), base[own])
                    previous = own
                into = base[previous]
        growth.layer("head.linear", "head.linear", torch.arange(self.classes), into)


def _up_to(width: int, options: tuple[int, ...]) -> int:
    """Return the largest option that is not above this width, or the smallest of all."""
    return max([option for option in options if option <= width], default=options[0])
