"""DARTS: a normal and a reduction cell of four nodes, in the network of the paper.

Source: Liu, Simonyan and Yang, DARTS: Differentiable Architecture Search, ICLR 2019, arXiv:1806.09055; details as in
the authors' code.
"""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TypeVar

import torch
from torch import Tensor, nn

from search_spaces.base import Arch, ArchError, Choices, Mixture, SearchSpace, Supernet, one_hot
from search_spaces.cells import (
    AuxiliaryHead,
    Block,
    Cell,
    CellGenotype,
    CellNetwork,
    Genotype,
    check_stem,
    make_cell,
    renumberings,
)
from search_spaces.operations import (
    DARTS_OPERATIONS,
    SPARSE_OPERATIONS,
    ConvBN,
    DilConv,
    FactorizedReduce,
    ReLUConvBN,
    SepConv,
    operation,
)
from search_spaces.relaxed import RelaxedCell, check_settings, prepare
from search_spaces.sparse_operations import sparsified

CELLS = ("normal", "reduce")
NODES = (2, 3, 4, 5)
OPERATIONS = DARTS_OPERATIONS[1:]  # `none` is an option of a supernet's edges, not of a cell
CONCAT = NODES
OPS = {"dense": DARTS_OPERATIONS, "sparse": DARTS_OPERATIONS, "both": DARTS_OPERATIONS + SPARSE_OPERATIONS}
_LEFT_DENSE = {"sparse": (AuxiliaryHead,), "both": (AuxiliaryHead, SepConv, DilConv)}
_Network = TypeVar("_Network", bound=nn.Module)


@cache
def _choices(options: tuple[str, ...]) -> Choices:
    return {
        f"{cell}{node}_{name}": each
        for cell in CELLS
        for node in NODES
        for name, each in (
            ("inputs", tuple(f"{a}-{b}" for a, b in combinations(range(node), 2))),
            ("op0", options[1:]),
            ("op1", options[1:]),
        )
    }


@cache
def _sites(options: tuple[str, ...]) -> Choices:
    return {f"{cell}_{source}_{node}": options for cell in CELLS for node in NODES for source in range(node)}


_EDGE_SITES: Choices = {f"{cell}_inputs{node}": tuple(map(str, range(node))) for cell in CELLS for node in NODES}


