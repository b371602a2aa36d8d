"""One tensor as a file has it: written in the fewest bytes, and read back. `compress.storage` describes the entries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from compress.encodings import ENCODINGS, smallest
from compress.errors import CompressionError
from compress.filling import Slot, Stored
from compress.low_bit import LowBit, grid
from compress.packing import pack, packed_size, unpack, unpack_values
from search_spaces.arch import nearest

Entry = dict[str, Any]
Parts = dict[str, Tensor]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16 or float8
_LARGEST = 2**31  # of an axis


def encode(name: str, slot: Slot) -> tuple[Entry, Parts]:
    """Return the entry of a parameter or buffer and its arrays, by the names they have in the file.

    Raises:
        CompressionError: it has no numbers, or of few bits it is not float32 or not on its grid.
    """
    if is_lazy(slot.tensor) or slot.tensor.is_meta or slot.tensor.layout != torch.strided:
        raise CompressionError(f"{name!r} has no numbers to store (a meta, lazy or sparse tensor): give it some first.")
    tensor = slot.value()
    entry: Entry = {"masked": True} if slot.mask is not None and slot.low_bit is None else {}
    if (
        tensor.ndim == 4
        and tensor.stride() == _channels_last(tensor.to("meta")).stride() != tensor.contiguous().stride()
    ):
        entry["channels_last"] = True  # on which the last bits of a convolution depend
    kept = None if slot.mask is None else slot.mask.cpu().contiguous()
    if slot.low_bit is not None:
        if tensor.dtype != torch.float32:
            raise CompressionError(
                f"{name!r} has few bits and is {tensor.dtype}; call model.float() before it is saved."
            )
        try:
            own, parts = _encode_codes(name, tensor, kept, slot.low_bit.frozen())
        except CompressionError as error:
            raise CompressionError(f"{name!r}: {error}") from None
    else:
        own, parts = _encode_values(name, tensor.cpu().clone(memory_format=torch.contiguous_format), kept)
    return entry | own, parts


def decode(entry: Mapping[str, Any], name: str, parts: Mapping[str, Tensor], groups: int) -> Stored:
    """Return what an entry and its arrays say; nothing is allocated before it is known that the arrays are of its size.

    Raises:
        CompressionError, KeyError, TypeError, AttributeError: they make no sense.
    """
    found = _decode_codes(entry, name, parts) if entry["encoding"] == "codes" else _decode_values(entry, name, parts)
    tensor, mask, low_bit = found
    fresh = entry["encoding"] != "dense"
    if entry.get("channels_last") and tensor.ndim == 4:
        tensor, fresh = _channels_last(tensor), True
    size = sum(array.nbytes for array in parts.values())
    return Stored(tensor, mask, entry["encoding"], groups, name, low_bit, fresh, size)


def whole(value: Any, least: int) -> int:
    """Return a size that a file tells.

    Raises:
        CompressionError: it is none.
    """
    if type(value) is not int or not least <= value < _LARGEST:
        raise CompressionError(f"{value!r} is no size")
    return value


def _encode_values(name: str, tensor: Tensor, mask: Tensor | None) -> tuple[Entry, Parts]:
    # Biases and statistics that happen to be zero are not worth the two lines in the header.
    small = mask is None and tensor.ndim < 2
    if small or tensor.element_size() not in _INTEGERS or tensor.dtype == torch.bool:
        return {"encoding": "dense"}, {name: tensor}
    integers = tensor.view(_INTEGERS[tensor.element_size()]).flatten()
    if mask is not None:
        kept = mask.flatten().numpy()
    else:  # some kinds of float8 have another number in place of -0
        kept = ((tensor.flatten() if tensor.element_size() > 1 else integers) != 0).numpy()
    encoding, code = smallest(kept, 8 * tensor.element_size(), dense=mask is None or bool(kept.all()))
    if code is None:
        return {"encoding": encoding}, {name: tensor}
    values = integers[torch.from_numpy(kept)].view(tensor.dtype)
    parts = {f"{name}/values": values, f"{name}/{ENCODINGS[encoding].part}": torch.from_numpy(code)}
    return {"encoding": encoding, "shape": list(tensor.shape)}, parts


def _encode_codes(name: str, weight: Tensor, mask: Tensor | None, step: LowBit) -> tuple[Entry, Parts]:
    entry: Entry = {"encoding": "codes", "kind": step.kind, "bits": step.bits, "shape": list(weight.shape)}
    if fields := step.fields():
        entry["grid"] = fields
    parts = {f"{name}/{part}": array.detach().cpu().clone() for part, array in step.arrays().items()}
    if mask is None:
        return entry, parts | {f"{name}/codes": pack(step.codes(weight), step.bits)}
    codes, told = _codes_behind(weight, mask.to(weight.device), step)
    encoding, code = smallest(mask.flatten().numpy(), step.bits, dense=told or bool(mask.all()))
    if code is None:
        entry["kept"] = "all" if bool(mask.all()) else "nonzero"
        return entry, parts | {f"{name}/codes": pack(codes, step.bits)}
    parts |= {
        f"{name}/codes": pack(codes.cpu()[mask], step.bits),
        f"{name}/{ENCODINGS[encoding].part}": torch.from_numpy(code),
    }
    return entry | {"kept": encoding}, parts


def _codes_behind(weight: Tensor, mask: Tensor, step: LowBit) -> tuple[Tensor, bool]:
    """Return the codes of a masked weight, and whether its zeros tell what is dropped."""
    weight = weight.masked_fill(~mask, 0)
    try:
        return step.codes(weight), torch.equal(weight != 0, mask)
    except CompressionError:  # zero is not on the grid: the codes of what is dropped do not matter then
        filler = step.values(torch.zeros_like(weight, dtype=torch.uint8))
        return step.codes(weight.where(mask, filler)), False


def _decode_values(
    entry: Mapping[str, Any], name: str, parts: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, None]:
    encoding, masked = entry["encoding"], bool(entry.get("masked", False))
    if encoding == "dense":
        _expect(parts, name)
        tensor = parts[name]
        return tensor, torch.ones_like(tensor, dtype=torch.bool) if masked else None, None
    if encoding not in ENCODINGS:
        known = ["dense", "codes", *ENCODINGS]
        raise CompressionError(f"its encoding {encoding!r} is not known; {nearest(encoding, known)}")
    _expect(parts, f"{name}/values", f"{name}/{ENCODINGS[encoding].part}")
    values, shape = parts[f"{name}/values"], _shape(entry)
    if values.ndim != 1 or values.element_size() not in _INTEGERS:
        raise CompressionError("its arrays are of another kind")
    mask = _mask(encoding, parts[f"{name}/{ENCODINGS[encoding].part}"], shape)
    if (count := int(mask.count_nonzero())) != values.numel():
        raise CompressionError(f"{values.numel()} values for {count} kept entries")
    integers = torch.zeros(shape, dtype=_INTEGERS[values.element_size()])
    integers[mask] = values.view(integers.dtype)
    return integers.view(values.dtype), mask if masked else None, None


def _decode_codes(
    entry: Mapping[str, Any], name: str, parts: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, LowBit]:
    kept, bits, shape = entry.get("kept", ""), whole(entry["bits"], 1), _shape(entry)
    if kept not in ("", "all", "nonzero", *ENCODINGS):
        raise CompressionError(f"{kept!r} does not say which entries are kept")
    own = {part: parts[key] for part in ("codes", "mask", "gaps") if (key := f"{name}/{part}") in parts}
    arrays = {key.removeprefix(f"{name}/"): array for key, array in parts.items() if key.rpartition("/")[2] not in own}
    _expect(own, "codes", *([ENCODINGS[kept].part] if kept in ENCODINGS else []))
    mask = _mask(kept, own[ENCODINGS[kept].part], shape) if kept in ENCODINGS else None
    count = math.prod(shape) if mask is None else int(mask.count_nonzero())
    if own["codes"].dtype != torch.uint8 or own["codes"].shape != (packed_size(bits, count),):
        raise CompressionError(f"{own['codes'].numel()} bytes of codes for {count} of {bits} bits")
    step = grid(entry["kind"]).restore(bits, shape, entry.get("grid", {}), arrays)
    if mask is not None:
        codes = torch.zeros(shape, dtype=torch.uint8)
        codes[mask] = unpack(own["codes"], bits, count)
        return step.values(codes).masked_fill_(~mask, 0), mask, step
    table = step.table()
    if table is None:
        weight = step.values(unpack(own["codes"], bits, count).view(shape))
    else:
        weight = unpack_values(own["codes"], bits, count, table).view(shape)
    if kept:
        mask = weight != 0 if kept == "nonzero" else torch.ones(shape, dtype=torch.bool)
    return weight, mask, step


def _mask(encoding: str, code: Tensor, shape: tuple[int, ...]) -> Tensor:
    if code.ndim != 1 or code.dtype != torch.uint8:
        raise CompressionError("its arrays are of another kind")
    kept: np.ndarray = ENCODINGS[encoding].decode(code.numpy(), math.prod(shape))
    return torch.from_numpy(kept).view(shape)


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(whole(size, 0) for size in entry["shape"])


def _channels_last(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)


def _expect(parts: Mapping[str, Tensor], *names: str) -> None:
    if parts.keys() != set(names):
        raise CompressionError(f"it has the arrays {', '.join(sorted(parts)) or 'none'}, not {', '.join(names)}")
