"""The file of a 95 % sparse ResNet-18 against its dense file: bytes on disk, and outputs after it is loaded again.

    python -m nasbench.benchmarks.sparse_file

torchvision's ResNet-18 for 1,000 classes with random weights, pruned by magnitude and at random with ERK densities; the
dense file is what `compress.save` writes for the network before it was pruned. Outputs are compared bit by bit.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import compress
from nasbench.benchmarks.common import record

DENSITY = 0.05


def main() -> None:
    """Save, load and compare, and record."""
    from torchvision.models import resnet18

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = resnet18().eval()
    x = torch.randn(4, 3, 224, 224)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        compress.save(dense, Path(folder) / "dense.safetensors")
        figures["dense_bytes"] = (Path(folder) / "dense.safetensors").stat().st_size
        for method in ("random", "magnitude"):
            model = compress.prune(dense, DENSITY, distribution="erk", method=method)
            file = Path(folder) / f"{method}.safetensors"
            started = time.perf_counter()
            compress.save(model, file)
            saved = time.perf_counter()
            again = compress.load(file, copy.deepcopy(dense))
            loaded = time.perf_counter()
            with torch.no_grad():
                equal = torch.equal(model(x), again(x))
            figures[method] = {
                "bytes": file.stat().st_size,
                "share_of_dense": round(file.stat().st_size / figures["dense_bytes"], 4),
                "kept_weights": sum(int(mask.sum()) for mask in compress.masks(model).values()),
                "equal_outputs": equal,
                "save_ms": round(1e3 * (saved - started), 1),
                "load_ms": round(1e3 * (loaded - saved), 1),
            }
    record(__file__, figures, seeds=[0], density=DENSITY)


if __name__ == "__main__":
    main()
