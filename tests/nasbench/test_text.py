"""Texts: how they are read, split and cut into windows, what is refused, and that all that takes data takes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nasbench as nb
from nasbench import memory
from nasbench.cli import main
from nasbench.data import TextData, load
from nasbench.errors import CheckpointError, DataError, SettingError
from nasbench.objective import TrainObjective
from nasbench.recipe import Recipe
from nasbench.training import Callback, Run
from search_spaces import GPT, NASBench201, SearchSpace, ViT
from search_spaces.base import Arch

QUICK: dict[str, Any] = {"device": "cpu", "progress": False, "batch_size": 8, "optimizer": "adamw", "lr": 0.01}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def counted(length: int = 1000, **settings: Any) -> TextData:
    """A text in which every character tells its own place: no two are alike."""
    return TextData("places", "".join(map(chr, range(1000, 1000 + length))), **{"context": 8} | settings)


def small(**settings: Any) -> TextData:
    data = load("pydoc", **{"characters": 3000, "context": 16} | settings)
    assert isinstance(data, TextData)
    return data


def joined(batches: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


@dataclass(frozen=True)
class Bigrams(SearchSpace):
    """The smallest language models: what follows a character, by way of a few numbers."""

    classes: int | None = None
    context: int | None = None

    @cached_property
    def choices(self) -> dict[str, tuple[int, ...]]:
        return {"width": (2, 4, 8, 16)}

    def build(self, arch: Arch) -> nn.Module:
        self.require("classes", "context")
        assert self.classes is not None
        return Model(self.classes, self.check(arch)["width"])  # type: ignore[arg-type]


class Model(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(classes, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(x))
        return logits.transpose(1, 2)


# Sources ------------------------------------------------------------------------------------------------------------


def test_pydoc_is_real_text_in_python_itself() -> None:
    from pydoc_data.topics import topics

    data = load("pydoc")
    assert isinstance(data, TextData) and data.name == "pydoc" and data.shape == (64,) and data.context == 64
    first, end = min(topics), max(topics)
    text = "".join(data.class_names[i] for i in data._text)
    assert text.startswith(topics[first]) and text.endswith("\n" + topics[end])
    assert data.classes == len(set(text)) and list(data.class_names) == sorted(set(text))
    assert all(topic in text for topic in topics.values())


def test_a_file(tmp_path: Path) -> None:
    text = "Größe, “quotes”\n" * 100
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "book.md").write_text(text, encoding="utf-8")
    data = load(tmp_path / "book.txt", context=8)
    same = [TextData("other", text, context=8), load(str(tmp_path / "book.md"), context=8)]
    assert data.name == "book" and {other.fingerprint for other in same} == {data.fingerprint}
    assert load(tmp_path / "book.txt").shape == (64,)
    assert load(tmp_path / "book.md", characters=1600).fingerprint == load(tmp_path / "book.txt").fingerprint


@pytest.mark.parametrize("settings", [{}, {"context": 16}, {"characters": 2000, "val_fraction": 0.1}])
def test_a_spec_loads_the_same_data_again(settings: dict[str, Any]) -> None:
    data = load("pydoc", **settings)
    assert data.spec is not None and load(**data.spec).fingerprint == data.fingerprint


def test_fingerprint_follows_content_and_settings() -> None:
    text = LETTERS * 40
    variants = [
        TextData("a", text, context=8),
        TextData("a", text[:-1] + "a", context=8),
        TextData("a", text.upper(), context=8),
        TextData("a", text, context=9),
        TextData("a", text, context=8, val_fraction=0.3),
        TextData("a", text, context=8, characters=1000),
        *TextData("a", text, context=8).halves(),
    ]
    prints = [data.fingerprint for data in variants]
    assert len(set(prints)) == len(variants) and all(len(text) == 12 for text in prints)
    assert TextData("b", text, context=8).fingerprint == prints[0]


# Splits and windows -------------------------------------------------------------------------------------------------


def test_splits_follow_each_other() -> None:
    data = counted()
    assert data._parts == {"train": (0, 720), "val": (720, 900), "train+val": (0, 900), "test": (900, 1000)}
    # The last character of a split is only predicted: 719 / 8, 179 / 8, 899 / 8 and 99 / 8.
    assert [data.count(split) for split in ("train", "val", "train+val", "test")] == [89, 22, 112, 12]
    assert repr(data).startswith("TextData('places': 89 train, 22 val, 12 test windows of 8 characters, 1000 classes")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_windows_in_order_are_the_text(split: str) -> None:
    data = counted()
    x, y = joined(data._test_batches(5) if split == "test" else data.eval_batches(split, 5))
    first = data._parts[split][0]
    assert x.shape == (data.count(split), 8) and x.dtype == y.dtype == torch.int64
    assert x.flatten().tolist() == list(range(first, first + x.numel())) and torch.equal(y, x + 1)


@pytest.mark.parametrize("split", ["train", "train+val"])
def test_an_epoch_shows_every_window_once_in_a_new_order(split: str) -> None:
    data = counted()
    epochs = [joined(data.train_batches(8, seed=0, epoch=e, augment=False, split=split))[0] for e in range(2)]
    assert [len(x) for x in epochs] == [8 * data.steps(8, split)] * 2 and not torch.equal(*epochs)
    assert all(x.is_contiguous() and (x[:, 0] % 8 == 0).all() and len(x[:, 0].unique()) == len(x) for x in epochs)


def test_every_epoch_cuts_the_text_elsewhere() -> None:
    data, shifts = counted(), set()
    for epoch in range(60):
        x, y = joined(data.train_batches(89, seed=0, epoch=epoch))
        assert len(x) == 89 and torch.equal(y, x + 1) and y.max() < 720  # nothing of the validation split
        starts = x[:, 0].sort().values
        steps = (starts[1:] - starts[:-1]).tolist()
        assert steps[:-1] == [8] * 87 and 1 <= steps[-1] <= 8  # the last one ends with the split at the latest
        shifts.add(int(starts[0]))
    assert shifts == set(range(8))  # to miss one of 8 in 60 draws has a chance of 8 (7/8)^60 = 0.003
    again = joined(data.train_batches(89, seed=0, epoch=59))[0]
    assert torch.equal(x, again) and not torch.equal(x, joined(data.train_batches(89, seed=1, epoch=59))[0])


def test_start_and_ranks_take_their_part_of_an_epoch() -> None:
    data, settings = counted(), {"seed": 5, "epoch": 3}
    whole = list(data.train_batches(12, **settings))
    assert len(whole) == 7
    rest = list(data.train_batches(12, start=4, **settings))
    parts = [data.train_batches(12, start=4, rank=rank, world=3, **settings) for rank in range(3)]
    for (x, y), after, *shares in zip(whole[4:], rest, *parts, strict=True):
        assert torch.equal(x, after[0]) and torch.equal(y, after[1])
        for rank, (part_x, part_y) in enumerate(shares):
            assert torch.equal(part_x, x[rank::3]) and torch.equal(part_y, y[rank::3])


def test_batches_neither_read_nor_move_the_global_random_state() -> None:
    data, states = counted(), torch.get_rng_state()
    first = joined(data.train_batches(8, seed=0, epoch=0))[0]
    assert torch.equal(states, torch.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(first, joined(data.train_batches(8, seed=0, epoch=0))[0])


def test_halves_are_the_two_ends_of_the_training_text() -> None:
    data, first = counted(), set()
    for seed in range(8):
        halves = data.halves(seed)
        parts = [half._parts["train"] for half in halves]
        assert sorted(parts) == [(0, 360), (360, 720)] and parts == [h._parts["train"] for h in data.halves(seed)]
        assert all(half._parts["val"] == data._parts["val"] and half.count("train") == 44 for half in halves)
        first.add(parts[0])
    assert len(first) == 2
    x, _ = joined(halves[0].train_batches(8, seed=0, epoch=0))
    assert all(parts[0][0] <= n < parts[0][1] for n in x.flatten().tolist())


def test_to_the_same_device_is_the_same_data() -> None:
    data = counted()
    assert data.to("cpu") is data and data.device == torch.device("cpu")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_batches() -> None:
    data = counted()
    next(data.eval_batches("val"))
    moved = data.to("cuda")
    assert moved.to("cuda") is moved and moved.fingerprint == data.fingerprint
    (x, y), (x_cuda, y_cuda) = (next(d.train_batches(8, seed=0, epoch=0)) for d in (data, moved))
    assert x_cuda.is_cuda and torch.equal(x, x_cuda.cpu()) and torch.equal(y, y_cuda.cpu())


# Bad input ----------------------------------------------------------------------------------------------------------

BAD_TEXTS: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: TextData("void", ""), "void is empty: there is nothing to predict"),
    "one character": (lambda: TextData("a", "aaa" * 99), "a has one distinct character, 'a': there is nothing to pred"),
    "short test": (
        lambda: counted(89),
        r"the test split of places would have 8 characters, but with context=8 it needs 9: 89 characters are too few "
        r"for val_fraction=0.2. Give a longer text, a smaller context, or another fraction",
    ),
    "short validation": (
        lambda: counted(val_fraction=0.001),
        "the val split of places would have 1 characters, but .* it needs 9: 1000 .*val_fraction=0.001",
    ),
    "short training": (lambda: counted(val_fraction=0.999), "the train split of places would have 1 characters, .* 9"),
    "short halves": (
        lambda: counted(100, val_fraction=0.85).halves(),
        "half of the training text of places has 7 characters, but with context=8 it needs 9: .* a longer text",
    ),
    "missing": (lambda: load("nowhere.txt"), 'there is no nowhere.txt. Give a UTF-8 text file, or "pydoc", which'),
    "missing, other name": (lambda: load("nowhere", context=8), "there is no nowhere. Give a UTF-8 text file"),
    "test split": (lambda: counted().eval_batches("test"), "only nasbench.evaluate reads the test windows of places"),
    "unknown split": (lambda: counted().count("valid"), "places has no split 'valid'; did you mean 'val'"),
    "name": (lambda: load("pydocs"), "no data set 'pydocs', .*did you mean 'pydoc'"),
}
OF_IMAGES = {
    "size": 8,
    "crop": 0,
    "flip": False,
    "train_images": 9,
    "workers": 0,
    "download": True,
    "seed": 1,
    "root": "x",
}
BAD_SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"context {value!r}": (
            lambda value=value: counted(context=value),
            rf"context={value!r}: a network sees a whole number of characters, one at least",
        )
        for value in (0, -1, 8.0, True, "8")
    },
    "val_fraction": (lambda: counted(val_fraction=1), "val_fraction=1 is outside 0..1: it is the share of the text"),
    "characters": (lambda: counted(characters=1001), "characters=1001, but places has 1000 of them. Ask for 1..1000"),
    "no characters": (lambda: counted(characters=0), "characters=0, but places has 1000"),
    "batch": (lambda: counted().eval_batches("val", 0), "batch_size=0: a batch is a whole number of windows"),
    "cutout": (
        lambda: counted().train_batches(8, seed=0, epoch=0, cutout=2),
        "cutout=2: places is a text, which has no pixels to cut out. Leave it out",
    ),
    "start": (lambda: counted().train_batches(8, seed=0, epoch=0, start=12), "start=12 is outside 0..11"),
    "world": (lambda: counted().train_batches(8, seed=0, epoch=0, world=3), "batches of 8: .* a multiple of 3"),
    **{
        name: (
            lambda name=name, value=value: load("pydoc", **{name: value}),
            rf"{name}={value!r} is about images, but pydoc holds a text. Leave {name} out",
        )
        for name, value in OF_IMAGES.items()
    },
    **{
        f"{name} of images": (
            lambda name=name: load("digits", **{name: 64}),
            f"{name}=64 is about texts, but digits holds images. Leave {name} out",
        )
        for name in ("context", "characters")
    },
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text(case: str) -> None:
    call, message = BAD_TEXTS[case]
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case: str) -> None:
    call, message = BAD_SETTINGS[case]
    with pytest.raises(SettingError, match=message):
        call()


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("straße".encode("latin1") * 99)
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: .* at byte 4. Save it as UTF-8"):
        load(tmp_path / "latin.txt")
    (tmp_path / "void.txt").touch()
    with pytest.raises(DataError, match="void is empty"):
        load(tmp_path / "void.txt")
    (tmp_path / "book.md").write_text("some text")
    with pytest.raises(DataError, match=r"book\.md is neither .*If it is a text, pass context=64, or call it \.txt"):
        load(tmp_path / "book.md")
    with pytest.raises(DataError, match=r"void\.txt/book\.txt cannot be read: .*Give a UTF-8 text file"):
        load(tmp_path / "void.txt" / "book.txt")


def test_a_python_without_its_help_texts_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match='"pydoc" is the help texts of Python, and this Python comes without them'):
        load("pydoc")


# Everything that takes data -----------------------------------------------------------------------------------------


def test_scores_are_means_over_all_predicted_characters() -> None:
    data = small()
    model = Model(data.classes, 8)
    x, y = joined(data.eval_batches("val"))
    logits, scores = model(x).detach(), nb.validate(model, data, batch_size=7)
    assert scores["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
    assert scores["val_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert nb.evaluate(model, data).keys() == {"test_accuracy", "test_loss"}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert nb.recalibrate(model, data) is model  # it has no batch norms
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("channels_last", [True, False])
def test_fit_learns(channels_last: bool) -> None:
    data, seen = small(), []

    class Look(Callback):
        def on_epoch(self, run: Run) -> None:
            seen.append(run.train_accuracy)

    model = Model(data.classes, 16)
    before = nb.validate(model, data)
    nb.fit(model, data, epochs=6, callbacks=[Look()], channels_last=channels_last, **QUICK)
    after = nb.validate(model, data)
    assert after["val_loss"] < before["val_loss"] - 0.5 and after["val_accuracy"] > 0.15
    assert all(0 <= accuracy <= 1 for accuracy in seen) and seen[-1] > seen[0]


def test_fit_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, run: Run) -> None:
            if run.step == 20:
                raise KeyboardInterrupt

    data, models = small(), []
    for stops in (False, True):
        torch.manual_seed(0)
        model = Model(data.classes, 4)
        settings: dict[str, Any] = {"epochs": 3, "checkpoint": tmp_path / f"{stops}.pt"} | QUICK
        if stops:
            with pytest.raises(KeyboardInterrupt):
                nb.fit(model, data, callbacks=[Stop()], **settings)
        models.append(nb.fit(model, data, **settings))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    with pytest.raises(CheckpointError, match="data is"):
        nb.fit(model, small(context=8), epochs=3, checkpoint=tmp_path / "True.pt", **QUICK)


def test_what_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    data = small()
    model = Model(data.classes, 4)
    with pytest.raises(SettingError, match="cutout=4: pydoc is a text, which has no pixels"):
        nb.fit(model, data, cutout=4, checkpoint=tmp_path / "c.pt", **QUICK)
    assert not (tmp_path / "c.pt").exists()
    bad = nn.Embedding(data.classes, data.classes)  # (B, T, V)
    with pytest.raises(SettingError, match=r"maps a batch \(2, 16\) to \(2, 16, (\d+)\), but .* give \(2, \1, 16\)"):
        nb.fit(bad, data, **QUICK)
    with pytest.raises(SettingError, match=r"cannot take a batch \(2, 16\) of 'pydoc'"):
        nb.fit(nn.Conv2d(1, 2, 3), data, **QUICK)
    for space, other in ((NASBench201(), data), (Bigrams(), load("digits"))):
        with pytest.raises(SettingError, match=r"has \w+, but T.* has none. Use a space for such data, such as"):
            nb.search(space, other, "random", trials=1, progress=False)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="cutout=4: pydoc is a text"):
        nb.search(Bigrams(), data, "random", trials=1, cutout=4, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_step_grows_with_the_batch() -> None:
    data = small()
    model, seen = Model(data.classes, 8), []

    def step(x: Tensor, y: Tensor) -> None:
        seen.append((x.shape, x.dtype, y.shape))
        nn.functional.cross_entropy(model(x), y).backward()

    few, many = (memory.step_bytes(model, step, data.shape, size) for size in (8, 64))
    assert many - few > 56 * 16 * data.classes * 4  # logits alone
    assert seen[0] == ((2, 16), torch.int64, (2, 16))


def test_a_search_goes_on_and_ends_as_if_never_stopped() -> None:
    data = small()
    settings: dict[str, Any] = {"epochs": 1, "seed": 3} | QUICK
    whole = nb.search(Bigrams(), data, "evolution", trials=3, study="whole", **settings)
    nb.search(Bigrams(), data, "evolution", trials=1, study="parts", **settings)
    parts = nb.search(Bigrams(), small(), "evolution", trials=3, study="parts", **settings)
    metrics = [[{**t.metrics, "seconds": 0, "arch": t.arch} for t in result.trials] for result in (whole, parts)]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 3
    best = whole.best
    width = best.arch["width"]
    assert best.metrics["macs"] == 16 * width * data.classes  # type: ignore[operator]
    assert nb.validate(best.build(), data)["val_accuracy"] == pytest.approx(best.metrics["val_accuracy"])
    # Another process knows the data by what the study says of them.
    stored = whole.conditions["objective"]
    again = TrainObjective.from_settings(Bigrams(), stored, device="cpu")
    assert again.space == Bigrams(classes=data.classes, context=16) and again.data.fingerprint == data.fingerprint
    objective = TrainObjective(Bigrams().bind(data), data, Recipe(), device="cpu")
    extra = objective.preview(best.arch, ("bytes", "peak_bytes", "latency_ms"))
    assert extra["latency_ms"] > 0 and extra["peak_bytes"] > 4 * 16 * data.classes


def test_the_command_line_takes_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rhyme.txt").write_text("one two, buckle my shoe, three four, shut the door, " * 20)
    monkeypatch.setitem(sys.modules, "my_spaces", sys.modules[__name__])
    line = ["search", "--space", "my_spaces:Bigrams", "--data", "rhyme.txt", "--data-set", "context=8"]
    line += ["--trials", "1", "--epochs", "1", "--device", "cpu", "--set", "batch_size=8"]
    assert main(line) == 0
    assert "on test windows, read this once: test_accuracy" in capsys.readouterr().out
    assert main([*line, "--download"]) == 2
    assert "SettingError: download=True is about images, but rhyme.txt holds a text" in capsys.readouterr().err


def test_utf_16_is_told(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes("a text of words ".encode("utf-16") * 20)
    with pytest.raises(DataError, match=r"marked\.txt is not UTF-8: .* iconv -f utf-16 -t utf-8"):
        load(tmp_path / "marked.txt")
    (tmp_path / "plain.txt").write_bytes("a text of words ".encode("utf-16-le") * 20)
    with pytest.raises(DataError, match=r"plain\.txt has NUL characters, as UTF-16 has"):
        load(tmp_path / "plain.txt")


def test_a_text_is_a_string() -> None:
    with pytest.raises(DataError, match="book is bytes, not text"):
        TextData("book", b"bytes")  # type: ignore[arg-type]


def test_spaces_are_for_their_kind_of_data() -> None:
    with pytest.raises(SettingError, match="GPT has context, but .* has none. Use a space for such data, such as Conv"):
        nb.search(GPT(context=16, classes=10), load("digits"), "random", trials=1, progress=False)
    oblong = nb.data.from_arrays(np.zeros((20, 8, 12, 1), np.uint8), np.arange(20) % 2)
    with pytest.raises(SettingError, match="ViT is for square images, but .* is not. Load it with size="):
        nb.search(ViT(), oblong, "random", trials=1, progress=False)
