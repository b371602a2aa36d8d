"""How much memory a training step will take, and how much there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from nasbench.profile import Watch
from search_spaces.base import Mixture, Supernet

_IMAGES = 2  # the fewest that batch norm can train on


def step_bytes(supernet: Supernet, mix: Callable[[], Mixture], shape: tuple[int, int, int], batch_size: int) -> int:
    """Return the predicted peak memory of a training step, beyond the weights that are there already.

    Steps of two and of four images are made without their effects, while every tensor alive is counted. What the larger
    one takes more tells what an image takes.

    Args:
        mix: gives the mixture of a forward.
        shape: of an image, (channels, height, width).
        batch_size: images in a step.

    Example:
        >>> from search_spaces import NASBench201
        >>> space = NASBench201(channels=4, cells=1, classes=2, in_channels=1)
        >>> mixture = space.one_hot(space.at(0))
        >>> step_bytes(space.supernet(), lambda: mixture, (1, 8, 8), 64) > 10_000
        True
    """
    buffers = [buffer.clone() for buffer in supernet.buffers()]
    try:
        few, more = (_peak(supernet, mix(), shape, images) for images in (_IMAGES, 2 * _IMAGES))
    finally:
        for buffer, kept in zip(supernet.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        for parameter in supernet.parameters():
            parameter.grad = None
    momentum = sum(p.numel() * p.element_size() for p in supernet.parameters())
    return round(momentum + few + (more - few) / _IMAGES * (batch_size - _IMAGES))


def _peak(supernet: Supernet, mixture: Mixture, shape: tuple[int, int, int], images: int) -> int:
    """Return the most bytes alive at once in a forward and backward pass, gradients included."""
    device = next(supernet.parameters()).device
    x = torch.zeros(images, *shape, device=device).contiguous(memory_format=torch.channels_last)
    for parameter in supernet.parameters():
        parameter.grad = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with Watch(x) as watch:
        F.cross_entropy(supernet(x, mixture), torch.zeros(images, dtype=torch.long, device=device)).backward()
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else watch.peak


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None
