"""Which layers suffer from few bits: traces against exact Hessians, losses against hand-made ones, exact choices."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

import nasbench as nb
from compress.errors import CompressionError
from compress.pruning import masks, prune
from compress.quantization import FakeQuantize, quantize
from compress.sensitivity import LayerSensitivity, Sensitivities, assign_bits, sensitivities
from compress.storage import save
from nasbench.training import validate


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def batch(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 3


def exact_traces(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The trace of the mean loss's Hessian for each layer's effective weight."""
    net, own = net.eval(), {"0": net[0].weight.detach(), "3": net[3].weight.detach()}  # type: ignore[index]
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Identity(), nn.Linear(6, 3))
    biases = {"0.bias": net[0].bias.detach(), "3.bias": net[3].bias.detach()}  # type: ignore[index]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(values: dict[str, Tensor]) -> Tensor:
        named = {f"{name}.weight": value for name, value in values.items()} | biases
        return F.cross_entropy(functional_call(plain, named, (x,)), y)

    found: Any = hessian(loss)(own)
    sizes = {name: weight.numel() for name, weight in own.items()}
    blocks = {name: found[name][name].reshape(size, size) for name, size in sizes.items()}
    kept = {name: mask.flatten() for name, mask in masks(net).items()}
    return {
        name: float(block.diagonal()[kept[name]].sum() if name in kept else block.trace())
        for name, block in blocks.items()
    }


@pytest.mark.parametrize("density", [None, 0.5])
def test_traces_are_those_of_the_exact_hessian(density: float | None) -> None:
    net = mlp() if density is None else prune(mlp(), density)
    batches = [batch(12), batch(5, seed=1)]  # of unequal sizes
    found = sensitivities(net, batches, bits=(2, 4), probes=800)
    expected = exact_traces(net, batches)
    for name, layer in found.layers.items():
        kept = int(masks(net)[name].sum()) if density else net.get_submodule(name).weight.numel()  # type: ignore[union-attr, operator]
        assert layer.weights == kept and layer.trace is not None and layer.trace_error is not None
        assert abs(layer.trace - expected[name] / kept) < 4 * layer.trace_error
        assert layer.trace_error < 0.3 * abs(expected[name] / kept)
        weight: Any = net.get_submodule(name).weight.detach()  # type: ignore[operator, union-attr]
        for bits, harm in layer.harm.items():
            error = float((FakeQuantize.of(weight, bits)(weight) - weight).square().sum())
            assert harm == pytest.approx(layer.trace * error, rel=1e-5)


def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    net = mlp()
    few = [sensitivities(net, batch(), bits=[4], probes=10, seed=seed).layers["0"] for seed in range(60)]
    spread = np.std([layer.trace for layer in few])
    told = np.mean([layer.trace_error for layer in few])
    assert 0.7 < spread / told < 1.4


def test_it_leaves_everything_as_it_was_and_repeats() -> None:
    net = mlp().train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = [sensitivities(net, batch(), method=method, probes=3) for method in ("hessian", "hessian", "measured")]
    assert found[0].to_dict() == found[1].to_dict()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_the_measured_loss_is_that_of_the_model_with_one_layer_of_few_bits(masked: bool) -> None:
    data = nb.data.load("digits")
    net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    nb.fit(net, data, epochs=2, seed=0)
    net = prune(net, 0.5, method="magnitude") if masked else net
    batches = list(data.eval_batches("val", batch_size=100))
    settings: dict[str, Any] = {"group": 16, "symmetric": False, "scale": "max"}
    found = sensitivities(net, batches, bits=(4, 2), method="measured", **settings)
    plain = validate(net, data)
    assert found.bits == (2, 4) and found.accuracy == plain["val_accuracy"]
    assert found.loss == pytest.approx(plain["val_loss"], rel=1e-5)
    for name, layer in found.layers.items():
        assert layer.trace is None and layer.accuracy is not None
        for bits in found.bits:
            expected = validate(quantize(net, {name: bits}, **settings), data)
            assert layer.harm[bits] == pytest.approx(expected["val_loss"] - plain["val_loss"], abs=2e-5)
            assert layer.accuracy[bits] == expected["val_accuracy"]
    assert sum(layer.harm[2] for layer in found.layers.values()) > 0


