"""Published cells: which spaces they belong to, and how they were wired by their authors."""

from __future__ import annotations

import pytest

from search_spaces import DARTS, ArchError, Genotype, NASNet
from search_spaces.cells import Block, unused
from search_spaces.published import (
    AMOEBANET_A,
    DARTS_V1,
    DARTS_V2,
    DASS_90,
    DASS_95,
    DASS_99,
    NASNET_A,
    PNASNET_5,
    PUBLISHED,
)


@pytest.mark.parametrize("genotype", [DARTS_V1, DARTS_V2, DASS_90, DASS_95, DASS_99])
def test_cells_of_the_darts_space(genotype: Genotype) -> None:
    space = DARTS()
    arch = space.arch_of(genotype)
    assert arch in space
    assert space.genotype(arch) == genotype.ordered()  # the same cells: the order within a sum is not part of an arch
    assert space.decode(space.one_hot(arch)) == arch


@pytest.mark.parametrize(
    ("genotype", "problem"),
    [
        (NASNET_A, "the normal cell is none of DARTS: it has 5 nodes, not 4"),
        (AMOEBANET_A, "it has 5 nodes, not 4"),
        (PNASNET_5, r"it has 5 nodes, not 4. darts_network\(genotype, ...\) builds it all the same"),
    ],
)
def test_cells_of_other_spaces_are_not_of_darts(genotype: Genotype, problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        DARTS().arch_of(genotype)


@pytest.mark.parametrize(
    ("genotype", "problem"),
    [
        # Its authors concatenate h_{i-1} as well, and in the reduction cell a state that is read.
        (NASNET_A, r"normal cell is none of NASNet's: its output is the states \(0, 2, 3, 4, 5, 6\), not the unused"),
        (PNASNET_5, r"its output is the states \(2, 3, 4, 5, 6\), not the unused \(2, 3, 5, 6\)"),
        (DARTS_V2, "it has 4 blocks, not 5. nasnet_network"),
    ],
)
def test_cells_that_are_not_of_the_nasnet_space(genotype: Genotype, problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        NASNet().arch_of(genotype)


def test_amoebanet_is_of_the_nasnet_space() -> None:
    space = NASNet()
    assert space.genotype(space.arch_of(AMOEBANET_A)) == AMOEBANET_A


def test_nasnet_a_as_its_paper_draws_it() -> None:
    # In the authors' numbering 0 is h_i, 1 is h_{i-1}; ours is the other way round.
    assert NASNET_A.normal.blocks[0] == Block("sep_conv_5x5", 1, "sep_conv_3x3", 0)
    assert NASNET_A.reduce.blocks[3] == Block("identity", 3, "avg_pool_3x3", 2)
    assert unused(NASNET_A.normal.blocks) == (2, 3, 4, 5, 6)
    assert unused(NASNET_A.reduce.blocks) == (4, 5, 6)


def test_pnasnet_has_one_cell() -> None:
    assert PNASNET_5.normal == PNASNET_5.reduce


def test_all_are_there_by_name() -> None:
    assert len(set(PUBLISHED.values())) == len(PUBLISHED) == 8
    assert PUBLISHED["darts-v2"] is DARTS_V2
