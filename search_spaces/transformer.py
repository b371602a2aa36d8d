"""Pre-norm transformer blocks, plain and entangled, and what the spaces made of them share.

A block is attention and an MLP, each behind a layer norm and beside a shortcut. Modules have the same names in both
forms, since a supernet's networks are taken out by name.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Choices, SearchSpace
from search_spaces.entangled import (
    Axis,
    CoupledAxis,
    EntangledAttention,
    EntangledLayerNorm,
    EntangledLinear,
    EntangledSupernet,
    Span,
    attend,
)
from search_spaces.operations import DropPath


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a shortcut: (B, T, width) to the same shape.

    Args:
        width: number of features.
        heads: number of heads.
        hidden: features inside the MLP.
        head_dim: features of a head; ``None`` divides the width among the heads.
        causal: no token sees a later one.
        depth: that of its `DropPath`, which both branches pass.

    Example:
        >>> import torch
        >>> Block(width=8, heads=2, hidden=16)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        head_dim: int | None = None,
        causal: bool = False,
        depth: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(first=nn.Linear(width, hidden), gelu=nn.GELU(), second=nn.Linear(hidden, width))
        )
        self.drop_path = DropPath(depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, width) to the same shape. See `Block` for its settings."""

    def __init__(self, width: int, heads: int, head_dim: int | None = None, causal: bool = False) -> None:
        super().__init__()
        inner = width if head_dim is None else heads * head_dim
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.projection = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = attend(self.query(x), self.key(x), self.value(x), self.heads, self.causal)
        out: Tensor = self.projection(y)
        return out


