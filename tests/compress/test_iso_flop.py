"""Sparse-IFT: larger layers with masks, and as many multiply-adds as before."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.dynamic import DynamicSparsity
from compress.errors import CompressionError
from compress.iso_flop import KINDS, sparse_ift
from compress.larger_layers import Doped, Parallel, rank_of
from compress.layer_macs import compare_macs, macs
from compress.pruning import finalize, masks
from compress.weights import weights
from search_spaces import DARTS, DenseNet, MobileNetV3, NASBench201, ResNet
from search_spaces.base import Arch, SearchSpace

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ONE = X[:1]


def resnet() -> Any:
    """Three stages of one or two blocks, with two shortcuts."""
    space = ResNet(depths=(1, 2), widths=(8, 16, 32), classes=10, in_channels=3)
    return space.build(Arch({"depth0": 1, "depth1": 1, "depth2": 2, "width0": 8, "width1": 16, "width2": 32}))


def plain(norm: bool = True) -> nn.Sequential:
    """A stem, a strided convolution, a classifier of two layers."""
    norms = [nn.BatchNorm2d(16)] if norm else []
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), *norms, nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_stay_and_density_is_uniform(kind: str, sparsity: float) -> None:
    model = resnet()
    new = sparse_ift(model, kind, sparsity, example=ONE)
    assert compare_macs(model, new, ONE).ratio == pytest.approx(1, abs=1e-3)
    assert new(X).shape == (2, 10)
    found = {name: mask for name, mask in masks(new).items() if mask.numel() > 200}
    shares = [float(mask.float().mean()) for mask in found.values()]
    assert max(shares) - min(shares) <= 2 / min(mask.numel() for mask in found.values())
    if kind != "doped" or sparsity < 0.9:  # ranks of so few channels are far from whole numbers
        assert shares[0] == pytest.approx(1 - sparsity, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_of_the_cifar_resnet18_stay(kind: str, sparsity: float) -> None:
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    image = torch.zeros(1, 3, 32, 32)
    assert macs(model, image).dense == 555_422_720
    new = sparse_ift(model, kind, sparsity, example=image)
    assert compare_macs(model, new, image).ratio == pytest.approx(1, abs=1e-5)
    density = {  # solved for; near, and not exactly, what the sparsity says
        "wide": {0.5: 0.4978, 0.75: 0.2492, 0.9: 0.0994},
        "parallel": {0.5: 0.5028, 0.75: 0.2521, 0.9: 0.1010},
        "factorized": {0.5: 0.4986, 0.75: 0.2497, 0.9: 0.0999},
        "doped": {0.5: 0.5055, 0.75: 0.2529, 0.9: 0.1060},
    }
    found = masks(new).values()
    kept = sum(int(mask.sum()) for mask in found) / sum(mask.numel() for mask in found)
    assert kept == pytest.approx(density[kind][sparsity], abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    new = sparse_ift(resnet(), kind, 0.75, example=ONE).train()
    F.cross_entropy(new(X), torch.tensor([0, 1])).backward()
    assert [name for name, p in new.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_stem_classifier_and_norms_have_no_mask(kind: str) -> None:
    model = resnet()
    found = masks(sparse_ift(model, kind, 0.75, example=ONE))
    ends = ("stem.0.conv", "head.linear")
    assert found
    assert [name for name in found if name.startswith(ends)] == []
    names = {name for name in weights(model) if name not in ends}
    shortcuts = {"stage1.0.shortcut.conv", "stage2.0.shortcut.conv"}
    wanted = names if kind in ("wide", "parallel") else names - shortcuts
    assert {next(own for own in names if f"{name}.".startswith(f"{own}.")) for name in found} == wanted
    assert not any("low_rank" in name for name in found)


def test_wide_multiplies_every_channel_but_those_of_images_and_classes() -> None:
    new = sparse_ift(resnet(), "wide", 0.75, example=ONE)
    assert new.stem[0].conv.weight.shape == (16, 3, 3, 3)
    assert new.stage1[0].conv1.conv.weight.shape == (32, 16, 3, 3)
    assert (new.stage1[0].conv1.conv.in_channels, new.stage1[0].conv1.conv.out_channels) == (16, 32)
    assert new.stage2[0].shortcut.norm.weight.shape == (64,)
    assert new.head.linear.weight.shape == (10, 64)
    assert sparse_ift(resnet(), "wide", 0.9, example=ONE).head.linear.in_features == round(32 * math.sqrt(10))


def test_wide_starts_anew() -> None:
    model = resnet()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(7.0)
        model(X)  # statistics
    new = sparse_ift(model, "wide", 0.5, example=ONE)
    assert not any((tensor == 7).any() for tensor in new.parameters())
    assert all((norm.running_mean == 0).all() for norm in new.modules() if isinstance(norm, nn.BatchNorm2d))


def test_parallel_has_branches_with_norms_of_their_own() -> None:
    new = sparse_ift(plain(), "parallel", 0.75)
    branches = new[2]
    assert isinstance(branches, Parallel) and len(branches.branches) == 4
    convs = [branch.layer for branch in branches.branches]
    assert all(conv.stride == (2, 2) and conv.bias is not None for conv in convs)
    assert len({id(branch.norm) for branch in branches.branches}) == 4
    assert isinstance(new[3], nn.Identity)
    x = torch.randn(2, 8, 16, 16)
    assert torch.allclose(branches(x), sum(branch(x) for branch in branches.branches), atol=1e-5)
    assert not torch.equal(convs[0].weight, convs[1].weight)
    linears = new[7].branches  # no norm behind: one bias
    assert [linear.bias is None for linear in linears] == [False, True, True, True]


def test_parallel_leaves_shortcuts_alone_but_for_a_mask() -> None:
    new = sparse_ift(resnet(), "parallel", 0.5, example=ONE)
    shortcut = new.stage1[0].shortcut
    assert isinstance(shortcut.conv, nn.Conv2d) and isinstance(shortcut.norm, nn.BatchNorm2d)
    assert "stage1.0.shortcut.conv" in masks(new)


class Forked(nn.Module):
    """Reads a convolution both before and after its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        out: Tensor = self.head((y + F.relu(self.norm(y))).mean((2, 3)))
        return out


