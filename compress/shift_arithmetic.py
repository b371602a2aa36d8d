"""What shift weights ask of a processor: no multiplication, but additions to exponents, flipped signs, and shifts.

A reference to check kernels against: it computes the right numbers with these operations, and is slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import CompressionError
from compress.low_bit import check_bits

_INTEGER_BITS = 5  # of codes for integer inputs: shifts up to 15, so that int64 holds sums of any layer of int32 inputs


@dataclass(frozen=True)
class _Format:
    """Where a floating-point number has its parts."""

    integer: torch.dtype
    mantissa: int
    width: int


_FORMATS = {torch.float32: _Format(torch.int32, 23, 32), torch.float16: _Format(torch.int16, 10, 16)}


def shift_multiply(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Return the products of numbers with powers of two, by whole-number arithmetic alone.

    Of a normal number the exponent is added to the exponent's field, and the sign flips the sign's bit. Zeros stay
    zeros, infinities and NaN what they are; a number too large becomes infinite; one below the normal range, which has
    no exponent of its own, is shifted until it has. Every bit is that of the floating-point product. Integers are
    shifted to the left.

    Args:
        x: float32 or float16, or integers, of a shape that broadcasts with that of the codes.
        codes: uint8, of `compress.shift.ShiftGrid`.
        bits: of a code, 2 to 8; for integers at most 5.

    Returns:
        The products, of the type of x; of integers int64.

    Raises:
        CompressionError: the bits are out of range, a code has more of them, or x or the codes have another type.

    Example:
        >>> shift_multiply(torch.tensor([3.0, 0.0, -0.1]), torch.tensor([3, 3, 6], dtype=torch.uint8), 3)  # 8, 8, -4
        tensor([24.0000,  0.0000,  0.4000])
    """
    check_bits(bits)
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= 2**bits):
        raise CompressionError(f"codes are torch.uint8 below {2**bits}, of `ShiftGrid({bits}).codes(weight)`.")
    negative, shift = codes >> bits - 1, codes & 2 ** (bits - 1) - 1
    negative, shift = negative.long(), shift.long()
    if not x.is_floating_point():
        if bits > _INTEGER_BITS or x.dtype == torch.bool:
            raise CompressionError(
                f"integers are shifted by codes of 2 to {_INTEGER_BITS} bits, got {x.dtype} and {bits}."
            )
        shifted = x.long() << shift
        return torch.where(negative.bool(), -shifted, shifted)
    if x.dtype not in _FORMATS:
        raise CompressionError(f"exponents are added to float32 and float16 only, got {x.dtype}.")
    form = _FORMATS[x.dtype]
    sign_bit, one = 2 ** (form.width - 1), 2**form.mantissa
    infinite = sign_bit - one
    number = x.contiguous().view(form.integer).long()
    sign, size = (number < 0).long(), number & sign_bit - 1
    number, sign, size, negative, shift = torch.broadcast_tensors(number, sign, size, negative, shift)
    normal = size + (shift << form.mantissa)
    # Below the normal range a number is its mantissa: it is shifted up to where a leading one stands for an exponent,
    # and what is left of the shift is added to the exponent.
    room = (form.mantissa - _leading(size)).clamp(min=0)
    first = torch.minimum(shift, room)
    small = (size << first) + (shift - first << form.mantissa)
    found = torch.where(size >= one, normal, small).clamp(max=infinite)
    found = torch.where((size == 0) | (size >= infinite), size, found)
    found = found - (sign ^ negative) * sign_bit
    return torch.where(size > infinite, number, found).to(form.integer).view(x.dtype)


def shift_linear(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Return what a linear layer of shift weights gives: sums of `shift_multiply`.

    Args:
        x: (..., in), float32, float16 or integers.
        codes: (out, in) uint8.
        bits: of a code.

    Returns:
        (..., out), of the type of x; of integers int64, and exact.

    Raises:
        CompressionError: as `shift_multiply`.

    Example:
        >>> shift_linear(torch.tensor([[1, 10]]), torch.tensor([[0, 1], [1, 2]], dtype=torch.uint8), 2)  # 1, 2; 2, -1
        tensor([[21, -8]])
    """
    return shift_multiply(x.unsqueeze(-2), codes, bits).sum(-1)


def shift_conv2d(
    x: Tensor,
    codes: Tensor,
    bits: int,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | Literal["valid", "same"] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return what a convolution of shift weights gives: sums of `shift_multiply` over windows.

    All products are in memory at once: N * out * in / groups * kernel * pixels of them.

    Args:
        x: (N, in, H, W), float32, float16 or integers.
        codes: (out, in / groups, kh, kw) uint8.
        bits: of a code.
        stride, padding, dilation, groups: as the convolution has them; padding with zeros.

    Returns:
        (N, out, H', W'), of the type of x; of integers int64, and exact.

    Raises:
        CompressionError: as `shift_multiply`, or there is no such padding or groups.

    Example:
        >>> x = torch.arange(9).view(1, 1, 3, 3)
        >>> shift_conv2d(x, torch.tensor([[[[0, 3]]]], dtype=torch.uint8), 2)[0, 0]  # 1, -2
        tensor([[-2, -3],
                [-5, -6],
                [-8, -9]])
    """
    if x.ndim != 4 or codes.ndim != 4 or x.shape[1] != groups * codes.shape[1] or len(codes) % groups:
        raise CompressionError(
            f"x is (N, in, H, W) and codes are (out, in / groups, kh, kw), got {tuple(x.shape)} and "
            f"{tuple(codes.shape)} with groups={groups}."
        )
    if padding not in ("valid", "same") and isinstance(padding, str | int):
        raise CompressionError(f"padding is 'valid', 'same' or two widths, got {padding!r}.")
    spans = [(size - 1) * step for size, step in zip(codes.shape[2:], dilation, strict=True)]
    if isinstance(padding, str):
        sides = [(span // 2, span - span // 2) if padding == "same" else (0, 0) for span in spans]
    else:
        sides = [(width, width) for width in padding]
    x = F.pad(x, (*sides[1], *sides[0]))
    for axis in (0, 1):
        x = x.unfold(2 + axis, spans[axis] + 1, stride[axis])
    windows = x[..., :: dilation[0], :: dilation[1]].permute(0, 2, 3, 1, 4, 5)
    n, high, wide = windows.shape[:3]
    windows = windows.reshape(n, high, wide, groups, 1, math.prod(codes.shape[1:]))
    outputs = shift_multiply(windows, codes.reshape(groups, len(codes) // groups, -1), bits).sum(-1)
    return outputs.flatten(3).permute(0, 3, 1, 2)


def _leading(size: Tensor) -> Tensor:
    """Return the place of the leading one of whole numbers below 2^24; of 0 it is -1."""
    return torch.frexp(size.to(torch.float64)).exponent.long() - 1
