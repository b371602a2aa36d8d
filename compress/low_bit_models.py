"""Models with weights of few bits: which they are, made frozen, and how many of their codes change in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.low_bit import LowBit, freeze_low_bit
from compress.models import copy_of
from compress.tables import aligned
from compress.weights import weights


def low_bits(model: nn.Module) -> dict[str, LowBit]:
    """Return the steps that give a model's weights few values, by the names of the weights.

    Example:
        >>> from compress.shift import dense_shift
        >>> low_bits(dense_shift(nn.Linear(4, 4), 3, include_ends=True))
        {'weight': DenseShift(3 bits)}
        >>> low_bits(nn.Linear(4, 4))
        {}
    """
    found = {name: weight.low_bit for name, weight in weights(model).items()}
    return {name: step for name, step in found.items() if step is not None}


def freeze(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Return the model with its few-bit weights fixed: it stores their values, not what trained them.

    Their parameters have ``requires_grad=False`` from then on. Outputs stay the same. `finalize` makes them ordinary
    weights, to be trained as floats.

    Args:
        model: any module; one without few-bit weights is only copied.
        inplace: change the model itself. Its Parameter objects stay, but an optimizer that has them cannot go on.

    Raises:
        CompressionError: it is no module, or cannot be copied.

    Example:
        >>> from compress.shift import dense_shift
        >>> layer = dense_shift(nn.Linear(4, 2), 3, include_ends=True)
        >>> [tuple(p.shape) for p in layer.parameters()]  # the bias, and 4 latents for each weight
        [(2,), (8, 4)]
        >>> [tuple(p.shape) for p in freeze(layer).parameters()]
        [(2,), (2, 4)]
    """
    target = model if inplace else copy_of(model)
    for weight in weights(target).values():
        if weight.low_bit is not None:
            freeze_low_bit(weight.module, weight.attribute)
    return target


@dataclass(frozen=True, eq=False)
class CodeSnapshot:
    """The codes and signs that a model's few-bit weights have at one time; made by `code_snapshot`.

    Attributes:
        codes: uint8, by the names of the weights, in their shapes.
        signs: int8, -1, 0 or 1, likewise.
    """

    codes: Mapping[str, Tensor]
    signs: Mapping[str, Tensor]


@dataclass(frozen=True)
class ChangedCodes:
    """Which shares of a model's few-bit weights have another code, and another sign; made by `changed_codes`.

    Attributes:
        codes: by the names of the weights.
        signs: likewise.
        all_codes: of all weights together.
        all_signs: likewise.
    """

    codes: Mapping[str, float]
    signs: Mapping[str, float]
    all_codes: float
    all_signs: float

    def __str__(self) -> str:
        rows = [("weight", "codes", "signs")]
        rows += [(name, f"{share:.4f}", f"{self.signs[name]:.4f}") for name, share in self.codes.items()]
        rows.append(("all", f"{self.all_codes:.4f}", f"{self.all_signs:.4f}"))
        return aligned(rows)


def code_snapshot(model: nn.Module) -> CodeSnapshot:
    """Return the codes of a model's few-bit weights as they are now, for `changed_codes`.

    Raises:
        CompressionError: it is no module, has no such weights, or one that is not on its grid.
    """
    codes, signs = {}, {}
    for name, weight in weights(model).items():
        if (step := weight.low_bit) is not None:
            with torch.no_grad():
                values = getattr(weight.module, weight.attribute)
                try:
                    codes[name], signs[name] = step.codes(values), values.sign().to(torch.int8)
                except CompressionError as error:
                    raise CompressionError(f"{name!r}: {error}") from None
    if not codes:
        raise CompressionError(f"{type(model).__name__} has no weights of few bits; compress.dense_shift makes some.")
    return CodeSnapshot(codes, signs)


def changed_codes(before: nn.Module | CodeSnapshot, after: nn.Module | CodeSnapshot) -> ChangedCodes:
    """Return which share of the weights has another code, and another sign, than before.

    Between two times in training, that says how much of the weights is still moving, and how much is frozen.

    Args:
        before: a model, or what `code_snapshot` noted of it.
        after: likewise.

    Raises:
        CompressionError: one has no few-bit weights, or they have not the same names and shapes.

    Example:
        >>> from compress.shift import dense_shift
        >>> layer = dense_shift(nn.Linear(4, 2), 2, include_ends=True)
        >>> before = code_snapshot(layer)
        >>> with torch.no_grad():
        ...     layer.weight = -layer.weight
        >>> print(changed_codes(before, layer))
        weight   codes   signs
        weight  1.0000  1.0000
        all     1.0000  1.0000

    Source: Li et al., DenseShift, ICCV 2023, arXiv:2208.09708, where frozen signs are what it is to avoid; the exact
    measure of the paper may be another.
    """
    old, new = (one if isinstance(one, CodeSnapshot) else code_snapshot(one) for one in (before, after))
    shapes = [{name: tuple(code.shape) for name, code in one.codes.items()} for one in (old, new)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise CompressionError(
            f"the weights of few bits are not the same before and after: {', '.join(map(repr, other[:3]))} differ in "
            "being there or in shape. Compare one model at two times."
        )
    sizes = {name: code.numel() for name, code in old.codes.items()}

    def shares(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> tuple[dict[str, float], float]:
        counts = {name: int((one[name].cpu() != two[name].cpu()).sum()) for name in sizes}
        return {name: counts[name] / sizes[name] for name in sizes}, sum(counts.values()) / sum(sizes.values())

    codes, all_codes = shares(old.codes, new.codes)
    signs, all_signs = shares(old.signs, new.signs)
    return ChangedCodes(codes, signs, all_codes, all_signs)
