"""NAS-Bench-201: every cell of four nodes and five operations, in the benchmark's own network.

Source: Dong and Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search, ICLR 2020,
arXiv:2001.00326.
"""

from __future__ import annotations

import copy
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from search_spaces.base import Arch, ArchError, Choices, Mixture, Option, SearchSpace, Supernet, nearest
from search_spaces.operations import ConvBN, ReLUConvBN
from search_spaces.relaxed import RelaxedCell, check_settings, prepare

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# Decision -> (from node, to node), in the order of the benchmark's strings. Node 0 is the cell's input, 3 its output.
EDGES = {"e01": (0, 1), "e02": (0, 2), "e12": (1, 2), "e03": (0, 3), "e13": (1, 3), "e23": (2, 3)}
_CHOICES: Choices = MappingProxyType(dict.fromkeys(EDGES, OPERATIONS))
_EDGE_SITES: Choices = MappingProxyType({"inputs2": ("0", "1"), "inputs3": ("0", "1", "2")})  # node 1 has but one edge
# Per edge: its piece of an architecture string -> its share of the index.
_SHARES: list[dict[str, int]] = [
    {f"{op}~{source}": digit * 5 ** (5 - place) for digit, op in enumerate(OPERATIONS)}
    for place, (source, _) in enumerate(EDGES.values())
]
_PIECES = [{f"{op}~{source}": op for op in OPERATIONS} for source, _ in EDGES.values()]

Value = tuple["Term", ...]
Term = tuple[str, Value]


