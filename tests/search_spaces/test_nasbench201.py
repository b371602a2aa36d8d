"""NAS-Bench-201: the network against hand counts and a plain reading of the paper, strings, equal cells."""

from __future__ import annotations

import zlib
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from search_spaces import Arch, ArchError, NASBench201
from search_spaces.nasbench201 import EDGES, OPERATIONS, Cell, expression

SPACE = NASBench201(channels=4, cells=1, classes=10, in_channels=3)
BENCHMARK = Path(__file__).resolve().parents[3] / "shared/data/nasbench201.npz"
CELLS = list(product(OPERATIONS, repeat=6))


def cell(short: str) -> Arch:
    """Return the architecture of six letters, in the order of the strings: none, skip, 1x1, 3x3, pool."""
    letters = dict(zip("ns13p", OPERATIONS, strict=True))
    return SPACE.arch(dict(zip(EDGES, (letters[s] for s in short), strict=True)))


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# The network ---------------------------------------------------------------------------------------------------------


def test_size() -> None:
    assert SPACE.size == 15_625  # 5 ** 6
    assert list(SPACE.choices) == ["e01", "e02", "e12", "e03", "e13", "e23"]


def test_parameters_of_the_largest_network() -> None:
    c, n, classes = 16, 5, 10
    stem = 27 * c + 2 * c
    cells = sum(n * 6 * (9 * w * w + 2 * w) for w in (c, 2 * c, 4 * c))  # convolution and batch norm on every edge
    blocks = sum((9 * w * v + 2 * v) + (9 * v * v + 2 * v) + w * v for w, v in ((c, 2 * c), (2 * c, 4 * c)))
    head = 2 * 4 * c + (4 * c + 1) * classes
    assert stem + cells + blocks + head == 1_531_546
    model = NASBench201(classes=10, in_channels=3).build(cell("333333"))
    assert parameters(model) == 1_531_546


def test_parameters_of_an_edge() -> None:
    base = parameters(SPACE.build(cell("nnnnnn")))
    widths = (4, 8, 16)
    assert parameters(SPACE.build(cell("nspnsp"))) == base
    assert parameters(SPACE.build(cell("nn1nnn"))) == base + sum(w * w + 2 * w for w in widths)
    assert parameters(SPACE.build(cell("nnnnn3"))) == base + sum(9 * w * w + 2 * w for w in widths)


@pytest.mark.parametrize(("size", "left"), [(32, 8), (8, 2), (9, 3), (1, 1)])
def test_two_blocks_halve_images_of_any_size(size: int, left: int) -> None:
    features = SPACE.build(cell("3s1p3s"))[:-1]  # type: ignore[index]
    assert features(torch.zeros(2, 3, size, size)).shape == (2, 16, left, left)


def reference(module: Cell, arch: Arch, x: Tensor) -> Tensor:
    """Compute a cell as the paper defines it: every edge, zeros included."""
    nodes = [x]
    for node in (1, 2, 3):
        total = torch.zeros_like(x)
        for decision, (source, target) in EDGES.items():
            if target == node:
                y = nodes[source]
                if arch[decision] == "none":
                    y = y * 0
                elif arch[decision] == "avg_pool_3x3":
                    ones = F.avg_pool2d(torch.ones_like(y), 3, stride=1, padding=1)
                    y = F.avg_pool2d(y, 3, stride=1, padding=1) / ones  # the mean over the pixels that are there
                elif arch[decision] != "skip_connect":
                    block = module[decision]
                    y = F.conv2d(y.clamp(min=0), block.conv.weight, padding="same")  # type: ignore[union-attr,arg-type]
                    y = F.batch_norm(y, None, None, block.norm.weight, block.norm.bias, training=True)  # type: ignore[union-attr,arg-type]
                total = total + y
        nodes.append(total)
    return nodes[3]


def fill(module: Cell, arch: Arch) -> Cell:
    """Set the weights of every convolution to what belongs to its term: equal terms get equal weights."""
    operations = [str(arch[d]) for d in EDGES]
    one, two, six = operations[:1], operations[:3], ["none", "skip_connect"]
    values = {
        0: expression(["none"] * 3 + ["skip_connect"] + ["none"] * 2),
        1: expression([*one, "none", "none", "none", "skip_connect", "none"]),
        2: expression([*two, "none", *six]),
    }
    for decision, block in module.items():
        term = (arch[decision], values[EDGES[decision][0]])
        generator = torch.Generator().manual_seed(zlib.crc32(repr(term).encode()))
        for parameter in block.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.double()


