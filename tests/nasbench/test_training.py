"""Recipe, fit, checkpoints, scores, data-parallel training. Run as a script, this file is a worker of its own tests."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nasbench import checkpoint
from nasbench.data import Data, from_arrays, load
from nasbench.devices import init_distributed, pick_device
from nasbench.errors import CheckpointError, DataError, SettingError, TrainingDiverged
from nasbench.files import atomic_write
from nasbench.recipe import Recipe
from nasbench.training import Callback, Run, evaluate, fit, recalibrate, validate
from search_spaces.operations import DropPath

ROOT = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {"device": "cpu", "progress": False, "batch_size": 8}


def _data(images: int = 60) -> Data:
    """Random 8 x 8 images of three classes: 48 to train on, so 6 steps of 8."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (images, 8, 8), np.uint8), np.arange(images) % 3
    return from_arrays(x, y, x[::2], y[::2], name="noise")


class _Net(nn.Module):
    def __init__(self, norm: bool, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.path = DropPath()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(256, 3)
        self.spare = nn.Linear(1, 1)  # in no forward pass, as a sampled architecture may leave it

    def forward(self, x: Tensor) -> Tensor:
        x = self.path(self.norm(self.conv(x)).relu())
        logits: Tensor = self.head(self.dropout(x.flatten(1)))
        return logits


def _net(seed: int = 0, *, norm: bool = True, dropout: float = 0.3) -> _Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _Net(norm, dropout)


def _same(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights and statistics are equal to the last bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


class _Stop(Callback):
    """Raises in the given hook, when that is called after so many steps."""

    def __init__(self, hook: str, step: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        def stop(run: Run, *_: Tensor) -> None:
            if run.step == step:
                raise error("stopped by the test")

        setattr(self, hook, stop)


class _Average(Callback):
    """A moving average of the weights, which is wrong if a single step is missed or counted twice."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.epochs = 0

    def on_step(self, run: Run) -> None:
        for name, tensor in run.model.named_parameters():
            self.mean[name] = 0.9 * self.mean.get(name, torch.zeros(())) + 0.1 * tensor.detach()

    def on_epoch(self, run: Run) -> None:
        self.epochs += run.epoch

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.epochs = state["mean"], state["epochs"]


class TestRecipe:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("epochs", 0, "epochs=0, but it must be a whole number, 1 or more"),
            ("epochs", 1.5, "epochs=1.5, but it must be a whole number"),
            ("epochs", True, "epochs=True, but it must be a whole number"),
            ("batch_size", -8, "batch_size=-8, but it must be a whole number, 1 or more"),
            ("cutout", -1, "cutout=-1, but it must be a whole number, 0 or more"),
            ("optimizer", "sdg", "unknown optimizer 'sdg'; did you mean 'sgd'"),
            ("lr", 0, "lr=0, but it must be a number above 0"),
            ("lr", math.nan, "lr=nan, but it must be a number above 0"),
            ("lr", "0.1", "lr='0.1', but it must be a number above 0"),
            ("momentum", 1.0, "momentum=1.0, but it must be a number from 0 to below 1"),
            ("label_smoothing", -0.1, "label_smoothing=-0.1, but it must be"),
            ("lr_end", 0.2, "lr_end=0.2, but it must be a number from 0 to lr=0.1"),
            ("auxiliary", -0.1, "auxiliary=-0.1, but it must be a number, 0 or more"),
            ("drop_path", 1, "drop_path=1, but it must be a number from 0 to below 1"),
            ("weight_decay", -1e-4, "weight_decay=-0.0001, but it must be a number, 0 or more"),
            ("warmup", 11, "warmup=11, but it must be a number of epochs from 0 to epochs=10"),
            ("clip", 0.0, "clip=0.0, but it must be a number above 0, or None"),
            ("amp", "yes", "amp='yes', but it must be True, False or None"),
            ("augment", 1, "augment=1, but it must be True or False"),
        ],
    )
    def test_bad_value(self, field: str, value: object, message: str) -> None:
        with pytest.raises(SettingError, match=f"^recipe: {message}"):
            Recipe().replace(**{field: value})

    def test_unknown_field_names_the_nearest(self) -> None:
        with pytest.raises(SettingError, match="a recipe has no field 'epoch'; did you mean 'epochs'"):
            Recipe().replace(epoch=3)

    def test_json_keeps_everything(self) -> None:
        recipe = Recipe(epochs=3, optimizer="adamw", lr=1e-3, clip=None, amp=False, cutout=2, warmup=0.5)
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert Recipe.from_json('{"lr": 0.5}') == Recipe(lr=0.5)

    def test_numbers_of_numpy_become_plain(self) -> None:
        recipe = Recipe(epochs=np.int64(3), lr=np.float64(0.5), momentum=0)  # type: ignore[arg-type]
        assert [type(value) for value in (recipe.epochs, recipe.lr, recipe.momentum)] == [int, float, float]
        assert json.loads(recipe.to_json())["epochs"] == 3

    @pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[1]", "must be an object such as")])
    def test_bad_json(self, text: str, message: str) -> None:
        with pytest.raises(SettingError, match=message):
            Recipe.from_json(text)

    def test_learning_rate_rises_then_falls_to_zero(self) -> None:
        recipe = Recipe(epochs=10, lr=0.2, warmup=1.5)
        rates = [recipe.learning_rate(step, 20) for step in range(200)]
        assert rates[:3] == pytest.approx([0.2 / 30, 0.4 / 30, 0.6 / 30])
        assert rates[29] == rates[30] == max(rates) == 0.2
        assert all(a > b for a, b in itertools.pairwise(rates[30:]))
        assert rates[115] == pytest.approx(0.1)
        assert 0 < rates[-1] < 1e-4

    def test_warm_up_to_the_very_end(self) -> None:
        assert Recipe(epochs=2, lr=1.0, warmup=2).learning_rate(5, 3) == 1.0


class TestFit:
    def test_learns_digits(self) -> None:
        data = load("digits")
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        assert fit(model, data, epochs=4, batch_size=64, device="cpu", progress=False) is model
        assert validate(model, data)["val_accuracy"] > 0.93
        assert evaluate(model, data)["test_accuracy"] > 0.93

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_equals_a_plain_loop(self, optimizer: str) -> None:
        """The fused, clipped, channels-last loop computes what the textbook one does."""
        data, model = _data(), _net(dropout=0.0)
        other = copy.deepcopy(model)
        recipe = Recipe(epochs=2, optimizer=optimizer, lr=0.02, clip=0.5, batch_size=8, warmup=0.5, label_smoothing=0.1)
        fit(model, data, recipe, seed=5, device="cpu", progress=False)

        tensors = list(other.parameters())
        groups = [
            {"params": [tensor for tensor in tensors if tensor.ndim > 1], "weight_decay": 5e-4},
            {"params": [tensor for tensor in tensors if tensor.ndim == 1], "weight_decay": 0.0},
        ]
        if optimizer == "sgd":
            plain: torch.optim.Optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True, foreach=False)
        else:
            plain = torch.optim.AdamW(groups, 0.1, betas=(0.9, 0.999), foreach=False)
        for epoch in range(2):
            for step, (x, y) in enumerate(data.train_batches(8, seed=5, epoch=epoch), 6 * epoch):
                for group in plain.param_groups:
                    group["lr"] = recipe.learning_rate(step, 6)
                plain.zero_grad()
                functional.cross_entropy(other(x.contiguous()), y, label_smoothing=0.1).backward()
                nn.utils.clip_grad_norm_(tensors, 0.5)
                plain.step()
        for a, b in zip(model.parameters(), tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_seed_decides_everything(self) -> None:
        data = _data()
        first, again, other = (fit(_net(), data, epochs=2, seed=seed, **QUICK) for seed in (1, 1, 2))
        assert _same(first, again)
        assert not _same(first, other)

    def test_leaves_global_randomness_alone(self) -> None:
        before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
        model = fit(_net(), _data(), epochs=1, **QUICK)
        torch.rand(3)  # whatever was drawn before must not matter either
        other = fit(_net(), _data(), epochs=1, **QUICK)
        torch.set_rng_state(before[0])
        fit(_net(), _data(), epochs=1, **QUICK)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), str(np.random.get_state())) == before[1:]  # noqa: NPY002
        assert _same(model, other)

    def test_afterwards_model_is_ready_to_use(self) -> None:
        model = fit(_net(), _data(), epochs=1, **QUICK)
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_weight_decay_spares_norms_and_biases(self) -> None:
        seen: dict[float, set[str]] = {}

        class Look(Callback):
            def on_start(self, run: Run) -> None:
                names = {parameter: name for name, parameter in run.model.named_parameters()}
                for group in run.optimizer.param_groups:
                    seen[group["weight_decay"]] = {names[parameter] for parameter in group["params"]}

        fit(_net(), _data(), epochs=1, weight_decay=0.01, callbacks=[Look()], **QUICK)
        assert seen == {
            0.01: {"conv.weight", "head.weight", "spare.weight"},
            0.0: {"norm.weight", "norm.bias", "head.bias", "spare.bias"},
        }

    def test_frozen_parameters_stay(self) -> None:
        model = _net()
        model.conv.weight.requires_grad_(False)
        before = model.conv.weight.clone(), model.head.weight.clone()
        fit(model, _data(), epochs=1, weight_decay=0.1, **QUICK)
        assert torch.equal(model.conv.weight, before[0])
        assert not torch.equal(model.head.weight, before[1])

    def test_clip_limits_the_whole_gradient(self) -> None:
        norms = []

        class Norms(Callback):
            def on_backward(self, run: Run) -> None:
                norms.append([self.norm(run)])

            def on_step(self, run: Run) -> None:
                norms[-1].append(self.norm(run))

            def norm(self, run: Run) -> float:
                return float(nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None]))

        fit(_net(), _data(), epochs=1, clip=0.01, callbacks=[Norms()], **QUICK)
        assert all(before > 0.01 and after == pytest.approx(0.01, rel=1e-2) for before, after in norms)
        norms.clear()
        fit(_net(), _data(), epochs=1, clip=1e6, callbacks=[Norms()], **QUICK)
        assert all(before == after for before, after in norms)

    def test_drop_path_grows_linearly(self) -> None:
        model, seen = _net(), []

        class Look(Callback):
            def on_epoch(self, run: Run) -> None:
                seen.append(model.path.p)

        fit(model, _data(), epochs=3, drop_path=0.4, callbacks=[Look()], **QUICK)
        assert seen == pytest.approx([0, 0.2, 0.4])

    def test_drop_path_needs_a_module(self) -> None:
        with pytest.raises(SettingError, match="the model has no DropPath: set drop_path=0"):
            fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), _data(), drop_path=0.1, **QUICK)

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_memory_format(self, channels_last: bool) -> None:
        seen = []

        class Look(Callback):
            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> None:
                seen.append(x.is_contiguous(memory_format=torch.channels_last))

        data = from_arrays(np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2)
        conv = nn.Conv2d(3, 4, 3)
        model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        fit(model, data, epochs=1, channels_last=channels_last, callbacks=[Look()], **QUICK)
        assert set(seen) == {channels_last}
        assert conv.weight.is_contiguous(memory_format=torch.channels_last) == channels_last

    @pytest.mark.parametrize(("amp", "kind"), [(True, torch.bfloat16), (False, torch.float32), (None, torch.float32)])
    def test_amp(self, amp: bool | None, kind: torch.dtype) -> None:
        seen = []

        class Look(Callback):
            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> None:
                seen.append(logits.dtype)

        model = fit(_net(), _data(), epochs=1, amp=amp, callbacks=[Look()], **QUICK)
        assert set(seen) == {kind}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_label_smoothing_is_in_the_loss(self) -> None:
        class Look(Callback):
            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> None:
                self.expected = float(functional.cross_entropy(logits.detach(), y, label_smoothing=0.2))

            def on_step(self, run: Run) -> None:
                assert run.last_loss == self.expected

        fit(_net(), _data(), epochs=1, label_smoothing=0.2, callbacks=[Look()], **QUICK)

    def test_train_plus_val(self) -> None:
        steps = []

        class Look(Callback):
            def on_end(self, run: Run) -> None:
                steps.append(run.step)

        fit(_net(), _data(), epochs=1, callbacks=[Look()], **QUICK)
        fit(_net(), _data(), epochs=1, split="train+val", callbacks=[Look()], **QUICK)
        assert steps == [48 // 8, 60 // 8]

    def test_bar_is_shown_and_hidden(self, capsys: pytest.CaptureFixture[str]) -> None:
        fit(_net(), _data(), epochs=1, **QUICK)
        assert capsys.readouterr().err == ""
        fit(_net(), _data(), epochs=1, **QUICK | {"progress": True})
        assert "6/6" in capsys.readouterr().err


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seed": -1}, "seed=-1, but a seed is a whole number"),
            ({"seed": 0.5}, "seed=0.5, but a seed is a whole number"),
            ({"checkpoint_every": -1}, "checkpoint_every=-1, but it must be a number of seconds"),
            ({"device": "gpu"}, "there is no device 'gpu'; did you mean 'cpu'"),
            ({"device": "meta"}, "device 'meta' cannot train here"),
            ({"epochs": 0}, "epochs=0, but it must be"),
            ({"learning_rate": 1.0}, "a recipe has no field 'learning_rate'"),
            ({"cutout": 9}, "cutout"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        model = _net()
        before = copy.deepcopy(model)
        with pytest.raises(SettingError, match=message):
            fit(model, _data(), **QUICK | arguments)
        assert _same(model, before)

    def test_unknown_split(self) -> None:
        with pytest.raises(DataError, match="'validation'"):
            fit(_net(), _data(), split="validation", **QUICK)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), r"to \(2, 5\), but 'noise' has 3 classes.*give \(2, 3\)"),
            (nn.Conv2d(1, 3, 3), r"to \(2, 3, 6, 6\), but 'noise' has 3 classes"),
            (nn.LSTM(8, 3), "cannot take a batch|to tuple, but"),
            (nn.Conv2d(3, 3, 3), r"cannot take a batch \(2, 1, 8, 8\) of 'noise': .*3 channels"),
            (nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(3)), "no parameter that requires a gradient"),
        ],
    )
    def test_model_that_does_not_fit(self, model: nn.Module, message: str) -> None:
        with pytest.raises(SettingError, match=message):
            fit(model, _data(), **QUICK)

    def test_absent_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SettingError, match="device 'cuda:1' was asked for, but torch sees 0 CUDA GPUs"):
            pick_device("cuda:1")
        assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


class TestDivergence:
    def test_too_high_a_rate(self) -> None:
        place = r"the (loss|gradient) is not finite at epoch \d, step \d"
        with pytest.raises(
            TrainingDiverged, match=rf"{place}.*Lower lr \(it is 1e\+25\) or clip \(None\), or raise warmup"
        ):
            fit(_net(), _data(), epochs=9, lr=1e25, clip=None, **QUICK)

    def test_last_finite_loss_is_told(self) -> None:
        class Spoil(Callback):
            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
                return logits.sum() * 0 + (math.inf if run.step == 7 else 2.5)

        with pytest.raises(
            TrainingDiverged, match=r"the loss is not finite at epoch 1, step 7 \(last finite loss: 2.5\)"
        ):
            fit(_net(), _data(), epochs=2, callbacks=[Spoil()], **QUICK)

    def test_gradient_is_seen_before_it_reaches_the_weights(self) -> None:
        class Spoil(Callback):
            def on_backward(self, run: Run) -> None:
                next(run.model.parameters()).grad = torch.full((4, 1, 3, 3), math.nan)

        model = _net()
        with pytest.raises(TrainingDiverged, match="the gradient is not finite at epoch 0, step 0"):
            fit(model, _data(), epochs=1, callbacks=[Spoil()], **QUICK)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    def test_in_the_very_last_step(self) -> None:
        class Spoil(Callback):
            def on_step(self, run: Run) -> None:
                if run.step == 6:
                    with torch.no_grad():
                        next(run.model.parameters()).fill_(math.inf)

        with pytest.raises(TrainingDiverged, match="the weights are not finite"):
            fit(_net(), _data(), epochs=1, callbacks=[Spoil()], **QUICK)

    def test_no_bad_checkpoint_is_left(self, tmp_path: Path) -> None:
        class Spoil(Callback):
            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> Tensor | None:
                return logits.sum() * math.nan if run.step == 4 else None

        with pytest.raises(TrainingDiverged):
            fit(
                _net(),
                _data(),
                epochs=1,
                callbacks=[Spoil()],
                checkpoint=tmp_path / "c.pt",
                checkpoint_every=0,
                **QUICK,
            )
        stored = torch.load(tmp_path / "c.pt", weights_only=True)
        assert stored["step"] == 4
        assert all(torch.isfinite(tensor).all() for tensor in stored["model"].values())


class TestCallbacks:
    def test_order(self) -> None:
        calls: list[str] = []

        class Note(Callback):
            def __init__(self, name: str) -> None:
                self.name = name

            def __getattribute__(self, attribute: str) -> Any:
                if attribute == "loss" or attribute.startswith("on_"):
                    calls.append(f"{attribute} {self.name}")
                return super().__getattribute__(attribute)

        fit(_net(), _data(15), epochs=2, callbacks=[Note("a"), Note("b")], **QUICK | {"batch_size": 12})
        step = ["loss", "on_backward", "on_step", "on_epoch"]
        hooks = ["on_start", *step, *step, "on_end"]
        assert calls == [f"{hook} {name}" for hook in hooks for name in "ab"]

    def test_run_tells_where_it_is(self) -> None:
        seen = []

        class Look(Callback):
            def __init__(self) -> None:
                self.losses: list[float] = []
                self.hits: list[float] = []

            def on_start(self, run: Run) -> None:
                assert math.isnan(run.train_loss) and math.isnan(run.train_accuracy)

            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> None:
                self.hits.append((logits.argmax(1) == y).float().mean().item())

            def on_step(self, run: Run) -> None:
                seen.append((run.epoch, run.step))
                self.losses.append(run.last_loss)

            def on_epoch(self, run: Run) -> None:
                assert run.train_loss == pytest.approx(np.mean(self.losses[-6:]), rel=1e-5)
                assert run.train_accuracy == pytest.approx(np.mean(self.hits[-6:]), rel=1e-5)
                assert run.seconds > 0

        fit(_net(), _data(), epochs=2, callbacks=[Look()], **QUICK)
        assert seen == [(step // 6, step) for step in range(1, 13)]

    def test_loss_is_replaced_by_the_first_that_gives_one(self) -> None:
        class Give(Callback):
            def __init__(self, value: float | None) -> None:
                self.value = value

            def loss(self, run: Run, x: Tensor, y: Tensor, logits: Tensor) -> Tensor | None:
                return None if self.value is None else logits.mean() * 0 + self.value

            def on_step(self, run: Run) -> None:
                assert run.last_loss == 7.0

        model = _net()
        before = model.head.weight.clone()
        fit(model, _data(), epochs=1, weight_decay=0, callbacks=[Give(None), Give(7.0), Give(8.0)], **QUICK)
        assert torch.equal(model.head.weight, before)  # a constant loss teaches nothing

    def test_validating_in_between_changes_nothing(self) -> None:
        class Validate(Callback):
            def on_step(self, run: Run) -> None:
                torch.rand(5)
                validate(run.model, run.data)

        data = _data()
        plain, watched = (fit(_net(), data, epochs=1, callbacks=c, **QUICK) for c in ([], [Validate()]))
        assert _same(plain, watched)


class TestCheckpoint:
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("every", [0.0, 1e9])
    def test_interrupted_anywhere_equals_unbroken(self, optimizer: str, every: float, tmp_path: Path) -> None:
        """Batch norm, dropout, drop-path and a callback with state; stopped at four random steps."""
        data, settings = (
            _data(),
            QUICK | {"epochs": 3, "optimizer": optimizer, "lr": 0.01, "drop_path": 0.3, "warmup": 1},
        )
        whole = _Average()
        expected = fit(_net(), data, seed=3, callbacks=[whole], **settings)
        rng, file = random.Random(f"{optimizer} {every}"), tmp_path / "run.pt"
        for stop, model in zip(sorted(rng.sample(range(1, 19), 4)), [_net(), *map(_net, (7, 8, 9))], strict=True):
            callbacks: list[Callback] = [_Average(), _Stop("on_step", stop, rng.choice([KeyboardInterrupt, OSError]))]
            rng.shuffle(callbacks)
            with pytest.raises((KeyboardInterrupt, OSError), match="stopped by the test"):
                fit(model, data, seed=3, callbacks=callbacks, checkpoint=file, checkpoint_every=every, **settings)
            assert torch.load(file, weights_only=True)["step"] == stop
        part = _Average()
        model = fit(_net(seed=9), data, seed=3, callbacks=[part], checkpoint=file, **settings)
        assert _same(model, expected)
        assert part.epochs == whole.epochs == 1 + 2 + 3
        assert all(torch.equal(part.mean[name], mean) for name, mean in whole.mean.items())

    @pytest.mark.parametrize("hook", ["on_backward", "on_epoch", "loss"])
    def test_other_moments(self, hook: str, tmp_path: Path) -> None:
        """A step that was not finished is made again; an epoch's hooks that had not run are called."""
        data, file = _data(), tmp_path / "run.pt"
        whole, part = _Average(), _Average()
        expected = fit(_net(), data, epochs=2, callbacks=[whole], **QUICK)
        stop = _Stop(hook, 6)
        settings: dict[str, Any] = QUICK | {"epochs": 2, "checkpoint": file, "checkpoint_every": 0}
        with pytest.raises(KeyboardInterrupt):
            fit(_net(), data, callbacks=[stop, _Average()], **settings)
        model = fit(_net(), data, callbacks=[part], **settings)
        assert _same(model, expected)
        assert part.epochs == whole.epochs
        assert all(torch.equal(part.mean[name], mean) for name, mean in whole.mean.items())

    def test_finished_run_returns_at_once(self, tmp_path: Path) -> None:
        data, file, calls = _data(), tmp_path / "deep" / "run.pt", []

        class Look(Callback):
            def on_step(self, run: Run) -> None:
                calls.append("step")

            def on_end(self, run: Run) -> None:
                calls.append("end")

        first = fit(_net(), data, epochs=1, checkpoint=file, callbacks=[Look()], **QUICK)
        before = file.read_bytes()
        again = fit(_net(seed=9), data, epochs=1, checkpoint=file, callbacks=[Look()], **QUICK)
        assert calls == ["step"] * 6 + ["end"] * 2
        assert _same(first, again)
        assert file.read_bytes() == before

    def test_written_when_the_time_has_come(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved, clock = [], itertools.count()
        monkeypatch.setattr("nasbench.training.time.monotonic", lambda: float(next(clock)))

        class Look(Callback):
            def state_dict(self) -> dict[str, Any]:
                saved.append(True)
                return {}

        arguments: dict[str, Any] = {"epochs": 2, "checkpoint": tmp_path / "c.pt", "callbacks": [Look()], **QUICK}
        fit(_net(), _data(), checkpoint_every=1e9, **arguments)
        assert len(saved) == 1  # at the end
        (tmp_path / "c.pt").unlink()
        saved.clear()
        fit(_net(), _data(), checkpoint_every=4, **arguments)
        assert 3 <= len(saved) < 12

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 1}, "seed is 0 there and 1 here"),
            ({"lr": 0.05}, "lr is 0.1 there and 0.05 here"),
            ({"epochs": 2, "clip": None}, "epochs is 1 there and 2 here; clip is 5.0 there and None here"),
            ({"split": "train+val"}, r"split is 'train' there and 'train\+val' here"),
            ({"data": _data(66)}, "data is '.*' there and '.*' here"),
            ({"model": _net(norm=False)}, "model is '.*' there and '.*' here"),
        ],
    )
    def test_of_another_run(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        settings: dict[str, Any] = QUICK | {"epochs": 1, "checkpoint": tmp_path / "run.pt"}
        other: dict[str, Any] = {"model": _net(), "data": _data()} | settings | changes
        fit(_net(), _data(), **settings)
        before = (tmp_path / "run.pt").read_bytes()
        with pytest.raises(CheckpointError, match=f"belongs to another run: {message}.*delete it to train anew"):
            fit(**other)
        assert (tmp_path / "run.pt").read_bytes() == before

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "pickle", "old"])
    def test_corrupt(self, damage: str, tmp_path: Path) -> None:
        file, message = tmp_path / "run.pt", "is corrupt, or none .*delete it to train anew"
        fit(_net(), _data(), epochs=1, checkpoint=file, **QUICK)
        match damage:
            case "truncated":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            case "empty":
                file.write_bytes(b"")
            case "text":
                file.write_text("weights, honestly")
            case "pickle":
                torch.save({"format": 1, "model": _net()}, file)  # code to run, which weights_only refuses
            case "foreign":
                torch.save(_net().state_dict(), file)
                message = "is not a checkpoint of nasbench.fit"
            case "old":
                torch.save(torch.load(file, weights_only=True) | {"format": 0}, file)
                message = "is not a checkpoint of nasbench.fit, version 1"
        with pytest.raises(CheckpointError, match=message):
            fit(_net(), _data(), epochs=1, checkpoint=file, **QUICK)

    def test_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        model = _net()
        with pytest.raises(CheckpointError, match=r"could not be written \(.*\): name a file where you can write"):
            fit(model, _data(), checkpoint=tmp_path / "file" / "run.pt", **QUICK)
        with pytest.raises(CheckpointError, match="it is a folder"):
            fit(model, _data(), checkpoint=tmp_path, **QUICK)
        assert _same(model, _net())

    def test_error_while_saving_does_not_hide_the_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "atomic_write", full)
        with pytest.raises(KeyboardInterrupt) as caught:
            fit(_net(), _data(), callbacks=[_Stop("on_step", 3)], checkpoint=tmp_path / "run.pt", **QUICK)
        assert "No space left" in caught.value.__notes__[0]

    def test_state_of_a_callback_must_be_plain(self, tmp_path: Path) -> None:
        class Odd(Callback):
            def state_dict(self) -> dict[str, Any]:
                return {"seen": [{1, 2}]}

        with pytest.raises(
            SettingError, match=r"the state of callback .*Odd cannot be kept in a checkpoint: .*\{1, 2\}"
        ):
            fit(_net(), _data(), epochs=1, callbacks=[Odd()], checkpoint=tmp_path / "run.pt", **QUICK)

    def test_callback_is_missing(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = QUICK | {"epochs": 1, "checkpoint": tmp_path / "run.pt"}
        fit(_net(), _data(), callbacks=[_Average()], **settings)
        with pytest.raises(CheckpointError, match="holds the state of a callback _Average: pass one again"):
            fit(_net(), _data(), **settings)

    def test_callback_that_changed_the_model_is_missing(self, tmp_path: Path) -> None:
        class Mask(Callback):
            def on_start(self, run: Run) -> None:
                run.model.get_submodule("head").register_buffer("mask", torch.ones(3, 256))

        settings: dict[str, Any] = QUICK | {"epochs": 1, "checkpoint": tmp_path / "run.pt"}
        masked = fit(_net(), _data(), callbacks=[Mask()], **settings)
        assert _same(fit(_net(), _data(), callbacks=[Mask()], **settings), masked)
        with pytest.raises(CheckpointError, match="(?s)does not fit model or optimizer: .*head.mask"):
            fit(_net(), _data(), **settings)


class TestScores:
    def test_validate_counts_every_image_once(self) -> None:
        model, data = _net(), _data()
        x, y = (torch.cat(part) for part in zip(*data.eval_batches("train"), strict=True))
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(x)
        scores = validate(model, data, batch_size=7, split="train")
        assert scores["train_accuracy"] == int((logits.argmax(1) == y).sum()) / 48
        assert scores["train_loss"] == pytest.approx(float(functional.cross_entropy(logits, y)), rel=1e-5)

    def test_modules_keep_their_modes(self) -> None:
        model, data = _net(), _data()
        model.norm.eval()
        before = copy.deepcopy(model)
        validate(model, data)
        evaluate(model, data)
        assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
        assert _same(model, before)

    def test_only_evaluate_reads_test_images(self) -> None:
        with pytest.raises(DataError, match="only nasbench.evaluate reads the test images"):
            validate(_net(), _data(), split="test")
        hits = evaluate(_net(), _data())["test_accuracy"] * 30
        assert hits == pytest.approx(round(hits))


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # of a convolution with one input channel; harmless
class TestDistributed:
    def test_outside_torchrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert init_distributed() == (0, 1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"RANK": None, "MASTER_ADDR": None}, r"\(RANK is missing, MASTER_ADDR is missing\): start with torchrun"),
            ({"RANK": "first"}, r"\(RANK='first'\)"),
        ],
    )
    def test_broken_environment(
        self, changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (_environment(0, 2, 1) | changes).items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
        with pytest.raises(SettingError, match=message):
            init_distributed()

    def test_two_processes_equal_one(self, processes: Path) -> None:
        first, second = (torch.load(processes / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        once, twice = _net(norm=False, dropout=0), _net(norm=False, dropout=0)
        with pytest.raises(KeyboardInterrupt):
            fit(once, _data(), callbacks=[_Stop("on_step", 1)], **QUICK)
        fit(twice, _data(), epochs=2, **QUICK)
        for name, model, error in (("one step", once, 1e-6), ("two epochs", twice, 1e-4)):
            for key, tensor in model.state_dict().items():
                assert torch.equal(first[name][key], second[name][key])
                torch.testing.assert_close(first[name][key], tensor, rtol=0, atol=error)

    def test_interrupted_processes_continue(self, processes: Path) -> None:
        for rank in (0, 1):
            models = torch.load(processes / f"{rank}.pt", weights_only=True)
            for key, tensor in models["two epochs"].items():
                assert torch.equal(models["continued"][key], tensor)

    def test_rank_0_alone_writes(self, processes: Path) -> None:
        written = [torch.load(processes / f"{rank}.pt", weights_only=True)["written"] for rank in (0, 1)]
        assert written == [2, 0]  # at the interruption, and at the end

    def test_killed_process_continues_in_another(self, processes: Path) -> None:
        """Two processes with one thread each compute the same bits."""
        file = processes / "killed.pt"
        assert torch.load(file, weights_only=True)["step"] == 5
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            continued, unbroken = (fit(_net(), _data(), epochs=2, checkpoint=c, **QUICK) for c in (file, None))
        finally:
            torch.set_num_threads(threads)
        assert _same(continued, unbroken)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which this process and another, as ranks 0 and 1, and then the other alone, left their results."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | paths | _environment(1, 2, port)
    other = subprocess.Popen([sys.executable, __file__, str(folder)], env=environment)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in _environment(0, 2, port).items():
                patch.setenv(name, value)
            _as_rank(folder)
        assert other.wait(60) == 9
    finally:
        other.kill()
    return folder


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _as_rank(folder: Path) -> None:
    """Train as one of two processes: one step; two epochs; two epochs with an interruption."""
    rank, world = init_distributed()
    assert (world, init_distributed()) == (2, (rank, world))
    written = []

    def noted(path: str | Path) -> Any:
        written.append(path)
        return atomic_write(path)

    one, two, first = (_net(norm=False, dropout=0) for _ in range(3))
    settings: dict[str, Any] = QUICK | {"epochs": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "atomic_write", noted)
        with pytest.raises(KeyboardInterrupt):
            fit(one, _data(), callbacks=[_Stop("on_step", 1)], **settings)
        fit(two, _data(), **settings)
        settings["checkpoint"] = folder / "shared.pt"
        with pytest.raises(KeyboardInterrupt):
            fit(first, _data(), callbacks=[_Stop("on_step", 8)], **settings)
        torch.distributed.barrier()
        continued = fit(_net(seed=rank, norm=False, dropout=0), _data(), **settings)
    torch.distributed.destroy_process_group()
    models = {"one step": one, "two epochs": two, "continued": continued}
    states: dict[str, Any] = {name: model.state_dict() for name, model in models.items()}
    torch.save(states | {"written": len(written)}, folder / f"{rank}.pt")


def _to_be_killed(folder: Path) -> None:
    """Train with a checkpoint every step, and be gone in the midst of the sixth."""

    class Kill(Callback):
        def on_backward(self, run: Run) -> None:
            if run.step == 5:
                os._exit(9)

    fit(_net(), _data(), epochs=2, checkpoint=folder / "killed.pt", checkpoint_every=0, callbacks=[Kill()], **QUICK)


# Two heads, and other statistics -------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Returns auxiliary logits too while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> Any:
        x = x.flatten(1)
        return (self.main(x), self.side(x)) if self.training else self.main(x)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_an_auxiliary_head_adds_its_weighted_loss(weight: float) -> None:
    data = load("digits", train_images=200)
    model = TwoHeads()
    before = model.side.weight.detach().clone()
    twin = copy.deepcopy(model)
    fit(model, data, epochs=1, batch_size=160, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, clip=None,
        auxiliary=weight, device="cpu", progress=False)  # fmt: skip
    x, y = next(data.train_batches(160, seed=0, epoch=0))
    main, side = twin.train()(x)
    loss = functional.cross_entropy(main, y) + weight * functional.cross_entropy(side, y)
    loss.backward()
    assert torch.allclose(model.side.weight, before - 0.1 * twin.side.weight.grad, atol=1e-6)
    assert torch.equal(model.side.weight, before) == (weight == 0)


def test_recalibration_takes_the_statistics_of_training_images() -> None:
    data = load("digits", train_images=200)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    norm = model[0]
    norm.running_mean.fill_(99.0)
    weights = model[2].weight.detach().clone()
    recalibrate(model, data, batch_size=160)
    x, _ = next(data.train_batches(160, seed=0, epoch=0, augment=False))
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(norm.running_var, x.var((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1
    assert not model.training
    assert torch.equal(model[2].weight, weights)
    state = torch.get_rng_state()
    recalibrate(model.train(), data)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_path_grows_with_depth() -> None:
    data = load("digits", train_images=200)
    shallow, deep = DropPath(depth=0.25), DropPath()
    model = nn.Sequential(shallow, deep, nn.Flatten(), nn.Linear(64, 10))
    fit(model, data, epochs=3, drop_path=0.4, device="cpu", progress=False)
    assert (shallow.p, deep.p) == (pytest.approx(0.1), pytest.approx(0.4))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _as_rank(Path(sys.argv[1]))
    _to_be_killed(Path(sys.argv[1]))
