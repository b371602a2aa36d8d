"""Cells that papers found, as `Genotype` values, all in DARTS's numbering: state 0 is h_{i-1}, state 1 is h_i.

`PUBLISHED` has them by name. Build one with `darts_network` or `nasnet_network`. NASNet-B and -C are not here: their
wiring was published as figures only.
"""

from __future__ import annotations

from search_spaces.cells import Block, CellGenotype, Genotype

_SHORT = {
    "id": "identity",
    "skip": "skip_connect",
    "avg3": "avg_pool_3x3",
    **{f"max{k}": f"max_pool_{k}x{k}" for k in (3, 5, 7)},
    **{f"sep{k}": f"sep_conv_{k}x{k}" for k in (3, 5, 7)},
    **{f"dil{k}": f"dil_conv_{k}x{k}" for k in (3, 5)},
    "1x7-7x1": "conv_1x7_7x1",
}


def _cell(blocks: str, concat: tuple[int, ...]) -> CellGenotype:
    """Read a cell as the tables of the papers have it: ``sep5(0)+sep3(1); ...``."""
    made = []
    for block in blocks.split(";"):
        (op1, input1), (op2, input2) = (edge.strip(" )").split("(") for edge in block.split("+"))
        made.append(Block(_SHORT[op1], int(input1), _SHORT[op2], int(input2)))
    return CellGenotype(tuple(made), concat)


NASNET_A = Genotype(
    normal=_cell("sep5(1)+sep3(0); sep5(0)+sep3(0); avg3(1)+id(0); avg3(0)+avg3(0); sep3(1)+id(1)", (0, 2, 3, 4, 5, 6)),
    reduce=_cell("sep5(1)+sep7(0); max3(1)+sep7(0); avg3(1)+sep5(0); id(3)+avg3(2); sep3(2)+max3(1)", (3, 4, 5, 6)),
)
"""NASNet-A: Zoph et al., CVPR 2018, arXiv:1707.07012, as in the authors' code.

There, h_i is state 0. Its outputs are not just the unused states: that of the normal cell has h_{i-1} too, that of the
reduction cell state 3, which is read.
"""

AMOEBANET_A = Genotype(
    normal=_cell("avg3(0)+max3(1); sep3(0)+sep5(2); sep3(0)+avg3(3); sep3(1)+id(1); id(0)+avg3(1)", (4, 5, 6)),
    reduce=_cell("avg3(0)+sep3(1); max3(0)+sep7(2); sep7(0)+avg3(1); max3(0)+max3(1); 1x7-7x1(0)+sep3(5)", (3, 4, 6)),
)
"""AmoebaNet-A: Real et al., AAAI 2019, arXiv:1802.01548.

As the authors of DARTS wrote it down. Its 7x1-1x7 convolution is our ``conv_1x7_7x1``, the row first: the same number
of weights and the same receptive field.
"""

_PNASNET_5 = _cell("sep5(0)+max3(0); sep7(1)+max3(1); sep5(1)+sep3(1); sep3(4)+max3(1); sep3(0)+id(1)", (2, 3, 4, 5, 6))
PNASNET_5 = Genotype(normal=_PNASNET_5, reduce=_PNASNET_5)
"""PNASNet-5: Liu et al., Progressive Neural Architecture Search, ECCV 2018, arXiv:1712.00559, as in the authors' code.

There, h_i is state 0. One cell serves as both: ``nasnet_network(PNASNET_5, separate_reductions=False, ...)``.
"""

DARTS_V1 = Genotype(
    normal=_cell("sep3(1)+sep3(0); skip(0)+sep3(1); skip(0)+sep3(1); sep3(0)+skip(2)", (2, 3, 4, 5)),
    reduce=_cell("max3(0)+max3(1); skip(2)+max3(0); max3(0)+skip(2); skip(2)+avg3(0)", (2, 3, 4, 5)),
)
"""DARTS, first order: Liu, Simonyan and Yang, ICLR 2019, arXiv:1806.09055."""

DARTS_V2 = Genotype(
    normal=_cell("sep3(0)+sep3(1); sep3(0)+sep3(1); sep3(1)+skip(0); skip(0)+dil3(2)", (2, 3, 4, 5)),
    reduce=_cell("max3(0)+max3(1); skip(2)+max3(1); max3(0)+skip(2); skip(2)+max3(1)", (2, 3, 4, 5)),
)
"""DARTS, second order: Liu, Simonyan and Yang, ICLR 2019, arXiv:1806.09055."""

DASS_90 = Genotype(
    normal=_cell("dil3(1)+dil5(0); sep5(0)+dil5(1); sep5(0)+sep3(3); sep3(2)+dil5(0)", (2, 3, 4, 5)),
    reduce=_cell("skip(1)+skip(0); dil5(1)+dil5(2); dil5(2)+dil5(3); dil5(3)+skip(0)", (2, 3, 4, 5)),
)
"""DASS for 90 % of the weights pruned: Mousavi et al., ACM TECS 2023, arXiv:2207.06968, as in the authors' code."""

DASS_95 = Genotype(
    normal=_cell("sep5(0)+skip(1); dil5(1)+sep3(2); dil3(2)+sep3(0); sep3(2)+sep3(0)", (2, 3, 4, 5)),
    reduce=_cell("sep3(0)+avg3(1); sep3(0)+sep5(2); sep5(1)+sep5(2); dil3(1)+dil3(2)", (2, 3, 4, 5)),
)
"""DASS for 95 % of the weights pruned: Mousavi et al., ACM TECS 2023, arXiv:2207.06968, as in the authors' code."""

DASS_99 = Genotype(
    normal=_cell("avg3(0)+skip(1); dil5(1)+skip(2); avg3(2)+skip(1); skip(4)+skip(3)", (2, 3, 4, 5)),
    reduce=_cell("max3(1)+sep3(0); max3(1)+dil3(2); skip(0)+dil3(2); max3(1)+skip(4)", (2, 3, 4, 5)),
)
"""DASS for 99 % of the weights pruned: Mousavi et al., ACM TECS 2023, arXiv:2207.06968, as in the authors' code."""

PUBLISHED = {
    "nasnet-a": NASNET_A,
    "amoebanet-a": AMOEBANET_A,
    "pnasnet-5": PNASNET_5,
    "darts-v1": DARTS_V1,
    "darts-v2": DARTS_V2,
    "dass-90": DASS_90,
    "dass-95": DASS_95,
    "dass-99": DASS_99,
}
"""All of them by name."""