IMAGES = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HARD = ("nnnnnn", "snsnns", "pp3nn1", "n3nnnp", "nn33p3", "nns1ss", "sspsps", "n1n3n3", "np3n31", "333333", "spsps1")


@pytest.mark.parametrize("arch", [cell(s) for s in HARD] + [SPACE.sample(Random(seed)) for seed in range(150)], ids=str)
def test_cell_computes_what_the_paper_says_and_canonical_computes_the_same(arch: Arch) -> None:
    expected = reference(module := fill(Cell(arch, 2), arch), arch, IMAGES)
    torch.testing.assert_close(module(IMAGES), expected)
    canonical = SPACE.canonical(arch)
    torch.testing.assert_close(fill(Cell(canonical, 2), canonical)(IMAGES), expected)


def test_what_cannot_reach_the_output_is_not_computed() -> None:
    model = SPACE.build(cell("3n1ns3"))  # node 2 is a convolution of node 1
    dead = SPACE.build(cell("333nsn"))  # node 2 leads nowhere: e02 and e12 are dead
    images = torch.randn(2, 3, 8, 8)
    for network in (model, dead):
        network(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    without = {name.split(".")[2] for name, p in dead.named_parameters() if p.grad is None}
    assert without == {"e02", "e12"}
    assert parameters(dead) > parameters(SPACE.build(cell("3nnnsn")))


def test_a_convolution_of_nothing_yields_its_bias() -> None:
    module = Cell(arch := cell("nnnn3n"), 2)
    module["e13"].norm.bias.data.fill_(0.5)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(module(torch.randn(2, 2, 4, 4)), torch.full((2, 2, 4, 4), 0.5))
    assert SPACE.canonical(arch) != cell("nnnnnn")


# Strings -------------------------------------------------------------------------------------------------------------


def test_strings_go_both_ways() -> None:
    text = "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|"
    assert SPACE.parse(text) == cell("3nps13")
    assert SPACE.to_string(cell("3nps13")) == text
    assert SPACE.index_of(text) == SPACE.index(cell("3nps13"))
    assert SPACE.parse(cell("3nps13").to_json()) == cell("3nps13")


def test_all_strings() -> None:
    for index, arch in enumerate(SPACE.archs()):
        text = SPACE.to_string(arch)
        assert SPACE.index_of(text) == index
        assert SPACE.parse(text) == arch


@pytest.mark.skipif(not BENCHMARK.exists(), reason="the benchmark's table is not here")
def test_strings_of_the_benchmark() -> None:
    with np.load(BENCHMARK, allow_pickle=False) as arrays:
        texts = arrays["arch"].tolist()
    assert sorted(map(SPACE.index_of, texts)) == list(range(15_625))
    assert all(SPACE.to_string(SPACE.parse(text)) == text for text in texts[::50])


GOOD = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is no architecture of NASBench201, which has the form"),
        (GOOD[:-1], r"is no architecture of NASBench201.*Write one with space.to_string\(arch\)"),
        (GOOD.replace("+", "-"), r"is no architecture of NASBench201.*Write one with space.to_string\(arch\)"),
        (GOOD + "|", r"Write one with space.to_string\(arch\)"),
        (" " + GOOD, r"Write one with space.to_string\(arch\)"),
        (GOOD.replace("none~2", "conv_3x3~2"), r"edge e23 has operation 'conv_3x3'; did you mean 'nor_conv_3x3'"),
        (GOOD.replace("none~2", "none~1"), "edge e23 must read 'none~2', not 'none~1'"),
        (GOOD.replace("none~2", "none"), "edge e23 must read 'none~2', not 'none'"),
        (GOOD.replace("|none~0|+", "||+", 1), "edge e01 has operation ''; Known: avg_pool_3x3"),
        (None, "NoneType None is no architecture of NASBench201"),
        (7, "int 7 is no architecture of NASBench201"),
        (b"|none~0|", "bytes .* is no architecture of NASBench201"),
    ],
)
def test_malformed_strings(text: str, problem: str) -> None:
    for read in (SPACE.parse, SPACE.index_of):
        with pytest.raises(ArchError, match=problem):
            read(text)


