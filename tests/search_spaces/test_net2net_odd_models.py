"""Models that do what a graph does not show, or with unusual arguments: exact, or refused, and never changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.certificates import _largest
from search_spaces.net2net import GrowthError, add_branch, deepen, explain, grow_kernel, widen

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)


class Net(nn.Module):
    """Convolutions `a` and `b` (8 channels), a head, and a forward that a test gives."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], channels: int = 8, **more: object) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
        for name, value in more.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.run = run
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def assert_same(model: nn.Module, grown: nn.Module, *inputs: Tensor, training: bool = False) -> None:
    x = inputs or (X,)
    with torch.no_grad():
        assert (copy.deepcopy(model).eval()(*x) - copy.deepcopy(grown).eval()(*x)).abs().max() <= 1e-10
        if training:
            assert (copy.deepcopy(model).train()(*x) - copy.deepcopy(grown).train()(*x)).abs().max() <= 1e-10


# What the graph does not show ----------------------------------------------------------------------------------------

ASKING = {
    "out_channels": lambda net, x: net.head(net.a(x)) / net.a.out_channels,
    "in_features": lambda net, x: net.head(net.a(x)) * net.head[2].in_features,
    "num_features": lambda net, x: net.head(net.norm(net.a(x)) * net.norm.num_features),
    "buffer": lambda net, x: net.head(net.norm(net.a(x)) - net.norm.running_mean.mean()),
    "size_of_a_buffer": lambda net, x: net.head(net.norm(net.a(x)) / len(net.norm.running_mean)),
    "new_tensor": lambda net, x: net.head(net.a(x) * torch.tensor(net.a.out_channels)),
    "range": lambda net, x: net.head(net.a(x) * torch.arange(net.a.out_channels).sum()),
}


@pytest.mark.parametrize("case", ASKING)
def test_a_forward_that_asks_a_layer_for_its_size_is_refused(case: str) -> None:
    model = Net(ASKING[case], norm=nn.BatchNorm2d(8))
    nn.init.uniform_(model.norm.running_mean)
    with pytest.raises(GrowthError, match="'a' cannot be widened to 12 channels: forward computes with the size"):
        widen(model, "a", 12, example=X)


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.in_features**0.5


def test_a_layer_of_ones_own_that_asks_for_its_size_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), ScaledLinear(6, 2)).double()
    with pytest.raises(GrowthError, match="forward computes with the size"):
        widen(model, "0", 9, example=torch.ones(2, 4, dtype=torch.double))


def by_type(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            x = x.tanh()
    return net.head(x)


def test_a_forward_that_asks_a_layer_for_its_type_is_refused() -> None:
    model = Net(by_type, layers=nn.ModuleList([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)]))
    for grow in (deepen, add_branch):
        with pytest.raises(GrowthError, match="the type"):
            grow(model, "layers.2", example=X)
    assert_same(model, widen(model, "layers.0", 11, example=X), training=True)
    assert_same(model, grow_kernel(model, "layers.0", 5, example=X))


def test_a_forward_that_asks_for_the_kernel_is_refused() -> None:
    model = Net(lambda net, x: net.head(F.pad(net.a(x), [net.a.kernel_size[0]] * 4)))
    with pytest.raises(GrowthError, match="forward computes with the size"):
        grow_kernel(model, "a", 5, example=X)


def storing(net: Net, x: Tensor) -> Tensor:
    net.last = net.a(x)
    net.calls += 1
    net.count.add_(1)
    net.results.append(net.last)
    return net.head(net.last)


def test_models_that_store_results_stay_as_they_are() -> None:
    model = Net(storing, last=None, calls=0, results=[], count=torch.zeros(1))
    for grow in (
        lambda: widen(model, "a", 11, example=X, certificate=True),
        lambda: deepen(model, "a", example=X, certificate=True),
        lambda: grow_kernel(model, "a", 5, example=X, certificate=True),
        lambda: add_branch(model, "a", example=X, certificate=True),
        lambda: explain(model, X),
    ):
        grow()
        assert (model.last, model.calls, model.results, int(model.count)) == (None, 0, [], 0)
    model(X)  # with gradients: torch does not copy that
    with pytest.raises(GrowthError, match="Net cannot be copied: RuntimeError"):
        widen(model, "a", 11, example=X)


def test_spectral_norm_is_not_advanced() -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    model = Net(lambda net, x: net.head(net.c(net.a(x))), c=spectral).train()
    state = copy.deepcopy(model.state_dict())
    assert explain(model, X)["a"].deepen
    assert_same(model, deepen(model, "a", example=X))
    with pytest.raises(GrowthError, match="'c' is parametrized"):
        widen(model, "a", 9, example=X)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_closure_on_a_layer_is_refused() -> None:
    layer = nn.Conv2d(3, 8, 3).double()  # a copy of the model would go on calling this one
    model = Net(lambda net, x: net.head(layer(x)), c=layer)
    for grow in (lambda: widen(model, "c", 9, example=X), lambda: deepen(model, "c", example=X)):
        with pytest.raises(GrowthError, match="not installed as a submodule"):
            grow()


