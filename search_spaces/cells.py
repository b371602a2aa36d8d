"""Cells of two inputs as values (`Genotype`), and the modules that they are built as.

One numbering everywhere, that of DARTS: state 0 is the output of the cell before the previous one (h_{i-1} of the
NASNet paper), state 1 that of the previous cell (h_i), and block k makes state k + 2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor, nn

from search_spaces.base import ArchError, nearest
from search_spaces.operations import (
    DARTS_OPERATIONS,
    NASNET_OPERATIONS,
    SPARSE_OPERATIONS,
    ConvBN,
    DropPath,
    FactorizedReduce,
    operation,
)

COMBINATIONS = ("add", "concat")
STEMS = ("cifar", "imagenet")
_OPERATIONS = tuple(
    name for name in dict.fromkeys(NASNET_OPERATIONS + DARTS_OPERATIONS + SPARSE_OPERATIONS) if name != "none"
)
_T = TypeVar("_T")


# Values ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A new state: an operation on one earlier state and an operation on another (or the same), added or concatenated.

    Raises:
        ArchError: an operation or a combination is unknown. The inputs are checked by the cell, which numbers them.
    """

    op1: str
    input1: int
    op2: str
    input2: int
    combine: str = "add"

    def __post_init__(self) -> None:
        for op in (self.op1, self.op2):
            if op == "none":
                raise ArchError("a block was given the operation 'none': it has exactly two edges, so leave none out.")
            if op not in _OPERATIONS:
                raise ArchError(f"a block was given the operation {op!r}, which is unknown; {nearest(op, _OPERATIONS)}")
        if self.combine not in COMBINATIONS:
            raise ArchError(f"a block was given combine={self.combine!r}; choices are {', '.join(COMBINATIONS)}.")

    @property
    def edges(self) -> tuple[tuple[int, str], tuple[int, str]]:
        """The two edges, each (input state, operation), in the order in which they are added."""
        return (self.input1, self.op1), (self.input2, self.op2)

    def ordered(self) -> Block:
        """Return the block with its edges sorted by input, then by operation: it computes the same."""
        (input1, op1), (input2, op2) = sorted(self.edges)
        return Block(op1, input1, op2, input2, self.combine)


@dataclass(frozen=True)
class CellGenotype:
    """A cell: its blocks, and the states whose concatenation is its output.

    Args:
        blocks: block k makes state k + 2 of the states before it; 0 and 1 are the cell's inputs.
        concat: the states of the output, in their order there; `unused` of the blocks, as NASNet has it, and DARTS all
            but 0 and 1.

    Raises:
        ArchError: there is no block, an edge is missing, a block reads its own or a later state, or `concat` is empty,
            names a state twice, or one that is not there.

    Example:
        >>> cell = CellGenotype((Block("sep_conv_3x3", 0, "skip_connect", 1),), concat=(2,))
        >>> cell.states
        3
    """

    blocks: tuple[Block, ...]
    concat: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # lists, as JSON has them, would not be hashable
        object.__setattr__(self, "concat", tuple(self.concat))
        if not self.blocks:
            raise ArchError("a cell was given no blocks; it needs at least one: Block(op1, input1, op2, input2).")
        for state, block in enumerate(self.blocks, start=2):
            for side, source in ((1, block.input1), (2, block.input2)):
                _check_edge(state, side, source)
        if not self.concat:
            raise ArchError("a cell was given concat=(), so it has no output; name the states to concatenate.")
        for state in self.concat:
            if type(state) is not int or not 0 <= state < self.states:
                raise ArchError(
                    f"a cell was given concat={self.concat}, but it has no state {state!r}: with "
                    f"{len(self.blocks)} blocks there are the states 0..{self.states - 1}."
                )
        if len(set(self.concat)) < len(self.concat):
            raise ArchError(f"a cell was given concat={self.concat}, which names a state twice; name each once.")

    @property
    def states(self) -> int:
        """The number of states, the two inputs included."""
        return len(self.blocks) + 2

    def ordered(self) -> CellGenotype:
        """Return the cell with the edges of every block sorted: it computes the same."""
        return CellGenotype(tuple(block.ordered() for block in self.blocks), self.concat)

    def graph(self) -> list[tuple[str, str, str]]:
        """Return the edges (from, to, operation) among ``previous`` (state 0), ``input`` (1), ``2``, ... ``output``."""
        names = ["previous", "input", *map(str, range(2, self.states))]
        edges = [
            (names[source], names[state], op)
            for state, block in enumerate(self.blocks, start=2)
            for source, op in block.edges
        ]
        return edges + [(names[state], "output", "") for state in self.concat]


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network: the normal one, and the one that halves the image.

    Example:
        >>> cell = CellGenotype((Block("sep_conv_3x3", 0, "max_pool_3x3", 1),), concat=(2,))
        >>> genotype = Genotype(normal=cell, reduce=cell)
        >>> Genotype.from_json(genotype.to_json()) == genotype
        True
    """

    normal: CellGenotype
    reduce: CellGenotype

    def ordered(self) -> Genotype:
        """Return the genotype with the edges of every block sorted: it computes the same."""
        return Genotype(self.normal.ordered(), self.reduce.ordered())

    def graphs(self) -> dict[str, list[tuple[str, str, str]]]:
        """Return the edges of both cells for drawing, ``normal`` and ``reduction`` (`CellGenotype.graph`)."""
        return {"normal": self.normal.graph(), "reduction": self.reduce.graph()}

    def to_json(self) -> str:
        """Return the genotype as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read what `to_json` wrote.

        Raises:
            ArchError: the text is no JSON of this form, or a cell in it is not legal; it says which cell and block.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArchError(f"not a genotype: {text[:80]!r} is no JSON ({error}). Write one with to_json().") from None
        cells = _members("a genotype", values, {"normal": dict, "reduce": dict})
        return cls(**{name: _cell_from_json(name, cell) for name, cell in cells.items()})


