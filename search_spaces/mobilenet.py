"""The Once-for-All space of MobileNetV3: depth of five stages, kernel size and expansion of each of their blocks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Choices, Mixture, SearchSpace, nearest
from search_spaces.entangled import (
    Axis,
    EntangledConv2d,
    EntangledConvBN,
    EntangledSupernet,
    KernelAxis,
    Span,
    check_kernels,
)
from search_spaces.operations import ConvBN, DropPath

STEMS = ("imagenet", "cifar")


@dataclass(frozen=True)
class Stage:
    """What is fixed in a stage: its channels at width 1, the stride of its first block, and of all its blocks whether
    they have h-swish (else ReLU) and squeeze-excitation."""

    channels: int
    stride: int
    swish: bool
    squeeze: bool


STAGES = (
    Stage(24, 2, swish=False, squeeze=False),
    Stage(40, 2, swish=False, squeeze=True),
    Stage(80, 2, swish=True, squeeze=False),
    Stage(112, 1, swish=True, squeeze=True),
    Stage(160, 2, swish=True, squeeze=True),
)
STEM_CHANNELS, LAST_CHANNELS, HEAD_FEATURES = 16, 960, 1280


@dataclass(frozen=True)
class MobileNetV3(SearchSpace):
    """Depth, kernel sizes and expansions of MobileNetV3-Large: 45 decisions, 2.2e19 different networks by default.

    A 3x3 convolution, a fixed block, five stages of inverted residual blocks, a 1x1 convolution, mean over the image,
    two linear layers. Stage s has `depth{s}` blocks; its block b has a kernel of `kernel{s}_{b}` and `expand{s}_{b}`
    times as many hidden channels as inputs. Decisions about blocks beyond the depth change nothing (`canonical`).

    Channels are those of the paper times `width`, rounded to multiples of 8. An image is divided by 32 on its way, or,
    with the stem for CIFAR, by 8: 32x32 ends as 4x4.

    Args:
        kernels: options of kernel sizes: odd, ascending.
        expands: options of expansions: 2 or more, ascending.
        depths: options of blocks per stage, ascending.
        width: factor of all numbers of channels.
        stem: ``"imagenet"``, or ``"cifar"``: stride 1 in the first convolution and in the first stage.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.

    Raises:
        ArchError: options are missing, repeated, do not ascend or are out of range, or another setting is.

    Example:
        >>> import torch
        >>> space = MobileNetV3(depths=(1, 2), width=0.25, stem="cifar", classes=10, in_channels=1)
        >>> len(space.choices)
        25
        >>> space.build(space.at(0))(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])

    Source: Cai et al., Once for All: Train One Network and Specialize it for Efficient Deployment, ICLR 2020,
    arXiv:1908.09791; the blocks are those of Howard et al., Searching for MobileNetV3, ICCV 2019, arXiv:1905.02244.
    Without the authors' choice of image size, their initialisation, their dropout of 0.1 before the last layer, and
    the matrices by which they make a smaller kernel from a larger: here it is the centre as it stands.
    """

    kernels: tuple[int, ...] = (3, 5, 7)
    expands: tuple[int, ...] = (3, 4, 6)
    depths: tuple[int, ...] = (2, 3, 4)
    width: float = 1.0
    stem: str = "imagenet"
    classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        self.require_options("kernels", "expands", "depths")
        check_kernels(self.kernels)
        if self.expands[0] < 2:
            raise ArchError(f"MobileNetV3 was given expands={self.expands}; expansions are 2 or more.")
        if type(self.width) not in (int, float) or not 0 < self.width < math.inf:
            raise ArchError(f"MobileNetV3 was given width={self.width!r}; it is a number above 0.")
        object.__setattr__(self, "width", float(self.width))  # 1 and 1.0 are the same space
        if self.stem not in STEMS:
            raise ArchError(f"MobileNetV3 was given stem={self.stem!r}; {nearest(str(self.stem), STEMS)}")
        self.require_positive("classes", "in_channels")

    @cached_property
    def choices(self) -> Choices:
        blocks = [f"{s}_{b}" for s in range(len(STAGES)) for b in range(self.depths[-1])]
        return (
            {f"depth{s}": self.depths for s in range(len(STAGES))}
            | {f"kernel{block}": self.kernels for block in blocks}
            | {f"expand{block}": self.expands for block in blocks}
        )

    def canonical(self, arch: Arch) -> Arch:
        """Return the architecture with the first options for blocks that do not exist.

        Raises:
            ArchError: the architecture is not of this space.
        """
        arch = self.check(arch)
        kept = {f"depth{s}": arch[f"depth{s}"] for s in range(len(STAGES))}
        for s, b in self._blocks(arch):
            kept |= {name: arch[name] for name in (f"kernel{s}_{b}", f"expand{s}_{b}")}
        return Arch({name: kept.get(name, options[0]) for name, options in self.choices.items()})

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the chain of the blocks that exist, each named by stage and place in it."""
        arch = self.check(arch)
        blocks = [
            f"{s}.{b}: {arch[f'kernel{s}_{b}']}x{arch[f'kernel{s}_{b}']}, expand {arch[f'expand{s}_{b}']}"
            for s, b in self._blocks(arch)
        ]
        return [(a, b, "") for a, b in pairwise(["input", *blocks, "output"])]

    def _blocks(self, arch: Arch) -> Iterator[tuple[int, int]]:
        """The blocks that an architecture has: stage, and place in it."""
        for s in range(len(STAGES)):
            for b in range(int(arch[f"depth{s}"])):  # type: ignore[arg-type]
                yield s, b

    def build(self, arch: Arch) -> nn.Module:
        """Return the network, initialised by torch's layers: (B, in_channels, H, W) images to (B, classes) logits.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        arch = self.check(arch)
        self.require("classes", "in_channels")
        stages = [nn.Sequential() for _ in STAGES]
        for s, b in self._blocks(arch):
            c_in, c_out, stride = self.shape_of(s, b)
            kernel, expand = int(arch[f"kernel{s}_{b}"]), int(arch[f"expand{s}_{b}"])  # type: ignore[arg-type]
            stages[s].append(InvertedResidual(c_in, rounded(c_in * expand), c_out, kernel, stride, STAGES[s]))
        return nn.Sequential(self.around(stages))

    def shape_of(self, stage: int, block: int) -> tuple[int, int, int]:
        """Return a block's input channels, output channels and stride."""
        c_out = self.channels(STAGES[stage].channels)
        if block:
            return c_out, c_out, 1
        c_in = self.channels(STAGES[stage - 1].channels if stage else STEM_CHANNELS)
        return c_in, c_out, 1 if self.stem == "cifar" and not stage else STAGES[stage].stride

    def channels(self, count: int) -> int:
        """Return a number of channels of the paper, times `width`."""
        return rounded(count * self.width)

    def around(self, stages: list[nn.Sequential] | list[nn.ModuleList]) -> OrderedDict[str, nn.Module]:
        """Return the parts of a network of a bound space with these stages."""
        assert self.classes is not None and self.in_channels is not None
        c = self.channels(STEM_CHANNELS)
        last, features = self.channels(LAST_CHANNELS), self.channels(HEAD_FEATURES)
        stem = ConvBN(self.in_channels, c, kernel=3, stride=1 if self.stem == "cifar" else 2)
        first = InvertedResidual(c, c, c, kernel=3, stride=1, stage=Stage(STEM_CHANNELS, 1, swish=False, squeeze=False))
        final = ConvBN(self.channels(STAGES[-1].channels), last, kernel=1)
        for part in (stem, final):
            part.add_module("swish", nn.Hardswish())
        head = OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            mix=nn.Linear(last, features, bias=False),
            swish=nn.Hardswish(),
            linear=nn.Linear(features, self.classes),
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=stem, first=first)
        parts |= {f"stage{s}": stage for s, stage in enumerate(stages)}
        return parts | OrderedDict(final=final, head=nn.Sequential(head))

    def supernet(self, *, recompute: bool = False) -> MobileNetV3Supernet:
        """Return a fresh network of the deepest stages and largest blocks, of which all architectures are parts.

        Args:
            recompute: save memory: compute the inside of each block again in the backward pass.

        Raises:
            ArchError: the space is not bound to data.

        Example:
            >>> import torch
            >>> space = MobileNetV3(width=0.25, stem="cifar", classes=10, in_channels=1)
            >>> supernet, arch = space.supernet().eval(), space.at(10**20)
            >>> x = torch.randn(2, 1, 16, 16)
            >>> torch.allclose(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x), atol=1e-5)
            True
        """
        return MobileNetV3Supernet(self, recompute=recompute)


