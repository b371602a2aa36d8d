"""Channel pruning: smaller networks that compute what the large one does without the channels that left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compress.errors import CompressionError
from compress.structured import ChannelPlan, channel_plan, prune_channels
from search_spaces import DARTS, NASBench201, ResNet
from search_spaces.base import SearchSpace
from search_spaces.channels import analyse
from search_spaces.masks import attach

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> Any:
    """Two convolutions with batch norm, one of them with groups, and a classifier."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10)),
    )
    return randomised(net)


def randomised(model: nn.Module) -> Any:
    """Give batch norms statistics of some training."""
    draw = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(generator=draw)
            norm.running_var.uniform_(0.5, 2, generator=draw)
            if norm.affine:
                norm.weight.data.uniform_(0.5, 1.5, generator=draw)
                norm.bias.data.normal_(generator=draw)
    return model.eval()


def silenced(model: nn.Module, plan: ChannelPlan, x: Tensor) -> nn.Module:
    """Return a copy whose channels that a plan gives up are zero where they are made, and behind their norms."""
    silent = copy.deepcopy(model)
    tensors = {**dict(silent.named_parameters()), **dict(silent.named_buffers())}
    for group, planned in zip(analyse(model, x).groups, plan.groups, strict=True):
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[list(planned.kept)] = False
        for slot in group.slots:
            if slot.role != "reads" and "running_var" not in slot.tensor:
                tensor = tensors[slot.tensor].data
                dead = (slot.channels >= 0) & gone[slot.channels]
                parts = tensor.chunk(len(dead) // tensor.shape[slot.axis])
                for part, own in zip(parts, dead.chunk(len(parts)), strict=True):
                    part.index_fill_(slot.axis, own.nonzero().flatten(), 0.0)
    return silent


def check_exact(model: nn.Module, x: Tensor, **settings: Any) -> ChannelPlan:
    """Prune to half and compare with the silenced network, in double precision."""
    model, x = randomised(model).double(), x.double()
    plan = channel_plan(model, 0.5, example=x, **settings)
    small: Any = plan.apply()
    with torch.no_grad():
        expected, found, before = silenced(model, plan, x)(x), small(x), model(x)
        assert small(x[:1]).shape == before[:1].shape
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-12 * scale
    assert float((before - expected).abs().max()) > 1e-6 * scale
    return plan


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def of_space(space: SearchSpace) -> nn.Module:
    return space.build(space.sample(Random(3)))


def of_torchvision(name: str, **settings: Any) -> Any:
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(num_classes=10, **settings)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "grouped": network,
    "densenet": lambda: of_torchvision("DenseNet", growth_rate=4, block_config=(2, 2), num_init_features=8),
    "mobilenet": lambda: of_torchvision("mobilenet_v2", width_mult=0.25),
    "resnet": lambda: of_space(ResNet(depths=(1,), classes=10, in_channels=3)),
    "nasbench201": lambda: of_space(NASBench201(cells=1, channels=4, classes=10, in_channels=3)),
    "darts": lambda: of_space(DARTS(cells=3, channels=4, classes=10, in_channels=3)),
}
FAMILIES = {"densenet121": 64, "efficientnet_b0": 64, "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64}
FAMILIES |= {"regnet_y_400mf": 64, "resnet18": 64, "resnext50_32x4d": 64, "squeezenet1_1": 224, "vgg11_bn": 64}
"""Names of torchvision, and a size of images."""


@pytest.mark.parametrize("name", MODELS)
def test_the_small_network_is_the_large_one_without_its_channels(name: str) -> None:
    model = MODELS[name]()
    plan = check_exact(model, X)
    whole = [group.layers[0] for group in plan.groups if len(group.kept) == group.channels]
    assert len(whole) == 1, plan  # the classifier's outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_pruned_exactly(name: str) -> None:
    model, size = of_torchvision(name), FAMILIES[name]
    plan = check_exact(model, torch.randn(2, 3, size, size))
    assert sum(len(group.kept) == group.channels for group in plan.groups) == 1, plan  # the classifier's outputs
    assert 0.24 < parameters(plan.apply()) / parameters(model) < 0.29


@pytest.mark.slow
def test_convnext_is_exact_but_for_its_norms_over_channels() -> None:
    model, x = of_torchvision("convnext_tiny"), torch.randn(2, 3, 64, 64)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)  # its layer scales start at a millionth
    normed = [group.layers[0] for group in channel_plan(model, 0.5, example=x).groups if "statistics" in group.note]
    assert normed == ["features.0.0", "features.2.1", "features.4.1", "features.6.1"]
    plan = check_exact(model, x, exclude=normed)
    assert sum(len(group.kept) < group.channels for group in plan.groups) == 18  # one in every block