@dataclass(frozen=True)
class DARTS(SearchSpace):
    """The cells of DARTS: 1.1e18 pairs of a normal and a reduction cell.

    A cell has states 0 and 1, the outputs of the two cells before it, and nodes 2 to 5. A node is the sum of two
    operations on two earlier states; the cell's output is the concatenation of its nodes. For a node there are three
    decisions, such as ``normal3_inputs="0-2"`` with the operations on the lower and the higher of them,
    ``normal3_op0`` and ``normal3_op1``. So every draw is a legal cell.

    A supernet mixes eight operations on each of the 14 edges of a cell: its sites are ``normal_0_3`` (from state 0 to
    node 3) and the like, with ``none`` as an option. Weights for the edges of a node are optional sites
    (``normal_inputs3``), as in PC-DARTS.

    Networks with sparse operations have weights that are pruned as the search goes on (strategy ``"dass"``), and their
    fixed parts have too: the stem, what precedes each cell, factorized reductions and the classifier, but not the
    auxiliary head. With ``ops="sparse"`` all convolutions are sparse, and the architectures are those of the dense
    space. With ``ops="both"`` ``sparse_sep_conv_3x3`` and the like are options beside the dense ones.

    The defaults are those of the paper's search; its networks for CIFAR-10 have ``channels=36, cells=20``, those for
    ImageNet ``channels=48, cells=14, stem="imagenet"``. Images may have any size; 8x8 ends as 2x2.

    Args:
        channels: channels of a state in the first cells. The output of a cell has four times as many.
        cells: number of cells. Those at a third and two thirds are reduction cells, which double the channels.
        stem: what precedes the cells: ``"cifar"``, a 3x3 convolution to three times `channels`, or ``"imagenet"``,
            three strided ones.
        auxiliary: in training, networks return (logits, logits of an auxiliary head after the second reduction).
        classes: number of classes; taken from the data if ``None``.
        in_channels: channels of an image; taken from the data if ``None``.
        image_size: side of an image, which only the auxiliary head has to know: 32, or 224 for ImageNet, if ``None``.
        ops: ``"dense"``, ``"sparse"`` or ``"both"``: which operations there are.

    Raises:
        ArchError: a setting is no positive integer, or there is no such stem or kind of operations.

    Example:
        >>> from random import Random
        >>> space = DARTS(channels=4, cells=3, classes=10, in_channels=1)
        >>> arch = space.sample(Random(0))
        >>> space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> space.decode(space.one_hot(arch)) == arch == space.arch_of(space.genotype(arch))
        True
    """

    channels: int = 16
    cells: int = 8
    stem: str = "cifar"
    auxiliary: bool = False
    classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None
    ops: str = "dense"

    def __post_init__(self) -> None:
        self.require_positive("channels", "cells", "classes", "in_channels")
        check_stem("DARTS", self.stem)
        if self.ops not in OPS:
            raise ArchError(f"DARTS was given ops={self.ops!r}; choices are {', '.join(OPS)}.")
        if self.image_size is not None:
            self.require_positive("image_size")

    @property
    def choices(self) -> Choices:
        return _choices(self.operations)

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that a supernet mixes on each edge, ``none`` first."""
        return OPS[self.ops]

    def to_json(self) -> str:
        settings = json.loads(super().to_json())
        if self.ops == "dense":  # as studies and tables have it that are older than the sparse operations
            del settings["ops"]
        return json.dumps(settings)

    def build(self, arch: Arch) -> nn.Module:
        """Return the network of these cells, to be trained from scratch: (B, in_channels, H, W) to (B, classes) logits.

        Batch norms have scale and shift, pools have no batch norm. Drop-path (off until a recipe sets it) follows every
        operation but a skip; a strided skip is a factorized reduction, which has it.

        Raises:
            ArchError: the architecture is not of this space, the space is not bound to data, or the auxiliary head
                would read a map too small for it.
        """
        genotype = self.genotype(arch)
        self.require("classes", "in_channels")
        assert self.classes is not None and self.in_channels is not None
        network = darts_network(
            genotype,
            channels=self.channels,
            cells=self.cells,
            classes=self.classes,
            in_channels=self.in_channels,
            stem=self.stem,
            auxiliary=self.auxiliary,
            image_size=self.image_size,
        )
        return self._with_sparse_parts(network)

    def _with_sparse_parts(self, network: _Network) -> _Network:
        return network if self.ops == "dense" else sparsified(network, leave=_LEFT_DENSE[self.ops])

    def genotype(self, arch: Arch) -> Genotype:
        """Return the two cells of an architecture.

        Raises:
            ArchError: the architecture is not of this space.
        """
        arch = self.check(arch)

        def cell(kind: str) -> CellGenotype:
            blocks = []
            for node in NODES:
                lower, upper = map(int, str(arch[f"{kind}{node}_inputs"]).split("-"))
                blocks.append(Block(str(arch[f"{kind}{node}_op0"]), lower, str(arch[f"{kind}{node}_op1"]), upper))
            return CellGenotype(tuple(blocks), CONCAT)

        return Genotype(*map(cell, CELLS))

    def arch_of(self, genotype: Genotype) -> Arch:
        """Return the architecture of two cells; the order of the edges of a node does not matter.

        Raises:
            ArchError: they are none of this space: other than four nodes, a node that is no sum or reads a state twice,
                an operation that DARTS has not, or an output other than all four nodes. The message says which.
        """
        values: dict[str, str] = {}
        for kind, cell in zip(CELLS, (genotype.normal, genotype.reduce), strict=True):
            if problem := _problem(cell, self.operations[1:]):
                raise ArchError(
                    f"the {kind} cell is none of DARTS: {problem}. darts_network(genotype, ...) builds it all the same."
                )
            for node, block in zip(NODES, cell.ordered().blocks, strict=True):
                values[f"{kind}{node}_inputs"] = f"{block.input1}-{block.input2}"
                values[f"{kind}{node}_op0"] = block.op1
                values[f"{kind}{node}_op1"] = block.op2
        return self.arch(values)

    def canonical(self, arch: Arch) -> Arch:
        """Return the architecture of lowest index among those whose cells differ in the order of their nodes only."""
        genotype = self.genotype(arch)

        def key(blocks: Sequence[Block]) -> tuple[tuple[int, int, int, int], ...]:
            """What orders cells as their indices do: the inputs, then the operations of node after node."""
            index = self.operations.index
            return tuple((b.input1, b.input2, index(b.op1), index(b.op2)) for b in blocks)

        def smallest(cell: CellGenotype) -> CellGenotype:
            return CellGenotype(min(renumberings(cell.blocks), key=key), CONCAT)

        return self.arch_of(Genotype(smallest(genotype.normal), smallest(genotype.reduce)))

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the edges (from, to, operation) of the normal cell; `graphs` has both."""
        return self.genotype(arch).normal.graph()

    def graphs(self, arch: Arch) -> dict[str, list[tuple[str, str, str]]]:
        """Return the edges of the ``normal`` and of the ``reduction`` cell.

        Nodes are ``previous`` (state 0), ``input`` (state 1), ``2`` to ``5`` and ``output``.
        """
        return self.genotype(arch).graphs()

    # Shared weights ------------------------------------------------------------------------------------------------

    def supernet(self, *, form: str = "fast", recompute: bool = False, partial_channels: int = 1) -> DARTSSupernet:
        """Return a fresh network whose cells have all operations on all edges, each kind of cell its own mixture.

        Batch norms of cells have no scale and shift, and one follows every pool. There is no auxiliary head.

        Args:
            form: ``"fast"``, or ``"textbook"``: one operation after the other, to compare with (`RelaxedCell`).
            recompute: save memory: compute the inside of each cell again in the backward pass.
            partial_channels: mix only one of so many parts of the channels, as in PC-DARTS.

        Raises:
            ArchError: a setting is out of range, or the space is not bound to data.

        Example:
            >>> from random import Random
            >>> space = DARTS(channels=4, cells=3, classes=10, in_channels=1)
            >>> supernet, arch = space.supernet(), space.sample(Random(0))
            >>> x = torch.randn(2, 1, 8, 8)
            >>> torch.equal(supernet(x, space.one_hot(arch)), supernet.extract(arch)(x))
            True
        """
        supernet = DARTSSupernet(self, form=form, recompute=recompute, partial_channels=partial_channels)
        return self._with_sparse_parts(supernet)

    @property
    def sites(self) -> Choices:
        return _sites(self.operations)

    @property
    def edge_sites(self) -> Choices:
        return _EDGE_SITES

    def one_hot(self, arch: Arch) -> Mixture:
        """Return the mixture that is this architecture: its operation on every edge of its own, ``none`` elsewhere.

        Raises:
            ArchError: the architecture is not of this space.
        """
        genotype = self.genotype(arch)
        chosen: dict[str, int | None] = dict.fromkeys(self.sites, self.operations.index("none"))
        for kind, cell in zip(CELLS, (genotype.normal, genotype.reduce), strict=True):
            for node, block in zip(NODES, cell.blocks, strict=True):
                for source, op in block.edges:
                    chosen[f"{kind}_{source}_{node}"] = self.operations.index(op)
        return one_hot(self.sites, chosen)

    def strongest(self, mixture: Mixture) -> Arch:
        """Return the architecture that DARTS derives from a mixture.

        An edge is as strong as the heaviest of its operations but ``none``, times the weight of the edge where the
        mixture has edge sites. Every node keeps its two strongest edges, of equals those from earlier states, each with
        that operation, of equals the first.
        """
        weights = torch.stack([mixture[site] for site in self.sites]).tolist()  # one transfer from the device
        edges = {site: row[1:] for site, row in zip(self.sites, weights, strict=True)}
        beta = {site: mixture[site].tolist() if site in mixture else [1.0] * len(o) for site, o in _EDGE_SITES.items()}
        values: dict[str, str] = {}
        for kind in CELLS:
            for node in NODES:
                rows = [edges[f"{kind}_{source}_{node}"] for source in range(node)]
                strength = [max(row) * b for row, b in zip(rows, beta[f"{kind}_inputs{node}"], strict=True)]
                lower, upper = sorted(sorted(range(node), key=lambda s: (-strength[s], s))[:2])
                values[f"{kind}{node}_inputs"] = f"{lower}-{upper}"
                for name, source in (("op0", lower), ("op1", upper)):
                    values[f"{kind}{node}_{name}"] = self.operations[1 + rows[source].index(max(rows[source]))]
        return Arch(values)