class InvertedResidual(nn.Module):
    """A 1x1 convolution to the hidden channels, a depthwise one, one back: (B, c_in, H, W) to (B, c_out, H', W').

    Each with batch norm, the first two with an activation. H' = H / stride, rounded up. The input is added where it
    has the output's shape. The first convolution is left out where there are as many hidden channels as inputs.
    """

    def __init__(self, c_in: int, hidden: int, c_out: int, kernel: int, stride: int, stage: Stage) -> None:
        super().__init__()
        self.expand = ConvBN(c_in, hidden, kernel=1) if hidden != c_in else None
        self.depthwise = ConvBN(hidden, hidden, kernel, stride, groups=hidden)
        self.squeeze = SqueezeExcitation(hidden) if stage.squeeze else None
        self.project = ConvBN(hidden, c_out, kernel=1)
        self.activation = _activation(stage)
        self.residual = stride == 1 and c_in == c_out
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x
        if self.expand is not None:
            y = self.activation(self.expand(y))
        y = self.activation(self.depthwise(y))
        if self.squeeze is not None:
            y = self.squeeze(y)
        y = self.project(y)
        return x + self.drop_path(y) if self.residual else y


class SqueezeExcitation(nn.Module):
    """Multiply each channel by a gate between 0 and 1, which two layers make of the means of all channels.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, arXiv:1709.01507, with a quarter of the channels
    between the layers and h-sigmoid behind them, as in MobileNetV3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed(channels), kernel_size=1)
        self.restore = nn.Conv2d(squeezed(channels), channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * hard_sigmoid(self.restore(F.relu(self.reduce(means))))


class MobileNetV3Supernet(EntangledSupernet):
    """All networks of a `MobileNetV3` space."""

    def __init__(self, space: MobileNetV3, *, recompute: bool = False) -> None:
        space.require("classes", "in_channels")
        blocks = [(s, b) for s in range(len(STAGES)) for b in range(space.depths[-1])]
        axes: dict[str, Axis] = {f"depth{s}": Axis(space.depths) for s in range(len(STAGES))}
        stages = [nn.ModuleList() for _ in STAGES]
        for s, b in blocks:
            c_in, c_out, stride = space.shape_of(s, b)
            sizes = [rounded(c_in * expand) for expand in space.expands]
            axes |= {f"kernel{s}_{b}": KernelAxis(space.kernels), f"expand{s}_{b}": Axis(sizes)}
            stages[s].append(EntangledResidual(c_in, sizes, c_out, space.kernels[-1], stride, STAGES[s]))
        super().__init__(space, axes, recompute=recompute)
        for name, part in space.around(stages).items():
            self.add_module(name, part)

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        spans = self.spans(mixture)
        x = self.get_submodule("first")(self.get_submodule("stem")(x))
        for s in range(len(STAGES)):
            blocks = list(self.get_submodule(f"stage{s}").children())
            kernels, hidden = ([spans[f"{name}{s}_{b}"] for b in range(len(blocks))] for name in ("kernel", "expand"))
            x = self.through(x, blocks, spans[f"depth{s}"], kernels, hidden)
        logits: Tensor = self.get_submodule("head")(self.get_submodule("final")(x))
        return logits


class EntangledResidual(nn.Module):
    """An `InvertedResidual` of entangled layers. Hidden channels are weighed where they are read.

    Args:
        sizes: options of the hidden channels.
    """

    def __init__(self, c_in: int, sizes: list[int], c_out: int, kernel: int, stride: int, stage: Stage) -> None:
        super().__init__()
        hidden = sizes[-1]
        self.expand = EntangledConvBN(c_in, hidden, kernel=1)
        self.depthwise = EntangledConvBN(hidden, hidden, kernel, stride, group_width=1)
        self.squeeze = EntangledSqueezeExcitation(sizes) if stage.squeeze else None
        self.project = EntangledConvBN(hidden, c_out, kernel=1)
        self.activation = _activation(stage)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor, kernel: Span, hidden: Span) -> Tensor:
        y: Tensor = self.activation(self.expand(x, out=hidden))
        y = self.activation(self.depthwise(y, out=hidden, kernel=kernel))
        if self.squeeze is not None:
            y = self.squeeze(y, hidden)
        y = self.project(y, inputs=hidden)
        return x + y if self.residual else y


class EntangledSqueezeExcitation(nn.Module):
    """A `SqueezeExcitation` of entangled layers, whose middle has a size for each of the channels'.

    Args:
        sizes: options of the channels.
    """

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.middle = Axis([squeezed(size) for size in sizes])
        self.reduce = EntangledConv2d(sizes[-1], squeezed(sizes[-1]), kernel=1, bias=True)
        self.restore = EntangledConv2d(squeezed(sizes[-1]), sizes[-1], kernel=1, bias=True)

    def forward(self, x: Tensor, channels: Span) -> Tensor:
        """Return x, not weighted by `channels`, times its gates."""
        middle = self.middle.beside(channels)
        means = x.mean((2, 3), keepdim=True)
        y = F.relu(self.reduce(means, out=middle.plain, inputs=channels))
        return x * hard_sigmoid(self.restore(y, out=channels.plain, inputs=middle))


def rounded(count: float) -> int:
    """Return the nearest multiple of 8, at least 8; the next one where that would be less than 90% of the count.

    Example:
        >>> rounded(100), rounded(3), rounded(11.2)
        (104, 8, 16)
    """
    nearby = max(8, int(count + 4) // 8 * 8)
    return nearby + 8 if nearby < 0.9 * count else nearby


def hard_sigmoid(x: Tensor) -> Tensor:
    """Return what `torch.nn.functional.hardsigmoid` does, which cannot be differentiated twice."""
    return F.relu6(x + 3) / 6


def squeezed(channels: int) -> int:
    """Return the size of the middle of a squeeze-excitation of so many channels."""
    return rounded(channels // 4)


def _activation(stage: Stage) -> nn.Module:
    return nn.Hardswish() if stage.swish else nn.ReLU()
