"""Operations: shapes, parameters, and what drop-path does to an example."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from search_spaces.operations import ConvBN, DropPath, ReLUConvBN


@pytest.mark.parametrize("block", [ConvBN, ReLUConvBN])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_keep_the_size_at_stride_1_and_halve_it_at_2(
    block: type[ConvBN | ReLUConvBN], kernel: int, stride: int
) -> None:
    module = block(3, 4, kernel, stride)
    assert module(torch.zeros(2, 3, 9, 8)).shape == (2, 4, -(-9 // stride), 8 // stride)
    # The kernel without a bias, then one scale and one shift per channel.
    assert sum(p.numel() for p in module.parameters()) == 3 * 4 * kernel**2 + 2 * 4


def test_relu_comes_first_and_leaves_its_input_alone() -> None:
    x = torch.full((2, 3, 4, 4), -1.0)
    block = ReLUConvBN(3, 3, kernel=3).eval()
    # ReLU makes all pixels 0, the convolution has no bias, and fresh batch norm maps 0 to 0.
    assert block(x).abs().max() == 0
    assert x.max() == -1
    assert ConvBN(3, 3, kernel=3).eval()(x).abs().max() > 0


def test_drop_path_drops_whole_examples_and_keeps_the_mean() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = DropPath(0.25)(torch.ones(4000, 2, 3, 3))
    each = y.flatten(1)
    assert torch.equal(each.amin(1), each.amax(1))
    assert sorted(set(each[:, 0].tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert float(y.mean()) == pytest.approx(1.0, abs=0.05)  # standard error 0.009


@pytest.mark.parametrize("path", [DropPath(), DropPath(0.9).eval()])
def test_drop_path_is_the_identity_at_zero_and_in_evaluation(path: nn.Module) -> None:
    x = torch.randn(8, 2)
    state = torch.random.get_rng_state()
    assert path(x) is x
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn either


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_drop_path_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"DropPath was given p=.*at least 0 and below 1"):
        DropPath(p)
