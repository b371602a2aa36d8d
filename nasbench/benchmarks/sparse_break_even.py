"""From which sparsity on a sparse product is faster than the dense one, and what masks gain: measured, nothing claimed.

    python -m nasbench.benchmarks.sparse_break_even [--repeats 15]

A 3x3 convolution of 256 to 512 channels as a matrix, (512, 2304), times (2304, n) for n = 16, 256 and 784 pixels: CSR
of torch with weights at random places, and BSR with random 16x16 blocks, against the dense product. Ratios above 1 say
that the sparse one is faster; the break-even is interpolated between the two sparsities around it, and null where 1 is
not among the ratios. Then the CIFAR ResNet-18 at 90 % sparsity in evaluation: with masks, and with zeros in plain
weights. One thread, variants in turns; medians of process time, and of each turn's ratio.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compress.pruning import finalize, prune
from nasbench.benchmarks.common import record
from nasbench.benchmarks.structured_speed import in_turns, network

ROWS, COLUMNS, BLOCK = 512, 2304, 16
PIXELS = (16, 256, 784)
TIMES = 5  # products in a turn: one takes down to a tenth of a millisecond
SPARSITIES = {"csr": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99), "bsr_16x16": (0.5, 0.7, 0.8, 0.9, 0.95)}


def main() -> None:
    """Time products and networks, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="turns that count")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="of the masked network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {f"{pixels}_pixels": products(pixels, options.repeats) for pixels in PIXELS}
    figures["resnet18_90_percent_sparse"] = {f"batch_{b}": masked(b, options.repeats) for b in options.batches}
    record(__file__, figures, seeds=[0], repeats=options.repeats, clock="process time", matrix=[ROWS, COLUMNS])


def products(pixels: int, repeats: int) -> dict[str, Any]:
    """Return milliseconds, ratios of dense to sparse time, and the break-even sparsity of each layout."""
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(ROWS, COLUMNS, generator=draw), torch.randn(COLUMNS, pixels, generator=draw)
    matrices = {"dense": weight}
    for layout, sparsities in SPARSITIES.items():
        for sparsity in sparsities:
            matrices[f"{layout} {sparsity}"] = sparse(weight, layout, sparsity, draw)
    for matrix in matrices.values():
        torch.testing.assert_close(matrix @ x, matrix.to_dense() @ x, rtol=1e-3, atol=1e-3)
    times = in_turns({name: partial(several, matrix, x) for name, matrix in matrices.items()}, repeats)
    found: dict[str, Any] = {"dense_milliseconds": round(1e3 * median(times["dense"]) / TIMES, 3)}
    for layout, sparsities in SPARSITIES.items():
        gains = {s: ratio(times["dense"], times[f"{layout} {s}"]) for s in sparsities}
        found[layout] = {"dense_to_sparse": gains, "break_even": break_even(gains)}
    return found


def several(matrix: Tensor, x: Tensor) -> None:
    """Multiply a few times."""
    for _ in range(TIMES):
        matrix @ x


def sparse(weight: Tensor, layout: str, sparsity: float, draw: torch.Generator) -> Tensor:
    """Return the matrix with all but random weights, or blocks, left out."""
    side = 1 if layout == "csr" else BLOCK
    places = torch.rand(ROWS // side, COLUMNS // side, generator=draw)
    mask = places.flatten().argsort().argsort().view_as(places) >= round(sparsity * places.numel())
    kept = weight * mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support")
        return kept.to_sparse_csr() if side == 1 else kept.to_sparse_bsr((side, side))


def ratio(dense: list[float], other: list[float]) -> float:
    """Return how many times faster the other is, the median over turns."""
    return round(median(a / b for a, b in zip(dense, other, strict=True)), 3)


def break_even(gains: dict[float, float]) -> float | None:
    """Return the sparsity at which the ratio is 1; None if it is not among those measured.

    Example:
        >>> break_even({0.8: 0.5, 0.9: 1.5}), break_even({0.8: 0.5, 0.9: 0.9})
        (0.85, None)
    """
    for (a, low), (b, high) in pairwise(gains.items()):
        if low < 1 <= high:
            return round(a + (b - a) * (1 - low) / (high - low), 3)
    return None


def masked(batch: int, repeats: int) -> dict[str, Any]:
    """Return milliseconds of the networks, and how many times faster than dense those with masks and with zeros are."""
    dense = network()
    with_masks = prune(dense, 0.1, distribution="erk")
    models = {"dense": dense, "masks": with_masks, "zeros": finalize(with_masks)}
    x = torch.randn(batch, 3, 32, 32)
    with torch.inference_mode():
        times = in_turns({name: partial(model, x) for name, model in models.items()}, repeats)
    return {
        "milliseconds": {name: round(1e3 * median(own), 2) for name, own in times.items()},
        "speed_up": {name: ratio(times["dense"], own) for name, own in times.items() if name != "dense"},
    }


if __name__ == "__main__":
    main()
