from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.channels import analyse
from search_spaces.net2net import (
    GrowthError,
    add_branch,
    carry_momentum,
    deepen,
    explain,
    grow_kernel,
    widen,
)

X = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def plain_cnn() -> nn.Module:
    """Two blocks of convolutions and two linear layers."""
    return lively(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 5, padding=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU6(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(256, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10)),
        )
    )


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def dense_net() -> nn.Module:
    """Two dense blocks with a transition."""
    return lively(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), DenseLayer(8, 4), DenseLayer(12, 4), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 10, 1), nn.AvgPool2d(2), DenseLayer(10, 6), DenseLayer(16, 6), nn.BatchNorm2d(22)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(22, 10)),
        )
    )


def lively(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights as training would: with the first ones mistakes go unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.3, generator=generator)
    return model.double().eval()


def same(model: nn.Module, grown: nn.Module, x: Tensor = X, tolerance: float = 1e-10) -> bool:
    with torch.no_grad():
        before, after = model.eval()(x), grown.eval()(x)
    return before.shape == after.shape and float((before - after).abs().max()) <= tolerance


def layers(model: nn.Module, x: Tensor = X) -> list[str]:
    return list(analyse(model, x).layers)


# Every layer, one action ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain_cnn, dense_net])
def test_every_layer_but_the_last_is_widened_exactly_in_both_modes(make) -> None:
    model = make()
    for name in layers(model)[:-1]:
        outputs = analyse(model, X).layer(name).outputs
        wide, certificate = widen(model, name, outputs + 5, example=X, certificate=True)
        assert same(model, wide)
        assert certificate.given <= 1e-12 and certificate.random <= 1e-12
        for module in (*model.modules(), *wide.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # other numbers would be drawn
        assert same(model, wide)
        with torch.no_grad():
            assert (copy.deepcopy(model).train()(X) - copy.deepcopy(wide).train()(X)).abs().max() <= 1e-10
        assert type(wide) is type(model)
        assert model.state_dict().keys() == wide.state_dict().keys()
        assert analyse(wide, X).layer(name).outputs == outputs + 5
    with pytest.raises(GrowthError, match="reach the model's output"):
        widen(model, layers(model)[-1], 20, example=X)


@pytest.mark.parametrize("make", [plain_cnn, dense_net])
def test_every_layer_is_deepened_exactly(make) -> None:
    model = make()
    for name in layers(model):
        deep, certificate = deepen(model, name, example=X, certificate=True)
        assert same(model, deep)
        assert certificate.given <= 1e-10 and certificate.random <= 1e-10
        assert len(layers(deep)) == len(layers(model)) + 1


def test_nine_actions_in_a_chain_stay_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for make in (plain_cnn, dense_net):
        model = grown = make()
        for i in range(9):
            name = layers(grown)[int(torch.randint(len(layers(grown)) - 1, (), generator=generator))]
            if i % 2:
                grown = deepen(grown, name, example=X, generator=generator)
            else:
                outputs = analyse(grown, X).layer(name).outputs
                grown = widen(grown, name, outputs + 3, example=X, generator=generator)
        assert same(model, grown)
        assert same(model.float(), grown.float(), X.float(), 1e-4 * float(model(X.float()).detach().abs().max()))


def test_new_layers_are_widened_and_deepened_themselves() -> None:
    model = plain_cnn()
    for name in ("0", "15"):  # ends in a ReLU; does not
        grown, certificate = deepen(model, name, example=X, certificate=True)
        new = next(layer for layer in layers(grown) if layer not in layers(model) and layer != f"{name}.0")
        assert new in certificate.transfer.changed or any(new.startswith(c) for c in certificate.transfer.changed)
        grown = deepen(grown, new, example=X)
        grown = deepen(grown, new, example=X)
        if name == "0":
            grown = widen(grown, new, 11, example=X)
        assert same(model, grown)


# Net2Wider -----------------------------------------------------------------------------------------------------------


def test_the_successor_is_divided_and_shares_sum_to_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 3, 8, 8)
    wide, certificate = widen(model, "0", 9, example=x, certificate=True)
    index = certificate.transfer.maps["0.weight"].axes[0].index
    assert index[:4].tolist() == [0, 1, 2, 3]  # old ones first
    assert torch.equal(wide[0].weight, model[0].weight[index])  # not divided
    assert torch.equal(wide[0].bias, model[0].bias[index])
    shares = 1 / index.bincount()[index]
    assert torch.allclose(torch.zeros(4).index_add(0, index, shares), torch.ones(4))
    assert torch.allclose(wide[2].weight, model[2].weight[:, index] * shares.view(-1, 1, 1))
    assert torch.equal(wide[2].bias, model[2].bias)


