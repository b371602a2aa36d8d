"""The NAS-Bench-201 table: size, losslessness, load time, queries per second. Goals: 130 kB, 5 ms, 150 k/s, 10 M/s.

Needs the measured accuracies, ``nasbench201.npz``: by default in ``../shared/data``, else
``python -m nasbench.benchmarks.table PATH``. Every figure is a median over repeats, the first dropped.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.benchmarks.common import record
from nasbench.table import Table

REPEATS = 30


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median wall time of a call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def lossless(table: Table, file: Path, source: Path) -> bool:
    """Whether a saved table gives back every bit of the source's float32 accuracies."""
    loaded = Table.load(file)
    with np.load(source, allow_pickle=False) as arrays:
        rows = loaded.rows(arrays["arch"].tolist())
        return all(loaded.values(name)[rows].tobytes() == arrays[name].tobytes() for name in table.metrics)


def main(source: Path) -> None:
    """Measure, print and record."""
    nine = Table.load(source)
    six = Table(nine.space, {name: nine.values(name) for name in nine.metrics if name.endswith("_12")})
    strings = [nine.space.to_string(arch) for arch in nine.archs()]  # type: ignore[attr-defined]
    archs = list(nine.archs())
    metric = "cifar10_val_12"
    with tempfile.TemporaryDirectory() as folder:
        file = six.save(Path(folder) / "six.npz")
        all_nine = nine.save(Path(folder) / "nine.npz")
        plain = Path(folder) / "plain.npz"
        np.savez_compressed(plain, np.stack([six.values(name) for name in six.metrics]))
        table = Table.load(file)
        values, rows = table.values(metric), np.random.default_rng(0).integers(0, len(table), 1_000_000)
        figures = {
            "metrics": len(six.metrics),
            "rows": len(six),
            "bytes": file.stat().st_size,
            "bytes_as_float32_npz": plain.stat().st_size,
            "bytes_all_nine": all_nine.stat().st_size,
            "lossless": lossless(six, file, source) and lossless(nine, all_nine, source),
            "load_ms": round(1e3 * seconds(lambda: Table.load(file)), 2),
            "load_and_unpack_all_ms": round(1e3 * seconds(lambda: unpacked(file)), 2),
            "load_plain_arrays_ms": round(1e3 * seconds(lambda: Table.load(source), 5), 1),
            "string_queries_per_second": rate(lambda: [table.query(text, metric) for text in strings], len(strings)),
            "arch_queries_per_second": rate(lambda: [table.query(arch, metric) for arch in archs], len(archs)),
            "vectorised_queries_per_second": rate(lambda: values[rows], len(rows)),
        }
    record(__file__, figures, repeats=REPEATS, clock="wall, median", source=source.name)


def unpacked(file: Path) -> None:
    """Load a table and unpack every metric, which a load alone leaves for later."""
    table = Table.load(file)
    for name in table.metrics:
        table.values(name)


def rate(call: Callable[[], Any], count: int) -> int:
    """Return queries per second, to three digits."""
    return int(float(f"{count / seconds(call, 7):.3g}"))


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[3] / "shared" / "data" / "nasbench201.npz"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
