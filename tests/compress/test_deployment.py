"""Deployed networks: int8 as onnxruntime has it, float bit for bit, packed layers exactly, by a policy of layers."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasbench as nb
from compress.deployment import Deployed, Deployer, to_int8
from compress.errors import CompressionError
from compress.exporting import export
from compress.low_bit_models import low_bits
from compress.pruning import finalize, prune
from compress.quantization import quantize
from compress.shift import dense_shift
from compress.weights import weights

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block, with a layer that is called twice, one whose products are a MatMul, and one that is unused."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.MaxPool2d(2)
        self.mix = nn.Linear(16, 16)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool((x + self.two(self.one(x))).relu())
        x = self.mix(self.mix(x.permute(0, 2, 3, 1)).relu())
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


LAYERS = ["stem.0", "one.0", "two.0", "mix", "head"]


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.stem[1], model.one[1], model.two[1]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    with torch.no_grad():
        model.stem[1].weight[3] = 0.0  # a channel of which nothing is left
    return model.eval()


@pytest.fixture(scope="module")
def deployer() -> Deployer:
    return Deployer(net(), X)


def session(path: str | Path, optimized: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: str | Path, x: Tensor) -> Tensor:
    return torch.from_numpy(session(path).run(None, {"input": x.numpy()})[0])


def operators(deployed: Deployed) -> Counter[str]:
    """Return what onnxruntime computes when it runs the file."""
    session(deployed.save("deployed.onnx"), Path("optimized.onnx"))
    return Counter(node.op_type for node in onnx.load("optimized.onnx").graph.node)


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def test_all_float_is_the_float_session_bit_for_bit(deployer: Deployer) -> None:
    deployed = deployer.deploy(dict.fromkeys(LAYERS, "float32"), threads=1)
    export(net(), "float.onnx", example=X)
    assert torch.equal(deployed(X), run("float.onnx", X))
    assert torch.equal(deployer.deploy({}, threads=1)(X), deployed(X))
    assert set(deployed.policy.values()) == {"float32"}
    assert deployed.bytes < Path("float.onnx").stat().st_size, "without what only people read"


def test_all_int8_is_plain_static_quantization_bit_for_bit(deployer: Deployer) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter([{"input": X.numpy()}])

        def get_next(self) -> Any:
            return next(self.rest, None)

    export(net(), "float.onnx", example=X)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static("float.onnx", "int8.onnx", Reader(), per_channel=True, **kinds)
    deployed = deployer.deploy(threads=1)
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(str(deployed.save("own.onnx")), x), run("int8.onnx", x))
    assert torch.equal(deployer.deploy(dict.fromkeys(LAYERS, "int8"), threads=1)(x), deployed(x))
    assert deployed.policy == dict.fromkeys(LAYERS, "int8") | {"unused": "float32"}
    assert list(deployed.kept_float) == ["unused"]
    assert 0 < distance(deployed(x), net()(x).detach()) < 0.05


def test_int8_layers_compute_in_int8(deployer: Deployer) -> None:
    found = operators(deployer.deploy())
    assert found["QLinearConv"] == 3
    assert found["QGemm"] == 1
    assert found["QLinearMatMul"] == 2, "one layer is called twice"
    assert found["QLinearAdd"] == 3, "two of them of biases"
    assert not {"Conv", "Gemm", "MatMul", "Add"} & found.keys()


def test_between_int8_and_float_layers_is_float(deployer: Deployer) -> None:
    found = operators(deployer.deploy({"stem.0": "int8", "one.0": "int8"}))
    assert found["QLinearConv"] == 2
    assert found["Conv"] == 1
    assert found["QLinearAdd"] == 0
    found = operators(deployer.deploy({"stem.0": "int8", "one.0": "int8", "two.0": "int8"}))
    assert found["QLinearAdd"] == 1, "both sides are int8"
    assert found["QGemm"] == 0


@pytest.mark.parametrize("option", [*(f"weights{bits}" for bits in range(2, 9)), "shift2", "shift3", "shift4"])
def test_packed_layers_compute_with_the_values_of_their_codes(option: str, deployer: Deployer) -> None:
    from onnx import numpy_helper

    deployed = deployer.deploy(dict.fromkeys(LAYERS, option), threads=1)
    plain = deployer.deploy({}, threads=1)
    model = onnx.load_from_string(plain._content)
    for name in LAYERS:
        coded, layer = deployer._code(name, option), deployer._graph.layers[name]
        value = (coded.table[coded.codes.int()] * coded.scale).reshape(layer.weight.shape)
        assert distance(value, layer.weight) < {"2": 0.7, "3": 0.4}.get(option[-1], 0.25)
        value = value.T if layer.operator == "MatMul" else value
        (place,) = (one for one in model.graph.initializer if one.name == layer.initializer)
        place.CopyFrom(numpy_helper.from_array(value.contiguous().numpy(), layer.initializer))
    onnx.save(model, "values.onnx")
    assert torch.equal(deployed(X), run("values.onnx", X))
    assert operators(deployed) == operators(plain), "unpacked when the file is opened"
    assert deployed.policy["mix"] == option


def test_a_layer_takes_as_many_bits_as_asked(deployer: Deployer) -> None:
    count, whole = weights(net())["two.0"].size, deployer.deploy({}).bytes
    for bits in range(2, 9):
        deployed = deployer.deploy({"two.0": f"weights{bits}"})
        arrays = {one.name: len(one.raw_data) for one in onnx.load_from_string(deployed._content).graph.initializer}
        assert arrays["two.0.weight/codes"] == count * bits // 8
        assert "two.0.weight" not in arrays
        saved = 4 * count - count * bits // 8 - 4 * 2**bits - 4 * 16  # codes, table and scales are in the file
        assert 0 < deployed.bytes - (whole - saved) < 2500, "the function that unpacks them"


def test_mixtures(deployer: Deployer) -> None:
    policy = {"stem.0": "int8", "one.0": "weights5 asymmetric", "two.0": "shift3", "mix": "int8 asymmetric"}
    deployed = deployer.deploy(policy, threads=1)
    assert deployed.policy == policy | {"head": "float32", "unused": "float32"}
    assert not deployed.kept_float
    assert distance(deployed(X), net()(X).detach()) < 0.4
    assert torch.equal(deployer.deploy(policy, threads=1)(X), deployed(X))
    assert deployer.deploy(policy)._content == deployed._content


def test_a_file_has_its_layers_in_one_order_in_all_processes(deployer: Deployer) -> None:
    deployed = deployer.deploy(dict.fromkeys(reversed(LAYERS), "weights4"))
    names = [one.name for one in onnx.load_from_string(deployed._content).graph.initializer]
    codes = [deployer._graph.layers[name].initializer + "/codes" for name in LAYERS]
    assert [name for name in names if name in codes] == codes


def test_int8_sums_do_not_overflow() -> None:
    """Without VNNI, x86 processors add two products of eight bits in 16, unless told otherwise."""
    model = nn.Sequential(nn.Conv2d(64, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x = torch.rand(8, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    deployed = to_int8(model, x, threads=1)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # rounded, computed in float
    (wanted,) = onnxruntime.InferenceSession(deployed._content, options).run(None, {"input": x.numpy()})
    step = float(wanted.max()) / 255
    assert float((deployed(x) - torch.from_numpy(wanted)).abs().max()) < 1.01 * step


def test_norms_of_equal_numbers_compute_in_int8(caplog: pytest.LogCaptureFixture) -> None:
    """As new ones are, they are one array in the exported graph."""
    layers = [nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.LayerNorm(32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 3)).eval()
    x = torch.rand(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    deployer = Deployer(model, x)
    caplog.clear()
    for option in ("int8", "int8 asymmetric"):
        deployed = deployer.deploy(dict.fromkeys(["1", "4", "7", "9"], option), threads=1)
        assert 0 < distance(deployed(x), model(x).detach()) < 0.05
    assert not caplog.records, "onnxruntime warns of every norm"


def test_a_weight_that_is_computed_stays_float() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    deployed = to_int8(model, torch.rand(8, 4), threads=1)
    assert deployed.policy == {"0": "float32", "2": "int8"}
    assert deployed.kept_float == {"0": "its weight is computed from other parameters"}


def test_threads_are_checked_before_any_work(deployer: Deployer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.deployment.strip", None)
    with pytest.raises(CompressionError, match="threads=0"):
        deployer.deploy({}, threads=0)


@pytest.mark.parametrize("masked", [False, True])
def test_low_bit_layers_keep_their_values(masked: bool) -> None:
    model = prune(net(), 0.5, exclude=["unused"]) if masked else net()
    options: dict[str, dict[str, Any]] = {"stem.0": {"group": 7}, "one.0": {"symmetric": False}, "mix": {}}
    options["two.0"] = {"group": "tensor"}  # one scale, but a batch norm behind it
    for name, settings in options.items():
        model = quantize(model, {name: 3}, **settings)
    deployed = to_int8(model, X, policy={}, threads=1)
    assert deployed.policy["one.0"] == "weights3 asymmetric"
    assert deployed.policy["mix"] == "weights3"
    assert distance(deployed(X), finalize(model).eval()(X).detach()) < 1e-5
    assert deployed.bytes < to_int8(finalize(model), X, policy={}).bytes
    assert to_int8(model, X).policy["head"] == "int8"


def test_trained_shifts_keep_their_values() -> None:
    model = dense_shift(net(), {"one.0": 3, "two.0": 2}, init="convert")
    assert set(low_bits(model)) == {"one.0", "two.0"}
    deployed = to_int8(model, X, policy={"two.0": "shift2"}, threads=1)
    assert deployed.policy["one.0"] == "shift3"
    assert distance(deployed(X), finalize(model).eval()(X).detach()) < 1e-5
    assert low_bits(model), "the model stays as it is"


class Odd(nn.Module):
    """Kinds of layers that are no plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.line = nn.Conv1d(6, 6, 3)
        self.tied = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.up(x).flatten(2)
        y = self.attention(*[x.transpose(1, 2)] * 3, need_weights=False)[0]
        return self.line(x), self.other(self.tied(y).relu())