def test_running_statistics_go_with_their_channels() -> None:
    model = plain_cnn()
    wide, certificate = widen(model, "0", 13, example=X, certificate=True)
    index = certificate.transfer.maps["0.weight"].axes[0].index
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(wide[1], name), getattr(model[1], name)[index])
    assert (wide[0].out_channels, wide[1].num_features, wide[3].in_channels) == (13, 13, 13)


def test_flattened_channels_take_their_places_with_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 1))
    wide, certificate = widen(model, "0", 3, example=torch.zeros(1, 3, 2, 2), certificate=True)
    copied = int(certificate.transfer.maps["0.weight"].axes[0].index[2])
    index = certificate.transfer.maps["2.weight"].axes[0].index
    assert index.tolist() == [*range(8), *range(4 * copied, 4 * copied + 4)]
    assert wide[2].in_features == 12


def test_draws_come_from_the_generator_and_noise_is_on_new_filters_only() -> None:
    model = plain_cnn()
    before = torch.get_rng_state()
    noisy, again = (
        widen(model, "0", 12, example=X, noise=0.01, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(noisy.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    exact, certificate = widen(model, "0", 12, example=X, generator=torch.Generator().manual_seed(3), certificate=True)
    index = certificate.transfer.maps["0.weight"].axes[0].index
    assert torch.equal(noisy[0].weight[:8], model[0].weight)
    noise = noisy[0].weight[8:] - model[0].weight[index[8:]]
    assert 0.005 < noise.std() / model[0].weight.std() < 0.015
    for (name, a), (_, b) in zip(noisy.named_parameters(), exact.named_parameters(), strict=True):
        assert name == "0.weight" or torch.equal(a, b)
    assert not same(model, noisy) and same(model, noisy, tolerance=0.1)


def test_noise_is_a_deviation() -> None:
    for noise in (-0.1, float("nan"), float("inf")):
        with pytest.raises(GrowthError, match="is no standard deviation"):
            widen(plain_cnn(), "0", 9, example=X, noise=noise)
        with pytest.raises(GrowthError, match="is no standard deviation"):
            deepen(plain_cnn(), "0", example=X, noise=noise)


def test_copies_are_random_but_the_old_ones_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2))
    _, certificate = widen(model, "0", 100, example=torch.zeros(1, 4), certificate=True)
    index = certificate.transfer.maps["0.weight"].axes[0].index
    assert index[:50].tolist() == list(range(50))
    assert len(index[50:].unique()) < 45  # with replacement


# Net2Deeper ----------------------------------------------------------------------------------------------------------


def test_deepening_has_measured_statistics_and_hardly_moves_the_network_in_training() -> None:
    model = plain_cnn()
    for module in model.modules():  # statistics of the data, as training leaves them
        module.momentum = 1.0 if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
    model.train()(X)
    model.eval()
    for name, place in (("0", "2"), ("3", "5")):
        deep, certificate = deepen(model, name, example=X, certificate=True)
        norm = deep.get_submodule(f"{place}.2")
        with torch.no_grad():
            read = copy.deepcopy(model).train()[: int(place) + 1](X)
            assert torch.allclose(norm.running_mean, read.mean((0, 2, 3)))
            assert torch.allclose(norm.running_var, read.var((0, 2, 3), correction=0))
            a, b = (copy.deepcopy(net).train() for net in (model, deep))
            a[14].p = b[14].p = 0.0
            before, after = a(X), b(X)
        assert certificate.given <= 1e-10
        assert (before - after).abs().max() < 0.05 * before.abs().max()
        assert torch.equal(before.argmax(1), after.argmax(1))
        # With the statistics that batch norm starts with it would be exact in evaluation, and wrong in training.
        default = copy.deepcopy(deep)
        wrong = default.get_submodule(f"{place}.2")
        wrong.reset_parameters()
        nn.init.constant_(wrong.running_var, 1 - wrong.eps)
        assert same(model, default, tolerance=1e-6)
        default.train()[14].p = 0.0
        assert (before - default(X)).abs().max() > 4 * (before - after).abs().max()


def test_the_kernel_is_an_identity_of_the_asked_size() -> None:
    model = plain_cnn()
    for kernel, size in ((None, (3, 3)), (5, (5, 5)), ((1, 3), (1, 3))):
        deep = deepen(model, "0", kernel=kernel, example=X)
        assert deep.get_submodule("2.1").kernel_size == size
        assert same(model, deep)
    noisy = deepen(model, "0", example=X, noise=0.001)
    assert not same(model, noisy) and same(model, noisy, tolerance=0.1)
    for kernel in (2, (3, 3, 3), 0, (3, 2.0)):
        with pytest.raises(GrowthError, match="no odd size"):
            deepen(model, "0", kernel=kernel, example=X)
    with pytest.raises(GrowthError, match="linear layer, which has no kernel"):
        deepen(model, "11", kernel=3, example=X)


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.LeakyReLU(), nn.Hardshrink(), None]
)
def test_other_activations_get_a_branch_that_starts_at_zero(activation) -> None:
    parts = [activation] if activation else []
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), *parts, nn.Flatten(), nn.Linear(1176, 4)))
    deep, certificate = deepen(model, "0", example=X, certificate=True)
    assert (certificate.given, certificate.random, certificate.training) == (0, 0, 0)
    assert "residual branch" in str(certificate)
    assert "residual branch" in explain(model, X)["0"].deepen.note
    deep(X).sum().backward()
    gamma = next(parameter for name, parameter in deep.named_parameters() if name.endswith("gamma"))
    assert gamma.grad is not None and gamma.grad.abs().max() > 0  # it can grow
    with torch.no_grad():
        gamma.uniform_(0.5, 1)
    assert not same(model, deep)
    assert same(deep, widen(deep, next(n for n in layers(deep) if n not in layers(model)), 9, example=X))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(0, 2)])