class DARTSSupernet(Supernet):
    """All networks of a DARTS space in one, as it is searched; made by `DARTS.supernet`.

    Attributes:
        stem, cells, head: the space's network, a `RelaxedCell` with its preprocessing in place of each cell.
        places: where the cells stand, which settles their sizes.
    """

    space: DARTS

    def __init__(self, space: DARTS, *, form: str, recompute: bool, partial_channels: int) -> None:
        super().__init__(space)
        space.require("classes", "in_channels")
        assert space.classes is not None and space.in_channels is not None
        stem = make_stem(space.stem, space.in_channels, space.channels)
        places = skeleton(space.channels, space.cells, space.stem)
        check_settings("DARTS", form, partial_channels, *(place.channels for place in places))
        self.places = places
        cells = []
        for place in places:
            first, second = make_preprocess(place, affine=False)
            kind = CELLS[place.reduction]
            relaxed = RelaxedCell(
                {f"{kind}_{source}_{node}": (source, node) for node in NODES for source in range(node)},
                space.operations,
                _search_operation,
                place.channels,
                inputs=2,
                outputs=CONCAT,
                reduction=place.reduction,
                node_sites={node: f"{kind}_inputs{node}" for node in NODES},
                form=form,
                recompute=recompute,
                partial_channels=partial_channels,
            )
            cells.append(nn.ModuleDict({"preprocess0": first, "preprocess1": second, "relaxed": relaxed}))
        self.stem = nn.ModuleList(stem)
        self.cells = nn.ModuleList(cells)
        self.head = make_head(places[-1].out_channels, space.classes)

    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        mixture = prepare(self.space, mixture, x)
        outputs: list[Tensor] = []
        for module in self.stem:
            x = module(x)
            outputs.append(x)
        s0, s1 = outputs[0], outputs[-1]
        for cell in self.cells:
            states = cell["preprocess0"](s0), cell["preprocess1"](s1)  # type: ignore[index]
            s0, s1 = s1, cell["relaxed"](mixture, *states)  # type: ignore[index]
        logits: Tensor = self.head(s1)
        return logits

    def extract(self, arch: Arch) -> nn.Module:
        genotype = self.space.genotype(arch)
        cells = []
        for place, parts in zip(self.places, self.cells, strict=True):
            kind, cell = CELLS[place.reduction], genotype.reduce if place.reduction else genotype.normal
            relaxed: RelaxedCell = parts["relaxed"]  # type: ignore[index]
            operations = [
                copy.deepcopy(relaxed.chosen(f"{kind}_{source}_{node}", op))
                for node, block in zip(NODES, cell.blocks, strict=True)
                for source, op in block.edges
            ]
            first, second = copy.deepcopy(parts["preprocess0"]), copy.deepcopy(parts["preprocess1"])  # type: ignore[index]
            cells.append(Cell(cell, first, second, operations))
        network = CellNetwork(list(copy.deepcopy(self.stem)), cells, copy.deepcopy(self.head))
        return network.train(self.training)


