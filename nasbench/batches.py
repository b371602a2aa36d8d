"""What all kinds of data share: a name, classes, splits, and batches that are functions of seed, epoch and step."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nasbench.errors import DataError, SettingError
from search_spaces.base import nearest

Batch = tuple[Tensor, Tensor]

_SPLITS = ("train", "val", "train+val")


class Data(ABC):
    """What networks are trained and judged on, in a training, a validation and perhaps a test split.

    Get one from `nasbench.data.load`: images (`ImageData`) or a text (`TextData`). Batches are pairs of what a network
    sees, x, and what it is to predict, y, int64 labels of 0 to classes - 1. What is for testing is given to
    `nasbench.evaluate` and `nasbench.robustness` alone.

    Attributes:
        name: where the data come from.
        classes, class_names: the number of classes, and a name for each.
        device: where the batches are.
        spec: the arguments with which `load` gives the same data again; None for what was handed over.
        units: what is counted: "images", or "windows" of a text.
    """

    spec: dict[str, Any] | None = None
    units: ClassVar[str]
    _cached: ClassVar[tuple[str, ...]]  # attributes that are on the device, made again on another

    def __init__(self, name: str, class_names: Sequence[str]) -> None:
        self.name, self.class_names, self.classes = name, tuple(class_names), len(class_names)
        self.device = torch.device("cpu")

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(split)} {split}" for split in ("train", "val", "test"))
        words = f"{counts} {self.units} {self._size}, {self.classes} classes, on {self.device}"
        return f"{type(self).__name__}({self.name!r}: {words})"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one x as a network sees it: (channels, height, width) of images, (context,) of a text."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of content, split and settings: equal for equal data, in every process."""

    @abstractmethod
    def count(self, split: str) -> int:
        """Return the number of `units` in ``"train"``, ``"val"``, ``"train+val"`` or ``"test"`` (0: no test set)."""

    def steps(self, batch_size: int, split: str = "train") -> int:
        """Return the number of training steps in an epoch: whole batches only, but one at least."""
        self._check_split(split)
        return max(1, self.count(split) // self._checked(batch_size))

    def to(self, device: torch.device | str) -> Self:
        """Return the data with its batches on this device: itself if they are there already.

        The content follows when the first batch is asked for.
        """
        device = torch.empty(0, device=device).device  # gives "cuda" its index
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.device = device
        for name in self._cached:
            moved.__dict__.pop(name, None)
        return moved

    @abstractmethod
    def halves(self, seed: int = 0) -> tuple[Self, Self]:
        """Return the data twice, each with one half of the training split; everything else is the same.

        For searches that learn weights on one half and the architecture on the other.

        Raises:
            DataError: there is too little for two halves.
        """

    @abstractmethod
    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        augment: bool = True,
        cutout: int = 0,
        split: str = "train",
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Batch]:
        """Yield the shuffled, augmented batches of one epoch: a pure function of seed, epoch and step.

        Args:
            batch_size: images or windows per step, over all processes. The last, incomplete batch is dropped; a split
                smaller than one batch is one batch.
            seed, epoch: decide the order and, with the step, all augmentation.
            start: skip this many steps: the rest is what an unbroken run would have got.
            augment: shift and mirror images; cut a text elsewhere in every epoch.
            cutout: side in pixels of a square set to zero after scaling; 0 for none, and for a text.
            split: ``"train"``, or ``"train+val"`` for the last training of a chosen network.
            rank, world: of every batch, yield each `world`-th row, from row `rank` on.

        Raises:
            SettingError: a setting is out of range, or `world` processes cannot share a batch equally.
            DataError: there is no such split to train on.
        """

    @abstractmethod
    def eval_batches(self, split: str, batch_size: int = 512) -> Iterator[Batch]:
        """Yield ``"train"`` or ``"val"`` once, in a fixed order and without augmentation.

        Raises:
            DataError: there is no such split, or it is ``"test"``, which `evaluate` and `robustness` read.
        """

    @abstractmethod
    def _test_batches(self, batch_size: int = 512) -> Iterator[Batch]:
        """Yield the test split once. For `evaluate`, `robustness` and `Table.build` alone."""

    @property
    @abstractmethod
    def _size(self) -> str:
        """The words that `repr` has for the size of a unit."""

    # For the kinds of data ------------------------------------------------------------------------------------------

    def _shuffled(
        self, batch_size: int, seed: int, epoch: int, start: int, split: str, rank: int, world: int
    ) -> tuple[int, list[Tensor]]:
        """Check these arguments of `train_batches`; return the whole batches' size, and one rank's positions in each.

        Positions are those within the split: 0 to count - 1.
        """
        steps, size = self.steps(batch_size, split), min(batch_size, self.count(split))
        if not 0 <= start <= steps:
            raise SettingError(
                f"start={start} is outside 0..{steps}, the steps of an epoch in batches of {batch_size}."
            )
        if not 0 <= rank < world or size % world:
            raise SettingError(
                f"rank {rank} of {world} processes cannot take part in batches of {size}: ranks are 0..{world - 1}, "
                f"and a batch must be a multiple of {world}."
            )
        order = torch.randperm(self.count(split), generator=keyed_generator(seed, epoch))
        return size, [order[step * size :][:size][rank::world] for step in range(start, steps)]

    def _check_split(self, split: str) -> None:
        if split == "test":
            raise DataError(
                f"only nasbench.evaluate reads the test {self.units} of {self.name}. Use 'train' or 'val' here."
            )
        if split not in _SPLITS:
            raise DataError(f"{self.name} has no split {split!r}; {nearest(split, _SPLITS)}")

    def _checked(self, batch_size: int) -> int:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise SettingError(f"batch_size={batch_size!r}: a batch is a whole number of {self.units}, one at least.")
        return batch_size


def keyed_generator(*key: int) -> torch.Generator:
    """Return a generator that is a function of these numbers.

    Example:
        >>> torch.rand((), generator=keyed_generator(0, 1)) == torch.rand((), generator=keyed_generator(0, 1))
        tensor(True)
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