def unused(blocks: Sequence[Block]) -> tuple[int, ...]:
    """Return the states made by these blocks that none of them reads: what NASNet concatenates.

    Example:
        >>> unused([Block("identity", 0, "identity", 1), Block("identity", 2, "conv_1x1", 0)])
        (3,)
    """
    used = {source for block in blocks for source, _ in block.edges}
    return tuple(state for state in range(2, len(blocks) + 2) if state not in used)


def renumberings(blocks: Sequence[Block]) -> Iterator[tuple[Block, ...]]:
    """Yield the same cell under every order of its blocks in which each comes after those it reads.

    The edges of every block are sorted. All of these compute the same, but for the order of the output's channels.

    Example:
        >>> blocks = [Block("conv_1x1", 0, "identity", 1), Block("conv_3x3", 0, "identity", 1)]
        >>> [[block.op1 for block in order] for order in renumberings(blocks)]
        [['conv_1x1', 'conv_3x3'], ['conv_3x3', 'conv_1x1']]
    """

    def extend(done: tuple[Block, ...], names: dict[int, int]) -> Iterator[tuple[Block, ...]]:
        if len(done) == len(blocks):
            yield done
        for state, block in enumerate(blocks, start=2):
            if state not in names and block.input1 in names and block.input2 in names:
                renamed = Block(block.op1, names[block.input1], block.op2, names[block.input2], block.combine)
                yield from extend((*done, renamed.ordered()), names | {state: len(done) + 2})

    yield from extend((), {0: 0, 1: 1})


def check_stem(owner: str, stem: object) -> None:
    """Raise `ArchError` if there is no such stem."""
    if stem not in STEMS:
        raise ArchError(f"{owner} was given stem={stem!r}; choices are {', '.join(STEMS)}.")


def _check_edge(state: int, side: int, source: object) -> None:
    if source is None:
        raise ArchError(
            f"the block that makes state {state} lacks an edge: input{side} is None. Every block reads two states; "
            f"give it one of 0..{state - 1}."
        )
    if type(source) is not int or source < 0:
        raise ArchError(f"the block that makes state {state} has input{side}={source!r}; it is one of 0..{state - 1}.")
    if source >= state:
        raise ArchError(
            f"the block that makes state {state} reads state {source} (input{side}), which is not there yet: it can "
            f"read 0..{state - 1}. Put the block that makes state {source} before it."
        )


def _members(what: str, values: object, members: Mapping[str, type[_T]], optional: Sequence[str] = ()) -> dict[str, _T]:
    """Return the members of a JSON object that has these, of these types, and no others."""
    if not isinstance(values, dict):
        raise ArchError(f"{what} is a JSON object with {', '.join(members)}, got {str(values)[:80]!r}.")
    if missing := [name for name in members if name not in values and name not in optional]:
        raise ArchError(f"{what} needs {missing[0]!r}, got {', '.join(map(repr, values)) or 'nothing'}.")
    if unknown := [name for name in values if name not in members]:
        raise ArchError(f"{what} has no {unknown[0]!r}; {nearest(unknown[0], members)}")
    for name, value in values.items():
        if not isinstance(value, members[name]):
            raise ArchError(f"{what} has {name}={str(value)[:80]!r}; it is of type {members[name].__name__}.")
    return values


