"""Numbers in few bytes, without loss: how a table's metrics are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nasbench.errors import TableError

Floats = NDArray[np.floating[Any]]


def as_metric(name: str, values: ArrayLike) -> Floats:
    """Return a metric as a fresh float array (rows,) or (rows, seeds), or say why it is none."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise TableError(f"metric {name!r} is no array: {error}.") from None
    if array.dtype.kind not in "fiu":
        raise TableError(f"metric {name!r} has values of type {array.dtype}; a metric is numbers.")
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise TableError(f"metric {name!r} has shape {array.shape}; a metric is (rows,) or (rows, seeds), neither 0.")
    floats: Floats = array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)
    if len(where := np.argwhere(np.isinf(floats))):
        raise TableError(f"metric {name!r} is infinite in row {where[0, 0]}. Write NaN for what was not measured.")
    return floats


@dataclass(frozen=True)
class Packed:
    """A metric as it is stored: (rows, columns) whole numbers over a denominator, or floats (denominator 0).

    The highest whole number stands for NaN. `fixes` are values that lie a few floats beside their quotient (averages
    taken in float32 do): distance in floats -> positions in the flattened matrix.
    """

    codes: NDArray[Any]
    dtype: str
    seeds: int | None
    denominator: int = 0
    fixes: Mapping[str, list[int]] = field(default_factory=dict)

    @classmethod
    def pack(cls, values: Floats) -> Packed:
        """Take the smallest denominator that gives back every bit, else the floats."""
        matrix = np.ascontiguousarray(values.reshape(len(values), -1))
        dtype, seeds = matrix.dtype.name, values.shape[1] if values.ndim == 2 else None
        known = ~np.isnan(matrix)
        for denominator in _denominators(matrix[known]):
            whole = np.rint(matrix.astype(np.float64) * denominator)
            highest = float(whole[known].max())
            if highest >= 2**32 - 1:
                break
            store, missing = (np.uint16, 2**16 - 1) if highest < 2**16 - 1 else (np.uint32, 2**32 - 1)
            codes = np.where(known, whole, missing).astype(store)
            off = np.where(known, _bits(matrix) - _bits(cls(codes, dtype, seeds, denominator)._floats()), 0).ravel()
            if np.count_nonzero(off) <= off.size // 20:
                fixes = {str(ulps): np.flatnonzero(off == ulps).tolist() for ulps in np.unique(off[off != 0])}
                return cls(codes, dtype, seeds, denominator, fixes)
        return cls(matrix, dtype, seeds)

    def unpack(self) -> Floats:
        """Return the metric, (rows,) or (rows, seeds)."""
        floats = self._floats()
        bits = _bits(floats).reshape(-1)
        for ulps, positions in self.fixes.items():
            bits[positions] += int(ulps)
        return floats[:, 0] if self.seeds is None else floats

    def _floats(self) -> Floats:
        if not self.denominator:
            return np.array(self.codes, self.dtype)
        floats: Floats = (self.codes.astype(np.float64) / self.denominator).astype(self.dtype)
        floats[self.codes == 2 ** (8 * self.codes.itemsize) - 1] = np.nan
        return floats

    def to_header(self) -> dict[str, Any]:
        entry = {"store": self.codes.dtype.name, "seeds": self.seeds, "dtype": self.dtype}
        return entry | {"denominator": self.denominator, "fixes": dict(self.fixes)}

    @classmethod
    def from_header(cls, entry: Mapping[str, Any], matrices: Mapping[str, NDArray[Any]], rows: int) -> Packed:
        width = entry["seeds"] or 1
        codes = matrices[entry["store"]][:, entry["first"] : entry["first"] + width]
        if codes.shape != (rows, width) or entry["dtype"] not in ("float32", "float64"):
            raise ValueError(f"metric {entry['name']!r} has {codes.shape} numbers instead of {(rows, width)}")
        return cls(codes, entry["dtype"], entry["seeds"], entry["denominator"], entry["fixes"])


def _bits(floats: Floats) -> NDArray[Any]:
    """View floats as integers: neighbouring floats are neighbouring integers."""
    return floats.view(np.int32 if floats.dtype == np.float32 else np.int64)


def _denominators(values: Floats) -> Iterator[int]:
    """Yield denominators below 2**16, ascending, of which a sample of the values are multiples but for rounding."""
    if not len(values) or values.min() < 0:
        return
    sample = np.unique(values)
    sample = sample[:: -(-len(sample) // 64)].astype(np.float64)[:, None]
    slack = 4 * np.finfo(values.dtype).eps
    for start in range(1, 2**16, 2**12):
        tried = np.arange(start, start + 2**12, dtype=np.float64)
        product = sample * tried
        fits = (np.abs(product - np.rint(product)) <= slack * product).all(axis=0)
        yield from tried[fits].astype(int).tolist()[:8]


def planes(matrix: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the bytes of an array as planes: (...) numbers to (bytes, ...), the lowest first."""
    little = np.ascontiguousarray(matrix, matrix.dtype.newbyteorder("<"))
    return np.ascontiguousarray(np.moveaxis(little[..., None].view(np.uint8), -1, 0))


def joined(planes: NDArray[Any], store: str) -> NDArray[Any]:
    """Undo `planes`."""
    dtype = np.dtype(store)
    if planes.dtype != np.uint8 or len(planes) != dtype.itemsize:
        raise ValueError(f"array {store!r} is {planes.shape} of {planes.dtype}, not {dtype.itemsize} planes of bytes")
    little = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(dtype.newbyteorder("<"))
    return little[..., 0].astype(dtype, copy=False)