def test_json_of_another_space() -> None:
    with pytest.raises(ArchError, match="an architecture of NASBench201 needs 'e01'"):
        SPACE.parse('{"depth0": 1}')


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"channels": 0}, "NASBench201 was given channels=0; it is a positive integer"),
        ({"cells": 1.5}, "NASBench201 was given cells=1.5"),
        ({"cells": None}, "NASBench201 was given cells=None"),
        ({"classes": -1}, "NASBench201 was given classes=-1"),
        ({"in_channels": True}, "NASBench201 was given in_channels=True"),
    ],
)
def test_bad_settings(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        NASBench201(**settings)  # type: ignore[arg-type]


# Equal cells ---------------------------------------------------------------------------------------------------------


def test_numbers_of_distinct_cells() -> None:
    assert len({expression(c) for c in CELLS}) == 5_545
    assert len({expression(c, constants=False) for c in CELLS}) == 4_930
    assert len({expression(c, weights=True) for c in CELLS}) == 5_875


def test_number_of_strings_of_the_benchmark() -> None:
    # The paper's 6,466 compares texts. A node is the sorted texts of its edges, "#" for zero, joined by "+"; a skip
    # copies the text of its source in one piece. Whether that piece falls among its equals is up to the alphabet, so
    # the count needs this very form.
    def text(operations: tuple[str, ...]) -> str:
        edges = iter(operations)
        nodes = ["0"]
        for node in (1, 2, 3):
            pieces = []
            for source, op in zip(nodes[:node], edges, strict=False):
                zero, skip = op == "none" or source == "#", op == "skip_connect"
                pieces.append("#" if zero else source if skip else f"({source})@{op}")
            nodes.append("+".join(sorted(pieces)))
        return nodes[3]

    assert len({text(c) for c in CELLS}) == 6_466


def test_canonical_has_one_cell_for_each_expression() -> None:
    archs = [SPACE.canonical(arch) for arch in SPACE.archs()]
    assert len(set(archs)) == 5_545
    assert all(SPACE.canonical(arch) == arch for arch in set(archs))
    for index in range(0, 15_625, 25):
        assert expression([str(archs[index][d]) for d in EDGES]) == expression(CELLS[index])


@pytest.mark.parametrize(
    ("arch", "twin"),
    [
        ("333nnn", "nnnnnn"),  # nothing reaches the output
        ("nnpsnp", "nnnsnn"),  # poolings of nothing
        ("snnnsn", "nnnsnn"),  # the input by way of node 1
        ("3nnnsn", "nnn3nn"),  # a convolution on its way to the output
        ("nnnn3n", "nnnnn3"),  # a convolution of nothing is a constant, wherever it stands
        ("1nns3n", "n1nsn3"),  # the same by way of node 1 or node 2
        ("13s1nn", "nnn1nn"),  # an end that leads nowhere
        ("3ssnns", "3nnssn"),  # a sum passed on by a skip
    ],
)
def test_equal_cells(arch: str, twin: str) -> None:
    assert SPACE.canonical(cell(arch)) == SPACE.canonical(cell(twin))


@pytest.mark.parametrize(
    ("arch", "other"),
    [
        ("nnn3nn", "nnn1nn"),
        ("snnssn", "nnnsnn"),  # the input twice, and once
        ("nnn33n", "nnn3nn"),  # a constant added
        ("nnnpnn", "nnnsnn"),
        ("3nnn1n", "1nnn3n"),  # order of two convolutions
    ],
)
def test_unequal_cells(arch: str, other: str) -> None:
    assert SPACE.canonical(cell(arch)) != SPACE.canonical(cell(other))


def test_canonical_is_the_cheapest() -> None:
    assert SPACE.canonical(cell("333nnn")) == cell("nnnnnn")
    assert SPACE.canonical(cell("3n3nsn")) == cell("nnn3nn")
    operations = {arch: tuple(arch.values()) for arch in SPACE.archs()}

    def macs(arch: Arch) -> int:
        return 9 * operations[arch].count("nor_conv_3x3") + operations[arch].count("nor_conv_1x1")

    assert all(macs(SPACE.canonical(arch)) <= macs(arch) for arch in list(operations)[::7])


def test_one_convolution_read_twice_is_told_from_two_by_weights_only() -> None:
    once, two = (list(map(str, cell(short).values())) for short in ("3nsnss", "3nn3sn"))
    assert expression(once) == expression(two)
    assert expression(once, weights=True) != expression(two, weights=True)


def test_canonical_refuses_other_archs() -> None:
    with pytest.raises(ArchError, match="decision 'e01' of NASBench201 has option 'conv'"):
        SPACE.canonical(cell("nnnnnn") | {"e01": "conv"})


def test_graph_leaves_out_none() -> None:
    assert SPACE.graph(cell("3nsnp1")) == [
        ("input", "1", "nor_conv_3x3"),
        ("1", "2", "skip_connect"),
        ("1", "output", "avg_pool_3x3"),
        ("2", "output", "nor_conv_1x1"),
    ]
