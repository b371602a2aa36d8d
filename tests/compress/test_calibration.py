"""Calibration inputs: batches in every form, and what cannot calibrate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nasbench as nb
from compress.calibration import LEAST, batches_of
from compress.errors import CompressionError

X = torch.rand(LEAST, 3, 4, 4)


@pytest.mark.parametrize(
    "given",
    [
        X,
        [X[:5], X[5:]],
        [(X, torch.zeros(LEAST))],
        [[X, None]],
        iter([X]),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, torch.zeros(LEAST)), batch_size=3),
    ],
)
def test_batches_come_in_many_forms(given: Any) -> None:
    assert torch.equal(torch.cat([x for (x,) in batches_of(given)]), X)


def test_several_inputs() -> None:
    ((x, y),) = batches_of([((X, X + 1), None)])
    assert torch.equal(x + 1, y)


def test_data_give_training_images_as_they_are() -> None:
    data = nb.data.load("digits")
    images = torch.cat([x for (x,) in batches_of(data)])
    assert images.shape == (256, 1, 8, 8)
    train = {tuple(image.flatten().tolist()) for x, _ in data.eval_batches("train") for image in x}
    assert all(tuple(image.flatten().tolist()) in train for image in images)
    assert torch.equal(images, torch.cat([x for (x,) in batches_of(data)]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "calibration is missing: .*, got nothing"),
        (3, "calibration is missing: .*, got a int"),
        ("digits", "calibration is missing: .*, got a str"),
        ({"x": X}, "calibration is missing: .*, got a dict"),
        ([], "has 0 inputs; give 8 at least"),
        (X[:7], "has 7 inputs; give 8 at least"),
        ([3], "a batch of a calibration is .* got int"),
        ([()], "a batch of a calibration is .* got tuple"),
        ([X, X[:, :2]], r"one shape but for N: got torch.float32 \(N, 3, 4, 4\) and torch.float32 \(N, 2, 4, 4\)"),
        ([X, X.double()], r"torch.float32 \(N, 3, 4, 4\) and torch.float64 \(N, 3, 4, 4\)"),
        ([((X, X[:1]), None)], "a batch of a calibration is"),
        (X.clone().fill_(float("nan")), "infinite or no number"),
        ([X, X / 0], "infinite or no number"),
    ],
)
def test_what_cannot_calibrate_is_refused(given: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        batches_of(given)
