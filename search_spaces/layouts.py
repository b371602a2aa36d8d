"""In which memory format networks train: the faster one, where it is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layout_for(model: nn.Module, device: str | torch.device = "cpu") -> torch.memory_format:
    """Return the memory format in which a model trains on images: channels_last, the faster one, where it is right.

    On CPUs oneDNN writes past a buffer in channels_last, in the backward pass of a 1x1 convolution that has a stride
    and fewer channels than a register holds numbers (its issue 6035). A model with such a layer trains contiguous.

    Example:
        >>> layout_for(nn.Conv2d(64, 8, 1, stride=2)), layout_for(nn.Conv2d(4, 8, 1, stride=2))
        (torch.channels_last, torch.contiguous_format)
    """
    if torch.device(device).type != "cpu":
        return torch.channels_last
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    overrun = any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < block
        for module in model.modules()
    )
    return torch.contiguous_format if overrun else torch.channels_last


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images, or a convolution's weight, in a memory format; others as they are.

    Example:
        >>> laid_out(torch.zeros(2, 1, 3, 3).to(memory_format=torch.channels_last), torch.contiguous_format).stride()
        (9, 9, 3, 1)
    """
    if x.ndim != 4:
        return x
    x = x.contiguous(memory_format=layout)
    # With one channel it has been both, but oneDNN goes by the strides.
    return x if layout == torch.channels_last else x.flatten().view(x.shape)


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Give the weights of a model's convolutions a memory format."""
    for parameter in model.parameters():
        parameter.data = laid_out(parameter.data, layout)
