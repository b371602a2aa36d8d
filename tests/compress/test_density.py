"""Densities of layers: the rules' numbers, and counts exact to the weight on every kind of network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import scores
from compress.density import RULES, densities
from compress.errors import CompressionError
from search_spaces import ResNet
from search_spaces.masks import keep_count

FAMILIES = ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v2", "efficientnet_b0", "vit_b_16")
SHAPES_ONLY = RULES[:6]
TENTHS = (0.05, 0.1, 0.2, 0.5, 0.9)


def resnet20() -> nn.Module:
    space = ResNet(depths=(3,), classes=10, in_channels=3)
    with torch.device("meta"):
        return space.build(space.at(5))  # 16, 32, 64 channels


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 4))


def torchvision_model(name: str, **settings: int) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, num_classes=10, **settings)  # type: ignore[no-any-return]


def small_model(family: str) -> nn.Module:
    """Return a small network of a torchvision family, for 32 x 32 images of 10 classes."""
    from torchvision.models import DenseNet, MobileNetV2, ShuffleNetV2, VisionTransformer
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as TorchvisionResNet
    from torchvision.models.vgg import VGG, make_layers

    match family:
        case "resnet":
            return TorchvisionResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
        case "densenet":
            return DenseNet(4, (2, 2), 8, num_classes=10)
        case "mobilenet":
            return MobileNetV2(10, 0.25)
        case "shufflenet":
            return ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 128], num_classes=10)
        case "vit":
            return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)
    with torch.device("meta"):  # its own classifier is large
        vgg = VGG(nn.Sequential(), init_weights=False)
    vgg.features = make_layers([8, "M", 16, "M"], batch_norm=True)
    vgg.avgpool, vgg.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)
    return vgg


def batch(examples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(examples, 3, 32, 32, generator=generator), torch.arange(examples) % 4


def test_erk_of_resnet20_at_5_percent() -> None:
    found = densities(resnet20(), 0.05, "erk")
    assert sum(found.sizes.values()) == 270_896
    assert sum(found.counts.values()) == 13_545
    expected = {
        "stem.0.conv": 0.4748,
        "stage0.0.conv1.conv": 0.1353,
        "stage1.0.shortcut.conv": 0.8012,
        "stage2.0.shortcut.conv": 0.3926,
        "stage2.2.conv2.conv": 0.0298,
        "head.linear": 0.9486,
    }
    assert {name: round(found[name], 4) for name in expected} == expected
    epsilon = found["stage2.2.conv2.conv"] / ((64 + 64 + 3 + 3) / (64 * 64 * 3 * 3))
    assert round(epsilon, 3) == 8.204


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_torchvision_models_are_exact(family: str) -> None:
    with torch.device("meta"):
        model = torchvision_model(family)
    for rule in SHAPES_ONLY:
        for density in TENTHS:
            check(model, density, rule)


@pytest.mark.parametrize("family", ["resnet", "vgg", "densenet", "mobilenet", "shufflenet", "vit"])
@pytest.mark.parametrize("rule", ["snip", "grasp"])
def test_counts_from_scores_are_exact(family: str, rule: str) -> None:
    check(small_model(family), 0.1, rule)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_from_scores_of_torchvision_models_are_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(4)
    big = nn.functional.interpolate(x, size=(64, 64))
    model = torchvision_model(family, **{"image_size": 64} if family == "vit_b_16" else {})
    for rule in ("snip", "grasp"):
        monkeypatch.setattr(scores, rule, once(getattr(scores, rule)))
        for density in TENTHS:
            check(model, density, rule, (big, y))


def once(score: Callable[..., scores.Scores]) -> Callable[..., scores.Scores]:
    """Compute the scores for the first density only: those of the others are the same."""
    found: list[scores.Scores] = []

    def known(*args: Any, **settings: Any) -> scores.Scores:
        if not found:
            found.append(score(*args, **settings))
        return found[0]

    return known


def check(model: nn.Module, density: float, rule: str, data: tuple[Tensor, Tensor] | None = None) -> None:
    if rule in ("snip", "grasp"):
        data = data or batch()
    found = densities(model, density, rule, batch=data)
    total = sum(found.sizes.values())
    assert sum(found.counts.values()) == round(density * total), (density, rule)
    for name, size in found.sizes.items():
        assert 1 <= found.counts[name] <= size, (density, rule, name)
        assert 0 <= found[name] <= 1, (density, rule, name)


@pytest.mark.parametrize("rule", SHAPES_ONLY)
def test_counts_follow_the_densities(rule: str) -> None:
    found = densities(resnet20(), 0.1, rule)
    assert all(abs(found.counts[name] - found[name] * size) < 1 for name, size in found.sizes.items())


def test_uniform_is_the_same_in_each_layer() -> None:
    assert set(densities(resnet20(), 0.1, "uniform").values()) == {0.1}


def test_uniform_plus_keeps_the_first_layer_and_a_fifth_of_the_last() -> None:
    sparse, dense = densities(resnet20(), 0.05, "uniform+"), densities(resnet20(), 0.3, "uniform+")
    assert (sparse["stem.0.conv"], sparse["head.linear"]) == (1, 0.2)
    assert dense["stem.0.conv"] == 1
    for found, others in ((sparse, list(sparse)[1:-1]), (dense, list(dense)[1:])):
        assert len({found[name] for name in others}) == 1, "the others, and a last layer above 0.2, share one density"
        assert sum(found[name] * size for name, size in found.sizes.items()) == pytest.approx(found.density * 270_896)
    assert densities(resnet20(), 0.05, "uniform+", last=0.5).counts["head.linear"] == 320


def test_er_ignores_the_kernel() -> None:
    found = densities(resnet20(), 0.02, "er")
    a, b = found["stage0.0.conv1.conv"], found["stage2.2.conv2.conv"]
    assert a / b == pytest.approx((32 / 256) / (128 / 4096))


def test_er_and_erk_are_the_same_for_linear_layers() -> None:
    assert dict(densities(mlp(), 0.2, "er")) == dict(densities(mlp(), 0.2, "erk"))


def test_erk_plus_keeps_the_last_layer_as_asked() -> None:
    found = densities(resnet20(), 0.05, "erk+")
    assert found["head.linear"] == 1 and found.counts["head.linear"] == 640
    rest = densities(resnet20(), (0.05 * 270_896 - 640) / (270_896 - 640), "erk", exclude=["head"])
    assert {name: found[name] for name in rest} == pytest.approx(dict(rest))
    assert densities(resnet20(), 0.05, "erk+", last=0.1).counts["head.linear"] == 64


def test_balanced_fills_small_layers_and_shares_the_rest_equally() -> None:
    found = densities(resnet20(), 0.1, "balanced")
    full = [name for name, size in found.sizes.items() if found.counts[name] == size]
    assert full == ["stem.0.conv", "stage1.0.shortcut.conv", "head.linear"]
    others = [count for name, count in found.counts.items() if name not in full]
    assert max(others) - min(others) <= 1


def test_grouped_convolutions_count_as_they_are_stored() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 3, groups=4))
    found = densities(net, 0.2, "erk")
    assert found.shapes == {"0": (8, 1, 3, 3), "1": (16, 8, 1, 1), "2": (32, 4, 3, 3)}
    assert found["0"] / found["2"] == pytest.approx((15 / 72) / (42 / 1152))
    assert found["1"] / found["2"] == pytest.approx((26 / 128) / (42 / 1152))


def test_attention_transposed_and_1d_convolutions_have_densities() -> None:
    net = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": nn.ConvTranspose2d(4, 8, 2), "c": nn.Conv1d(4, 8, 3)})
    for rule in SHAPES_ONLY:
        assert list(densities(net, 0.5, rule)) == ["a.in_proj_weight", "a.out_proj", "b", "c"]


def test_everything_is_kept_at_density_1() -> None:
    for rule in SHAPES_ONLY:
        found = densities(mlp(), 1, rule)
        assert set(found.values()) == {1.0} and found.counts == found.sizes


def test_excluded_layers_count_nowhere() -> None:
    found = densities(mlp(), 0.1, exclude=["0", "4.weight"])
    assert list(found) == ["2"] and found.counts == {"2": 150}
    # With its first and last layers excluded, uniform+ has nothing to keep.
    assert dict(densities(mlp(), 0.1, "uniform+", exclude=["0", "4"])) == {"2": 0.1}


def test_a_layer_keeps_one_weight_at_least() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 100, 3), nn.Conv2d(100, 100, 3))
    found = densities(net, 0.001, "uniform")
    assert found.counts == {"0": 1, "1": 1, "2": 90}  # 0.004, 1.8 and 90 weights
    assert sum(found.counts.values()) == keep_count(0.001, 4 + 1800 + 90_000)


def test_snip_counts_are_those_of_fresh_weights_and_depend_on_the_seed() -> None:
    model = small_model("vgg")
    found = [densities(model, 0.2, "snip", batch=batch(), seed=seed).counts for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    assert densities(model, 0.2, "snip", batch=batch()).counts == found[0]
    nn.utils.parametrizations.weight_norm(model.classifier)
    assert "classifier" not in densities(model, 0.2, "snip", batch=batch(), exclude=["classifier"])


@pytest.mark.parametrize("rule", ["snip", "grasp"])
def test_scoring_leaves_no_trace(rule: str) -> None:
    model = small_model("mobilenet").eval()
    model.features[0][0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        densities(model, 0.2, rule, batch=batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not model.features[0][0].weight.requires_grad  # type: ignore[index, union-attr]
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_a_mapping_and_prints_as_a_table() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(1000, 10))
    found = densities(net, 0.25, "uniform")
    assert found == {"0": 0.25, "2": 0.25} and len(found) == 2 and "1" not in found
    assert repr(found) == "<Densities: uniform at 0.25, 2 layers>"
    assert str(found).splitlines() == [
        "layer  shape    density   kept    size",
        "0      8x3x3x3   0.2500     54     216",
        "2      10x1000   0.2500  2,500  10,000",
        "total  uniform   0.2500  2,554  10,216",
    ]
    assert copy.deepcopy(found).counts == found.counts
    with pytest.raises(AttributeError, match="cannot assign"):
        found.density = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan, math.inf, True, "0.1", None])
def test_a_density_is_a_share(density: object) -> None:
    with pytest.raises(CompressionError, match=r"share of the weights that are kept, in \(0, 1\], got density="):
        densities(mlp(), density)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match=r"got last="):
        densities(mlp(), 0.5, "erk+", last=density if density is not None else 2.0)  # type: ignore[arg-type]


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(CompressionError, match="no distribution 'erq'; did you mean 'er' or 'erk'"):
        densities(mlp(), 0.1, "erq")


def test_last_is_for_rules_with_a_last_layer_of_their_own() -> None:
    with pytest.raises(CompressionError, match="last is for 'uniform\\+' and 'erk\\+', got last=0.5 with 'erk'"):
        densities(mlp(), 0.1, "erk", last=0.5)


@pytest.mark.parametrize("rule", [*SHAPES_ONLY, "snip", "grasp"])
def test_fewer_weights_than_layers_are_refused_with_a_density_that_works(rule: str) -> None:
    with pytest.raises(CompressionError, match=r"keeps \d of 2,620 weights, but .* layers: give a density of") as error:
        densities(mlp(), 0.0005, rule, batch=(torch.rand(4, 20), torch.arange(4)))
    least = float(str(error.value).split("at least ")[1].split(", another")[0].rstrip("."))
    assert sum(densities(mlp(), least, rule, batch=(torch.rand(4, 20), torch.arange(4))).counts.values()) < 1130


def test_a_density_that_fixed_layers_exceed_is_refused() -> None:
    with pytest.raises(
        CompressionError, match=r"density=0.3 keeps 786 of 2,620 weights, but 'uniform\+' keeps '0' at 1"
    ):
        densities(mlp(), 0.3, "uniform+")
    with pytest.raises(
        CompressionError, match=r"'erk\+' keeps '4' at 1 and one weight or more in each of 2 layers: give"
    ):
        densities(mlp(), 0.045, "erk+")
    with pytest.raises(
        CompressionError, match=r"'erk\+' keeps '4' at 0.5: give a density of at most 0.977, another last"
    ):
        densities(mlp(), 0.99, "erk+", last=0.5)
    assert densities(mlp(), 0.977, "erk+", last=0.5)["4"] == 0.5


@pytest.mark.parametrize("rule", ["snip", "grasp"])
def test_scores_need_a_batch_and_weights(rule: str) -> None:
    with pytest.raises(CompressionError, match=f"'{rule}' needs data to score the weights: give batch="):
        densities(mlp(), 0.5, rule)
    with pytest.raises(CompressionError, match="is on the meta device, where weights have no values"):
        densities(resnet20(), 0.5, rule, batch=batch())