def test_unusual_layers_are_packed_or_listed() -> None:
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.rand(8, 4, 4, 4)
    deployer = Deployer(model, x)
    plain = deployer.deploy({}, threads=1)
    assert isinstance(plain(x), tuple)
    int8 = deployer.deploy(threads=1)
    assert set(int8.kept_float) == {"up", "other"}
    assert int8.kept_float["up"] == "onnxruntime has no transposed convolution in int8"
    assert int8.kept_float["other"] == "its weight is that of 'tied', whose option holds for both"
    assert {name for name, option in int8.policy.items() if option == "int8"} == {
        *("attention.in_proj_weight", "attention.out_proj", "line", "tied")
    }
    packed = deployer.deploy(dict.fromkeys(int8.policy, "weights8"), threads=1)
    for found, wanted in zip((*int8(x), *packed(x)), plain(x) * 2, strict=True):
        assert 0 < distance(found, wanted) < 0.05
    for kind in ("weights4", "shift4"):
        assert distance(deployer.deploy({"up": kind}, threads=1)(x)[0], plain(x)[0]) < 0.25
    low = quantize(model, {"up": 3, "line": 3}, group=5)
    wanted = finalize(low).eval()(x)[0].detach()
    assert distance(to_int8(low, x, policy={}, threads=1)(x)[0], wanted) < 1e-6


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.one(x) + self.two(y)  # type: ignore[no-any-return]

    x, y = torch.rand(8, 4), torch.rand(8, 5)
    model = Two()
    deployed = to_int8(model, [((x, y), None)], threads=1)
    assert distance(deployed(x, y), model(x, y).detach()) < 0.05
    assert deployed.latency((x, y), min_seconds=0.001).batch == 8
    with pytest.raises(CompressionError, match="takes 2 tensors, got Tensor"):
        deployed(x)


