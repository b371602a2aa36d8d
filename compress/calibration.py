"""The inputs on which a network's activations are measured before they get eight bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressionError
from nasbench.data import Data

LEAST = 8
"""The fewest inputs: ranges of fewer say little about others."""
IMAGES = 256
"""How many training images (windows of a text) are taken of data."""

Calibration = Tensor | Iterable[Any] | Data
"""Batches of inputs, or pairs of them and something else; one batch; or data, whose training split is read."""

_BATCH = 32


def batches_of(calibration: Calibration) -> list[tuple[Tensor, ...]]:
    """Return the batches of a calibration on the CPU, each a tuple of what the model takes.

    Args:
        calibration: batches (N, ...), or pairs of such a batch and something that is ignored, such as labels. The batch
            of a model that takes several inputs is a tuple, the first of such a pair. A single tensor is one batch. Of
            data, up to `IMAGES` inputs of the training split are taken, drawn with seed 0, without augmentation.

    Raises:
        CompressionError: there are no batches, less than `LEAST` inputs in all, batches of different shapes, or numbers
            that are not finite.

    Example:
        >>> [len(x) for x, in batches_of([(torch.rand(6, 3, 8, 8), torch.zeros(6)), torch.rand(2, 3, 8, 8)])]
        [6, 2]
    """
    batches = [_inputs(batch) for batch in _iterated(calibration)]
    count = sum(len(batch[0]) for batch in batches)
    if count < LEAST:
        raise CompressionError(
            f"the calibration has {count} inputs; give {LEAST} at least, better 100, such as images of the training "
            "split."
        )
    for batch in batches:
        if _kinds(batch) != _kinds(batches[0]):
            shapes = [
                ", ".join(f"{dtype} (N, {str(shape)[1:]}" for shape, dtype in _kinds(b)) for b in (batches[0], batch)
            ]
            raise CompressionError(
                f"all batches of a calibration have one shape but for N: got {' and '.join(shapes)}."
            )
        if not all(bool(x.isfinite().all()) for x in batch):
            raise CompressionError("the calibration has inputs that are infinite or no number; leave them out.")
    return batches


def training_inputs(data: Data, count: int, seed: int) -> list[Tensor]:
    """Return batches of so many training inputs, fewer where there are not as many; a seed decides which."""
    inputs, _ = next(data.train_batches(count, seed=seed, epoch=0, augment=False))
    return [*inputs.split(_BATCH)]


def _iterated(calibration: Calibration) -> Iterable[Any]:
    if isinstance(calibration, Data):
        return training_inputs(calibration.to("cpu"), IMAGES, seed=0)
    if isinstance(calibration, Tensor):
        return [calibration]
    if isinstance(calibration, str | Mapping) or not isinstance(calibration, Iterable):
        given = "nothing" if calibration is None else f"a {type(calibration).__name__}"
        raise CompressionError(
            f"the calibration is missing: give batches of inputs as the model takes them, or data, got {given}."
        )
    return calibration


def _inputs(batch: Any) -> tuple[Tensor, ...]:
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not inputs or not all(isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(inputs[0]) for x in inputs):
        raise CompressionError(
            "a batch of a calibration is a tensor (N, ...), or a pair of that and labels, or a pair of several such "
            f"inputs, as a tuple, and labels; got {type(batch).__name__}."
        )
    return tuple(x.detach().to("cpu") for x in inputs)


def _kinds(batch: tuple[Tensor, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(x.shape[1:]), x.dtype) for x in batch]
