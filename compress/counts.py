"""Whole numbers of weights: shares of layers made exact, so that their sum is the one asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from search_spaces.masks import top_k_mask


def apportion(ideal: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Return whole numbers near the ideal ones: at least 1, at most the layer's size, and `total` in all.

    Every layer gets its ideal number rounded down; what is left goes, one by one, to the largest fractional parts. What
    the layers that must keep one have too much is taken from those that keep most and are not dense.

    Args:
        ideal: weights of each layer, by name; any numbers.
        sizes: how many weights the layer has.
        total: the sum; at least one for each layer, at most all of them.

    Raises:
        ValueError: no such numbers have this sum.

    Example:
        >>> apportion({"a": 2.7, "b": 3.3, "c": 0.1}, {"a": 10, "b": 10, "c": 10}, 6)
        {'a': 2, 'b': 3, 'c': 1}
    """
    if not len(ideal) <= total <= sum(sizes[name] for name in ideal):
        raise ValueError(f"{total} weights cannot be shared out among layers of {[sizes[name] for name in ideal]}")
    counts = {name: min(sizes[name], max(1, math.floor(own))) for name, own in ideal.items()}
    left = total - sum(counts.values())
    order = sorted(ideal, key=lambda name: math.floor(ideal[name]) - ideal[name])
    while left > 0:
        for name in [name for name in order if counts[name] < sizes[name]][:left]:
            counts[name] += 1
            left -= 1
    for _ in range(-left):
        most = max((n for n in counts if counts[n] > 1), key=lambda n: (counts[n] < sizes[n], counts[n]))
        counts[most] -= 1
    return counts


def largest(scores: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
    """Return masks of the `total` largest scores of all layers, but at least one of each: no layer is emptied.

    Example:
        >>> largest({"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([2.0, 1.0])}, 3)
        {'a': tensor([ True,  True, False]), 'b': tensor([ True, False])}
    """
    sizes = {name: own.numel() for name, own in scores.items()}
    best = top_k_mask(torch.cat([own.reshape(-1) for own in scores.values()]), total).split(list(sizes.values()))
    kept = {name: int(part.sum()) for name, part in zip(sizes, best, strict=True)}
    if all(kept.values()):
        return {name: part.view(own.shape) for (name, own), part in zip(scores.items(), best, strict=True)}
    counts = apportion(kept, sizes, total)
    return {name: top_k_mask(own, counts[name]) for name, own in scores.items()}