def test_data_give_training_images_and_never_test_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    data = nb.data.load("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(type(data), "_test_batches", lambda *_: pytest.fail("reads test images"))
    monkeypatch.setattr(type(data), "eval_batches", lambda *_: pytest.fail("reads other splits"))
    found = sensitivities(net, data, method="measured", images=300)
    drawn = data.train_batches(128, seed=0, epoch=0, augment=False)
    same = sensitivities(net, itertools.islice(drawn, 2), method="measured")
    assert found.to_dict() == same.to_dict()
    few = sensitivities(net, data, images=10, probes=2)
    assert few.accuracy is not None and round(10 * few.accuracy, 6).is_integer()


def test_a_loss_of_ones_own_and_targets_that_are_no_classes() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = batch()[0]
    for method in ("hessian", "measured"):
        found = sensitivities(net, (x, torch.zeros(12, 3)), method=method, loss=F.mse_loss, probes=2)
        assert found.accuracy is None and found.loss == pytest.approx(net(x).square().mean().item())
        assert all(layer.accuracy is None for layer in found.layers.values())
        assert "accuracy" not in str(found)


def test_attention_and_a_last_layer_without_curvature() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.unused = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0].mean(1)  # type: ignore[no-any-return]

    found = sensitivities(Net(), (torch.rand(6, 5, 8), torch.arange(6)), probes=4)
    assert list(found.layers) == ["attention.in_proj_weight", "attention.out_proj", "unused"]
    assert found.layers["unused"].harm == {2: 0, 4: 0, 8: 0} and found.layers["unused"].careful(2) == 0
    assert all(abs(found.layers[name].harm[2]) > 0 for name in ("attention.in_proj_weight", "attention.out_proj"))


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    x, y = torch.rand(4, 64), torch.arange(4)
    for settings in ({}, {"group": 64}, {"symmetric": False}):
        found = sensitivities(net, (x, y), bits=(2, 3), method="measured", **settings)  # type: ignore[arg-type]
        sizes = {}
        for bits in (2, 3):
            small = quantize(net, bits, **settings)  # type: ignore[arg-type]
            sizes[bits] = save(small, tmp_path / f"{bits}.safetensors").stat().st_size
        difference = sum(layer.bytes[3] - layer.bytes[2] for layer in found.layers.values())
        assert abs(sizes[3] - sizes[2] - difference) <= 32  # the header is filled up to 8 bytes