@dataclass(frozen=True)
class NASBench201(SearchSpace):
    """The 15,625 cells of NAS-Bench-201, stacked in the benchmark's network.

    A cell has nodes 0 to 3. Node 0 is its input, every later node the sum of one operation on each earlier node, node
    3 its output: six decisions, ``e01`` for the edge from node 0 to node 1. The network: 3x3 convolution, `cells` cells
    of `channels` channels, a residual block that halves the image, `cells` cells of twice the channels, another such
    block, `cells` cells of four times the channels, then batch norm, ReLU, mean over the image, linear layer.

    The defaults are the benchmark's; ``NASBench201(channels=8, cells=1)`` trains in seconds. Images may have any size;
    8x8 ends as 2x2.

    Args:
        channels: channels of the first stage.
        cells: cells per stage.
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.

    Raises:
        ArchError: a setting is no positive integer.

    Example:
        >>> from random import Random
        >>> space = NASBench201(channels=8, cells=1, classes=10, in_channels=1)
        >>> arch = space.sample(Random(0))
        >>> space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> space.parse(space.to_string(arch)) == arch
        True
    """

    channels: int = 16
    cells: int = 5
    classes: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        self.require_positive("channels", "cells", "classes", "in_channels")

    @property
    def choices(self) -> Choices:
        return _CHOICES

    def build(self, arch: Arch) -> nn.Module:
        """Return the network of this very cell: (B, in_channels, H, W) images to (B, classes) logits.

        Weights are initialised by torch's layers, from its global generator. An operation that cannot reach the cell's
        output has its parameters, as in the benchmark, but is not computed: these parameters never get a gradient, and
        an optimizer skips them.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """
        arch = self.check(arch)
        return _network(self, lambda channels: Cell(arch, channels))

    # Shared weights ------------------------------------------------------------------------------------------------

    @property
    def edge_sites(self) -> Choices:
        return _EDGE_SITES

    def supernet(
        self, *, form: str = "fast", recompute: bool = False, partial_channels: int = 1
    ) -> NASBench201Supernet:
        """Return a fresh network with all operations on all edges; batch norms of cells have no scale and shift.

        Its sites are the space's decisions. Weights for the edges of nodes 2 and 3 are optional sites (``inputs2``,
        ``inputs3``, one for each earlier node), as in PC-DARTS.

        Args:
            form: ``"fast"``, or ``"textbook"``: one operation after the other, to compare with (`RelaxedCell`).
            recompute: save memory: compute the inside of each cell again in the backward pass.
            partial_channels: mix only one of so many parts of the channels, as in PC-DARTS.

        Raises:
            ArchError: a setting is out of range, or the space is not bound to data.

        Example:
            >>> space = NASBench201(channels=4, cells=1, classes=10, in_channels=1)
            >>> supernet, arch = space.supernet(), space.at(7)
            >>> x = torch.randn(2, 1, 8, 8)
            >>> torch.equal(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x))
            True
        """
        return NASBench201Supernet(self, form=form, recompute=recompute, partial_channels=partial_channels)

    # Architecture strings ------------------------------------------------------------------------------------------

    def parse(self, text: str) -> Arch:
        """Read an architecture from the benchmark's notation, or from JSON.

        Raises:
            ArchError: the text is neither, or names an operation or an edge that is not there.

        Example:
            >>> NASBench201().parse("|none~0|+|nor_conv_3x3~0|none~1|+|skip_connect~0|none~1|nor_conv_1x1~2|")
            Arch(e01='none', e02='nor_conv_3x3', e12='none', e03='skip_connect', e13='none', e23='nor_conv_1x1')
        """
        try:
            b, e01, p, e02, e12, q, e03, e13, e23, e = text.split("|")
            if (b, p, q, e) == ("", "+", "+", ""):
                return Arch({d: n[t] for d, n, t in zip(EDGES, _PIECES, (e01, e02, e12, e03, e13, e23), strict=True)})
        except (ValueError, KeyError, AttributeError, TypeError):
            if isinstance(text, str) and text.lstrip().startswith("{"):
                return super().parse(text)
        raise _problem(text)

    def to_string(self, arch: Mapping[str, Option]) -> str:
        """Return the architecture in the benchmark's notation.

        Raises:
            ArchError: the architecture is not of this space.

        Example:
            >>> NASBench201().to_string(NASBench201().at(0))
            '|none~0|+|none~0|none~1|+|none~0|none~1|none~2|'
        """
        return "|{e01}~0|+|{e02}~0|{e12}~1|+|{e03}~0|{e13}~1|{e23}~2|".format_map(self.check(arch))

    def index_of(self, text: str) -> int:
        """Return ``space.index(space.parse(text))`` of a string in the benchmark's notation, about a microsecond each.

        Raises:
            ArchError: the text is not in this notation.

        Example:
            >>> NASBench201().index_of("|none~0|+|none~0|none~1|+|none~0|skip_connect~1|avg_pool_3x3~2|")
            9
        """
        try:
            b, e01, p, e02, e12, q, e03, e13, e23, e = text.split("|")
            if (b, p, q, e) == ("", "+", "+", ""):
                s = _SHARES
                return s[0][e01] + s[1][e02] + s[2][e12] + s[3][e03] + s[4][e13] + s[5][e23]
        except (ValueError, KeyError, AttributeError, TypeError):
            pass  # the problem is raised below, outside of this error
        raise _problem(text)

    # Equal functions -----------------------------------------------------------------------------------------------

    def canonical(self, arch: Arch) -> Arch:
        """Return the cheapest cell with the same `expression`: 5,545 cells stand for all 15,625.

        Cheapest: fewest multiply-adds, then fewest poolings, then fewest skips, then the lowest index. Two convolutions
        of the same input may so become one that is read twice; `expression` says more. The first call compares all
        cells, in about 0.2 s.

        Raises:
            ArchError: the architecture is not of this space.

        Example:
            >>> space = NASBench201()
            >>> twice = space.parse("|skip_connect~0|+|none~0|nor_conv_3x3~1|+|none~0|none~1|skip_connect~2|")
            >>> space.to_string(space.canonical(twice))
            '|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|'
        """
        return self.at(_representatives()[self.index(self.check(arch))])

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the edges (from, to, operation) among ``input``, ``1``, ``2`` and ``output``, without `none`."""
        nodes = ("input", "1", "2", "output")
        return [(nodes[a], nodes[b], str(arch[d])) for d, (a, b) in EDGES.items() if arch[d] != "none"]


def expression(operations: Sequence[str], *, constants: bool = True, weights: bool = False) -> Value:
    """Return what a cell computes: the sorted terms whose sum is its output, each (operation, terms of its input).

    Zeros are left out of sums: `none`, and a skip or a pooling of nothing. A skip adds the terms of its input to the
    sum it enters. Order does not matter, since all terms are sorted. A pooling of a sum is not split into poolings.
    Over the space this gives 5,545 expressions.

    Convolutions are compared by what they read, not by their weights, so ``h + h`` with h = conv(x) equals the sum of
    two convolutions of x. Where that matters, `weights` tells them apart: 5,875 expressions.

    Args:
        operations: one per edge, in the order of `EDGES`.
        constants: keep convolutions of nothing. They yield the bias of their batch norm, so they are not zero. Without
            them there are 4,930 expressions.
        weights: add a term for every convolution, with the number of times that the sum contains it.

    Example:
        >>> expression(["nor_conv_1x1", "none", "skip_connect", "avg_pool_3x3", "none", "skip_connect"])
        (('avg_pool_3x3', (('input', ()),)), ('nor_conv_1x1', (('input', ()),)))
    """
    values: list[Value] = [(("input", ()),)]
    convolutions: list[tuple[Term, int]] = []
    edges = iter(operations)
    for node in (1, 2, 3):
        terms: list[Term] = []
        for value, op in zip(values[:node], edges, strict=False):
            if op == "skip_connect":
                terms += value
            elif op != "none" and (value or (constants and op != "avg_pool_3x3")):
                terms.append((op, value))
                if op != "avg_pool_3x3":
                    convolutions.append(((op, value), node))
        values.append(tuple(sorted(terms)))
    if not weights:
        return values[3]
    from2, from1 = int(operations[5] != "none"), int(operations[4] != "none")
    from1 += from2 * (operations[2] != "none")
    paths = {1: from1, 2: from2, 3: 1}  # from a node to the output: what enters the node is in the sum this many times
    return values[3] + tuple(sorted((f"{paths[node]}x", (term,)) for term, node in convolutions if paths[node]))


@lru_cache(maxsize=1)
def _representatives() -> array[int]:
    """For every index, the index of the cell that stands for it."""
    cells = list(product(OPERATIONS, repeat=len(EDGES)))
    values = [expression(cell) for cell in cells]

    def cost(index: int) -> tuple[int, ...]:
        count = cells[index].count
        macs = 9 * count("nor_conv_3x3") + count("nor_conv_1x1")  # per pixel, in units of channels squared
        return macs, count("avg_pool_3x3"), count("skip_connect"), index

    cheapest = {values[i]: i for i in sorted(range(len(cells)), key=cost, reverse=True)}
    return array("H", (cheapest[value] for value in values))


def _problem(text: object) -> ArchError:
    """Return the error that says why a text is no architecture string."""
    form = "'|op~0|+|op~0|op~1|+|op~0|op~1|op~2|'"
    found = f"{text[:200]!r}" if isinstance(text, str) else f"{type(text).__name__} {text!r:.80}"
    problem = f"{found} is no architecture of NASBench201, which has the form {form}"
    if isinstance(text, str) and len(pieces := text.split("|")) == 10:
        edges = [piece for place, piece in enumerate(pieces) if place not in (0, 2, 5, 9)]
        for (decision, (source, _)), piece in zip(EDGES.items(), edges, strict=True):
            op, _, node = piece.partition("~")
            if op not in OPERATIONS:
                return ArchError(f"{problem}: edge {decision} has operation {op!r}; {nearest(op, OPERATIONS)}")
            if node != str(source):
                return ArchError(f"{problem}: edge {decision} must read '{op}~{source}', not {piece!r}.")
    return ArchError(f"{problem}. Write one with space.to_string(arch).")


def _network(space: NASBench201, make: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the benchmark's network of cells that `make` makes by their channels."""
    space.require("classes", "in_channels")
    assert space.classes is not None and space.in_channels is not None
    c = space.channels

    def stage(width: int) -> nn.Sequential:
        return nn.Sequential(*(make(width) for _ in range(space.cells)))

    return nn.Sequential(
        OrderedDict(
            stem=ConvBN(space.in_channels, c, kernel=3),
            stage1=stage(c),
            reduction1=Reduction(c, 2 * c),
            stage2=stage(2 * c),
            reduction2=Reduction(2 * c, 4 * c),
            stage3=stage(4 * c),
            head=nn.Sequential(
                OrderedDict(
                    norm=nn.BatchNorm2d(4 * c),
                    relu=nn.ReLU(),
                    pool=nn.AdaptiveAvgPool2d(1),
                    flatten=nn.Flatten(),
                    linear=nn.Linear(4 * c, space.classes),
                )
            ),
        )
    )


