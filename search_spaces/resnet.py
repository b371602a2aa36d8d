"""ResNets for small images: depth and width of three stages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, Choices, SearchSpace
from search_spaces.operations import ConvBN, DropPath


@dataclass(frozen=True)
class ResNet(SearchSpace):
    """Depth and width of a three-stage ResNet of basic blocks: 729 architectures by default.

    A 3x3 convolution to the width of the first stage, then three stages: stage 0 has `depth0` blocks of `width0`
    channels, and so on; stages 1 and 2 begin by halving the image. Then mean over the image and a linear layer.

    Args:
        depths: options of blocks per stage.
        widths: options of channels per stage.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.

    Raises:
        ArchError: a setting is no positive integer, or options are missing or repeated.

    Example:
        >>> import torch
        >>> space = ResNet(depths=(1, 2), classes=10, in_channels=1)
        >>> space.size
        216
        >>> arch = space.at(0)
        >>> arch
        Arch(depth0=1, depth1=1, depth2=1, width0=16, width1=16, width2=16)
        >>> space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, section 4.2, with a
    1x1 convolution on the shortcut where the shape changes.
    """

    depths: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        self.require_options("depths", "widths", ascending=False)
        self.require_positive("classes", "in_channels")

    @cached_property
    def choices(self) -> Choices:
        return {f"depth{i}": self.depths for i in range(3)} | {f"width{i}": self.widths for i in range(3)}

    def build(self, arch: Arch) -> nn.Module:
        """Return the network, initialised by torch's layers: (B, in_channels, H, W) images to (B, classes) logits.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        arch = self.check(arch)
        self.require("classes", "in_channels")
        assert self.classes is not None and self.in_channels is not None
        code = self.encode(arch)
        depths, widths = [self.depths[k] for k in code[:3]], [self.widths[k] for k in code[3:]]
        c = widths[0]
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(ConvBN(self.in_channels, c, kernel=3), nn.ReLU())
        )
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            strides = [2 if i else 1] + [1] * (depth - 1)
            inputs = [c] + [width] * (depth - 1)
            blocks = (BasicBlock(c_in, width, stride) for c_in, stride in zip(inputs, strides, strict=True))
            parts[f"stage{i}"] = nn.Sequential(*blocks)
            c = width
        parts["head"] = nn.Sequential(
            OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(c, self.classes))
        )
        return nn.Sequential(parts)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, then ReLU: (B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvBN(c_in, c_out, kernel=3, stride=stride)
        self.conv2 = ConvBN(c_out, c_out, kernel=3)
        self.drop_path = DropPath()
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else ConvBN(c_in, c_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.shortcut(x)
        return F.relu(shortcut + self.drop_path(self.conv2(F.relu(self.conv1(x)))))