def _search_operation(name: str, channels: int, stride: int) -> nn.Module:
    return operation(name, channels, channels, stride, search=True)


# Networks -------------------------------------------------------------------------------------------------------------


def darts_network(
    genotype: Genotype,
    *,
    channels: int = 36,
    cells: int = 20,
    classes: int = 10,
    in_channels: int = 3,
    stem: str = "cifar",
    auxiliary: bool = False,
    image_size: int | None = None,
) -> CellNetwork:
    """Return DARTS's network of any two cells: (B, in_channels, H, W) images to (B, classes) logits.

    The defaults are those of the paper's networks for CIFAR-10; `DARTS` explains the settings.

    Raises:
        ArchError: there is no such stem, a map is too small for the auxiliary head, or a factorized reduction would
            make an odd number of channels.

    Example:
        >>> from search_spaces.published import DARTS_V2
        >>> with torch.device("meta"):
        ...     network = darts_network(DARTS_V2)
        >>> sum(p.numel() for p in network.parameters())
        3349342
    """
    modules = make_stem(stem, in_channels, channels)
    widths = (len(genotype.normal.concat), len(genotype.reduce.concat))
    places = skeleton(channels, cells, stem, widths)
    made: list[Cell] = []
    for place in places:
        cell = genotype.reduce if place.reduction else genotype.normal
        stride = 2 if place.reduction else 1
        c = place.channels
        made.append(make_cell(cell, *make_preprocess(place), widths=(c, c), channels=c, stride=stride))
    head = make_head(places[-1].out_channels, classes)
    if not auxiliary:
        return CellNetwork(modules, made, head)
    last = 2 * cells // 3  # the second reduction
    side = (32 if stem == "cifar" else 224) if image_size is None else image_size
    halvings = (3 if stem == "imagenet" else 0) + sum(place.reduction for place in places)
    size = math.ceil(side / 2**halvings)
    stride = 3 if stem == "cifar" else 2
    extra = AuxiliaryHead(places[last].out_channels, classes, size=size, stride=stride, last_norm=stem == "cifar")
    return CellNetwork(modules, made, head, auxiliary=extra, auxiliary_after=last)


