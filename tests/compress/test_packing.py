"""Packed codes: the bytes that were promised, in the layout that was promised, and back."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CompressionError
from compress.packing import pack, packed_size, unpack, unpack_values


def drawn(count: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4609])
def test_every_code_comes_back_from_the_fewest_bytes(bits: int, count: int) -> None:
    codes = drawn(count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-count * bits // 8),) == (packed_size(bits, count),)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(("bits", "size"), [(2, 1153), (3, 1729), (4, 2305)])
def test_bytes_of_4609_codes(bits: int, size: int) -> None:
    assert len(pack(drawn(4609, bits), bits)) == size


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout_is_that_of_a_little_endian_integer(bits: int) -> None:
    codes = drawn(19, bits)
    groups = [sum(int(code) << i * bits for i, code in enumerate(codes[start : start + 8])) for start in (0, 8, 16)]
    expected = b"".join(group.to_bytes(bits, "little") for group in groups)
    assert bytes(pack(codes, bits).tolist()) == expected[: -(-19 * bits // 8)]
    assert not any(expected[-(-19 * bits // 8) :]), "only zeros are cut"


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_are_those_of_the_codes(bits: int) -> None:
    codes, table = drawn(1001, bits), torch.randn(2**bits, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_values(pack(codes, bits), bits, 1001, table), table[codes.long()])


def test_shapes_and_strides_do_not_matter() -> None:
    codes = drawn(240, 3).view(2, 3, 4, 10)
    turned = codes.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(pack(turned, 3), pack(codes.reshape(-1), 3))


def test_refusals() -> None:
    codes = torch.tensor([0, 4], dtype=torch.uint8)
    for bits in (0, 9, 2.0, True):
        with pytest.raises(CompressionError, match="1 to 8 bits"):
            pack(codes, bits)  # type: ignore[arg-type]
        with pytest.raises(CompressionError, match="1 to 8 bits"):
            unpack(codes, bits, 2)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="the code 4 needs more than 2 bits"):
        pack(codes, 2)
    with pytest.raises(CompressionError, match=r"codes are torch\.uint8, got torch\.int64"):
        pack(codes.long(), 3)
    with pytest.raises(CompressionError, match="9 codes of 3 bits are 4 bytes, got torch.uint8 of shape"):
        unpack(codes, 3, 9)
    with pytest.raises(CompressionError, match="has 8 values, got shape"):
        unpack_values(codes, 3, 4, torch.zeros(4))
