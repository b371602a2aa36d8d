"""Shares of layers as whole numbers: exact sums, one weight at least, no more than there are."""

from __future__ import annotations

import random

import pytest
import torch

from compress.counts import apportion, largest


def test_counts_are_exact_and_within_bounds_for_random_layers() -> None:
    draw = random.Random(0)
    for _ in range(300):
        sizes = {str(k): draw.choice([1, 2, 9, 100, 1000]) for k in range(draw.randint(1, 12))}
        ideal = {name: draw.choice([0.0, draw.random(), draw.random() * size, size]) for name, size in sizes.items()}
        total = draw.randint(len(sizes), sum(sizes.values()))
        counts = apportion(ideal, sizes, total)
        assert sum(counts.values()) == total
        assert all(1 <= counts[name] <= size for name, size in sizes.items())


def test_what_is_left_goes_to_the_largest_fractional_parts() -> None:
    sizes = dict.fromkeys("abc", 10)
    assert apportion({"a": 2.1, "b": 2.8, "c": 2.6}, sizes, 8) == {"a": 2, "b": 3, "c": 3}
    assert apportion({"a": 2.5, "b": 2.5, "c": 2.5}, sizes, 7) == {"a": 3, "b": 2, "c": 2}  # equal: the first


def test_a_full_layer_takes_no_more() -> None:
    assert apportion({"a": 2.0, "b": 1.0}, {"a": 2, "b": 10}, 9) == {"a": 2, "b": 7}


def test_what_a_minimum_of_one_adds_is_not_taken_from_dense_layers() -> None:
    assert apportion({"a": 5.0, "b": 4.0, "c": 0.0}, {"a": 5, "b": 9, "c": 9}, 9) == {"a": 5, "b": 3, "c": 1}


def test_an_impossible_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="11 weights cannot be shared out among layers of \\[5, 5\\]"):
        apportion({"a": 1.0, "b": 1.0}, {"a": 5, "b": 5}, 11)
    with pytest.raises(ValueError, match="1 weights cannot be shared out"):
        apportion({"a": 1.0, "b": 1.0}, {"a": 5, "b": 5}, 1)


def test_the_largest_scores_of_all_layers_are_kept_where_they_lie() -> None:
    scores = {"a": torch.tensor([[9.0, 1.0], [8.0, 2.0]]), "b": torch.tensor([7.0, 3.0, 6.0])}
    masks = largest(scores, 4)
    assert masks["a"].tolist() == [[True, False], [True, False]] and masks["b"].tolist() == [True, False, True]
    masks = largest({"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.zeros(3)}, 3)  # no layer is emptied
    assert masks["a"].tolist() == [False, True, True] and masks["b"].tolist() == [True, False, False]