@pytest.mark.slow
def test_googlenet_keeps_the_outputs_of_all_three_classifiers() -> None:
    plan = check_exact(of_torchvision("googlenet", init_weights=False), torch.randn(2, 3, 64, 64))
    whole = [group.layers for group in plan.groups if len(group.kept) == group.channels]
    assert whole == [("fc",), ("aux1.fc2",), ("aux2.fc2",)]


def test_groups_that_cannot_be_cut_stay_whole_and_say_why() -> None:
    plan = check_exact(of_torchvision("shufflenet_v2_x0_5"), X)
    notes = [group.note for group in plan.groups if len(group.kept) == group.channels]
    assert 10 < len(notes) < 20
    assert all(notes) and "chunk()" in str(plan) and "the model's output" in str(plan)


def test_transformers_lose_hidden_channels_only() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    plan = check_exact(model, X)
    cut = {group.layers[0]: len(group.kept) for group in plan.groups if len(group.kept) < group.channels}
    assert cut == {f"encoder.layers.encoder_layer_{i}.mlp.0": 16 for i in (0, 1)}


def test_norms_over_channels_get_other_statistics_and_the_plan_says_so() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    plan = channel_plan(net, 0.5, example=X)
    assert plan.groups[0].note == "a norm over them gets other statistics"
    small: Any = plan.apply()
    assert small[1].num_channels == 4 and small[1].weight.shape == (4,)
    kept = plan.groups[0].kept
    assert sorted(channel // 4 for channel in kept) == [0, 0, 1, 1]  # two of each group of the norm


def test_shapes_attributes_and_the_given_model() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    net[0].weight.grad = torch.ones_like(net[0].weight)
    small: Any = prune_channels(net, 0.5, example=X)
    assert str(small) == str(
        nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 10)),
        )
    )
    assert not small.training and type(small) is nn.Sequential
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net[0].weight.grad is not None and net[0].out_channels == 8
    assert all(p.is_leaf and p.requires_grad and p.is_contiguous() for p in small.parameters())


def test_the_small_network_lives_on() -> None:
    net = network().train()
    small: Any = prune_channels(net, 0.5, example=X)
    assert small.training
    optimizer = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9)
    targets = torch.arange(20) % 10
    inputs = torch.randn(20, 3, 32, 32) + torch.randn(10, 3, 1, 1)[targets]
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(small(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3
    again = prune_channels(net, 0.5, example=X)
    again.load_state_dict(small.state_dict())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(again.eval()(x), small.eval()(x))
    assert torch.equal(fx.symbolic_trace(small)(x), small(x))
    smaller: Any = prune_channels(small, 0.5, example=X)
    assert smaller[0].out_channels == 2 and smaller[3].out_channels == 4
    assert smaller(x).shape == (3, 10)


def test_the_layout_in_memory_stays() -> None:
    model = network().to(memory_format=torch.channels_last)
    small: Any = prune_channels(model, 0.5, example=X)
    weight = small[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_density_one_is_a_plain_copy() -> None:
    net = network()
    same = prune_channels(net, 1.0, example=X)
    assert same is not net and torch.equal(same(X), net(X))


@pytest.mark.parametrize(
    ("share", "multiple_of", "kept"),
    [
        (0.5, 1, 10),
        (0.525, 1, 11),
        (0.01, 1, 1),
        (0.99, 1, 20),
        (0.5, 8, 8),
        (0.65, 8, 16),
        (0.01, 8, 8),
        (1.0, 8, 20),
    ],
)
def test_numbers_are_rounded_to_the_nearest(share: float, multiple_of: int, kept: int) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 2, 1))
    small: Any = prune_channels(net, share, example=X, multiple_of=multiple_of)
    assert small[0].out_channels == kept


def test_the_largest_weights_stay() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight[[0, 3, 4, 7]] *= 0.1
        net[1].weight[[0, 3, 4, 7]] *= 0.1
    assert channel_plan(net, 0.5, example=X).groups[0].kept == (1, 2, 5, 6)


def test_scores_are_averages_over_tensors_in_units_of_their_mean() -> None:
    net: Any = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([30.0, -10.0, 20.0]).view(3, 1, 1, 1))
        net[2].weight.copy_(torch.tensor([0.0, -0.2, 0.1]).view(1, 3, 1, 1))

    def first(scales: list[float], density: float) -> tuple[int, ...]:
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor(scales))
        return channel_plan(net, density, example=X[:, :1]).groups[0].kept

    # Times three: 1.5, 0.5, 1 of the filters, 0, 2, 1 of what reads them, and the scales.
    assert first([1.0, 1.0, 1.0], 0.34) == (1,)
    assert first([1.0, 1.0, 1.0], 0.67) == (1, 2)
    assert first([1.0, -1.0, 4.0], 0.34) == (2,)  # 0.5, 0.5, 2
    assert first([7.0, 1.0, 1.0], 0.34) == (0,)  # 2.33, 0.33, 0.33