class NASBench201Supernet(Supernet):
    """All cells of the benchmark in its network, weights shared; made by `NASBench201.supernet`.

    Attributes:
        network: the benchmark's network, a `RelaxedCell` in place of each cell.
    """

    space: NASBench201

    def __init__(self, space: NASBench201, *, form: str, recompute: bool, partial_channels: int) -> None:
        super().__init__(space)
        check_settings("NASBench201", form, partial_channels, space.channels)

        def make(channels: int) -> RelaxedCell:
            return RelaxedCell(
                EDGES,
                OPERATIONS,
                _operation,
                channels,
                outputs=(3,),
                node_sites={2: "inputs2", 3: "inputs3"},
                form=form,
                recompute=recompute,
                partial_channels=partial_channels,
            )

        self.network = _network(space, make)

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        mixture = prepare(self.space, mixture, x)
        for name, module in self.network.named_children():
            if name.startswith("stage"):
                for cell in module.children():
                    x = cell(mixture, x)
            else:
                x = module(x)
        return x

    def extract(self, arch: Arch) -> nn.Module:
        arch = self.space.check(arch)
        children: OrderedDict[str, nn.Module] = OrderedDict()
        for name, module in self.network.named_children():
            if name.startswith("stage"):
                children[name] = nn.Sequential(
                    *(Cell.of(c, arch) for c in module.children() if isinstance(c, RelaxedCell))
                )
            else:
                children[name] = copy.deepcopy(module)
        network = nn.Sequential(children)
        return network.train(self.training)


