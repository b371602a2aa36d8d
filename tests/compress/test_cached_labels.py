from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nasbench as nb
from compress.cached_labels import SoftLabels, soft_labels
from compress.distillation import distill
from compress.errors import CompressionError
from compress.teachers import Teachers, mean_probabilities
from nasbench.batches import Data
from search_spaces.layouts import layout_for


@pytest.fixture(scope="module")
def data() -> Data:
    return nb.data.load("digits", train_images=300)


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(width)
    layers = [nn.Conv2d(1, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * width, 10))


TEACHERS = [network(6, 1), network(8, 2)]
PLAIN: dict[str, Any] = {"batch_size": 32, "progress": False}
TRAINING = PLAIN | {"device": "cpu"}


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "settings", [{}, {"cutout": 3, "channels_last": False}, {"augment": False, "temperature": 3.0}]
)
def test_all_classes_train_like_live_teachers_bit_for_bit(data: Data, tmp_path: Path, settings: dict[str, Any]) -> None:
    labels = soft_labels(TEACHERS, data, tmp_path / "labels", epochs=3, seed=5, **PLAIN, **settings)
    student = network(3, 0)
    live = distill(student, TEACHERS, data=data, epochs=3, seed=5, **TRAINING, **settings)
    cached = distill(student, labels=labels, data=data, epochs=3, seed=5, **TRAINING, **settings)
    assert equal(live, cached) and not equal(live, student.eval())
    assert equal(
        cached, distill(student, labels=tmp_path / "labels", data=data, epochs=3, seed=5, **TRAINING, **settings)
    )


def test_students_that_train_in_another_layout_have_the_same_labels(data: Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=2), nn.ReLU(), nn.Flatten()]
    student = nn.Sequential(*layers, nn.Linear(64, 10))
    assert layout_for(student) == torch.contiguous_format
    labels = soft_labels(TEACHERS, data, tmp_path / "labels", epochs=1, **PLAIN)
    live = distill(student, TEACHERS, data=data, epochs=1, **TRAINING)
    assert equal(live, distill(student, labels=labels, data=data, epochs=1, **TRAINING))


def test_labels_are_what_teachers_say_of_each_crop(data: Data, tmp_path: Path) -> None:
    labels = soft_labels(TEACHERS, data, tmp_path / "labels", epochs=2, **PLAIN)
    assert (labels.epochs, labels.steps, labels.k) == (2, data.steps(32), 10)
    for epoch in range(2):
        for step, (x, _) in enumerate(data.train_batches(32, seed=0, epoch=epoch)):
            assert torch.equal(labels.at(epoch, step), mean_probabilities(Teachers(TEACHERS).logits(x)))
    assert torch.equal(labels.at(3, 1), labels.at(1, 1)) and not torch.equal(labels.at(0, 1), labels.at(1, 1))
    assert torch.equal(labels.at(1, 2, rank=1, world=4), labels.at(1, 2)[1::4])


def test_what_is_left_of_the_top_classes_is_spread_evenly(data: Data, tmp_path: Path) -> None:
    full = soft_labels(TEACHERS, data, tmp_path / "full", epochs=1, **PLAIN)
    labels = soft_labels(TEACHERS, data, tmp_path / "top", k=3, epochs=1, **PLAIN)
    all_of, top = full.at(0, 2), labels.at(0, 2)
    kept = all_of >= all_of.topk(3, dim=1).values[:, 2:]
    assert torch.equal(top[kept], all_of[kept]) and bool((kept.sum(1) == 3).all())
    rest = (1 - (all_of * kept).sum(1, keepdim=True)) / 7
    torch.testing.assert_close(top[~kept], rest.expand(-1, 10)[~kept])
    torch.testing.assert_close(top.sum(1), torch.ones(32))
    stored = load_file(tmp_path / "top")
    assert {name: array.dtype for name, array in stored.items()} == {
        "probabilities": torch.float32,
        "classes": torch.uint8,
    }
    # 4 bytes of a probability and 1 of a class number, for 3 classes of every crop
    assert (tmp_path / "top").stat().st_size - 5 * 3 * 32 * labels.steps < 1000


def test_a_longer_training_sees_the_crops_again(data: Data, tmp_path: Path) -> None:
    labels = soft_labels(TEACHERS, data, tmp_path / "labels", epochs=2, **PLAIN)
    seen: list[Tensor] = []

    class Watch(nb.Callback):
        def loss(self, run: nb.Run, x: Tensor, y: Tensor, logits: Tensor) -> None:
            seen.append(x)

        def on_start(self, run: nb.Run) -> None:
            run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))

    distill(network(3, 0), labels=labels, data=data, epochs=5, callbacks=[Watch()], **TRAINING)
    steps = labels.steps
    assert len(seen) == 5 * steps
    epochs = [torch.stack(seen[i * steps :][:steps]) for i in range(5)]
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3]) and torch.equal(epochs[0], epochs[4])
    assert not torch.equal(epochs[0], epochs[1])


def test_a_killed_training_with_repeated_labels_is_the_unbroken_one(data: Data, tmp_path: Path) -> None:
    class Stop(nb.Callback):
        def on_step(self, run: nb.Run) -> None:
            if run.step == 17:
                raise KeyboardInterrupt

    labels = soft_labels(TEACHERS, data, tmp_path / "labels", epochs=2, **PLAIN)
    other = soft_labels(TEACHERS[:1], data, tmp_path / "others", epochs=2, **PLAIN)
    student = network(3, 0)
    settings = TRAINING | {"data": data, "epochs": 4}
    unbroken = distill(student, labels=labels, **settings)
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        distill(student, labels=labels, checkpoint=checkpoint, callbacks=[Stop()], **settings)
    with pytest.raises(CompressionError, match="another teachers or labels"):
        distill(student, labels=other, checkpoint=checkpoint, **settings)
    assert equal(unbroken, distill(student, labels=labels, checkpoint=checkpoint, **settings))


