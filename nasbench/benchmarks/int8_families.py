"""Int8 networks of six torchvision families: what became int8, bytes and time; and the accuracy of a trained network.

    python -m nasbench.benchmarks.int8_families cifar10.npz [--rounds 5]

`cifar10.npz` holds x_train, y_train, x_test, y_test. Families have random weights and random images, which is enough
for bytes and time: of their float32 and int8 files in onnxruntime, in turns, on one thread, wall time, medians. For
accuracy a ResNet of three blocks is trained with each seed and deployed in float32 and in int8, calibrated on training
images, and tested once.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.benchmarks.common import record
from nasbench.benchmarks.int8_speed import all_float, seconds, version, vnni

FAMILIES = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121", "vit_b_16")


def main() -> None:
    """Deploy, time and test, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="cifar10.npz")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {name: family(name, options.rounds) for name in FAMILIES}
    tested = [accuracies(options, seed) for seed in range(options.seeds)]
    figures["test accuracy of a trained ResNet"] = {
        name: small_runs.spread([one[name] for one in tested]) for name in tested[0]
    } | {"by_seed": tested}
    settings = {name: getattr(options, name) for name in ("images", "epochs", "batch", "rounds")}
    record(
        __file__,
        figures,
        seeds=range(options.seeds),
        pixels="224 x 224",
        onnxruntime=version(),
        vnni=vnni(),
        **settings,
    )


def family(name: str, rounds: int) -> dict[str, Any]:
    """Return bytes, milliseconds and what stayed float of one network."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(name).eval()
    x = torch.randn(4, 3, 224, 224)
    batches = [x, x.flip(0)]
    small = compress.to_int8(model, batches)
    whole = compress.to_int8(model, batches, policy=all_float(model))
    one = x[:1]
    times = [(seconds(lambda: whole(one), 3), seconds(lambda: small(one), 3)) for _ in range(rounds)]
    low, median, high = np.percentile(1e3 * np.array(times), (25, 50, 75), axis=0)
    return {
        "bytes": [whole.bytes, small.bytes],
        "share_of_bytes": round(small.bytes / whole.bytes, 4),
        "milliseconds": [round(float(value), 2) for value in median],
        "middle_half_ms": [round(float(value), 2) for value in high - low],
        "speed_up": round(float(median[0] / median[1]), 2),
        "layers": len(small.policy),
        "kept_float": len(small.kept_float),
    }


def accuracies(options: Any, seed: int) -> dict[str, float]:
    """Return the test accuracies of one trained network."""
    data = nb.data.load(options.data, train_images=options.images)
    model = small_runs.resnet8(16, data, seed)
    recipe: dict[str, Any] = {"epochs": options.epochs, "batch_size": options.batch, "split": "train+val"}
    nb.fit(model, data, seed=seed, device="cpu", progress=False, **recipe)
    found: dict[str, torch.nn.Module] = {"float32": model}
    for title, policy in (("float32, onnxruntime", all_float(model)), ("int8, onnxruntime", None)):
        found[title] = compress.to_int8(model, data, policy=policy)
    return {title: round(nb.evaluate(one, data)["test_accuracy"], 4) for title, one in found.items()}


if __name__ == "__main__":
    main()