def test_activations_that_change_nothing_twice_get_an_identity(activation) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), activation, nn.Flatten(), nn.Linear(1176, 4)).double()
    deep, certificate = deepen(model, "0", example=X, certificate=True)
    assert "by an identity" in certificate.transfer.action and certificate.given == 0
    assert {*model.state_dict()} < {*deep.state_dict()}  # names stay where the activation is called once


class Shared(nn.Module):
    """A block with one ReLU for two places, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(x)))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))


def test_shared_and_functional_activations_stay_and_the_module_before_them_grows() -> None:
    model = lively(Shared())
    for name, place in (("conv1", "bn1"), ("conv3", "conv3")):
        deep, certificate = deepen(model, name, example=X, certificate=True)
        assert type(deep) is Shared and same(model, deep)
        assert [type(part).__name__ for part in deep.get_submodule(place)][1:3] == ["ReLU", "Conv2d"]
        assert certificate.transfer.renamed == {f"{place}.0": place}
    assert "by an identity" in deepen(model, "conv1", example=X, certificate=True)[1].transfer.action
    assert "residual" in deepen(model, "conv2", example=X, certificate=True)[1].transfer.action


# Kernels and branches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        ({}, 5),
        ({}, (3, 7)),
        ({"stride": 2, "padding": 1}, 7),
        ({"dilation": 2, "padding": 3}, 5),
        ({"groups": 3, "padding": (0, 2)}, 5),
        ({"padding": "same"}, 7),
        ({"padding": "same", "dilation": 2}, 5),
        ({"padding": "valid"}, 5),
        ({"padding": 1, "padding_mode": "reflect"}, 5),
        ({"padding": 1, "padding_mode": "replicate", "dilation": 2}, 5),
        ({"padding": 2, "padding_mode": "circular"}, 7),
        ({"padding": "same", "padding_mode": "circular"}, 5),
    ],
    ids=str,
)
def test_kernels_grow_exactly(settings, kernel) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **settings), nn.ReLU()).double()
    grown, certificate = grow_kernel(model, "0", kernel, example=X, certificate=True)
    assert same(model, grown, tolerance=1e-12)
    assert certificate.random <= 1e-12
    assert tuple(grown[0].weight.shape[2:]) == grown[0].kernel_size
    assert type(grown[0]) is nn.Conv2d and repr(grown[0])


def test_kernels_that_cannot_grow_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2)).double()
    model(X)
    for kernel in (3, 1, 4, (5, 4), (3, 3), 5.0, (5,)):
        with pytest.raises(GrowthError, match="'0' cannot have a kernel of"):
            grow_kernel(model, "0", kernel, example=X)
    for name in ("1", "3"):
        with pytest.raises(GrowthError, match="only convolutions grow"):
            grow_kernel(model, name, 5, example=X)
    reflecting = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(GrowthError, match="Padding"):  # an image of 3 pixels cannot be reflected by 3
        grow_kernel(reflecting, "0", 7, example=torch.zeros(1, 3, 3, 3))


@pytest.mark.parametrize("kind", ["residual", "copies"])
def test_branches_start_as_the_layer_and_can_be_grown(kind) -> None:
    model = plain_cnn()
    for name in ("0", "11"):
        grown, certificate = add_branch(model, name, kind, copies=3, example=X, certificate=True)
        assert same(model, grown) and certificate.training is not None
        inside = [layer for layer in layers(grown) if layer.startswith(f"{name}.")]
        assert len(inside) == (2 if kind == "residual" else 3)
        grown = widen(grown, inside[-1], 30, example=X)
        assert all(analyse(grown, X).layer(layer).outputs == 30 for layer in inside)  # they are added: tied
        assert same(model, grown)
        assert same(model, deepen(grown, inside[0], example=X))
    with pytest.raises(GrowthError, match="kind='mean'"):
        add_branch(model, "0", "mean", example=X)
    with pytest.raises(GrowthError, match="copies=1"):
        add_branch(model, "0", "copies", copies=1, example=X)
    noisy = add_branch(model, "0", "copies", example=X, noise=0.01)
    assert not same(model, noisy) and same(model, noisy, tolerance=0.1)


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(match: str, model: nn.Module, *actions, x: Tensor = X) -> None:
    """Check that actions are refused, and leave the model as it is."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes, modes = {*vars(model)}, [module.training for module in model.modules()]
    for action in actions:
        with pytest.raises(GrowthError, match=match):
            action(model, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {*vars(model)} == attributes and [module.training for module in model.modules()] == modes


def widening(name: str, channels: int):
    return lambda model, x: widen(model, name, channels, example=x)


def deepening(name: str):
    return lambda model, x: deepen(model, name, example=x)


@pytest.mark.parametrize("channels", [8, 7, 0, -1, 9.0, True, "9"])
def test_only_more_channels_are_wider(channels) -> None:
    refused(
        "'0' cannot be widened to .* channels: it has 8; give a larger whole number",
        plain_cnn(),
        widening("0", channels),
    )


def test_widening_past_memory_is_refused_before_anything_is_made() -> None:
    refused(
        r"would take [\d,.]+ GB, and [\d.,]+ GB are free", plain_cnn(), widening("0", 10**11), widening("11", 10**14)
    )


def test_names_that_do_not_exist_get_the_nearest() -> None:
    model = lively(Shared())
    refused("there is no layer 'cnv1'; did you mean 'conv1'", model, widening("cnv1", 9), deepening("cnv1"))
    refused("'bn1' is a BatchNorm2d, no convolution or linear layer", model, widening("bn1", 9), deepening("bn1"))
    refused("there is no layer ''", model, widening("", 9))
    model.unused = nn.Linear(2, 2)
    refused("'unused' is not called", model, widening("unused", 9), deepening("unused"))


def test_models_that_cannot_be_traced_say_where_and_what_can() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.mean() > 0 else x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.router = Router()

        def forward(self, x: Tensor) -> Tensor:
            return self.router(self.stem(x))

    model = Net().double()
    refused(
        r"tracing stopped in 'router' of class Router \(test_net2net.py, line \d+\), in evaluation mode: TraceError: "
        r"(.|\n)*give a submodule (.|\n)*These children can be traced: stem",
        model,
        widening("stem.0", 9),
        deepening("stem.0"),
        lambda model, x: explain(model, x),
    )
    before = model.eval()(X)
    model.stem = widen(model.stem, "0", 9, example=X)
    assert torch.allclose(model(X), before)


def test_frozen_shared_and_computed_parameters_are_refused() -> None:
    model = plain_cnn()
    model[0].weight.requires_grad = False
    refused(
        "'0.weight' is frozen", model, widening("0", 9), deepening("0"), lambda m, x: grow_kernel(m, "0", 5, example=x)
    )
    assert same(model, widen(model, "3", 16, example=X))  # the others are free
    model = plain_cnn()
    model[3].weight.requires_grad = False  # reads the channels
    refused("'3.weight' is frozen", model, widening("0", 9))

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    x = torch.zeros(2, 4)
    refused("is shared with another layer", model, widening("0", 9), widening("2", 9), deepening("0"), x=x)
    twice = nn.Linear(4, 4)
    model = nn.Sequential(twice, nn.ReLU(), twice, nn.ReLU(), nn.Linear(4, 2))
    refused("called more than once|shared", model, widening("0", 9), deepening("0"), x=x)

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[2])
    refused("'2' is parametrized", model, widening("0", 9), x=x)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda *_: None)
    refused("'0' has hooks", model, widening("0", 9), deepening("0"), lambda model, x: explain(model, x), x=x)