def test_taylor_keeps_what_the_loss_needs() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    with torch.no_grad():
        net[0].bias[:3] = -1000.0  # never active, whatever their weights
        net[0].bias[3:] = 1.0
        net[0].weight[:3] *= 10
    batch = (X, torch.tensor([1, 2]))
    before = torch.random.get_rng_state()
    assert channel_plan(net, 0.5, example=X, method="taylor", batch=batch).groups[0].kept == (3, 4, 5)
    assert channel_plan(net, 0.5, example=X).groups[0].kept == (0, 1, 2)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    double = (X.double(), batch[1])
    plan = channel_plan(net.double(), 0.5, example=double[0], method="taylor", batch=double)
    assert plan.groups[0].kept == (3, 4, 5)
    net.float()
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return outputs[:, 0].sum()

    prune_channels(net, 0.5, example=X, method="taylor", batch=((X,), "targets"), loss=loss)
    assert seen == ["targets"]


def test_random_channels_depend_on_the_seed_alone() -> None:
    net = network()
    before = torch.random.get_rng_state()
    plans = [channel_plan(net, 0.5, example=X, method="random", seed=seed) for seed in (0, 0, 1)]
    kept = [[group.kept for group in plan.groups] for plan in plans]
    assert kept[0] == kept[1] != kept[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_global_takes_the_weakest_of_all_groups() -> None:
    net: Any = nn.Sequential(*(nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 20, 1), nn.ReLU(), nn.Conv2d(20, 2, 1)))
    with torch.no_grad():
        for layer, axis in ((net[2], 0), (net[4], 1)):  # fifteen channels of the second group are weak
            layer.weight.narrow(axis, 5, 15).mul_(0.01)
    plan = channel_plan(net, 0.5, example=X, distribution="global")
    assert [len(group.kept) for group in plan.groups] == [10, 5, 2]
    few = channel_plan(net, 0.01, example=X, distribution="global")
    assert [len(group.kept) for group in few.groups] == [1, 2, 2]  # a tenth
    check_exact(network(), X, distribution="global")


def test_a_mapping_has_the_shares_of_layers() -> None:
    small: Any = prune_channels(network(), {"3": 0.34, "8": 0.25}, example=X)
    assert [small[i].out_channels for i in (0, 3)] == [8, 4]
    assert small[8].out_features == 4


def test_a_mapping_may_name_any_layer_of_a_group() -> None:
    model = MODELS["mobilenet"]()
    small: Any = prune_channels(model, {"features.2.conv.1.0": 0.25}, example=X)  # depthwise
    assert [str(layer[0])[:26] for layer in small.features[2].conv[:2]] == [
        "Conv2d(8, 12, kernel_size=",
        "Conv2d(12, 12, kernel_size",
    ]
    tied = MODELS["resnet"]()
    group = next(group for group in channel_plan(tied, 0.5, example=X).groups if len(group.layers) > 1)
    first, second = group.layers[:2]
    with pytest.raises(CompressionError, match=f"'{first}' and '{second}' have the same channels, .* 0.5 and 0.25"):
        prune_channels(tied, {first: 0.5, second: 0.25}, example=X)


