"""Discriminators, which learn to tell the outputs of a student from those of its teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

MODES = ("off", "joint", "reversed", "alternate")

_LEAST = 8  # hidden units


class Discriminator(nn.Module):
    """Maps outputs (N, channels) to two logits, that they are a student's and that they are a teacher's.

    Three linear layers with ReLU between them. The hidden ones have ``channels / factor`` and
    ``channels / factor / factor`` units, eight at least: with one or two, ReLU soon leaves none alive.

    Args:
        bounded: put a ReLU behind the last layer, too. The loss is then never under ``log(2) / 2``.

    Example:
        >>> sum(parameter.numel() for parameter in Discriminator(1000).parameters())
        127047

    Source: Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453, whose layers are 1x1 convolutions, which is the same,
    and always bounded; with factor=2, Shen et al., MEAL, AAAI 2019, arXiv:1812.02425.
    """

    def __init__(self, channels: int, factor: int = 8, bounded: bool = False) -> None:
        super().__init__()
        first = max(_LEAST, channels // factor)
        second = max(_LEAST, channels // factor // factor)
        layers = [nn.Linear(channels, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)]
        self.layers = nn.Sequential(*layers, *[nn.ReLU()] * bounded)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Adversary:
    """Discriminators of several outputs of student and teachers, with an optimizer and a learning rate of their own.

    What `loss` returns is added to the student's loss. The loss L of a discriminator is the binary cross-entropy of its
    two logits.

    - "joint": student and discriminators both lower L; discriminators are bounded. As in the released code of MEAL V2,
      nothing is adversarial about it.
    - "reversed": discriminators lower L, and the student, behind a reversed gradient, raises it.
    - "alternate": the discriminators make a step of their own first; then the student raises the L of the new ones.

    Args:
        mode: one of these.
        shapes: channels and factor of each `Discriminator`.
        lr: of plain SGD with momentum 0.9, without weight decay; constant.
        seed: of the first weights.

    Source: MEAL V2 (see `Discriminator`), where the schedule of the student overwrites the learning rate of 1e-4.
    """

    def __init__(
        self, mode: str, shapes: Sequence[tuple[int, int]], lr: float, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.mode = mode
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = [Discriminator(channels, factor, bounded=mode == "joint") for channels, factor in shapes]
        self.discriminators = nn.ModuleList(made).to(device)
        self.optimizer = torch.optim.SGD(self.discriminators.parameters(), lr=lr, momentum=0.9)

    def loss(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return what the student's loss gets from its own and the teachers' outputs.

        In mode "alternate" the discriminators have made their step then; in the others `step` makes it.

        Args:
            pairs: for each discriminator, outputs of the student and of the teachers: (N, channels), or
                (N, channels, T) of a text.
        """
        self.optimizer.zero_grad()
        if self.mode == "joint":
            return self.measure(pairs)
        if self.mode == "reversed":
            return self.measure([(_reversed(student), teacher) for student, teacher in pairs])
        self.measure([(student.detach(), teacher) for student, teacher in pairs]).backward()
        self._update()
        self.discriminators.requires_grad_(False)
        try:
            return -self.measure(pairs)
        finally:
            self.discriminators.requires_grad_(True)

    def measure(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return L, summed over the discriminators."""
        losses = []
        for discriminator, (student, teacher) in zip(self.discriminators, pairs, strict=True):
            rows = torch.cat([_rows(student), _rows(teacher)])
            with torch.autocast(rows.device.type, enabled=False):
                guesses = discriminator(rows)
            truth = torch.zeros_like(guesses)
            truth[: len(rows) // 2, 0] = 1
            truth[len(rows) // 2 :, 1] = 1
            losses.append(functional.binary_cross_entropy_with_logits(guesses, truth))
        return torch.stack(losses).sum()

    def step(self) -> None:
        """After the backward pass of the student's loss: make the discriminators' step, unless it is made already."""
        if self.mode != "alternate":
            self._update()

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.discriminators.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.discriminators.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _update(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in self.discriminators.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        self.optimizer.step()


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def _reversed(x: Tensor) -> Tensor:
    """Return x, through which gradients come back with the other sign.

    Source: Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, ICML 2015, arXiv:1409.7495.
    """
    y: Tensor = _Reversal.apply(x)
    return y


def _rows(x: Tensor) -> Tensor:
    """Return (N, channels), float32; of a text (N, channels, T) one row for each character."""
    return x.float() if x.ndim == 2 else x.float().movedim(1, -1).flatten(0, -2)
