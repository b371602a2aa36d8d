"""Convolutions of many edges at once, with derivatives of any order: the arithmetic of the fast `RelaxedCell`.

Edges lie side by side as groups of channels, (B, K * C, H, W) in channels_last, or one after the other as rows,
(K, B * H * W, C); `rows_of` sees the first as the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Depthwise(torch.autograd.Function):
    """Depthwise convolutions of one image (B, C, H, W) with kernels of shape (copies * C, 1, k, k), padded by k // 2.

    Forward and input gradient are those of torch; oneDNN's weight gradient is fast for kernels of up to 3 columns only,
    so those of 5 are put together.
    """

    @staticmethod
    def forward(ctx: Any, stride: int, copies: int, x: Tensor, *kernels: Tensor) -> tuple[Tensor, ...]:
        ctx.stride, ctx.copies = stride, copies
        ctx.save_for_backward(x, *kernels)
        wide = repeat(x, copies)
        return tuple(F.conv2d(wide, w, None, stride, w.shape[-1] // 2, 1, w.shape[0]) for w in kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kernels = ctx.saved_tensors
        stride, copies = ctx.stride, ctx.copies
        wide = repeat(x, copies)
        dx: Tensor | None = None
        dw: list[Tensor | None] = []
        for g, w, wanted in zip(grads, kernels, ctx.needs_input_grad[3:], strict=True):
            g = g.contiguous(memory_format=torch.channels_last)
            if ctx.needs_input_grad[2]:
                if stride == 1:
                    part = F.conv2d(g, w.flip(2, 3), None, 1, w.shape[-1] // 2, 1, w.shape[0])
                else:
                    part = _convolution_backward(g, wide, w, stride, w.shape[-1] // 2, 0)
                dx = part if dx is None else dx.add_(part)
            dw.append(_weight_gradient(g, wide, w, stride) if wanted else None)
        if dx is not None and copies > 1:
            dx = rows_of(dx, copies).sum(0).view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        return None, None, dx, *dw


def _weight_gradient(g: Tensor, x: Tensor, w: Tensor, stride: int) -> Tensor:
    k = w.shape[-1]
    if k != 5 or stride != 1 or x.shape[-1] <= 2 or x.device.type != "cpu":
        return _convolution_backward(g, x, w, stride, (k // 2, k // 2), 1)
    rows = 2
    if x.shape[2] < k:  # it is not fast for images lower than the kernel either
        x, rows = F.pad(x, (0, 0, 2, 2)), 0
    middle = _convolution_backward(g, x, w[..., 1:4], 1, (rows, 1), 1)
    left = _convolution_backward(g, F.pad(x, (2, -2)), w[..., :1], 1, (rows, 0), 1)
    right = _convolution_backward(g, F.pad(x, (-2, 2)), w[..., 4:], 1, (rows, 0), 1)
    return torch.cat([left, middle, right], dim=-1)


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, stride: int, padding: Any, which: int) -> Tensor:
    """The gradient of a depthwise convolution's input (which = 0) or weight (1)."""
    pads = [padding, padding] if isinstance(padding, int) else list(padding)
    mask = [which == 0, which == 1, False]
    grads = torch.ops.aten.convolution_backward(
        g, x, w, None, [stride, stride], pads, [1, 1], False, [0, 0], x.shape[1], mask
    )
    out: Tensor = grads[which]
    return out


