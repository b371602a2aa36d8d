"""How the entries of a sparse tensor are written: where they are, and their values, in as few bytes as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressionError
from compress.packing import packed_size

Array = NDArray[np.generic]
Bytes = NDArray[np.uint8]

_ESCAPE = 255


@dataclass(frozen=True)
class Encoding:
    """A way to write which entries of a tensor are kept.

    Attributes:
        part: name of the array that says where the kept entries are.
        encode: makes it from a boolean array.
        decode: returns the boolean array from it, for so many entries; refuses, before it takes their memory, an array
            that cannot be of so many.
    """

    part: str
    encode: Callable[[NDArray[np.bool_]], Bytes]
    decode: Callable[[Bytes, int], NDArray[np.bool_]]


def pack_bits(kept: NDArray[np.bool_]) -> Bytes:
    """Return one bit for each entry, the first in the lowest bit of the first byte.

    Example:
        >>> pack_bits(np.array([True, False, False, True, False, False, False, False, True]))
        array([9, 1], dtype=uint8)
    """
    return np.packbits(kept, bitorder="little")


def unpack_bits(code: Bytes, size: int) -> NDArray[np.bool_]:
    """Return what `pack_bits` packed.

    Raises:
        CompressionError: there are not as many bytes as that takes, or bits after the last entry are set.
    """
    if code.size != (size + 7) // 8:
        raise CompressionError(f"{code.size} bytes of mask for {size} entries, not {(size + 7) // 8}")
    bits = np.unpackbits(code, bitorder="little")
    if bits[size:].any():
        raise CompressionError(f"bits are set after the last of {size} entries")
    return bits[:size].astype(np.bool_)


def to_gaps(kept: NDArray[np.bool_]) -> Bytes:
    """Return a byte for each kept entry: how many are dropped before it; 255 stands for 255 dropped and none kept.

    Up to 254 dropped entries at the end are not written.

    Example:
        >>> to_gaps(np.array([True, False, False, True, False]))
        array([0, 2], dtype=uint8)
        >>> to_gaps(np.arange(1000) == 300)
        array([255,  45, 255, 255], dtype=uint8)
    """
    ends = np.append(np.flatnonzero(kept), kept.size)
    escapes, rest = np.divmod(np.diff(ends, prepend=-1) - 1, _ESCAPE)
    code = np.full(int(escapes.sum()) + ends.size - 1, _ESCAPE, dtype=np.uint8)
    code[np.cumsum(escapes[:-1]) + np.arange(ends.size - 1)] = rest[:-1]
    return code


def from_gaps(code: Bytes, size: int) -> NDArray[np.bool_]:
    """Return what `to_gaps` wrote.

    Raises:
        CompressionError: the gaps do not add up to so many entries.
    """
    entry = code != _ESCAPE
    length = int(code.sum(dtype=np.int64)) + int(entry.sum())
    if not 0 <= size - length < _ESCAPE:
        raise CompressionError(f"the gaps run over {length} entries, but there are {size}")
    kept = np.zeros(size, dtype=np.bool_)
    kept[(np.cumsum(code, dtype=np.int64) + np.cumsum(entry))[entry] - 1] = True
    return kept


ENCODINGS: Mapping[str, Encoding] = {
    "bitmask": Encoding("mask", pack_bits, unpack_bits),
    "gaps": Encoding("gaps", to_gaps, from_gaps),
}
"""Ways to write which entries are kept. A byte of either stands for 256 entries at most: a small file stays small."""


def smallest(kept: NDArray[np.bool_], bits: int, *, dense: bool) -> tuple[str, Bytes | None]:
    """Return the encoding that takes fewest bytes with values of so many bits, and its code; "dense" has none.

    Args:
        dense: whether the values of all entries may be written instead.

    Example:
        >>> smallest(np.arange(1000) % 20 == 0, 32, dense=True)[0]  # 50 bytes of gaps or 125 of bits, and 200 of values
        'gaps'
        >>> smallest(np.arange(1000) % 2 == 0, 32, dense=True)[0], smallest(np.ones(1000, bool), 32, dense=True)[0]
        ('bitmask', 'dense')
    """
    count = int(np.count_nonzero(kept))
    codes = {"bitmask": pack_bits(kept)}
    if count < codes["bitmask"].size:  # gaps take a byte for each kept entry at least
        codes["gaps"] = to_gaps(kept)
    name = min(codes, key=lambda name: codes[name].size)
    if dense and packed_size(bits, kept.size) - packed_size(bits, count) <= codes[name].size:
        return "dense", None
    return name, codes[name]
