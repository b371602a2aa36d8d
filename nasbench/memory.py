"""How much memory a training step will take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nasbench.profile import Watch, zeros

_FEW = 2  # the fewest that batch norm can train on


def step_bytes(
    supernet: nn.Module,
    step: Callable[[Tensor, Tensor], object],
    shape: tuple[int, ...],
    batch_size: int,
    optimizer_buffers: int = 1,
) -> int:
    """Return the predicted peak memory of a training step, beyond the weights that are there already.

    The step is made for two and for four inputs while every tensor alive is counted, after every operator: what the
    larger one takes more tells what an input takes at that moment. (The peak of many inputs comes at another moment
    than that of few.) Buffers are put back and gradients dropped; a step must change no more.

    Args:
        supernet: what is trained.
        step: computes the gradients of a step from images (B, C, H, W) and labels (B,), or from a text's tokens and
            labels, both (B, T).
        shape: of an image, (channels, height, width), or of a text, (length,).
        batch_size: images or texts in a step.
        optimizer_buffers: numbers that the optimizer keeps of every parameter: one for momentum, two for Adam.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 2))
        >>> step_bytes(net, lambda x, y: nn.functional.cross_entropy(net(x), y).backward(), (1, 8, 8), 64) > 8 * 36 * 64
        True
    """
    buffers = [buffer.clone() for buffer in supernet.buffers()]
    try:
        few, more = (alive_bytes(supernet, step, shape, count) for count in (_FEW, 2 * _FEW))
    finally:
        for buffer, kept in zip(supernet.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        for parameter in supernet.parameters():
            parameter.grad = None
    weights = sum(p.numel() * p.element_size() for p in supernet.parameters())
    if len(few) != len(more):  # other operators for other numbers of inputs: only their peaks compare
        few, more = [max(few)], [max(more)]
    peak = max(a + (b - a) / _FEW * (batch_size - _FEW) for a, b in zip(few, more, strict=True))
    return round(optimizer_buffers * weights + peak)


def alive_bytes(
    supernet: nn.Module, step: Callable[[Tensor, Tensor], object], shape: tuple[int, ...], count: int
) -> list[int]:
    """Return how many bytes are alive at first and after each operator of a step of so many inputs, with gradients."""
    device = next(supernet.parameters()).device
    x = zeros(count, shape, device, channels_last=True)
    y = torch.zeros((count, *shape) if len(shape) == 1 else count, dtype=torch.long, device=device)
    for parameter in supernet.parameters():
        parameter.grad = None
    watch = Watch(x)
    with watch:
        step(x, y)
    return watch.sums
