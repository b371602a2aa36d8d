"""How a network is trained, as a value."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from dataclasses import dataclass
from typing import Any, Self

from nasbench.errors import SettingError
from search_spaces.base import nearest


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    The learning rate rises linearly over `warmup` epochs, then falls to `lr_end` along a cosine, step by step. Weight
    decay spares norms and biases (parameters of at most one dimension). `momentum` is the first beta of AdamW, which
    wants an `lr` near 0.001.

    Attributes:
        epochs: passes over the training split.
        batch_size: images, or windows of a text, per step, over all processes.
        optimizer: ``"sgd"`` or ``"adamw"``.
        warmup: epochs, may be a fraction.
        auxiliary: weight of the loss of an auxiliary head, for networks that have one (``DARTS(auxiliary=True)``).
        augment: shift and mirror images; cut a text elsewhere in every epoch.
        cutout: side in pixels of a square of zeros put on every image; 0 for none, and for a text.
        drop_path: probability with which a ``DropPath`` drops in the last epoch; it grows linearly from zero.
        clip: largest norm of the whole gradient, or None.
        amp: bfloat16 autocast; None means on CUDA devices that have it.

    Raises:
        SettingError: a value that cannot be trained with.

    Example:
        >>> Recipe(epochs=3, lr=0.05).lr
        0.05
        >>> Recipe(lr=-1)
        Traceback (most recent call last):
        nasbench.errors.SettingError: recipe: lr=-1, but it must be a number above 0
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    lr_end: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup: float = 0.0
    label_smoothing: float = 0.0
    auxiliary: float = 0.4
    augment: bool = True
    cutout: int = 0
    drop_path: float = 0.0
    clip: float | None = 5.0
    amp: bool | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        def check(name: str, good: bool, rule: str) -> None:
            if not good:
                raise SettingError(f"recipe: {name}={getattr(self, name)!r}, but it must be {rule}")

        for name, least in (("epochs", 1), ("batch_size", 1), ("cutout", 0)):
            value = getattr(self, name)
            check(name, is_number(value, numbers.Integral) and value >= least, f"a whole number, {least} or more")
        if self.optimizer not in ("sgd", "adamw"):
            known = nearest(self.optimizer, ("sgd", "adamw"))
            raise SettingError(f"recipe: unknown optimizer {self.optimizer!r}; {known}")
        check("lr", is_number(self.lr) and self.lr > 0, "a number above 0")
        below = is_number(self.lr_end) and 0 <= self.lr_end <= self.lr
        check("lr_end", below, f"a number from 0 to lr={self.lr}")
        for name in ("weight_decay", "auxiliary"):
            value = getattr(self, name)
            check(name, is_number(value) and value >= 0, "a number, 0 or more")
        for name in ("momentum", "label_smoothing", "drop_path"):
            value = getattr(self, name)
            check(name, is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
        in_reach = is_number(self.warmup) and 0 <= self.warmup <= self.epochs
        check("warmup", in_reach, f"a number of epochs from 0 to epochs={self.epochs}")
        check("clip", self.clip is None or (is_number(self.clip) and self.clip > 0), "a number above 0, or None")
        for name in ("nesterov", "augment", "channels_last"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        check("amp", self.amp is None or isinstance(self.amp, bool), "True, False or None")
        for field in dataclasses.fields(self):  # plain numbers, so that JSON and checkpoints can hold numpy's too
            value = getattr(self, field.name)
            if is_number(value):
                object.__setattr__(self, field.name, int(value) if field.type == "int" else float(value))

    def replace(self, **changes: Any) -> Self:
        """Return this recipe with some fields changed.

        Raises:
            SettingError: no such field, or a bad value.

        Example:
            >>> Recipe().replace(epochs=2).epochs
            2
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise SettingError(f"a recipe has no field {name!r}; {nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Return the recipe as one line of JSON.

        Example:
            >>> Recipe.from_json(Recipe(clip=None).to_json()) == Recipe(clip=None)
            True
        """
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the recipe that `text` describes; fields it leaves out have their defaults.

        Raises:
            SettingError: not a JSON object, an unknown field, or a bad value.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingError(f"a recipe's JSON cannot be read ({error}): {text!r}") from error
        if not isinstance(fields, dict):
            raise SettingError(f"a recipe's JSON must be an object such as {cls(epochs=2).to_json()}, not {text!r}")
        return cls().replace(**fields)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of global step `step`, counted from 0.

        Example:
            >>> [round(Recipe(epochs=4, lr=1.0, warmup=2).learning_rate(step, 1), 3) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        warm, total = round(self.warmup * steps_per_epoch), self.epochs * steps_per_epoch
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def is_number(value: object, kind: type = numbers.Real) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return isinstance(value, numbers.Integral) or math.isfinite(value)  # type: ignore[arg-type]