def test_excluded_layers_keep_their_channels() -> None:
    model = MODELS["resnet"]()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    small: Any = prune_channels(model, 0.5, example=X, exclude=[names[1]])
    widths = [small.get_submodule(name).out_channels for name in names[:3]]
    assert widths[1] == model.get_submodule(names[1]).out_channels
    assert widths[0] < model.get_submodule(names[0]).out_channels
    module = names[1].split(".")[0]
    plan = channel_plan(model, 0.5, example=X, exclude=[module])
    assert any(group.note == "it is excluded." for group in plan.groups)


def test_code_that_asks_a_layer_for_its_size_keeps_it() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.three(self.two(self.one(x)) / self.two.out_channels)
            return out

    plan = channel_plan(Asks(), 0.5, example=X)
    assert [len(group.kept) for group in plan.groups] == [4, 8, 2]
    assert "size, the type or a buffer" in plan.groups[1].note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"density": True}, r"in \(0, 1\], got True"),
        ({"density": {"0": float("nan")}}, r"density of '0' .* got nan"),
        ({"density": {"1": 0.5}}, "density names '1', which is no layer; .*Known: 0, 10, 3, 8"),
        ({"density": {"10": 0.5}}, "'10' cannot keep 0.5 of its channels: they reach the model's output"),
        ({"density": {"0": 0.5}, "distribution": "global"}, "leave out the distribution"),
        ({"density": {"0": 0.5}, "exclude": ["0"]}, "'0' cannot keep 0.5 of its channels: it is excluded"),
        ({"distribution": "erk"}, "no distribution of channels 'erk'.*Known: global, uniform"),
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
        ({"method": "taylor"}, r"give batch=\(inputs, targets\)"),
        ({"method": "taylor", "batch": (X * float("inf"), torch.tensor([0, 1]))}, "the loss on the batch is nan"),
        ({"multiple_of": 0}, "multiple_of is a whole number"),
        ({"exclude": "0"}, r"write exclude=\['0'\]"),
        ({"exclude": ["11"]}, "exclude names '11', which holds no layer; did you mean '10'"),
        ({"exclude": ["0", "3", "8", "10"]}, "no channels of Sequential can be pruned. 0: it is excluded"),
        ({"example": torch.zeros(1, 5, 8, 8)}, "the channels of Sequential cannot be followed"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"density": 0.5, "example": X} | settings
    with pytest.raises(CompressionError, match=message):
        prune_channels(network(), given.pop("density"), **given)


def test_models_that_cannot_be_pruned_are_refused() -> None:
    with pytest.raises(CompressionError, match="0: .*it must be a multiple of 16. 3: .*it must be a multiple of 16"):
        prune_channels(network(), 0.5, example=X, multiple_of=16)
    with pytest.raises(CompressionError, match="no channels of Linear can be pruned"):
        prune_channels(nn.Linear(4, 2), 0.5, example=torch.zeros(1, 4))
    with pytest.raises(CompressionError, match="no channels of ReLU can be pruned. It has no layers"):
        prune_channels(nn.ReLU(), 0.5, example=torch.zeros(1, 4))
    with pytest.raises(CompressionError, match="Conv2d is on the meta device, where weights have no values"):
        prune_channels(nn.Conv2d(3, 8, 1, device="meta"), 0.5, example=X)
    narrow = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1))
    with pytest.raises(CompressionError, match="0: no smaller number of channels is possible: it has one."):
        prune_channels(narrow, 0.5, example=X)
    broken = network()
    broken[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"'3.weight' has weights or gradients that are not finite"):
        prune_channels(broken, 0.5, example=X)
    masked = network()
    attach(masked[3], "weight", torch.ones_like(masked[3].weight, dtype=torch.bool))
    with pytest.raises(CompressionError, match=r"'3' has a mask; .*compress.finalize\(model\)"):
        prune_channels(masked, 0.5, example=X)


def test_a_node_of_zeros_leaves_its_channels_prunable() -> None:
    space = NASBench201(channels=8, cells=1, classes=10, in_channels=1)
    arch = space.parse("|skip_connect~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|nor_conv_3x3~2|")
    plan = channel_plan(space.build(arch), 0.5, example=torch.zeros(2, 1, 8, 8))
    assert [group.layers[0] for group in plan.groups if len(group.kept) != group.channels // 2] == ["head.linear"]
