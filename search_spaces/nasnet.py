"""NASNet: a normal and a reduction cell of five blocks and thirteen operations, in the network of the paper.

Source: Zoph et al., Learning Transferable Architectures for Scalable Image Recognition, CVPR 2018, arXiv:1707.07012;
details as in the authors' code.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from search_spaces.base import Arch, ArchError, Choices, SearchSpace
from search_spaces.cells import (
    COMBINATIONS,
    AuxiliaryHead,
    Block,
    Cell,
    CellGenotype,
    CellNetwork,
    Genotype,
    check_stem,
    make_cell,
    renumberings,
    unused,
)
from search_spaces.operations import NASNET_OPERATIONS, FactorizedReduce, ReLUConvBN

CELLS = ("normal", "reduce")
STATES = (2, 3, 4, 5, 6)
_CHOICES: Choices = {
    f"{cell}{state}_{name}": options
    for cell in CELLS
    for state in STATES
    for name, options in (
        ("input1", tuple(range(state))),
        ("op1", NASNET_OPERATIONS),
        ("input2", tuple(range(state))),
        ("op2", NASNET_OPERATIONS),
        ("combine", COMBINATIONS),
    )
}


@dataclass(frozen=True)
class NASNet(SearchSpace):
    """The cells of NASNet: 2.3e18 normal times as many reduction cells.

    A cell has states 0 and 1, the outputs of the two cells before it, and five blocks, which make states 2 to 6. For a
    block there are five decisions: ``normal3_input1`` and ``normal3_op1``, ``normal3_input2`` and ``normal3_op2``, and
    ``normal3_combine``, which adds or concatenates the two. States that no block reads are the cell's output.

    The network is the paper's "N @ P" with ``repeats=N``, such as 6 @ 768. Its networks for ImageNet: mobile has
    ``filters=44, repeats=4, stem="imagenet", stem_filters=32``, large ``filters=168, repeats=6, stem="imagenet",
    skip_reduction_input=True``. Images may have any size; with the stem for CIFAR 8x8 ends as 2x2.

    Args:
        filters: channels of a state in the first cells (F). Reduction cells double it.
        repeats: normal cells before, between and after the two reduction cells (N).
        stem: what precedes the cells: ``"cifar"``, a 3x3 convolution, or ``"imagenet"``, a strided one and two
            reduction cells of a quarter and half of `filters`.
        stem_filters: channels of the stem's convolution: ``3 * filters``, or 96 for ImageNet, if ``None``.
        skip_reduction_input: the first normal cell after a reduction cell reads, as h_{i-1}, what that read as its
            h_{i-1}, not what it read as its h_i.
        auxiliary: in training, networks return (logits, logits of an auxiliary head before the second reduction).
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.
        image_size: side of an image, which only the auxiliary head has to know: 32, or 224 for ImageNet, if ``None``.

    Raises:
        ArchError: a setting is no positive integer, there is no such stem, or `filters` cannot be divided by 4 for
            that of ImageNet.

    Example:
        >>> from random import Random
        >>> import torch
        >>> space = NASNet(filters=4, repeats=1, classes=10, in_channels=1)
        >>> arch = space.sample(Random(0))
        >>> space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> len(arch), space.genotype(arch).normal.blocks[0].combine == arch["normal2_combine"]
        (50, True)
    """

    filters: int = 32
    repeats: int = 6
    stem: str = "cifar"
    stem_filters: int | None = None
    skip_reduction_input: bool = False
    auxiliary: bool = False
    classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        optional = [name for name in ("stem_filters", "image_size") if getattr(self, name) is not None]
        self.require_positive("filters", "repeats", "classes", "in_channels", *optional)
        _check_stem(self.stem, self.filters)

    @property
    def choices(self) -> Choices:
        return _CHOICES

    def build(self, arch: Arch) -> nn.Module:
        """Return the network of these cells, to be trained from scratch: (B, in_channels, H, W) to (B, classes) logits.

        Drop-path (off until a recipe sets it) follows every operation but the identity, and grows with depth.

        Raises:
            ArchError: the architecture is not of this space, the space is not bound to data, or the auxiliary head
                would read a map too small for it.
        """
        genotype = self.genotype(arch)
        self.require("classes", "in_channels")
        assert self.classes is not None and self.in_channels is not None
        return nasnet_network(
            genotype,
            filters=self.filters,
            repeats=self.repeats,
            classes=self.classes,
            in_channels=self.in_channels,
            stem=self.stem,
            stem_filters=self.stem_filters,
            skip_reduction_input=self.skip_reduction_input,
            auxiliary=self.auxiliary,
            image_size=self.image_size,
        )

    def genotype(self, arch: Arch) -> Genotype:
        """Return the two cells of an architecture.

        Raises:
            ArchError: the architecture is not of this space.
        """
        arch = self.check(arch)
        fields = ("op1", "input1", "op2", "input2", "combine")

        def cell(kind: str) -> CellGenotype:
            blocks = [Block(*(arch[f"{kind}{state}_{field}"] for field in fields)) for state in STATES]  # type: ignore[arg-type]
            return CellGenotype(tuple(blocks), unused(blocks))

        return Genotype(*map(cell, CELLS))

    def arch_of(self, genotype: Genotype) -> Arch:
        """Return the architecture of two cells.

        Raises:
            ArchError: they are none of this space: other than five blocks, an operation that NASNet has not, or an
                output other than the unused states. The message says which.
        """
        values: dict[str, str | int] = {}
        for kind, cell in zip(CELLS, (genotype.normal, genotype.reduce), strict=True):
            if problem := _problem(cell):
                raise ArchError(
                    f"the {kind} cell is none of NASNet's: {problem}. nasnet_network(genotype, ...) builds it all the "
                    "same."
                )
            for state, block in zip(STATES, cell.blocks, strict=True):
                values |= {f"{kind}{state}_{field}": value for field, value in vars(block).items()}
        return self.arch(values)

    def canonical(self, arch: Arch) -> Arch:
        """Return the one of lowest index among those whose cells differ in the order of blocks and in-block edges only.

        Where a block or the output is a concatenation, its channels change places, as the weights behind it do.
        """
        genotype = self.genotype(arch)

        def smallest(cell: CellGenotype) -> CellGenotype:
            orders = (tuple(map(_ordered, blocks)) for blocks in renumberings(cell.blocks))
            blocks = min(orders, key=lambda order: [_key(block) for block in order])
            return CellGenotype(blocks, unused(blocks))

        return self.arch_of(Genotype(smallest(genotype.normal), smallest(genotype.reduce)))

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the edges (from, to, operation) of the normal cell; `graphs` has both."""
        return self.genotype(arch).normal.graph()

    def graphs(self, arch: Arch) -> dict[str, list[tuple[str, str, str]]]:
        """Return the edges of the ``normal`` and of the ``reduction`` cell.

        Nodes are ``previous`` (state 0), ``input`` (state 1), ``2`` to ``6`` and ``output``.
        """
        return self.genotype(arch).graphs()


