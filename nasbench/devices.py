"""Where to compute: one device, or the processes that torchrun has started."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import torch
import torch.distributed as dist

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
