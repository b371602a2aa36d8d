"""What benchmarks that train small networks share: ResNets, trained and tested once, and means over seeds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import nasbench as nb
from compress.pruning import masks
from nasbench.benchmarks.common import in_processes, record
from nasbench.data import Data
from search_spaces import ResNet


def arguments(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser of the data, of `images`, `epochs`, `batch` and `seeds`, and of a child's job."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="cifar10.npz: x_train, y_train, x_test, y_test")
    for name, value in ({"images": 5000, "epochs": 10, "batch": 64, "seeds": 3} | defaults).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser


def did_child(options: argparse.Namespace, run: Callable[[argparse.Namespace, str, int], Any]) -> bool:
    """Return whether this process was started for one job; if so, `run` has done it, given the variant and the seed."""
    if not options.child:
        return False
    name, seed, file = options.child
    Path(file).write_text(json.dumps(run(options, name, int(seed))))
    return True


def record_runs(script: str, figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Record figures with the options they were measured under."""
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "seeds", "child")}
    record(script, figures, seeds=range(options.seeds), threads_of_a_process=1, **settings)


def resnet8(width: int, data: Data, seed: int) -> nn.Module:
    """Return a ResNet of three blocks, `width`, twice and four times as many channels, drawn from a seed."""
    space = ResNet(depths=(1,), widths=(width, 2 * width, 4 * width)).bind(data)
    arch = space.check(
        {"depth0": 1, "depth1": 1, "depth2": 1, "width0": width, "width1": 2 * width, "width2": 4 * width}
    )
    torch.manual_seed(seed)
    return space.build(arch)


def train(
    model: nn.Module, data: Data, seed: int, options: argparse.Namespace, callbacks: Sequence[nb.Callback] = ()
) -> dict[str, Any]:
    """Train on training and validation images and test once; return accuracy, weights, and seconds."""
    started = time.perf_counter()
    recipe = {"epochs": options.epochs, "batch_size": options.batch, "split": "train+val"}
    nb.fit(model, data, seed=seed, device="cpu", progress=False, callbacks=callbacks, **recipe)
    found = {"test_accuracy": round(nb.evaluate(model, data)["test_accuracy"], 4)}
    own = masks(model)
    return found | {
        "params": sum(p.numel() for p in model.parameters()),
        "masked_weights": sum(mask.numel() for mask in own.values()),
        "kept_weights": sum(int(mask.sum()) for mask in own.values()),
        "seconds": round(time.perf_counter() - started, 1),
    }


def steps(data: Data, options: argparse.Namespace) -> int:
    """Return how many steps `train` makes."""
    return options.epochs * data.steps(options.batch, "train+val")  # type: ignore[no-any-return]


def run_all(
    script: str, names: Iterable[str], seeds: int, progress: Callable[[str], None] = print
) -> dict[str, list[dict[str, Any]]]:
    """Run every named variant with every seed, two processes at a time; return what they found, by name and seed."""
    names = list(names)
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    jobs = [(name, str(seed)) for seed in range(seeds) for name in names]
    for done, ((name, seed), entry) in enumerate(in_processes(script, jobs), 1):
        found[name][int(seed)] = entry
        progress(f"{done} of {len(jobs)}")
    return {name: [entries[seed] for seed in sorted(entries)] for name, entries in found.items()}


def summary(runs: list[dict[str, Any]], against: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return mean and standard deviation of test accuracies, and of their gains over other runs of the same seeds."""
    accuracies = [run["test_accuracy"] for run in runs]
    found: dict[str, Any] = {"test_accuracy": spread(accuracies)}
    if against is not None:
        found["gain"] = spread([own - run["test_accuracy"] for own, run in zip(accuracies, against, strict=True)])
    return found | {"runs": runs}


def spread(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation.

    Example:
        >>> spread([1.0, 3.0])
        [2.0, 1.4142]
    """
    return [round(mean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]
