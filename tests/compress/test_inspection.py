"""Inspections: what is in a file, in bytes that add up, of any kind of layer; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.errors import CompressionError
from compress.inspection import inspect
from compress.pruning import prune
from compress.quantization import quantize
from compress.shift import dense_shift
from compress.storage import save
from nasbench.origin import mark
from search_spaces import NASBench201

FILE = Path("model.safetensors")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 11), nn.Linear(11, 7)
    )


def test_every_layer_is_described() -> None:
    model = quantize(dense_shift(prune(net(), {"4": 0.25}), {"2": 3}, example=torch.rand(1, 3, 5, 5)), {"4": 4, "5": 5})
    save(model, FILE)
    found = inspect(FILE)
    layers = {layer.name: layer for layer in found.layers}
    assert layers.keys() == net().state_dict().keys()
    assert [(layers[f"{name}.weight"].encoding, layers[f"{name}.weight"].bits) for name in (0, 2, 4, 5)] == [
        *(("dense", 32), ("shift", 3), ("affine", 4), ("affine", 5))
    ]
    assert layers["2.weight"].bytes == math.ceil(16 * 16 * 9 * 3 / 8)
    assert layers["4.weight"].bytes == math.ceil(44 * 4 / 8) + math.ceil(176 / 8) + 4 * 11
    assert (layers["4.weight"].masked, layers["4.weight"].density, layers["4.weight"].shape) == (True, 0.25, (11, 16))
    assert layers["5.weight"].bytes == math.ceil(77 * 5 / 8) + 4 * 7
    header = 8 + int.from_bytes(FILE.read_bytes()[:8], "little")
    assert sum(layer.bytes for layer in found.layers) + header == found.bytes == FILE.stat().st_size
    entries = sum(tensor.numel() for tensor in net().state_dict().values())
    assert found.bits_per_entry == 8 * found.bytes / entries
    text = str(found)
    assert text.startswith("model.safetensors: format 2 of compress.save; no network of our spaces\n")
    rows = {line.split("  ")[0]: line for line in text.splitlines()[1:]}
    assert list(rows) == [*("tensor", "0.weight", "2.weight", "4.weight", "5.weight", "9 of one axis", "header", "all")]
    assert rows["4.weight"].split() == [
        "4.weight",
        "affine",
        "behind",
        "a",
        "mask",
        "4",
        "11",
        "x",
        "16",
        "176",
        *("0.2500", "88"),
    ]
    assert rows["header"].split()[-1] == f"{header:,}"
    assert rows["all"].split()[-2:] == [f"{entries:,}", f"{found.bytes:,}"]


def test_shared_tensors_are_counted_once() -> None:
    layer = nn.Linear(12, 12)
    save(nn.Sequential(layer, layer), FILE)
    found = inspect(FILE)
    assert [(one.name, one.encoding, one.bytes) for one in found.layers] == [
        *(("0.weight", "dense", 576), ("0.bias", "dense", 48), ("1.weight", "same", 0), ("1.bias", "same", 0))
    ]
    assert found.bits_per_entry == 8 * found.bytes / 156


def test_the_network_is_named() -> None:
    space = NASBench201(channels=4, cells=1, classes=10, in_channels=3)
    save(mark(space.build(space.at(5)), space, space.at(5)), FILE)
    found = inspect(FILE)
    assert found.origin is not None and found.origin.arch == space.at(5)
    assert "format 1 of compress.save; NASBench201, Arch(" in str(found)


def test_a_model_without_tensors() -> None:
    save(nn.ReLU(), FILE)
    assert inspect(FILE).layers == ()
    assert inspect(FILE).bits_per_entry == 8 * FILE.stat().st_size
    assert "header" in str(inspect(FILE))


def test_deployed_networks_are_inspected_too() -> None:
    pytest.importorskip("onnxruntime")
    from compress.deployment import to_int8

    policy = {"0": "int8", "2": "weights3", "4": "float32"}
    to_int8(net().eval(), torch.rand(16, 3, 5, 5), policy=policy).save("net.onnx")
    found = inspect("net.onnx")
    assert "deployed ONNX, layers: 1 int8, 1 weights3" in str(found)
    assert found.bytes == Path("net.onnx").stat().st_size
    assert sum(layer.bytes for layer in found.layers) < found.bytes
    assert [layer.bits for layer in found.layers if layer.shape == (16, 3, 3, 3)] == [8]
    assert [layer.bits for layer in found.layers if layer.size == 176] == [32]
    data = bytearray(Path("net.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    Path("net.onnx").write_bytes(data)
    with pytest.raises(CompressionError, match="net.onnx: the file is damaged"):
        inspect("net.onnx")


def test_a_network_is_no_file() -> None:
    with pytest.raises(CompressionError, match="inspect takes a file, got a Sequential; compress.report"):
        inspect(net())  # type: ignore[arg-type]


def test_damaged_files_are_refused() -> None:
    with pytest.raises(CompressionError, match="cannot read none.safetensors"):
        inspect("none.safetensors")
    save(quantize(net(), 4), FILE)
    data = bytearray(FILE.read_bytes())
    data[-5] ^= 4
    FILE.write_bytes(data)
    with pytest.raises(CompressionError, match="model.safetensors is damaged: its checksum is another"):
        inspect(FILE)
    torch.save({"a": torch.zeros(3)}, "pickle.pt")
    with pytest.raises(CompressionError, match="not written by compress.save but by torch.save"):
        inspect("pickle.pt")
