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
from search_spaces.grouped import Depthwise, Folded, phases_of, repeat, rows_of
from search_spaces.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv

FORMS = ("fast", "textbook")
# What the fast form knows: classes of operations, those without weights, and all others, which it computes one by one.
_KINDS = (SepConv, DilConv, ReLUConvBN, FactorizedReduce, "shared", "other")
_Term = tuple[Tensor, list[Any], Tensor]  # weights, modules of all edges, what their last 1x1 convolutions read


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
        self.kinds = [
            {name: _kind(module) for name, module in self.edges[names[0]].items()} if names else {}  # type: ignore[operator]
            for names in self.leaving
        ]

    def forward(self, mixture: Mixture, *states: Tensor) -> Tensor:
        """Return the outputs for the input states. The mixture has the dtype and the device of the states."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self._compute(mixture, *states)
        return recomputed(self, self._compute, mixture, *states)

    def chosen(self, edge: str, name: str) -> nn.Module:
        """Return the module of one operation of one edge, with the channels that pass it by."""
        op: nn.Module = self.edges[edge][name]  # type: ignore[index]
        parts, stride = self.partial_channels, self.strides[self.ends[edge][0]]
        return op if parts == 1 else PartialChannels(op, parts, stride)

    def _compute(self, mixture: Mixture, *inputs: Tensor) -> Tensor:
        states = list(inputs)
        dense = mixture.active is None and self.form == "fast" and self.training
        if dense and not torch.is_autocast_enabled(inputs[0].device.type):
            self._by_state(mixture, states)
        else:
            self._by_operation(mixture, states)
        found = [states[state] for state in self.outputs]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _size(self, x: Tensor, source: int) -> tuple[int, int]:
        """Height and width behind the edges that leave a state x."""
        return -(-x.shape[2] // self.strides[source]), -(-x.shape[3] // self.strides[source])

    def _edge_weight(self, edge: str, mixture: Mixture) -> Tensor | None:
        source, target = self.ends[edge]
        site = self.node_sites.get(target)
        return mixture[site][source] if site is not None and site in mixture else None

    # One operation after the other ------------------------------------------------------------------------------------

    def _by_operation(self, mixture: Mixture, states: list[Tensor]) -> None:
        paths = self._paths(mixture)
        x = states[0]
        shape = (x.shape[0], self.channels, *self._size(x, 0))
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
        if total is None:  # nothing but `none`
            stride = self.strides[self.ends[edge][0]]
            total = x.new_zeros(x.shape[0], width, *(-(-side // stride) for side in x.shape[2:]))
        if mixture.add_others and mixture.active is not None:
            total = total + (mixture[edge].sum() - sum(mixture[edge][i] for i in mixture.active[edge]))
        if self.partial_channels > 1:
            total = _with_rest(total, x[:, width:], self.strides[self.ends[edge][0]], self.partial_channels)
        weight = self._edge_weight(edge, mixture)
        return total if weight is None else weight * total

    def _paths(self, mixture: Mixture) -> dict[str, list[int]]:
        """The operations to compute, for every edge that has some and that the outputs depend on."""
        active = mixture.active
        every = tuple(range(len(self.operations)))
        taken = {edge: every if active is None else active.get(edge, ()) for edge in self.ends}
        paths = {edge: [i for i in path if self.operations[i] != "none"] for edge, path in taken.items()}
        needed = set(self.outputs)
        for node in range(self.states - 1, self.inputs - 1, -1):
            if node in needed:
                needed |= {source for edge, source in self._entering(node) if paths[edge]}
        computed = {edge for edge, path in paths.items() if path or (mixture.add_others and taken[edge])}
        return {edge: path for edge, path in paths.items() if edge in computed and self.ends[edge][1] in needed}

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
                rests.shape = x.shape[0], *self._size(x, source)
                rests.mix(weights.new_ones(len(scales), 1) if scale is None else scale, [rest])
                x = x[:, :width]
            sums.shape = x.shape[0], *self._size(x, source)
            self._leave(source, x.contiguous(memory_format=torch.channels_last), weights, sums)
        states.append(self._node(sums, rests))

    def _node(self, sums: _Sums, rests: _Sums) -> Tensor:
        node, parts = sums.pop(), self.partial_channels
        return node if parts == 1 else _shuffle(torch.cat([node, rests.pop()], dim=1), parts)

    def _leave(self, source: int, x: Tensor, weights: Tensor, sums: _Sums) -> None:
        """Add the edges that leave a state x to the sums of their nodes; weights (edges, operations)."""
        stride, k = self.strides[source], len(self.leaving[source])
        relu = F.relu(x)
        # Kind -> its operations: a column of weights, and the modules of all edges.
        found: dict[Any, list[tuple[Tensor, list[Any]]]] = {kind: [] for kind in _KINDS}
        for i, name in enumerate(self.operations):
            if name != "none":
                modules: list[Any] = [self.edges[edge][name] for edge in self.leaving[source]]  # type: ignore[index]
                found[self.kinds[source][name]].append((weights[:, i], modules))

        if shared := [(column, _shared(x, group)) for column, group in found["shared"]]:
            sums.mix(torch.stack([column for column, _ in shared], dim=1), [y for _, y in shared])
        for column, group in found["other"]:
            sums.add(torch.cat([weight * m(x) for weight, m in zip(column, group, strict=True)], dim=1))
        for column, group in found[ReLUConvBN]:
            conv = group[0].conv
            y = F.conv2d(relu, _cat(group, "conv"), None, conv.stride, conv.padding, conv.dilation)
            sums.add(_norm(y, [m.norm for m in group], column))
        for column, group in found[FactorizedReduce]:
            halves = (relu, "conv1"), (F.pad(relu, (-1, 1, -1, 1)), "conv2")
            # Not a convolution with a stride: see `search_spaces.layouts.layout_for`.
            read = [(z[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last), n) for z, n in halves]
            y = torch.cat([F.conv2d(z, _cat(group, n)).unflatten(1, (k, -1)) for z, n in read], dim=2)
            sums.add(_norm(y.flatten(1, 2), [m.norm for m in group], column))

        terms: list[_Term] = []
        if separable := found[SepConv]:
            kernels = [_cat(group, "depthwise1") for _, group in separable]
            for (column, group), z in zip(separable, Depthwise.apply(stride, k, relu, *kernels), strict=True):
                points = torch.stack([m.pointwise1.weight.flatten(1) for m in group])
                y, _, *moments = Folded.apply(True, group[0].norm1.eps, None, None, points[None], z)
                _count([m.norm1 for m in group], *moments)
                terms.append((column, group, Depthwise.apply(1, 1, F.relu_(y), _cat(group, "depthwise2"))[0]))
        if dilated := found[DilConv]:
            kernels = [_cat(group, "depthwise") for _, group in dilated]
            halves_evenly = x.shape[2] % 2 == x.shape[3] % 2 == 0
            results: Sequence[Tensor]
            if stride == 2:  # only pixels of even rows and columns are read, and between these there is no dilation
                even = relu[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
                results = Depthwise.apply(1, k, even, *kernels)
            elif halves_evenly:
                results = Depthwise.apply(1, k, phases_of(relu), *kernels)
            else:
                results = [F.conv2d(repeat(relu, k), w, None, 1, w.shape[-1] - 1, 2, len(w)) for w in kernels]
            into: list[_Term] = [] if stride == 1 and halves_evenly else terms
            into += [(column, group, z) for (column, group), z in zip(dilated, results, strict=True)]
            if into is not terms:
                sums.phased = self._fold(into, sums, sums.phased)
        if terms:
            sums.plain = self._fold(terms, sums, sums.plain)

    def _fold(self, terms: Sequence[_Term], sums: _Sums, before: Tensor | None) -> Tensor:
        """Return the sums with the last 1x1 convolutions and batch norms of these operations added."""
        last = [[_last(m) for m in group] for _, group, _ in terms]
        points = torch.stack([torch.stack([conv.weight.flatten(1) for conv, _ in row]) for row in last])
        share = torch.stack([column for column, _, _ in terms])
        out: Tensor
        out, bias, *moments = Folded.apply(False, last[0][0][1].eps, before, share, points, *(z for *_, z in terms))
        _count([norm for row in last for _, norm in row], *moments)
        sums.bias = bias if sums.bias is None else sums.bias + bias
        return out


class _Sums:
    """What has been added so far to each of the nodes to come.

    Attributes:
        nodes: how many there are.
        shape: (B, H, W) of a node.
        plain: (nodes, B * H * W, C)
        phased: the same, of pixels in the order of `phases_of`.
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
        rows = rows_of(y, self.nodes)
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
    # A norm without a count of batches is computed for the second time, see `_SecondTime`.
    counting = [norm.track_running_stats and norm.num_batches_tracked is not None for norm in norms]
    moving: list[Any] = [norm for norm, counts in zip(norms, counting, strict=True) if counts]
    if not moving:
        return
    torch._foreach_add_([norm.num_batches_tracked for norm in moving], 1)
    momenta = [1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum for norm in moving]
    means, variances = ([row for row, counts in zip(t, counting, strict=True) if counts] for t in (mean, variance))
    torch._foreach_lerp_([norm.running_mean for norm in moving], means, momenta)
    torch._foreach_lerp_([norm.running_var for norm in moving], variances, momenta)


