"""NASNet: the published networks, how cells are joined, and the archs."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from nasbench.profile import count
from search_spaces import ArchError, Genotype, NASNet
from search_spaces.cells import AuxiliaryHead, Block, CellGenotype, CellNetwork, renumberings, unused
from search_spaces.nasnet import nasnet_network
from search_spaces.operations import ConvBN, DropPath, FactorizedReduce, ReLUConvBN
from search_spaces.published import AMOEBANET_A, NASNET_A, PNASNET_5, PUBLISHED

SMALL = NASNet(filters=4, repeats=1, classes=5, in_channels=2)
IMAGENET: dict[str, Any] = {"classes": 1000, "stem": "imagenet"}
MOBILE: dict[str, Any] = {"filters": 44, "repeats": 4, "stem_filters": 32, **IMAGENET}
LARGE: dict[str, Any] = {"filters": 168, "repeats": 6, "skip_reduction_input": True, **IMAGENET}
PNASNET_LARGE: dict[str, Any] = {"filters": 216, "repeats": 4, "separate_reductions": False, **IMAGENET}


def meta(genotype: Genotype, **settings: Any) -> CellNetwork:
    with torch.device("meta"):
        return nasnet_network(genotype, **settings)


def params(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Published networks


@pytest.mark.parametrize(
    ("genotype", "settings", "expected"),
    [
        (NASNET_A, {}, 3_346_538),
        (NASNET_A, {"auxiliary": True}, 3_346_538 + 1_631_498),
        (NASNET_A, {"repeats": 2}, 1_294_698),
        (NASNET_A, MOBILE, 5_289_978),
        (NASNET_A, LARGE, 88_753_150),
        (PNASNET_5, PNASNET_LARGE, 86_057_668),
    ],
    ids=["6@768", "auxiliary", "search", "mobile", "large", "pnasnet"],
)
def test_published_networks_have_their_parameters(genotype: Genotype, settings: dict[str, Any], expected: int) -> None:
    assert params(meta(genotype, **settings)) == expected


@pytest.mark.parametrize(
    ("settings", "side", "unit", "expected"),
    [({}, 32, 1e6, 544), (MOBILE, 224, 1e5, 5636), (LARGE, 331, 1e7, 2378)],
    ids=["6@768", "mobile", "large"],
)
def test_published_networks_have_their_macs(settings: dict[str, Any], side: int, unit: float, expected: int) -> None:
    # The paper: 564M and 23.8B for the last two.
    assert round(count(lambda: nasnet_network(NASNET_A, **settings), (3, side, side))["macs"] / unit) == expected


def shapes(network: CellNetwork, side: int, in_channels: int = 3) -> list[tuple[int, ...]]:
    """Return channels and side of the output of every cell."""
    seen: list[tuple[int, ...]] = []
    for cell in network.cells:
        cell.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:3])))
    network.eval()(torch.zeros(1, in_channels, side, side, device=next(network.parameters()).device))
    return seen


def test_cells_put_out_six_or_four_times_the_filters() -> None:
    f = 32
    assert shapes(meta(NASNET_A, repeats=2), 32) == [
        *[(6 * f, 32)] * 2, (8 * f, 16), *[(12 * f, 16)] * 2, (16 * f, 8), *[(24 * f, 8)] * 2
    ]  # fmt: skip
    f = 44
    stem = [(f, 56), (2 * f, 28)]  # four states of a quarter and of half the filters
    assert shapes(meta(NASNET_A, **MOBILE | {"repeats": 1}), 224) == [
        *stem, (6 * f, 28), (8 * f, 14), (12 * f, 14), (16 * f, 7), (24 * f, 7)
    ]  # fmt: skip


def test_reductions_of_pnasnet_are_cells_4_and_8() -> None:
    network = meta(PNASNET_5, **PNASNET_LARGE)
    f = 5 * 216
    assert shapes(network, 331) == [
        (f // 4, 83), (f // 2, 42), *[(f, 42)] * 4, *[(2 * f, 21)] * 4, *[(4 * f, 11)] * 4
    ]  # fmt: skip
    assert network.sources == tuple((max(0, i - 1), i) for i in range(14))  # always the cell before the previous one


# How cells are joined


def test_alignment_of_the_input_before() -> None:
    network = nasnet_network(NASNET_A, filters=4, repeats=2)
    # Normal, normal, reduction, normal (its h_{i-1} is larger), normal, reduction, normal, normal.
    kinds = [type(cell.preprocess0) for cell in network.cells]
    same, halved = ReLUConvBN, FactorizedReduce
    assert kinds == [nn.Identity, same, same, halved, same, same, halved, same]
    assert all(isinstance(cell.preprocess1, ReLUConvBN) for cell in network.cells)


def test_missing_input_before_is_the_current_one_as_it_is() -> None:
    cell = nasnet_network(NASNET_A, filters=4, repeats=1).cells[0]
    # avg3(1)+id(0); avg3(0)+avg3(0): state 0 has the 12 channels of the stem.
    assert isinstance(cell.preprocess0, nn.Identity)
    pool, identity, raw_pool = cell.operations[4], cell.operations[5], cell.operations[6]
    assert isinstance(pool, nn.AvgPool2d)
    assert isinstance(identity, ReLUConvBN)
    assert identity.conv.weight.shape == raw_pool.conv.weight.shape == (4, 12, 1, 1)
    assert isinstance(cell.outputs["0"], ConvBN)
    assert cell.outputs["0"].conv.weight.shape == (4, 12, 1, 1)
    # The second cell's state 0 has four channels, and nothing is needed.
    second = nasnet_network(NASNET_A, filters=4, repeats=2).cells[1]
    assert isinstance(second.operations[5], nn.Identity)
    assert not second.outputs


def test_input_before_with_the_right_channels_is_left_alone() -> None:
    # One state is the output, so that the cells' outputs have F channels.
    block = Block("conv_1x1", 0, "identity", 1)
    cell = CellGenotype((block,), (2,))
    network = nasnet_network(Genotype(cell, cell), filters=4, repeats=3)
    assert [type(c.preprocess0) for c in network.cells[:4]] == [nn.Identity, ReLUConvBN, nn.Identity, ReLUConvBN]


def test_skipping_the_input_of_a_reduction() -> None:
    plain = meta(NASNET_A, repeats=2)
    skipping = meta(NASNET_A, repeats=2, skip_reduction_input=True)
    assert plain.sources == ((0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7))
    # Cells 3 and 6, the first after the reductions 2 and 5, read what these read as h_{i-1}.
    assert skipping.sources == ((0, 0), (0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (4, 6), (6, 7))
    assert shapes(skipping, 32) == shapes(plain, 32)


def test_strides_are_on_operations_that_read_inputs() -> None:
    cell = nasnet_network(NASNET_A, filters=4, repeats=1).cells[1]
    strides = [max(m.stride if isinstance(m.stride, int) else m.stride[0] for m in op.modules() if hasattr(m, "stride"))
               for op in cell.operations if not isinstance(op, nn.Identity)]  # fmt: skip
    # id(3) is the seventh operation; avg3(2) and sep3(2) do not stride.
    assert strides == [2, 2, 2, 2, 2, 2, 1, 1, 2]
    assert isinstance(cell.operations[6], nn.Identity)


def test_strided_identity_is_a_convolution() -> None:
    cell = CellGenotype((Block("identity", 0, "identity", 1),), (2,))
    reduction = nasnet_network(Genotype(cell, cell), filters=4, repeats=1).cells[1]
    assert all(isinstance(op, ReLUConvBN) and op.conv.stride == (2, 2) for op in reduction.operations)
    assert not reduction.drop_paths


def test_output_entries_of_other_size_are_reduced() -> None:
    # NASNet-A's normal cell puts out h_{i-1} too; as a reduction cell it has to halve that.
    network = nasnet_network(Genotype(NASNET_A.normal, NASNET_A.normal), filters=4, repeats=1)
    entry = network.cells[1].outputs["0"]
    assert isinstance(entry, FactorizedReduce)
    assert isinstance(entry.relu, nn.Identity)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_drop_path_grows_with_depth() -> None:
    for settings, cells in (({"repeats": 1}, 5), ({"repeats": 1, "stem": "imagenet"}, 7)):
        network = nasnet_network(NASNET_A, filters=4, **settings)  # type: ignore[arg-type]
        depths = [{path.depth for path in cell.drop_paths.values()} for cell in network.cells]
        assert depths == [{(i + 1) / cells} for i in range(cells)]
        # Not on identities: the sixth and the last operation of a normal, the seventh of a reduction cell.
        normal, reduction = network.cells[-1], network.cells[-2]
        assert set(map(str, range(10))) - set(normal.drop_paths) == {"5", "9"}
        assert set(map(str, range(10))) - set(reduction.drop_paths) == {"6"}


def test_nothing_is_dropped_in_evaluation() -> None:
    network = nasnet_network(NASNET_A, filters=4, repeats=1).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    for module in network.modules():
        if isinstance(module, DropPath):
            module.p = 0.9 * module.depth
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize(("stem", "side", "pooled"), [("cifar", 32, 4), ("cifar", 30, 4), ("imagenet", 331, 6)])
def test_auxiliary_logits_come_in_training_only(stem: str, side: int, pooled: int) -> None:
    space = NASNet(4, 1, stem, auxiliary=True, classes=5, in_channels=2, image_size=side)
    with torch.device("meta" if side > 300 else "cpu"):
        model = space.build(space.sample(Random(0)))
        x = torch.zeros(2, 2, side, side)
    logits, auxiliary = model(x)
    assert logits.shape == auxiliary.shape == (2, 5)
    assert model.eval()(x).shape == (2, 5)
    assert isinstance(model, CellNetwork)
    assert isinstance(model.auxiliary, AuxiliaryHead)
    # 32 / 2 = 16, pooled to 4x4; of 331 pixels the stem leaves 165, 83, 42, and the first reduction 21.
    assert model.auxiliary.size == pooled
    assert model.auxiliary_after == len(model.cells) - 3  # the normal cell before the second reduction


def test_auxiliary_head_of_pnasnet() -> None:
    network = meta(PNASNET_5, **PNASNET_LARGE, auxiliary=True, image_size=331)
    assert network.auxiliary_after == 2 + 7


def test_auxiliary_head_needs_a_large_enough_map() -> None:
    space = NASNet(4, 1, auxiliary=True, classes=5, in_channels=2, image_size=8)
    with pytest.raises(ArchError, match=r"pools 5x5 pixels, but reads a map of 4x4"):
        space.build(space.at(0))
    model = NASNet(4, 1, auxiliary=True, classes=5, in_channels=2).build(space.at(0))
    with pytest.raises(ArchError, match="map of 4x4 pixels, but was made for one of side 14 to 16"):
        model(torch.zeros(2, 2, 8, 8))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("genotype", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("separate", [True, False])
def test_any_cell_makes_a_network(genotype: Genotype, stem: str, separate: bool) -> None:
    network = nasnet_network(genotype, filters=8, repeats=1, stem=stem, separate_reductions=separate)
    for side in (8, 11, 33):
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"stem": "svhn"}, "NASNet was given stem='svhn'; choices are cifar, imagenet"),
        ({"stem": "imagenet", "filters": 6}, "filters=6, but the stem .* a quarter of them; give a multiple of 4"),
        ({"stem_filters": 0}, "NASNet was given stem_filters=0; it is a positive integer"),
        ({"repeats": 0}, "NASNet was given repeats=0"),
    ],
)
def test_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        NASNet(**settings)


def test_odd_channels_cannot_be_reduced() -> None:
    # A quarter of 4 filters is one; NASNet-A's normal cell puts out its halved h_{i-1}.
    with pytest.raises(ArchError, match="factorized reduction to 1 channels"):
        nasnet_network(Genotype(NASNET_A.normal, NASNET_A.normal), filters=4, repeats=1, stem="imagenet")


# Architectures


def test_size() -> None:
    # Two inputs of 2, 3, 4, 5, 6 states, two of 13 operations, two ways to combine: 2.3e18, as the paper says.
    cells = math.prod(range(2, 7)) ** 2 * 13**10 * 2**5
    assert SMALL.size == cells**2
    assert f"{cells:.1e}" == "2.3e+18"
    assert len(SMALL.choices) == 50


def test_genotypes_of_archs() -> None:
    rng = Random(0)
    for arch in (SMALL.sample(rng) for _ in range(100)):
        genotype = SMALL.genotype(arch)
        assert SMALL.arch_of(genotype) == arch
        for cell in (genotype.normal, genotype.reduce):
            assert cell.concat == unused(cell.blocks)
            assert 6 in cell.concat  # nothing can read the last block


def test_blocks_that_concatenate() -> None:
    rng = Random(1)
    for arch in (SMALL.sample(rng) for _ in range(5)):
        changed = SMALL.arch({name: "concat" if name.endswith("combine") else option for name, option in arch.items()})
        network = SMALL.build(changed)
        assert isinstance(network, CellNetwork)
        # Concatenation doubles a state's channels, not those of the cell's output.
        genotype = SMALL.genotype(changed)
        n, r = len(genotype.normal.concat), len(genotype.reduce.concat)
        assert shapes(network, 8, 2) == [(4 * n, 8), (8 * r, 4), (8 * n, 4), (16 * r, 2), (16 * n, 2)]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            Block("skip_connect", 0, "identity", 1),
            "state 2 has the operation 'skip_connect', where NASNet has identity",
        ),
        (Block("identity", 0, "dil_conv_3x3", 1), "state 2 has the operation 'dil_conv_3x3'"),
    ],
)
def test_operations_of_darts_are_not_of_nasnet(block: Block, problem: str) -> None:
    cell = CellGenotype((block, *AMOEBANET_A.normal.blocks[1:]), AMOEBANET_A.normal.concat)
    with pytest.raises(ArchError, match=f"the normal cell is none of NASNet's: {problem}"):
        SMALL.arch_of(Genotype(cell, AMOEBANET_A.reduce))


def test_canonical_is_the_lowest_of_all_orders() -> None:
    rng = Random(0)
    for arch in (SMALL.sample(rng) for _ in range(20)):
        canonical, genotype = SMALL.canonical(arch), SMALL.genotype(arch)
        # Another order of the same cells: blocks as any renumbering has them, some of them turned round.
        cells = []
        for cell in (genotype.normal, genotype.reduce):
            blocks = rng.choice(list(renumberings(cell.blocks)))
            turned = [Block(b.op2, b.input2, b.op1, b.input1, b.combine) if rng.random() < 0.5 else b for b in blocks]
            cells.append(CellGenotype(tuple(turned), unused(turned)))
        twin = SMALL.arch_of(Genotype(*cells))
        assert SMALL.canonical(twin) == canonical
        assert SMALL.index(canonical) <= min(SMALL.index(arch), SMALL.index(twin))
    with torch.device("meta"):  # of the last
        assert params(SMALL.build(arch)) == params(SMALL.build(twin)) == params(SMALL.build(canonical))


def test_graphs() -> None:
    arch = SMALL.arch_of(AMOEBANET_A)
    graphs = SMALL.graphs(arch)
    assert list(graphs) == ["normal", "reduction"]
    assert graphs["normal"] == SMALL.graph(arch)
    assert graphs["reduction"][-3:] == [("3", "output", ""), ("4", "output", ""), ("6", "output", "")]
    assert ("previous", "6", "conv_1x7_7x1") in graphs["reduction"]
