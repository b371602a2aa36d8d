"""Which images train and which validate: decided by a seed, equally for every class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.errors import DataError, SettingError

Array = NDArray[Any]


def stratified(labels: Array, count: int, rng: np.random.Generator) -> Array:
    """Return `count` sorted positions drawn so that every class keeps its share to within one image."""
    numbers = np.bincount(labels)
    share = numbers * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1  # largest remainders first
    picks = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in enumerate(take)]
    return np.sort(np.concatenate(picks))


def split_rows(
    name: str, labels: Array, classes: int, val_fraction: float, seed: int, train_images: int | None
) -> tuple[Array, Array]:
    """Return the rows of the training and the validation split."""
    if not 0 < val_fraction < 1:
        raise SettingError(
            f"val_fraction={val_fraction} is outside 0..1: it is the share of training images to validate on."
        )
    if seed < 0:
        raise SettingError(f"seed={seed}: a seed is 0 or more.")
    rng = np.random.default_rng(seed)
    rows = np.arange(len(labels))
    if train_images is not None:
        if not 0 < train_images <= len(labels):
            raise SettingError(
                f"train_images={train_images}, but {name} has {len(labels)} of them. Ask for 1..{len(labels)}."
            )
        rows = stratified(labels, train_images, rng)
    chosen = labels[rows]
    picks = stratified(chosen, round(len(rows) * val_fraction), rng)
    val = rows[picks]
    train = np.delete(rows, picks)
    for split, part in (("training", train), ("validation", val)):
        if len(missing := np.setdiff1d(np.arange(classes), labels[part])):
            raise DataError(
                f"the {split} split of {name} would have no image of class {missing[0]}: {len(rows)} images "
                f"of {classes} classes are too few for val_fraction={val_fraction}. Give more, or another fraction."
            )
    return train, val