def nasnet_network(
    genotype: Genotype,
    *,
    filters: int = 32,
    repeats: int = 6,
    classes: int = 10,
    in_channels: int = 3,
    stem: str = "cifar",
    stem_filters: int | None = None,
    skip_reduction_input: bool = False,
    separate_reductions: bool = True,
    auxiliary: bool = False,
    image_size: int | None = None,
) -> CellNetwork:
    """Return NASNet's network of any two cells: (B, in_channels, H, W) images to (B, classes) logits.

    The defaults are those of NASNet-A (6 @ 768) for CIFAR-10; `NASNet` explains the settings. There is no dropout
    before the last layer. The authors' padding of strided layers is that of TensorFlow, ours is symmetric.

    Args:
        separate_reductions: as in NASNet, a reduction cell stands before the second and the third `repeats` normal
            cells. If False, as in PNASNet, the first of these cells are the reductions. PNASNet-5-Large is
            ``nasnet_network(PNASNET_5, filters=216, repeats=4, classes=1000, stem="imagenet",
            separate_reductions=False)``.

    Raises:
        ArchError: there is no such stem, `filters` cannot be divided by 4 for that of ImageNet, a map is too small for
            the auxiliary head, or a factorized reduction would make an odd number of channels.

    Example:
        >>> import torch
        >>> from search_spaces.published import NASNET_A
        >>> with torch.device("meta"):
        ...     network = nasnet_network(NASNET_A)
        >>> sum(p.numel() for p in network.parameters())
        3346538
    """
    _check_stem(stem, filters)
    imagenet = stem == "imagenet"
    width = (96 if imagenet else 3 * filters) if stem_filters is None else stem_filters
    first = nn.Conv2d(in_channels, width, 3, stride=2 if imagenet else 1, padding=0 if imagenet else 1, bias=False)
    places = _places(filters, repeats, imagenet, skip_reduction_input, separate_reductions)
    widths, halvings = [width], [0]  # of the network's states: the stem, then the cells
    cells: list[Cell] = []
    for i, place in enumerate(places):
        cell = genotype.reduce if place.reduction else genotype.normal
        cells.append(_cell(cell, place, widths, halvings, depth=(i + 1) / len(places)))
        widths.append(place.filters * len(cell.concat))
        halvings.append(halvings[place.current] + place.reduction)
    head = nn.Sequential(
        OrderedDict(
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(widths[-1], classes),
        )
    )
    stems = [nn.Sequential(OrderedDict(conv=first, norm=nn.BatchNorm2d(width)))]
    sources = [(place.current if place.previous is None else place.previous, place.current) for place in places]
    if not auxiliary:
        return CellNetwork(stems, cells, head, sources)
    last = [i for i, place in enumerate(places) if place.reduction][-1] - 1
    side = (224 if imagenet else 32) if image_size is None else image_size
    size = math.ceil(((side - 1) // 2 if imagenet else side) / 2 ** halvings[last + 1])
    extra = AuxiliaryHead(widths[last + 1], classes, size=size)
    return CellNetwork(stems, cells, head, sources, auxiliary=extra, auxiliary_after=last)


@dataclass(frozen=True)
class _Place:
    """Where a cell stands: its inputs are states of the network, 0 the stem's output, i + 1 that of cell i."""

    reduction: bool
    filters: int
    previous: int | None
    current: int


def _places(filters: int, repeats: int, imagenet: bool, skip: bool, separate: bool) -> list[_Place]:
    places: list[_Place] = []
    if imagenet:
        places = [_Place(True, filters // 4, None, 0), _Place(True, filters // 2, 0, 1)]
    for i in range(3 * repeats):
        reduction = i in (repeats, 2 * repeats)
        filters *= 2 if reduction else 1
        current = len(places)
        previous = current - 1 if current else None
        if reduction and separate:
            places.append(_Place(True, filters, previous, current))
            previous = previous if skip else current
            current += 1
            reduction = False
        places.append(_Place(reduction, filters, previous, current))
    return places


def _cell(genotype: CellGenotype, place: _Place, widths: Sequence[int], halvings: Sequence[int], depth: float) -> Cell:
    channels = place.filters
    current = ReLUConvBN(widths[place.current], channels, kernel=1)
    previous: nn.Module = nn.Identity()
    width = channels
    if place.previous is None:
        width = widths[place.current]  # the raw current input stands in for the previous one
    elif halvings[place.previous] != halvings[place.current]:
        previous = FactorizedReduce(widths[place.previous], channels)
    elif widths[place.previous] != channels:
        previous = ReLUConvBN(widths[place.previous], channels, kernel=1)
    return make_cell(
        genotype,
        previous,
        current,
        widths=(width, channels),
        channels=channels,
        stride=2 if place.reduction else 1,
        depth=depth,
    )


def _key(block: Block) -> tuple[int, ...]:
    """Return the positions of a block's options, which order blocks as their indices do."""
    op1, op2 = NASNET_OPERATIONS.index(block.op1), NASNET_OPERATIONS.index(block.op2)
    return block.input1, op1, block.input2, op2, COMBINATIONS.index(block.combine)


def _ordered(block: Block) -> Block:
    """Return the block with its edges in the order of lower index."""
    swapped = Block(block.op2, block.input2, block.op1, block.input1, block.combine)
    return min(block, swapped, key=_key)


def _check_stem(stem: object, filters: int) -> None:
    check_stem("NASNet", stem)
    if stem == "imagenet" and filters % 4:
        raise ArchError(
            f"NASNet was given filters={filters}, but the stem for ImageNet has cells of a quarter of them; give a "
            "multiple of 4."
        )


def _problem(cell: CellGenotype) -> str | None:
    """Return why a cell is none of NASNet's."""
    if len(cell.blocks) != len(STATES):
        return f"it has {len(cell.blocks)} blocks, not {len(STATES)}"
    for state, block in zip(STATES, cell.blocks, strict=True):
        if foreign := [op for op in (block.op1, block.op2) if op not in NASNET_OPERATIONS]:
            return f"state {state} has the operation {foreign[0]!r}, where NASNet has {', '.join(NASNET_OPERATIONS)}"
    if sorted(cell.concat) != list(unused(cell.blocks)):
        return f"its output is the states {cell.concat}, not the unused {unused(cell.blocks)}"
    return None
