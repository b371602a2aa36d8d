"""DenseShift in a file: bytes of a 3-bit ResNet-18, and how long it takes to read and unpack 11 million weights.

    python -m nasbench.benchmarks.low_bit_file [--repeats 15]

torchvision's ResNet-18 for 1,000 classes with random weights; every convolution and the classifier have 2, 3 or
4 bits. Times are medians of wall time on one thread; the file has just been written, so the system has it in memory.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import compress
from compress import storage
from compress.low_bit import low_bit_of
from nasbench.benchmarks.common import record


def main() -> None:
    """Save, load and compare, and record."""
    from torchvision.models import resnet18

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = resnet18().eval()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = compress.save(dense, Path(folder) / "dense.safetensors")
        figures["float32"] = {"bytes": file.stat().st_size} | times(file, dense, options.repeats)
        for bits in (2, 3, 4):
            model = compress.dense_shift(dense, bits, include_ends=True)
            own = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
            shifted = {name: layer for name, layer in own.items() if low_bit_of(layer, "weight") is not None}
            count = sum(layer.weight.numel() for layer in shifted.values())
            file = compress.save(model, Path(folder) / f"{bits}.safetensors")
            twin = compress.load(file, dense)
            packed = sum(entry.bytes for entry in compress.inspect(file).layers if entry.encoding == "shift")
            figures[f"{bits} bits"] = {
                "bytes": file.stat().st_size,
                "weights_in_few_bits": count,
                "their_bytes": packed,
                "their_bytes_to_float32": round(packed / (4 * count), 5),
                "weights_equal": all(
                    torch.equal(layer.weight, getattr(twin.get_submodule(name), "weight"))  # noqa: B009
                    for name, layer in shifted.items()
                ),
            } | times(file, dense, options.repeats)
    record(__file__, figures, seeds=[0], repeats=options.repeats)


def times(file: Path, model: nn.Module, repeats: int) -> dict[str, float]:
    """Return milliseconds of reading and unpacking a file, checksum included, and of loading it into a network."""
    return {
        "read_and_unpack_ms": timed(lambda: storage.read(file), repeats),
        "load_ms": timed(lambda: compress.load(file, model), repeats),
        "copy_of_the_network_ms": timed(lambda: copy.deepcopy(model), repeats),
    }


def timed(run: Callable[[], object], repeats: int) -> float:
    """Return the median."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return round(1e3 * median(found), 1)


if __name__ == "__main__":
    main()
