"""ONNX files: the same outputs in onnxruntime for any batch size; what cannot be exported leaves no file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.exporting import export
from compress.pruning import masks, prune

FILE = Path("model.onnx")
HAVE = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
deploy = pytest.mark.skipif(not HAVE, reason="the extra deploy is not installed")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    names = [put.name for put in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0])


@deploy
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_a_pruned_model_computes_the_same_for_any_batch(batch: int) -> None:
    model = prune(net(), 0.2)
    assert export(model, FILE, example=torch.rand(batch, 3, 8, 8)) < 1e-5
    assert model.training
    assert masks(model), "the model keeps its masks"
    for size in (1, 3, 7):
        x = torch.rand(size, 3, 8, 8)
        torch.testing.assert_close(run(FILE, x), model.eval()(x).detach())
        model.train()
    assert [path.name for path in Path().iterdir()] == [FILE.name]


@deploy
@pytest.mark.slow
def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x) + self.two(y), x

    model = Two()
    assert export(model, FILE, example=(torch.rand(2, 4), torch.rand(2, 5))) < 1e-5
    x, y = torch.rand(3, 4), torch.rand(3, 5)
    torch.testing.assert_close(run(FILE, x, y), model(x, y)[0].detach())


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 4) * 2


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.double()[:, :, None]).float()  # type: ignore[no-any-return]


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@deploy
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fixed(), "does not take a batch of 3 x 4"),
        (Convolution().double(), "onnxruntime .* cannot run the exported model: .*float32"),
        (Branch(), "Branch cannot be exported with a free batch size: .* no Python branches on values"),
    ],
)
def test_what_cannot_be_exported_leaves_the_old_file(model: nn.Module, message: str) -> None:
    FILE.write_text("old")
    with pytest.raises(CompressionError, match=message):
        export(model, FILE, example=torch.rand(2, 4))
    assert FILE.read_text() == "old"
    assert len(list(Path().iterdir())) == 1


@deploy
@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_file_that_computes_something_else_is_not_written(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.exporting

    runs = compress.exporting._run
    monkeypatch.setattr(compress.exporting, "_run", lambda *args: [y + wrong for y in runs(*args)])
    with pytest.raises(CompressionError, match="an output of the exported file differs from the model's by"):
        export(nn.Linear(4, 2), FILE, example=torch.rand(2, 4))
    assert not FILE.exists()


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "onnxruntime" else "here" if name.startswith("onnx") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match=r'export needs onnxruntime: pip install "nasbench-toolkit\[deploy\]"'):
        export(net(), FILE, example=torch.rand(1, 3, 8, 8))
    assert not FILE.exists()


@deploy
@pytest.mark.parametrize("example", [3, (), torch.tensor(1.0), torch.rand(0, 3, 8, 8)])
def test_bad_examples_are_refused(example: Any) -> None:
    with pytest.raises(CompressionError, match="example is a batch of inputs"):
        export(net(), FILE, example=example)