class Folded(torch.autograd.Function):
    """Sum over n images of 1x1 convolutions, each with batch norm of its own statistics and times its weight.

    Where z has mean m and second moments S, P z has mean P m and variance diag(P S P') - (P m)^2. So norm and weight
    become part of the matrix, a P / sqrt(variance + eps), and a bias. For K edges at once:

    Args:
        before: (K, B * H * W, O) to add to, or None.
        a: weights (n, K), or None for ones.
        points: P, (n, K, O, C).
        images: n of shape (B, K * C, H, W), channels_last.
        wide: return (B, K * O, H, W), for one image.

    Returns:
        (K, B * H * W, O), without the bias, which comes second: (K, O). If `wide`, it is added already. Then mean and
        unbiased variance (n * K, O), which have no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, wide: bool, eps: float, before: Tensor | None, a: Tensor | None, points: Tensor, *images: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.wide, ctx.eps, ctx.more = wide, eps, before is not None
        means, squares = _moments(images, points.shape[1])
        matrix, bias, mean, variance = _matrix(means, squares, points, a, eps)
        out = _apply(wide, before, matrix, bias, images)
        ctx.save_for_backward(means, squares, points, a, *images)
        count = images[0].numel() // images[0].shape[1]
        statistics = mean.flatten(0, 1), variance.flatten(0, 1) * (count / max(count - 1, 1))
        ctx.mark_non_differentiable(*statistics)
        return out, bias, *statistics

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_bias: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        means, squares, points, a, *images = ctx.saved_tensors
        k = points.shape[1]
        g_before = g if ctx.more else None
        if torch.is_grad_enabled():  # it will be differentiated again: take the way that torch can follow
            inputs: list[Tensor | None] = [a, points, *images]
            needed = [t for t in inputs if t is not None and t.requires_grad]
            matrix, bias = _matrix(*_moments(images, k), points, a, ctx.eps)[:2]
            again = _apply(ctx.wide, None, matrix, bias, images)
            found = iter(torch.autograd.grad((again, bias), needed, (g, g_bias), create_graph=True))
            grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
            return None, None, g_before, *grads
        rows = [rows_of(image, k) for image in images]
        if ctx.wide:
            g = rows_of(g, k)
            g_bias = g_bias + g.sum(1)
        # The steps of `_matrix` backwards. A second moment is symmetric, and so is its gradient.
        count = rows[0].shape[1]
        g_matrix = torch.stack([torch.bmm(g.transpose(1, 2), z) for z in rows])
        mean = torch.matmul(points, means.unsqueeze(-1)).squeeze(-1)
        mixed = torch.matmul(points, squares)
        variance = (mixed * points).sum(-1) - mean * mean
        root = torch.rsqrt(variance.clamp(min=0) + ctx.eps)
        scale = root if a is None else root * a.unsqueeze(-1)
        g_scale = (g_matrix * points).sum(-1) - g_bias * mean
        g_a = None if a is None else (g_scale * root).sum(-1)
        g_variance = -0.5 * g_scale * scale * root * root * (variance >= 0)
        g_mean = -g_bias * scale - 2 * mean * g_variance
        g_points = g_matrix * scale.unsqueeze(-1) + 2 * g_variance.unsqueeze(-1) * mixed
        g_points += g_mean.unsqueeze(-1) * means.unsqueeze(-2)
        matrix = points * scale.unsqueeze(-1)
        from_squares = torch.matmul(points.transpose(-1, -2), points * (g_variance * (2 / count)).unsqueeze(-1))
        from_means = torch.matmul(g_mean.unsqueeze(-2), points).squeeze(-2) / count
        g_images: list[Tensor | None] = []
        for i, image in enumerate(images):
            if not ctx.needs_input_grad[5 + i]:
                g_images.append(None)
                continue
            dz = F.conv2d(image, from_squares[i].flatten(0, 1)[..., None, None], from_means[i].flatten(), groups=k)
            dz = dz.contiguous(memory_format=torch.channels_last)
            dz.permute(0, 2, 3, 1).view(count, k, -1).transpose(0, 1).baddbmm_(g, matrix[i])
            g_images.append(dz)
        return None, None, g_before, g_a, g_points, *g_images


def _moments(images: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Means (n, K, C) and second moments (n, K, C, C) of n images of K groups of channels, over their pixels."""
    rows = [rows_of(z, k) for z in images]
    squares = torch.stack([torch.bmm(z.transpose(1, 2), z) for z in rows]) / rows[0].shape[1]
    means = torch.stack([z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).mean(0).view(k, -1) for z in images])
    return means, squares


def _matrix(
    means: Tensor, squares: Tensor, points: Tensor, a: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrix (n, K, O, C), bias (K, O), and mean and variance (n, K, O) of what they are applied to."""
    mean = torch.matmul(points, means.unsqueeze(-1)).squeeze(-1)
    # Rounding may leave a variance of 0 below it, by more than eps.
    variance = ((torch.matmul(points, squares) * points).sum(-1) - mean * mean).clamp(min=0)
    scale = torch.rsqrt(variance + eps)
    if a is not None:
        scale = scale * a.unsqueeze(-1)
    return points * scale.unsqueeze(-1), -(mean * scale).sum(0), mean, variance


def _apply(wide: bool, before: Tensor | None, matrix: Tensor, bias: Tensor, images: Sequence[Tensor]) -> Tensor:
    if wide:
        return F.conv2d(images[0], matrix.flatten(0, 2)[..., None, None], bias.flatten(), groups=len(bias))
    first, *others = zip((rows_of(z, len(bias)) for z in images), matrix.transpose(-1, -2), strict=True)
    out = torch.bmm(*first) if before is None else torch.baddbmm(before, *first)
    for rows, m in others:
        out.baddbmm_(rows, m)
    return out


def rows_of(x: Tensor, k: int) -> Tensor:
    """(B, K * C, H, W) as (K, B * H * W, C), without a copy where it is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, k, x.shape[1] // k).transpose(0, 1)


def repeat(x: Tensor, k: int) -> Tensor:
    """(B, C, H, W) as k copies side by side, (B, k * C, H, W)."""
    return x if k == 1 else torch.cat([x.permute(0, 2, 3, 1)] * k, dim=3).permute(0, 3, 1, 2)


def phases_of(x: Tensor) -> Tensor:
    """The pixels of even and odd rows and columns as images of their own, (4 * B, C, H / 2, W / 2)."""
    b, c, h, w = x.shape
    split = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(2, 4, 0, 1, 3, 5)
    return split.reshape(4 * b, h // 2, w // 2, c).permute(0, 3, 1, 2)