@pytest.mark.parametrize("second", [False, True])
def test_a_layer_with_two_names_is_one_layer(second: bool) -> None:
    model = Net(lambda net, x: net.head(net.steps(x) if second else net.a(x).relu()))
    model.steps = nn.Sequential(model.a, nn.ReLU())
    for grown in (
        widen(model, "a", 11, example=X),
        deepen(model, "a", example=X),
        grow_kernel(model, "a", 5, example=X),
        add_branch(model, "a", example=X),
    ):
        assert_same(model, grown)
        assert grown.a is grown.steps[0]


def test_subclasses_of_torch_are_not_taken_for_what_they_inherit() -> None:
    class Rounded(nn.Conv2d):  # as torch.ao has them: torch.fx does not look inside
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, (16 * self.weight).round() / 16, self.bias)

    Rounded.__module__ = "torch.ao.nn.qat"
    model = Net(lambda net, x: net.head(net.c(net.a(x))), c=Rounded(8, 8, 1))
    with pytest.raises(GrowthError, match="Rounded 'c', through which channels cannot be followed"):
        widen(model, "a", 9, example=X)


def test_subclasses_that_take_sizes_from_themselves_widen() -> None:
    class ChannelNorm(nn.LayerNorm):  # as torchvision's ConvNeXt has it
        def forward(self, x: Tensor) -> Tensor:
            y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
            return y.permute(0, 3, 1, 2)

    class Standard(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    layers = ChannelNorm(8), Standard(8, 8, 3, groups=8), nn.BatchNorm2d(8)
    model = Net(lambda net, x: net.head(net.steps(net.a(x))), steps=nn.Sequential(*layers))
    wide = widen(model, "a", 16, example=X)
    assert_same(model, wide, training=True)
    assert wide.steps[0].normalized_shape == (16,) and wide.steps[1].groups == 16


def test_a_weight_that_an_embedding_has_too_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(7, 6), nn.Linear(6, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(self.mix(self.embed(tokens)).relu(), self.embed.weight)

    with pytest.raises(GrowthError, match="'embed.weight' is read elsewhere in forward, too"):
        widen(Tied(), "mix", 9, example=torch.zeros(2, 3, dtype=torch.long))


# Parts that are changed in place, or left out ------------------------------------------------------------------------

IN_PLACE = {
    "detach": lambda net, y: y.detach()[:, :3].mul_(3.0),
    "contiguous": lambda net, y: y.contiguous()[:, :3].mul_(3.0),
    "double": lambda net, y: y.double()[:, :3].mul_(3.0),
    "identity": lambda net, y: net.identity(y)[:, :3].mul_(3.0),
    "dropout": lambda net, y: F.dropout(y, 0.0, net.training)[:, :3].mul_(3.0),
    "in_place_before": lambda net, y: y.relu_()[:, :3].mul_(3.0),
    "by_name": lambda net, y: net.relu(input=y[:, :3]),
    "positional": lambda net, y: F.relu(y[:, :3], True),
    "out": lambda net, y: torch.add(y[:, :3], 1.0, out=y[:, :3]),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_part_that_is_changed_in_place_is_refused(case: str) -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        IN_PLACE[case](net, y)
        return net.head(y)

    model = Net(run, identity=nn.Identity(), relu=nn.ReLU(inplace=True))
    for channels in (9, 16):
        with pytest.raises(GrowthError, match="'a' cannot be widened"):
            widen(model, "a", channels, example=X)


def test_a_slice_that_would_leave_channels_out_is_refused() -> None:
    def ghost(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.head(torch.cat([y, net.cheap(y)], 1)[:, :16])

    model = Net(ghost, 16, cheap=nn.Conv2d(8, 8, 3, padding=1, groups=8))
    with pytest.raises(GrowthError, match=r"getitem\(\) .*would leave some of them out"):
        widen(model, "a", 9, example=X)


# Arguments of all kinds ----------------------------------------------------------------------------------------------


def blur(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.head(F.conv2d(y, net.filters, groups=y.shape[1]))


def gate(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.head(y * y.mean((2, 3), keepdim=True).sigmoid().expand_as(y))


def chunks(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.cat(net.a(x).chunk(2, 1), 1))


def some_chunks(net: Net, x: Tensor) -> Tensor:
    return net.head(torch.cat(net.a(x).chunk(4, 1)[:2], 1))


def computed_dims(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.head(torch.cat([y, net.b(x)], dim=y.dim() - 3).mean(y.dim() - 1, keepdim=True))


EXACT = {
    "blur": (Net(blur, filters=torch.rand(8, 1, 2, 2)), 11),
    "gate": (Net(gate), 11),
    "chunks": (Net(chunks), 12),
    "some_chunks": (Net(some_chunks, 4), 16),
    "computed_dims": (Net(computed_dims, 16), 11),
    "masked": (Net(lambda net, x: net.head(net.a(x).masked_fill(net.b(x) > 0, 0.5))), 11),
    "group_norm": (Net(lambda net, x: net.head(F.group_norm(net.a(x), 2) ** 2)), 16),
    "spread_first": (Net(lambda net, x: net.head(net.rows * net.a(x) * net.scale), rows=None, scale=None), 11),
    "by_name": (Net(lambda net, x: net.head(net.norm(input=net.a(input=x))), norm=nn.BatchNorm2d(8)), 11),
}
EXACT["spread_first"][0].rows = nn.Parameter(torch.rand(1, 1, 8, 1).double())
EXACT["spread_first"][0].scale = nn.Parameter(torch.rand(8, 1, 1).double())


@pytest.mark.parametrize("case", EXACT)
def test_arguments_are_understood(case: str) -> None:
    model, channels = EXACT[case]
    assert_same(model, widen(model, "a", channels, example=X), training=True)


class Several(nn.Module):
    """Any number of inputs, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.double()

    def forward(self, scale: Tensor, *xs: Tensor) -> Tensor:
        return self.head(F.relu(self.a(xs[0]) + self.b(xs[1])) * scale)


def test_inputs_that_are_no_batch_or_any_number() -> None:
    x = torch.randn(5, 4, dtype=torch.double)
    model, inputs = Several(), (torch.rand(6, dtype=torch.double)[:1], x, x + 1)
    assert_same(model, widen(model, "a", 9, example=inputs), *inputs)
    model = Net(lambda net, x: net.linear(net.a(x).view(4, -1)), linear=nn.Linear(512, 5))  # the batch is a constant
    assert_same(model, widen(model, "a", 9, example=X))
    with pytest.raises(GrowthError, match="takes 1 inputs, and the example has 2"):
        deepen(model, "a", example=(X, X))
    with pytest.raises(GrowthError, match="a tensor or a tuple of them, got list"):
        deepen(model, "a", example=[X])


def test_what_is_no_model_is_refused() -> None:
    for model in (None, object(), "resnet18"):
        with pytest.raises(GrowthError, match="a model is an nn.Module that is not scripted"):
            widen(model, "0", 9, example=X)
    with pytest.raises(GrowthError, match="has no weights yet: let the model compute a batch once"):
        widen(nn.Sequential(nn.LazyConv2d(8, 3)), "0", 9, example=X)


def test_kernels_and_branches_past_memory_are_refused() -> None:
    model = Net(lambda net, x: net.head(net.a(x)))
    for grow in (
        lambda: grow_kernel(model, "a", 1_000_001, example=X),
        lambda: deepen(model, "a", kernel=1_000_001, example=X),
        lambda: add_branch(model, "a", "copies", copies=10**14, example=X),
    ):
        with pytest.raises(GrowthError, match="it would take .* GB, and .* GB are free"):
            grow()


# Numbers -------------------------------------------------------------------------------------------------------------


def test_deepening_where_the_norm_is_over_another_dimension() -> None:
    for rows in (3, 6):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(rows), nn.ReLU(), nn.Flatten(), nn.Linear(6 * rows, 2))
        nn.init.uniform_(model[1].running_var, 0.5, 2)
        x = torch.randn(5, rows, 4, dtype=torch.double)
        assert_same(model.double(), deepen(model, "0", example=x), x)


def test_deepening_behind_channels_that_are_constant() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, eps=0.0), nn.Hardtanh(50, 60), nn.Conv2d(6, 2, 1)
    ).double()
    assert_same(model, deepen(model, "0", example=X))


def test_deepening_with_examples_that_are_not_finite_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()).double()
    for number in (float("nan"), float("inf")):
        with pytest.raises(GrowthError, match="is not finite. Give a batch of real data"):
            deepen(model, "0", example=torch.full_like(X, number))


def test_noise_on_a_single_weight_and_on_filters_in_buffers_or_of_transposed_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU()).double()
    deep = deepen(model, "0", example=X, noise=0.1)
    assert torch.isfinite(deep[1][1].weight).all() and deep[1][1].weight != 1
    model = Net(lambda net, x: net.head(F.conv2d(x, net.filters)), filters=torch.rand(8, 3, 2, 2))
    assert widen(model, "filters", 11, example=X, noise=0.1).filters.shape[0] == 11
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 2, 1)).double()
    exact, noisy = (
        widen(model, "1", 10, example=X, noise=noise, generator=torch.Generator().manual_seed(0))
        for noise in (0.0, 0.1)
    )
    assert_same(model, exact)
    moved = (exact[1].weight != noisy[1].weight).flatten(2).all(2)
    assert moved.tolist() == [[False] * 3 + [True] * 2] * 8


def test_certificates_of_outputs_that_are_no_floats_and_of_no_numbers() -> None:
    model = Net(lambda net, x: net.head(net.a(x)) > 0)
    assert widen(model, "a", 9, example=X, certificate=True)[1].given == 0
    nan, inf, one = torch.tensor([float("nan")]), torch.tensor([float("inf")]), torch.ones(1)
    assert _largest([one, nan], [one, nan]) == _largest([inf], [inf]) == 0
    assert _largest([one, one], [one, nan]) == _largest([inf], [one]) == float("inf")
    model = Net(lambda net, x: net.head(net.a(x).half().float())).float()
    with pytest.raises(GrowthError, match="does not run in float64"):
        widen(model, "a", 9, example=X.float(), certificate=True)
