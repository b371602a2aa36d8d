"""Weights of few bits: on their grids, with the gradients that the formulas say, in any training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import nasbench as nb
from compress.errors import CompressionError
from compress.low_bit import freeze_low_bit, low_bit_of
from compress.low_bit_models import code_snapshot, freeze
from compress.pruning import finalize, masks, prune
from compress.quantization import AffineGrid, FakeQuantize, Layout, quantizable, quantize
from compress.weights import weights
from nasbench.training import recalibrate, validate

BITS = range(2, 9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convolutions, plain, depthwise and transposed, attention and a classifier: (B, 3, 6, 6) to (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.up(self.depthwise(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


NAMES = ["conv.0", "depthwise", "up", "attention.in_proj_weight", "attention.out_proj", "head"]


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(16) % 4


def step_of(model: nn.Module, name: str) -> Any:
    own = weights(model)[name]
    return low_bit_of(own.module, own.attribute)


def effective(model: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(own.module, own.attribute).detach().clone() for name, own in weights(model).items()}


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32)  # tells 0 from -0


SETTINGS: dict[str, dict[str, Any]] = {
    "channel": {},
    "max": {"scale": "max"},
    "asymmetric": {"symmetric": False},
    "group": {"group": 5},
    "asymmetric group": {"group": 5, "symmetric": False, "scale": "max"},
    "tensor": {"group": "tensor"},
    "learned": {"learned_step": True},
    "learned group": {"learned_step": True, "group": 5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("bits", BITS)
def test_weights_take_few_values_and_have_exact_codes(bits: int, settings: dict[str, Any]) -> None:
    net = Net()
    small = quantize(net, bits, **settings)
    assert list(weights(small)) == NAMES
    levels = 2**bits - settings.get("symmetric", True)
    before, after = effective(net), effective(small)
    for name, weight in after.items():
        step = step_of(small, name)
        for row in step.layout.gathered(weight):
            assert len(row.unique()) <= levels
        codes = step.codes(weight)
        assert codes.dtype == torch.uint8 and codes.shape == weight.shape
        assert torch.equal(bits_of(step.values(codes)), bits_of(weight))
        half = step.layout.spread(step.scale.detach().abs()) / 2
        if settings.get("scale") == "max":  # nothing is cut off, so no error is more than half a step
            slack = 1 + (not settings.get("symmetric", True))  # the zero of an asymmetric grid is rounded, too
            assert ((weight - before[name]).abs() <= half * slack * (1 + 1e-6)).all()


def test_channels_are_output_channels() -> None:
    net = quantize(Net(), 4)
    count = {name: step_of(net, name).scale.numel() for name in NAMES}
    assert count == {
        "conv.0": 8,
        "depthwise": 8,
        "up": 8,
        "attention.in_proj_weight": 24,
        "attention.out_proj": 8,
        "head": 4,
    }


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_convolution_has_a_scale_for_each_of_its_outputs(groups: int) -> None:
    layer = nn.ConvTranspose2d(8, 12, 3, groups=groups, bias=False)
    small = quantize(layer, 3, scale="max")
    step, weight = step_of(small, "weight"), layer.weight.detach()
    grouped = weight.view(groups, 8 // groups, 12 // groups, 3, 3)
    largest = grouped.abs().amax((1, 3, 4)).flatten()  # of output channels, in their order
    torch.testing.assert_close(step.scale, largest / 3)
    # One input at a time gives an output that is a multiple of that output channel's scale.
    for i in range(8):
        x = torch.zeros(1, 8, 1, 1)
        x[0, i] = 1
        out = small(x)[0].flatten(1)
        steps = out / step.scale[:, None]
        torch.testing.assert_close(steps, steps.round(), atol=1e-5, rtol=0)
    parts = quantize(layer, 3, group=7, scale="max")
    own = step_of(parts, "weight")
    per_output = 8 // groups * 9
    assert own.scale.numel() == 12 * math.ceil(per_output / 7)
    first = weight[: 8 // groups, 0].flatten()[:7]  # the first weights of the first output channel
    torch.testing.assert_close(own.scale[0], first.abs().max() / 3)


def test_layouts_gather_and_spread() -> None:
    for layout in (
        *(Layout((4, 3, 3, 3), group) for group in (None, 5, 27, 100, "tensor")),
        *(Layout((4, 6, 3, 2), group, transposed=2) for group in (None, 5, "tensor")),
        *(Layout((4, 7), group) for group in (None, 3, 1, "tensor")),
    ):
        marks = torch.arange(layout.count).float()
        spread = layout.spread(marks).expand(layout.shape)
        rows = layout.gathered(spread + 1)
        assert rows.shape == (layout.count, layout.size)
        for mark, row in enumerate(rows):
            assert set(row.tolist()) <= {mark + 1.0, 0.0} and row[0] == mark + 1  # zeros fill up
        assert int((rows > 0).sum()) == math.prod(layout.shape)


def test_groups_are_consecutive_and_the_last_may_be_smaller() -> None:
    weight = random(3, 10)
    step = FakeQuantize.of(weight, 4, group=4, scale="max")
    expected = [part.abs().max() / 7 for row in weight for part in row.split(4)]
    torch.testing.assert_close(step.scale, torch.stack(expected))
    assert FakeQuantize.of(weight, 4, group=64).scale.shape == (3,)
    for row, out in zip(weight, step(weight), strict=True):
        for part, own in zip(row.split(4), out.split(4), strict=True):
            assert torch.equal(own, FakeQuantize.of(part.view(1, -1), 4, scale="max")(part.view(1, -1))[0])


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_exact(bits: int) -> None:
    weight = random(50, 20).exp()  # far from 0, so that a grid from min to max would miss it
    weight[:, ::3] = 0
    weight[1::2] *= -1  # brings -0
    for symmetric in (True, False):
        for group in (None, 4, "tensor"):
            out = FakeQuantize.of(weight, bits, symmetric=symmetric, group=group)(weight)  # type: ignore[arg-type]
            assert not bits_of(out[:, ::3]).any()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, -3.0, 1e-45, 1e-38, 1e38])
def test_channels_of_one_value(value: float, symmetric: bool, learned: bool) -> None:
    weight = torch.full((2, 4), value)
    step = FakeQuantize.of(weight, 4, symmetric=symmetric, learned_step=learned)
    out = step(weight)
    assert out.isfinite().all() and (step.scale > 0).all()
    torch.testing.assert_close(out, weight, rtol=1e-6, atol=1e-37)
    assert torch.equal(step.values(step.codes(out)), out.detach())


def test_codes_and_values_are_inverse_for_any_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in BITS:
        exponents = torch.randint(-120, 110, (200,), generator=generator)
        scale = torch.ldexp(1 + torch.rand(200, generator=generator), exponents)
        zero = torch.randint(0, 2**bits, (200,), generator=generator).to(torch.uint8)
        grid = AffineGrid(bits, scale, zero, Layout((200, 2**bits)))
        codes = torch.arange(2**bits).to(torch.uint8).expand(200, -1)
        values = grid.values(codes)
        assert values.isfinite().all()
        assert torch.equal(grid.codes(values), codes)
        assert torch.equal(bits_of(grid.values(grid.codes(values))), bits_of(values))
        with pytest.raises(CompressionError, match=r"1 of .* values are not on it"):
            grid.codes(values.index_put((torch.tensor(3), torch.tensor(1)), values[3, 1] * (1 + 1e-6) + scale[3] / 10))
        with pytest.raises(CompressionError, match="values are not on it"):
            grid.codes(scale[:, None] * (2**bits - zero[:, None].float()).expand(-1, 2**bits))  # one step too far
        with pytest.raises(CompressionError, match="values are not on it"):
            grid.codes(torch.full_like(values, torch.nan))
        with pytest.raises(CompressionError, match="the weight is"):
            grid.codes(values[:-1])


def test_the_least_error_is_less_and_shrinks_with_bits() -> None:
    weight = random(16, 100)
    for symmetric in (True, False):
        before = torch.inf
        for bits in BITS:
            errors = {
                scale: float((FakeQuantize.of(weight, bits, scale=scale, symmetric=symmetric)(weight) - weight).norm())
                for scale in ("max", "mse")
            }
            assert errors["mse"] <= errors["max"] and errors["mse"] < before / 1.5
            before = errors["mse"]


def test_the_searched_scale_is_that_of_least_error() -> None:
    weight = random(3, 64)
    step = FakeQuantize.of(weight, 3)
    for row, scale in zip(weight, step.scale, strict=True):
        full = row.abs().max() / 3

        def error(candidate: Tensor, row: Tensor = row) -> float:
            return float(((row / candidate).round().clamp(-3, 3) * candidate - row).square().sum())

        errors = [error(full * share) for share in torch.linspace(0.1, 1, 200)]
        assert error(scale) <= 1.03 * min(errors)


def test_the_gradient_goes_straight_through_but_for_what_is_cut_off() -> None:
    weight = torch.tensor([[-9.0, -3.6, -3.4, -1.2, 0.0, 0.4, 3.4, 3.6, 9.0]], requires_grad=True)
    step = FakeQuantize(
        3, torch.ones(1), torch.full((1,), 4, dtype=torch.uint8), Layout((1, 9)), symmetric=True, learned_step=False
    )
    out = step(weight)
    assert out.tolist() == [[-3, -3, -3, -1, 0, 0, 3, 3, 3]]
    upstream = random(1, 9)
    out.backward(upstream)
    inside = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]])
    assert weight.grad is not None and torch.equal(weight.grad, upstream * inside)
    assert not list(step.parameters())


def test_the_largest_weight_of_a_channel_is_not_cut_off() -> None:
    weight = random(2000, 3).requires_grad_()
    for bits in BITS:
        weight.grad = None
        FakeQuantize.of(weight, bits, scale="max")(weight).sum().backward()
        assert weight.grad is not None and weight.grad.all()


@pytest.mark.parametrize("group", [None, 4, "tensor"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradient_of_a_learned_step(bits: int, group: Any) -> None:
    weight = random(3, 10).requires_grad_()
    step = FakeQuantize.of(weight, bits, group=group, learned_step=True)
    (scale,) = step.parameters()
    with torch.no_grad():
        scale.mul_(0.7)  # so that some weights are cut off
    upstream = random(3, 10, seed=1)
    step(weight).backward(upstream)

    # Equations 3 to 5 of the paper, entry by entry.
    top, layout = 2 ** (bits - 1) - 1, step.layout
    to_weight, to_scale = torch.zeros(3, 10), torch.zeros(3, 10)
    own = layout.spread(scale.detach()).expand(3, 10)
    for i in range(3):
        for j in range(10):
            v = float(weight.detach()[i, j] / own[i, j])
            if v <= -top:
                to_scale[i, j] = -top
            elif v >= top:
                to_scale[i, j] = top
            else:
                to_weight[i, j], to_scale[i, j] = 1, round(v) - v
    assert 0 < to_weight.mean() < 1
    expected = layout.gathered(upstream * to_scale).sum(1) / math.sqrt(layout.size * top)
    assert weight.grad is not None and torch.equal(weight.grad, upstream * to_weight)
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_learned_step_below_zero_has_the_same_values() -> None:
    weight = random(3, 10)
    step = FakeQuantize.of(weight, 3, learned_step=True)
    (scale,), before = step.parameters(), step(weight)
    with torch.no_grad():
        scale.neg_()
    assert torch.equal(step(weight), before)
    assert torch.equal(step.frozen().values(step.codes(before)), before)
    with torch.no_grad():
        scale.zero_()
    assert step(weight).isfinite().all()


def test_masked_weights_stay_zero() -> None:
    net = prune(Net(), 0.4)
    for settings in ({"symmetric": False}, {"learned_step": True, "group": 5}):
        small = quantize(net, 3, **settings)  # type: ignore[arg-type]
        before = masks(small)
        assert before.keys() == masks(net).keys()
        optimizer = torch.optim.AdamW(small.parameters(), lr=0.01, weight_decay=0.1)
        for seed in range(5):
            x, y = batch(seed)
            optimizer.zero_grad()
            F.cross_entropy(small(x), y).backward()
            for name, own in weights(small).items():
                assert own.parameter.grad is not None and not own.parameter.grad[~before[name]].any()
            optimizer.step()
        for name, weight in effective(small).items():
            assert not bits_of(weight[~before[name]]).any() and weight.any()
        plain = finalize(small)
        assert not any(parametrize.is_parametrized(module) for module in plain.modules())
        for name, weight in effective(plain).items():
            assert torch.equal(weight, effective(small)[name])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_evaluation_and_the_frozen_grid_are_equal_bit_for_bit(settings: dict[str, Any]) -> None:
    small = quantize(prune(Net(), 0.7), 3, **settings)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(small(x), y).backward()
        optimizer.step()
    small.eval()
    wanted, before = small(batch()[0]), effective(small)
    for own in weights(small).values():
        codes = low_bit_of(own.module, own.attribute).codes(before[own.name])  # type: ignore[union-attr]
        freeze_low_bit(own.module, own.attribute)
        grid = low_bit_of(own.module, own.attribute)
        assert type(grid) is AffineGrid and grid.frozen() is grid and not own.parameter.requires_grad
        assert torch.equal(grid.codes(own.parameter), codes)
        assert torch.equal(bits_of(grid.values(codes)), bits_of(own.parameter.detach()))
        arrays = {name: array.clone() for name, array in grid.arrays().items()}
        assert all(array.dtype in (torch.float32, torch.uint8) for array in arrays.values())
        again = AffineGrid.restore(3, own.shape, grid.fields(), arrays)
        assert torch.equal(bits_of(again.values(codes)), bits_of(own.parameter.detach()))
    assert torch.equal(small(batch()[0]), wanted)
    plain = finalize(small)
    assert torch.equal(plain(batch()[0]), wanted)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_restoring_refuses_what_makes_no_sense() -> None:
    grid = FakeQuantize.of(random(4, 6), 4, group=4, symmetric=False).frozen()
    fields, arrays = grid.fields(), grid.arrays()
    assert fields == {"group": 4} and arrays.keys() == {"scale", "zero"}
    AffineGrid.restore(4, (4, 6), fields, arrays)
    bad: list[tuple[str, int, tuple[int, ...], dict[str, Any], dict[str, Tensor]]] = [
        ("from 2 to 8", 9, (4, 6), fields, arrays),
        ("8 scales", 4, (4, 6), fields, arrays | {"scale": arrays["scale"][:4]}),
        ("12 scales", 4, (4, 6), {"group": 2}, arrays),
        ("8 scales", 4, (4, 6), fields, arrays | {"scale": arrays["scale"].double()}),
        ("8 scales", 4, (4, 6), fields, {}),
        ("stand for 0", 2, (4, 6), fields, arrays | {"zero": torch.full((8,), 4, dtype=torch.uint8)}),
        ("stand for 0", 4, (4, 6), fields, arrays | {"zero": arrays["zero"].int()}),
        ("normal positive", 4, (4, 6), fields, arrays | {"scale": -arrays["scale"]}),
        ("normal positive", 4, (4, 6), fields, arrays | {"scale": arrays["scale"] * torch.nan}),
        ("group is None", 4, (4, 6), {"group": 0}, arrays),
        ("group is None", 4, (4, 6), {"group": [4]}, arrays),
        ("transposed=", 4, (4, 6), fields | {"transposed": True}, arrays),
        ("of 3 groups", 4, (4, 6), fields | {"transposed": 3}, arrays),
        ("has no grid", 4, (24,), fields, arrays),
        ("has no 'axis'", 4, (4, 6), fields | {"axis": 1}, arrays),
        ("has no 'mean'", 4, (4, 6), fields, arrays | {"mean": arrays["scale"]}),
    ]
    for text, *given in bad:
        with pytest.raises(CompressionError, match=text):
            AffineGrid.restore(*given)  # type: ignore[arg-type]


def test_bits_by_layer_and_excluded_layers() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    small = quantize(net, {"conv.0": 2, "attention.in_proj_weight": 5})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    bits = {name: getattr(step_of(small, name), "bits", None) for name in NAMES}
    assert bits == dict.fromkeys(NAMES) | {"conv.0": 2, "attention.in_proj_weight": 5}
    rest = quantize(net, 4, exclude=["conv", "attention"])
    assert [name for name in NAMES if step_of(rest, name)] == ["depthwise", "up", "head"]
    assert list(quantizable(net, ["head.weight"])) == NAMES[:-1]
    assert not any(map(parametrize.is_parametrized, net.modules()))


def test_inplace_keeps_the_parameters_and_copies_are_apart() -> None:
    net = Net()
    before = {name: own.parameter for name, own in weights(net).items()}
    assert quantize(net, 3, inplace=True) is net
    assert all(own.parameter is before[name] for name, own in weights(net).items())
    wanted = effective(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-2).add_(0.1)
    finalize(twin, inplace=True)
    assert all(torch.equal(weight, wanted[name]) for name, weight in effective(net).items())
    assert step_of(net, "head") is not None and step_of(twin, "head") is None
    plain = finalize(net)
    again = quantize(plain, 3)  # values that are on a grid already
    assert step_of(plain, "head") is None and step_of(again, "head") is not None


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_state_dicts_and_dtypes(settings: dict[str, Any]) -> None:
    small, other = (quantize(prune(Net(), 0.5, seed=seed), 3, **settings) for seed in (0, 1))
    x = batch()[0]
    other.load_state_dict(small.state_dict())
    assert torch.equal(small.eval()(x), other.eval()(x))
    assert all(step_of(other, name).zero.dtype == torch.uint8 for name in NAMES)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_state_dict_of_other_bits_is_refused(symmetric: bool) -> None:
    """Scales of 8 bits with codes of 4 would give quite other weights, and no name or shape tells them apart."""
    layer = nn.Linear(20, 10)
    four, eight = (quantize(layer, bits, symmetric=symmetric, scale="max") for bits in (4, 8))
    with pytest.raises(RuntimeError, match="zero is not that of 4 bits.*give the model the bits it was saved with"):
        four.load_state_dict(eight.state_dict())
    if symmetric:
        with pytest.raises(RuntimeError, match="zero is not that of 8 bits"):
            eight.load_state_dict(four.state_dict())
        with pytest.raises(RuntimeError, match="zero is not that of 8 bits"):
            eight.load_state_dict(quantize(layer, 8, symmetric=False).state_dict())
    with pytest.raises(RuntimeError, match="zero is not that of 4 bits"):
        freeze(four).load_state_dict(freeze(eight).state_dict())
    for own in (eight, freeze(eight)):
        other = copy.deepcopy(own)
        with torch.no_grad():
            other.bias.zero_()  # type: ignore[operator, union-attr]
        other.load_state_dict(own.state_dict())
        assert torch.equal(other.bias, own.bias) and torch.equal(other.weight, own.weight)  # type: ignore[arg-type]
    with torch.device("meta"):
        blank = quantize(nn.Linear(20, 10, device="cpu"), 8, symmetric=symmetric)
    blank.load_state_dict(eight.state_dict(), assign=True)
    assert torch.equal(blank.weight, eight.weight)  # type: ignore[arg-type]


def test_weights_that_left_their_grid_have_no_codes() -> None:
    small = freeze(quantize(nn.Sequential(nn.Linear(20, 10)), 4)).requires_grad_(True)
    with pytest.raises(CompressionError, match=r"'0': .* its scales are torch.float16, call model.float\(\)"):
        code_snapshot(copy.deepcopy(small).half())
    torch.optim.SGD(small.parameters(), lr=0.1, weight_decay=0.1).zero_grad()
    small(torch.rand(2, 20)).sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    with pytest.raises(CompressionError, match="'0': .* values are not on it. One that has left its grid, by training"):
        code_snapshot(small)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_any_loop_trains_it(name: str, learned: bool, bf16: bool) -> None:
    small = quantize(Net(), 3, learned_step=learned)
    optimizer = OPTIMIZERS[name](small.parameters())
    x, y = batch()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(small(x), y)
        loss.backward()
        assert all(parameter.grad is not None for parameter in small.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(len(row.unique()) <= 7 for row in effective(small)["head"])


def test_channels_last_weights_stay_so() -> None:
    net = Net().to(memory_format=torch.channels_last)
    for settings in SETTINGS.values():
        small = quantize(net, 4, **settings)
        assert small.conv[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_training_regains_what_few_bits_lose() -> None:
    data = nb.data.load("digits")
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )
    nb.fit(net, data, epochs=6, seed=0)
    float_accuracy = validate(net, data)["val_accuracy"]
    for learned in (False, True):
        small = quantize(net, 2, learned_step=learned)
        rounded = validate(small, data)["val_accuracy"]
        fixed = validate(recalibrate(copy.deepcopy(small), data), data)["val_accuracy"]
        nb.fit(small, data, epochs=3, seed=0)
        tuned = validate(small, data)["val_accuracy"]
        assert rounded < float_accuracy - 0.1, "there is nothing to regain"
        assert fixed > rounded and tuned > max(rounded, float_accuracy - 0.1)
    assert validate(quantize(net, 8), data)["val_accuracy"] > float_accuracy - 0.01


@pytest.mark.slow
def test_it_compiles() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x, y = batch()
    for learned in (False, True):
        plain = quantize(net, 3, learned_step=learned)
        small = torch.compile(copy.deepcopy(plain), backend="aot_eager", fullgraph=True)
        F.cross_entropy(small(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
        for own, other in zip(small.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)


def test_bad_settings_are_refused_before_anything_changes() -> None:
    net = Net()
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("bits is a whole number from 2 to 8, got 1", 1, {}),
        ("got 9", 9, {}),
        ("got True", True, {}),
        ("got 4.0", 4.0, {}),
        ("got '4'", "4", {}),
        (r"bits\['head'\] is a whole number from 2 to 8, got 16", {"head": 16}, {}),
        ("empty mapping", {}, {}),
        (r"bits names 'haed'.*did you mean 'head'", {"haed": 4}, {}),
        ("which is excluded too", {"head": 4, "up": 4}, {"exclude": ["head"]}),
        (r"exclude names 'haed'.*did you mean 'head'", 4, {"exclude": ["haed"]}),
        ("exclude is a list", 4, {"exclude": "head"}),
        ("all 6 weights are excluded", 4, {"exclude": NAMES}),
        ("group is None", 4, {"group": 0}),
        ("group is None", 4, {"group": True}),
        ("group is None", 4, {"group": "channel"}),
        (r"no way 'mes'.*did you mean 'mse'", 4, {"scale": "mes"}),
        ("learned_step=True learns scales of symmetric values", 4, {"learned_step": True, "symmetric": False}),
    ]
    for text, bits, settings in bad:
        with pytest.raises(CompressionError, match=text):
            quantize(net, bits, inplace=True, **settings)
    assert not any(map(parametrize.is_parametrized, net.modules()))


def test_bad_models_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    computed = nn.Linear(4, 4)
    torch_prune.identity(computed, "weight")
    broken = nn.Linear(4, 4)
    with torch.no_grad():
        broken.weight[1, 2] = torch.nan
    for text, model in (
        ("model is a torch.nn.Module", Net),
        ("meta device", nn.Linear(4, 4, device="meta")),
        ("nothing to quantize", nn.ReLU()),
        ("tied", tied),
        ("parametrized already", normed),
        ("computed from others", computed),
        ("no shape yet", nn.LazyLinear(4)),
        ("torch.float64; call model.float", nn.Linear(4, 4).double()),
        ("not finite", broken),
        ("of few bits already; compress.finalize", quantize(nn.Linear(4, 4), 4)),
        ("of few bits already", quantize(prune(nn.Linear(4, 4), 0.5), 4)),
    ):
        with pytest.raises(CompressionError, match=text):
            quantize(model, 4)  # type: ignore[arg-type]