class EntangledBlock(nn.Module):
    """A `Block` of all widths, numbers of heads and MLP ratios.

    The stream beside the branches is not weighted, only cut. The width is weighted by the norms that read it, but for
    those in front of a layer that weighs it together with another choice.

    Args:
        widths, heads, ratios: options.
        head_dim, causal: those of a `Block`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        heads: Sequence[int],
        ratios: Sequence[float],
        head_dim: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = EntangledLayerNorm(widths[-1]), EntangledLayerNorm(widths[-1])
        self.attention = EntangledAttention(widths, heads, head_dim, causal)
        self.mlp = EntangledMLP(widths, ratios)

    def forward(self, x: Tensor, width: Span, heads: Span, ratio: Span) -> Tensor:
        pairs = self.attention.head_dim is None  # then the attention weighs widths and heads together
        x = x + self.attention(self.norm1(x, width, mean=pairs), width, heads)
        out: Tensor = x + self.mlp(self.norm2(x, width, mean=True), width, ratio)
        return out


class EntangledMLP(nn.Module):
    """The MLP of a `Block` for all widths and ratios, whose hidden features are coupled to both.

    Its input has the mean over the widths (`EntangledLayerNorm`, `mean`): the first layer weighs the pairs of a width
    and a ratio.
    """

    def __init__(self, widths: Sequence[int], ratios: Sequence[float]) -> None:
        super().__init__()
        self.hidden = CoupledAxis(widths, ratios, hidden_size)
        self.first = EntangledLinear(widths[-1], self.hidden.size)
        self.second = EntangledLinear(self.hidden.size, widths[-1])

    def forward(self, x: Tensor, width: Span, ratio: Span) -> Tensor:
        hidden, joint = self.hidden(width, ratio)
        y = F.gelu(self.first(x, hidden, width.plain, joint))
        out: Tensor = self.second(y, width.plain, hidden.plain)
        return out


class TransformerSpace(SearchSpace):
    """The decisions of transformers of one width: width and depth, and for every block heads and MLP ratio.

    Blocks beyond the depth have decisions too, which do not matter.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    ratios: tuple[float, ...]

    def check_settings(self) -> None:
        """Make tuples of options that are lists, as JSON has them, and check them.

        Raises:
            ArchError: options are missing, not positive, or do not ascend; or an MLP would have no hidden feature.
        """
        self.require_options("widths", "depths", "heads")
        name, ratios = type(self).__name__, getattr(self, "ratios")  # noqa: B009 - of any type, whatever is declared
        if isinstance(ratios, list):
            ratios = tuple(ratios)
        if not isinstance(ratios, tuple) or not all(type(r) in (int, float) and 0 < r < math.inf for r in ratios):
            raise ArchError(f"{name} was given ratios={ratios!r}; it is a tuple of positive numbers.")
        ratios = tuple(map(float, ratios))  # 4 and 4.0 are to be one option
        object.__setattr__(self, "ratios", ratios)
        if not ratios or list(ratios) != sorted(set(ratios)):
            raise ArchError(f"{name} was given ratios={ratios!r}; it needs at least one option, in ascending order.")
        if hidden_size(self.widths[0], ratios[0]) < 1:
            raise ArchError(
                f"{name} was given widths={self.widths!r} and ratios={ratios!r}, but an MLP with {ratios[0]} times "
                f"{self.widths[0]} features has none. Give larger ones."
            )

    @cached_property
    def choices(self) -> Choices:
        blocks = range(self.depths[-1])
        heads, ratios = {f"heads{i}": self.heads for i in blocks}, {f"ratio{i}": self.ratios for i in blocks}
        return {"width": self.widths, "depth": self.depths} | heads | ratios

    def width_and_blocks(self, arch: Arch) -> tuple[int, list[tuple[int, float]]]:
        """Return the width, and the heads and the MLP ratio of each block that the architecture has."""
        width, depth, *others = self.encode(arch)
        heads, ratios = others[: self.depths[-1]], others[self.depths[-1] :]
        blocks = [(self.heads[h], self.ratios[r]) for h, r in zip(heads, ratios, strict=True)]
        return self.widths[width], blocks[: self.depths[depth]]

    def canonical(self, arch: Arch) -> Arch:
        """Return the architecture with the first option for blocks that it does not have."""
        arch = self.check(arch)
        unused = range(len(self.width_and_blocks(arch)[1]), self.depths[-1])
        return arch | {f"heads{i}": self.heads[0] for i in unused} | {f"ratio{i}": self.ratios[0] for i in unused}

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the architecture as a chain of its blocks."""
        width, blocks = self.width_and_blocks(arch)
        steps = [f"block {i}: {heads} heads, ratio {ratio:g}" for i, (heads, ratio) in enumerate(blocks)]
        return [(a, b, "") for a, b in pairwise(["input", f"width {width}", *steps, "output"])]


class TransformerSupernet(EntangledSupernet):
    """The blocks and the last norm of all networks of a space.

    Args:
        space: of transformers.
        head_dim, causal: those of a `Block`.
        recompute: save memory: compute the inside of each block again in the backward pass.
    """

    def __init__(
        self, space: TransformerSpace, *, head_dim: int | None = None, causal: bool = False, recompute: bool = False
    ) -> None:
        blocks = range(space.depths[-1])
        # Only the weights of a ratio count: its sizes, the hidden features, are others at each width.
        ratios = range(1, len(space.ratios) + 1)
        axes = {"width": Axis(space.widths), "depth": Axis(space.depths)}
        axes |= {f"heads{i}": Axis(space.heads) for i in blocks} | {f"ratio{i}": Axis(ratios) for i in blocks}
        super().__init__(space, axes, recompute=recompute)
        self.blocks = nn.ModuleList(
            EntangledBlock(space.widths, space.heads, space.ratios, head_dim, causal) for _ in blocks
        )
        self.norm = EntangledLayerNorm(space.widths[-1])

    def encoded(self, x: Tensor, spans: Mapping[str, Span]) -> Tensor:
        """Return (B, T, width) tokens after the blocks and the last norm, which weighs the width."""
        n = len(self.blocks)
        heads, ratios = ([spans[f"{site}{i}"] for i in range(n)] for site in ("heads", "ratio"))
        x = self.through(x, self.blocks, spans["depth"], [spans["width"]] * n, heads, ratios)
        out: Tensor = self.norm(x, spans["width"])
        return out


def hidden_size(width: int, ratio: float) -> int:
    """Return the hidden features of an MLP: the ratio times the width, rounded down."""
    return int(ratio * width)


def plain_blocks(
    width: int, blocks: Sequence[tuple[int, float]], head_dim: int | None = None, causal: bool = False
) -> nn.Sequential:
    """Return blocks of these heads and MLP ratios. Drop-path grows with depth, to all of the recipe's in the last."""
    return nn.Sequential(
        *(
            Block(width, heads, hidden_size(width, ratio), head_dim, causal, depth=i / len(blocks))
            for i, (heads, ratio) in enumerate(blocks, 1)
        )
    )


def initialise(network: nn.Module, *others: nn.Parameter) -> None:
    """Draw the weights of linear layers and embeddings, and others, with standard deviation 0.02; biases are zero."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    for parameter in others:
        nn.init.normal_(parameter, std=0.02)
