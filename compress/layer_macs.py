"""Multiply-adds layer by layer, as a forward does them: those of dense weights, and those of weights that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from compress.errors import CompressionError
from compress.models import copy_of, require_values
from compress.tables import aligned
from compress.weights import weights
from search_spaces.tracing import switched, undisturbed

Example = Tensor | tuple[Any, ...]

SIDES = (32, 224)
"""Of images that are assumed where no example is given: the first that the model takes."""
_NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")


@dataclass(frozen=True)
class LayerMacs:
    """What a layer costs.

    Attributes:
        dense: multiply-adds of the forward, were all weights kept.
        sparse: those of the weights that are kept: inside the mask, or without a mask those that are not zero; all,
            where a layer is nothing but zeros.
        size: how many weights there are.
        kept: how many of them are kept.
    """

    dense: int
    sparse: int
    size: int
    kept: int


@dataclass(frozen=True, eq=False)
class Macs(Mapping[str, LayerMacs]):
    """Multiply-adds of one input by the names of `compress.weights`; made by `macs`. Prints as a table.

    Attributes:
        layers: the layers, in the order in which they are called first; those that are not called come last.
        other: multiply-adds without such a weight: the products of attention.
        norms: elements that norms give, which no multiply-adds are counted for.
        adds: sums of two tensors' elements, likewise.
        input: its shape, or shapes, where the model takes several tensors.
    """

    layers: Mapping[str, LayerMacs] = field(repr=False)
    other: int
    norms: int
    adds: int
    input: str

    @property
    def dense(self) -> int:
        """All multiply-adds, were all weights kept."""
        return self.other + sum(layer.dense for layer in self.layers.values())

    @property
    def sparse(self) -> int:
        """All multiply-adds of weights that are kept."""
        return self.other + sum(layer.sparse for layer in self.layers.values())

    def __getitem__(self, name: str) -> LayerMacs:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "weights", "density", "MACs", "kept MACs")]
        for name, own in self.layers.items():
            rows.append((name, f"{own.size:,}", f"{own.kept / own.size:.4f}", f"{own.dense:,}", f"{own.sparse:,}"))
        if self.other:
            rows.append(("without weights", "", "", f"{self.other:,}", f"{self.other:,}"))
        size, kept = (sum(getattr(own, part) for own in self.layers.values()) for part in ("size", "kept"))
        rows.append(("all", f"{size:,}", f"{kept / size:.4f}", f"{self.dense:,}", f"{self.sparse:,}"))
        return f"{aligned(rows)}\nof one input: {self.input}"


@dataclass(frozen=True)
class MacsComparison:
    """Multiply-adds of one input before and after a change of a model; made by `compare_macs`. Prints as a table.

    Attributes:
        before: of the first model.
        after: of the second.
    """

    before: Macs
    after: Macs

    @property
    def ratio(self) -> float:
        """Multiply-adds of kept weights, after over before."""
        return self.after.sparse / self.before.sparse

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "MACs before", "after", "ratio", "weights before", "kept after", "density")
        ]
        homes: dict[str, list[LayerMacs]] = {name: [] for name in self.before}
        for name, own in self.after.items():
            inside = [home for home in self.before if name == home or name.startswith(f"{home}.")]
            homes.setdefault(max(inside, key=len, default=name), []).append(own)
        for name, parts in homes.items():
            old = self.before.layers.get(name, LayerMacs(0, 0, 0, 0))
            rows.append(_row(name, old.sparse, sum(own.sparse for own in parts), old.kept, parts))
        if self.before.other or self.after.other:
            rows.append(_row("without weights", self.before.other, self.after.other, 0, []))
        kept = sum(own.kept for own in self.before.values())
        rows.append(_row("all", self.before.sparse, self.after.sparse, kept, list(self.after.values())))
        notes = [
            f"{what}: {old:,} elements before, {new:,} after, not among the MACs"
            for what, old, new in (
                ("norms", self.before.norms, self.after.norms),
                ("additions", self.before.adds, self.after.adds),
            )
            if old or new
        ]
        dense = (
            f"were masks not used: {self.after.dense:,} MACs, {self.after.dense / self.before.sparse:.2f} times before"
        )
        return "\n".join([aligned(rows), f"of one input: {self.after.input}", *notes, dense])


def macs(model: nn.Module, example: Example | None = None) -> Macs:
    """Return the multiply-adds of every layer for one input, counted operator by operator in a forward.

    Counted are those of convolutions, linear layers and attention, as often as they are called, however they are
    called; a weight that is pruned does none. A model without masks has the count of `nasbench.profile.measure`.

    Args:
        model: any module. Its mode, buffers and stored results stay as they are, as does torch's random state.
        example: a batch that it takes, (N, ...), of which the first input is used and counted. A tuple if the model
            takes several; then the first of each tensor. Default: see `assumed_input`.

    Raises:
        CompressionError: the model does not take the example, has no layer that is counted, or is on the ``meta``
            device.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
        >>> print(macs(net, torch.zeros(1, 3, 4, 4)))
        layer  weights  density   MACs  kept MACs
        0          216   1.0000  3,456      3,456
        3        1,280   1.0000  1,280      1,280
        all      1,496   1.0000  4,736      4,736
        of one input: 1 x 3 x 4 x 4
    """
    found = weights(model)
    if not found:
        raise CompressionError(f"{type(model).__name__} has no convolution, linear layer or attention to count.")
    if example is None:
        example = assumed_input(model)
    batch = example if isinstance(example, tuple) else (example,)
    inputs = tuple(x[:1] if isinstance(x, Tensor) and x.ndim else x for x in batch)
    twin = _twin(model)
    shapes = ", ".join(" x ".join(map(str, x.shape)) for x in inputs if isinstance(x, Tensor))
    with switched(twin, False), undisturbed(twin), parametrize.cached():
        counter = _Counter(twin)
        try:
            _run(twin, inputs, counter)
        except Exception as error:
            raise CompressionError(
                f"{type(model).__name__} stops on the example of shape {shapes}: {type(error).__name__}: "
                f"{str(error).rstrip(' .')}. Give example=x, a batch that it takes."
            ) from error
    order = dict.fromkeys((*counter.dense, *found))
    layers = {}
    for name in order:
        kept = int(counter.kept[name].sum())
        layers[name] = LayerMacs(counter.dense[name], counter.sparse[name], counter.kept[name].numel(), kept)
    return Macs(layers, counter.other, counter.norms, counter.adds, shapes)


def compare_macs(before: nn.Module, after: nn.Module, example: Example | None = None) -> MacsComparison:
    """Return the multiply-adds of two models for the same one input: a model, and what a compressor made of it.

    Layers of the second that lie in a module where the first has a layer count as that layer.

    Args:
        before: a model.
        after: another, of the same inputs.
        example: a batch that both take, of which one input is counted, as for `macs`.

    Raises:
        CompressionError: as `macs`.

    Example:
        >>> before = nn.Sequential(nn.Linear(4, 2))
        >>> after = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
        >>> print(compare_macs(before, after))
        layer  MACs before  after  ratio  weights before  kept after  density
        0                8     18  2.250               8          18   1.0000
        all              8     18  2.250               8          18   1.0000
        of one input: 1 x 4
        were masks not used: 18 MACs, 2.25 times before
    """
    if example is None:
        example = assumed_input(before)
    return MacsComparison(macs(before, example), macs(after, example))


def assumed_input(model: nn.Module) -> Tensor:
    """Return an input that a model takes, of zeros: an image of 32 or 224 pixels a side, or the features of a vector.

    Its channels or features are those of the model's first layer.

    Raises:
        CompressionError: it takes none of these.

    Example:
        >>> assumed_input(nn.Conv2d(3, 8, 3)).shape
        torch.Size([1, 3, 32, 32])
    """
    first = next((weight.module for weight in weights(model).values()), None)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, _ConvNd):
        shapes = [(1, first.in_channels, *[side] * len(first.kernel_size)) for side in SIDES]
    elif isinstance(first, nn.Linear):
        shapes = [(1, first.in_features)]
    for shape in shapes:
        twin = _twin(model)
        parameter = next(model.parameters())
        x = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        try:
            with switched(twin, False), undisturbed(twin):
                twin(x)
        except Exception:  # noqa: BLE001 - a model's own code may raise anything
            continue
        return x
    tried = " or ".join(" x ".join(map(str, shape)) for shape in shapes)
    raise CompressionError(
        f"how much {type(model).__name__} computes depends on its input, and it does not take "
        f"{tried or 'an image or a vector first'}. Give example=x, a batch that it takes."
    )


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy with the same parameters, for a forward that may store what it computes."""
    if any(map(is_lazy, model.parameters())):
        raise CompressionError(f"{type(model).__name__} has no weights yet: let it compute a batch once.")
    require_values(model)
    return copy_of(model, share_parameters=True)


