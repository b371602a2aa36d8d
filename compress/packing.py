"""Codes of few bits packed without gaps: N codes of b bits take ceil(N * b / 8) bytes.

Eight codes are one group of b bytes: code i of a group is at the bits from i * b on of its little-endian integer. The
last group is cut after the last byte that a code reaches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressionError

_WIDEST = 14  # bits of an index into a table: one of 2^14 entries still fits a processor's cache


def packed_size(bits: int, count: int) -> int:
    """Return how many bytes `count` codes of `bits` bits take."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes packed into bytes.

    Args:
        codes: uint8, any shape; N codes below 2^bits.
        bits: 1 to 8.

    Returns:
        (ceil(N * bits / 8),) uint8.

    Raises:
        CompressionError: the bits are out of range, or a code needs more.

    Example:
        >>> pack(torch.tensor([1, 7, 0], dtype=torch.uint8), 3)  # bits 001, 111, 000 from the right: 000 111 001
        tensor([57,  0], dtype=torch.uint8)
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise CompressionError(f"codes are torch.uint8, got {codes.dtype}.")
    if codes.numel() and (largest := int(codes.max())) >= 2**bits:
        raise CompressionError(f"the code {largest} needs more than {bits} bits.")
    count = codes.numel()
    flat = np.zeros(math.ceil(count / 8) * 8, dtype=np.uint8)
    flat[:count] = codes.detach().cpu().reshape(-1).numpy()
    groups = flat.reshape(-1, 8)
    packed = np.zeros((len(groups), bits), dtype=np.uint8)
    for i in range(8):
        for byte in range(i * bits // 8, (i * bits + bits - 1) // 8 + 1):
            shift = i * bits - 8 * byte  # what is shifted out of a byte is another byte's
            packed[:, byte] |= groups[:, i] << shift if shift >= 0 else groups[:, i] >> -shift
    return torch.from_numpy(packed.reshape(-1)[: packed_size(bits, count)].copy())


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes that `pack` packed.

    Args:
        packed: (ceil(count * bits / 8),) uint8.
        bits: of a code.
        count: of codes.

    Returns:
        (count,) uint8.

    Raises:
        CompressionError: the bits are out of range, or the bytes are not as many as these codes take.

    Example:
        >>> unpack(torch.tensor([57, 0], dtype=torch.uint8), 3, 3)
        tensor([1, 7, 0], dtype=torch.uint8)
    """
    _check_bits(bits)
    return unpack_values(packed, bits, count, torch.arange(2**bits, dtype=torch.uint8))


def unpack_values(packed: Tensor, bits: int, count: int, table: Tensor) -> Tensor:
    """Return the values that packed codes stand for, without the codes in between: several of them by one look-up.

    Args:
        packed: (ceil(count * bits / 8),) uint8, as `pack` returns it.
        bits: of a code.
        count: of codes.
        table: (2^bits,), the value of each code, of a type that numpy has.

    Returns:
        (count,), of the table's type.

    Raises:
        CompressionError: the bits are out of range, or the bytes or the table are not of the size that they ask for.

    Example:
        >>> unpack_values(torch.tensor([57, 0], dtype=torch.uint8), 3, 3, torch.arange(8) / 10)
        tensor([0.1000, 0.7000, 0.0000])
    """
    _check_bits(bits)
    size = packed_size(bits, count)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise CompressionError(
            f"{count:,} codes of {bits} bits are {size:,} bytes, got {packed.dtype} of shape {tuple(packed.shape)}."
        )
    if table.shape != (2**bits,):
        raise CompressionError(f"the table of {bits} bits has {2**bits} values, got shape {tuple(table.shape)}.")
    together = next(n for n in (8, 4, 2, 1) if n * bits <= _WIDEST)
    groups = np.zeros((math.ceil(count / 8), bits), dtype=np.uint8)
    groups.reshape(-1)[:size] = packed.cpu().numpy()
    entries = torch.arange(2 ** (together * bits)).unsqueeze(1) >> torch.arange(together) * bits & 2**bits - 1
    values = np.take(table.cpu()[entries].numpy(), _indices(groups, together * bits), axis=0)
    return torch.from_numpy(values.reshape(-1)[:count])


def _indices(groups: np.ndarray, width: int) -> np.ndarray:
    """Return the integers of `width` bits, one after the other, that groups of bytes hold; no bit is left over."""
    bytes_of_group = groups.shape[1]
    found = np.empty((len(groups), 8 * bytes_of_group // width), dtype=np.intp)
    columns = groups.astype(np.int32).T.copy()
    for i in range(found.shape[1]):
        first, shift = divmod(i * width, 8)
        last = (i * width + width - 1) // 8
        value = columns[first] >> shift
        for byte in range(first + 1, last + 1):
            value |= columns[byte] << 8 * (byte - first) - shift
        found[:, i] = value & 2**width - 1
    return found.reshape(-1)


def _check_bits(bits: int) -> None:
    if type(bits) is not int or not 1 <= bits <= 8:
        raise CompressionError(f"a packed code has 1 to 8 bits, got {bits!r}.")
