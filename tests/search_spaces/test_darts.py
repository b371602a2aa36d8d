"""DARTS: the published networks, the archs, and what is derived from a mixture."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from search_spaces import DARTS, Arch, ArchError, Genotype, Mixture
from search_spaces.cells import Block, CellGenotype, CellNetwork, renumberings
from search_spaces.darts import NODES, OPERATIONS, darts_network, make_preprocess, make_stem, skeleton
from search_spaces.operations import DARTS_OPERATIONS, DropPath
from search_spaces.published import AMOEBANET_A, DARTS_V1, DARTS_V2, NASNET_A

SMALL = DARTS(channels=4, cells=3, classes=5, in_channels=2)


def params(**settings: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in darts_network(**settings).parameters())


# Networks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"genotype": DARTS_V1}, 3_169_414),
        ({"genotype": DARTS_V2}, 3_349_342),
        ({"genotype": DARTS_V2, "auxiliary": True}, 3_349_342 + 476_426),
        ({"genotype": DARTS_V2, "channels": 48, "cells": 14, "classes": 1000, "stem": "imagenet"}, 4_718_752),
    ],
)
def test_published_networks_have_their_parameters(settings: dict[str, Any], expected: int) -> None:
    assert params(**settings) == expected


def test_nasnet_a_in_the_network_of_darts() -> None:
    # As it came with DARTS: only unused states are concatenated. 3.06M at 32 channels.
    cells = CellGenotype(NASNET_A.normal.blocks, (2, 3, 4, 5, 6)), CellGenotype(NASNET_A.reduce.blocks, (4, 5, 6))
    assert params(genotype=Genotype(*cells), channels=32) == 3_061_738
    assert round(params(genotype=AMOEBANET_A) / 1e6, 1) == 3.1  # the paper of DARTS has 3.2


def test_auxiliary_head_of_imagenet() -> None:
    settings = {"genotype": DARTS_V2, "channels": 48, "cells": 14, "classes": 1000, "stem": "imagenet"}
    # 768 channels of the second reduction. 7x7 pixels are pooled to 2x2; there is no batch norm behind the last conv.
    expected = 768 * 128 + 2 * 128 + 128 * 768 * 2 * 2 + 768 * 1000 + 1000
    assert params(**settings, auxiliary=True) - params(**settings) == expected


def test_sizes_of_the_published_network() -> None:
    assert [place.channels for place in skeleton(36, 20)] == [36] * 6 + [72] * 7 + [144] * 7
    assert [i for i, place in enumerate(skeleton(36, 20)) if place.reduction] == [6, 13]
    assert [i for i, place in enumerate(skeleton(36, 20)) if place.after_reduction] == [7, 14]
    assert [i for i, place in enumerate(skeleton(48, 14, "imagenet")) if place.after_reduction] == [0, 5, 10]


@pytest.mark.parametrize("cells", [1, 2, 3, 4])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [8, 9])
def test_any_number_of_cells_and_small_images(cells: int, stem: str, size: int) -> None:
    space = DARTS(channels=4, cells=cells, stem=stem, classes=5, in_channels=2)
    model = space.build(space.sample(Random(cells)))
    assert model(torch.zeros(2, 2, size, size)).shape == (2, 5)


def test_batch_norms_have_scale_and_shift_and_pools_have_none() -> None:
    network = darts_network(DARTS_V2, channels=4, cells=3)
    assert all(m.affine for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert isinstance(network.cells[1].operations[0], nn.MaxPool2d)
    assert all(
        not m.affine for m in make_preprocess(skeleton(4, 3)[2], affine=False)[0].modules() if hasattr(m, "affine")
    )


def test_drop_path_is_not_on_skips() -> None:
    network = darts_network(DARTS_V2, channels=4, cells=3)
    normal, reduction = network.cells[0], network.cells[1]
    # Skips: normal, second of block 2 and first of block 3; reduction, three of state 2, at stride 1.
    assert set(normal.drop_paths) == {"0", "1", "2", "3", "4", "7"}
    assert set(reduction.drop_paths) == {"0", "1", "3", "4", "7"}
    assert all(path.depth == 1.0 and path.p == 0.0 for path in network.modules() if isinstance(path, DropPath))
    # In the reduction cell a skip of an input is a factorized reduction, which can be dropped.
    strided = CellGenotype((Block("skip_connect", 0, "skip_connect", 1),), (2,))
    network = darts_network(Genotype(strided, strided), channels=4, cells=3)
    assert set(network.cells[0].drop_paths) == set()
    assert set(network.cells[1].drop_paths) == {"0", "1"}


def test_drop_path_does_nothing_in_evaluation() -> None:
    network = darts_network(DARTS_V2, channels=4, cells=3).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    for module in network.modules():
        if isinstance(module, DropPath):
            module.p = 0.9
    assert torch.equal(network(x), expected)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network.train()(x), network.train()(x))


@pytest.mark.parametrize(("stem", "image"), [("cifar", 32), ("cifar", 64), ("imagenet", 224)])
def test_auxiliary_logits_come_in_training_only(stem: str, image: int) -> None:
    space = DARTS(4, 3, stem, auxiliary=True, classes=5, in_channels=2, image_size=image)
    arch = space.sample(Random(0))
    model = space.build(arch)
    x = torch.zeros(2, 2, image, image)
    logits, auxiliary = model(x)
    assert logits.shape == auxiliary.shape == (2, 5)
    assert auxiliary.requires_grad
    assert [type(y) for y in torch.fx.symbolic_trace(model)(x)] == [torch.Tensor, torch.Tensor]
    assert model.eval()(x).shape == (2, 5)
    assert isinstance(model, CellNetwork)
    assert model.auxiliary_after == 2


def test_auxiliary_head_needs_a_large_enough_map() -> None:
    space = DARTS(4, 3, auxiliary=True, classes=5, in_channels=2, image_size=8)
    with pytest.raises(ArchError, match=r"pools 5x5 pixels, but reads a map of 2x2.*auxiliary=False"):
        space.build(space.at(0))
    model = DARTS(4, 3, auxiliary=True, classes=5, in_channels=2).build(space.at(0))
    with pytest.raises(ArchError, match="map of 2x2 pixels, but was made for one of side 8 to 10"):
        model(torch.zeros(2, 2, 8, 8))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"stem": "svhn"}, "DARTS was given stem='svhn'; choices are cifar, imagenet"),
        ({"cells": 0}, "DARTS was given cells=0; it is a positive integer"),
        ({"image_size": 0}, "DARTS was given image_size=0"),
    ],
)
def test_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        DARTS(**settings)


def test_odd_channels_cannot_be_reduced() -> None:
    # Behind the stem for ImageNet, the first cell halves h_{i-1}.
    space = DARTS(channels=3, stem="imagenet", classes=5, in_channels=2)
    with pytest.raises(ArchError, match="factorized reduction to 3 channels"):
        space.build(space.at(0))


# Architectures


def test_size() -> None:
    # Pairs of inputs of nodes 2 to 5: 1 * 3 * 6 * 10; two of seven operations for each.
    assert SMALL.size == (180 * 7**8) ** 2


def test_genotypes_of_archs() -> None:
    rng = Random(0)
    for arch in (SMALL.sample(rng) for _ in range(100)):
        genotype = SMALL.genotype(arch)
        assert genotype.ordered() == genotype
        assert SMALL.arch_of(genotype) == arch
        assert SMALL.arch_of(Genotype.from_json(genotype.to_json())) == arch


@pytest.mark.parametrize(
    ("node", "block", "concat", "problem"),
    [
        (3, Block("skip_connect", 1, "max_pool_3x3", 1), NODES, "node 3 reads state 1 twice"),
        (
            2,
            Block("skip_connect", 0, "conv_3x3", 1),
            NODES,
            "node 2 has the operation 'conv_3x3', where DARTS has max_p",
        ),
        (4, Block("skip_connect", 0, "skip_connect", 1, "concat"), NODES, "node 4 is a concat, not a sum"),
        (4, Block("skip_connect", 0, "skip_connect", 1), (3, 4, 5), r"its output is the states \(3, 4, 5\), not"),
    ],
)
def test_cells_that_are_none_of_darts(node: int, block: Block, concat: tuple[int, ...], problem: str) -> None:
    blocks = list(DARTS_V2.reduce.blocks)
    blocks[node - 2] = block
    with pytest.raises(ArchError, match=f"the reduce cell is none of DARTS: {problem}"):
        SMALL.arch_of(Genotype(DARTS_V2.normal, CellGenotype(tuple(blocks), concat)))


def test_canonical_is_the_lowest_of_all_orders_of_nodes() -> None:
    rng = Random(0)
    changed = 0
    for arch in (SMALL.sample(rng) for _ in range(50)):
        canonical, genotype = SMALL.canonical(arch), SMALL.genotype(arch)
        twins = {
            SMALL.arch_of(Genotype(CellGenotype(a, NODES), CellGenotype(b, NODES)))
            for a in renumberings(genotype.normal.blocks)
            for b in renumberings(genotype.reduce.blocks)
        }
        assert arch in twins
        assert canonical == min(twins, key=SMALL.index)
        assert {SMALL.canonical(twin) for twin in rng.sample(sorted(twins, key=SMALL.index), min(3, len(twins)))} == {
            canonical
        }
        changed += canonical != arch
    assert changed > 25


def test_canonical_computes_the_same_with_weights_moved() -> None:
    # Nodes 2 and 3 change places, and so do the two quarters of the output.
    blocks = [Block("sep_conv_3x3", 0, "skip_connect", 1), Block("max_pool_3x3", 0, "skip_connect", 1)]
    rest = [Block("skip_connect", 2, "dil_conv_3x3", 3), Block("skip_connect", 0, "skip_connect", 4)]
    swapped = [Block("skip_connect", 3, "dil_conv_3x3", 2).ordered(), rest[1]]
    cells = [CellGenotype(tuple(b), NODES) for b in (blocks + rest, [blocks[1], blocks[0], swapped[0], swapped[1]])]
    archs = [SMALL.arch_of(Genotype(cell, cell)) for cell in cells]
    assert archs[0] != archs[1]
    assert SMALL.canonical(archs[0]) == SMALL.canonical(archs[1]) == archs[1]
    models = [SMALL.build(arch) for arch in archs]
    one, two = (model.cell0 for model in models)
    two.load_state_dict(
        {
            (f"operations.{(2, 3, 0, 1, 5, 4, 6, 7)[int(name.split('.')[1])]}." + name.split(".", 2)[2])
            if name.startswith("operations.")
            else name: tensor
            for name, tensor in one.state_dict().items()
        }
    )
    x = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = one(x, x), two(x, x)
    assert torch.allclose(a, b.unflatten(1, (4, 4))[:, [1, 0, 2, 3]].flatten(1, 2), atol=1e-6)


def test_graphs() -> None:
    graphs = SMALL.graphs(SMALL.arch_of(DARTS_V2))
    assert list(graphs) == ["normal", "reduction"]
    assert graphs["normal"] == SMALL.graph(SMALL.arch_of(DARTS_V2))
    for edges in graphs.values():
        assert len(edges) == 12
        assert [edge for edge in edges if edge[1] == "output"] == [(str(node), "output", "") for node in NODES]
    assert ("2", "5", "dil_conv_3x3") in graphs["normal"]
    assert ("previous", "2", "max_pool_3x3") in graphs["reduction"]


# Mixtures


def test_decode_undoes_one_hot() -> None:
    rng = Random(0)
    for arch in (SMALL.sample(rng) for _ in range(200)):
        mixture = SMALL.one_hot(arch)
        assert SMALL.decode(mixture) == arch
        assert mixture.active is not None
        assert sum(place != (0,) for place in mixture.active.values()) == 16


def test_sites() -> None:
    # 2 + 3 + 4 + 5 edges in each cell.
    assert len(SMALL.sites) == 28
    assert set(SMALL.sites.values()) == {DARTS_OPERATIONS}
    assert list(SMALL.sites)[:3] == ["normal_0_2", "normal_1_2", "normal_0_3"]
    assert SMALL.edge_sites["reduce_inputs5"] == ("0", "1", "2", "3", "4")
    assert len(SMALL.edge_sites) == 8


def uniform() -> dict[str, torch.Tensor]:
    return {site: torch.full((8,), 1 / 8) for site in SMALL.sites}


def test_equal_weights_give_the_first_edges_and_operations() -> None:
    arch = SMALL.decode(Mixture(uniform()))
    assert all(arch[f"{cell}{node}_inputs"] == "0-1" for cell in ("normal", "reduce") for node in NODES)
    assert {arch[name] for name in arch if "_op" in name} == {OPERATIONS[0]}


def test_none_weakens_an_edge_but_is_never_chosen() -> None:
    weights = uniform()
    weights["normal_0_4"] = torch.tensor([0.9, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01])
    weights["normal_2_4"] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3])
    arch = SMALL.decode(Mixture(weights))
    assert arch["normal4_inputs"] == "1-2"
    assert arch["normal4_op1"] == "dil_conv_5x5"
    for site in SMALL.sites:
        weights[site] = torch.tensor([1.0] + [0.0] * 7)
    assert SMALL.decode(Mixture(weights)) in SMALL


def test_edge_weights_multiply() -> None:
    weights = uniform() | {site: torch.ones(len(options)) for site, options in SMALL.edge_sites.items()}
    weights["reduce_inputs5"] = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.3])
    assert SMALL.decode(Mixture(weights))["reduce5_inputs"] == "3-4"
    weights["reduce_1_5"] = torch.tensor([0.0] * 7 + [1.0])  # 0.2 * 1 beats 0.3 / 8
    arch = SMALL.decode(Mixture(weights))
    assert arch["reduce5_inputs"] == "1-3"
    assert arch["reduce5_op0"] == "dil_conv_5x5"
    assert SMALL.decode(Mixture(uniform() | {"reduce_inputs5": weights["reduce_inputs5"]}))["reduce5_inputs"] == "3-4"


def test_mixtures_that_do_not_fit() -> None:
    weights = uniform()
    with pytest.raises(ArchError, match="weights for 'normal_inputs9', which is no site"):
        SMALL.decode(Mixture(weights | {"normal_inputs9": torch.ones(2)}))
    with pytest.raises(ArchError, match="'normal_0_2' has none"):
        SMALL.decode(Mixture({site: row for site, row in weights.items() if site != "normal_0_2"}))
    with pytest.raises(ArchError, match="needs 'normal2_inputs'"):
        SMALL.one_hot(Arch({}))


def test_stems() -> None:
    x = torch.zeros(2, 3, 33, 33)
    (cifar,) = make_stem("cifar", 3, 4)
    assert cifar(x).shape == (2, 12, 33, 33)
    first, second = make_stem("imagenet", 3, 4)
    assert first(x).shape == (2, 4, 9, 9)
    assert second(first(x)).shape == (2, 4, 5, 5)