def test_a_norm_stays_where_something_else_reads_the_convolution() -> None:
    new = sparse_ift(Forked(), "parallel", 0.5, example=ONE)
    assert isinstance(new.norm, nn.BatchNorm2d)
    assert all(isinstance(branch, nn.Conv2d) for branch in new.get_submodule("conv.branches"))
    assert isinstance(sparse_ift(plain(norm=False), "parallel", 0.5)[2].branches[0], nn.Conv2d)


@pytest.mark.parametrize("norm", [True, False])
def test_factorized_has_the_stride_first_and_the_published_rank(norm: bool) -> None:
    new = sparse_ift(plain(norm), "factorized", 0.75)
    parts = dict(new[2].named_children())
    rank = math.ceil(9 * 8 * 16 / (0.25 * (9 * 8 + 16)))
    assert list(parts) == ["first", *["norm"] * norm, "relu", "second"]
    assert parts["first"].weight.shape == (rank, 8, 3, 3)
    assert (parts["first"].stride, parts["first"].padding, parts["first"].bias) == ((2, 2), (1, 1), None)
    assert parts["second"].weight.shape == (16, rank, 1, 1)
    assert (parts["second"].stride, parts["second"].bias.shape) == ((1, 1), (16,))
    assert isinstance(new[3], nn.BatchNorm2d) == norm
    assert rank_of(torch.zeros(64, 64, 3, 3), 1 / (1 - 0.9)) == 576, "and no more, for what 1 - 0.9 is to a machine"
    assert new[6 + norm].first.weight.shape == (math.ceil(64 * 32 / (96 * 0.25)), 64)


def test_doped_has_a_dense_product_beside_the_layer() -> None:
    new = sparse_ift(plain(), "doped", 0.75)
    part, rank = new[2], math.floor(0.75 * 9 * 8 * 16 / (9 * 8 + 16))
    assert isinstance(part, Doped) and isinstance(part.low_rank, nn.Sequential)
    assert [tuple(layer.weight.shape) for layer in part.low_rank] == [(rank, 8, 3, 3), (16, rank, 1, 1)]
    assert [layer.stride for layer in part.low_rank] == [(2, 2), (1, 1)]
    assert sorted(masks(new)) == ["2.sparse", "7.sparse"]
    x = torch.randn(1, 8, 16, 16)
    assert torch.allclose(part(x), part.sparse(x) + part.low_rank(x))
    assert isinstance(new[3], nn.BatchNorm2d)


