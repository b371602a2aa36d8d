"""Weights of few bits: what stands between a stored parameter and a weight that takes few values, each with a code.

Such a step is a torch parametrization, the last of its weight's; a mask may stand before it. The trainable ones
(`compress.shift`, `compress.quantization`) compute the weight from what an optimizer moves. Frozen ones change nothing:
the parameter has the values already, and the step only knows their codes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import CompressionError
from search_spaces.arch import nearest
from search_spaces.masks import own_class

KINDS = {"shift": "compress.shift:ShiftGrid", "affine": "compress.quantization:AffineGrid"}
"""Where the frozen grid of each kind is."""


class LowBit(nn.Module):
    """The values that a weight may have, each with a code from 0 to 2^bits - 1; as a parametrization the identity.

    Args:
        bits: of a code, 2 to 8.
    """

    kind: ClassVar[str]
    """The grid's name in files, a key of `KINDS`."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    @abstractmethod
    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes of a weight whose values are on the grid: uint8, of its shape.

        Raises:
            CompressionError: a value is not on the grid.
        """

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """Return the weight that these codes, uint8, stand for, float32, of their shape: the inverse of `codes`."""

    def table(self) -> Tensor | None:
        """Return the value of every code, (2^bits,) float32, or None where a code has another value elsewhere."""
        return None

    def weight_shape(self, stored: Tensor) -> tuple[int, ...]:
        """Return the shape of the weight that this step makes of the stored parameter."""
        return tuple(stored.shape)

    def fields(self) -> dict[str, Any]:
        """Return what a file says of the grid beside its kind and bits: JSON."""
        return {}

    def arrays(self) -> dict[str, Tensor]:
        """Return the tensors that a file keeps of the grid, by names such as "scale"."""
        return {}

    @classmethod
    @abstractmethod
    def restore(
        cls, bits: int, shape: tuple[int, ...], fields: Mapping[str, Any], arrays: Mapping[str, Tensor]
    ) -> Self:
        """Return the frozen grid of a weight of this shape from what a file says.

        Raises:
            CompressionError: that makes no sense.
        """

    @abstractmethod
    def frozen(self) -> LowBit:
        """Return a grid of the same values that is not trained: itself, if it is none that is."""


def grid(kind: str) -> type[LowBit]:
    """Return the class of a kind of frozen grid.

    Raises:
        CompressionError: there is no such kind.
    """
    if kind not in KINDS:
        raise CompressionError(f"there is no kind {kind!r} of low-bit weights; {nearest(kind, KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    found: type[LowBit] = getattr(import_module(module), name)
    return found


def low_bit_of(module: nn.Module, attribute: str) -> LowBit | None:
    """Return the step that gives a module's parameter few values, or None if it has none."""
    if not parametrize.is_parametrized(module, attribute):
        return None
    steps = module.parametrizations[attribute]  # type: ignore[index]
    return next((step for step in steps if isinstance(step, LowBit)), None)


def attach_low_bit(module: nn.Module, attribute: str, step: LowBit) -> None:
    """Let a step give a module's parameter its values from now on; the Parameter stays the same one.

    A mask over it stays in front. What the parameter then stores is the step's `right_inverse` of it, if there is one.
    """
    own_class(module)
    parametrize.register_parametrization(module, attribute, step.train(module.training), unsafe=True)


def freeze_low_bit(module: nn.Module, attribute: str) -> None:
    """Store the values that a parameter's low-bit step gives now, not to be trained; the Parameter stays the same."""
    steps: Any = module.parametrizations[attribute]  # type: ignore[index]
    place, step = next((i, step) for i, step in enumerate(steps) if isinstance(step, LowBit))
    with torch.no_grad():
        values = getattr(module, attribute).detach().clone()
    steps[place] = step.frozen()
    steps.original.grad, steps.original.data = None, values
    steps.original.requires_grad_(False)


def check_bits(bits: Any, what: str = "bits") -> None:
    """Refuse a number of bits that weights cannot have.

    Raises:
        CompressionError: names `what` it is.
    """
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CompressionError(f"{what} is a whole number from 2 to 8, got {bits!r}.")
