"""Which channels of a network must change together: the groups that Net2Net widens and structured pruning cuts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from search_spaces.arch import nearest
from search_spaces.flow import Flow
from search_spaces.reindexing import Reindexer, Reindexing
from search_spaces.tracing import GrowthError, Layer, Trace, trace


@dataclass(frozen=True, eq=False)
class Slot:
    """An axis of a parameter or buffer that holds channels of a group.

    Attributes:
        tensor: full name of the parameter or buffer.
        axis: the axis.
        role: "makes": filters that make the channels; "follows": one value or filter for each; "reads": weights of a
            layer that reads them.
        channels: for every position along the axis the channel of the group, -1 where it is none of them. Where a
            convolution with groups reads, the positions of its groups one after the other.
    """

    tensor: str
    axis: int
    role: str
    channels: Tensor

    def __str__(self) -> str:
        return f"{self.role} {self.tensor}[{', '.join([':'] * self.axis + ['*'])}]"


@dataclass(frozen=True)
class Group:
    """Channels that change together: where one is copied or removed, it is so in all of these slots.

    Attributes:
        makers: the layers that make the channels, and parameters that are added to them or multiply them.
        size: how many channels there are.
        slots: every axis of every weight that has these channels.
        segments: channels that lie side by side, in this order, wherever they are made; copies are put at their ends.
        cells: channels of which equal shares are copied or removed, such as those of each group of a convolution.
        even: whether a norm takes statistics over the channels, which stay only if all are copied equally often.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.PReLU(4), nn.Conv2d(4, 2, 1))
        >>> print(analyse(net, torch.zeros(1, 3, 8, 8)).group("0"))
        4 channels of 0
          makes 0.weight[*]
          follows 1.weight[*]
          reads 2.weight[:, *]

    Source: the idea of groups of coupled layers is that of Fang et al., DepGraph: Towards Any Structural Pruning, CVPR
    2023, arXiv:2301.12900. Theirs follow rules from layer to layer; ours number the channels and see where they go.
    """

    makers: tuple[str, ...]
    size: int
    slots: tuple[Slot, ...] = field(repr=False)
    segments: tuple[tuple[int, ...], ...] = field(repr=False)
    cells: tuple[tuple[int, ...], ...] = field(repr=False)
    even: bool

    def __str__(self) -> str:
        lines = [f"{self.size} channels of {', '.join(self.makers)}", *map(str, self.slots)]
        return "\n  ".join(lines + [f"in {len(self.cells)} cells of equal share"] * (len(self.cells) > 1))

    def step(self, channels: Sequence[int]) -> int:
        """Return the number of copies of these channels of which only multiples can be made exactly."""
        sizes = [len(cell) for cell in self._cells(channels)]
        return len(channels) if self.even else len(channels) // math.gcd(*sizes)

    def copies(self, channels: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
        """Draw which of these channels get copied: any at random, as far as cells and norms allow.

        Args:
            channels: channels of the group.
            count: how many copies, a multiple of `step`.
            generator: where random numbers come from.
        """
        drawn: list[int] = []
        for cell in self._cells(channels):
            if self.even:
                drawn += list(cell) * (count // len(channels))
            else:
                picks = torch.randint(len(cell), (count * len(cell) // len(channels),), generator=generator)
                drawn += [cell[i] for i in picks.tolist()]
        return drawn

    def _cells(self, channels: Sequence[int]) -> list[list[int]]:
        wanted = set(channels)
        return [own for cell in self.cells if (own := [channel for channel in cell if channel in wanted])]


class Channels:
    """How channels flow through a model; made by `analyse`.

    Attributes:
        model: the model.
        traces: its graphs, in evaluation and, if that is another, in training.
        layers: its convolutions and linear layers by name, in the order of the graphs.
    """

    def __init__(self, model: nn.Module, traces: tuple[Trace, ...]) -> None:
        self.model = model
        self.traces = traces
        self.layers: dict[str, Layer] = {}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        owners = {(id(module), name): p for module in model.modules() for name, p in module._parameters.items()}
        self._holders = Counter(map(id, owners.values()))  # a module with two names holds its parameters once
        self._calls: list[Counter[str]] = []
        self._reads = Counter[str]()
        self._flow = Flow({*self._parameters, *(name for name, _ in model.named_buffers())})
        for found in traces:
            self._calls.append(Counter())
            for node in found.graph.nodes:
                layer = found.layers.get(node)
                self._flow.visit(found, node, layer)
                if layer is not None:
                    self._calls[-1].update(layer.tensors.values())
                    if found.kinds[node] == "dense":
                        self.layers.setdefault(layer.name, layer)
                own = layer.tensors.values() if layer is not None else ()
                reads = [str(a.target) for a in node.all_input_nodes if a.op == "get_attr"]
                if node.op == "call_module":  # also others than layers, such as embeddings
                    module = model.get_submodule(str(node.target))
                    tensors = (*module.named_parameters(), *module.named_buffers())
                    reads += [f"{node.target}.{name}" for name, _ in tensors] if layer is None else []
                self._reads.update(name for name in reads if name not in own)
        self._components = self._flow.components()
        self._groups: dict[int, Group] = {}
        self._slots = self._components.index(atoms for _, _, _, atoms in self._flow.slots)
        self._constraints = self._components.index(torch.cat(list(blocks)) for blocks, _ in self._flow.constraints)

    @property
    def groups(self) -> list[Group]:
        """All groups, in the order of the layers that make them."""
        return [self._group(number) for number in range(len(self._components.makers))]

    def __str__(self) -> str:
        return "\n".join(map(str, self.groups))

    def layer(self, name: str) -> Layer:
        """Return a convolution or linear layer by its name.

        Raises:
            GrowthError: there is none; the message has the nearest names.
        """
        if name in self.layers:
            return self.layers[name]
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if not name or name not in modules:
            raise GrowthError(f"there is no layer {name!r}; {nearest(name, self.layers)}")
        if isinstance(modules[name], nn.Linear | nn.modules.conv._ConvNd):
            raise GrowthError(f"{name!r} is not called on its own by the model's forward; {nearest(name, self.layers)}")
        kind = type(modules[name]).__name__
        raise GrowthError(f"{name!r} is a {kind}, no convolution or linear layer; {nearest(name, self.layers)}")

    def group(self, name: str) -> Group:
        """Return the group of the channels that a layer gives.

        Raises:
            GrowthError: there is no such layer, or its channels are of several groups or of the model's input.
        """
        return self.place(name)[0]

    def place(self, name: str) -> tuple[Group, list[int]]:
        """Return the group of a layer, and for every channel that the layer gives the channel of the group.

        Raises:
            GrowthError: as `group`.
        """
        self.layer(name)
        components, channels = self._components.of(self._flow.outputs.get(name))
        if not components or -1 in components:
            raise GrowthError("its channels are those of the model's input.")
        if len(numbers := sorted(set(components))) > 1:
            makers = [maker for number in numbers for maker in self._components.makers[number]]
            raise GrowthError(f"its channels are those of several layers: {', '.join(makers)}. Change those.")
        return self._group(numbers[0]), channels

    def _group(self, number: int) -> Group:
        if number not in self._groups:
            found, makers = self._components, self._components.makers[number]
            sequences = [found.of(self._flow.atoms[maker])[1] for maker in makers]
            signs: list[list[tuple[int, int]]] = [[] for _ in range(1 + max(map(max, sequences)))]
            constraints = [self._flow.constraints[i] for i in self._constraints.get(number, ())]
            for place, (blocks, _) in enumerate(constraints):
                for i, block in enumerate(blocks):
                    for component, channel in zip(*found.of(block), strict=True):
                        if component == number:
                            signs[channel].append((place, i))
            cells: dict[tuple[tuple[int, int], ...], list[int]] = {}
            for channel, sign in enumerate(signs):
                cells.setdefault(tuple(sign), []).append(channel)
            slots = []
            for tensor, axis, role, atoms in (self._flow.slots[i] for i in self._slots.get(number, ())):
                own = torch.where(found.component[atoms] == number, found.channel[atoms], -1)
                slots.append(Slot(tensor, axis, role, own))
            self._groups[number] = Group(
                tuple(makers),
                len(signs),
                tuple(slots),
                tuple(_segments(sequences, [tuple(sign) for sign in signs])),
                tuple(map(tuple, cells.values())),
                even=any(statistics for _, statistics in constraints),
            )
        return self._groups[number]

    def reindex(self, group: Group, rows: Sequence[int], exact: bool = True) -> Reindexing:
        """Return what becomes of the weights when these channels of a group are there, copied or left out.

        Args:
            group: one of this model's.
            rows: channels of the group, each as often as it shall be there. Their order is decided here.
            exact: refuse what would change the statistics of norms over channels.

        Raises:
            GrowthError: it cannot be done; the message is the reason.
        """
        return self.reindex_groups({group: rows}, exact)

    def reindex_groups(self, rows: Mapping[Group, Sequence[int]], exact: bool = True) -> Reindexing:
        """Return what becomes of the weights when several groups change at once, each as in `reindex`.

        Raises:
            GrowthError: it cannot be done; the message is the reason.
        """
        changes: dict[str, Tensor] = {}
        for group, own in rows.items():
            changes |= self._changes(group, own)
        whole = Reindexing({}, {})
        for found, calls in zip(self.traces, self._calls, strict=True):
            whole = whole.joined(Reindexer(found, changes, exact).run())
            for name in whole.maps:
                added = f"{name}[*]" in changes
                self.check(name, calls[name] + added)
                if self._reads[name] and not added:
                    raise GrowthError(f"{name!r} is read elsewhere in forward, too.")
        return whole

    def _changes(self, group: Group, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return for every maker of a group which of its channels are there, in their order."""
        if not group.segments:
            raise GrowthError("channels of one layer are tied to one another.")
        seen: set[int] = set()
        copies = [row for row in rows if row in seen or seen.add(row)]  # type: ignore[func-returns-value]
        home = {channel: i for i, segment in enumerate(group.segments) for channel in segment}
        layout = [[channel for channel in segment if channel in seen] for segment in group.segments]
        for row in copies:
            layout[home[row]].append(row)
        changes = {}
        for maker in group.makers:
            channels = self._components.of(self._flow.atoms[maker])[1]
            position = {channel: i for i, channel in enumerate(channels)}
            segments = dict.fromkeys(home[channel] for channel in channels)
            changes[maker] = torch.tensor([position[row] for i in segments for row in layout[i]], dtype=torch.long)
            if not len(changes[maker]):
                raise GrowthError(f"{maker!r} would have no channels left.")
        return changes

    def widening(self, group: Group, own: Sequence[int], count: int, generator: torch.Generator) -> Reindexing:
        """Return what becomes of the weights when so many copies of these channels are drawn, a multiple of `step`.

        Raises:
            GrowthError: it cannot be done exactly; the message is the reason.
        """
        every = list(range(group.size))
        try:
            return self.reindex(group, every + group.copies(own, count, generator))
        except GrowthError:
            if count % len(own):
                raise
            # All in order, equally often: what groups channels in blocks, as nn.PixelShuffle does, may bear that.
            return self.reindex(group, every + [*own] * (count // len(own)))

    def check(self, name: str, calls: int = 1) -> None:
        """Refuse to change a parameter that is frozen, shared or computed.

        Raises:
            GrowthError: it is.
        """
        owner, parameter = name.rpartition(".")[0], self._parameters.get(name)
        if parametrize.is_parametrized(self.model.get_submodule(owner)):
            raise GrowthError(f"{owner!r} is parametrized; torch.nn.utils.parametrize.remove_parametrizations first.")
        if calls > 1:
            raise GrowthError(f"{owner or name!r} is called more than once with the same weights.")
        if parameter is not None and self._holders[id(parameter)] > 1:
            raise GrowthError(f"{name!r} is shared with another layer.")
        if parameter is not None and not parameter.requires_grad:
            raise GrowthError(f"{name!r} is frozen; set requires_grad to let it change.")

    def calls(self, name: str) -> int:
        """Return how often a parameter is used, in the mode in which it is most often."""
        return max(calls[name] for calls in self._calls)


def _segments(sequences: Sequence[Sequence[int]], signs: Sequence[tuple[object, ...]]) -> Iterator[tuple[int, ...]]:
    """Yield the longest runs that are in all sequences, of equal sign; none if a sequence has a channel twice."""
    after: dict[int, set[int]] = {}
    before: dict[int, set[int]] = {}
    for sequence in sequences:
        if len(set(sequence)) < len(sequence):
            return
        for a, b in pairwise([-1, *sequence, -1]):
            after.setdefault(a, set()).add(b)
            before.setdefault(b, set()).add(a)
    done: set[int] = set()
    for sequence in sequences:
        run: list[int] = []
        for a, b in pairwise([*sequence, -1]):
            if a in done:
                continue
            done.add(a)
            run.append(a)
            if after[a] != {b} or b < 0 or before[b] != {a} or signs[a] != signs[b]:
                yield tuple(run)
                run = []


def analyse(model: nn.Module, example: Tensor | tuple[object, ...]) -> Channels:
    """Follow the channels of any model that torch.fx can trace. The model stays as it is.

    Args:
        model: the model.
        example: a batch that it takes; a tuple if it takes several inputs.

    Raises:
        GrowthError: the model cannot be traced, does not take the example, or has hooks.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
        >>> found = analyse(net, torch.zeros(1, 3, 8, 8))
        >>> list(found.layers), found.group("0").size
        (['0', '2'], 4)
    """
    return Channels(model, trace(model, example))
