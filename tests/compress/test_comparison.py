"""Comparisons: one table and one figure of modules, files and deployed networks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nasbench as nb
from compress.comparison import Comparison
from compress.errors import CompressionError
from compress.low_bit_models import freeze
from compress.pruning import prune
from compress.quantization import quantize
from compress.reporting import Report, report
from compress.shift import dense_shift
from compress.storage import save
from nasbench.profile import Latency

X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
QUICK = 0.002
FEW_BITS = "few bits only: smaller when packed, computed in float32, no faster on this device"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    ).eval()


def test_models_and_files_are_compared() -> None:
    model, sparse, small = net(), prune(net(), 0.1), quantize(net(), 3)
    save(small, "small.safetensors")
    found = report([sparse, "small.safetensors"], example=X, baseline=model, min_seconds=QUICK)
    assert isinstance(found, Comparison)
    assert list(found.reports) == ["baseline", "Sequential", "small.safetensors"]
    for name, one in (("Sequential", sparse), ("small.safetensors", small)):
        alone = report(one, example=X, baseline=model, min_seconds=QUICK)
        own = found.reports[name]
        assert own.latency is not None and own.latency.median_ms > 0
        for figure in ("params", "weights", "nonzeros", "bytes", "macs", "kept_macs", "bits_per_weight", "note"):
            assert getattr(own, figure) == getattr(alone, figure) != None  # noqa: E711 - all are there
        assert own.max_difference == alone.max_difference
        assert own.baseline is None and own.val_accuracy is None
        with torch.no_grad():
            assert own.max_difference == float((one(X).double() - model(X).double()).abs().max()) > 0
    assert found.reports["baseline"].max_difference is None
    assert found.reports["small.safetensors"].bytes == Path("small.safetensors").stat().st_size
    assert found.reports["small.safetensors"].params == 72 + 8 + 16 + 5130


def test_bits_of_each_weight_are_those_of_the_file() -> None:
    found = report({"dense": net(), "3 bits": quantize(net(), 3), "shifted": dense_shift(net(), {"0": 3, "4": 2})})
    bits = {name: own.bits_per_weight for name, own in found.reports.items()}
    assert bits == {
        "dense": 32.0,
        "3 bits": 8 * (72 * 3 / 8 + 5120 * 3 / 8 + 4 * 18) / 5192,
        "shifted": 8 * (72 * 3 / 8 + 5120 * 2 / 8) / 5192,
    }
    assert {own.nonzeros for name, own in found.reports.items() if name != "3 bits"} == {5192}
    assert found.reports["shifted"].params == found.reports["dense"].params, "latents are none of the file's"


def test_it_prints_as_one_table() -> None:
    sources = {"sparse": prune(net(), 0.1), "small": quantize(net(), 4), "both": quantize(prune(net(), 0.1), 4)}
    found = report(sources, example=X, baseline=net(), min_seconds=QUICK)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["baseline", "sparse", "small", "both"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[1].split()[-1] == "torch"
    assert lines[5] == "difference: the largest of an output from the baseline's"
    assert lines[6].startswith("latency: dense kernels, batch 4, cpu, ")
    assert lines[7:] == [
        "sparse: masks only: smaller when packed, no faster on this device",
        f"small: {FEW_BITS}",
        "both: masks and few bits only: smaller when packed, computed in float32, no faster on this device",
    ]
    numbers = found.to_dict()
    assert numbers["small"]["latency_ms"] == found.reports["small"].latency.median_ms  # type: ignore[union-attr]
    assert "max_difference" not in numbers["baseline"]
    sizes = str(report([net()]))
    assert "latency" not in sizes and "difference" not in sizes and "val_accuracy" not in sizes


def test_one_report_says_what_few_bits_are() -> None:
    result = report(freeze(quantize(net(), 4)), baseline=net())
    assert result.note == FEW_BITS
    assert "bits_per_weight" in str(result)
    trained = report(quantize(net(), 4), baseline=net())
    assert trained == result


def test_accuracy_is_of_validation_images() -> None:
    data = nb.data.load("digits", train_images=200)
    small = quantize(net(), 4)
    found = report([small], data=data, baseline=net())
    expected = {
        name: nb.validate(one, data)["val_accuracy"] for name, one in (("baseline", net()), ("Sequential", small))
    }
    assert {name: own.val_accuracy for name, own in found.reports.items()} == expected
    one = report(small, data=data)
    assert one.val_accuracy == expected["Sequential"]
    assert ["val_accuracy", f"{one.val_accuracy:.4f}"] in [line.split() for line in str(one).splitlines()]


def test_deployed_networks_are_run_as_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from compress.deployed import Deployed
    from compress.deployment import to_int8

    data = nb.data.load("digits", train_images=200)
    deployed = to_int8(net(), data)
    deployed.save("net.onnx")
    calls: list[int] = []
    forward = Deployed.forward

    def counted(self: Deployed, *inputs: torch.Tensor) -> Any:
        calls.append(len(inputs[0]))
        return forward(self, *inputs)

    monkeypatch.setattr(Deployed, "forward", counted)
    settings: dict[str, Any] = {"example": X, "baseline": net(), "data": data, "min_seconds": QUICK}
    found = report({"object": deployed, "file": "net.onnx", "float": net()}, **settings)
    assert calls.count(4) >= 2 * 9, "it was called on the example, warmed up, and timed seven times"
    for name in ("object", "file"):
        own = found.reports[name]
        assert (own.runtime, own.bytes, own.params, own.macs) == ("onnxruntime", deployed.bytes, None, None)
        assert own.val_accuracy == nb.validate(deployed, data)["val_accuracy"]
        assert own.max_difference is not None and own.max_difference > 0
        assert own.latency is not None and own.latency.threads == (
            deployed.threads if name == "object" else torch.get_num_threads()
        )
    rows = {line.split()[0]: line.split()[-1] for line in str(found).splitlines()[1:5]}
    assert rows == {"baseline": "torch", "object": "onnxruntime", "file": "onnxruntime", "float": "torch"}
    assert "latency: onnxruntime, as deployed, batch 4, cpu" in str(found)
    alone = report("net.onnx", **settings)
    assert isinstance(alone, Report)
    assert [line.split()[0] for line in str(alone).splitlines()[1:4]] == ["bytes", "val_accuracy", "latency"]
    same_runtime = report(deployed, example=X, baseline=deployed, min_seconds=QUICK)
    assert same_runtime.max_difference == 0
    with pytest.raises(CompressionError, match=r"write it with deployed.save\(path\)"):
        save(deployed, "deployed.safetensors")
    found.plot("both.png")
    assert Path("both.png").stat().st_size > 10_000


def test_the_figure_labels_every_model() -> None:
    latency = Latency(2.0, 0.5, 7, 1, "cpu", 1)
    reports = {
        name: Report(10, 8, 8, size, latency=latency, val_accuracy=accuracy)
        for name, size, accuracy in (("dense", 40_000, 0.9), ("4 bits", 5_000, 0.89), ("$3 bits", 5_000, 0.89))
    }
    figure = Comparison(reports).plot("all.svg")
    assert [axes.get_xlabel() for axes in figure.axes] == ["size (bytes)", "latency (ms)"]
    assert figure.axes[0].get_ylabel() == "validation accuracy"
    for axes in figure.axes:
        texts = [text for text in axes.texts if text.get_text()]
        assert [text.get_text() for text in texts] == ["dense", "4 bits", r"\$3 bits"]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(boxes[i].overlaps(boxes[j]) for i in range(3) for j in range(i)), "no label covers another"
    assert Path("all.svg").read_text().count("4 bits") == 2
    differences = Comparison({name: Report(1, 1, 1, 9, max_difference=0.1) for name in ("a", "b")}).plot()
    assert [axes.get_ylabel() for axes in differences.axes] == ["largest difference of an output"]
    with pytest.raises(CompressionError, match="a plot is of accuracy, or of differences of outputs"):
        Comparison({"a": Report(1, 1, 1, 9)}).plot("none.png")
    assert not Path("none.png").exists()


def test_equal_names_are_numbered() -> None:
    found = report([net(), net(), nn.Linear(4, 4)])
    assert list(found.reports) == ["Sequential", "Sequential 2", "Linear"]
    assert list(report({"own": net()}).reports) == ["own"]
    for folder in ("a", "b"):
        save(net(), Path(folder) / "net.safetensors")
    files = [Path("a/net.safetensors"), "b/net.safetensors"]
    assert list(report(files, baseline=net()).reports) == ["baseline", "a/net.safetensors", "b/net.safetensors"]


def test_many_labels_and_long_ones_find_their_place() -> None:
    names = [f"{bits} bits, in layers of every kind there is" for bits in range(2, 8)]
    reports = {name: Report(1, 1, 1, 5_000 + i, val_accuracy=0.9 + i / 1e3) for i, name in enumerate([*names, "a"])}
    (axes,) = Comparison(reports).plot().axes
    texts = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in texts] == [*(f"{name[:16]}…{name[-16:]}" for name in names), "a"]
    boxes, inside = [text.get_window_extent() for text in texts], axes.get_window_extent()
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(7) for j in range(i)), "no label covers another"
    assert all(inside.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_bad_input_is_refused() -> None:
    with pytest.raises(CompressionError, match="there is nothing to report on"):
        report([])
    with pytest.raises(CompressionError, match="'baseline' is the name of the original"):
        report({"baseline": net()})
    with pytest.raises(CompressionError, match="a source is a module, a file of compress.save, or .*, got int"):
        report([net(), 3])  # type: ignore[list-item]
    with pytest.raises(CompressionError, match="cannot read none.safetensors"):
        report(["none.safetensors"], baseline=net())
    with pytest.raises(CompressionError, match="sources by name have texts as names, got 4"):
        report({4: net()})  # type: ignore[dict-item]
    with pytest.raises(CompressionError, match="thin does not take a batch of 4 x 1 x 8 x 8: "):
        report({"thin": nn.Conv2d(3, 4, 1)}, example=X, baseline=net(), min_seconds=QUICK)
    save(net(), "plain.safetensors")
    with pytest.raises(CompressionError, match="plain.safetensors names no network of our spaces"):
        report(["plain.safetensors", net()])
    with pytest.raises(
        CompressionError, match=r"other gives outputs of shapes \[\(4, 5\)\], the baseline \[\(4, 10\)\]"
    ):
        report({"other": nn.Sequential(nn.Flatten(), nn.Linear(64, 5))}, example=X, baseline=net(), min_seconds=QUICK)
