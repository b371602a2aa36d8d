"""Where to compute: one device, or the processes that torchrun has started."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nasbench.errors import SettingError
from search_spaces.base import nearest


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on; ``"auto"`` is a CUDA GPU where there is one, else the CPU.

    Processes that torchrun has started get a GPU each.

    Raises:
        SettingError: no such device here.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        known = nearest(device, ("auto", "cpu", "cuda", "cuda:0", "mps"))
        raise SettingError(f"there is no device {device!r}; {known}") from error
    if place.type == "cuda":
        index = place.index if place.index is not None else int(os.environ.get("LOCAL_RANK", 0)) % max(gpus, 1)
        if index >= gpus:
            raise SettingError(f"device {str(device)!r} was asked for, but torch sees {gpus} CUDA GPUs: use 'auto'")
        return torch.device("cuda", index)
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device 'mps' was asked for, but torch sees no Apple GPU: use 'auto' or 'cpu'")
    if place.type not in ("cpu", "mps"):
        raise SettingError(f"device {str(device)!r} cannot train here: use 'auto', 'cpu', 'cuda' or 'mps'")
    return place


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


def init_distributed() -> tuple[int, int]:
    """Join the processes that torchrun has started, and return (rank, world); (0, 1) where it has not.

    Processes talk through NCCL where each has a GPU of its own, else through gloo. Calling it again changes nothing.

    Raises:
        SettingError: the environment is not what torchrun sets.

    Example:
        >>> init_distributed()
        (0, 1)
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    numeric = [name for name in names if name != "MASTER_ADDR" and not os.environ.get(name, "0").isdecimal()]
    if missing or numeric:
        wrong = [f"{name} is missing" for name in missing] + [f"{name}={os.environ[name]!r}" for name in numeric]
        raise SettingError(
            f"WORLD_SIZE is set, but the rest is not as torchrun sets it ({', '.join(wrong)}): start with torchrun, "
            "or unset WORLD_SIZE"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    own_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local
    if own_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if own_gpu else "gloo")
    return dist.get_rank(), dist.get_world_size()


def leave_distributed() -> None:
    """Part from the processes that `init_distributed` joined, once all have come so far; else nothing.

    A process that ends without it may abort, because gloo's threads are still waiting.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()  # what wraps a network for data-parallel training holds on to the group
        dist.destroy_process_group()


def processor() -> str:
    """Return the processor's name as the system tells it, for the conditions of a measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