def _kind(module: nn.Module) -> Any:
    """Which of `_KINDS` it is. Batch norms with scale and shift are not provided for."""
    if not list(module.parameters()):
        return "shared"
    affine = any(isinstance(m, nn.BatchNorm2d) and m.affine for m in module.modules())
    return "other" if affine or type(module) not in _KINDS else type(module)


def _shared(x: Tensor, group: Sequence[Any]) -> Tensor:
    """An operation without weights, the same for all edges: at most it has a batch norm, and that of each counts."""
    first = group[0]
    if isinstance(first, nn.Sequential):
        pool: nn.Module = first.pool  # type: ignore[assignment]
        return _norm(pool(x), [m.norm for m in group])
    y: Tensor = first(x)
    return y


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
    pooled: Tensor = x if stride == 1 else F.max_pool2d(x, 2, ceil_mode=True)
    return pooled


def _shuffle(x: Tensor, parts: int) -> Tensor:
    """Interleave the parts: the first channel of each, then the second of each, ..."""
    shuffled: Tensor = x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)
    return shuffled


# For supernets --------------------------------------------------------------------------------------------------------


def recomputed(module: nn.Module, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Return what a function of a module gives, save its inputs alone, and call it again in the backward pass."""
    out: Tensor = checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _SecondTime(module)),
    )
    return out


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
    return mixture.map(lambda row: row.to(device=x.device, dtype=x.dtype, non_blocking=True))
