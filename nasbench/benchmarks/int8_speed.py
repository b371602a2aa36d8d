"""Int8 ResNet-18 against the fastest float32 of any installed runtime: time and bytes, whole and at half the width.

    python -m nasbench.benchmarks.int8_speed [--threads 2] [--rounds 9]

The CIFAR ResNet-18 (3x3 first convolution, no max pooling) with random weights on random 32x32 images. Variants are
timed in turns in one process, each in blocks of calls that find their weights in the caches, as in deployment: wall
time, medians of the blocks, with the middle half of them. Speed-ups are to the fastest float32 variant.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import compress
from nasbench.benchmarks.common import record
from nasbench.benchmarks.structured_speed import network


def main() -> None:
    """Time every variant, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each variant")
    parser.add_argument("--block", type=float, default=0.4, help="seconds of a block, about")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = network()
    half = compress.prune(model, 0.5, structured=True, example=torch.zeros(1, 3, 32, 32)).eval()
    generator = torch.Generator().manual_seed(0)
    calibration = [torch.randn(32, 3, 32, 32, generator=generator) for _ in range(4)]
    deployed = {
        "onnxruntime float32": compress.to_int8(model, calibration, policy=all_float(model)),
        "onnxruntime int8": compress.to_int8(model, calibration),
        "half width, onnxruntime float32": compress.to_int8(half, calibration, policy=all_float(half)),
        "half width, onnxruntime int8": compress.to_int8(half, calibration),
    }
    with tempfile.TemporaryDirectory() as folder:
        dense = compress.save(model, Path(folder) / "dense.safetensors").stat().st_size
    figures: dict[str, Any] = {"bytes": {"file of compress.save, float32": dense}}
    figures["bytes"] |= {name: one.bytes for name, one in deployed.items()}
    figures["bytes_to_float32"] = {
        name: round(one.bytes / deployed["onnxruntime float32"].bytes, 4) for name, one in deployed.items()
    }
    x = calibration[0]
    whole, small = deployed["onnxruntime float32"](x), deployed["onnxruntime int8"](x)
    figures["relative_output_error_of_int8"] = round(float((whole - small).norm() / whole.norm()), 5)
    for batch in options.batches:
        figures[f"batch_{batch}"] = timed(model, deployed, batch, options)
    record(
        __file__,
        figures,
        caches="warm: blocks of calls of one variant",
        clock="wall time",
        pixels="random",
        versions_of_onnxruntime=version(),
        vnni=vnni(),
        rounds=options.rounds,
    )


def vnni() -> bool:
    """Say whether the processor has instructions for products of eight bits, as /proc/cpuinfo tells it."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def version() -> str:
    """Return that of onnxruntime."""
    import onnxruntime

    return str(onnxruntime.__version__)


def all_float(model: torch.nn.Module) -> dict[str, str]:
    """Return the policy that leaves every layer float32."""
    return dict.fromkeys(compress.weights.weights(model), "float32")


def timed(model: torch.nn.Module, deployed: dict[str, Any], batch: int, options: Any) -> dict[str, Any]:
    """Return milliseconds and speed-ups of all variants on one batch."""
    x = torch.randn(batch, 3, 32, 32)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    last = network().to(memory_format=torch.channels_last)
    script = torch.jit.optimize_for_inference(torch.jit.trace(model, x))
    runs: dict[str, Callable[[], object]] = {
        "torch float32": lambda: model(x),
        "torch float32, channels_last": lambda: last(nhwc),
        "torch float32, TorchScript frozen": lambda: script(x),
    }
    runs |= {name: partial(one, x) for name, one in deployed.items()}
    with torch.inference_mode():
        calls = {name: max(1, round(options.block / seconds(run, 3))) for name, run in runs.items()}
        rounds = [{name: seconds(run, calls[name]) for name, run in runs.items()} for _ in range(options.rounds)]
    times = {name: np.percentile([1e3 * one[name] for one in rounds], (25, 50, 75)) for name in runs}
    whole = [name for name in runs if "float32" in name and "half" not in name]
    best = min(whole, key=lambda name: times[name][1])
    return {
        "best_float32": best,
        "milliseconds": {
            name: [round(float(low[1]), 3), round(float(low[2] - low[0]), 3)] for name, low in times.items()
        },
        "speed_up_to_best_float32": {name: round(float(times[best][1] / own[1]), 2) for name, own in times.items()},
    }


def seconds(run: Callable[[], object], calls: int) -> float:
    """Return those of one call, the mean of so many."""
    run()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


if __name__ == "__main__":
    main()
