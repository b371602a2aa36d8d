"""Teachers of a distillation: networks that are only asked, never trained, copied or kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from nasbench.training import device_of, evaluating

Teacher = Callable[[Tensor], Any]


class Teachers:
    """An ensemble of teachers, which are asked in eval mode and without gradients, each on its own device.

    It is no module, and a module that has one as an attribute does not count the teachers as its own: they are in no
    ``state_dict`` and no optimizer. Every teacher is left in the mode it was in.

    Args:
        teachers: modules, or whatever else can be called with a batch and returns logits, (B, classes) or, of a text,
            (B, classes, T). A single one need not be in a list.

    Raises:
        CompressionError: there is none, or one is something else.

    Example:
        >>> teachers = Teachers([nn.Linear(4, 3), lambda x: x[:, :3]])
        >>> [logits.shape for logits in teachers.logits(torch.zeros(2, 4))]
        [torch.Size([2, 3]), torch.Size([2, 3])]
    """

    def __init__(self, teachers: Teacher | Iterable[Teacher]) -> None:
        if isinstance(teachers, str | Mapping):
            raise CompressionError(f"teachers are networks, got {type(teachers).__name__}; load or build them first.")
        if isinstance(teachers, nn.Module) or not isinstance(teachers, Iterable):  # nn.Sequential can be iterated over
            teachers = [teachers]
        self.all = tuple(teachers)
        if not self.all:
            raise CompressionError("there are no teachers; give at least one: teachers=[network].")
        for number, teacher in enumerate(self.all, 1):
            if isinstance(teacher, type):
                raise CompressionError(f"teacher {number} is the class {teacher.__name__}; make a network of it.")
            if not callable(teacher):
                raise CompressionError(
                    f"teacher {number} is of type {type(teacher).__name__}; a teacher is a torch.nn.Module, or a "
                    "function of a batch that returns logits."
                )

    def __len__(self) -> int:
        return len(self.all)

    def logits(self, x: Tensor, only: int | None = None) -> list[Tensor]:
        """Return what the teachers say of a batch, or what one of them says, as float32 on the device of the batch.

        Raises:
            CompressionError: a teacher gives no logits.
        """
        found = []
        for number, teacher in enumerate(self.all, 1):
            if only is None or only == number - 1:
                logits = _ask(teacher, x)
                if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
                    given = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits)
                    raise CompressionError(
                        f"teacher {number} ({type(teacher).__name__}) gives {given}; it has to give logits, a float "
                        "tensor (B, classes). Wrap it in a function that does."
                    )
                found.append(logits.to(x.device, torch.float32))
        return found

    def check(self, x: Tensor, shape: tuple[int, ...]) -> None:
        """Ask every teacher about one batch.

        Raises:
            CompressionError: a teacher cannot take it, or gives logits of another shape or that are not finite.
        """
        for index, teacher in enumerate(self.all):
            name = f"teacher {index + 1} ({type(teacher).__name__})"
            try:
                (logits,) = self.logits(x, index)
            except CompressionError:
                raise
            except Exception as error:
                size = " x ".join(map(str, x.shape))
                raise CompressionError(f"{name} does not take a batch of {size}: {error}") from error
            if logits.shape != shape:
                raise CompressionError(
                    f"{name} maps a batch {tuple(x.shape)} to {tuple(logits.shape)}, but student and data have "
                    f"{shape[1]} classes, which needs {shape}. Give a teacher of the same classes."
                )
            if not logits.isfinite().all():
                raise CompressionError(f"{name} gives logits that are not finite; train it anew or leave it out.")

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the teachers' kinds and, of modules, their numbers."""
        digest = hashlib.sha256()
        for teacher in self.all:
            digest.update(f"\n{type(teacher).__qualname__}".encode())
            for name, tensor in teacher.state_dict().items() if isinstance(teacher, nn.Module) else ():
                digest.update(f"\n{name} {getattr(tensor, 'dtype', '')} {getattr(tensor, 'shape', '')}".encode())
                if isinstance(tensor, Tensor):
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]


def _ask(teacher: Teacher, x: Tensor) -> Any:
    if not isinstance(teacher, nn.Module):
        with torch.no_grad():
            return teacher(x)
    x = x.to(device_of(teacher))
    if any(module.training for module in teacher.modules()):
        with evaluating(teacher):
            return teacher(x)
    with torch.no_grad():  # switching modes takes longer than looking at them
        return teacher(x)


def mean_probabilities(logits: list[Tensor], temperature: float = 1.0) -> Tensor:
    """Return the mean of the probabilities that several logits stand for, which is not that of their mean.

    Args:
        logits: of each teacher, (B, classes) or (B, classes, T), float32.
        temperature: logits are divided by it.

    Example:
        >>> mean_probabilities([torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])])
        tensor([[0.4912, 0.4912, 0.0177]])
    """
    total = (logits[0] / temperature).softmax(1)
    for other in logits[1:]:
        total += (other / temperature).softmax(1)
    return total.div_(len(logits))
