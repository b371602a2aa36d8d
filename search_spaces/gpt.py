"""Small language models: transformers of one width and depth, whose blocks differ in heads and MLP ratio.

Source: the character-level language-model space of Sukthanker et al., Weight-Entanglement Meets Gradient-Based Neural
Architecture Search, 2023, arXiv:2312.10440; the network is that of Radford et al., Language Models are Unsupervised
Multitask Learners, 2019 (GPT-2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Mixture
from search_spaces.entangled import EntangledEmbedding
from search_spaces.transformer import TransformerSpace, TransformerSupernet, initialise, plain_blocks


@dataclass(frozen=True)
class GPT(TransformerSpace):
    """Character-level language models: up to six blocks, each with its own number of heads and MLP ratio.

    Decisions: `width` of all tokens, `depth`, and for block i `heads{i}` and `ratio{i}`, which times the width, rounded
    down, gives the hidden features of its MLP. Blocks beyond the depth have decisions too, which do not matter:
    `canonical` gives them the first option.

    The network reads int64 tokens (B, T), with T up to `context`, and returns logits (B, classes, T): for every token
    what it expects the next one to be, with classes where ``torch.nn.functional.cross_entropy`` wants them. No token
    sees a later one. Embedding and learned positions, pre-norm blocks with GELU, a layer norm, and the transposed
    embedding as the output layer. A head has the width divided by the number of heads.

    Args:
        widths: options of features of a token, divisible by each of `heads`.
        depths: options of blocks.
        heads: options of heads of a block.
        ratios: options of an MLP's hidden features, in multiples of the width.
        classes: number of different tokens; taken from the data if ``None``.
        context: the longest text, in tokens; taken from the data if ``None``.

    Raises:
        ArchError: a setting is not positive, options are missing or do not ascend, or heads do not divide a width.

    Example:
        >>> space = GPT(widths=(12, 24), depths=(1, 2), heads=(2, 3), classes=65, context=16)
        >>> arch = space.arch(width=24, depth=1, heads0=3, heads1=2, ratio0=4.0, ratio1=2.0)
        >>> space.build(arch)(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 65, 16])

    Source: the options of the paper (see the module); each block has its own heads and ratio. There is no dropout, and
    layers in front of a shortcut do not begin smaller in deeper networks, as GPT-2's do: a supernet has all depths.
    """

    widths: tuple[int, ...] = (96, 192, 384)
    depths: tuple[int, ...] = (4, 5, 6)
    heads: tuple[int, ...] = (2, 4, 6)
    ratios: tuple[float, ...] = (2, 3, 4)
    classes: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        self.check_settings()
        if odd := [(width, heads) for width in self.widths for heads in self.heads if width % heads]:
            width, heads = odd[0]
            raise ArchError(
                f"GPT was given widths={self.widths!r} and heads={self.heads!r}, but {width} features cannot be "
                f"divided among {heads} heads. Give widths that are multiples of every number of heads."
            )
        self.require_positive("classes", "context")

    def build(self, arch: Arch) -> nn.Module:
        """Return the network: int64 tokens (B, T), T up to the context, to (B, classes, T) logits.

        Weights are drawn from torch's global generator with a standard deviation of 0.02.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        arch = self.check(arch)
        self.require("classes", "context")
        return LanguageModel(self, arch)

    def supernet(self, *, recompute: bool = False) -> GPTSupernet:
        """Return a fresh supernet of entangled weights, as large as the largest network.

        Args:
            recompute: save memory: compute the inside of each block again in the backward pass.

        Raises:
            ArchError: the space is not bound to data.

        Example:
            >>> space = GPT(widths=(12, 24), depths=(1, 2), heads=(2, 3), classes=65, context=16)
            >>> supernet, arch = space.supernet(), space.at(7)
            >>> x = torch.randint(65, (2, 16))
            >>> torch.allclose(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x), atol=1e-5)
            True
        """
        self.require("classes", "context")
        return GPTSupernet(self, recompute)


class LanguageModel(nn.Module):
    """One network of the space `GPT`."""

    def __init__(self, space: GPT, arch: Arch) -> None:
        super().__init__()
        assert space.classes is not None and space.context is not None
        width, blocks = space.width_and_blocks(arch)
        self.embedding = nn.Embedding(space.classes, width)
        self.position = nn.Parameter(torch.empty(space.context, width))
        self.blocks = plain_blocks(width, blocks, causal=True)
        self.norm = nn.LayerNorm(width)
        initialise(self, self.position)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = _positions(self.position, tokens)  # first, for it knows what is no text
        x = self.embedding(tokens) + positions
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight).transpose(1, 2)


class GPTSupernet(TransformerSupernet):
    """All networks of the space `GPT`. Made by ``GPT(...).supernet()``."""

    def __init__(self, space: GPT, recompute: bool = False) -> None:
        super().__init__(space, causal=True, recompute=recompute)
        assert space.classes is not None and space.context is not None
        self.embedding = EntangledEmbedding(space.classes, space.widths[-1])
        self.position = nn.Parameter(torch.empty(space.context, space.widths[-1]))
        initialise(self, self.position)

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        spans = self.spans(mixture)
        width = spans["width"].plain
        positions = _positions(self.position, x)[:, : width.size]
        y = self.embedding(x, width) + positions
        return self.embedding.head(self.encoded(y, spans), width).transpose(1, 2)


def _positions(table: Tensor, tokens: Tensor) -> Tensor:
    """Return the position embeddings of (B, T) tokens: (T, width)."""
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ArchError(
            f"GPT reads int64 tokens of shape (batch, length), and was given {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}."
        )
    if tokens.shape[1] > len(table):
        raise ArchError(
            f"this GPT reads up to {len(table)} tokens, and was given {tokens.shape[1]}. Cut the text, or make the "
            f"space with context={tokens.shape[1]}."
        )
    return table[: tokens.shape[1]]


torch.fx.wrap("_positions")  # tracing would otherwise fail on its conditions
