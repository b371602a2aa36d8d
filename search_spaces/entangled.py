"""Weight-entangled layers: all sizes of a layer are parts of one largest weight, and a mixture of them is one forward.

An `Axis` is a choice of sizes; under a mixture it becomes a `Span`, which says how many leading entries are used, and
the weight of each: entry j weighs as much as all sizes above j together, a staircase. A layer multiplies its largest
weight by the staircases of its axes and is computed once, whatever the number of options; where a mixture is a sample,
it takes the slice instead, so that a drawn path costs its own size.

On its way through a network a dimension is to be weighted *once*; everywhere else along it layers take `Span.plain`,
which cuts and does not weigh. Applied by two layers a weight would count squared. Nor may it stand in front of a batch
norm, which in training cancels any factor of a channel, nor in front of a ReLU, which has no gradient at zero: what
weighs nothing there could not be asked whether it should. So the layers that read a dimension weigh it, all of them:
the next convolution or linear layer, or, of a stream that passes many layers, the layer norm in front of each.

Source: Sukthanker et al., Weight-Entanglement Meets Gradient-Based Neural Architecture Search, 2023, arXiv:2312.10440.
Their code loops over the options, pads each slice and adds; it weights a dimension at every layer along it, and its
layer norm has the statistics of the largest width. Ours gives exactly the slice for a mixture of one option.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import Arch, ArchError, Mixture, SearchSpace, Supernet
from search_spaces.relaxed import prepare, recomputed


class Span:
    """How one axis is used in one forward: its leading entries, each times its weight.

    Attributes:
        mask: the weight of every entry, (size,) or (size, size), or () if all weigh the same; None: all weigh 1.
        sizes: the sizes that are mixed.
        weights: of each of them, (K,).
        stairs: for each of them ones where it reaches and zeros behind, (K, size), or (K, size, size) of a kernel.
        options: which of the axis's options they are: one, or all.
    """

    def __init__(self, sizes: Sequence[int], weights: Tensor, stairs: Tensor, options: slice) -> None:
        self.sizes, self.weights, self.stairs, self.options = tuple(sizes), weights, stairs, options
        # Here and not when it is asked for: the inside of a block, computed again, has to do just what it did before.
        self.mask: Tensor | None = weights[0]
        if len(self.sizes) > 1:
            self.mask = (weights @ stairs.flatten(1)).view(stairs.shape[1:])

    @property
    def size(self) -> int:
        """How many entries are used."""
        return self.stairs.shape[-1]

    @cached_property
    def plain(self) -> Span:
        """The same entries, each with weight 1: for all layers along a dimension but the one that weighs it."""
        span = copy.copy(self)
        span.mask = None
        return span

    def times(self, count: int) -> Span:
        """Return the span in which each entry is repeated: heads become the features of heads."""
        sizes = [size * count for size in self.sizes]
        return Span(sizes, self.weights, self.stairs.repeat_interleave(count, -1), self.options)


class Axis(nn.Module):
    """A choice of sizes of one axis.

    Args:
        sizes: one for each option of the site, ascending; options may have the same size.

    Raises:
        ArchError: sizes are missing, not ascending or no positive integers.

    Example:
        >>> width = Axis((2, 4))
        >>> width(Mixture({"width": torch.tensor([0.25, 0.75])}), "width").mask
        tensor([1.0000, 1.0000, 0.7500, 0.7500])
        >>> width(Mixture({"width": torch.tensor([1.0, 0.0])}, active={"width": (0,)}), "width").size
        2
    """

    stairs: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        if not self.sizes or any(type(size) is not int or size < 1 for size in self.sizes):
            raise ArchError(f"the sizes of an axis are positive integers, got {self.sizes}.")
        if list(self.sizes) != sorted(self.sizes):
            raise ArchError(f"the sizes of an axis ascend, got {self.sizes}. Sort the options.")
        self.register_buffer("stairs", self._stairs(), persistent=False)

    def _stairs(self) -> Tensor:
        return (torch.arange(self.sizes[-1]) < torch.tensor(self.sizes)[:, None]).float()

    def _cut(self, stairs: Tensor, size: int) -> Tensor:
        return stairs[:, :size]

    def forward(self, mixture: Mixture, site: str) -> Span:
        """Return the span that a mixture's weights of a site make of the axis.

        Of a sample only the option that was drawn is used. Where its weights ask for a gradient, though, all are: the
        option alone would have none behind a batch norm, and all together cost one forward of the largest.

        Raises:
            ArchError: the site has another number of weights than the axis has sizes.
        """
        weights = mixture[site]
        if len(weights) != len(self.sizes):
            raise ArchError(
                f"the mixture has {len(weights)} weights for {site!r}, which has {len(self.sizes)} sizes: "
                f"{', '.join(map(str, self.sizes))}. Give one weight for each."
            )
        active = () if mixture.active is None else mixture.active[site]
        if len(active) == 1 and not weights.requires_grad:
            (option,) = active
            options = slice(option, option + 1)
            return self._span(weights[options], options)
        return self._span(weights, slice(None))

    def beside(self, span: Span) -> Span:
        """Return the span of this axis where another axis of the same site has that one.

        Example:
            >>> span = Axis((16, 32))(Mixture({"width": torch.tensor([0.25, 0.75])}), "width")
            >>> Axis((2, 3)).beside(span).mask
            tensor([1.0000, 1.0000, 0.7500])
        """
        return self._span(span.weights, span.options)

    def _span(self, weights: Tensor, options: slice) -> Span:
        sizes = self.sizes[options]
        stairs = self._cut(self.stairs[options], sizes[-1])
        return Span(sizes, weights, stairs.to(weights.dtype), options)


class KernelAxis(Axis):
    """A choice of kernel sizes: each is the centre of the largest.

    Raises:
        ArchError: a size is even, or as for `Axis`.

    Example:
        >>> KernelAxis((1, 3))(Mixture({"kernel": torch.tensor([0.25, 0.75])}), "kernel").mask
        tensor([[0.7500, 0.7500, 0.7500],
                [0.7500, 1.0000, 0.7500],
                [0.7500, 0.7500, 0.7500]])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        check_kernels(sizes)
        super().__init__(sizes)

    def _stairs(self) -> Tensor:
        offset = (torch.arange(self.sizes[-1]) - self.sizes[-1] // 2).abs()
        ring = torch.maximum(offset[:, None], offset)
        return (ring <= torch.tensor(self.sizes)[:, None, None] // 2).float()

    def _cut(self, stairs: Tensor, size: int) -> Tensor:
        return _centre(stairs, size)


class CoupledAxis(nn.Module):
    """An axis whose size follows from two choices: the hidden features of an MLP, a ratio times its width.

    A weight between the two axes belongs to all pairs of options whose sizes both reach it: the matrix R^T diag(a b) C
    for the pairs' rows of ones R and C and weights a b. An independent choice of the two sizes would weigh it
    otherwise.

    Args:
        widths, ratios: the options of the two choices.
        size: the coupled size of a width and a ratio.
    """

    reach: Tensor

    def __init__(
        self, widths: Sequence[int], ratios: Sequence[int | float], size: Callable[[int, int | float], int]
    ) -> None:
        super().__init__()
        self.sizes = [[size(width, ratio) for ratio in ratios] for width in widths]
        largest = max(map(max, self.sizes))
        reach = torch.arange(largest) < torch.tensor(self.sizes)[..., None]
        self.register_buffer("reach", reach.float(), persistent=False)

    @property
    def size(self) -> int:
        """The largest size."""
        return self.reach.shape[-1]

    def forward(self, width: Span, ratio: Span) -> tuple[Span, Tensor | None]:
        """Return the span, and the weight of each of its entries with each entry of the width, (size, width.size).

        The second is for the layer between the two, whose input is then not to be weighted; None if there is one pair.
        """
        sizes = [size for row in self.sizes[width.options] for size in row[ratio.options]]
        rows = self.reach[width.options, ratio.options].flatten(0, 1)[:, : max(sizes)].to(width.weights.dtype)
        weights = torch.outer(width.weights, ratio.weights).flatten()
        span = Span(sizes, weights, rows, slice(None))
        if len(sizes) == 1:
            return span, None
        columns = width.stairs.repeat_interleave(len(ratio.sizes), 0)
        return span, (rows * weights[:, None]).T @ columns


class EntangledConv2d(nn.Conv2d):
    """A convolution of odd kernel, padded to keep the image size at stride 1, of which spans use a part.

    Leading channels and the centre of the kernel: `out` weighs output channels, `inputs` input channels, `kernel` the
    taps. An axis without a span is used whole.

    Args:
        group_width: channels of a group; 1 makes the convolution depthwise, ``None`` leaves it dense. A group keeps its
            width, and smaller sizes have fewer groups. Input and output then have equal sizes.

    Raises:
        ArchError: the kernel is even, or the channels are no multiple of the group's width.

    Example:
        >>> conv, width = EntangledConv2d(3, 8, kernel=5), Axis((4, 8))
        >>> span = width(Mixture({"width": torch.tensor([1.0, 0.0])}, active={"width": (0,)}), "width")
        >>> conv(torch.zeros(2, 3, 6, 6), out=span).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        *,
        group_width: int | None = None,
        bias: bool = False,
    ) -> None:
        check_kernels([kernel])
        if group_width is not None:
            check_multiple("a size of channels", c_out, "the group width", group_width)
            if c_in != c_out:
                raise ArchError(f"a convolution of groups has equal channels on both sides, got {c_in} and {c_out}.")
        groups = 1 if group_width is None else c_out // group_width
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        self.group_width = group_width

    def forward(
        self, x: Tensor, out: Span | None = None, inputs: Span | None = None, kernel: Span | None = None
    ) -> Tensor:
        weight = self.mixed_weight(out, inputs, kernel)
        groups = 1
        if self.group_width is not None:
            check_multiple("a size of channels", len(weight), "the group width", self.group_width)
            groups = len(weight) // self.group_width
        bias, padding, (stride, _) = _leading(self.bias, out), weight.shape[-1] // 2, self.stride
        if stride > 1 and weight.shape[-1] == 1:  # few of the channels: see `search_spaces.layouts.layout_for`
            x, stride = x[:, :, ::stride, ::stride], 1
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)

    def mixed_weight(self, out: Span | None = None, inputs: Span | None = None, kernel: Span | None = None) -> Tensor:
        """Return the weight of this forward: what is used of the largest, times the staircases."""
        weight, mask = self.weight, None
        if kernel is not None:
            weight, mask = _centre(weight, kernel.size), kernel.mask
        if inputs is not None and self.group_width is None:
            weight, mask = _first(weight, inputs.size, 1), _times(mask, inputs.mask, (-1, 1, 1))
        if out is not None:
            weight, mask = _first(weight, out.size), _times(mask, out.mask, (-1, 1, 1, 1))
        return weight if mask is None else weight * mask


class EntangledLinear(nn.Linear):
    """A linear layer of which spans use the leading outputs and inputs.

    Example:
        >>> layer, width = EntangledLinear(8, 3), Axis((4, 8))
        >>> span = width(Mixture({"width": torch.tensor([1.0, 0.0])}, active={"width": (0,)}), "width")
        >>> layer(torch.zeros(2, 4), inputs=span).shape
        torch.Size([2, 3])
    """

    def forward(
        self, x: Tensor, out: Span | None = None, inputs: Span | None = None, joint: Tensor | None = None
    ) -> Tensor:
        """Return the layer's output for (..., inputs.size) inputs: (..., out.size).

        Args:
            joint: of coupled axes the weight of each output with each input, (out.size, inputs.size), in place of the
                product of the two: see `CoupledAxis`.
        """
        weight, mask = self.weight, joint
        if inputs is not None:
            weight = _first(weight, inputs.size, 1)
            mask = mask if joint is not None else inputs.mask
        if out is not None:
            weight = _first(weight, out.size)
            mask = mask if joint is not None else _times(mask, out.mask, (-1, 1))
        return F.linear(x, weight if mask is None else weight * mask, _leading(self.bias, out))


class EntangledBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose scale and shift a span weighs: (B, span.size, H, W) to the same shape.

    All sizes share one set of running statistics; recalibrate those of a network that is taken out.
    """

    def forward(self, x: Tensor, span: Span | None = None) -> Tensor:
        size = self.num_features if span is None else span.size
        weight, bias = _leading(self.weight, span), _leading(self.bias, span)
        momentum, record = self.momentum, self.training and self.track_running_stats
        if record and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        known = record or not self.training
        mean, variance = (
            buffer[:size] if known and buffer is not None else None for buffer in (self.running_mean, self.running_var)
        )
        return F.batch_norm(x, mean, variance, weight, bias, self.training or mean is None, momentum or 0.0, self.eps)


class EntangledConvBN(nn.Module):
    """What `operations.ConvBN` is, of entangled layers: the norm weighs nothing, for a ReLU may follow."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, *, group_width: int | None = None) -> None:
        super().__init__()
        self.conv = EntangledConv2d(c_in, c_out, kernel, stride, group_width=group_width)
        self.norm = EntangledBatchNorm2d(c_out)

    def forward(
        self, x: Tensor, out: Span | None = None, inputs: Span | None = None, kernel: Span | None = None
    ) -> Tensor:
        out = None if out is None else out.plain
        y: Tensor = self.norm(self.conv(x, out, inputs, kernel), out)
        return y


class EntangledLayerNorm(nn.LayerNorm):
    """A layer norm over the last axis: the weighted sum of the layer norms of all sizes, each with its own statistics.

    Example:
        >>> norm, width = EntangledLayerNorm(4), Axis((2, 4))
        >>> x = torch.tensor([[1.0, 3.0, 7.0, 9.0]])
        >>> norm(x, width(Mixture({"width": torch.tensor([1.0, 0.0])}), "width")).round(decimals=3)
        tensor([[-1.,  1.,  0.,  0.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor, span: Span, mean: bool = False) -> Tensor:  # type: ignore[override]
        """Return the norm of (..., span.size) inputs.

        Args:
            mean: divide every entry by its weight: the weighted mean over the sizes that have it, for a layer behind
                that weighs the axis itself, jointly with its own. Of an entry whose sizes all weigh nothing it is their
                plain mean: the layer behind weighs it with zero, but can be asked what it would add.
        """
        gain, shift = _first(self.weight, span.size), _first(self.bias, span.size)
        if len(span.sizes) == 1:
            if not mean:
                gain, shift = gain * span.weights, shift * span.weights
            return F.layer_norm(x, (span.size,), gain, shift, self.eps)
        share = span.weights[:, None] * span.stairs  # what each size adds to the weight of every entry
        total = share.sum(0)
        if mean:
            reach, used = span.stairs / span.stairs.sum(0), total > torch.finfo(total.dtype).tiny
            share = torch.where(used, share / torch.where(used, total, 1.0), reach)
            total = torch.ones_like(total)
        shares, shift = share * gain, shift * total
        out = F.layer_norm(x, (span.size,), shares[-1], shift, self.eps)
        for size, weight in zip(span.sizes[:-1], shares, strict=False):
            y = F.layer_norm(x[..., :size], (size,), weight[:size], eps=self.eps)
            out = out + F.pad(y, (0, span.size - size))
        return out


class EntangledEmbedding(nn.Embedding):
    """An embedding of which a span uses the leading columns, and its transpose as an output layer (a tied head)."""

    def forward(self, tokens: Tensor, span: Span | None = None) -> Tensor:
        """Return the embeddings of int64 tokens (...): (..., span.size)."""
        return F.embedding(tokens, self._columns(span))

    def head(self, x: Tensor, span: Span | None = None) -> Tensor:
        """Return the logits of (..., span.size) features: (..., tokens)."""
        return F.linear(x, self._columns(span))

    def _columns(self, span: Span | None) -> Tensor:
        if span is None:
            return self.weight
        columns = _first(self.weight, span.size, 1)
        return columns if span.mask is None else columns * span.mask


class EntangledAttention(nn.Module):
    """Multi-head self-attention of which spans use leading features and heads: (B, T, width) to the same shape.

    Query, key and value are sliced separately, and logits are scaled by the true head dimension. Heads are weighted
    once, in the projection's columns, so that the logits stay as they are.

    Args:
        widths: options of the number of features.
        heads: options of the number of heads.
        head_dim: features of a head, the same for all sizes; ``None`` divides the width among the heads, which takes
            one attention for each pair of a width and a number of heads.
        causal: no token sees a later one.

    Raises:
        ArchError: a width is not divisible by a number of heads.
    """

    def __init__(
        self, widths: Sequence[int], heads: Sequence[int], head_dim: int | None = None, causal: bool = False
    ) -> None:
        super().__init__()
        if head_dim is None:
            for width in widths:
                for count in heads:
                    check_multiple("a width", width, "the number of heads", count)
        self.head_dim, self.causal, self.heads = head_dim, causal, tuple(heads)
        inner = widths[-1] if head_dim is None else self.heads[-1] * head_dim
        self.query, self.key, self.value = (EntangledLinear(widths[-1], inner) for _ in range(3))
        self.projection = EntangledLinear(inner, widths[-1])

    def forward(self, x: Tensor, width: Span, heads: Span) -> Tensor:
        """Return the attention's output.

        Args:
            x: where the head dimension is fixed, features weighted by `width`; else not, for pairs of a width and
                heads are weighted together (`EntangledLayerNorm`, `mean`).
            width: of the features.
            heads: of the heads, sizes counted in heads.
        """
        if self.head_dim is not None:
            inner = heads.times(self.head_dim)
            q, k, v = (layer(x, inner.plain, width.plain) for layer in (self.query, self.key, self.value))
            y = attend(q, k, v, heads.size, self.causal)
            return self._projected(y, width, inner)
        total: Tensor | None = None
        for size, by_width in zip(width.sizes, width.weights, strict=True):
            # Each width reads its own features alone: of a wider one, which may weigh next to nothing, it has none.
            own = _first(x, size, -1)
            q, k, v = (
                F.linear(own, _first(_first(layer.weight, size), size, 1), _first(layer.bias, size))
                for layer in (self.query, self.key, self.value)
            )
            for count, by_heads in zip(heads.sizes, heads.weights, strict=True):
                y = attend(q, k, v, count, self.causal)
                y = F.pad(y * (by_width * by_heads), (0, width.size - size))
                total = y if total is None else total + y
        assert total is not None
        return self._projected(total, width, width.plain)

    def _projected(self, y: Tensor, width: Span, inner: Span) -> Tensor:
        out: Tensor = self.projection(y, width.plain, inner)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Return the attention of (B, T, features) queries, keys and values, their features divided among heads."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class EntangledSupernet(Supernet):
    """A supernet of entangled layers, whose modules have the names they have in the networks of the space.

    So a network is taken out by copying, for each of its tensors, that part of the supernet's tensor of the same name
    which its shape says: leading entries, of kernels the centre.

    Args:
        space: its decisions are the sites.
        axes: an axis for each site.
        recompute: save memory: keep the inputs of blocks and compute their inside again in the backward pass.
    """

    def __init__(self, space: SearchSpace, axes: Mapping[str, Axis], *, recompute: bool = False) -> None:
        super().__init__(space)
        self.axes, self.recompute = nn.ModuleDict(axes), recompute

    def spans(self, mixture: Mixture) -> dict[str, Span]:
        """Return the span of every site.

        Raises:
            ArchError: the mixture does not fit the space's sites, or adds others.
        """
        if mixture.add_others:
            raise ArchError(
                "add_others=True: in weight-entangled supernets options that were not drawn have gradients anyway. "
                "Leave it out."
            )
        mixture = prepare(self.space, mixture, next(self.parameters()))
        return {site: axis(mixture, site) for site, axis in self.axes.items()}

    def through(self, x: Tensor, blocks: Iterable[nn.Module], depth: Span, *spans: Sequence[Span]) -> Tensor:
        """Return the outputs after so many blocks as the sizes of `depth` say, weighted and added.

        Args:
            blocks: each is given x and its item of each of `spans`.
        """
        total: Tensor | None = None
        weights = dict(zip(depth.sizes, depth.weights, strict=True))
        for count, (block, *own) in enumerate(zip(blocks, *spans, strict=False), 1):
            if count > depth.size:
                break
            x = self.inside(block, x, *own)
            if count in weights:
                total = x * weights[count] if total is None else torch.addcmul(total, x, weights[count])
        assert total is not None
        return total

    def inside(self, block: nn.Module, x: Tensor, *spans: Span | None) -> Tensor:
        """Return what a block gives for x and these spans; `recompute` keeps nothing of its inside."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return recomputed(block, block, x, *spans)
        out: Tensor = block(x, *spans)
        return out

    def extract(self, arch: Arch) -> nn.Module:
        with torch.device("meta"):  # shapes and names alone: nothing is initialised, nor drawn
            network = self.space.build(arch)
        ours = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        network.load_state_dict(
            {name: _part(ours[name].detach(), small.shape).clone() for name, small in network.state_dict().items()},
            assign=True,
        )
        return network.train(self.training)


def check_kernels(sizes: Sequence[int]) -> None:
    """Raise `ArchError` if a kernel has an even size."""
    if even := [size for size in sizes if type(size) is int and size % 2 == 0]:
        raise ArchError(
            f"kernels have odd sizes, for smaller ones are the centres of larger; got {even[0]} in {tuple(sizes)}."
        )


def check_multiple(what: str, size: int, of: str, unit: int) -> None:
    """Raise `ArchError` if a size is not divisible by a unit."""
    if unit < 1:
        raise ArchError(f"{of} is {unit}; it is a positive integer.")
    if size % unit:
        raise ArchError(f"{what} is {size}, which is not divisible by {of}, {unit}. Give multiples of {unit}.")


def _centre(weight: Tensor, size: int) -> Tensor:
    """The central square of the last two axes."""
    rim = (weight.shape[-1] - size) // 2
    return weight[..., rim : rim + size, rim : rim + size] if rim else weight


def _part(largest: Tensor, shape: torch.Size) -> Tensor:
    """What of a tensor is used by a network that has it in this shape."""
    if len(shape) == 4:
        largest = _centre(largest, shape[-1])
    return largest[tuple(slice(size) for size in shape)]


def _first(tensor: Tensor, size: int, dim: int = 0) -> Tensor:
    """The leading entries along an axis; of a whole axis no view, whose backward pass would be a copy."""
    return tensor if tensor.shape[dim] == size else tensor.narrow(dim, 0, size)


def _leading(vector: Tensor | None, span: Span | None) -> Tensor | None:
    """What a span uses of a bias, a scale or a shift."""
    if vector is None or span is None:
        return vector
    vector = _first(vector, span.size)
    return vector if span.mask is None else vector * span.mask


def _times(mask: Tensor | None, factor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The product of two masks, the second brought into this shape if it is a vector; None is 1."""
    if factor is None:
        return mask
    factor = factor.view(shape) if factor.dim() else factor
    return factor if mask is None else mask * factor
