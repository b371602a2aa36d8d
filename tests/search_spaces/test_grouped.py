"""Grouped convolutions: values against torch's own, first and second derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from search_spaces.grouped import Depthwise, Folded, phases_of, repeat, rows_of


def random(*shape: int) -> Tensor:
    x = torch.randn(*shape, dtype=torch.double)
    return (x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x).requires_grad_()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (4, 7), (3, 3), (1, 2), (2, 1), (5, 8)])
def test_depthwise_is_the_convolution_of_copies(stride: int, kernel: int, height: int, width: int) -> None:
    x, w = random(2, 3, height, width), random(6, 1, kernel, kernel)
    wanted = F.conv2d(torch.cat([x, x], 1), w, stride=stride, padding=kernel // 2, groups=6)
    (found,) = Depthwise.apply(stride, 2, x, w)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    direction = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (x, w), direction), torch.autograd.grad(wanted, (x, w), direction), strict=True
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_differentiates_twice(stride: int) -> None:
    inputs = random(1, 2, 5, 4), random(4, 1, 3, 3), random(4, 1, 5, 5)
    assert torch.autograd.gradgradcheck(lambda *t: Depthwise.apply(stride, 2, *t), inputs)


def folded(wide: bool, a: Tensor | None, points: Tensor, *images: Tensor, before: Tensor | None = None) -> Tensor:
    out, bias, *_ = Folded.apply(wide, 1e-5, before, a, points, *images)
    total: Tensor = out if wide else out + bias.unsqueeze(1)
    return total


def test_folded_is_convolution_norm_and_weight() -> None:
    # Two images of three edges, 2 channels to 4.
    images, points, a, before = (
        [random(2, 6, 3, 4) for _ in range(2)],
        random(2, 3, 4, 2),
        random(2, 3),
        random(3, 24, 4),
    )
    wanted = before
    for image, matrices, weights in zip(images, points, a, strict=True):
        y = F.conv2d(image, matrices.flatten(0, 1)[..., None, None], groups=3)
        y = F.batch_norm(y, None, None, training=True)
        wanted = wanted + weights[:, None, None] * rows_of(y, 3)
    found = folded(False, a, points, *images, before=before)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    leaves, direction = [*images, points, a, before], torch.randn_like(wanted)
    for x, y in zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(wanted, leaves, direction), strict=True
    ):
        assert torch.allclose(x, y, rtol=0, atol=1e-10)


def test_folded_returns_the_statistics_that_norms_keep() -> None:
    image, points, norm = random(2, 6, 3, 4), random(1, 3, 4, 2), torch.nn.BatchNorm2d(12, momentum=1.0).double()
    wide, _, mean, variance = Folded.apply(True, norm.eps, None, None, points, image)
    wanted = norm(F.conv2d(image, points.flatten(0, 2)[..., None, None], groups=3))
    assert torch.allclose(wide, wanted, rtol=0, atol=1e-12)
    assert norm.running_mean is not None and norm.running_var is not None
    assert torch.allclose(mean.flatten(), norm.running_mean, rtol=0, atol=1e-12)
    assert torch.allclose(variance.flatten(), norm.running_var, rtol=0, atol=1e-12)
    assert not mean.requires_grad and not variance.requires_grad


@pytest.mark.parametrize("wide", [False, True])
def test_folded_differentiates_twice(wide: bool) -> None:
    images, points = [random(2, 4, 2, 3) for _ in range(1 if wide else 2)], random(1 if wide else 2, 2, 2, 2)
    if wide:
        assert torch.autograd.gradcheck(lambda *t: folded(True, None, *t), (points, *images))
        assert torch.autograd.gradgradcheck(lambda *t: folded(True, None, *t), (points, *images))
    else:
        assert torch.autograd.gradcheck(lambda *t: folded(False, *t), (random(2, 2), points, *images))
        assert torch.autograd.gradgradcheck(lambda *t: folded(False, *t), (random(2, 2), points, *images))


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_an_image_without_variance_stays_finite(value: float) -> None:
    image = torch.full((4, 6, 8, 8), value, requires_grad=True)
    points, a = torch.randn(1, 3, 2, 2, requires_grad=True), torch.rand(1, 3, requires_grad=True)
    y = folded(False, a, points, image)
    gradients = torch.autograd.grad(y.square().sum(), (image, points, a))
    assert all(t.isfinite().all() for t in (y, *gradients))


def test_layouts() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(repeat(x, 2), torch.cat([x, x], 1))
    assert repeat(x, 2).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rows_of(x, 3)[1], x[:, 1].reshape(-1, 1))
    assert torch.equal(phases_of(x)[2:4], x[:, :, 0::2, 1::2])