def test_what_is_read_elsewhere_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.encode(x).relu(), self.encode.weight.t())

    class Nosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) * self.first.in_features

    x = torch.ones(2, 6)
    refused("whose weight is computed", Tied(), widening("encode", 9), x=x)
    refused("in_features", Nosy(), deepening("first"), x=x)
    model = Nosy()
    assert same(model, widen(model, "first", 9, example=x), x, 1e-5)


def test_bad_examples_are_refused() -> None:
    model = plain_cnn()
    refused("stops on the example of shape .16, 3, 5, 5.", model, widening("0", 9), x=X[..., :5, :5])
    refused("stops on the example", model, widening("0", 9), x=X[:, :2])
    refused("example is an input", model, lambda m, _: widen(m, "0", 9, example="x"))


def test_neither_the_model_nor_random_numbers_are_touched() -> None:
    model = plain_cnn().train()
    state = copy.deepcopy(model.state_dict())
    before = torch.get_rng_state()
    explain(model, X)
    deepen(model, "0", example=X)
    widen(model, "0", 16, example=X, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    deep = deepen(model, "0", example=X)
    assert all(module.training for module in deep.modules())
    assert not any(module.training for module in deepen(model.eval(), "0", example=X).modules())


# Explanations, certificates, optimizers ------------------------------------------------------------------------------


def test_explanations_say_what_can_be_done_and_why_not() -> None:
    model = dense_net()
    table = explain(model, X)
    assert [row.name for row in table.rows] == layers(model)
    head, stem = table["13"], table["0"]
    assert stem.widen and stem.deepen and stem.kernel and stem.prune
    assert not head.widen and not head.prune and not head.kernel and head.deepen
    assert "output" in head.widen.note and "Linear" in head.kernel.note
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "kind", "channels", "widen", "deepen", "kernel", "prune"]
    assert any(line.startswith("[1] ") for line in lines)
    for row in table.rows:  # it tells the truth
        if row.widen:
            assert same(model, widen(model, row.name, 2 * row.channels, example=X))