def made(harms: list[dict[int, float]], sizes: list[int], bits: tuple[int, ...]) -> Sensitivities:
    layers = {
        f"layer{i}": LayerSensitivity(size, harm, {b: -(-size * b // 8) for b in bits})
        for i, (harm, size) in enumerate(zip(harms, sizes, strict=True))
    }
    return Sensitivities("measured", bits, layers, loss=1.0)


@pytest.mark.parametrize("seed", range(8))
def test_bits_are_assigned_as_trying_all_would(seed: int) -> None:
    rng, bits = np.random.default_rng(seed), (2, 3, 4, 8)
    sizes = [int(size) for size in rng.integers(1, 1000, 5)]
    harms = [{b: float(rng.lognormal(0, 2) * 4.0**-b) for b in bits} for _ in sizes]
    harms[1][4] = -0.5  # counts as 0
    found = made(harms, sizes, bits)
    layers = list(found.layers.values())
    for share in (0.0, 0.1, 0.4, 0.9, 1.0):
        low, high = (sum(layer.bytes[b] for layer in layers) for b in (2, 8))
        budget = int(low + share * (high - low))
        best = min(
            (sum(max(0.0, layer.harm[b]) for layer, b in zip(layers, chosen, strict=True)), size)
            for chosen in itertools.product(bits, repeat=5)
            if (size := sum(layer.bytes[b] for layer, b in zip(layers, chosen, strict=True))) <= budget
        )
        got = assign_bits(found, budget)
        assert list(got) == list(found.layers)
        harm = sum(max(0.0, layer.harm[got[name]]) for name, layer in found.layers.items())
        assert harm == pytest.approx(best[0], rel=1e-12)
        assert sum(layer.bytes[got[name]] for name, layer in found.layers.items()) <= budget
    few = assign_bits(found, 10**9, choices=[3, 2])
    assert few == {name: min((layer.careful(b), b) for b in (2, 3))[1] for name, layer in found.layers.items()}


def test_many_layers_are_assigned_quickly_and_within_budget() -> None:
    rng, bits = np.random.default_rng(0), tuple(range(2, 9))
    sizes = [int(size) for size in rng.integers(1000, 2_000_000, 100)]
    found = made([{b: float(rng.lognormal(0, 2) * 4.0**-b) for b in bits} for _ in sizes], sizes, bits)
    budget = sum(layer.bytes[4] for layer in found.layers.values())
    got = assign_bits(found, budget)
    harm = sum(layer.harm[got[name]] for name, layer in found.layers.items())
    assert budget * 0.999 < sum(layer.bytes[got[name]] for name, layer in found.layers.items()) <= budget
    assert harm < sum(layer.harm[4] for layer in found.layers.values())


def test_an_estimate_below_its_error_counts_as_its_error() -> None:
    sure = LayerSensitivity(10, {2: 4.0}, {2: 3}, trace=2.0, trace_error=0.5)
    unsure = LayerSensitivity(10, {2: 4.0}, {2: 3}, trace=2.0, trace_error=3.0)
    negative = LayerSensitivity(10, {2: -4.0}, {2: 3}, trace=-2.0, trace_error=0.5)
    shrunk = LayerSensitivity(10, {2: -4.0}, {2: 3})
    assert [layer.careful(2) for layer in (sure, unsure, negative, shrunk)] == [4.0, 6.0, 1.0, 0.0]


def test_assigned_bits_beat_equal_bits_of_the_same_bytes() -> None:
    data = nb.data.load("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    nb.fit(net, data, epochs=20, seed=0)
    found = sensitivities(net, data, bits=(2, 3, 4, 5, 6), method="measured")
    budget = sum(layer.bytes[4] for layer in found.layers.values())
    bits = assign_bits(found, budget)
    assert len(set(bits.values())) > 1
    assert validate(quantize(net, bits), data)["val_loss"] < validate(quantize(net, 4), data)["val_loss"]


def test_it_prints_and_is_json() -> None:
    found = sensitivities(mlp(), batch(), bits=(2, 8), probes=3)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "weights", "trace", "±", "2", "bits", "8", "bits"]
    assert lines[1].split()[:2] == ["0", "24"] and len(lines) == 4 and "Hessian" in lines[-1]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.to_dict()["layers"]["3"]["bytes"] == {"2": 5 + 12, "8": 18 + 12}
    assert "accuracy at 8" in str(sensitivities(mlp(), batch(), method="measured"))


def test_the_plot_has_a_dot_for_each_layer_and_number_of_bits(tmp_path: Path) -> None:
    layers = {
        "stem$a$": LayerSensitivity(10, {2: 1.0, 4: 0.1}, {}, trace=1.0, trace_error=0.1),
        "head": LayerSensitivity(3000, {2: -2.0, 4: -0.2}, {}, trace=-1.0, trace_error=0.5),
    }
    figure = Sensitivities("hessian", (2, 4), layers, 0.1).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    axes = figure.axes[0]
    dots = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() == "o" and len(line.get_xdata())
    }  # type: ignore[index, arg-type]
    assert dots == {(1.0, 0), (0.1, 0), (1.0, 1), (0.1, 1)}
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_yticklabels()] == [r"stem\$a\$", "head"]
    nothing = {"a": LayerSensitivity(1, {2: -1.0}, {}), "b": LayerSensitivity(1, {2: float("inf")}, {})}
    Sensitivities("measured", (2,), nothing, 0.1).plot(tmp_path / "empty.svg")


def test_what_makes_no_sense_is_refused() -> None:
    net, some = mlp(), batch()
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("no method 'hesian'.*did you mean 'hessian'", some, {"method": "hesian"}),
        ("bits is empty", some, {"bits": ()}),
        ("from 2 to 8, got 1", some, {"bits": (1, 2)}),
        ("bits are some numbers of bits", some, {"bits": 4}),
        ("bits are some numbers of bits", some, {"bits": "48"}),
        ("from 2 to 8, got 'four'", some, {"bits": (2, "four")}),
        ("at least 2 probes", some, {"probes": 1}),
        ("at least 2 probes, a whole number, got 2.5", some, {"probes": 2.5}),
        ("group is None", some, {"group": -1}),
        ("no way 'min'", some, {"scale": "min"}),
        ("exclude names '1'", some, {"exclude": ["1"]}),
        ("there is no batch", [], {}),
        ("batches are data", 5, {}),
        (r"a batch is \(x, y\)", [some[0]], {}),
        ("there is no loss for a batch x", (torch.rand(4, 5), torch.zeros(4, dtype=torch.long)), {}),
        ("the loss of a batch is one number", some, {"loss": lambda outputs, y: outputs}),
        ("the loss of the model as it is is nan", (some[0] * torch.nan, some[1]), {}),
        ("at least 1 image", nb.data.load("digits"), {"images": 0}),
    ]
    for text, batches, settings in bad:
        with pytest.raises(CompressionError, match=text):
            sensitivities(net, batches, **settings)
    with pytest.raises(CompressionError, match="few bits already"):
        sensitivities(quantize(net, 4), some)
    found = made([{2: 1.0, 4: 0.5}], [100], (2, 4))
    for text, budget, choices in (
        ("8 bits were not tried", 100, [2, 8]),
        ("take 25 bytes with", 24, None),
        ("choices is empty", 24, []),
        ("choices are some numbers of bits", 24, 4),
        ("budget_bytes is a number of bytes, got nan", math.nan, None),
        ("budget_bytes is a number of bytes, got '24'", "24", None),
    ):
        with pytest.raises(CompressionError, match=text):
            assign_bits(found, budget, choices)
