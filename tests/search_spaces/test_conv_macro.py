"""ConvMacro: counts by hand, shapes, and why a sample that asks for a gradient is not sliced."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from torch.nn import functional as F

from search_spaces import ConvMacro, Mixture
from search_spaces.entangled import Span

SPACE = ConvMacro(classes=10, in_channels=3)


def test_size_and_options() -> None:
    assert SPACE.size == 6561  # 3 ** 8
    assert SPACE.choices["width3"] == (64, 128, 256)
    assert ConvMacro(kernels=(3,), widths=(8, 16)).size == 16


def test_parameters_by_hand() -> None:
    # Kernels 3, 7, 5, 7 and widths 32, 64, 128, 128: the published best. A convolution of k x k from a to b channels
    # with batch norm has k^2 ab + 2b parameters: 928, 100,480, 205,056, 803,072. Linear: 1290.
    kernels, widths = (3, 7, 5, 7), (32, 64, 128, 128)
    arch = SPACE.arch({f"{n}{i}": o[i] for n, o in (("kernel", kernels), ("width", widths)) for i in range(4)})
    model = SPACE.build(arch)
    assert sum(p.numel() for p in model.parameters()) == 928 + 100_480 + 205_056 + 803_072 + 1290
    assert [name for name, _ in model.named_children()] == ["layer0", "layer1", "layer2", "layer3", "head"]


@pytest.mark.parametrize(("side", "left"), [(32, 4), (8, 1), (9, 2), (1, 1)])
def test_three_pools_halve_the_image_rounded_up(side: int, left: int) -> None:
    model = SPACE.build(SPACE.at(0)).eval()
    assert torch.nn.Sequential(*list(model)[:-1])(torch.zeros(1, 3, side, side)).shape == (1, 64, left, left)  # type: ignore[call-overload]


def test_a_slice_times_its_weight_would_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, arch = SPACE.supernet(), SPACE.sample(Random(1))
    sample = SPACE.one_hot(arch)
    x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    assert sample.active is not None

    def norms(sliced: bool) -> dict[str, float]:
        leaves = {site: row.clone().requires_grad_() for site, row in sample.items()}
        mixture = type(sample)(leaves, sample.active)
        if sliced:
            spans = {}
            for site, (k,) in sample.active.items():  # type: ignore[union-attr]
                one = Span((1,), leaves[site][k : k + 1], torch.ones(1, 1), slice(k, k + 1))
                spans[site] = supernet.axes[site].beside(one)  # type: ignore[operator]
            monkeypatch.setattr(supernet, "spans", lambda mixture: spans)
        F.cross_entropy(supernet(x, mixture), y).backward()
        return {site: float(leaf.grad.norm()) for site, leaf in leaves.items() if leaf.grad is not None}

    whole, slices = norms(sliced=False), norms(sliced=True)
    before_norms = [site for site in whole if site != "width3"]  # the head reads the last layer, and has no norm
    assert all(slices[site] < 1e-3 * whole[site] for site in before_norms)
    assert all(norm > 1e-4 for norm in whole.values())


@torch.no_grad()
def test_a_mixture_weighs_every_width_once_in_the_layer_that_reads_it() -> None:
    space = ConvMacro(kernels=(1, 3, 5), widths=(2, 3, 4), classes=3, in_channels=2)
    supernet, x = space.supernet().double(), torch.randn(4, 2, 9, 9, dtype=torch.double)
    for parameter in supernet.parameters():
        torch.nn.init.normal_(parameter)
    mixture = Mixture({s: torch.randn(len(o), dtype=torch.double).softmax(0) for s, o in space.sites.items()})
    found = supernet(x, mixture)
    read = [(torch.ones((), dtype=torch.double), 2)]  # channels that are read, with their weights
    for i in range(4):
        layer = supernet.get_submodule(f"layer{i}")
        conv, norm = layer.get_submodule("conv"), layer.get_submodule("norm")
        assert isinstance(conv, torch.nn.Conv2d)
        assert isinstance(norm, torch.nn.BatchNorm2d)
        y = torch.zeros(())
        for (a, kernel), (b, c) in product(zip(mixture[f"kernel{i}"], space.kernels, strict=True), read):
            rim = (5 - kernel) // 2
            weight = conv.weight[:, :c, rim : 5 - rim, rim : 5 - rim]
            y = y + a * b * F.conv2d(x[:, :c], weight, padding=kernel // 2)
        x = F.relu(F.batch_norm(y, None, None, norm.weight, norm.bias, training=True))
        x = F.max_pool2d(x, 2, ceil_mode=True) if i < 3 else x
        read = list(zip(mixture[f"width{i}"], space.widths_of(i), strict=True))
    linear = supernet.get_submodule("head.linear")
    assert isinstance(linear, torch.nn.Linear)
    expected = sum((b * F.linear(x.mean((2, 3))[:, :c], linear.weight[:, :c]) for b, c in read), linear.bias)
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
