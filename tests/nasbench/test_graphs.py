"""Graphs in which nothing lies on anything else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import nn

import nasbench as nb
from nasbench.graphs import Layout
from search_spaces import Arch, ArchError, NASBench201, ResNet, SearchSpace

Edges = tuple[tuple[str, str, str], ...]
SEP, SKIP, DIL, POOL = "sep_conv_3x3", "skip_connect", "dil_conv_3x3", "max_pool_3x3"


@dataclass(frozen=True)
class Drawn(SearchSpace):
    """One architecture, drawn as it is told."""

    cells: tuple[tuple[str, Edges], ...]

    @property
    def choices(self) -> Mapping[str, tuple[int, ...]]:
        return {"only": (0,)}

    def build(self, arch: Arch) -> nn.Module:
        return nn.Identity()

    def graphs(self, arch: Arch) -> dict[str, list[tuple[str, str, str]]]:
        return {title: list(edges) for title, edges in self.cells}


def drawn(*edges: tuple[str, str, str]) -> Figure:
    space = Drawn((("", edges),))
    return nb.draw(space, space.at(0))


def cell(text: str) -> Edges:
    """Read 'operation(state)+operation(state); ...', the nodes 2, 3, ... of a cell that joins all of them."""
    states = {"0": "previous", "1": "input"}
    edges: list[tuple[str, str, str]] = []
    nodes = text.split("; ")
    for node, pair in enumerate(nodes, start=2):
        for term in pair.split("+"):
            op, state = term.rstrip(")").split("(")
            edges.append((states.get(state, state), str(node), op))
    return (*edges, *((str(node), "output", "") for node in range(2, len(nodes) + 2)))


# DARTS, second order, as published
NORMAL = cell(f"{SEP}(0)+{SEP}(1); {SEP}(0)+{SEP}(1); {SEP}(1)+{SKIP}(0); {SKIP}(0)+{DIL}(2)")
REDUCTION = cell(f"{POOL}(0)+{POOL}(1); {SKIP}(2)+{POOL}(1); {POOL}(0)+{SKIP}(2); {SKIP}(2)+{POOL}(1)")
DARTS_V2 = Drawn((("normal", NORMAL), ("reduction", REDUCTION)))
WIDE = Drawn((("", (("a", "b", "W" * 20), ("a", "b", "M" * 20), ("i" * 20, "b", "$x$"))),))


def random_cell(seed: int) -> Drawn:
    """A cell of five nodes with two operations each, as in NASNet; the same input may be taken twice."""
    rng = Random(seed)
    nodes = ["+".join(f"{rng.choice([SEP, SKIP, DIL])}({rng.randrange(n)})" for _ in range(2)) for n in range(2, 7)]
    return Drawn((("", cell("; ".join(nodes))),))


def texts(figure: Figure) -> list[str]:
    return sorted(text.get_text() for text in figure.axes[0].texts)


def places(figure: Figure) -> dict[str, tuple[float, float]]:
    return {text.get_text(): text.get_position() for text in figure.axes[0].texts}


def arrows(figure: Figure) -> list[np.ndarray]:
    """The lines as dense points on the page, without their first and last twentieth, which touch the boxes."""
    found = []
    t = np.linspace(0, 1, 41)[:, None]
    for patch in figure.axes[0].patches:
        assert isinstance(patch, FancyArrowPatch)
        v: Any = patch._path_original.vertices  # type: ignore[attr-defined]
        curves = [v[i : i + 4] for i in range(0, len(v) - 1, 3)]
        points = [
            (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d for a, b, c, d in curves
        ]
        line = figure.axes[0].transData.transform(np.concatenate(points))
        cut = max(2, len(line) // 20)
        found.append(line[cut:-cut])
    return found


def boxes(figure: Figure) -> list[Bbox]:
    figure.canvas.draw()

    def box(text: Text) -> Bbox:
        frame = text.get_bbox_patch()
        return text.get_window_extent() if frame is None else frame.get_window_extent()

    return [box(text) for text in figure.axes[0].texts]


CASES: list[tuple[SearchSpace, int]] = [
    *((NASBench201(), index) for index in (15624, 4444, 11718)),
    (ResNet(), 0),
    (DARTS_V2, 0),
    (WIDE, 0),
    *((random_cell(seed), 0) for seed in range(8)),
]


@pytest.mark.parametrize(("space", "index"), CASES)
def test_nothing_lies_on_anything_else_or_off_the_page(space: SearchSpace, index: int) -> None:
    figure = nb.draw(space, space.at(index))
    found, page = boxes(figure), figure.bbox
    assert not [1 for i, a in enumerate(found) for b in found[:i] if a.overlaps(b)]
    assert all(page.x0 <= b.x0 and b.x1 <= page.x1 and page.y0 <= b.y0 and b.y1 <= page.y1 for b in found)
    inner = [b.padded(-1) for b in found]
    hits = [1 for line in arrows(figure) for b in inner if b.count_contains(line)]
    assert hits == []


def test_a_cell_is_drawn_without_none() -> None:
    space = NASBench201()
    arch = space.parse("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_1x1~2|")
    figure = nb.draw(space, arch)
    expected = ["1", "2", "avg_pool_3x3", "input", "nor_conv_1x1", "nor_conv_3x3", "output", "skip_connect"]
    assert texts(figure) == expected
    assert len(figure.axes[0].patches) == 2 * 4  # to every operation and from it


def test_a_node_stands_below_all_that_it_adds() -> None:
    at = places(drawn(("input", "1", "one"), ("1", "output", "two"), ("input", "output", "three")))
    rows = [["input"], ["one"], ["1"], ["two", "three"], ["output"]]
    heights = [{at[name][1] for name in row} for row in rows]
    assert [len(height) for height in heights] == [1] * 5
    assert sorted(heights, key=max, reverse=True) == heights


def test_a_planar_cell_is_drawn_without_crossings() -> None:
    figure = nb.draw(NASBench201(), NASBench201().at(15624))
    figure.canvas.draw()
    lines = arrows(figure)
    distances = [np.linalg.norm(a[:, None] - b[None], axis=2).min() for i, a in enumerate(lines) for b in lines[:i]]
    assert min(distances) > 1  # pixels


def test_several_cells_have_titles() -> None:
    figure = nb.draw(DARTS_V2, DARTS_V2.at(0))
    at = places(figure)
    assert at["normal"][1] > at["reduction"][1]
    assert texts(figure).count("output") == 2
    narrow = Drawn((("left", (("a", "b", ""),)), ("right", (("a", "b", ""),))))
    at = places(nb.draw(narrow, narrow.at(0)))
    assert at["left"][1] == at["right"][1]
    assert at["left"][0] < at["right"][0]


def test_a_chain_runs_straight_down() -> None:
    at = places(nb.draw(ResNet(), ResNet().at(0)))
    assert [x for x, _ in at.values()] == pytest.approx([at["input"][0]] * 8)
    assert at["input"][1] > at["depth0 = 1"][1] > at["output"][1]


def test_two_operations_between_the_same_states_are_two_boxes() -> None:
    figure = drawn(("a", "b", "same"), ("a", "b", "same"), ("a", "b", ""), ("a", "b", ""))
    assert texts(figure) == ["a", "b", "same", "same"]
    assert len(figure.axes[0].patches) == 2 * 2 + 1  # edges without an operation are one


@pytest.mark.parametrize(
    ("edges", "shown"),
    [
        ((), ["no operations"]),
        ((("a", "b", "x"), ("b", "a", "y")), ["a", "b", "x", "y"]),
        ((("a", "a", ""), ("a", "b", "$y$ & <b>")), ["$y$ & <b>", "a", "b"]),
        ((("a", "a", "x"), ("c", "d", "")), ["a", "c", "d", "x"]),
    ],
    ids=["empty", "cycle", "loop", "parts"],
)
def test_odd_graphs_are_drawn(edges: Edges, shown: list[str]) -> None:
    figure = drawn(*edges)
    figure.canvas.draw()
    assert texts(figure) == shown


def test_the_same_architecture_gives_the_same_layout() -> None:
    one, two = Layout(NORMAL), Layout(NORMAL)
    np.testing.assert_equal(one.places, two.places)
    np.testing.assert_equal(one.lines, two.lines)


def test_an_architecture_is_drawn_into_axes_that_are_given_and_made_to_fit() -> None:
    figure = Figure(figsize=(4, 2))
    axes = figure.subplots(1, 2)
    assert nb.draw(NASBench201(), NASBench201().at(15624), ax=axes[1]) is figure
    assert not axes[0].texts
    sizes = {text.get_fontsize() for text in axes[1].texts}
    assert max(sizes) < 8


def test_a_foreign_architecture_is_refused() -> None:
    with pytest.raises(ArchError, match="NASBench201 needs 'e01'"):
        nb.draw(NASBench201(), ResNet().at(0))


def test_a_trial_draws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    space = NASBench201()
    figure: Any = nb.Trial(0, space.at(15624), "complete", space=space).draw()
    assert texts(figure) == texts(nb.draw(space, space.at(15624)))
    assert figure._repr_png_()[0].startswith(b"\x89PNG")
