"""Deployed files: saved whole, loaded as they were, refused when damaged; measured on the session that runs them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.deployed import Deployed, sealed
from compress.deployment import to_int8
from compress.errors import CompressionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FILE = Path("model.onnx")
X = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10), nn.Linear(10, 2))
    return to_int8(net, X, policy={"0": "int8", "3": "weights3"}, threads=1)


def test_saved_and_loaded(deployed: Deployed) -> None:
    assert deployed.save(FILE) == FILE
    assert FILE.stat().st_size == deployed.bytes
    twin = Deployed.load(FILE, threads=1)
    assert torch.equal(twin(X[:3]), deployed(X[:3]))
    assert twin.policy == deployed.policy == {"0": "int8", "3": "weights3", "4": "float32"}
    assert twin.kept_float == {}
    assert repr(twin) == f"Deployed(1 int8, 1 weights3, 1 float32; {FILE.stat().st_size:,} bytes, threads=1)"
    assert [path.name for path in Path().iterdir()] == [FILE.name]
    onnx.checker.check_model(onnx.load(FILE))


def test_any_batch_and_copies(deployed: Deployed) -> None:
    assert torch.equal(torch.cat([deployed(X[:1]), deployed(X[1:])]), deployed(X))
    assert torch.equal(copy.deepcopy(deployed)(X), deployed(X))
    assert not deployed(X.requires_grad_()).requires_grad
    X.requires_grad_(False)


def test_onnxruntime_alone_runs_the_file(deployed: Deployed) -> None:
    deployed.save(FILE)
    code = (
        "import sys, numpy as np, onnxruntime as ort; s = ort.InferenceSession('model.onnx'); "
        "print(s.run(None, {'input': np.zeros((5, 3, 8, 8), np.float32)})[0].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(5, 2) False"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "no file that Deployed.save wrote"),
        (lambda content: b"hello" * 50, "no file that Deployed.save wrote"),
        (lambda content: content[:-100], "no file that Deployed.save wrote, or its end is missing"),
        (lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:], "is damaged or was changed"),
        (lambda content: content[:-1] + (b"0" if content[-1:] != b"0" else b"1"), "is damaged or was changed"),
        (lambda content: content[1:], "is damaged or was changed"),
        (lambda content: sealed(b"hello"), "onnxruntime .* cannot run it"),
    ],
)
def test_other_files_are_refused(change: Callable[[bytes], bytes], message: str, deployed: Deployed) -> None:
    deployed.save(FILE)
    FILE.write_bytes(change(FILE.read_bytes()))
    with pytest.raises(CompressionError, match=f"model.onnx: .*{message}"):
        Deployed.load(FILE)


def test_a_newer_format_is_refused(deployed: Deployed) -> None:
    deployed.save(FILE)
    model = onnx.load(FILE)
    header = json.loads(next(p.value for p in model.metadata_props if p.key == "compress"))
    onnx.helper.set_model_props(model, {"compress": json.dumps(header | {"version": 2})})
    FILE.write_bytes(sealed(model.SerializeToString()))
    with pytest.raises(CompressionError, match=r"has format 2, this version of compress reads up to 1; update it"):
        Deployed.load(FILE)


def test_no_file() -> None:
    with pytest.raises(CompressionError, match="cannot read nothing.onnx: No such file"):
        Deployed.load("nothing.onnx")


def test_what_it_does_not_take(deployed: Deployed) -> None:
    with pytest.raises(CompressionError, match=r"takes tensor\(float\) \[.*, 3, 8, 8\], got float32 \[8, 2, 8, 8\]"):
        deployed(X[:, :2])
    with pytest.raises(CompressionError, match=r"got float64 .*: x.float\(\)"):
        deployed(X.double())
    with pytest.raises(CompressionError, match=r"no bfloat16 tensors; give x.float\(\)"):
        deployed(X.bfloat16())
    with pytest.raises(CompressionError, match="takes 1 tensors, got nothing"):
        deployed()
    with pytest.raises(CompressionError, match="threads=True"):
        Deployed(deployed._content, True)


def test_latency_is_of_the_session(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    session = deployed._session

    class Counted:
        def run(self, *args: Any) -> Any:
            calls.append(args)
            return session.run(*args)

    monkeypatch.setattr(deployed, "_session", Counted())
    found = deployed.latency(X[:2].contiguous(memory_format=torch.channels_last), min_seconds=0.001)
    assert len(calls) > found.repeats >= 5
    assert all(feed["input"].shape == (2, 3, 8, 8) for _, feed in calls)
    assert all(feed["input"].flags.c_contiguous for _, feed in calls), "else every run would copy it"
    assert (found.batch, found.threads, found.device) == (2, 1, "cpu")
    assert found.median_ms > 0
