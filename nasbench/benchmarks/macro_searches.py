"""Searches of the larger weight-entangled spaces, and what they find trained alone beside a random architecture.

    python -m nasbench.benchmarks.macro_searches cifar10.npz [--full] [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. A ViT and a MobileNetV3 are searched on its images, and a GPT on
the help texts that come with Python, all with DrNAS. After every epoch the architecture that would be chosen is scored
with shared weights on validation data. The one that is found, and one drawn at random, are then trained from scratch
in the same way on the training split, validated, and tested once; they need not be of equal size. Losses are nats: of
a text, per character.

The small scale, for two processor cores, takes a third of an hour: two processes run at a time, on one thread each.
`--full` is the same code with the published options, on all data and a GPU, one search after the other; its images may
be "cifar10" too, if they were downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks.common import in_processes, record, train_from_scratch
from search_spaces import GPT, Arch, MobileNetV3, SearchSpace, ViT


@dataclass(frozen=True)
class Plan:
    """One search: its space and data, how the supernet is trained, and how the networks are that it leads to.

    Attributes:
        data: settings of `nasbench.data.load`.
        search: settings of `nasbench.search`.
        train: settings of `nasbench.fit`.
        text: whether the help texts are searched, and not the images.
    """

    space: SearchSpace
    data: dict[str, Any]
    search: dict[str, Any]
    train: dict[str, Any]
    text: bool = False


ADAM = {"optimizer": "adamw", "lr": 0.001, "lr_end": 0.0, "weight_decay": 0.05}
SHORT = {"arch_start": 0.2, "arch_lr": 0.01}  # larger than published: the searches are short
SMALL = {
    "vit": Plan(
        ViT(widths=(48, 64, 80), heads=(2, 3, 4), ratios=(2, 3, 4), depths=(2, 3, 4), head_dim=16, patch=4),
        {"train_images": 4000},
        {"epochs": 10, "batch_size": 32, **ADAM, **SHORT},
        {"epochs": 10, "batch_size": 32, **ADAM},
    ),
    "mobilenet": Plan(
        MobileNetV3(width=0.35, stem="cifar", depths=(1, 2)),
        {"train_images": 4000},
        {"epochs": 6, "batch_size": 32, "lr": 0.05, **SHORT},
        {"epochs": 6, "batch_size": 32, "lr": 0.05},
    ),
    "gpt": Plan(
        GPT(widths=(48, 96), depths=(2, 3), heads=(2, 4), ratios=(2, 3, 4)),
        {"characters": 120_000, "context": 32},
        {"epochs": 20, "batch_size": 32, **ADAM, **SHORT},
        {"epochs": 20, "batch_size": 32, **ADAM},
        text=True,
    ),
}
FULL = {
    "vit": Plan(
        ViT(),
        {},
        {"epochs": 100, "batch_size": 256, "warmup": 5, **ADAM},
        {"epochs": 200, "batch_size": 256, "warmup": 10, "drop_path": 0.1, "label_smoothing": 0.1, **ADAM},
    ),
    "mobilenet": Plan(
        MobileNetV3(stem="cifar"),
        {},
        {"epochs": 50, "batch_size": 128, "lr": 0.05},
        {"epochs": 200, "batch_size": 128, "lr": 0.05, "label_smoothing": 0.1},
    ),
    "gpt": Plan(
        GPT(),
        {"context": 256},
        {"epochs": 50, "batch_size": 32, "warmup": 1, **ADAM},
        {"epochs": 50, "batch_size": 32, "warmup": 1, **ADAM},
        text=True,
    ),
}


def main() -> None:
    """Search and train every space with every seed, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--full", action="store_true", help="published options, all data, on a GPU")
    parser.add_argument("--spaces", nargs="+", choices=[*SMALL], default=[*SMALL])
    parser.add_argument("--epochs", type=int, help="of the searches, instead of the plan's")
    parser.add_argument("--train-epochs", type=int, help="of the trainings from scratch, instead of the plan's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("SPACE", "SEED", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        space, seed, file = options.child
        Path(file).write_text(json.dumps(search_and_train(options, space, int(seed))))
        return
    jobs = [(space, str(seed)) for seed in range(options.seeds) for space in options.spaces]
    runs: dict[str, list[dict[str, Any]]] = {space: [] for space in options.spaces}
    for (space, _), found in in_processes(__file__, jobs, at_once=1 if options.full else 2):
        runs[space].append(found)
    figures = {space: summary(sorted(found, key=lambda run: run["seed"])) for space, found in runs.items()}
    plans = {space: described(plan_of(options, space)) for space in options.spaces}
    device = torch.cuda.get_device_name() if options.full else "cpu"
    record(
        __file__, figures, seeds=range(options.seeds), threads_of_a_process=1, full=options.full, device=device, **plans
    )


def plan_of(options: argparse.Namespace, space: str) -> Plan:
    """Return what to do about a space, with the epochs that the command asks for."""
    plan = (FULL if options.full else SMALL)[space]
    search, train = (
        settings if epochs is None else {**settings, "epochs": epochs, "warmup": min(settings.get("warmup", 0), epochs)}
        for settings, epochs in ((plan.search, options.epochs), (plan.train, options.train_epochs))
    )
    return dataclasses.replace(plan, search=search, train=train)


def described(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON."""
    return {"space": json.loads(plan.space.to_json()), "data": plan.data, "search": plan.search, "train": plan.train}


def search_and_train(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Search once, train and test what was found and a random architecture."""
    plan, device = plan_of(options, name), "cuda" if options.full else "cpu"
    data = nb.data.load("pydoc" if plan.text else options.data, **plan.data)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = nb.search(
            plan.space,
            data,
            "drnas",
            seed=seed,
            study="study",
            folder=folder,
            device=device,
            progress=False,
            **plan.search,
        )
    seconds = time.perf_counter() - started
    space, found = result.space, result.best.arch
    other = space.sample(Random(f"random architecture {seed}"))
    kept = ("epoch", "seconds", "scoring_seconds", "train_loss", "arch_loss", "val_accuracy", "val_loss")
    return {
        "seed": seed,
        "search_seconds": round(seconds, 1),
        "epochs": [{k: v if v is None else round(v, 4) for k, v in e.items() if k in kept} for e in result.epochs],
        "found": train(space, found, data, plan, seed, device),
        "random": train(space, other, data, plan, seed, device),
    }


def train(space: SearchSpace, arch: Arch, data: nb.Data, plan: Plan, seed: int, device: str) -> dict[str, Any]:
    """Train one architecture from scratch, validate it and test it."""
    started = time.perf_counter()
    model = train_from_scratch(space, arch, data, seed, device=device, **plan.train)
    seconds = time.perf_counter() - started
    scores = nb.validate(model, data) | nb.evaluate(model, data)
    cost = nb.measure(model, data.shape)
    return {
        "arch": dict(space.canonical(arch)),
        **{name: round(value, 4) for name, value in scores.items()},
        "params": cost.params,
        "macs": cost.macs,
        "train_seconds": round(seconds, 1),
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores side by side, and the runs."""
    figures: dict[str, Any] = {}
    for metric in ("test_accuracy", "val_loss", "params"):
        figures |= {f"{which}_{metric}": [run[which][metric] for run in runs] for which in ("found", "random")}
    gains = [run["found"]["test_accuracy"] - run["random"]["test_accuracy"] for run in runs]
    figures |= {
        "gain_mean": round(mean(gains), 4),
        "gain_deviation": round(stdev(gains), 4) if len(gains) > 1 else None,
        "search_seconds_mean": round(mean(run["search_seconds"] for run in runs), 1),
        "shared_val_accuracy_by_epoch": [
            round(mean(run["epochs"][i]["val_accuracy"] for run in runs), 4) for i in range(len(runs[0]["epochs"]))
        ],
    }
    return figures | {"runs": list(runs)}


if __name__ == "__main__":
    main()