def _cell_from_json(name: str, values: object) -> CellGenotype:
    parts: dict[str, list[Any]] = _members(f"the {name} cell", values, {"blocks": list, "concat": list})
    blocks: list[Block] = []
    forms: dict[str, type] = {"op1": str, "input1": object, "op2": str, "input2": object, "combine": str}
    try:
        for state, block in enumerate(parts["blocks"], start=2):
            blocks.append(Block(**_members(f"the block that makes state {state}", block, forms, ["combine"])))
        return CellGenotype(tuple(blocks), tuple(parts["concat"]))
    except ArchError as error:
        raise ArchError(f"{name} cell: {error}") from None


# Modules --------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """A cell put together from given modules: s0 (B, C0, H0, W0), s1 (B, C1, H1, W1) to (B, C, H, W).

    Args:
        genotype: which operation reads which state. Its names of operations are not looked at.
        preprocess0: brings s0 to the size and channels of state 0.
        preprocess1: brings s1 to those of state 1.
        operations: two for every block, first that of `input1`. The sum is first + second, in this order.
        outputs: modules for states of the output that cannot be concatenated as they are.
        drop_paths: for every operation its drop-path or None; empty for none at all.

    Raises:
        ArchError: there are not two operations for every block.

    Example:
        >>> cell = CellGenotype((Block("max_pool_3x3", 0, "skip_connect", 1),), concat=(2, 1))
        >>> module = Cell(cell, nn.Identity(), nn.Identity(), [nn.MaxPool2d(3, 1, 1), nn.Identity()])
        >>> module(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        genotype: CellGenotype,
        preprocess0: nn.Module,
        preprocess1: nn.Module,
        operations: Sequence[nn.Module],
        outputs: Mapping[int, nn.Module] | None = None,
        drop_paths: Sequence[DropPath | None] = (),
    ) -> None:
        super().__init__()
        wanted = 2 * len(genotype.blocks)
        if len(operations) != wanted or len(drop_paths) not in (0, wanted):
            raise ArchError(
                f"a cell of {len(genotype.blocks)} blocks was given {len(operations)} operations and "
                f"{len(drop_paths)} drop-paths; it needs {wanted} operations, and as many drop-paths or none."
            )
        self.genotype = genotype
        self.preprocess0 = preprocess0
        self.preprocess1 = preprocess1
        self.operations = nn.ModuleList(operations)
        self.drop_paths = nn.ModuleDict({str(i): path for i, path in enumerate(drop_paths) if path is not None})
        self.outputs = nn.ModuleDict({str(state): module for state, module in (outputs or {}).items()})

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for k, block in enumerate(self.genotype.blocks):
            first = self._edge(2 * k, states[block.input1])
            second = self._edge(2 * k + 1, states[block.input2])
            states.append(first + second if block.combine == "add" else torch.cat([first, second], dim=1))
        outputs = [
            self.outputs[str(i)](states[i]) if str(i) in self.outputs else states[i] for i in self.genotype.concat
        ]
        return torch.cat(outputs, dim=1)

    def _edge(self, i: int, x: Tensor) -> Tensor:
        y: Tensor = self.operations[i](x)
        return self.drop_paths[str(i)](y) if str(i) in self.drop_paths else y


def make_cell(
    genotype: CellGenotype,
    preprocess0: nn.Module,
    preprocess1: nn.Module,
    widths: tuple[int, int],
    channels: int,
    stride: int = 1,
    *,
    depth: float = 1.0,
) -> Cell:
    """Return a fresh cell of a network to train: (B, ., H, W) twice to (B, len(concat) * channels, H / stride, ...).

    Stride 2 is that of the operations on states 0 and 1. Every state has `channels` channels; one that a block
    concatenates has twice as many, which the operations that read it undo. Drop-path follows every operation but the
    identity. What is concatenated is brought to the output's size by a `FactorizedReduce`, to `channels` by a 1x1
    convolution.

    Args:
        widths: channels of states 0 and 1.
        depth: that of the `DropPath`.

    Raises:
        ArchError: a factorized reduction would make an odd number of channels.
    """
    width = [*widths, *(channels if block.combine == "add" else 2 * channels for block in genotype.blocks)]
    operations: list[nn.Module] = []
    drop_paths: list[DropPath | None] = []
    for block in genotype.blocks:
        for source, name in block.edges:
            op = operation(name, width[source], channels, stride if source < 2 else 1)
            operations.append(op)
            drop_paths.append(None if name == "identity" or isinstance(op, nn.Identity) else DropPath(depth=depth))
    outputs: dict[int, nn.Module] = {}
    for state in genotype.concat:
        if state < 2 and stride > 1:
            outputs[state] = FactorizedReduce(width[state], channels, relu=False)
        elif width[state] != channels:
            outputs[state] = ConvBN(width[state], channels, kernel=1)
    return Cell(genotype, preprocess0, preprocess1, operations, outputs, drop_paths)


