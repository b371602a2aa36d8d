"""MobileNetV3: the very networks of torchvision, counts by hand, shapes, what decisions do not matter."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces import Arch, Mixture, MobileNetV3
from search_spaces.entangled import Axis, EntangledConvBN, KernelAxis
from search_spaces.mobilenet import STAGES, EntangledResidual, EntangledSqueezeExcitation, Stage, rounded
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


# What a mixture means: sums over the options. Hidden channels are weighed once by every layer that reads them.


def squeezed(module: EntangledSqueezeExcitation, x: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    """x, which has no weights, times its gates."""
    means, middles = x.mean((2, 3)), [rounded(size // 4) for size in sizes]
    reduce, restore = module.reduce.weight[..., 0, 0], module.restore.weight[..., 0, 0]
    assert module.reduce.bias is not None
    assert module.restore.bias is not None
    middle = module.reduce.bias
    for a, size in zip(weights, sizes, strict=True):
        middle = middle + a * F.linear(means[:, :size], reduce[:, :size])
    gates, middle = module.restore.bias, F.relu(middle)
    for a, size in zip(weights, middles, strict=True):
        gates = gates + a * F.linear(middle[:, :size], restore[:, :size])
    return x * F.hardsigmoid(gates)[:, :, None, None]


def residual(block: EntangledResidual, x: Tensor, kernel: Tensor, hidden: Tensor, sizes: list[int]) -> Tensor:
    """A block for kernels (3, 5) in training: no channel has a weight in front of a norm or an activation."""

    def normed(layer: EntangledConvBN, y: Tensor) -> Tensor:
        return F.batch_norm(y, None, None, layer.norm.weight, layer.norm.bias, training=True)

    y = block.activation(normed(block.expand, F.conv2d(x, block.expand.conv.weight)))
    weight, stride = block.depthwise.conv.weight, block.depthwise.conv.stride
    small = F.conv2d(y, weight[..., 1:-1, 1:-1], stride=stride, padding=1, groups=sizes[-1])
    large = F.conv2d(y, weight, stride=stride, padding=2, groups=sizes[-1])
    y = block.activation(normed(block.depthwise, kernel[0] * small + kernel[1] * large))
    if block.squeeze is not None:
        y = squeezed(block.squeeze, y, hidden, sizes)
    weight = block.project.conv.weight
    pairs = zip(hidden, sizes, strict=True)
    y = normed(block.project, sum((a * F.conv2d(y[:, :c], weight[:, :c]) for a, c in pairs), torch.zeros(())))
    return x + y if block.residual else y


def weighed(module: nn.Module) -> None:
    """Draw all parameters, so that all count: biases and shifts too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def row(options: int) -> Tensor:
    return torch.randn(options, dtype=torch.double).softmax(0)


@torch.no_grad()
def test_a_mixed_squeeze_excitation_weighs_channels_and_middle_once() -> None:
    sizes = [24, 40, 72, 96]  # middles of 8, 16, 24 and 24
    module, x, weights = EntangledSqueezeExcitation(sizes).double(), torch.randn(3, 96, 5, 5).double(), row(4)
    weighed(module)
    found = module(x, Axis(sizes)(Mixture({"expand": weights}), "expand"))
    assert (found - squeezed(module, x, weights, sizes)).abs().max() < 1e-12


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[1], STAGES[2], STAGES[4]])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_mixed_residual_weighs_hidden_channels_where_they_are_read(stage: Stage, stride: int) -> None:
    sizes, kernel, hidden = [24, 40, 64], row(2), row(3)
    block, x = EntangledResidual(8, sizes, 8, 5, stride, stage).double(), torch.randn(4, 8, 7, 7).double()
    weighed(block)
    mixture = Mixture({"kernel": kernel, "expand": hidden})
    found = block(x, KernelAxis((3, 5))(mixture, "kernel"), Axis(sizes)(mixture, "expand"))
    assert (found - residual(block, x, kernel, hidden, sizes)).abs().max() < 1e-12


@torch.no_grad()
def test_a_mixed_supernet_is_the_sum_over_the_depths_of_its_stages() -> None:
    space = MobileNetV3((3, 5), (3, 4, 6), (1, 3), width=0.1, stem="cifar", classes=3, in_channels=2)
    supernet, x = space.supernet().double(), torch.randn(4, 2, 16, 16).double()
    weighed(supernet)
    mixture = Mixture({site: row(len(options)) for site, options in space.sites.items()})
    found = supernet(x, mixture)
    x = supernet.get_submodule("first")(supernet.get_submodule("stem")(x))
    for s in range(5):
        outputs = []
        for b, block in enumerate(supernet.get_submodule(f"stage{s}").children()):
            assert isinstance(block, EntangledResidual)
            sizes = [rounded(space.shape_of(s, b)[0] * expand) for expand in space.expands]
            x = residual(block, x, mixture[f"kernel{s}_{b}"], mixture[f"expand{s}_{b}"], sizes)
            outputs.append(x)
        x = mixture[f"depth{s}"][0] * outputs[0] + mixture[f"depth{s}"][1] * outputs[2]
    expected = supernet.get_submodule("head")(supernet.get_submodule("final")(x))
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()  # through 17 norms