def _run(model: nn.Module, inputs: tuple[Any, ...], counter: _Counter) -> None:
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention has no formula
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:  # whose products are counted one by one, on any device
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _Counter(TorchDispatchMode):
    """Counts the multiply-adds of every operator, for the weight that it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dense: Counter[str] = Counter()
        self.sparse: Counter[str] = Counter()
        self.other = self.norms = self.adds = 0
        self.kept: dict[str, Tensor] = {}
        self._places: list[tuple[int, int, str, Tensor]] = []  # where each weight lies; the tensor keeps it there
        for name, weight in weights(model).items():
            value = getattr(weight.module, weight.attribute)  # the masked one, cached for this forward
            kept = value != 0 if weight.mask is None else weight.mask
            self.kept[name] = kept if kept.any() else torch.ones_like(kept)  # it starts at zero, and is no pruned one
            start = value.data_ptr()
            self._places.append((start, start + value.numel() * value.element_size(), name, value))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func._overloadpacket
        name = str(operator).removeprefix("aten.")
        if operator in flop_registry:
            self._count(int(flop_registry[operator](*args, **kwargs, out_val=out)) // 2, args)
        elif any(norm in name for norm in _NORMS):
            self.norms += (out[0] if isinstance(out, tuple | list) else out).numel()
        elif name in ("add", "add_") and all(isinstance(x, Tensor) and x.shape == out.shape for x in args[:2]):
            self.adds += out.numel() if out.is_floating_point() else 0
        return out

    def _count(self, count: int, args: tuple[Any, ...]) -> None:
        """Note multiply-adds of an operator; a weight that it is given may be a part of a layer's."""
        for tensor in (x for x in args if isinstance(x, Tensor)):
            for start, end, name, value in self._places:
                if start <= tensor.data_ptr() < end:
                    first = (tensor.data_ptr() - start) // value.element_size()
                    kept = self.kept[name]
                    if tensor.numel() < value.numel():
                        kept = kept.flatten()[first : first + tensor.numel()]
                    self.dense[name] += count
                    self.sparse[name] += count * int(kept.sum()) // kept.numel()
                    return
        self.other += count


def _row(name: str, old: int, new: int, old_kept: int, parts: list[LayerMacs]) -> tuple[str, ...]:
    size, kept = (sum(getattr(own, part) for own in parts) for part in ("size", "kept"))
    ratio = f"{new / old:.3f}" if old else ""
    return name, f"{old:,}", f"{new:,}", ratio, f"{old_kept:,}", f"{kept:,}", f"{kept / size:.4f}" if size else ""