class CellNetwork(nn.Module):
    """Cells of two inputs in a row: (B, in_channels, H, W) images to (B, classes) logits.

    The children are ``stem``, ``cell0``, ``cell1``, ... and ``head``, and ``auxiliary`` if there is one: then a forward
    in training mode returns (logits, auxiliary logits), in evaluation mode logits.

    Args:
        stem: modules applied one after the other; the output of each is a state of the network.
        cells: the cells; their outputs are the states that follow.
        sources: for every cell the two states of the network that it reads; by default the two before it, and where
            there is but one, that one twice.
        head: last state to logits.
        auxiliary: output of cell `auxiliary_after` to logits.
    """

    def __init__(
        self,
        stem: Sequence[nn.Module],
        cells: Sequence[nn.Module],
        head: nn.Module,
        sources: Sequence[tuple[int, int]] | None = None,
        auxiliary: nn.Module | None = None,
        auxiliary_after: int = -1,
    ) -> None:
        super().__init__()
        self.stem = nn.ModuleList(stem)
        for i, cell in enumerate(cells):
            self.add_module(f"cell{i}", cell)
        self.head = head
        if auxiliary is not None:
            self.auxiliary = auxiliary
        self.auxiliary_after = auxiliary_after if auxiliary is not None else -1
        if sources is None:
            sources = [(max(0, last - 1), last) for last in range(len(stem) - 1, len(stem) - 1 + len(cells))]
        self.sources = tuple(sources)

    @property
    def cells(self) -> list[nn.Module]:
        """The cells, in order."""
        return [self.get_submodule(f"cell{i}") for i in range(len(self.sources))]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        states: dict[int, Tensor] = {}
        for module in self.stem:
            x = module(x)
            states[len(states)] = x
        auxiliary = None
        for i, cell in enumerate(self.cells):
            s0, s1 = self.sources[i]
            x = cell(states[s0], states[s1])
            states[len(self.stem) + i] = x
            for state in {s0, s1} - {s for later in self.sources[i + 1 :] for s in later}:
                states.pop(state)  # nobody reads it any more: in evaluation its memory is free
            if self.training and i == self.auxiliary_after:
                auxiliary = self.auxiliary(x)
        logits: Tensor = self.head(x)
        return logits if auxiliary is None else (logits, auxiliary)


class AuxiliaryHead(nn.Module):
    """A second classifier halfway, for training only: (B, channels, size, size) to (B, classes).

    ReLU, average pooling 5x5, 1x1 convolution to 128 channels, then one to 768 over the whole map, linear layer.

    Args:
        size: side of the map that it reads, for its last convolution has that of the pooled map.
        stride: stride of the pooling.
        last_norm: batch norm after the last convolution. DARTS's network for ImageNet has none, by an oversight that
            its authors kept.

    Raises:
        ArchError: the map is too small for the pooling, here or when it is called; or it has another size than `size`.

    Example:
        >>> AuxiliaryHead(16, classes=10, size=8)(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, classes: int, *, size: int, stride: int = 3, last_norm: bool = True) -> None:
        super().__init__()
        if size < 5:
            raise ArchError(
                f"the auxiliary head pools 5x5 pixels, but reads a map of {size}x{size}. Use larger images (image_size "
                "of the space), or auxiliary=False."
            )
        self.stride = stride
        self.size = (size - 5) // stride + 1  # of the pooled map
        self.relu = nn.ReLU()
        self.pool = nn.AvgPool2d(5, stride=stride)
        self.conv1 = ConvBN(channels, 128, kernel=1)
        self.conv2 = nn.Conv2d(128, 768, self.size, bias=False)
        self.norm = nn.BatchNorm2d(768) if last_norm else nn.Identity()
        self.linear = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(x, self.size, self.stride)
        x = self.relu(self.conv1(self.pool(self.relu(x))))
        logits: Tensor = self.linear(self.relu(self.norm(self.conv2(x))).flatten(1))
        return logits


def _check_map(x: Tensor, size: int, stride: int) -> None:
    height, width = x.shape[-2:]
    if any(side < 5 or (side - 5) // stride + 1 != size for side in (height, width)):
        raise ArchError(
            f"the auxiliary head reads a map of {height}x{width} pixels, but was made for one of side "
            f"{5 + (size - 1) * stride} to {4 + size * stride}. Tell the space its image_size, or use auxiliary=False."
        )


torch.fx.wrap("_check_map")  # tracing would otherwise fail on its condition