def test_texts_have_labels_for_every_character(tmp_path: Path) -> None:
    text = nb.data.load("pydoc", characters=6000, context=16)
    torch.manual_seed(0)

    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(text.classes, text.classes)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.table(x).transpose(1, 2)
            return logits

    teacher, student = Bigram(), Bigram()
    labels = soft_labels(teacher, text, tmp_path / "labels", epochs=1, k=4, **PLAIN)
    assert labels.at(0, 0).shape == (32, text.classes, 16)
    torch.testing.assert_close(labels.at(0, 0).sum(1), torch.ones(32, 16))
    full = soft_labels(teacher, text, tmp_path / "full", epochs=1, **PLAIN)
    live = distill(student, teacher, data=text, epochs=1, mode="reversed", **TRAINING)
    assert not equal(live, student)
    cached = distill(student, labels=full, data=text, epochs=1, **TRAINING)
    assert equal(cached, distill(student, teacher, data=text, epochs=1, **TRAINING))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, here it is 1"),
        ({"batch_size": 16}, "batch_size was 32, here it is 16"),
        ({"augment": False}, "augment was True, here it is False"),
        ({"cutout": 2}, "cutout was 0, here it is 2"),
        ({"split": "train+val"}, "split was 'train', here it is 'train\\+val'"),
        ({"temperature": 2.0}, "temperature was 1.0, here it is 2.0"),
        ({"data": nb.data.load("digits", train_images=200)}, "data was '[0-9a-f]{12}', here it is"),
        ({"data": nb.data.load("digits", train_images=300, crop=0)}, "data was '[0-9a-f]{12}', here it is"),
        ({"mode": "joint"}, "probabilities only"),
        ({"teachers": TEACHERS}, "either teachers or labels"),
    ],
)
def test_labels_of_other_crops_are_refused(data: Data, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    labels = soft_labels(TEACHERS, data, tmp_path / "labels", epochs=1, **PLAIN)
    student = network(3, 0)
    before = copy.deepcopy(student)
    with pytest.raises(CompressionError, match=message):
        distill(student, labels=labels, **(TRAINING | {"data": data, "epochs": 1, "inplace": True} | changes))
    assert equal(student, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0, but digits has 10 classes"),
        ({"k": 11}, "k=11, but"),
        ({"k": 2.0}, "k=2.0, but"),
        ({"temperature": 0}, "temperature=0; it must be"),
        ({"temperature": float("nan")}, "temperature=nan; it must be"),
        ({"seed": -1}, "seed=-1"),
        ({"teachers": []}, "no teachers"),
        ({"teachers": [nn.Sequential(nn.Flatten(), nn.Linear(64, 9))]}, "student and data have 10 classes"),
        ({"data": [torch.zeros(1)]}, "data is what nasbench.data.load returns, got list"),
        ({"split": "test"}, "only nasbench.evaluate reads the test images"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_bad_settings_are_refused_before_a_file_is_written(
    data: Data, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = {"teachers": TEACHERS, "data": data, "path": tmp_path / "labels"} | PLAIN | changes
    with pytest.raises(ValueError, match=message):
        soft_labels(**settings)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_no_half_written_file(data: Data, tmp_path: Path) -> None:
    calls = []

    def teacher(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > 4:
            raise RuntimeError("out of power")
        return x.flatten(1)[:, :10]

    with pytest.raises(RuntimeError, match="out of power"):
        soft_labels(teacher, data, tmp_path / "labels", epochs=1, **PLAIN)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        soft_labels(TEACHERS, data, tmp_path / "file" / "labels", epochs=1, **PLAIN)


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    arrays = {name: array.clone() for name, array in load_file(path).items()}
    change(metadata, arrays)
    save_file(arrays, path, metadata)


def newer(metadata: dict[str, str], arrays: dict[str, Tensor]) -> None:
    metadata["soft_labels"] = json.dumps(json.loads(metadata["soft_labels"]) | {"version": 2})


def another_seed(metadata: dict[str, str], arrays: dict[str, Tensor]) -> None:
    metadata["soft_labels"] = json.dumps(json.loads(metadata["soft_labels"]) | {"seed": 1})


def a_bit(metadata: dict[str, str], arrays: dict[str, Tensor]) -> None:
    arrays["probabilities"].view(torch.int32)[0, 0, 0, 0] ^= 1


def nothing_of_ours(metadata: dict[str, str], arrays: dict[str, Tensor]) -> None:
    del metadata["soft_labels"]


def no_json(metadata: dict[str, str], arrays: dict[str, Tensor]) -> None:
    metadata["soft_labels"] = "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, "has format 2, this version reads up to 1"),
        (another_seed, "is damaged"),
        (a_bit, "is damaged"),
        (no_json, "is damaged"),
        (nothing_of_ours, "has no soft labels"),
    ],
)
def test_a_changed_file_is_refused(data: Data, tmp_path: Path, change: Any, message: str) -> None:
    soft_labels(TEACHERS, data, tmp_path / "labels", epochs=1, **PLAIN)
    rewritten(tmp_path / "labels", change)
    with pytest.raises(CompressionError, match=message):
        SoftLabels(tmp_path / "labels")


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="cannot read"):
        SoftLabels(tmp_path / "nowhere")
    (tmp_path / "text").write_text("labels")
    with pytest.raises(CompressionError, match="no safetensors file"):
        SoftLabels(tmp_path / "text")
    with pytest.raises(CompressionError, match="cannot read"):
        SoftLabels(tmp_path)
