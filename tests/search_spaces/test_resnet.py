"""ResNet: counts by hand, shapes, settings."""

from __future__ import annotations

import pytest
import torch

from search_spaces import ArchError, ResNet
from search_spaces.operations import DropPath

SPACE = ResNet(classes=10, in_channels=3)


def test_size() -> None:
    assert SPACE.size == 729  # 3 ** 6
    assert ResNet(depths=(1,), widths=(8, 16)).size == 8


def test_parameters_of_resnet20() -> None:
    model = SPACE.build(SPACE.arch(depth0=3, depth1=3, depth2=3, width0=16, width1=32, width2=64))
    # A 3x3 convolution from a to b channels with batch norm has 9ab + 2b parameters, a shortcut ab + 2b.
    # stem 464; stage 0: 6 * 2336 = 14,016; stage 1: 4672 + 5 * 9280 + 576 = 51,648;
    # stage 2: 18,560 + 5 * 36,992 + 2176 = 205,696; linear 650.
    assert sum(p.numel() for p in model.parameters()) == 464 + 14_016 + 51_648 + 205_696 + 650


def test_depth_counts_blocks_each_with_drop_path() -> None:
    model = SPACE.build(SPACE.arch(depth0=1, depth1=2, depth2=3, width0=16, width1=16, width2=16))
    assert [len(model.get_submodule(f"stage{i}")) for i in range(3)] == [1, 2, 3]  # type: ignore[arg-type]
    assert sum(isinstance(m, DropPath) for m in model.modules()) == 6


@pytest.mark.parametrize(("size", "left"), [(32, 8), (8, 2), (9, 3)])
def test_stages_1_and_2_halve_the_image(size: int, left: int) -> None:
    model = SPACE.build(SPACE.at(0))
    features = torch.nn.Sequential(*list(model.children())[:-1])
    assert features(torch.zeros(2, 3, size, size)).shape == (2, 16, left, left)


def test_dropped_blocks_are_skipped() -> None:
    model = SPACE.build(SPACE.at(0))
    block = model.get_submodule("stage0.0")
    x = torch.rand(64, 16, 4, 4)
    block.drop_path.p = 0.5  # type: ignore[union-attr]
    same = (block(x) == x).flatten(1).all(1)  # the shortcut is the identity, and ReLU of a positive input too
    assert 0 < int(same.sum()) < 64


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"depths": ()}, r"ResNet was given depths=\(\); it needs at least one option"),
        ({"depths": (1, 1)}, "at least one option, each once"),
        ({"widths": (16, 0)}, "is a tuple of positive integers"),
        ({"widths": (16.0,)}, "is a tuple of positive integers"),
        ({"depths": 3}, "ResNet was given depths=3; it is a tuple of positive integers"),
        ({"classes": 0}, "ResNet was given classes=0; it is a positive integer"),
        ({"in_channels": "3"}, "ResNet was given in_channels='3'; it is a positive integer"),
    ],
)
def test_bad_settings(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        ResNet(**settings)  # type: ignore[arg-type]


def test_lists_as_json_has_them_make_the_same_space() -> None:
    space = ResNet(depths=[1, 2], widths=[8])  # type: ignore[arg-type]
    assert space == ResNet(depths=(1, 2), widths=(8,))
    assert hash(space) == hash(ResNet(depths=(1, 2), widths=(8,)))
