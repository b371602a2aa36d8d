"""Arch and SearchSpace: values, membership, moves, numbers, settings."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace

import pytest
from torch import nn

from search_spaces.base import Arch, ArchError, Choices, SearchSpace, nearest


@dataclass(frozen=True)
class Toy(SearchSpace):
    """Twelve assignments, eleven of them valid."""

    classes: int | None = None
    in_channels: int | None = None

    @property
    def choices(self) -> Choices:
        return {"op": ("conv", "pool", None), "depth": (1, 2), "rate": (0.5, 1.0)}

    def is_valid(self, arch: Arch) -> bool:
        """No deep network without an operation at full rate."""
        return tuple(arch.values()) != (None, 2, 1.0)

    def build(self, arch: Arch) -> nn.Module:
        return nn.Identity()


@dataclass(frozen=True)
class Single(Toy):
    @property
    def choices(self) -> Choices:
        return {"op": ("conv",)}


class Impossible(Toy):
    def is_valid(self, arch: Arch) -> bool:
        """Nothing is valid."""
        return False


TOY = Toy()


# Arch ----------------------------------------------------------------------------------------------------------------


def test_arch_is_a_frozen_mapping_in_order() -> None:
    arch = Arch({"b": 1, "a": None})
    assert list(arch) == ["b", "a"]
    assert dict(arch) == {"b": 1, "a": None}
    with pytest.raises(TypeError):
        arch["b"] = 2  # type: ignore[index]


def test_arch_does_not_follow_the_mapping_it_was_made_from() -> None:
    values = {"a": 1}
    arch = Arch(values)
    values["a"] = 2
    assert arch["a"] == 1


def test_equal_archs_have_equal_hashes_in_any_order() -> None:
    a, b = Arch({"x": 1, "y": "z"}), Arch({"y": "z", "x": 1})
    assert a == b
    assert hash(a) == hash(b)
    assert a != Arch({"x": 1, "y": "w"})
    assert a != {"x": 1, "y": "z"}


@pytest.mark.parametrize("values", [{}, {"a": None, "b": "é", "c": -1, "d": 0.1}])
def test_arch_survives_json_and_pickle(values: dict[str, str | int | float | None]) -> None:
    arch = Arch(values)
    for copy in (Arch.from_json(arch.to_json()), pickle.loads(pickle.dumps(arch))):  # noqa: S301 - our own bytes
        assert copy == arch
        assert list(copy) == list(arch)
        assert [type(v) for v in copy.values()] == [type(v) for v in arch.values()]


def test_arch_repr_is_readable_and_can_be_evaluated() -> None:
    assert repr(Arch({"depth": 2, "op": "conv"})) == "Arch(depth=2, op='conv')"
    assert repr(Arch({"layer.0": 8})) == "Arch({'layer.0': 8})"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", r"not an architecture: '\{' is no JSON"),
        ("[1]", "no JSON object of strings, numbers and nulls"),
        ('{"a": [1]}', "no JSON object of strings, numbers and nulls"),
        ('{"a": true}', "no JSON object of strings, numbers and nulls"),
    ],
)
def test_arch_refuses_other_json(text: str, problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        Arch.from_json(text)


def test_arch_names_the_nearest_decision() -> None:
    with pytest.raises(KeyError, match=r"'dept' is no decision of this architecture; did you mean 'depth'\?"):
        Arch({"depth": 1})["dept"]


def test_nearest_lists_all_names_when_none_is_near() -> None:
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
    assert nearest("arm", ["arc", "art", "b"]).startswith("did you mean 'ar")


# Membership ----------------------------------------------------------------------------------------------------------


def test_check_orders_like_the_space() -> None:
    assert list(TOY.check({"rate": 0.5, "op": "pool", "depth": 1})) == ["op", "depth", "rate"]
    assert TOY.arch(rate=0.5, op=None, depth=1) == TOY.arch({"op": None, "depth": 1}, rate=0.5)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"op": "conv"}, "an architecture of Toy needs 'depth', 'rate', got {'op': 'conv'}"),
        ({"op": "conv", "depth": 1, "rate": 0.5, "rat": 1}, r"Toy has no decision 'rat'; did you mean 'rate'\?"),
        (
            {"op": "con", "depth": 1, "rate": 0.5},
            "decision 'op' of Toy has option 'con'; choices are 'conv', 'pool', None",
        ),
        ({"op": "conv", "depth": 1.0, "rate": 0.5}, "decision 'depth' of Toy has option 1.0; choices are 1, 2"),
        ({"op": "conv", "depth": True, "rate": 0.5}, "decision 'depth' of Toy has option True"),
        ({"op": None, "depth": 2, "rate": 1.0}, "breaks a rule of Toy: No deep network without an operation"),
        ("conv", "Toy was given str 'conv', not an architecture. Use space.sample"),
        (None, "Toy was given NoneType None, not an architecture"),
    ],
)
def test_check_says_what_is_wrong(values: object, problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        TOY.check(values)  # type: ignore[arg-type]
    assert values not in TOY


def test_archs_are_the_valid_ones_in_order() -> None:
    archs = list(TOY.archs())
    assert len(archs) == TOY.size - 1 == 11  # 3 * 2 * 2, one of them against the rule
    assert [TOY.index(a) for a in archs] == sorted(TOY.index(a) for a in archs)


def test_parse_reads_json_of_this_space_only() -> None:
    assert TOY.parse('{"rate": 1.0, "op": "conv", "depth": 2}') == Arch({"op": "conv", "depth": 2, "rate": 1.0})
    with pytest.raises(ArchError, match="needs 'op', 'depth', 'rate'"):
        TOY.parse("{}")


# Moves ---------------------------------------------------------------------------------------------------------------


def test_sample_is_uniform_over_valid_archs() -> None:
    rng = Random(0)
    counts = Counter(TOY.sample(rng) for _ in range(5500))
    assert set(counts) == set(TOY.archs())
    # 500 expected of each; the standard deviation is 21, so this is five of them.
    assert all(abs(n - 500) < 107 for n in counts.values())


def test_mutate_reaches_every_neighbour_and_nothing_else() -> None:
    rng, arch = Random(0), TOY.arch(op=None, depth=1, rate=1.0)
    # Two other operations and one other rate; depth 2 would break the rule.
    assert {TOY.mutate(arch, rng) for _ in range(200)} == set(TOY.neighbours(arch))
    assert len(set(TOY.neighbours(arch))) == 3


def test_crossover_takes_each_decision_from_a_parent_and_stays_valid() -> None:
    rng = Random(0)
    a, b = TOY.arch(op=None, depth=1, rate=1.0), TOY.arch(op="conv", depth=2, rate=1.0)
    children = {TOY.crossover(a, b, rng) for _ in range(100)}
    assert children == {a, b, TOY.arch(op="conv", depth=1, rate=1.0)}  # (None, 2, 1.0) breaks the rule


def test_moves_that_cannot_end_say_so() -> None:
    with pytest.raises(ArchError, match="Single has one architecture only: there is nothing to mutate"):
        Single().mutate(Single().at(0), Random(0))
    with pytest.raises(ArchError, match=r"no valid architecture of Impossible in 10,000 draws"):
        Impossible().sample(Random(0))


# Numbers -------------------------------------------------------------------------------------------------------------


def test_index_reads_the_code_as_digits() -> None:
    arch = TOY.arch(op="pool", depth=2, rate=0.5)
    assert TOY.encode(arch) == (1, 1, 0)
    assert TOY.index(arch) == (1 * 2 + 1) * 2 + 0
    assert TOY.at(6) == arch


@pytest.mark.parametrize("index", [-1, 12])
def test_at_refuses_an_index_out_of_range(index: int) -> None:
    with pytest.raises(ArchError, match=rf"Toy has architectures 0\.\.11, asked for {index}"):
        TOY.at(index)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ((0, 0), "a code of Toy has 3 positions, got 2"),
        ((0, 2, 0), r"position 2 of decision 'depth' is outside 0\.\.1"),
    ],
)
def test_decode_refuses_other_codes(code: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        TOY.decode(code)


# Settings ------------------------------------------------------------------------------------------------------------


def test_bind_fills_in_what_was_left_out() -> None:
    data = SimpleNamespace(classes=10, channels=3)
    assert TOY.bind(data) == Toy(classes=10, in_channels=3)
    assert Toy(classes=10).bind(data) == Toy(classes=10, in_channels=3)
    assert (TOY.classes, TOY.in_channels) == (None, None)  # frozen: bind returned another space
    assert TOY.bind(object()) is TOY  # a table, say, has neither


def test_bind_fills_in_the_context_of_a_text() -> None:
    @dataclass(frozen=True)
    class OfTexts(Toy):
        context: int | None = None

    data = SimpleNamespace(classes=50, context=64)
    assert OfTexts().bind(data) == OfTexts(classes=50, context=64)
    with pytest.raises(ArchError, match="OfTexts was made with context=32, the data has 64. Leave context out"):
        OfTexts(context=32).bind(data)


def test_bind_refuses_other_classes() -> None:
    with pytest.raises(ArchError, match=r"Toy was made with classes=5, the data has 10\. Leave classes out"):
        Toy(classes=5).bind(SimpleNamespace(classes=10, channels=3))


def test_require_names_what_is_missing() -> None:
    with pytest.raises(ArchError, match=r"Toy does not know classes and in_channels yet. Use space.bind\(data\)"):
        TOY.require("classes", "in_channels")
    Toy(classes=1, in_channels=1).require("classes", "in_channels")


def test_fingerprint_depends_on_settings_and_choices() -> None:
    assert Toy().fingerprint == TOY.fingerprint
    assert len({Toy().fingerprint, Toy(classes=2).fingerprint, Single().fingerprint}) == 3


def test_default_graph_is_a_chain() -> None:
    graph = TOY.graph(TOY.arch(op=None, depth=1, rate=0.5))
    assert graph == [
        ("input", "op = None", ""),
        ("op = None", "depth = 1", ""),
        ("depth = 1", "rate = 0.5", ""),
        ("rate = 0.5", "output", ""),
    ]