def _operation(name: str, channels: int, stride: int) -> nn.Module:
    """An operation of a supernet's cell; it is never strided."""
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return ReLUConvBN(channels, channels, kernel=3 if name == "nor_conv_3x3" else 1, affine=False)


class Cell(nn.ModuleDict):
    """One cell, its operations named by their edges: (B, C, H, W) to the same shape.

    What is computed is settled when the cell is made: `plan` lists each node that the output needs, with its edges;
    `none`, and whatever passes on nothing but zeros, is not among them.
    """

    def __init__(self, arch: Arch, channels: int) -> None:
        super().__init__()
        for decision in EDGES:
            if arch[decision] == "nor_conv_1x1":
                self[decision] = ReLUConvBN(channels, channels, kernel=1)
            elif arch[decision] == "nor_conv_3x3":
                self[decision] = ReLUConvBN(channels, channels, kernel=3)
            elif arch[decision] == "avg_pool_3x3":
                self[decision] = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.plan = tuple(_plan(arch))

    @classmethod
    def of(cls, relaxed: RelaxedCell, arch: Arch) -> Self:
        """Return the cell that has copies of a relaxed cell's operations."""
        cell = cls(Arch(dict.fromkeys(EDGES, "none")), relaxed.channels)
        partial = relaxed.partial_channels > 1  # then a skip shuffles channels
        for decision in EDGES:
            if (name := str(arch[decision])) != "none" and (partial or name != "skip_connect"):
                cell[decision] = copy.deepcopy(relaxed.chosen(decision, name))
        cell.plan = tuple(_plan(arch, partial))
        return cell

    def forward(self, x: Tensor) -> Tensor:
        states = {0: x}
        for node, edges in self.plan:
            total = None
            for source, name in edges:
                term = states[source] if name is None else self[name](states[source])
                total = term if total is None else total + term
            states[node] = torch.zeros_like(x) if total is None else total
        return states[3]


def _plan(arch: Arch, skips: bool = False) -> Iterator[tuple[int, tuple[tuple[int, str | None], ...]]]:
    """Yield (node, its edges) for the nodes to compute, in order; an edge is (source, decision), or None for a skip.

    With `skips` a skip is an operation like others.
    """
    incoming: dict[int, list[tuple[int, str]]] = {0: [], 1: [], 2: [], 3: []}
    nonzero = {0}
    for decision, (source, node) in EDGES.items():
        if arch[decision] in ("nor_conv_1x1", "nor_conv_3x3") or (arch[decision] != "none" and source in nonzero):
            incoming[node].append((source, decision))
            nonzero.add(node)
    needed = {3}
    for node in (3, 2, 1):
        if node in needed:
            needed.update(source for source, _ in incoming[node])
    for node in (1, 2, 3):
        if node in needed:
            yield node, tuple((s, None if arch[d] == "skip_connect" and not skips else d) for s, d in incoming[node])


class Reduction(nn.Module):
    """The benchmark's residual block: halves the image, (B, c_in, H, W) to (B, c_out, H / 2, W / 2), rounded up."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = ReLUConvBN(c_in, c_out, kernel=3, stride=2)
        self.conv2 = ReLUConvBN(c_out, c_out, kernel=3)
        # ceil_mode: as many pixels as the strided convolution leaves of an odd image; even ones are not affected.
        self.pool = nn.AvgPool2d(2, stride=2, ceil_mode=True)
        self.shortcut = nn.Conv2d(c_in, c_out, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.shortcut(self.pool(x)), self.conv2(self.conv1(x)))
