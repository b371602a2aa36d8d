"""A text to model character by character: split in order, cut into windows."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from nasbench.batches import Batch, Data, keyed_generator
from nasbench.errors import DataError, SettingError
from nasbench.recipe import is_number
from nasbench.splits import Array

CONTEXT = 64  # characters that a network sees, if nobody says otherwise
PYDOC = "pydoc"

_CODE_POINTS = 0x110000


class TextData(Data):
    """A text to predict character by character: x are int64 characters (B, T), and y (B, T) those that follow each.

    A network maps x to logits (B, classes, T): what it says of the next character at every position. Classes are the
    distinct characters of the whole text, sorted. The test split is the last tenth of the text, the validation split is
    what comes before it, and the training split is the rest, so that what is predicted is never near what was trained
    on; nothing is drawn at random. Each split is cut into windows of `context` characters, end to end.

    Made by `nasbench.data.load`, or of a string.

    Args:
        name: how the data are called.
        text: at least `context` + 1 characters for every split.
        context: characters that a network sees.
        val_fraction: share of the text before the test split set aside for validation.
        characters: use only so many characters from the start.

    Raises:
        DataError: the text is too short, or of one character only.
        SettingError: a setting is out of range.

    Attributes (see `Data` for those of all kinds):
        context: characters in a window.

    Example:
        >>> data = TextData("rhyme", "one two, buckle my shoe, " * 20, context=8)
        >>> data
        TextData('rhyme': 44 train, 11 val, 6 test windows of 8 characters, 16 classes, on cpu)
        >>> x, y = next(data.eval_batches("train", batch_size=1))
        >>> ["".join(data.class_names[i] for i in row) for row in (x[0], y[0])]
        ['one two,', 'ne two, ']
    """

    units = "windows"
    _cached = ("_here",)

    def __init__(
        self,
        name: str,
        text: str,
        *,
        context: int = CONTEXT,
        val_fraction: float = 0.2,
        characters: int | None = None,
    ) -> None:
        if type(context) is not int or context < 1:
            raise SettingError(f"context={context!r}: a network sees a whole number of characters, one at least.")
        if not is_number(val_fraction) or not 0 < val_fraction < 1:
            raise SettingError(
                f"val_fraction={val_fraction} is outside 0..1: it is the share of the text before its test split to "
                "validate on."
            )
        if not isinstance(text, str):
            raise DataError(
                f"{name} is {type(text).__name__}, not text. Give a string, or a path to nasbench.data.load."
            )
        if not text:
            raise DataError(f"{name} is empty: there is nothing to predict. Give a text.")
        if characters is not None:
            if type(characters) is not int or not 0 < characters <= len(text):
                raise SettingError(
                    f"characters={characters!r}, but {name} has {len(text)} of them. Ask for 1..{len(text)}."
                )
            text = text[:characters]
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        found = np.zeros(_CODE_POINTS, bool)
        found[codes] = True
        used = np.flatnonzero(found)
        if len(used) < 2:
            raise DataError(
                f"{name} has one distinct character, {text[0]!r}: there is nothing to predict. Give a text."
            )
        super().__init__(name, [chr(code) for code in used])
        self.context = context
        test = len(text) - len(text) // 10
        val = test - round(test * val_fraction)
        self._parts = {"train": (0, val), "val": (val, test), "train+val": (0, test), "test": (test, len(text))}
        for split, (first, end) in self._parts.items():
            if end - first <= context:
                raise DataError(
                    f"the {split} split of {name} would have {end - first} characters, but with context={context} it "
                    f"needs {context + 1}: {len(text)} characters are too few for val_fraction={val_fraction}. Give a "
                    "longer text, a smaller context, or another fraction."
                )
        numbers: Array = np.zeros(_CODE_POINTS, np.uint8 if len(used) <= 256 else np.int32)
        numbers[used] = np.arange(len(used))
        self._text = torch.from_numpy(numbers[codes])

    @property
    def _size(self) -> str:
        return f"of {self.context} characters"

    @property
    def shape(self) -> tuple[int]:
        """The shape of one window as a network sees it: (context,)."""
        return (self.context,)

    @cached_property
    def _content(self) -> str:
        return hashlib.sha256(self._text.numpy().data).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of text, split and context: equal for equal data, in every process."""
        settings = json.dumps([self._content, self.class_names, self.context, self._parts])
        return hashlib.sha256(settings.encode()).hexdigest()[:12]

    def count(self, split: str) -> int:
        """Return the number of windows in ``"train"``, ``"val"``, ``"train+val"`` or ``"test"``."""
        if split != "test":
            self._check_split(split)
        first, end = self._parts[split]
        return (end - first - 1) // self.context  # the last character is only predicted

    def halves(self, seed: int = 0) -> tuple[Self, Self]:
        """Return the data twice, each with one half of the training text, cut in the middle; everything else is equal.

        For searches that learn weights on one half and the architecture on the other. The seed decides which half comes
        first.

        Raises:
            DataError: the training text is too short.

        Example:
            >>> from nasbench.data import load
            >>> [half.count("train") for half in load("pydoc", characters=10_000).halves()]
            [56, 56]
        """
        first, end = self._parts["train"]
        middle = (first + end) // 2
        if middle - first <= self.context:
            raise DataError(
                f"half of the training text of {self.name} has {middle - first} characters, but with "
                f"context={self.context} it needs {self.context + 1}: a search that learns weights and architecture on "
                "halves needs a longer text, or a smaller context."
            )
        halves = []
        for part in ((first, middle), (middle, end)):
            half = copy.copy(self)
            half._parts = self._parts | {"train": part}
            halves.append(half)
        return (halves[1], halves[0]) if np.random.default_rng(seed).integers(2) else (halves[0], halves[1])

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
        """Yield the shuffled windows of one epoch; see `Data.train_batches` for the arguments.

        To augment, all windows are shifted by 0 to context - 1 characters, so that every epoch cuts the text elsewhere;
        the last one ends with the split at the latest. There is no cutout.

        Example:
            >>> from nasbench.data import load
            >>> x, y = next(load("pydoc", context=32).train_batches(16, seed=0, epoch=0))
            >>> x.shape, y.shape, bool((x[:, 1:] == y[:, :-1]).all())
            (torch.Size([16, 32]), torch.Size([16, 32]), True)
        """
        _, positions = self._shuffled(batch_size, seed, epoch, start, split, rank, world)
        if cutout:
            raise SettingError(f"cutout={cutout}: {self.name} is a text, which has no pixels to cut out. Leave it out.")
        first, end = self._parts[split]
        if augment:
            first += int(torch.randint(self.context, (), generator=keyed_generator(seed, epoch, -1)))  # no step is -1
        return self._windows((first + place * self.context).clamp(max=end - self.context - 1) for place in positions)

    def eval_batches(self, split: str, batch_size: int = 512) -> Iterator[Batch]:
        """Yield the windows of ``"train"`` or ``"val"`` once, in order and without overlap.

        Raises:
            DataError: there is no such split, or it is ``"test"``: only `nasbench.evaluate` reads test windows.

        Example:
            >>> data = TextData("rhyme", "one two, buckle my shoe, " * 20, context=8)
            >>> sum(y.numel() for _, y in data.eval_batches("val"))
            88
        """
        self._check_split(split)
        return self._in_order(split, batch_size)

    def _test_batches(self, batch_size: int = 512) -> Iterator[Batch]:
        """Yield the test windows once. For `nasbench.evaluate` and `Table.build` alone."""
        return self._in_order("test", batch_size)

    def _in_order(self, split: str, batch_size: int) -> Iterator[Batch]:
        first = self._parts[split][0]
        starts = first + torch.arange(self.count(split)) * self.context
        return self._windows(torch.split(starts, self._checked(batch_size)))

    @cached_property
    def _here(self) -> Tensor:
        return self._text.to(self.device)

    def _windows(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield for each batch of first characters the windows and what follows."""
        overlapping = self._here.unfold(0, self.context + 1, 1)  # a view
        for starts in batches:
            windows = overlapping.index_select(0, starts.to(self.device)).long()
            yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark, its lines ended by a line feed alone.

    Raises:
        DataError: there is no such file, or it is no UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig")
        if "\0" in text:
            raise DataError(f"{path} has NUL characters, as UTF-16 has. Convert it: iconv -f utf-16 -t utf-8.")
        return text
    except UnicodeDecodeError as error:
        likely = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8, or convert it: "
            f"iconv -f {likely} -t utf-8."
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f'there is no {path}. Give a UTF-8 text file, or "{PYDOC}", which comes with Python.'
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Give a UTF-8 text file.") from error


def pydoc() -> str:
    """Return the help texts that come with Python, some 460,000 characters; versions of Python differ in them.

    Raises:
        DataError: this Python comes without them.
    """
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            f'"{PYDOC}" is the help texts of Python, and this Python comes without them ({error}). Give a text file.'
        ) from error
    return "\n".join(topics[key] for key in sorted(topics))
