"""Masks that move inside `nasbench.fit`: interrupted and continued, they end where the unbroken training ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import nasbench as nb
from compress.callbacks import DynamicCallback
from compress.errors import CompressionError
from compress.pruning import masks, prune
from nasbench.training import Run

DATA = nb.data.load("digits", train_images=200)


def network() -> nn.Module:
    torch.manual_seed(0)
    return prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), 0.2)


class Stop(nb.Callback):
    def on_step(self, run: Run) -> None:
        if run.step == 13:
            raise KeyboardInterrupt


def train(method: str, checkpoint: Path | None = None, *more: nb.Callback) -> nn.Module:
    model = network()
    callback = DynamicCallback(method, interval=2, seed=3)
    recipe = {"epochs": 5, "batch_size": 32, "device": "cpu", "progress": False}
    nb.fit(model, DATA, callbacks=[callback, *more], checkpoint=checkpoint, **recipe)  # type: ignore[arg-type]
    assert callback.sparsity.step == 25
    assert callback.sparsity.updates == 9
    return model


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_training_that_was_interrupted_ends_with_the_same_masks(method: str, tmp_path: Path) -> None:
    whole = train(method)
    with pytest.raises(KeyboardInterrupt):
        train(method, tmp_path / "run.pt", Stop())
    again = train(method, tmp_path / "run.pt")
    for name, mask in masks(whole).items():
        assert torch.equal(mask, masks(again)[name])
        assert not torch.equal(mask, masks(network())[name])
    for own, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_a_model_without_masks_is_refused_before_it_is_trained() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.detach().clone()
    with pytest.raises(CompressionError, match="mask"):
        nb.fit(model, DATA, callbacks=[DynamicCallback("rigl")], device="cpu", progress=False)
    assert torch.equal(model[1].weight, before)


def test_unknown_methods_and_settings_are_refused_at_once() -> None:
    with pytest.raises(CompressionError, match="no method 'rig'; did you mean 'rigl'"):
        DynamicCallback("rig")
    with pytest.raises(CompressionError, match="no setting 'intervall'; did you mean 'interval'"):
        DynamicCallback("rigl", intervall=2)
    with pytest.raises(CompressionError, match="no setting 'steps'; nasbench.fit knows it; leave it out"):
        DynamicCallback("rigl", steps=100)


def test_masks_that_would_never_change_are_refused_without_advice_that_cannot_be_followed() -> None:
    with pytest.raises(CompressionError, match="the masks would never change: .* or give a shorter interval") as caught:
        nb.fit(network(), DATA, epochs=1, callbacks=[DynamicCallback()], device="cpu", progress=False)
    assert "steps=" not in str(caught.value)


def test_one_training_moves_masks_once_but_an_interrupted_one_is_no_hindrance() -> None:
    model = network()
    first = DynamicCallback(interval=2)
    with pytest.raises(KeyboardInterrupt):
        nb.fit(model, DATA, epochs=5, batch_size=32, callbacks=[first, Stop()], device="cpu", progress=False)
    assert first.sparsity.step == 13, "it has more to do"
    two: list[nb.Callback] = [DynamicCallback(interval=2), DynamicCallback("set", interval=2)]
    with pytest.raises(CompressionError, match="a DynamicSparsity of this optimizer already"):
        nb.fit(model, DATA, epochs=5, batch_size=32, callbacks=two, device="cpu", progress=False)
    again = DynamicCallback(interval=2)
    nb.fit(model, DATA, epochs=5, batch_size=32, callbacks=[again], device="cpu", progress=False)
    assert again.sparsity.step == 25
