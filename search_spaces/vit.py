"""AutoFormer: vision transformers of one width and depth, whose blocks differ in heads and MLP ratio.

Source: Chen et al., AutoFormer: Searching Transformers for Visual Recognition, ICCV 2021, arXiv:2107.00651.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Mixture
from search_spaces.entangled import EntangledLinear
from search_spaces.transformer import TransformerSpace, TransformerSupernet, initialise, plain_blocks


@dataclass(frozen=True)
class ViT(TransformerSpace):
    """The vision transformers of AutoFormer's tiny space, for small images; `ViT.small` has those of its small one.

    Decisions: `width` of all tokens, `depth`, and for block i `heads{i}` and `ratio{i}`, which times the width, rounded
    down, gives the hidden features of its MLP. Blocks beyond the depth have decisions too, which do not matter:
    `canonical` gives them the first option.

    The network: a convolution makes a token of each patch of the image, a class token is put in front of them, and a
    learned position embedding is added. Then pre-norm blocks, with GELU, a layer norm, the mean over the tokens of
    patches, and a linear layer. A head has `head_dim` features, whatever the width.

    Args:
        widths: options of features of a token.
        heads: options of heads of a block.
        ratios: options of an MLP's hidden features, in multiples of the width.
        depths: options of blocks.
        head_dim: features of a head.
        patch: side of a patch in pixels: 16 for images of ImageNet.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.
        image_size: side of an image, a multiple of `patch`; taken from the data if ``None``.

    Raises:
        ArchError: a setting is not positive, options are missing or do not ascend, or patches do not fill an image.

    Example:
        >>> space = ViT(widths=(16, 24), depths=(1, 2), head_dim=8, classes=10, in_channels=1, image_size=8)
        >>> arch = space.arch(width=24, depth=1, heads0=3, heads1=3, ratio0=3.5, ratio1=4.0)
        >>> space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> ViT.small().widths
        (320, 384, 448)

    Source: Chen et al. 2021, table 1. Its class token is seen by the others but not read by the head, as in the
    authors' commands (``--gp``). They add relative position embeddings to keys and values; ours has none, so 12 blocks
    of width 192, 3 heads and a ratio of 4 have the parameters of DeiT-Ti. They train one sampled path a step, which is
    ``strategy="spos"``.
    """

    widths: tuple[int, ...] = (192, 216, 240)
    heads: tuple[int, ...] = (3, 4)
    ratios: tuple[float, ...] = (3.5, 4.0)
    depths: tuple[int, ...] = (12, 13, 14)
    head_dim: int = 64
    patch: int = 4
    classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None

    @classmethod
    def small(cls, **settings: Any) -> ViT:
        """Return AutoFormer's small space, with these settings otherwise."""
        options = {"widths": (320, 384, 448), "heads": (5, 6, 7), "ratios": (3.0, 3.5, 4.0), "depths": (12, 13, 14)}
        return cls(**{**options, **settings})

    def __post_init__(self) -> None:
        self.check_settings()
        self.require_positive("head_dim", "patch", "classes", "in_channels", "image_size")
        if self.image_size is not None and self.image_size % self.patch:
            raise ArchError(
                f"ViT was given patch={self.patch}, but images of {self.image_size}x{self.image_size} are not "
                "divisible into such patches. Give another patch, or resize the images."
            )

    def build(self, arch: Arch) -> nn.Module:
        """Return the network: (B, in_channels, image_size, image_size) images to (B, classes) logits.

        Weights are drawn from torch's global generator with a standard deviation of 0.02; those of the patches by
        torch's layer.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        arch = self.check(arch)
        self._require_bound()
        return VisionTransformer(self, arch)

    def supernet(self, *, recompute: bool = False) -> ViTSupernet:
        """Return a fresh supernet of entangled weights, as large as the largest network.

        Args:
            recompute: save memory: compute the inside of each block again in the backward pass.

        Raises:
            ArchError: the space is not bound to data.

        Example:
            >>> space = ViT(widths=(16, 24), depths=(1, 2), head_dim=8, classes=10, in_channels=1, image_size=8)
            >>> supernet, arch = space.supernet(), space.at(7)
            >>> x = torch.randn(2, 1, 8, 8)
            >>> torch.allclose(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x), atol=1e-5)
            True
        """
        self._require_bound()
        return ViTSupernet(self, recompute)

    def _require_bound(self) -> None:
        self.require("classes", "in_channels")
        self.require("image_size")


class VisionTransformer(nn.Module):
    """One network of the space `ViT`."""

    def __init__(self, space: ViT, arch: Arch) -> None:
        super().__init__()
        self.side = space.image_size
        width, blocks = space.width_and_blocks(arch)
        self.patch, self.token, self.position = _embedding(space, width)
        self.blocks = plain_blocks(width, blocks, space.head_dim)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, space.classes)  # type: ignore[arg-type]
        initialise(self, self.token, self.position)

    def forward(self, x: Tensor) -> Tensor:
        _check_images(x, self.side)
        x = _tokens(self.patch(x), self.token, self.position)
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 1:].mean(1))
        return logits


class ViTSupernet(TransformerSupernet):
    """All networks of the space `ViT`. Made by ``ViT(...).supernet()``."""

    def __init__(self, space: ViT, recompute: bool = False) -> None:
        super().__init__(space, head_dim=space.head_dim, recompute=recompute)
        self.side = space.image_size
        self.patch, self.token, self.position = _embedding(space, space.widths[-1])
        self.head = EntangledLinear(space.widths[-1], space.classes)  # type: ignore[arg-type]
        initialise(self, self.token, self.position)

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        _check_images(x, self.side)
        spans = self.spans(mixture)
        width, size = spans["width"].plain, spans["width"].size
        assert self.patch.bias is not None
        patches = F.conv2d(x, self.patch.weight[:size], self.patch.bias[:size], self.patch.stride)
        x = self.encoded(_tokens(patches, self.token[..., :size], self.position[..., :size]), spans)
        logits: Tensor = self.head(x[:, 1:].mean(1), inputs=width)
        return logits


def _embedding(space: ViT, width: int) -> tuple[nn.Conv2d, nn.Parameter, nn.Parameter]:
    """Return the convolution of patches, the class token and the positions."""
    assert space.in_channels is not None and space.image_size is not None
    tokens = 1 + (space.image_size // space.patch) ** 2
    patch = nn.Conv2d(space.in_channels, width, space.patch, space.patch)
    return patch, nn.Parameter(torch.empty(1, 1, width)), nn.Parameter(torch.empty(1, tokens, width))


def _tokens(patches: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """Return the tokens of (B, width, h, w) patches, the class token in front: (B, 1 + h * w, width)."""
    x = patches.flatten(2).transpose(1, 2)
    return torch.cat([token.expand(x.shape[0], -1, -1), x], 1) + position


def _check_images(x: Tensor, side: int | None) -> None:
    height, width = x.shape[-2:]
    if (height, width) != (side, side):
        raise ArchError(
            f"this ViT reads images of {side}x{side}, and was given {height}x{width}: it has a position embedding for "
            f"each patch. Resize them, or make the space for images of this size (square, image_size={height})."
        )


torch.fx.wrap("_check_images")  # tracing would otherwise fail on its condition
