"""Power-of-two weights: only allowed values, the surrogate's gradient, exact arithmetic; trained and converted."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

import nasbench as nb
from compress.errors import CompressionError
from compress.exporting import export
from compress.low_bit import grid, low_bit_of
from compress.low_bit_models import changed_codes, code_snapshot, freeze, low_bits
from compress.models import copy_of
from compress.packing import pack, unpack, unpack_values
from compress.pruning import finalize, prune
from compress.shift import INITS, NEAR, DenseShift, ShiftGrid, dense_shift
from compress.shift_arithmetic import shift_conv2d, shift_linear, shift_multiply
from compress.weights import weights

BITS = (2, 3, 4, 5)
IMAGES = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    """A stem, a block with a shortcut convolution, a grouped one, and a classifier: (B, 1, 8, 8) to (B, 10)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.main = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(32))
            self.shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32))
            self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = F.relu(self.second(self.main(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


INNER = ["main.0", "second.0", "shortcut.0"]


def allowed(bits: int) -> set[float]:
    return {sign * 2.0**exponent for sign in (1, -1) for exponent in range(2 ** (bits - 1))}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=seeded(seed))


def shifted(bits: int = 3, model: nn.Module | None = None, **settings: Any) -> Any:
    return dense_shift(model or Net(), bits, example=IMAGES, **settings)


@cache
def trained() -> tuple[Any, Any]:
    data = nb.data.load("digits")
    return data, nb.fit(Net(), data, epochs=12, device="cpu", progress=False)


def accuracy(model: nn.Module) -> float:
    return float(nb.validate(model, trained()[0])["val_accuracy"])


# Values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_every_value_is_a_power_of_two_exactly_and_never_zero(bits: int, kind: torch.dtype) -> None:
    latents = torch.randn(2 ** (bits - 1), 40, 50, generator=seeded(bits)).to(kind)
    latents[:, :4] = 0  # as are latents that are exactly zero
    latents[:, 4] = -0.0
    weight = DenseShift(bits)(latents.flatten(0, 1))
    assert weight.dtype == kind and set(weight.unique().tolist()) <= allowed(bits)
    assert bool((weight[:5] == 1).all()), "sgn(0) is +, and 1[0 > 0] is 0"
    assert set(weight.unique().tolist()) == allowed(bits) or bits > 4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_those_of_the_recursion(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    for signs in itertools.product((0.5, -0.5), repeat=largest + 1):
        shift = 0
        for t in signs[1:]:
            shift = (shift + 1) * (t > 0)
        value = DenseShift(bits)(torch.tensor(signs))
        assert value.tolist() == [math.copysign(2**shift, signs[0])]


class _Through(torch.autograd.Function):
    """A step function with the identity's gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor, sign: bool) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype) if sign else (x > 0).to(x.dtype)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def by_hand(latents: Tensor) -> Tensor:
    """sgn(w) sqrt(S + 1), with w~ + (w - w~).detach() in place of the value."""
    step: Callable[..., Any] = _Through.apply
    sign, shift = step(latents[0], True), torch.zeros_like(latents[0])
    for t in latents[1:]:
        shift = (shift + 1) * step(t, False)
    surrogate = sign * (shift + 1).sqrt()
    value: Tensor = surrogate + (sign * 2**shift - surrogate).detach()
    return value


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_is_that_of_the_hand_formula(bits: int) -> None:
    latents = torch.randn(2 ** (bits - 1), 6, 7, dtype=torch.float64, generator=seeded(bits))
    latents[0, 0] = 0
    one, two = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    outer = torch.randn(6, 7, dtype=torch.float64, generator=seeded(1))
    value, expected = DenseShift(bits)(one.flatten(0, 1)), by_hand(two)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (value * outer).sum().backward()
    (expected * outer).sum().backward()
    assert one.grad is not None and bool(one.grad[0].all()), "a sign always has a gradient"
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-14)


CONSEQUENCES: dict[
    int, tuple[list[float], float, list[float]]
] = {  # bits: P(S = 0, 1, ...), standard deviation of the weight, shares of t_1, ... without gradient
    2: ([0.5, 0.5], 1.58, [0]),
    3: ([0.5, 0.25, 0.125, 0.125], 3.39, [0.75, 0.5, 0]),
    4: ([0.5, 0.25, 0.125], 13.5, [0.985, 0.97, 0.94, 0.87, 0.75, 0.5, 0]),
}


@pytest.mark.parametrize("bits", CONSEQUENCES)
@pytest.mark.parametrize("init", ["scratch", "low_variance"])
def test_how_random_weights_are_distributed(bits: int, init: str) -> None:
    shares, spread, dead = CONSEQUENCES[bits]
    layer: Any = dense_shift(nn.Linear(200, 400, bias=False), bits, init=init, include_ends=True)
    layer.weight.sum().backward()
    weight, latents = layer.weight.detach(), weights(layer)["weight"].parameter
    assert latents.shape == (2 ** (bits - 1) * 400, 200) and abs(float(latents.detach().mean())) < 1e-3
    expected = math.sqrt(2 / 400) if init == "scratch" else NEAR
    assert float(latents.detach().std()) == pytest.approx(expected, rel=0.01)
    for exponent, share in enumerate(shares):
        assert float((weight.abs() == 2**exponent).float().mean()) == pytest.approx(share, abs=0.01)
    assert float((weight > 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(weight.std()) == pytest.approx(spread, rel=0.03)
    assert latents.grad is not None
    zero = (latents.grad == 0).float().view(2 ** (bits - 1), -1).mean(1).tolist()
    assert zero == pytest.approx([0.0, *dead], abs=0.01)


def test_latents_take_the_memory_format_of_images() -> None:
    model = dense_shift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 3, include_ends=True)
    x, expected = torch.rand(2, 3, 8, 8), [layer.weight.clone() for layer in model]  # type: ignore[union-attr]
    moved = model.to(memory_format=torch.channels_last)
    assert all(torch.equal(a.weight, b) for a, b in zip(moved, expected, strict=True))  # type: ignore[arg-type]
    moved(x.contiguous(memory_format=torch.channels_last)).sum().backward()


# Codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_values_are_inverse(bits: int) -> None:
    own = ShiftGrid(bits)
    codes = torch.arange(2**bits, dtype=torch.uint8)
    values = own.values(codes)
    assert values.dtype == torch.float32 and set(values.tolist()) == allowed(bits)
    assert torch.equal(own.codes(values), codes)
    for code, value in zip(codes.tolist(), values.tolist(), strict=True):
        assert code == (value < 0) << bits - 1 | round(math.log2(abs(value)))
    assert torch.equal(own.nearest(values), values)
    assert torch.equal(DenseShift(bits)(DenseShift(bits).right_inverse(values)), values)
    assert own.frozen() is own and type(DenseShift(bits).frozen()) is ShiftGrid
    assert torch.equal(own(values), values), "frozen, it is the identity"


@pytest.mark.parametrize(("bits", "size"), [(2, 1153), (3, 1729), (4, 2305)])
def test_4609_weights_packed(bits: int, size: int) -> None:
    layer: Any = dense_shift(nn.Linear(419, 11, bias=False), bits, include_ends=True)
    own = ShiftGrid(bits)
    codes = own.codes(layer.weight)
    packed = pack(codes, bits)
    assert codes.numel() == 4609 and len(packed) == size
    assert torch.equal(own.values(unpack(packed, bits, 4609)).view(11, 419), layer.weight)
    assert torch.equal(unpack_values(packed, bits, 4609, own.table()).view(11, 419), layer.weight)


def test_what_is_not_on_the_grid_has_no_code() -> None:
    for value in (0.0, 3.0, 16.0, 0.5, math.inf, math.nan, -1.5):
        with pytest.raises(CompressionError, match=r"one of ±1, ±2, \.\.\., ±2\^3, found"):
            ShiftGrid(3).codes(torch.tensor([1.0, value]))
    with pytest.raises(CompressionError, match="found 1"):
        ShiftGrid(3).codes(torch.tensor([1 + 1e-12], dtype=torch.float64))


@pytest.mark.parametrize("bits", BITS)
def test_the_nearest_value_is_the_nearest(bits: int) -> None:
    weight = torch.randn(3000, dtype=torch.float64, generator=seeded()) * 2 ** (bits - 1)
    table = torch.tensor(sorted(allowed(bits)), dtype=torch.float64)
    expected = table[(weight.unsqueeze(1) - table).abs().argmin(1)]
    assert torch.equal(ShiftGrid(bits).nearest(weight), expected)
    latents = DenseShift(bits).right_inverse(weight)
    assert torch.equal(DenseShift(bits)(latents), expected)
    assert float(latents.abs().max()) <= NEAR and latents.shape == (2 ** (bits - 1) * 3000,)
    assert DenseShift(bits)(DenseShift(bits).right_inverse(torch.zeros(3))).tolist() == [1.0] * 3


def test_the_grid_of_a_file() -> None:
    assert grid("shift") is ShiftGrid
    assert ShiftGrid.restore(4, (2, 3), {}, {}).bits == 4 and ShiftGrid(4).fields() == ShiftGrid(4).arrays() == {}
    with pytest.raises(CompressionError, match="from 2 to 8"):
        ShiftGrid.restore(9, (2, 3), {}, {})
    with pytest.raises(CompressionError, match="nothing but its bits, got scale"):
        ShiftGrid.restore(4, (2, 3), {}, {"scale": torch.ones(1)})


# Models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("init", INITS)
def test_all_but_the_ends_are_powers_of_two(bits: int, init: str) -> None:
    net: Any = Net()
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    model: Any = shifted(bits, net, init=init)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert list(low_bits(model)) == INNER
    for name in INNER:
        weight = weights(model)[name]
        assert set(model.get_submodule(name).weight.unique().tolist()) <= allowed(bits)
        old = weights(net)[name]
        assert (weight.shape, weight.size) == (old.shape, old.size)
        assert weight.parameter.shape == (2 ** (bits - 1) * old.shape[0], *old.shape[1:])
    for end in ("stem.0", "head"):
        assert torch.equal(model.get_submodule(end).weight, net.get_submodule(end).weight)
        assert type(model.get_submodule(end).weight) is nn.Parameter
    count = sum(2 ** (bits - 1) * weights(net)[name].size for name in INNER)
    rest = sum(p.numel() for p in net.parameters()) - sum(weights(net)[name].size for name in INNER)
    assert sum(p.numel() for p in model.parameters()) == count + rest


def test_ends_names_and_seeds() -> None:
    assert list(low_bits(shifted(include_ends=True))) == ["stem.0", *INNER, "head"]
    assert list(low_bits(shifted(exclude=["main"]))) == INNER[1:]
    mixed = dense_shift(Net(), {"head": 2, "main.0": 5})
    assert {name: step.bits for name, step in low_bits(mixed).items()} == {"main.0": 5, "head": 2}
    same, other = shifted(seed=3), shifted(seed=4)
    assert changed_codes(same, shifted(seed=3)).all_codes == 0
    assert changed_codes(same, other).all_codes == pytest.approx(0.8, abs=0.1)
    linear = dense_shift(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), example=torch.zeros(2, 8))
    assert list(low_bits(linear)) == ["0"], "a first linear layer is no stem"


def test_inplace_keeps_parameter_objects() -> None:
    net = Net()
    before = [id(p) for p in net.parameters()]
    assert shifted(3, net, inplace=True) is net
    assert sorted(id(p) for p in net.parameters()) == sorted(before)
    assert freeze(net, inplace=True) is net and finalize(net, inplace=True) is net
    assert sorted(id(p) for p in net.parameters()) == sorted(before)


def test_attention_and_other_layers() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = dense_shift(block, 3, example=torch.zeros(2, 4, 8))
    assert list(low_bits(model)) == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1"]
    x = torch.randn(2, 4, 8, generator=seeded())
    plain = finalize(model).eval()
    torch.testing.assert_close(model.eval()(x), plain(x))
    turned: Any = dense_shift(nn.ConvTranspose2d(4, 6, 3), 2, include_ends=True)
    assert turned(torch.rand(1, 4, 5, 5)).shape == (1, 6, 7, 7)


def steps(model: Any, count: int, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(images(16, step)), torch.arange(16) % 10).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_any_optimizer_moves_latents_and_values_stay_on_the_grid(name: str) -> None:
    model = shifted(3, init="low_variance")
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    before, ends = code_snapshot(model), model.head.weight.detach().clone()
    steps(model, 5, optimizer)
    changes = changed_codes(before, model)
    assert 0 < changes.all_signs < changes.all_codes
    for module in map(model.get_submodule, INNER):
        assert set(module.weight.unique().tolist()) <= allowed(3)
    assert not torch.equal(model.head.weight, ends), "what is float is trained, too"


def test_state_dict_copies_and_files(tmp_path: Path) -> None:
    model = shifted(3)
    twin = shifted(3, seed=1)
    steps(model, 2, torch.optim.SGD(model.parameters(), 0.1))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(model.eval()(images()), twin.eval()(images()))
    copied = copy_of(model)
    frozen, plain = freeze(copied), finalize(copied)
    for other in (copied, frozen, plain, copy.deepcopy(frozen)):
        assert torch.equal(other.eval()(images()), model(images()))
    before = code_snapshot(model)
    steps(copied, 3, torch.optim.SGD(copied.parameters(), 1.0))
    assert changed_codes(before, model).all_codes == 0 and changed_codes(before, copied).all_codes > 0


@pytest.mark.parametrize("bits", [*BITS, 8])
@pytest.mark.parametrize("init", INITS)
def test_frozen_and_final_models_compute_the_same(bits: int, init: str) -> None:
    model = shifted(bits, init=init).eval()
    outputs = model(images())
    frozen, plain = freeze(model), finalize(model)
    for other in (frozen, plain, finalize(frozen), freeze(frozen)):
        assert torch.equal(other.eval()(images()), outputs)
    for name in INNER:
        weight = weights(frozen)[name]
        assert type(weight.low_bit) is ShiftGrid and weight.low_bit.bits == bits
        assert not weight.parameter.requires_grad and tuple(weight.parameter.shape) == weight.shape
        assert set(weight.parameter.unique().tolist()) <= allowed(bits)
        layer = plain.get_submodule(name)
        assert type(layer) is nn.Conv2d and type(layer.weight) is nn.Parameter and layer.weight.requires_grad
        assert type(weights(finalize(frozen))[name].module.weight) is nn.Parameter
        assert weights(finalize(frozen))[name].parameter.requires_grad
        assert low_bit_of(layer, "weight") is None
    assert changed_codes(model, frozen).all_codes == 0
    assert plain.state_dict().keys() == Net().state_dict().keys()
    assert low_bits(model).keys() == low_bits(frozen).keys(), "the model keeps its latents"
    assert type(low_bits(model)["main.0"]) is DenseShift


def test_a_final_model_trains_and_is_pruned_and_shifted_again() -> None:
    plain: Any = finalize(freeze(shifted(3)))
    steps(plain, 1, torch.optim.SGD(plain.parameters(), 0.1))
    assert set(plain.main[0].weight.unique().tolist()) - allowed(3)
    assert list(low_bits(shifted(2, finalize(prune(plain, 0.5))))) == INNER


def test_folding_batch_norm_keeps_codes_whole() -> None:
    model = shifted(3)
    steps(model, 3, torch.optim.SGD(model.parameters(), 0.1))
    plain: Any = finalize(model).eval()
    conv, norm = plain.main[0], plain.main[1]
    folded = fuse_conv_bn_eval(conv, norm)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    values = folded.weight / factor.view(-1, 1, 1, 1)
    torch.testing.assert_close(values, conv.weight, rtol=1e-6, atol=0)
    assert torch.equal(
        ShiftGrid(3).codes(values.sign() * 2 ** values.abs().log2().round()), ShiftGrid(3).codes(conv.weight)
    )
    x = torch.rand(4, 16, 8, 8, generator=seeded())
    torch.testing.assert_close(folded(x), norm(conv(x)), rtol=1e-4, atol=1e-4)


def test_onnx_has_the_exact_values(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx

    model = shifted(3)
    assert export(model, tmp_path / "model.onnx", example=images(2)) < 1e-4
    file = onnx.load(tmp_path / "model.onnx")
    stored = [torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in file.graph.initializer]
    for name in INNER:  # whose batch norm the exporter may have folded into it, channel by channel
        weight = model.get_submodule(name).weight.detach()
        found = [x for x in stored if x.shape == weight.shape]
        scales = [(x / weight).flatten(1) for x in found]
        assert any(bool(((scale - scale[:, :1]).abs() <= 1e-6 * scale[:, :1].abs()).all()) for scale in scales), name
    assert type(low_bits(model)["main.0"]) is DenseShift


@pytest.mark.parametrize(("bits", "least"), [(2, 0.6), (3, 0.6), (4, 0.3)])
def test_training_on_digits_learns(bits: int, least: float) -> None:
    data, _ = trained()
    model = shifted(bits, init="low_variance")
    before = code_snapshot(model)
    nb.fit(model, data, epochs=10, device="cpu", progress=False)
    assert accuracy(model) > least  # chance is 0.1
    assert changed_codes(before, model).all_codes > 0.05
    for name in INNER:
        assert set(model.get_submodule(name).weight.unique().tolist()) <= allowed(bits)


# Conversion --------------------------------------------------------------------------------------------------------


def test_conversion_keeps_accuracy_at_4_bits() -> None:
    data, model = trained()
    start = accuracy(model)
    assert start > 0.85
    found = {bits: shifted(bits, model, init="convert") for bits in (2, 3, 4)}
    assert accuracy(found[4]) > start - 0.1
    assert accuracy(found[3]) > start - 0.15
    nb.recalibrate(found[2], data)
    assert 0.4 < accuracy(found[2])  # two sizes of weight are few; see what training does
    for bits in (2, 4):
        before = code_snapshot(found[bits])
        nb.fit(found[bits], data, epochs=4, device="cpu", progress=False)
        assert accuracy(found[bits]) > start - 0.05
        assert 0.02 < changed_codes(before, found[bits]).all_codes < 0.5, "at any number of bits, codes go on changing"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_takes_up_the_scale_exactly(training: bool, affine: bool) -> None:
    """A weight that is on the grid up to a factor for each channel is converted without any change."""
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3, affine=affine)
    net = nn.Sequential(conv, norm).double()
    x = torch.rand(64, 3, 6, 6, dtype=torch.float64, generator=seeded())
    scale = torch.tensor([0.003, 0.02, 0.1, 1.0, 7.0], dtype=torch.float64).view(-1, 1, 1, 1)
    codes = torch.randint(0, 8, (5, 3, 3, 3), dtype=torch.uint8, generator=seeded(1))
    codes[:, 0, 0, 0] = 3  # 2^3, the largest, is in every channel
    with torch.no_grad():
        conv.weight.copy_(ShiftGrid(3).values(codes) * scale)
        y = conv(x)
        norm.running_mean, norm.running_var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        if affine:
            norm.weight.copy_(torch.randn(5, generator=seeded(2)))
            norm.bias.copy_(torch.randn(5, generator=seeded(3)))
    model: Any = dense_shift(net, {"0": 3}, init="convert", example=x)
    assert torch.equal(ShiftGrid(3).codes(model[0].weight), codes)
    tolerance = 1e-9 if affine else 1e-2  # without a weight it cannot make up for its eps
    expected, found = (one.train(training)(x) for one in (copy.deepcopy(net), model))
    if affine:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:  # what eps adds to a variance of 1e-5 and of 1000 is not the same; the largest scales show no difference
        torch.testing.assert_close(found[:, 3:], expected[:, 3:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [1e-12, 1e-21, 1e-29])
def test_channels_that_weight_decay_left_dead_are_converted(size: float, training: bool) -> None:
    """Networks as they are published have them: the variance behind some is the least number that is not 0."""
    net: Any = Net().train(training)
    conv, norm, _ = net.main
    with torch.no_grad():
        conv.weight[2] *= size
        conv.bias[2] *= size
        norm.running_mean[2], norm.running_var[2] = 0, max(size**2, 2.0**-149)
        norm.weight[2], norm.bias[2] = 0.5, 0.25
    model: Any = shifted(4, net, init="convert")
    weight = model.main[0].weight[2]
    assert torch.equal(weight > 0, conv.weight[2] > 0) and float(weight.detach().abs().max()) > 8
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    x = torch.rand(4, 16, 8, 8, generator=seeded())
    torch.testing.assert_close(model.main(x)[:, 2], net.main(x)[:, 2])
    steps(model, 1, torch.optim.SGD(model.parameters(), 0.1))
    assert bool(model.eval()(images()).isfinite().all())


def test_layers_that_no_norm_follows_stay_float() -> None:
    net: Any = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    net = net.extend([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)])
    assert list(low_bits(shifted(3, net, init="convert"))) == ["5"]
    assert list(low_bits(shifted(3, net, init="convert", include_ends=True))) == ["0", "5"]
    with pytest.raises(CompressionError, match="'3' cannot be converted: no batch norm follows it"):
        dense_shift(net, {"3": 3, "5": 3}, init="convert", example=IMAGES)
    with torch.no_grad():
        net[5].weight[2] = 0
    with pytest.raises(CompressionError, match="'5' cannot be converted: a channel has only zeros"):
        dense_shift(net, {"5": 3}, init="convert", example=IMAGES)
    mlp = nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    )
    with pytest.raises(CompressionError, match="'1' cannot be converted: no batch norm follows it"):
        dense_shift(mlp, 3, init="convert", example=torch.zeros(2, 4, 8))
    with pytest.raises(CompressionError, match="batch norms of TransformerEncoderLayer cannot be found"):
        dense_shift(nn.TransformerEncoderLayer(8, 2, 16), 3, init="convert", example=torch.zeros(2, 4, 8))


def test_a_norm_over_another_axis_takes_up_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))  # (N, 6, 4): over positions
    with pytest.raises(CompressionError, match="no batch norm follows it"):
        dense_shift(net, {"0": 3}, init="convert", example=torch.zeros(2, 6, 4))
    assert list(low_bits(dense_shift(net, {"0": 3}, init="convert", example=torch.zeros(2, 4)))) == ["0"]


# Arithmetic --------------------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    number = ~(a.isnan() & b.isnan())
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(kind)[number], b.view(kind)[number])


@pytest.mark.parametrize("bits", range(2, 9))
def test_products_of_float32_have_every_bit(bits: int) -> None:
    random = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int32, generator=seeded(bits)).view(torch.float32)
    small = torch.randint(0, 2**24, (2000,), dtype=torch.int32, generator=seeded(bits)).view(torch.float32)
    powers = torch.tensor([2.0**-149, 2.0**-127, 2.0**-126, 0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, 1.0])
    x = torch.cat([random, small, -small, powers, -powers]).unsqueeze(1)
    codes = torch.arange(2**bits, dtype=torch.uint8)
    table = ShiftGrid(bits).table()
    assert same_bits(shift_multiply(x, codes, bits), x * table)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_products_of_every_float16_have_every_bit(bits: int) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).unsqueeze(1)
    codes = torch.arange(2**bits, dtype=torch.uint8)
    assert same_bits(shift_multiply(x, codes, bits), x * ShiftGrid(bits).table().half())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_an_unguarded_addition_is_wrong_where_ours_is_right(kind: torch.dtype) -> None:
    """What the guards are for: 0.0 with 3 added to its exponent is a number."""
    integer, mantissa = (torch.int32, 23) if kind == torch.float32 else (torch.int16, 10)
    zero, code = torch.zeros(1, dtype=kind), torch.tensor([3], dtype=torch.uint8)
    assert float((zero.view(integer) + (3 << mantissa)).view(kind)) > 0
    assert float(shift_multiply(zero, code, 3)) == 0


@pytest.mark.parametrize("settings", [{}, {"stride": (2, 1), "padding": (1, 2)}, {"dilation": (2, 2)}, {"groups": 2}])
def test_a_convolution_by_shifts_is_the_convolution(settings: Any) -> None:
    groups = settings.get("groups", 1)
    codes = torch.randint(0, 16, (6, 4 // groups, 3, 3), dtype=torch.uint8, generator=seeded())
    weight = ShiftGrid(4).values(codes)
    x = torch.randn(2, 4, 9, 8, generator=seeded(1))
    found = shift_conv2d(x, codes, 4, **settings)
    torch.testing.assert_close(found, F.conv2d(x, weight, **settings), rtol=1e-5, atol=1e-3)  # sums of up to 128 x
    whole = torch.randint(-128, 128, (2, 4, 9, 8), generator=seeded(2), dtype=torch.int8)
    found = shift_conv2d(whole, codes, 4, **settings)
    assert found.dtype == torch.int64
    assert torch.equal(found.double(), F.conv2d(whole.double(), weight.double(), **settings))


def test_a_model_by_shifts() -> None:
    """A whole frozen layer, with what its convolution says of stride and padding."""
    model = freeze(shifted(3)).eval()
    conv: Any = model.get_submodule("main.0")
    codes = ShiftGrid(3).codes(conv.weight)
    x = torch.rand(2, 16, 8, 8, generator=seeded())
    found = shift_conv2d(x, codes, 3, stride=conv.stride, padding=conv.padding, groups=conv.groups)
    torch.testing.assert_close(found + conv.bias.view(-1, 1, 1), conv(x))
    torch.testing.assert_close(
        shift_conv2d(x, codes, 3, padding="same"), F.conv2d(x, conv.weight, padding="same"), rtol=1e-4, atol=1e-4
    )


def test_a_linear_layer_by_shifts() -> None:
    codes = torch.randint(0, 8, (5, 7), dtype=torch.uint8, generator=seeded())
    weight, x = ShiftGrid(3).values(codes), torch.randn(2, 3, 7, generator=seeded(1))
    assert same_bits(shift_linear(x, codes, 3), (x.unsqueeze(-2) * weight).sum(-1))
    torch.testing.assert_close(shift_linear(x, codes, 3), F.linear(x, weight))
    half = x.half()
    assert same_bits(shift_linear(half, codes, 3), (half.unsqueeze(-2) * weight.half()).sum(-1))
    whole = torch.randint(-9, 9, (4, 7), generator=seeded(2))
    assert torch.equal(shift_linear(whole, codes, 3), whole @ weight.long().T)


def test_arithmetic_refuses() -> None:
    codes = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(CompressionError, match="float32 and float16 only, got torch.float64"):
        shift_multiply(torch.zeros(2, dtype=torch.float64), codes, 3)
    with pytest.raises(CompressionError, match="codes of 2 to 5 bits, got torch.int32 and 6"):
        shift_multiply(torch.zeros(2, dtype=torch.int32), codes, 6)
    with pytest.raises(CompressionError, match="from 2 to 8"):
        shift_linear(torch.zeros(2), codes, 1)
    for wrong in (codes + 8, codes.long(), codes.float()):
        with pytest.raises(CompressionError, match=r"codes are torch.uint8 below 8, of `ShiftGrid\(3\)"):
            shift_multiply(torch.zeros(2), wrong, 3)
    x, kernel = torch.zeros(1, 4, 5, 5), torch.zeros(6, 2, 3, 3, dtype=torch.uint8)
    shift_conv2d(x, kernel, 3, groups=2)
    settings: list[tuple[Tensor, dict[str, Any]]] = [(x, {}), (x, {"groups": 4}), (x[0], {"groups": 2})]
    for given, groups in settings:
        with pytest.raises(CompressionError, match=r"x is \(N, in, H, W\) and codes are .* with groups="):
            shift_conv2d(given, kernel, 3, **groups)
    for padding in ("sme", 1):
        with pytest.raises(CompressionError, match="padding is 'valid', 'same' or two widths, got"):
            shift_conv2d(x, kernel, 3, groups=2, padding=padding)  # type: ignore[arg-type]


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 9, 0, 2.5, True, "3", None])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(CompressionError, match="from 2 to 8"):
        dense_shift(Net(), bits, example=IMAGES)
    with pytest.raises(CompressionError, match="from 2 to 8"):
        dense_shift(Net(), {"main.0": bits}, example=IMAGES)


def test_refusals_leave_the_model_alone() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def refused(match: str, model: Any = net, bits: Any = 3, **settings: Any) -> None:
        with pytest.raises(CompressionError, match=match):
            dense_shift(model, bits, inplace=True, **({"example": IMAGES} | settings))

    refused(r"no init 'transfer'", init="transfer")
    refused(r"exclude names 'mian'", exclude=["mian"])
    refused(r"bits names 'main', which is no weight of the model; did you mean", bits={"main": 3})
    refused(r"bits names 'main\.0', which is excluded too", bits={"main.0": 3, "head": 2}, exclude=["main"])
    refused(r"empty mapping", bits={})
    refused(r"Give example=x, a batch that it takes", example=torch.zeros(1, 3, 8, 8))
    refused(r"meta device", copy.deepcopy(net).to("meta"))
    refused(r"weights are excluded", exclude=INNER)
    refused(r"model is a torch\.nn\.Module", {})
    refused(r"'main\.0' is masked already", prune(net, 0.5))
    refused(r"'main\.0' is of few bits already; compress\.finalize", shifted(3))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    refused(r"is tied", tied, example=torch.zeros(2, 4))
    broken: Any = copy.deepcopy(net)
    with torch.no_grad():
        broken.main[0].weight[0, 0, 0, 0] = math.inf
    refused(r"'main\.0' has weights that are infinite", broken, init="convert")
    empty = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    empty[1].weight = nn.Parameter(torch.zeros(0, 4))
    refused(r"the weight of '1' is empty: \(0, 4\)", empty, example=torch.zeros(2, 4), include_ends=True)
    assert not low_bits(empty)
    refused(r"'0' is torch\.float16, whose range is too small", nn.Sequential(nn.Linear(4, 4)).half(), bits={"0": 6})
    assert not low_bits(net) and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_snapshots_of_other_models_are_not_compared() -> None:
    with pytest.raises(CompressionError, match="has no weights of few bits"):
        code_snapshot(Net())
    with pytest.raises(CompressionError, match="not the same before and after: 'main.0' differ"):
        changed_codes(shifted(3), shifted(3, exclude=["main"]))


def test_changed_codes_counts() -> None:
    layer: Any = dense_shift(nn.Linear(5, 4), 3, include_ends=True)
    before = code_snapshot(layer)
    weight = layer.weight.detach().clone()
    weight[0, 0] *= -1
    weight[1] = torch.where(weight[1].abs() == 8, 4, 8) * weight[1].sign()
    layer.weight = weight
    changes = changed_codes(before, layer)
    assert (changes.all_codes, changes.all_signs) == (6 / 20, 1 / 20)
    assert changes.codes == {"weight": 0.3} and changes.signs == {"weight": 0.05}
    assert str(changes).splitlines()[-1].split() == ["all", "0.3000", "0.0500"]