@pytest.mark.parametrize("kind", KINDS)
def test_sparsity_0_is_a_copy(kind: str) -> None:
    model = resnet()
    new = sparse_ift(model, kind, 0.0)
    assert new is not model and same(state(model), state(new)) and repr(new) == repr(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_torchs_random_numbers_stay_and_the_seed_decides(kind: str) -> None:
    model = resnet().train()
    before, random = state(model), torch.get_rng_state()
    one, again = (sparse_ift(model, kind, 0.75, example=ONE, seed=3) for _ in range(2))
    other = sparse_ift(model, kind, 0.75, example=ONE, seed=4)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), random)
    assert model.training and all(module.training for module in one.modules())
    assert not any(module.training for module in sparse_ift(model.eval(), kind, 0.75, example=ONE).modules())
    assert same(state(one), state(again))
    assert all(not torch.equal(mask, masks(other)[name]) for name, mask in masks(one).items() if mask.numel() > 200)


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_layers_get_no_mask(kind: str) -> None:
    model = resnet()
    new = sparse_ift(model, kind, 0.5, example=ONE, exclude=["stage2.1"])
    assert not any(name.startswith("stage2.1") for name in masks(new))
    assert compare_macs(model, new, ONE).ratio == pytest.approx(1, abs=1e-3)
    assert (new.stage2[1].conv1.conv.weight.shape == model.stage2[1].conv1.conv.weight.shape) == (kind != "wide")


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        ("wide", NASBench201(channels=8, cells=1, classes=10, in_channels=3)),
        ("factorized", NASBench201(channels=8, cells=1, classes=10, in_channels=3)),
        ("wide", DARTS(cells=3, channels=8, classes=10, in_channels=3)),
        ("parallel", DARTS(cells=3, channels=8, classes=10, in_channels=3)),
        ("wide", DenseNet(classes=10, in_channels=3)),
        ("wide", MobileNetV3(classes=10, in_channels=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_networks_of_all_kinds_keep_their_multiply_adds(kind: str, space: SearchSpace) -> None:
    model = space.build(space.at(space.size // 2 if space.size > 10_000 else 0))
    new = sparse_ift(model, kind, 0.5, example=ONE)
    assert compare_macs(model, new, ONE).ratio == pytest.approx(1, abs=1e-3)
    for name, weight in weights(new).items():
        depthwise = isinstance(weight.module, nn.Conv2d) and 1 < weight.module.groups == weight.module.in_channels
        assert not (depthwise and weight.mask is not None), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "convnext_tiny"])
def test_networks_of_torchvision_keep_their_multiply_adds(name: str, kind: str) -> None:
    from torchvision import models

    model, image = getattr(models, name)(weights=None), torch.zeros(1, 3, 64, 64)
    new = sparse_ift(model, kind, 0.75, example=image)
    assert compare_macs(model, new, image).ratio == pytest.approx(1, abs=1e-4)


def test_without_an_example_an_input_is_assumed() -> None:
    model = resnet()
    new = sparse_ift(model, kind="wide", sparsity=0.75)
    assert compare_macs(model, new).ratio == pytest.approx(1, abs=1e-4)
    assert compare_macs(model, new).after.input == "1 x 3 x 32 x 32"
    vector = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert sorted(masks(sparse_ift(vector, "wide", 0.75))) == ["0", "2"]
    with pytest.raises(CompressionError, match="Give example=x"):
        sparse_ift(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 9)))


