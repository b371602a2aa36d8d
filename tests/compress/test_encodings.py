"""Encodings: where kept entries are, exactly; which is smallest; codes that do not fit their size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress.encodings import ENCODINGS, from_gaps, pack_bits, smallest, to_gaps, unpack_bits
from compress.errors import CompressionError

SIZES = (0, 1, 7, 8, 9, 254, 255, 256, 257, 511, 5000)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.5, 1.0])
def test_codes_are_read_back(name: str, density: float) -> None:
    rng = np.random.default_rng(0)
    way = ENCODINGS[name]
    for size in SIZES:
        kept = rng.random(size) < density
        code = way.encode(kept)
        assert code.dtype == np.uint8
        assert np.array_equal(way.decode(code, size), kept)
        assert way.decode(code, size).dtype == np.bool_


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 1000])
def test_gaps_at_the_escape(gap: int) -> None:
    kept = np.zeros(2 * gap + 1, dtype=bool)
    kept[gap] = True
    code = to_gaps(kept)
    assert code.tolist() == [255] * (gap // 255) + [gap % 255] + [255] * (gap // 255)
    assert np.array_equal(from_gaps(code, kept.size), kept)


@pytest.mark.parametrize("size", [0, 4, 259, 260, 10**15])
def test_gaps_of_another_size_are_refused_before_their_memory_is_taken(size: int) -> None:
    code = np.array([1, 2], dtype=np.uint8)  # 5 entries and up to 254 after them
    assert from_gaps(code, 5).tolist() == [False, True, False, False, True]
    assert from_gaps(code, 258).sum() == 2
    if size in (4, 0) or size > 259:
        with pytest.raises(CompressionError, match=f"the gaps run over 5 entries, but there are {size}"):
            from_gaps(code, size)
    else:
        assert from_gaps(code, size).size == size


@pytest.mark.parametrize("size", [8, 17, 10**15])
def test_bits_of_another_size_are_refused(size: int) -> None:
    code = pack_bits(np.ones(16, dtype=bool))
    with pytest.raises(CompressionError, match=f"2 bytes of mask for {size} entries"):
        unpack_bits(code, size)
    with pytest.raises(CompressionError, match="bits are set after the last of 15 entries"):
        unpack_bits(code, 15)


@pytest.mark.parametrize("bits", [2, 3, 8, 16, 32, 64])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.05, 0.12, 0.13, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_the_smallest_is_chosen(bits: int, density: float) -> None:
    kept = np.random.default_rng(1).random(4001) < density
    values = math.ceil(int(kept.sum()) * bits / 8)
    sizes = {name: values + way.encode(kept).size for name, way in ENCODINGS.items()}
    name, code = smallest(kept, bits, dense=False)
    assert code is not None
    assert values + code.size == sizes[name] == min(sizes.values())
    name, code = smallest(kept, bits, dense=True)
    whole = math.ceil(4001 * bits / 8)
    assert (values + code.size if code is not None else whole) == min(*sizes.values(), whole)
