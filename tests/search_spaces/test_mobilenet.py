"""MobileNetV3: the very networks of torchvision, counts by hand, shapes, what decisions do not matter."""

from __future__ import annotations

from random import Random

import pytest
import torch

from search_spaces import Arch, MobileNetV3
from search_spaces.mobilenet import STAGES, rounded
from search_spaces.operations import DropPath

SPACE = MobileNetV3(classes=10, in_channels=3)


def test_decisions() -> None:
    assert len(SPACE.choices) == 45
    assert SPACE.size == 3**45
    assert sum(1 for name in SPACE.choices if name.startswith("depth")) == 5


@pytest.mark.parametrize("seed", range(4))
def test_networks_are_those_of_torchvision(seed: int) -> None:
    models = pytest.importorskip("torchvision.models.mobilenetv3")
    arch = SPACE.sample(Random(seed))
    rows = [models.InvertedResidualConfig(16, 3, 16, 16, False, "RE", 1, 1, 1.0)]
    c_in = 16
    for s, stage in enumerate(STAGES):
        for b in range(arch[f"depth{s}"]):  # type: ignore[arg-type]
            rows.append(
                models.InvertedResidualConfig(
                    c_in,
                    arch[f"kernel{s}_{b}"],
                    c_in * arch[f"expand{s}_{b}"],  # type: ignore[operator]
                    stage.channels,
                    stage.squeeze,
                    "HS" if stage.swish else "RE",
                    1 if b else stage.stride,
                    1,
                    1.0,
                )
            )
            c_in = stage.channels
    theirs = models.MobileNetV3(rows, 1280, num_classes=10, norm_layer=torch.nn.BatchNorm2d).eval()
    ours = SPACE.build(arch).eval()
    # The first linear layer has a bias in torchvision.
    names = [name for name in theirs.state_dict() if name != "classifier.0.bias"]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - 1280
    with torch.no_grad():
        theirs.classifier[0].bias.zero_()
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
    weights = [theirs.state_dict()[name] for name in names]
    ours.load_state_dict(dict(zip(ours.state_dict(), weights, strict=True)))
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-6)


def test_parameters_by_hand() -> None:
    # Width 0.25: 8 channels in stem and stage 0; 8, 24, 32, 40 in the others; 240 and 320 at the end; one block each.
    space = MobileNetV3(depths=(1,), kernels=(3,), expands=(3,), width=0.25, classes=5, in_channels=2)
    assert [space.channels(stage.channels) for stage in STAGES] == [8, 16, 24, 32, 40]
    total = 2 * 8 * 9 + 2 * 8  # stem
    total += (8 * 9 + 16) + (8 * 8 + 16)  # first block
    # A block from a to c channels through h = 3a: ah + 2h, 9h + 2h, hc + 2c; squeeze-excitation through m: 2hm + m + h.
    for a, c, m in ((8, 8, 0), (8, 16, 8), (16, 24, 0), (24, 32, 24), (32, 40, 24)):
        h = 3 * a
        total += a * h + 2 * h + 11 * h + h * c + 2 * c + (2 * h * m + m + h if m else 0)
    total += 40 * 240 + 480 + 240 * 320 + 320 * 5 + 5
    assert sum(p.numel() for p in space.build(space.at(0)).parameters()) == total


@pytest.mark.parametrize(
    ("stem", "side", "left"), [("imagenet", 224, 7), ("imagenet", 64, 2), ("cifar", 32, 4), ("cifar", 9, 2)]
)
def test_strides(stem: str, side: int, left: int) -> None:
    model = MobileNetV3(width=0.25, stem=stem, classes=10, in_channels=3).build(SPACE.at(0)).eval()
    features = torch.nn.Sequential(*list(model)[:-1])  # type: ignore[call-overload]
    assert features(torch.zeros(1, 3, side, side)).shape == (1, 240, left, left)


def test_depth_counts_blocks_and_residual_branches_can_be_dropped() -> None:
    arch = SPACE.arch({name: 2 + i % 3 if i < 5 else 3 for i, name in enumerate(SPACE.choices)})
    model = SPACE.build(arch)
    assert [len(model.get_submodule(f"stage{s}")) for s in range(5)] == [2, 3, 4, 2, 3]  # type: ignore[arg-type]
    x = torch.randn(64, 24, 4, 4)
    block = model.get_submodule("stage0.1")
    path = next(m for m in block.modules() if isinstance(m, DropPath))
    path.p = 0.5
    assert 0 < int((block(x) == x).flatten(1).all(1).sum()) < 64


def test_decisions_about_blocks_that_do_not_exist_do_not_matter() -> None:
    rng = Random(0)
    arch = SPACE.sample(rng) | {"depth1": 2}
    other = arch | {"kernel1_2": 7, "expand1_3": 6}
    assert SPACE.canonical(arch) == SPACE.canonical(other)
    assert SPACE.canonical(arch)["kernel1_3"] == 3
    assert SPACE.canonical(arch | {"kernel1_1": 7}) != SPACE.canonical(arch | {"kernel1_1": 5})
    with torch.random.fork_rng():
        shapes = [[p.shape for p in SPACE.build(a).parameters()] for a in (arch, other, SPACE.canonical(arch))]
    assert shapes[0] == shapes[1] == shapes[2]
    small = MobileNetV3(kernels=(3,), expands=(3, 4), depths=(1, 2), width=0.25)
    options = {"depth0": 1, "depth1": 1, "depth2": 1, "depth3": 1}
    some = [
        Arch({**small.at(0), **options, "depth4": d, "expand4_0": a, "expand4_1": b})
        for d in (1, 2)
        for a in (3, 4)
        for b in (3, 4)
    ]
    assert len({small.canonical(a) for a in some}) == 2 + 4


def test_graph_has_the_blocks_that_exist() -> None:
    arch = SPACE.arch({name: 2 if name.startswith("depth") else 3 for name in SPACE.choices} | {"kernel0_1": 7})
    graph = SPACE.graph(arch)
    assert len(graph) == 11
    assert graph[1] == ("0.0: 3x3, expand 3", "0.1: 7x7, expand 3", "")


def test_rounding() -> None:
    assert [rounded(n) for n in (1, 8, 11, 12, 19, 20, 88, 90)] == [8, 8, 16, 16, 24, 24, 88, 88]
    assert MobileNetV3(width=1) == MobileNetV3()
    assert MobileNetV3(width=1).fingerprint == MobileNetV3().fingerprint
