from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from search_spaces import SPACES, ArchError, ViT, space

SMALL = ViT(widths=(8, 12), heads=(1, 2), ratios=(1.5, 2), depths=(1, 2), head_dim=4, classes=5, in_channels=2)


def test_the_spaces_of_the_paper() -> None:
    tiny, small = ViT(), ViT.small(classes=10)
    assert SPACES["vit"] == "search_spaces.vit:ViT"
    assert space("vit") == tiny
    # Width, depth, and two heads and two ratios for each of 14 blocks; three widths, depths, heads and ratios.
    assert tiny.size == 3 * 3 * (2 * 2) ** 14
    assert small.size == 3 * 3 * (3 * 3) ** 14
    assert small.classes == 10
    assert (small.widths, small.heads, small.ratios) == ((320, 384, 448), (5, 6, 7), (3.0, 3.5, 4.0))


def test_the_parameters_of_deit() -> None:
    # DeiT-Ti has width 192, 12 blocks of 3 heads of 64 features, a ratio of 4, a class token and absolute positions:
    # 5,717,416 parameters for 224x224 images in patches of 16 and 1,000 classes.
    vit = ViT(patch=16, classes=1000, in_channels=3, image_size=224)
    arch = vit.at(0) | {f"ratio{i}": 4.0 for i in range(14)}
    assert (arch["width"], arch["depth"], arch["heads0"]) == (192, 12, 3)
    with torch.device("meta"):
        assert sum(p.numel() for p in vit.build(arch).parameters()) == 5_717_416


def test_parameters_by_hand() -> None:
    vit = SMALL.bind(SimpleNamespace(height=8))
    arch = vit.arch(width=8, depth=1, heads0=2, heads1=1, ratio0=1.5, ratio1=1.5)
    # Patches 2 x 4 x 4 x 8 + 8, class token 8, positions of 1 + 4 tokens 40; norms 3 x 16; query, key and value of
    # 2 x 4 features 3 x (64 + 8), projection 64 + 8; hidden 12: 8 x 12 + 12 + 12 x 8 + 8; head 8 x 5 + 5.
    expected = 264 + 8 + 40 + 48 + 216 + 72 + 212 + 45
    assert sum(p.numel() for p in vit.build(arch).parameters()) == expected


def test_all_tokens_count_and_the_head_reads_the_patches() -> None:
    vit = SMALL.bind(SimpleNamespace(height=8))
    network, x = vit.build(vit.at(vit.size - 1)), torch.randn(2, 2, 8, 8)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    before = network(x)
    for row, column in ((0, 0), (0, 7), (7, 0), (7, 7)):
        y = x.clone()
        y[:, :, row, column] += 1
        assert not torch.allclose(network(y), before)
    nn.init.normal_(network.token)  # type: ignore[arg-type]
    assert not torch.allclose(network(x), before)
    network.blocks = nn.Identity()  # where no token sees another
    before = network(x)
    nn.init.normal_(network.token)  # type: ignore[arg-type]
    assert torch.equal(network(x), before)


def test_ratios_are_floats_so_that_equal_spaces_are_equal() -> None:
    made = ViT(ratios=(3, 4))
    assert made.ratios == (3.0, 4.0)
    assert made.fingerprint == ViT(ratios=(3.0, 4.0)).fingerprint
    assert made.parse(made.at(0).to_json()) == made.at(0)


def test_images_of_another_size_are_refused() -> None:
    vit = SMALL.bind(SimpleNamespace(height=8))
    arch = vit.at(0)
    for x, size in ((torch.zeros(1, 2, 12, 12), "12x12"), (torch.zeros(1, 2, 8, 12), "8x12")):
        with pytest.raises(ArchError, match=f"reads images of 8x8, and was given {size}.*Resize them"):
            vit.build(arch)(x)
        with pytest.raises(ArchError, match=f"reads images of 8x8, and was given {size}"):
            vit.supernet()(x, vit.one_hot(arch))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "patch=4, but images of 30x30 are not divisible into such patches. Give another patch"),
        ({"head_dim": 0}, "ViT was given head_dim=0; it is a positive integer"),
        ({"patch": None}, "ViT was given patch=None; it is a positive integer"),
        ({"image_size": 8.0}, "ViT was given image_size=8.0; it is a positive integer"),
    ],
)
def test_bad_settings_say_what_to_do(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        ViT(**settings)


def test_the_size_of_images_comes_from_the_data() -> None:
    assert SMALL.bind(SimpleNamespace(height=12)).image_size == 12
    with pytest.raises(ArchError, match="images of 10x10 are not divisible"):
        SMALL.bind(SimpleNamespace(height=10))
    makes: list[Callable[[], object]] = [lambda: SMALL.build(SMALL.at(0)), SMALL.supernet]
    for make in makes:
        with pytest.raises(ArchError, match="ViT does not know image_size yet"):
            make()