def test_masked_layers_can_start_with_their_density_in_mind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))
    new = sparse_ift(model, "wide", 0.75, example=ONE, fan_in_by_density=True)
    weight, mask = new[2].weight, masks(new)["2"]
    fan_in = 9 * 64 * float(mask.float().mean())
    assert float(weight[mask].detach().std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
    assert not weight[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_can_move_and_be_made_final(kind: str) -> None:
    model = resnet()
    new = sparse_ift(model, kind, 0.75, example=ONE)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9)
    before = masks(new)
    before = {name: mask.clone() for name, mask in before.items()}
    sparsity = DynamicSparsity(new, optimizer, method="rigl", steps=8, interval=2)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(new(X), torch.tensor([0, 1])).backward()
        optimizer.step()
    after = masks(new)
    assert any(not torch.equal(mask, after[name]) for name, mask in before.items())
    assert compare_macs(model, new, ONE).ratio == pytest.approx(1, abs=1e-3)
    sparsity.remove()
    final = finalize(new.eval())
    assert not masks(final) and torch.equal(final(X), new(X))
    assert compare_macs(model, final, ONE).after.sparse <= compare_macs(model, new, ONE).after.sparse


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_comes_back(kind: str) -> None:
    model = resnet()
    one, other = (sparse_ift(model, kind, 0.75, example=ONE, seed=seed).eval() for seed in (0, 1))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(X), other(X))
    assert torch.equal(copy.deepcopy(one)(X), one(X))


def test_bad_settings_are_refused() -> None:
    model = resnet()
    before = state(model)
    for sparsity in (1, 1.0, -0.1, math.nan, True, "0.5"):
        with pytest.raises(CompressionError, match="the sparsity is a number from 0 up to, but not, 1, got"):
            sparse_ift(model, "wide", sparsity, example=ONE)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="no kind 'Wide' of Sparse-IFT.*wide"):
        sparse_ift(model, "Wide", 0.5, example=ONE)
    with pytest.raises(CompressionError, match=r"exclude names 'stage9'.*stage"):
        sparse_ift(model, "wide", 0.5, example=ONE, exclude=["stage9"])
    with pytest.raises(CompressionError, match="a sparsity of 0.2 makes 1 branch; two need 1/3 or more"):
        sparse_ift(model, "parallel", 0.2, example=ONE)
    with pytest.raises(CompressionError, match="stops on the example of shape 1 x 4 x 16 x 16"):
        sparse_ift(model, "wide", 0.5, example=torch.zeros(1, 4, 16, 16))
    with pytest.raises(CompressionError, match=r"would take [0-9,.]+ GB, and [0-9,.]+ GB are free"):
        sparse_ift(model, "wide", 1 - 1e-12, example=ONE)
    assert same(state(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_models_are_refused(kind: str) -> None:
    with pytest.raises(CompressionError, match="'stage0.0.conv1.conv' is masked already"):
        sparse_ift(sparse_ift(resnet(), "wide", 0.5, example=ONE), kind, 0.5, example=ONE)
    with pytest.raises(CompressionError, match="Sequential has no layer to make larger"):
        sparse_ift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 2)), kind, 0.5, example=ONE)
    with pytest.raises(CompressionError, match="has no convolution, linear layer or attention"):
        sparse_ift(nn.ReLU(), kind, 0.5, example=ONE)

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x if x.sum() > 0 else -x)
            return out

    with pytest.raises(CompressionError, match="Untraceable cannot be made larger: .*tracing stopped"):
        sparse_ift(Untraceable(), kind, 0.5, example=ONE)


def test_what_stays_dense_may_leave_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 1, 1), nn.ReLU(), nn.Conv2d(1, 64, 3))
    with pytest.raises(CompressionError, match=r"what stays dense takes [0-9,]+ multiply-adds .* has [0-9,]+ in all"):
        sparse_ift(net, "wide", 0.9, example=ONE)


def test_a_layer_whose_size_the_code_asks_for_stays() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.two(self.one(self.stem(x))) / self.two.out_channels)
            return out

    new: Any = sparse_ift(Asks(), "wide", 0.75, example=ONE)
    assert [own.out_channels for own in (new.stem, new.one, new.two, new.head)] == [16, 16, 8, 2]
    assert compare_macs(Asks(), new, ONE).ratio == pytest.approx(1, abs=1e-2)


def test_frozen_layers_stay() -> None:
    with pytest.raises(CompressionError, match="no layer to make larger: all are .* frozen"):
        sparse_ift(plain().requires_grad_(False), "wide", 0.5)
    for kind in KINDS:
        model = plain()
        model[7].requires_grad_(False)
        new = sparse_ift(model, kind, 0.5)
        assert torch.equal(new[7].weight, model[7].weight) and "7" not in masks(new)