@pytest.mark.parametrize("settings", [{"method": "entropy"}, {"method": "percentile"}, {"per_channel": False}])
def test_other_settings(settings: dict[str, Any]) -> None:
    deployed = to_int8(net(), [X[:6], X[6:]], threads=1, **settings)
    assert 0 < distance(deployed(X), net()(X).detach()) < 0.2


def test_seven_bits_of_weights() -> None:
    model = onnx.load_from_string(to_int8(net(), X, reduce_range=True)._content)
    from onnx import numpy_helper

    arrays = [numpy_helper.to_array(one) for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert max(abs(int(value)) for array in arrays for value in (array.min(), array.max())) <= 64


def test_a_trained_network_stays_accurate() -> None:
    data = nb.data.load("digits")
    torch.manual_seed(0)
    model = Net(1)
    nb.fit(model, data, epochs=6, batch_size=32, seed=0, device="cpu", progress=False)
    before = nb.validate(model, data)["val_accuracy"]
    deployer = Deployer(model, data)
    int8, mixed = deployer.deploy(threads=1), deployer.deploy({"two.0": "weights4", "one.0": "int8"}, threads=1)
    assert before > 0.8
    assert nb.validate(int8, data)["val_accuracy"] == pytest.approx(before, abs=0.02)
    assert nb.validate(mixed, data)["val_accuracy"] == pytest.approx(before, abs=0.03)
    assert nb.validate(deployer.deploy({}, threads=1), data)["val_accuracy"] == before
    x, _ = next(data.eval_batches("val"))
    assert distance(int8(x), model.eval()(x).detach()) < 0.05


def test_the_model_and_the_random_state_stay() -> None:
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    to_int8(model, X)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "the calibration is missing"),
        ({"calibration": X[:4]}, "has 4 inputs; give 8 at least"),
        ({"calibration": X[:, :2]}, "the model does not take a batch of 8 x 2 x 8 x 8"),
        ({"policy": {"one.1": "int8"}}, "names layer 'one.1', which the model lacks; .*'one.0'"),
        ({"policy": {"one.0": "int9"}}, "layer 'one.0': there is no option 'int9'; .*'int8'"),
        ({"policy": {"one.0": "shift9"}}, "there is no option 'shift9'"),
        ({"policy": ["one.0"]}, "a policy maps layers to options"),
        ({"method": "max"}, "there is no way 'max' to find ranges; .*'minmax'"),
        ({"threads": 0}, "threads=0: give a whole number"),
        ({"model": {}}, "model is a torch.nn.Module"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr(torch.onnx, "export", fail)
    given = {"model": net(), "calibration": X} | changes
    with pytest.raises(CompressionError, match=message):
        to_int8(given.pop("model"), given.pop("calibration"), **given)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find(name, *rest))
    with pytest.raises(ImportError, match=r'onnxruntime: pip install "nasbench-toolkit\[deploy\]"'):
        to_int8(net(), X)


ALL = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "swin_t", "vit_b_16")
FAMILIES = ALL if "ALL_MODELS" in os.environ else ("resnet18", "mobilenet_v3_small")  # all take minutes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_deploy_with_all_convolutions_in_int8(family: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(family).eval()
    if family == "vit_b_16":
        for zeros in (model.heads.head.weight, model.class_token):  # type: ignore[union-attr]
            nn.init.normal_(zeros)  # type: ignore[arg-type]
    size = 224 if family == "vit_b_16" else 64
    x = torch.randn(8, 3, size, size)
    deployer = Deployer(model, x[:8])
    int8, plain = deployer.deploy(threads=1), deployer.deploy({}, threads=1)
    assert not int8.kept_float
    assert set(int8.policy.values()) == {"int8"}
    found = operators(int8)
    assert found["QLinearConv"] == sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    assert found["Conv"] == 0
    assert int8.bytes < 0.3 * plain.bytes
    assert distance(int8(x[:2]), plain(x[:2])) < 0.2
