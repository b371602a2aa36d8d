"""Where every channel of a network goes: each gets a number, and numbers that meet in a sum belong together."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from search_spaces.tracing import Layer, Trace, argument, call, reduced, untouched

_SPLITS = ("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split)
NO = -1
"""The number of what is no channel that a layer makes."""


@dataclass(frozen=True)
class Components:
    """Channels by the layers that make them together.

    Attributes:
        makers: the layers and parameters of every component.
        component: for every number of a channel its component, and `channel` its place in it.
    """

    makers: list[list[str]]
    component: Tensor
    channel: Tensor

    def of(self, numbers: Tensor | None) -> tuple[list[int], list[int]]:
        """Return the components of numbers, and their places in them; -1 for what is no channel."""
        if numbers is None:
            return [], []
        return self.component[numbers].tolist(), self.channel[numbers].tolist()  # the last is that of NO

    def index(self, several: Iterable[Tensor]) -> dict[int, list[int]]:
        """Return for every component which of several tensors of numbers have its channels."""
        found: dict[int, list[int]] = {}
        for i, numbers in enumerate(several):
            for component in self.component[numbers].unique().tolist():
                found.setdefault(component, []).append(i)
        return found


class Flow:
    """Numbers of channels on their way through graphs.

    A tensor's numbers have its number of dimensions, and size 1 along those in which they do not differ; ``None`` where
    there are no channels. This only finds what belongs together; whether a change can be made is seen when it is made.

    Args:
        names: of parameters and buffers.

    Attributes:
        atoms: numbers of the channels that a layer makes, or, by its name with "[*]", a parameter.
        outputs: numbers of the channels that a layer gives: its own, or for depthwise convolutions those of its input.
        slots: (tensor, axis, role, numbers), see `Slot`.
        constraints: numbers that are copied or removed in equal shares, and whether a norm takes statistics over them.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.atoms: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor | None] = {}
        self.slots: list[tuple[str, int, str, Tensor]] = []
        self.constraints: list[tuple[Sequence[Tensor], bool]] = []
        self._count = 0
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._numbers: dict[fx.Node, Any] = {}
        self._slots: set[tuple[str, int]] = set()

    def visit(self, found: Trace, node: fx.Node, layer: Layer | None) -> None:
        """Follow the channels through one operation; all operations in order."""
        kind = found.kinds[node]
        self._numbers[node] = None
        if layer is not None:
            self._layer(found, node, layer)
        elif kind == "attribute":
            shape = getattr(found.values[node], "shape", ())
            if node.target in self.names and sum(size > 1 for size in shape) == 1:
                self._numbers[node] = self._made(f"{node.target}[*]", max(shape)).view(shape)
        elif kind == "move":
            with suppress(LookupError, RuntimeError, TypeError, ValueError):
                self._move(found, node)
        elif found.is_tensor(node):
            rules = {
                "each": self._each,
                "norm": self._each,
                "space": self._space,
                "reduce": self._reduce,
                "cat": self._cat,
            }
            if kind in rules and any(self._numbers[source] is not None for source in node.all_input_nodes):
                with suppress(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                    rules[kind](found, node)  # what it cannot follow ends here, and is refused when it changes

    def components(self) -> Components:
        """Return which channels belong together, and in which order."""
        same = torch.arange(self._count + 1)
        ties = [torch.cat(side) for side in zip(*self._ties, strict=True)] if self._ties else []
        while ties and not torch.equal(same[ties[0]], same[ties[1]]):
            a, b = same[ties[0]], same[ties[1]]
            low = torch.arange(self._count + 1).scatter_reduce(
                0, torch.cat([a, b]), torch.minimum(a, b).repeat(2), "amin"
            )
            same = low[same]
        home: dict[int, int] = {}  # channel -> component, by its number after ties
        members: dict[int, list[str]] = {}
        for i, (maker, atoms) in enumerate(self.atoms.items()):
            members[i] = [maker]
            for old in {home[number] for number in same[atoms].tolist() if number in home}:
                members[i] = members.pop(old) + members[i]
                home |= {number: i for number, own in home.items() if own == old}
            home |= dict.fromkeys(same[atoms].tolist(), i)
        component, channel = (torch.full((self._count + 1,), NO) for _ in range(2))
        makers: list[list[str]] = []
        order = {maker: i for i, maker in enumerate(self.atoms)}
        for own in sorted(members.values(), key=lambda own: min(order[maker] for maker in own)):
            own.sort(key=order.__getitem__)
            if any(maker in self.outputs for maker in own):
                numbers = torch.tensor(
                    list(dict.fromkeys(same[torch.cat([self.atoms[maker] for maker in own])].tolist()))
                )
                component[numbers] = len(makers)
                channel[numbers] = torch.arange(len(numbers))
                makers.append(own)
        return Components(makers, component[same], channel[same])

    # Rules ---------------------------------------------------------------------------------------------------------

    def _made(self, name: str, count: int) -> Tensor:
        if name not in self.atoms:
            self.atoms[name] = torch.arange(self._count, self._count + count)
            self._count += count
        return self.atoms[name]

    def _slot(self, tensor: str, axis: int, role: str, numbers: Tensor) -> None:
        if (tensor, axis) not in self._slots:  # evaluation and training may both have it
            self._slots.add((tensor, axis))
            self.slots.append((tensor, axis, role, numbers))

    def _layer(self, found: Trace, node: fx.Node, layer: Layer) -> None:
        numbers = self._numbers[layer.source]
        kind = found.kinds[node]
        if kind == "dense":
            self._dense(found, node, layer, _along(numbers, layer.axis))
            return
        self._numbers[node] = numbers
        axis = next((a for a in range(layer.axis, len(found.shape(node))) if _along(numbers, a) is not None), None)
        if numbers is None or axis is None:
            return
        own = numbers.flatten()
        for name in layer.tensors.values():
            if layer.shape != (1,) or layer.kind != "PReLU":
                self._slot(name, axis - layer.axis, "follows", own)
        if kind == "mix":
            blocks = own.chunk(layer.groups) if len(own) % layer.groups == 0 else (own,)
            self.constraints.append((blocks, True))

    def _dense(self, found: Trace, node: fx.Node, layer: Layer, numbers: Tensor | None) -> None:
        weight = layer.tensors["weight"]
        if layer.depthwise:
            made = numbers if numbers is None else numbers.repeat_interleave(layer.outputs // layer.inputs)
            role = "follows"
        else:
            if numbers is not None:
                self._slot(weight, int(not layer.transposed), "reads", numbers)
                if layer.groups > 1:
                    self.constraints.append((numbers.chunk(layer.groups), False))
            made, role = self._made(layer.name, layer.outputs), "makes"
            if layer.groups > 1:
                self.constraints.append((made.chunk(layer.groups), False))
        self.outputs.setdefault(layer.name, made)
        if made is not None:
            self._slot(weight, int(layer.transposed and not layer.depthwise), role, made)
            if "bias" in layer.tensors:
                self._slot(layer.tensors["bias"], 0, role, made)
            sides = [len(made) if a == layer.axis else 1 for a in range(len(found.shape(node)))]
            self._numbers[node] = made.view(sides)

    def _each(self, found: Trace, node: fx.Node) -> None:
        shape = found.shape(node)
        given = []
        for source in node.all_input_nodes:
            if found.is_tensor(source):
                own = (1,) * (len(shape) - len(found.shape(source))) + found.shape(source)
                numbers = self._numbers[source]
                if numbers is not None and (numbers.numel() > 1 or own == shape):  # a single channel may be spread
                    given.append((own, numbers.view((1,) * (len(shape) - numbers.ndim) + tuple(numbers.shape))))
                elif own == shape:
                    return  # joined with something whose channels cannot change
        if given:
            given.sort(key=lambda pair: pair[0] != shape)  # what has all channels before what is spread over them
            first = given[0][1]
            for _, other in given[1:]:
                if other.shape == first.shape:
                    a, b = first.flatten(), other.flatten()
                    both = (a != NO) & (b != NO)
                    self._ties.append((a[both], b[both]))
            self._numbers[node] = first

    def _space(self, found: Trace, node: fx.Node) -> None:
        numbers = self._numbers[node.all_input_nodes[0]]
        if numbers is not None and numbers.shape[untouched(found, node) :].numel() == 1:
            self._numbers[node] = numbers

    def _reduce(self, found: Trace, node: fx.Node) -> None:
        numbers = self._numbers[node.all_input_nodes[0]]
        dims = reduced(found, node, numbers.ndim)
        if all(numbers.shape[dim] == 1 for dim in dims):
            kept = len(found.shape(node)) == numbers.ndim
            sides = [size for a, size in enumerate(numbers.shape) if kept or a not in dims]
            self._numbers[node] = numbers.view(sides)

    def _cat(self, found: Trace, node: fx.Node) -> None:
        sources = argument(found, node, 0, "tensors")
        dim = (argument(found, node, 1, "dim", "axis") or 0) % len(found.shape(node))
        given = [] if isinstance(sources, fx.Node) else [self._numbers[source] for source in sources]
        if not given or any(numbers is not None and _along(numbers, dim) is None for numbers in given):
            self._move(found, node)
            return
        parts = [
            torch.full((found.shape(source)[dim],), NO) if numbers is None else numbers.flatten()
            for source, numbers in zip(sources, given, strict=True)
        ]
        whole = torch.cat(parts)
        self._numbers[node] = whole.view([len(whole) if a == dim else 1 for a in range(len(found.shape(node)))])

    def _move(self, found: Trace, node: fx.Node) -> None:
        if not any(self._numbers[source] is not None for source in node.all_input_nodes):
            return
        if node.target is operator.getitem and not found.is_tensor(node.args[0]):
            self._numbers[node] = self._numbers[node.args[0]][node.args[1]]  # type: ignore[index]
            return

        def spread(value: Any, numbers: Any) -> Any:
            if isinstance(value, Tensor):
                return (torch.tensor(NO) if numbers is None else numbers).expand(value.shape)
            if isinstance(value, list | tuple) and numbers is not None:
                return [spread(*pair) for pair in zip(value, numbers, strict=True)]
            return value

        result = call(found, node, lambda source: spread(found.values[source], self._numbers[source]))
        if isinstance(result, Tensor):
            self._numbers[node] = _squeezed(result)
            if len(node.all_input_nodes) > 1:  # perhaps a part, as large as the number of channels says
                self.constraints.append(([_squeezed(result).flatten()], False))
            return
        parts = [_squeezed(part) for part in result]
        self._numbers[node] = parts
        if node.target in _SPLITS and len({part.shape for part in parts}) == 1:
            self.constraints.append(([part.flatten() for part in parts], False))


def _along(numbers: Tensor | None, axis: int) -> Tensor | None:
    """Return numbers that differ along this axis only, as a vector."""
    return numbers.flatten() if numbers is not None and numbers.numel() == numbers.shape[axis] else None


def _squeezed(numbers: Tensor) -> Tensor:
    for axis, size in enumerate(numbers.shape):
        first = numbers.narrow(axis, 0, min(1, size))
        if size > 1 and bool((numbers == first).all()):
            numbers = first
    return numbers
