"""Copies, removals and reorderings of channels, followed through a network to every weight that they change."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from search_spaces.tracing import (
    GrowthError,
    Layer,
    Trace,
    argument,
    call,
    family_of,
    has_tensors,
    name_of,
    reduced,
    run,
    untouched,
    writes,
)

_TURNS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "t")


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis of a tensor changes.

    Attributes:
        axis: the axis.
        index: for every new position the old one, (n,); of a grouped convolution's inputs, for every group (groups, n).
        divided: whether values are divided by the number of copies, as they are where copies are read. Where copies are
            made values are not, but gradients are.
    """

    axis: int
    index: Tensor
    divided: bool = False

    @property
    def _rows(self) -> Tensor:
        """The index of every group, (groups, n)."""
        return self.index if self.index.ndim == 2 else self.index[None]

    def repeated(self, tensor: Tensor) -> Tensor:
        """Return which elements of the new tensor are copies of others before them, of a shape that it broadcasts."""
        again = torch.zeros_like(self._rows, dtype=torch.bool)
        for row, copies in zip(self._rows.tolist(), again, strict=True):
            seen: set[int] = set()
            for place, old in enumerate(row):
                copies[place] = old in seen
                seen.add(old)
        sides = [-1 if axis == self.axis else 1 for axis in range(tensor.ndim)]
        parts: list[Tensor] = [copies.view(sides) for copies in again]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.expand(tensor.shape[0] // len(parts), *part.shape[1:]) for part in parts])

    def __call__(self, tensor: Tensor, divide: bool, power: int = 1) -> Tensor:
        """Return the tensor with its axis changed."""
        rows = self._rows.to(tensor.device)
        parts = [part.index_select(self.axis, row) for part, row in zip(tensor.chunk(len(rows)), rows, strict=True)]
        if divide:
            sides = [1] * (tensor.ndim - self.axis - 1)
            copies = [row.bincount()[row].view(-1, *sides).to(tensor) for row in self._rows]
            parts = [part / count**power for part, count in zip(parts, copies, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class ParameterMap:
    """How a parameter or buffer changes: its axes, one after the other."""

    axes: tuple[AxisMap, ...]

    def equals(self, other: ParameterMap) -> bool:
        """Whether both are the same change."""
        pairs = zip(self.axes, other.axes, strict=False)
        same = all(a.axis == b.axis and a.divided == b.divided and torch.equal(a.index, b.index) for a, b in pairs)
        return len(self.axes) == len(other.axes) and same

    def values(self, tensor: Tensor) -> Tensor:
        """Return what the tensor becomes: copies, and where copies are read, shares."""
        for axis in self.axes:
            tensor = axis(tensor, axis.divided)
        return tensor

    def gradients(self, tensor: Tensor, power: int = 1) -> Tensor:
        """Return what a gradient of the tensor becomes, or its square (2), or what does not grow with it (0)."""
        for axis in self.axes:
            tensor = axis(tensor, not axis.divided, power)
        return tensor


@dataclass(frozen=True)
class Reindexing:
    """A change of channels as it reaches the weights.

    Attributes:
        maps: by the full names of parameters and buffers.
        attributes: by the names of modules, what their attributes become.
    """

    maps: Mapping[str, ParameterMap]
    attributes: Mapping[str, Mapping[str, Any]]

    def joined(self, other: Reindexing) -> Reindexing:
        """Return both, which must agree where both have something.

        Raises:
            GrowthError: they do not.
        """
        for name in self.maps.keys() & other.maps.keys():
            if not self.maps[name].equals(other.maps[name]):
                raise GrowthError(f"{name!r} would have to change in two ways, in evaluation and in training.")
        return Reindexing({**self.maps, **other.maps}, {**self.attributes, **other.attributes})

    def apply(self, model: nn.Module) -> None:
        """Change a model in place: a copy of the one that the change was made for."""
        with torch.no_grad():
            for name, change in self.maps.items():
                owner, _, own = name.rpartition(".")
                module = model.get_submodule(owner)
                old = getattr(module, own)
                new = _laid_out(change.values(old), old.stride())
                setattr(module, own, nn.Parameter(new) if own in module._parameters else new)
        for name, attributes in self.attributes.items():
            for attribute, value in attributes.items():
                setattr(model.get_submodule(name), attribute, value)


def _laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a tensor with its dimensions in memory in the order of these strides, as `torch.channels_last` is one."""
    order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
    return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(tensor.ndim)])


@dataclass(frozen=True, eq=False)
class Moved:
    """A tensor whose elements are copies of those it had.

    Attributes:
        old: its shape before.
        new: its shape after.
        axis: the only axis along which elements were copied, removed or moved; ``None`` if there is no single one.
        index: along the axis for every new position the old one, (n,); without an axis for every element, shape `new`,
            the old element, counted from 0.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    axis: int | None
    index: Tensor

    @staticmethod
    def along(axis: int, index: Tensor, old: tuple[int, ...]) -> Moved:
        """Return a tensor changed along one axis."""
        return Moved(old, (*old[:axis], len(index), *old[axis + 1 :]), axis, index)

    @staticmethod
    def of(elements: Tensor, old: tuple[int, ...]) -> Moved | None:
        """Return a tensor by its elements, ``None`` if it did not change."""
        new, numbers = tuple(elements.shape), torch.arange(math.prod(old)).view(old)
        if new == old and torch.equal(elements, numbers):
            return None
        axes = [a for a in range(len(old)) if new[a : a + 1] != old[a : a + 1]] if new != old else range(len(old))
        for axis in axes if len(new) == len(old) else ():
            first = elements.movedim(axis, 0).flatten(1)[:, 0]
            index = first // math.prod(old[axis + 1 :]) % old[axis]
            if Moved.along(axis, index, old).new == new and torch.equal(numbers.index_select(axis, index), elements):
                return Moved.along(axis, index, old)
        return Moved(old, new, None, elements)

    def elements(self) -> Tensor:
        """Return for every element, shape `new`, the old one."""
        if self.axis is None:
            return self.index
        return torch.arange(math.prod(self.old)).view(self.old).index_select(self.axis, self.index)

    def equals(self, other: Moved) -> bool:
        """Whether both changed in the same way."""
        return self.axis == other.axis and self.new == other.new and torch.equal(self.index, other.index)


@dataclass(frozen=True)
class _Plain:
    """A number or a shape that changed."""

    value: Any


class Reindexer:
    """Follows a change of channels through one graph.

    Args:
        found: the graph.
        makers: for every layer whose channels change, for every new channel the old one; of a parameter that is added
            or multiplied, by its name with "[*]".
        exact: whether what the network computes must stay: then statistics over channels must not change.
    """

    def __init__(self, found: Trace, makers: Mapping[str, Tensor], exact: bool = True) -> None:
        self.found = found
        self.makers = makers
        self.exact = exact
        self.axes: dict[str, dict[int, AxisMap]] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self.moved: dict[fx.Node, Any] = {}

    def run(self) -> Reindexing:
        """Return what becomes of the weights.

        Raises:
            GrowthError: the change cannot be made exactly; the message is the reason.
        """
        rules = {
            "attribute": self._attribute,
            "dense": self._dense,
            "norm": self._norm,
            "mix": self._mix,
            "each": self._each,
            "space": self._space,
            "reduce": self._reduce,
            "cat": self._cat,
            "move": self._move,
        }
        for node in self.found.graph.nodes:
            touched = [source for source in node.all_input_nodes if source in self.moved]
            kind = self.found.kinds[node]
            if not touched and kind not in ("attribute", "dense"):
                continue
            if kind == "output" or hasattr(node.target, "_fields"):  # or a named tuple of outputs
                raise GrowthError("they reach the model's output, whose size is the task's.")
            if node.op == "call_function" or node.op == "call_method":
                if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.found.values[node])):
                    self._plain(node)
                    continue
                if kind not in ("move", "each", "dense") and any(self._is_plain(source) for source in touched):
                    raise GrowthError(f"{self.text(node)} computes with their number.")
            if node.kwargs.get("out") is not None:
                raise GrowthError(f"{self.text(node)} writes them into another tensor.")
            if kind == "fresh" and self._new(node).shape == self.found.shape(node):
                continue
            if kind not in ("move", "attribute") and not self.found.is_tensor(node):
                kind = "other"  # pooling that returns places, too
            if kind not in rules:
                raise GrowthError(f"they reach {self.text(node)}, through which channels cannot be followed.")
            try:
                rules[kind](node)
            except GrowthError:
                raise
            except (
                ArithmeticError,
                AssertionError,
                AttributeError,
                LookupError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                raise GrowthError(f"{self.text(node)} has arguments that cannot be followed: {error}.") from error
        for node in self.found.graph.nodes:
            if (base := writes(self.found, node)) is not None and base in self.moved:
                raise GrowthError(f"{self.text(node)} changes a part of them in place.")
        maps = {name: ParameterMap(tuple(own[a] for a in sorted(own))) for name, own in self.axes.items()}
        return Reindexing(maps, self.attributes)

    def text(self, node: fx.Node) -> str:
        """Name an operation."""
        if node.op == "call_module":
            return f"{type(self.found.model.get_submodule(str(node.target))).__name__} {str(node.target)!r}"
        return f"{name_of(node)}() (`{node}` in the traced graph)"

    def _is_plain(self, source: fx.Node) -> bool:
        return isinstance(self.moved.get(source), _Plain)

    def _along(self, node: fx.Node, source: fx.Node, axis: int) -> Tensor | None:
        """Return how the input of a layer changed along its channels."""
        change = self.moved.get(source)
        if change is None:
            return None
        if not isinstance(change, Moved) or change.axis != axis:
            raise GrowthError(f"{self.text(node)} reads them in another place or order than its own channels.")
        return change.index

    def _map(self, name: str, axis: int, index: Tensor, divided: bool = False) -> None:
        own = self.axes.setdefault(name, {})
        if axis in own and not torch.equal(own[axis].index, index):
            raise GrowthError(f"{name!r} would have to change in two ways.")
        own[axis] = AxisMap(axis, index, divided)

    def _set(self, layer: Layer, **attributes: Any) -> None:
        """Note what the attributes of a layer's module become, and refuse where a function has them as constants."""
        known = family_of(self.found.model.get_submodule(layer.owner)) == self.found.kinds[layer.node]
        for name, value in attributes.items():
            if known:
                self.attributes.setdefault(layer.owner, {})[name] = value
            elif name in ("groups", "normalized_shape"):
                if any(self._is_plain(a) and self.moved[a].value == value for a in layer.node.all_input_nodes):
                    continue  # it is read from the shape of a tensor
                raise GrowthError(f"{layer.name!r} is given to a function that has {name} as a constant.")

    def _layer(self, node: fx.Node) -> Layer:
        layer = self.found.layers[node]
        if layer is None:
            raise GrowthError(f"they reach {self.text(node)}, whose weight is computed, or not of a layer's shape.")
        return layer

    # Rules ---------------------------------------------------------------------------------------------------------

    def _plain(self, node: fx.Node) -> None:
        """A number or a shape: computed anew from the new shapes."""
        if (value := self._new(node)) != self.found.values[node]:
            self.moved[node] = _Plain(value)

    def _new(self, node: fx.Node) -> Any:
        """Run an operation on the new shapes."""

        def new(source: fx.Node) -> Any:
            change = self.moved.get(source)
            if isinstance(change, Moved):
                return torch.empty(change.new, device="meta")
            return change.value if isinstance(change, _Plain) else self.found.values[source]

        try:
            return run(node, *fx.node.map_arg((node.args, node.kwargs), new))
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise GrowthError(f"{self.text(node)} does not take their new number: {error}.") from None

    def _attribute(self, node: fx.Node) -> None:
        index = self.makers.get(f"{node.target}[*]")
        if index is not None:
            shape = self.found.shape(node)
            axis = next(a for a, size in enumerate(shape) if size > 1)
            self._map(str(node.target), axis, index)
            self.moved[node] = Moved.along(axis, index, shape)

    def _dense(self, node: fx.Node) -> None:
        layer = self.found.layers[node]
        if layer is None:
            if any(source in self.moved for source in node.all_input_nodes):
                self._layer(node)
            return
        made = self.makers.get(layer.name)
        index = self._along(node, layer.source, layer.axis)
        given: list[Any] = [layer.source]
        if layer.depthwise and layer.is_function:  # as many groups as the shape of a tensor says
            given.append(node.args[6] if len(node.args) > 6 else node.kwargs.get("groups"))
        for source in node.all_input_nodes:  # of a function: its weight, read elsewhere too, or a size
            if source in self.moved and source not in given:
                raise GrowthError(f"{self.text(node)} is given {source.name!r}, which changes.")
        if index is not None:
            if layer.depthwise:
                several = layer.outputs // layer.inputs
                made = (index[:, None] * several + torch.arange(several)).flatten()
                self._set(layer, groups=len(index))
            else:
                self._read(layer, index)
            self._set(layer, **{"in_features" if layer.shape[2:] == () else "in_channels": len(index)})
        if made is None:
            return
        if layer.groups > 1 and not layer.depthwise:
            self._check_blocks(layer, made, layer.groups, "filters")
        if layer.depthwise and layer.transposed:
            assert index is not None
            self._map(layer.tensors["weight"], 0, index)
        else:
            rows = made
            if layer.transposed and layer.groups > 1:  # outputs of every group are columns of its rows
                rows = made.view(layer.groups, -1) % (layer.outputs // layer.groups)
            self._map(layer.tensors["weight"], int(layer.transposed), rows)
        if "bias" in layer.tensors:
            self._map(layer.tensors["bias"], 0, made)
        self._set(layer, **{"out_features" if layer.shape[2:] == () else "out_channels": len(made)})
        self.moved[node] = Moved.along(layer.axis, made, self.found.shape(node))

    def _read(self, layer: Layer, index: Tensor) -> None:
        """A layer that reads all its channels: its weights for a channel are shared among the copies."""
        if layer.groups > 1:
            self._check_blocks(layer, index, layer.groups, "inputs")
        if layer.groups > 1 and not layer.transposed:
            index = index.view(layer.groups, -1) % (layer.inputs // layer.groups)
        self._map(layer.tensors["weight"], int(not layer.transposed), index, divided=True)

    def _check_blocks(self, layer: Layer, index: Tensor, groups: int, what: str) -> None:
        size = self.found.shape(layer.source)[layer.axis] if what == "inputs" else layer.outputs
        blocks = torch.arange(groups).repeat_interleave(math.ceil(len(index) / groups))
        if len(index) % groups or not torch.equal(index // (size // groups), blocks):
            raise GrowthError(
                f"{layer.kind} {layer.name!r} has {groups} groups, and their {what} would not stay apart."
            )

    def _norm(self, node: fx.Node) -> None:
        """A norm of every channel on its own, or a parameter for every channel."""
        layer = self._layer(node)
        if layer.shape == (1,) and layer.kind == "PReLU":
            self._each(node)
            return
        index = self._along(node, layer.source, 1)
        assert index is not None
        for name in layer.tensors.values():
            self._map(name, 0, index)
        self._set(layer, **{"num_parameters" if layer.kind == "PReLU" else "num_features": len(index)})
        self.moved[node] = Moved.along(1, index, self.found.shape(node))

    def _mix(self, node: fx.Node) -> None:
        """A norm over channels: its statistics stay if all are copied equally often."""
        layer = self._layer(node)
        change = self.moved[layer.source]
        grouped = "group" in layer.kind.lower()
        if not isinstance(change, Moved) or change.axis is None or (grouped and change.axis != 1):
            raise GrowthError(f"{self.text(node)} reads them in another order than its own channels.")
        if change.axis >= layer.axis:
            if grouped:
                self._check_blocks(layer, change.index, layer.groups, "inputs")
                self._set(layer, num_channels=len(change.index))
            else:
                self._set(layer, normalized_shape=change.new[layer.axis :])
            copies = change.index.bincount(minlength=change.old[change.axis])
            if self.exact and copies.min() < copies.max():
                raise GrowthError(
                    f"{self.text(node)} takes statistics over channels, which stay only if all of these are copied "
                    "equally often."
                )
            for name in layer.tensors.values():
                self._map(name, change.axis - layer.axis, change.index)
        self.moved[node] = change

    def _each(self, node: fx.Node) -> None:
        """An operation on every element, of one tensor or of several that are broadcast: all change alike."""
        shape, changes = self.found.shape(node), []
        if name_of(node) != "expand" and any(self._is_plain(source) for source in node.all_input_nodes):
            raise GrowthError(f"{self.text(node)} computes with their number.")
        for source in node.all_input_nodes:
            if (change := self.moved.get(source)) is None or not self.found.is_tensor(source):
                continue
            shift = len(shape) - len(change.old)
            if change.axis is None:
                changes.append(change)
            elif change.old[change.axis] != shape[change.axis + shift]:
                raise GrowthError(f"{self.text(node)} spreads their only channel over several.")
            else:
                changes.append(Moved.along(change.axis + shift, change.index, shape))
        if not changes:
            raise GrowthError(f"{self.text(node)} computes with their number.")
        first = changes[0]
        if any(not change.equals(first) for change in changes) or first.old != shape:
            raise GrowthError(f"{self.text(node)} joins channels that would be copied differently.")
        for source in node.all_input_nodes:
            if self.found.is_tensor(source) and source not in self.moved:
                own = self.found.shape(source)
                own = (1,) * (len(shape) - len(own)) + own
                if (math.prod(own) if first.axis is None else own[first.axis]) > 1:
                    raise GrowthError(f"{self.text(node)} joins them with {source.name!r}, whose size cannot change.")
        if name_of(node).startswith("expand") and self._new(node).shape != first.new:
            raise GrowthError(f"{self.text(node)} is given their number as a constant.")
        self.moved[node] = first

    def _space(self, node: fx.Node) -> None:
        """An operation on every channel on its own: pooling, resizing, padding."""
        first, *others = [n for n in node.all_input_nodes if isinstance(self.moved.get(n), Moved)]
        change, shape = self.moved[first], self.found.shape(node)
        if others or change.axis is None or change.axis >= untouched(self.found, node):
            raise GrowthError(f"{self.text(node)} works along the dimension in which they lie.")
        self.moved[node] = Moved.along(change.axis, change.index, shape)

    def _reduce(self, node: fx.Node) -> None:
        """A mean or the like over other dimensions."""
        change = self.moved[argument(self.found, node, 0, "input")]
        dims = reduced(self.found, node, len(change.old))
        if change.axis is None or change.axis in dims:
            raise GrowthError(f"{self.text(node)} is taken over them.")
        shape = self.found.shape(node)
        kept = len(shape) == len(change.old)
        axis = change.axis if kept else change.axis - sum(dim < change.axis for dim in dims)
        self.moved[node] = Moved.along(axis, change.index, shape)

    def _cat(self, node: fx.Node) -> None:
        sources = argument(self.found, node, 0, "tensors")
        dim = (argument(self.found, node, 1, "dim", "axis") or 0) % len(self.found.shape(node))
        changes = [] if isinstance(sources, fx.Node) else [self.moved.get(source) for source in sources]
        if not changes or any(isinstance(change, Moved) and change.axis != dim for change in changes):
            self._move(node)
            return
        parts, start = [], 0
        for source, change in zip(sources, changes, strict=True):
            size = self.found.shape(source)[dim]
            parts.append(start + (torch.arange(size) if change is None else change.index))
            start += size
        self.moved[node] = Moved.along(dim, torch.cat(parts), self.found.shape(node))

    def _move(self, node: fx.Node) -> None:
        """An operation that only moves elements: done on their numbers, as they were and as they will be."""
        if node.op == "call_function" and node.target is operator.getitem and not self.found.is_tensor(node.args[0]):
            self._item(node)
            return
        source = node.all_input_nodes[0]
        change = self.moved.get(source)
        if name_of(node) in _TURNS and isinstance(change, Moved) and change.axis is not None:
            # Dimensions change places: known without a look at every element.
            sizes = torch.empty(*range(1, len(change.old) + 1), device="meta")  # a size tells which dimension it is
            axis = call(self.found, node, lambda _: sizes).shape.index(change.axis + 1)
            self.moved[node] = Moved.along(axis, change.index, self.found.shape(node))
            return
        total = 0

        def numbered(value: Any, change: Any) -> Any:
            nonlocal total
            if isinstance(value, Tensor):
                old = tuple(value.shape)
                start, total = total, total + math.prod(old)
                elements = torch.arange(math.prod(old)).view(old) if change is None else change.elements()
                return elements + start
            if isinstance(change, list):
                return [numbered(*pair) for pair in zip(value, change, strict=True)]
            if isinstance(value, list | tuple):
                return [numbered(part, None) for part in value] if has_tensors(value) else value
            return change.value if isinstance(change, _Plain) else value

        def numbers(source: fx.Node, new: bool) -> Any:
            value = self.found.values[source]
            return numbered(value, self.moved.get(source) if new else None)

        try:
            before = _tensors(call(self.found, node, lambda source: numbers(source, False)))
            end, total = total, 0
            after = _tensors(call(self.found, node, lambda source: numbers(source, True)))
            if len(before) != len(after):
                raise RuntimeError(f"it gives {len(after)} tensors instead of {len(before)}")
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise GrowthError(
                f"{self.text(node)} does not take their new number, {error}. Another may do, unless it is a constant."
            ) from None
        moved: list[Moved | None] = []
        for old, new in zip(before, after, strict=True):
            place = torch.full((end,), -1)
            place[old.flatten()] = torch.arange(old.numel())
            if not torch.equal(place[old.flatten()], torch.arange(old.numel())):
                raise GrowthError(f"{self.text(node)} repeats them.")
            if (elements := place[new]).numel() and elements.min() < 0:
                raise GrowthError(f"{self.text(node)} would divide them in another place than now.")
            kept = torch.zeros(old.numel(), dtype=torch.bool)
            kept[elements.flatten()] = True
            if self.exact and not kept.all():
                raise GrowthError(f"{self.text(node)} would leave some of them out.")
            moved.append(Moved.of(elements, tuple(old.shape)))
        if not self.found.is_tensor(node):
            self.moved[node] = moved
        elif moved[0] is not None:
            self.moved[node] = moved[0]

    def _item(self, node: fx.Node) -> None:
        """One of several tensors."""
        several: Any = node.args[0]
        change = self.moved[several][node.args[1]]
        if isinstance(change, list) and not any(change):
            change = None
        if change is not None:
            self.moved[node] = change


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
