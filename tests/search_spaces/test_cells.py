"""Cells as values and as modules: what is refused, what is computed, and the auxiliary head."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_spaces import ArchError
from search_spaces.cells import (
    AuxiliaryHead,
    Block,
    Cell,
    CellGenotype,
    CellNetwork,
    Genotype,
    make_cell,
    renumberings,
    unused,
)
from search_spaces.operations import ConvBN, DropPath, FactorizedReduce, ReLUConvBN
from search_spaces.published import PUBLISHED

BLOCK = Block("sep_conv_3x3", 0, "identity", 1)


class Times(nn.Module):
    """Multiply by a number, so that the output of a cell tells which operation read what."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


# Values


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (("sep_conv_33", 0, "identity", 1), "operation 'sep_conv_33', which is unknown; did you mean 'sep_conv_3x3'"),
        (("identity", 0, "none", 1), "operation 'none': it has exactly two edges, so leave none out"),
        (("identity", 0, "identity", 1, "sum"), "combine='sum'; choices are add, concat"),
    ],
)
def test_blocks_refuse_unknown_operations(block: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        Block(*block)


@pytest.mark.parametrize(
    ("blocks", "concat", "problem"),
    [
        ([], (2,), r"no blocks; it needs at least one: Block\(op1, input1, op2, input2\)"),
        ([BLOCK, Block("identity", 2, "identity", None)], (3,), "state 3 lacks an edge: input2 is None.*one of 0..2"),  # type: ignore[arg-type]
        (
            [Block("identity", 2, "identity", 0)],
            (2,),
            r"makes state 2 reads state 2 \(input1\), which is not there yet",
        ),
        ([Block("identity", 0, "identity", 3), BLOCK], (2, 3), "Put the block that makes state 3 before it"),
        ([Block("identity", -1, "identity", 0)], (2,), "state 2 has input1=-1; it is one of 0..1"),
        ([Block("identity", True, "identity", 0)], (2,), "state 2 has input1=True"),
        ([BLOCK], (), r"concat=\(\), so it has no output; name the states"),
        ([BLOCK], (2, 3), r"concat=\(2, 3\), but it has no state 3: with 1 blocks there are the states 0..2"),
        ([BLOCK], (-1,), "it has no state -1"),
        ([BLOCK], (2, 2), r"concat=\(2, 2\), which names a state twice"),
    ],
)
def test_cells_refuse_what_is_not_wired(blocks: list[Block], concat: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        CellGenotype(tuple(blocks), concat)


@pytest.mark.parametrize("genotype", PUBLISHED.values(), ids=PUBLISHED)
def test_genotypes_are_values(genotype: Genotype) -> None:
    twin = Genotype.from_json(genotype.to_json())
    assert twin == genotype
    assert hash(twin) == hash(genotype)
    assert pickle.loads(pickle.dumps(genotype)) == genotype  # noqa: S301 - our own bytes
    assert genotype.ordered().ordered() == genotype.ordered()


def test_lists_are_made_hashable() -> None:
    cell = CellGenotype([BLOCK], [2])  # type: ignore[arg-type]
    assert cell == CellGenotype((BLOCK,), (2,))
    assert hash(cell) == hash(CellGenotype((BLOCK,), (2,)))


def damaged(change: str, value: object) -> str:
    """Return the JSON of a legal genotype with one member, `a.b.0.c`, replaced or, if it is `...`, removed."""
    genotype = json.loads(Genotype(*[CellGenotype((BLOCK, BLOCK), (2, 3))] * 2).to_json())
    *path, last = [int(step) if step.isdigit() else step for step in change.split(".")]
    place = genotype
    for step in path:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(genotype)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", r"not a genotype: '{' is no JSON .*Write one with to_json\(\)"),
        ("[]", r"a genotype is a JSON object with normal, reduce, got '\[\]'"),
        (damaged("reduce", ...), "a genotype needs 'reduce', got 'normal'"),
        (damaged("reduction", {}), "a genotype has no 'reduction'; did you mean 'reduce'"),
        (damaged("reduce.blocks", 3), "the reduce cell has blocks='3'; it is of type list"),
        (damaged("normal.blocks.1.input2", ...), "normal cell: the block that makes state 3 needs 'input2'"),
        (damaged("normal.blocks.1.input2", "0"), "normal cell: the block that makes state 3 has input2='0'"),
        (damaged("normal.blocks.0.op1", 1), "the block that makes state 2 has op1='1'; it is of type str"),
        (damaged("reduce.blocks.0.op1", "sep"), "reduce cell: a block was given the operation 'sep'"),
        (damaged("reduce.blocks.0.op3", "sep"), "the block that makes state 2 has no 'op3'; did you mean 'op2' or"),
        (damaged("normal.concat.0", "2"), "normal cell: .*no state '2'"),
    ],
)
def test_json_that_is_no_genotype(text: str, problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        Genotype.from_json(text)


def test_combine_may_be_left_out_of_json() -> None:
    assert Genotype.from_json(damaged("normal.blocks.0.combine", ...)).normal.blocks[0] == BLOCK


def test_unused_states() -> None:
    blocks = [BLOCK, Block("identity", 2, "identity", 2), BLOCK]
    assert unused(blocks) == (3, 4)


def test_renumberings_keep_edges_pointing_forward() -> None:
    chain = [
        Block("identity", 0, "identity", 1),
        Block("conv_1x1", 2, "identity", 0),
        Block("conv_3x3", 3, "identity", 1),
    ]
    assert list(renumberings(chain)) == [tuple(block.ordered() for block in chain)]
    # Four blocks that read the inputs only may stand in any of 24 orders.
    free = [Block(op, 0, "identity", 1) for op in ("conv_1x1", "conv_3x3", "max_pool_3x3", "avg_pool_3x3")]
    assert len(set(renumberings(free))) == 24
    # State 4 reads 2 and so comes after it, in 3 of the 6 orders of three blocks.
    orders = set(renumberings([free[0], free[1], Block("identity", 2, "identity", 0)]))
    assert len(orders) == 3
    assert all(CellGenotype(blocks, unused(blocks)) for blocks in orders)


def test_graph() -> None:
    cell = CellGenotype((BLOCK, Block("conv_1x1", 2, "identity", 0)), (3, 1))
    assert cell.graph() == [
        ("previous", "2", "sep_conv_3x3"),
        ("input", "2", "identity"),
        ("2", "3", "conv_1x1"),
        ("previous", "3", "identity"),
        ("3", "output", ""),
        ("input", "output", ""),
    ]


# Modules


def test_cells_compute_what_they_say() -> None:
    blocks = (Block("identity", 1, "identity", 0), Block("identity", 2, "identity", 1, "concat"))
    cell = Cell(
        CellGenotype(blocks, (3, 0, 2)),
        Times(10),
        Times(100),
        [Times(2), Times(3), Times(5), Times(7)],
        {0: Times(0.5)},
    )
    a, b = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    # States 10 and 200; 2 * 200 + 3 * 10 = 430; 5 * 430 beside 7 * 200; output: that, half of 10, 430.
    assert cell(a, b).flatten().tolist() == [2150.0, 1400.0, 5.0, 430.0]
    traced = torch.fx.symbolic_trace(cell)
    assert torch.equal(traced(a, b), cell(a, b))


def test_cells_take_two_operations_a_block() -> None:
    cell = CellGenotype((BLOCK,), (2,))
    with pytest.raises(ArchError, match="a cell of 1 blocks was given 1 operations and 0 drop-paths; it needs 2"):
        Cell(cell, nn.Identity(), nn.Identity(), [nn.Identity()])
    with pytest.raises(ArchError, match="2 operations and 1 drop-paths"):
        Cell(cell, nn.Identity(), nn.Identity(), [nn.Identity()] * 2, drop_paths=[None])


def test_sizes_and_channels_are_brought_together() -> None:
    blocks = (Block("max_pool_3x3", 0, "identity", 1, "concat"), Block("max_pool_3x3", 2, "identity", 2))
    cell = make_cell(CellGenotype(blocks, (0, 1, 2, 3)), nn.Identity(), nn.Identity(), (6, 4), channels=4, stride=2)
    assert cell(torch.zeros(2, 6, 9, 9), torch.zeros(2, 4, 9, 9)).shape == (2, 16, 5, 5)
    kinds = {name: type(module) for name, module in cell.outputs.items()}
    assert kinds == {"0": FactorizedReduce, "1": FactorizedReduce, "2": ConvBN}
    assert all(isinstance(reduce.relu, nn.Identity) for reduce in (cell.outputs["0"], cell.outputs["1"]))
    # Of 6, of 4 and of the 8 channels that the first block concatenates, to 4; only the pools read them as they are.
    pool, strided, pool2, narrowed = cell.operations
    assert pool.conv.weight.shape == (4, 6, 1, 1)
    assert isinstance(strided, ReLUConvBN)
    assert strided.conv.stride == (2, 2)
    assert pool2.conv.weight.shape == narrowed.conv.weight.shape == (4, 8, 1, 1)
    assert pool2.pool.stride == 1


def test_drop_path_is_not_on_identities() -> None:
    blocks = (Block("identity", 0, "skip_connect", 1), Block("skip_connect", 2, "max_pool_3x3", 2))
    cell = CellGenotype(blocks, (2, 3))
    for stride, expected in ((1, {"3"}), (2, {"1", "3"})):  # a strided skip is a factorized reduction
        made = make_cell(cell, nn.Identity(), nn.Identity(), (4, 4), channels=4, stride=stride, depth=0.5)
        assert set(made.drop_paths) == expected
        assert all(isinstance(path, DropPath) and path.depth == 0.5 for path in made.drop_paths.values())


def test_odd_channels_cannot_be_reduced() -> None:
    cell = CellGenotype((Block("skip_connect", 0, "skip_connect", 1),), (2,))
    with pytest.raises(ArchError, match="factorized reduction to 3 channels .* even number"):
        make_cell(cell, nn.Identity(), nn.Identity(), (3, 3), channels=3, stride=2)


class Keep(nn.Module):
    """A stand-in for a cell that tells what it was given."""

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        return 10 * s0 + s1


def test_networks_pass_on_the_states_they_say() -> None:
    x = torch.ones(1, 1)
    # Stem 2; cells 10*2+2=22, 10*2+22=42, 10*22+42=262.
    network = CellNetwork([Times(2)], [Keep(), Keep(), Keep()], Times(1))
    assert network.sources == ((0, 0), (0, 1), (1, 2))
    assert network(x).item() == 262
    assert [name for name, _ in network.named_children()] == ["stem", "cell0", "cell1", "cell2", "head"]
    # Two stems, 2 and 6: 10*2+6=26, and the second cell reads the first stem again: 10*2+26=46.
    network = CellNetwork([Times(2), Times(3)], [Keep(), Keep()], Times(1), sources=[(0, 1), (0, 2)])
    assert network(x).item() == 46
    assert torch.fx.symbolic_trace(network)(x).item() == 46


@pytest.mark.parametrize("size", [5, 7, 8, 10, 11, 16])
@pytest.mark.parametrize("stride", [2, 3])
def test_auxiliary_head(size: int, stride: int) -> None:
    head = AuxiliaryHead(4, classes=3, size=size, stride=stride)
    assert head(torch.zeros(2, 4, size, size)).shape == (2, 3)
    assert head.conv2(torch.zeros(2, 128, head.size, head.size)).shape == (2, 768, 1, 1)
    assert torch.fx.symbolic_trace(head)(torch.zeros(2, 4, size, size)).shape == (2, 3)


def test_auxiliary_head_says_when_the_map_does_not_fit() -> None:
    with pytest.raises(ArchError, match=r"pools 5x5 pixels, but reads a map of 4x4. Use larger images"):
        AuxiliaryHead(4, classes=3, size=4)
    head = AuxiliaryHead(4, classes=3, size=8)
    for shape in ((4, 4), (8, 11), (16, 16)):
        with pytest.raises(
            ArchError, match=rf"map of {shape[0]}x{shape[1]} .* made for one of side 8 to 10.*image_size"
        ):
            head(torch.zeros(2, 4, *shape))
