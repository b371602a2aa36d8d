"""The space of plain chains: its start, its canonical form, its networks. How they grow: test_growth.py."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import nn

from search_spaces import ArchError, PlainCNN

SPACE = PlainCNN(widths=(4, 8), fc_widths=(8, 16), blocks=2, slots=3, fc_slots=2, classes=10, in_channels=1)


def test_the_start_is_that_of_eas() -> None:
    space = PlainCNN(classes=10, in_channels=3)
    model = space.build(space.start)
    kinds = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.MaxPool2d | nn.AdaptiveAvgPool2d)]
    shown = [
        f"C{m.out_channels}k{m.kernel_size[0]}" if isinstance(m, nn.Conv2d)
        else f"FC{m.out_features}" if isinstance(m, nn.Linear)
        else "P2" if isinstance(m, nn.MaxPool2d) else "Avg"
        for m in kinds
    ]  # fmt: skip
    assert " ".join(shown) == "C16k3 P2 C32k3 P2 C64k3 P2 C128k3 Avg FC256 FC10"


def test_of_other_widths_the_start_has_the_nearest() -> None:
    space = PlainCNN(widths=(4, 6, 8, 12), fc_widths=(24, 32, 48, 96), kernels=(5, 7))
    assert space.layers(space.start) == [["conv-4-5"], ["conv-8-5"], ["conv-12-5"], ["conv-12-5"], ["fc-48"]]


def test_canonical_packs_the_layers_and_resets_inert_kernels() -> None:
    values = {"block0_filters0": 4, "block0_kernel0": 3, "block0_filters1": 0, "block0_kernel1": 5}
    values |= {"block0_filters2": 8, "block0_kernel2": 5, "block1_filters0": 8, "block1_kernel0": 3}
    values |= {"block1_filters1": 0, "block1_kernel1": 3, "block1_filters2": 0, "block1_kernel2": 5, "fc0": 0, "fc1": 8}
    arch = SPACE.arch(values)
    packed = SPACE.canonical(arch)
    assert SPACE.layers(packed) == SPACE.layers(arch) == [["conv-4-3", "conv-8-5"], ["conv-8-3"], ["fc-8"]]
    assert [packed[name] for name in ("block0_filters1", "block0_kernel1", "block0_filters2", "block0_kernel2")] == [
        8, 5, 0, 1
    ]  # fmt: skip
    assert [packed[name] for name in ("block1_kernel1", "block1_kernel2", "fc0", "fc1")] == [1, 1, 8, 0]


def test_equal_canonical_forms_are_equal_networks() -> None:
    x = torch.rand(2, 1, 8, 8)
    for seed in range(6):
        arch = SPACE.sample(Random(seed))
        outputs = []
        for form in (arch, SPACE.canonical(arch)):
            torch.manual_seed(0)
            outputs.append(SPACE.build(form).eval()(x))
        assert torch.equal(*outputs)


def test_actions_speak_of_the_packed_list() -> None:
    arch = SPACE.start | {"block0_filters2": 8, "block0_kernel2": 5}
    wider = SPACE.deepened(arch, 0, 1)
    assert wider is not None
    assert SPACE.layers(wider)[0] == ["conv-4-3", "conv-8-5", "conv-8-5"]
    fc = SPACE.deepened(arch, 2, 0, kernel=5)  # which has none
    assert fc is not None
    assert SPACE.layers(fc)[2] == ["fc-16", "fc-16"]


def test_the_graph_shows_what_is_there() -> None:
    assert SPACE.graph(SPACE.start) == [
        ("input", "conv-4-3 (0.0)", ""),
        ("conv-4-3 (0.0)", "pool 1", ""),
        ("pool 1", "conv-8-3 (1.0)", ""),
        ("conv-8-3 (1.0)", "pool 2", ""),
        ("pool 2", "fc-16 (2.0)", ""),
        ("fc-16 (2.0)", "output", ""),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (8, 4)}, "ascending"),
        ({"fc_widths": ()}, "at least one"),
        ({"kernels": (2, 3)}, "odd"),
        ({"slots": 0}, "slots=0"),
        ({"blocks": 1.5}, "blocks=1.5"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        PlainCNN(**settings)  # type: ignore[arg-type]


def test_json_lists_give_an_equal_space() -> None:
    assert PlainCNN(widths=[4, 8], kernels=[3]) == PlainCNN(widths=(4, 8), kernels=(3,))  # type: ignore[arg-type]