@dataclass(frozen=True)
class Place:
    """Where a cell stands in the network, which settles its sizes.

    Attributes:
        reduction: it is a reduction cell: its operations on states 0 and 1 have stride 2.
        after_reduction: its first input has twice the height and width of its second.
        c0: channels of its first input.
        c1: channels of its second input.
        channels: channels of its states.
        out_channels: channels of its output.
    """

    reduction: bool
    after_reduction: bool
    c0: int
    c1: int
    channels: int
    out_channels: int


def skeleton(channels: int, cells: int, stem: str = "cifar", widths: Sequence[int] = (4, 4)) -> tuple[Place, ...]:
    """Return the places of DARTS's network in order; `widths` states make the output of a normal, of a reduction cell.

    Example:
        >>> [place.channels for place in skeleton(channels=16, cells=8)]
        [16, 16, 32, 32, 32, 64, 64, 64]
    """
    c0 = c1 = 3 * channels if stem == "cifar" else channels
    halved = stem == "imagenet"
    places = []
    for i in range(cells):
        reduction = i in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduction else 1
        place = Place(reduction, halved, c0, c1, channels, channels * widths[reduction])
        places.append(place)
        c0, c1, halved = c1, place.out_channels, reduction
    return tuple(places)


def make_stem(stem: str, in_channels: int, channels: int) -> list[nn.Module]:
    """Return what precedes the cells: one module for ``"cifar"``, two for ``"imagenet"``, the second after the first.

    Images (B, in_channels, H, W) become (B, 3 * channels, H, W), or (B, channels, H / 4, W / 4) and H / 8 of it.
    """
    check_stem("DARTS", stem)
    if stem == "cifar":
        return [ConvBN(in_channels, 3 * channels, kernel=3)]
    half = max(1, channels // 2)
    first = OrderedDict(
        conv1=ConvBN(in_channels, half, kernel=3, stride=2),
        relu=nn.ReLU(),
        conv2=ConvBN(half, channels, kernel=3, stride=2),
    )
    return [nn.Sequential(first), ReLUConvBN(channels, channels, kernel=3, stride=2)]


def make_preprocess(place: Place, affine: bool = True) -> tuple[nn.Module, nn.Module]:
    """Return what makes states 0 and 1 of a cell from its inputs: `channels` channels, in the size of the second."""
    first: nn.Module
    if place.after_reduction:
        first = FactorizedReduce(place.c0, place.channels, affine)
    else:
        first = ReLUConvBN(place.c0, place.channels, kernel=1, affine=affine)
    return first, ReLUConvBN(place.c1, place.channels, kernel=1, affine=affine)


def make_head(channels: int, classes: int) -> nn.Sequential:
    """Return the classifier: (B, channels, H, W) to (B, classes), by the mean over the image and a linear layer."""
    return nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(channels, classes))
    )


def _problem(cell: CellGenotype, operations: Sequence[str]) -> str | None:
    """Return why a cell is none of DARTS."""
    if len(cell.blocks) != len(NODES):
        return f"it has {len(cell.blocks)} nodes, not {len(NODES)}"
    for node, block in zip(NODES, cell.blocks, strict=True):
        if block.combine != "add":
            return f"node {node} is a {block.combine}, not a sum"
        if block.input1 == block.input2:
            return f"node {node} reads state {block.input1} twice"
        if foreign := [op for op in (block.op1, block.op2) if op not in operations]:
            return f"node {node} has the operation {foreign[0]!r}, where DARTS has {', '.join(operations)}"
    if sorted(cell.concat) != list(CONCAT):
        return f"its output is the states {cell.concat}, not {CONCAT}"
    return None
