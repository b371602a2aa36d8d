"""Cells with every operation on every edge, weighted by a mixture: what supernets are made of.

The same function is written twice. The *textbook* form computes one operation after the other, as the published code of
DARTS does; the *fast* form gets the same numbers from fewer and larger calls. The first is the oracle of the second's
tests and what its benchmark compares with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from search_spaces.base import ArchError, Mixture, SearchSpace
from search_spaces.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv

FORMS = ("fast", "textbook")


class RelaxedCell(nn.Module):
    """A cell whose every edge is a weighted sum of all operations: states (B, C, H, W) to (B, outputs * C, H', W').

    States 0, 1, ... are the inputs, the nodes follow; every state has an edge to every later node. A node is the sum of
    its edges, each times its edge weight where the mixture has some for the node.

    A mixture with `active` is computed path by path: only its active operations, and only on edges that the outputs
    depend on. An edge with nothing but ``none`` active is left out. Any other mixture is computed in one of two forms:

    - *textbook*: every operation of every edge by itself. Evaluation and autocast use it too.
    - *fast*, state by state: one ReLU and one of each pool for all edges that leave a state, their depthwise
      convolutions as one; dilated ones as undilated ones of the four phases of the image (its even and odd rows and
      columns). Each 1x1 convolution, its batch norm and its weight become one matrix, since mean and variance of the
      output follow from those of the input; so neither the output nor its norm nor its product is ever stored.

    Args:
        edges: for every edge, by the name of its site: (source, target), in ascending order of target, then source.
        operations: the options of every edge, in the order of its weights.
        make: makes an operation by its name, channels and stride. ``none`` is never made.
        channels: of every state.
        inputs: how many states are given.
        outputs: the states whose concatenation is the output.
        reduction: edges from the inputs halve the image.
        node_sites: for nodes, the sites of their edge weights, one for each source.
        form: ``"fast"`` or ``"textbook"``; the attribute may be changed at any time.
        partial_channels: as in PC-DARTS, an edge mixes only the first of so many equal parts of the channels. The
            others pass it, through a 2x2 max pool where it halves the image, and all are shuffled.
        recompute: save the inputs only and compute the rest again in the backward pass.

    Raises:
        ArchError: there is no such form, or the channels cannot be divided into so many parts.

    Source: Liu et al., DARTS, ICLR 2019, arXiv:1806.09055; Xu et al., PC-DARTS, ICLR 2020, arXiv:1907.05737. Ours pads
    odd images in the 2x2 max pool, so that they fit the strided operations.

    Example:
        >>> from search_spaces.operations import operation
        >>> make = lambda name, c, stride: operation(name, c, c, stride, search=True)
        >>> cell = RelaxedCell({"a": (0, 1)}, ("none", "skip_connect", "sep_conv_3x3"), make, 4, outputs=(1,))
        >>> cell(Mixture({"a": torch.tensor([0.0, 1.0, 0.0])}), torch.ones(2, 4, 3, 3)).mean()
        tensor(1., grad_fn=<MeanBackward0>)
    """

    def __init__(
        self,
        edges: Mapping[str, tuple[int, int]],
        operations: Sequence[str],
        make: Callable[[str, int, int], nn.Module],
        channels: int,
        *,
        outputs: Sequence[int],
        inputs: int = 1,
        reduction: bool = False,
        node_sites: Mapping[int, str] | None = None,
        form: str = "fast",
        partial_channels: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_settings("RelaxedCell", form, partial_channels, channels)
        self.form, self.recompute = form, recompute
        self.channels, self.partial_channels, self.inputs = channels, partial_channels, inputs
        self.operations, self.outputs = tuple(operations), tuple(outputs)
        self.node_sites = dict(node_sites or {})
        self.ends = dict(edges)
        self.states = 1 + max(target for _, target in self.ends.values())
        self.leaving = [[e for e, (source, _) in self.ends.items() if source == s] for s in range(self.states)]
        self.strides = [2 if reduction and source < inputs else 1 for source in range(self.states)]
        self.edges = nn.ModuleDict()
        for edge, (source, _) in self.ends.items():
            made = {
                o: make(o, channels // self.partial_channels, self.strides[source]) for o in operations if o != "none"
            }
            self.edges[edge] = nn.ModuleDict(made)

    def forward(self, mixture: Mixture, *states: Tensor) -> Tensor:
        """Return the outputs for the input states. The mixture has the dtype and the device of the states."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self._compute(mixture, *states)

        out: Tensor = checkpoint(
            self._compute,
            mixture,
            *states,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _SecondTime(self)),
        )
        return out

    def chosen(self, edge: str, name: str) -> nn.Module:
        """Return the module of one operation of one edge, with the channels that pass it by."""
        op: nn.Module = self.edges[edge][name]  # type: ignore[index]
        return (
            op
            if self.partial_channels == 1
            else PartialChannels(op, self.partial_channels, self.strides[self.ends[edge][0]])
        )

    def _compute(self, mixture: Mixture, *inputs: Tensor) -> Tensor:
        states = list(inputs)
        dense = mixture.active is None and self.form == "fast" and self.training
        if dense and not torch.is_autocast_enabled(inputs[0].device.type):
            self._by_state(mixture, states)
        else:
            self._by_operation(mixture, states)
        found = [states[state] for state in self.outputs]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _edge_weight(self, edge: str, mixture: Mixture) -> Tensor | None:
        source, target = self.ends[edge]
        site = self.node_sites.get(target)
        return mixture[site][source] if site in mixture else None

    # One operation after the other ------------------------------------------------------------------------------------

    def _by_operation(self, mixture: Mixture, states: list[Tensor]) -> None:
        paths = self._paths(mixture)
        x = states[0]
        shape = (x.shape[0], self.channels, *(-(-side // self.strides[0]) for side in x.shape[2:]))
        for node in range(self.inputs, self.states):
            total: Tensor | None = None
            for edge, source in self._entering(node):
                if edge in paths:
                    term = self._edge(edge, paths[edge], states[source], mixture)
                    total = term if total is None else total + term
            states.append(x.new_zeros(shape) if total is None else total)

    def _edge(self, edge: str, path: Sequence[int], x: Tensor, mixture: Mixture) -> Tensor:
        width = x.shape[1] // self.partial_channels
        total: Tensor | None = None
        for i in path:
            term = mixture[edge][i] * self.edges[edge][self.operations[i]](x[:, :width])  # type: ignore[index]
            total = term if total is None else total + term
        assert total is not None
        if self.partial_channels > 1:
            total = _with_rest(total, x[:, width:], self.strides[self.ends[edge][0]], self.partial_channels)
        weight = self._edge_weight(edge, mixture)
        return total if weight is None else weight * total

    def _paths(self, mixture: Mixture) -> dict[str, list[int]]:
        """The operations to compute, for every edge that has some and that the outputs depend on."""
        active = mixture.active
        every = range(len(self.operations))
        paths = {e: [i for i in (every if active is None else active.get(e, ()))] for e in self.ends}
        paths = {e: [i for i in path if self.operations[i] != "none"] for e, path in paths.items()}
        needed = set(self.outputs)
        for node in range(self.states - 1, self.inputs - 1, -1):
            if node in needed:
                needed |= {source for edge, source in self._entering(node) if paths[edge]}
        return {edge: path for edge, path in paths.items() if path and self.ends[edge][1] in needed}

    def _entering(self, node: int) -> Iterator[tuple[str, int]]:
        return ((edge, source) for edge, (source, target) in self.ends.items() if target == node)

    # All edges of a state at once -------------------------------------------------------------------------------------

    def _by_state(self, mixture: Mixture, states: list[Tensor]) -> None:
        sums, rests = _Sums(self.states - self.inputs), _Sums(self.states - self.inputs)
        width = self.channels // self.partial_channels
        for source in range(self.states - 1):
            if source >= self.inputs:
                states.append(self._node(sums, rests))
            x = states[source]
            weights = torch.stack([mixture[edge] for edge in self.leaving[source]])
            scales = [self._edge_weight(edge, mixture) for edge in self.leaving[source]]
            scale: Tensor | None = None
            if any(s is not None for s in scales):
                scale = torch.stack([weights.new_ones(()) if s is None else s for s in scales]).unsqueeze(1)
                weights = weights * scale
            if self.partial_channels > 1:
                rest = _bypass(x[:, width:], self.strides[source])
                rests.shape = _spatial(rest)
                rests.mix(weights.new_ones(len(scales), 1) if scale is None else scale, [rest])
                x = x[:, :width]
            self._leave(source, x.contiguous(memory_format=torch.channels_last), weights, sums)
        states.append(self._node(sums, rests))

    def _node(self, sums: _Sums, rests: _Sums) -> Tensor:
        node = sums.pop()
        return (
            node
            if self.partial_channels == 1
            else _shuffle(torch.cat([node, rests.pop()], dim=1), self.partial_channels)
        )

    def _leave(self, source: int, x: Tensor, weights: Tensor, sums: _Sums) -> None:
        """Add the edges that leave a state x to the sums of their nodes; weights (edges, operations)."""
        stride, k = self.strides[source], len(self.leaving[source])
        relu = F.relu(x)
        modules = [[self.edges[edge][o] for edge in self.leaving[source]] for o in self.operations if o != "none"]  # type: ignore[index]
        columns = [weights[:, i] for i, o in enumerate(self.operations) if o != "none"]
        groups: dict[type[nn.Module], list[tuple[Tensor, list[Any]]]] = {}
        for column, group in zip(columns, modules, strict=True):
            groups.setdefault(type(group[0]), []).append((column, group))

        sums.shape = (x.shape[0], *(-(-side // stride) for side in x.shape[2:]))
        convolutions = groups.pop(ReLUConvBN, []), groups.pop(FactorizedReduce, [])
        separable, dilated = groups.pop(SepConv, []), groups.pop(DilConv, [])
        # What has no weights is the same for all edges.
        shared = [(column, _shared(x, group)) for rest in groups.values() for column, group in rest]
        if shared:
            sums.mix(torch.stack([column for column, _ in shared], dim=1), [y for _, y in shared])
        for column, group in convolutions[0]:
            conv = group[0].conv
            y = F.conv2d(relu, _cat(group, "conv"), None, conv.stride, conv.padding, conv.dilation)
            sums.add(_norm(y, [m.norm for m in group], column))
        for column, group in convolutions[1]:
            halves = (relu, "conv1"), (F.pad(relu, (-1, 1, -1, 1)), "conv2")
            y = torch.cat([F.conv2d(z, _cat(group, n), stride=2).unflatten(1, (k, -1)) for z, n in halves], dim=2)
            sums.add(_norm(y.flatten(1, 2), [m.norm for m in group], column))

        terms: list[tuple[Tensor, list[Any], Tensor]] = []
        if separable:
            kernels = [_cat(group, "depthwise1") for _, group in separable]
            for (column, group), z in zip(separable, _Depthwise.apply(stride, k, relu, *kernels), strict=True):
                points = torch.stack([m.pointwise1.weight.flatten(1) for m in group])
                y, _, *moments = _Folded.apply(True, group[0].norm1.eps, None, None, points[None], z)
                _count([m.norm1 for m in group], *moments)
                terms.append((column, group, _Depthwise.apply(1, 1, F.relu_(y), _cat(group, "depthwise2"))[0]))
        if dilated:
            kernels = [_cat(group, "depthwise") for _, group in dilated]
            if stride == 2:
                # Every second pixel of an image dilated by 2 is that of an undilated one of every second pixel.
                results = _Depthwise.apply(
                    1, k, relu[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last), *kernels
                )
            elif x.shape[2] % 2 or x.shape[3] % 2:
                results = [F.conv2d(_repeat(relu, k), w, None, 1, w.shape[-1] - 1, 2, w.shape[0]) for w in kernels]
            else:
                results = _Depthwise.apply(1, k, _phases(relu), *kernels)
                sums.phased = self._fold(
                    [(c, group, z) for (c, group), z in zip(dilated, results, strict=True)], sums, sums.phased
                )
                dilated = []
            terms += [(c, group, z) for (c, group), z in zip(dilated, results)]
        if terms:
            sums.plain = self._fold(terms, sums, sums.plain)

    def _fold(self, terms: Sequence[tuple[Tensor, list[Any], Tensor]], sums: _Sums, before: Tensor | None) -> Tensor:
        """Return the sums with the last 1x1 convolutions and batch norms of these operations added."""
        last = [[_last(m) for m in group] for _, group, _ in terms]
        points = torch.stack([torch.stack([conv.weight.flatten(1) for conv, _ in row]) for row in last])
        share = torch.stack([column for column, _, _ in terms])
        out, bias, *moments = _Folded.apply(False, last[0][0][1].eps, before, share, points, *(z for *_, z in terms))
        _count([norm for row in last for _, norm in row], *moments)
        sums.bias = bias if sums.bias is None else sums.bias + bias
        result: Tensor = out
        return result


class _Sums:
    """What has been added so far to each of the nodes to come.

    Attributes:
        nodes: how many there are.
        shape: (B, H, W) of a node.
        plain: (nodes, B * H * W, C)
        phased: the same, of pixels in the order of `_phases`.
        bias: (nodes, C), for all pixels.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.shape: tuple[int, int, int] = (0, 0, 0)
        self.plain: Tensor | None = None
        self.phased: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, y: Tensor) -> None:
        """Add (B, nodes * C, H, W)."""
        rows = _rows(y, self.nodes)
        self.plain = rows if self.plain is None else self.plain + rows

    def mix(self, weights: Tensor, terms: Sequence[Tensor]) -> None:
        """Add terms (B, C, H, W), weighted for each node: weights (nodes, terms)."""
        stack = torch.stack([y.permute(0, 2, 3, 1).reshape(-1) for y in terms])
        if self.plain is None:
            self.plain = torch.mm(weights, stack).view(len(weights), -1, terms[0].shape[1])
        else:
            self.plain = torch.addmm(self.plain.flatten(1), weights, stack).view_as(self.plain)

    def pop(self) -> Tensor:
        """Return the next node (B, C, H, W), and keep the sums of those after it."""
        node, self.plain = _first(self.plain)
        bias, self.bias = _first(self.bias)
        phased, self.phased = _first(self.phased)
        self.nodes -= 1
        assert node is not None
        node = node.reshape(*self.shape, -1)
        if bias is not None:
            node = node + bias
        if phased is not None:
            b, h, w = self.shape
            node = node + phased.view(2, 2, b, h // 2, w // 2, -1).permute(2, 3, 0, 4, 1, 5).reshape(b, h, w, -1)
        return node.permute(0, 3, 1, 2)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolutions of one image (B, C, H, W) with kernels of shape (copies * C, 1, k, k), padded by k // 2.

    Forward and input gradient are those of torch; oneDNN's weight gradient is fast for kernels of up to 3 columns only,
    so those of 5 are put together.
    """

    @staticmethod
    def forward(ctx: Any, stride: int, copies: int, x: Tensor, *kernels: Tensor) -> tuple[Tensor, ...]:
        ctx.stride, ctx.copies = stride, copies
        ctx.save_for_backward(x, *kernels)
        wide = _repeat(x, copies)
        return tuple(F.conv2d(wide, w, None, stride, w.shape[-1] // 2, 1, w.shape[0]) for w in kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kernels = ctx.saved_tensors
        stride, copies = ctx.stride, ctx.copies
        wide = _repeat(x, copies)
        dx: Tensor | None = None
        dw: list[Tensor | None] = []
        for g, w, wanted in zip(grads, kernels, ctx.needs_input_grad[3:], strict=True):
            g = g.contiguous(memory_format=torch.channels_last)
            if ctx.needs_input_grad[2]:
                if stride == 1:
                    part = F.conv2d(g, w.flip(2, 3), None, 1, w.shape[-1] // 2, 1, w.shape[0])
                else:
                    part = _convolution_backward(g, wide, w, stride, w.shape[-1] // 2, 0)
                dx = part if dx is None else dx.add_(part)
            dw.append(_weight_gradient(g, wide, w, stride) if wanted else None)
        if dx is not None and copies > 1:
            dx = _rows(dx, copies).sum(0).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        return None, None, dx, *dw


def _weight_gradient(g: Tensor, x: Tensor, w: Tensor, stride: int) -> Tensor:
    k = w.shape[-1]
    if k != 5 or stride != 1 or x.shape[-1] <= 2 or x.device.type != "cpu":
        return _convolution_backward(g, x, w, stride, (k // 2, k // 2), 1)
    rows = 2
    if x.shape[2] < k:  # it is not fast for images lower than the kernel either
        x, rows = F.pad(x, (0, 0, 2, 2)), 0
    middle = _convolution_backward(g, x, w[..., 1:4], 1, (rows, 1), 1)
    left = _convolution_backward(g, F.pad(x, (2, -2)), w[..., :1], 1, (rows, 0), 1)
    right = _convolution_backward(g, F.pad(x, (-2, 2)), w[..., 4:], 1, (rows, 0), 1)
    return torch.cat([left, middle, right], dim=-1)


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, stride: int, padding: Any, which: int) -> Tensor:
    """The gradient of a depthwise convolution's input (which = 0) or weight (1)."""
    pads = [padding, padding] if isinstance(padding, int) else list(padding)
    mask = [which == 0, which == 1, False]
    grads = torch.ops.aten.convolution_backward(
        g, x, w, None, [stride, stride], pads, [1, 1], False, [0, 0], x.shape[1], mask
    )
    out: Tensor = grads[which]
    return out


class _Folded(torch.autograd.Function):
    """Sum over n images of 1x1 convolutions, each with batch norm of its own statistics and times its weight.

    Where z has mean m and second moments S, P z has mean P m and variance diag(P S P') - (P m)^2. So norm and weight
    become part of the matrix, a P / sqrt(variance + eps), and a bias. For K edges at once:

    Args:
        before: (K, B * H * W, O) to add to, or None.
        a: weights (n, K), or None for ones.
        points: P, (n, K, O, C).
        images: n of shape (B, K * C, H, W), channels_last.
        wide: return (B, K * O, H, W), for one image.

    Returns:
        (K, B * H * W, O), without the bias, which comes second: (K, O). If `wide`, it is added already. Then mean and
        unbiased variance (n * K, O), which have no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, wide: bool, eps: float, before: Tensor | None, a: Tensor | None, points: Tensor, *images: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.wide, ctx.eps, ctx.more = wide, eps, before is not None
        means, squares = _moments(images, points.shape[1])
        matrix, bias, mean, variance = _matrix(means, squares, points, a, eps)
        out = _apply(wide, before, matrix, bias, images)
        ctx.save_for_backward(means, squares, points, a, *images)
        count = images[0].numel() // images[0].shape[1]
        statistics = mean.flatten(0, 1), variance.flatten(0, 1) * (count / max(count - 1, 1))
        ctx.mark_non_differentiable(*statistics)
        return out, bias, *statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_bias: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        means, squares, points, a, *images = ctx.saved_tensors
        k = points.shape[1]
        g_before = g if ctx.more else None
        if torch.is_grad_enabled():  # it will be differentiated again: take the way that torch can follow
            inputs = (a, points, *images)
            needed = [t for t in inputs if t is not None and t.requires_grad]
            matrix, bias, _, _ = _matrix(*_moments(images, k), points, a, ctx.eps)
            out = _apply(ctx.wide, None, matrix, bias, images)
            found = iter(torch.autograd.grad((out, bias), needed, (g, g_bias), create_graph=True))
            grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
            return None, None, g_before, *grads
        rows = [_rows(z, k) for z in images]
        if ctx.wide:
            g = _rows(g, k)
            g_bias = g_bias + g.sum(1)
        # The steps of `_matrix` backwards. A second moment is symmetric, and so is its gradient.
        count = rows[0].shape[1]
        g_matrix = torch.stack([torch.bmm(g.transpose(1, 2), z) for z in rows])
        mean = torch.matmul(points, means.unsqueeze(-1)).squeeze(-1)
        mixed = torch.matmul(points, squares)
        variance = (mixed * points).sum(-1) - mean * mean
        root = torch.rsqrt(variance.clamp(min=0) + ctx.eps)
        scale = root if a is None else root * a.unsqueeze(-1)
        g_scale = (g_matrix * points).sum(-1) - g_bias * mean
        g_a = None if a is None else (g_scale * root).sum(-1)
        g_variance = -0.5 * g_scale * scale * root * root * (variance >= 0)
        g_mean = -g_bias * scale - 2 * mean * g_variance
        g_points = g_matrix * scale.unsqueeze(-1) + 2 * g_variance.unsqueeze(-1) * mixed
        g_points += g_mean.unsqueeze(-1) * means.unsqueeze(-2)
        matrix = points * scale.unsqueeze(-1)
        from_squares = torch.matmul(points.transpose(-1, -2), points * (g_variance * (2 / count)).unsqueeze(-1))
        from_means = torch.matmul(g_mean.unsqueeze(-2), points).squeeze(-2) / count
        g_images: list[Tensor | None] = []
        for i, z in enumerate(images):
            if not ctx.needs_input_grad[5 + i]:
                g_images.append(None)
                continue
            dz = F.conv2d(z, from_squares[i].flatten(0, 1)[..., None, None], from_means[i].flatten(), groups=k)
            dz = dz.contiguous(memory_format=torch.channels_last)
            dz.permute(0, 2, 3, 1).view(count, k, -1).transpose(0, 1).baddbmm_(g, matrix[i])
            g_images.append(dz)
        return None, None, g_before, g_a, g_points, *g_images


def _moments(images: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Means (n, K, C) and second moments (n, K, C, C) of n images of K groups of channels, over their pixels."""
    rows = [_rows(z, k) for z in images]
    squares = torch.stack([torch.bmm(z.transpose(1, 2), z) for z in rows]) / rows[0].shape[1]
    means = torch.stack([z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).mean(0).view(k, -1) for z in images])
    return means, squares


def _matrix(
    means: Tensor, squares: Tensor, points: Tensor, a: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrix (n, K, O, C), bias (K, O), and mean and variance (n, K, O) of what they are applied to."""
    mean = torch.matmul(points, means.unsqueeze(-1)).squeeze(-1)
    # Rounding may leave a variance of 0 below it, by more than eps.
    variance = ((torch.matmul(points, squares) * points).sum(-1) - mean * mean).clamp(min=0)
    scale = torch.rsqrt(variance + eps)
    if a is not None:
        scale = scale * a.unsqueeze(-1)
    return points * scale.unsqueeze(-1), -(mean * scale).sum(0), mean, variance


def _apply(wide: bool, before: Tensor | None, matrix: Tensor, bias: Tensor, images: Sequence[Tensor]) -> Tensor:
    if wide:
        return F.conv2d(images[0], matrix.flatten(0, 2)[..., None, None], bias.flatten(), groups=len(bias))
    first, *others = zip((_rows(z, len(bias)) for z in images), matrix.transpose(-1, -2), strict=True)
    out = torch.bmm(*first) if before is None else torch.baddbmm(before, *first)
    for rows, m in others:
        out.baddbmm_(rows, m)
    return out


def _norm(y: Tensor, norms: Sequence[nn.BatchNorm2d], weight: Tensor | None = None) -> Tensor:
    """Batch norms without scale side by side, each times its weight if given; or one for all, and every norm counts."""
    c = y.shape[1]
    scale = None if weight is None else weight.repeat_interleave(c // len(norms))
    mean, variance = torch.zeros_like(y[0, :, 0, 0]), torch.zeros_like(y[0, :, 0, 0])
    # With momentum 1 they become those of this batch, the variance unbiased.
    y = F.batch_norm(y, mean, variance, scale, None, True, 1.0, norms[0].eps)
    width = norms[0].num_features
    _count(norms, mean.view(-1, width).expand(len(norms), -1), variance.view(-1, width).expand(len(norms), -1))
    return y


@torch.no_grad()
def _count(norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor) -> None:
    """Count a batch of mean and unbiased variance (norms, C) in the running statistics, as the norms themselves do."""
    # No count of batches: this is the second time, see `_SecondTime`.
    counts = [norm.num_batches_tracked if norm.track_running_stats else None for norm in norms]
    places = [i for i, count in enumerate(counts) if count is not None]
    if not places:
        return
    torch._foreach_add_([counts[i] for i in places], 1)
    momenta = [1.0 / float(counts[i]) if norms[i].momentum is None else norms[i].momentum for i in places]
    for buffer, batch in (("running_mean", mean.unbind()), ("running_var", variance.unbind())):
        torch._foreach_lerp_([getattr(norms[i], buffer) for i in places], [batch[i] for i in places], momenta)


def _shared(x: Tensor, group: Sequence[Any]) -> Tensor:
    """An operation that has no weights, of which every edge has a copy: at most it has a batch norm to count."""
    first = group[0]
    return _norm(first.pool(x), [m.norm for m in group]) if isinstance(first, nn.Sequential) else first(x)


def _last(module: SepConv | DilConv) -> tuple[Any, Any]:
    return (module.pointwise2, module.norm2) if isinstance(module, SepConv) else (module.pointwise, module.norm)


def _cat(modules: Sequence[Any], name: str) -> Tensor:
    return torch.cat([getattr(module, name).weight for module in modules])


def _first(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The first row, and the others if there are any."""
    if x is None or len(x) == 1:
        return (None if x is None else x.squeeze(0)), None
    first, others = x.split([1, len(x) - 1])
    return first.squeeze(0), others


def _rows(x: Tensor, k: int) -> Tensor:
    """(B, K * C, H, W) as (K, B * H * W, C), without a copy where it is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, k, x.shape[1] // k).transpose(0, 1)


def _repeat(x: Tensor, k: int) -> Tensor:
    """(B, C, H, W) as k copies side by side, (B, k * C, H, W)."""
    return x if k == 1 else torch.cat([x.permute(0, 2, 3, 1)] * k, dim=3).permute(0, 3, 1, 2)


def _phases(x: Tensor) -> Tensor:
    """The pixels of even and odd rows and columns as images of their own, (4 * B, C, H / 2, W / 2)."""
    b, c, h, w = x.shape
    split = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5)
    return split.reshape(4 * b, h // 2, w // 2, c).permute(0, 3, 1, 2)


def _spatial(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


# Partial channels -----------------------------------------------------------------------------------------------------


class PartialChannels(nn.Module):
    """An operation on the first of equal parts of the channels, the others passed by: as in a cell of PC-DARTS.

    Example:
        >>> PartialChannels(nn.Identity(), parts=2)(torch.arange(4.0).view(1, 4, 1, 1)).flatten()
        tensor([0., 2., 1., 3.])
    """

    def __init__(self, op: nn.Module, parts: int, stride: int = 1) -> None:
        super().__init__()
        self.op, self.partial_channels, self.stride = op, parts, stride

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1] // self.partial_channels
        return _with_rest(self.op(x[:, :width]), x[:, width:], self.stride, self.partial_channels)


def _with_rest(mixed: Tensor, rest: Tensor, stride: int, parts: int) -> Tensor:
    return _shuffle(torch.cat([mixed, _bypass(rest, stride)], dim=1), parts)


def _bypass(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else F.max_pool2d(x, 2, ceil_mode=True)


def _shuffle(x: Tensor, parts: int) -> Tensor:
    """Interleave the parts: the first channel of each, then the second of each, ..."""
    return x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


# For supernets --------------------------------------------------------------------------------------------------------


class _SecondTime(AbstractContextManager[None]):
    """Within it, a batch that was computed before is computed again: batch norms do not count it a second time.

    Recomputation must save as many tensors as the first time, the running statistics of batch norms among them. So
    norms go on to track them as they did when this was made, only with momentum 0.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.then = [(norm, norm.track_running_stats) for norm in norms]
        self.now: list[tuple[bool, float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self.now = [(norm.track_running_stats, norm.momentum, norm.num_batches_tracked) for norm, _ in self.then]
        for norm, tracked in self.then:
            norm.track_running_stats, norm.momentum, norm.num_batches_tracked = tracked, 0.0, None

    def __exit__(self, *error: object) -> None:
        for (norm, _), now in zip(self.then, self.now, strict=True):
            norm.track_running_stats, norm.momentum, norm.num_batches_tracked = now


def check_settings(owner: str, form: str, partial_channels: int, *channels: int) -> None:
    """Raise `ArchError` if these are no settings of a supernet whose cells have so many channels."""
    if form not in FORMS:
        raise ArchError(f"{owner} was given form={form!r}; choices are {', '.join(FORMS)}.")
    if type(partial_channels) is not int or partial_channels < 1:
        raise ArchError(f"{owner} was given partial_channels={partial_channels!r}; it is a positive integer.")
    if odd := [c for c in channels if c % partial_channels]:
        raise ArchError(
            f"{owner} was given partial_channels={partial_channels}, but a cell has {odd[0]} channels, which cannot be "
            f"divided into so many parts. Give channels that are a multiple of {partial_channels}."
        )


def prepare(space: SearchSpace, mixture: Mixture, x: Tensor) -> Mixture:
    """Return the mixture in the dtype and on the device of the images.

    Raises:
        ArchError: it does not fit the space's sites.
    """
    mixture.check(space.sites, optional=space.edge_sites)
    weights = {site: w.to(device=x.device, dtype=x.dtype, non_blocking=True) for site, w in mixture.items()}
    return Mixture(weights, mixture.active)