def test_groups_print_and_prune() -> None:
    model = dense_net()
    found = analyse(model, X)
    group = found.group("1.conv2")
    assert group.makers == ("1.conv2",)
    assert "reads 2.conv1.weight[:, *]" in str(group) and "follows 3.running_var[*]" in str(group)
    readers = {slot.tensor: slot.channels.tolist() for slot in group.slots if slot.role == "reads"}
    assert readers["2.conv1.weight"] == [-1] * 8 + [0, 1, 2, 3]
    kept = [0, 2, 3]
    pruned = copy.deepcopy(model)
    found.reindex(group, kept, exact=False).apply(pruned)
    with torch.no_grad():  # the same as a channel that is always zero where it is read
        model.get_submodule("2.norm1").weight[9] = model.get_submodule("2.norm1").bias[9] = 0
        model.get_submodule("3").weight[9] = model.get_submodule("3").bias[9] = 0
    assert same(model, pruned)
    assert str(found).startswith("8 channels of 0")


def test_gradients_and_momentum_move_as_the_maps_say() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 4))
    lively(model)
    for make in (
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        lambda p: torch.optim.Adam(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    ):
        wide, certificate = widen(model, "0", 11, example=X, certificate=True)
        old, new, carried = (make(net.parameters()) for net in (model, wide, wide))
        for net, optimizer in ((model, old), (wide, new)):
            net.zero_grad()
            net(X).square().sum().backward()
            optimizer.step()
        carry_momentum(old, model, carried, wide, certificate.transfer)
        for parameter in wide.parameters():  # as if the wide network had been trained all along
            assert carried.state[parameter].keys() == new.state[parameter].keys()
            for key, value in new.state[parameter].items():
                if isinstance(value, Tensor):
                    assert torch.allclose(carried.state[parameter][key], value, rtol=1e-6, atol=1e-12), key
        model, wide = (lively(net) for net in (model, wide))


def test_momentum_goes_with_renamed_layers_and_new_ones_start_afresh() -> None:
    model = lively(Shared())
    old = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(X).sum().backward()
    old.step()
    for grow in (
        lambda: deepen(model, "conv1", example=X, certificate=True),
        lambda: add_branch(model, "conv1", example=X, certificate=True),
        lambda: grow_kernel(model, "conv1", 5, example=X, certificate=True),
    ):
        grown, certificate = grow()
        new = torch.optim.SGD(grown.parameters(), 0.01, momentum=0.9)
        carry_momentum(old, model, new, grown, certificate.transfer)
        assert len(new.state) == len(old.state)
        for name, parameter in grown.named_parameters():
            assert (parameter in new.state) == (name not in certificate.transfer.added)
        assert {*certificate.transfer.added} == {n for n, p in grown.named_parameters() if p not in new.state}
        grown(X).sum().backward()
        new.step()
    rprop = torch.optim.Rprop(model.parameters())
    model(X).sum().backward()
    rprop.step()
    with pytest.raises(GrowthError, match="Rprop keeps"):
        carry_momentum(rprop, model, torch.optim.Rprop(grown.parameters()), grown, certificate.transfer)


def test_certificates_print_what_was_measured() -> None:
    model = plain_cnn().float()
    _, certificate = widen(model, "0", 16, example=X.float(), certificate=True)
    assert certificate.given < 1e-10 and certificate.random < 1e-10 and 0 < certificate.rounding < 1e-5
    text = str(certificate)
    assert text.startswith("widened 0 from 8 to 16 channels") and "changed: 0, 1, 3" in text
    deep, certificate = deepen(model, "0", example=X.float(), certificate=True)
    assert certificate.given < 1e-10 and same(model, deep, X.float(), 1e-5)
    one = deepen(model, "0", example=X.float()[:1], certificate=True)[1]
    assert one.training is None and "unknown" in str(one)  # batch norm does not train on one value


def test_a_grown_network_trains_and_copies_part() -> None:
    model = plain_cnn().float()
    grown = widen(model, "0", 16, example=X.float(), noise=0.01)
    for name in ("0", "3"):
        grown = deepen(grown, name, example=X.float())
    optimizer = torch.optim.SGD(grown.train().parameters(), 0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(grown(X.float()), torch.arange(16) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    rows = grown[0].weight.flatten(1)
    assert all(not torch.equal(a, b) for a, b in pairwise(rows))


def test_explain_says_which_layers_are_tied() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
            self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            added = stem + self.outer(self.inner(stem))
            y: Tensor = self.head(self.depthwise(torch.cat([added, stem], dim=1)).mean((2, 3)))
            return y

    table = explain(Block(), torch.zeros(2, 3, 5, 5))
    assert {row.name: row.tied for row in table.rows} == {
        "stem": ("outer", "depthwise"),
        "inner": (),
        "outer": ("stem", "depthwise"),
        "depthwise": ("stem", "outer"),
        "head": (),
    }
    column = [line.split()[-1] if line.endswith(" 1") else "" for line in str(table).splitlines()[1:6]]
    assert column == ["1", "", "1", "1", ""]


def test_momentum_is_carried_between_networks_that_belong_together_only() -> None:
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    model = net = nn.Sequential(*layers).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    for name in ("0", "2"):
        net, certificate = widen(net, name, 8, example=X, certificate=True)
    wide = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for match, arguments in {
        "another growth": (optimizer, model, wide, net, certificate.transfer),
        "the old optimizer holds no parameter": (wide, model, wide, net, certificate.transfer),
        "the new optimizer holds no parameter": (optimizer, model, optimizer, net, certificate.transfer),
        "give certificate.transfer": (optimizer, model, wide, net, certificate),
        "says nothing to Adam": (optimizer, model, torch.optim.Adam(net.parameters()), net, certificate.transfer),
    }.items():
        with pytest.raises(GrowthError, match=match):
            carry_momentum(*arguments)
        assert not wide.state


def test_generators_are_generators() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).double()
    for seed in (0, 1):
        with pytest.raises(GrowthError, match=f"generator={seed} is none"):
            widen(net, "0", 8, example=X, generator=seed)


def test_statistics_are_those_of_evaluation_where_training_fails() -> None:
    def block(c: int, d: int) -> list[nn.Module]:
        return [nn.Conv2d(c, d, 1), nn.BatchNorm2d(d), nn.ReLU()]

    net = nn.Sequential(nn.AvgPool2d(2), *block(3, 4), nn.AdaptiveAvgPool2d(1), *block(4, 5)).double()
    net(X)
    image = X[:1]  # the first batch norm trains on it, and moves its averages; the second does not
    deep, certificate = deepen(net, "5", example=image, certificate=True)
    grown = deep.get_submodule(certificate.transfer.changed[1])
    assert torch.equal(grown.running_mean, net.eval()(image).flatten())


def test_branches_can_be_scripted() -> None:
    net = add_branch(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), "0", "copies", example=X)
    assert torch.equal(torch.jit.script(net)(X), net(X))
