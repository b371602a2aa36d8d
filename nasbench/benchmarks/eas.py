"""EAS: its controller against random growth, and a grown network against the same one trained from scratch.

    python -m nasbench.benchmarks.eas [cifar10.npz] [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test; without it, scanned digits alone are searched. For every seed
three searches of equal budget start from equal networks: the controller, random growth, and the controller with the
baseline of the released code. A search trains the start, then `children` networks that inherit its weights (after half
of them, those of the best), each for as many epochs.

The best network of the first search is then trained on, for `final` epochs. Beside it the same architecture is trained
from scratch for as many epochs as make at least the same compute: that of the start, of the ancestors, of the network
in the search, and of the training after it. Compute is multiply-adds of forward and backward passes, three times those
of a forward pass; children that are no ancestors do not count, for the question is what to do with a network that is
given. Both are tested once. Sizes are those that two processor cores can do in half an hour, far below the published
ones.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks.common import in_processes, record
from search_spaces import PlainCNN

WAYS: dict[str, dict[str, Any]] = {
    "controller": {},
    "random": {"controller": "random"},
    "released": {"baseline": "released"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {
        "space": {"widths": (4, 6, 8, 12, 16, 24, 32), "fc_widths": (16, 32, 48, 64), "blocks": 2, "slots": 4},
        "children": 60,
        "epochs": 3,
        "final": 15,
        "lr": 0.05,
    },
    "images": {
        "space": {"widths": (8, 12, 16, 24, 32, 48, 64), "fc_widths": (64, 96, 128), "slots": 4},
        "children": 30,
        "epochs": 2,
        "final": 8,
        "lr": 0.05,
    },
}
FIXED: dict[str, Any] = {"batch": 5, "policy_lr": 0.02, "widen": 2, "deepen": 2}
"""Smaller and faster than published: a search here has tens of children, not hundreds."""


def main() -> None:
    """Search for every seed and way, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--images", type=int, default=2500, help="of the file; a fifth of them validate")
    parser.add_argument("--children", type=int, help="of a search; default: 60 of digits, 30 of images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=4, metavar=("DATA", "WAY", "SEED", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        kind, way, seed, file = options.child
        Path(file).write_text(json.dumps(search(options, kind, way, int(seed))))
        return
    kinds = ["images", "digits"] if options.data else ["digits"]  # the long ones first
    jobs = [(kind, way, str(seed)) for kind in kinds for seed in range(options.seeds) for way in WAYS]
    runs = [found for _, found in in_processes(__file__, jobs, at_once=2)]
    runs.sort(key=lambda run: (run["data"], run["way"], run["seed"]))
    figures = {kind: summary([run for run in runs if run["data"] == kind]) for kind in kinds}
    record(
        __file__,
        figures | {"runs": runs},
        seeds=range(options.seeds),
        threads_of_a_process=1,
        settings={kind: SETTINGS[kind] for kind in kinds},
        strategy=FIXED,
        images=options.images,
        children=options.children,
    )


def search(options: argparse.Namespace, kind: str, way: str, seed: int) -> dict[str, Any]:
    """Search once; with the controller, compare what was found with the same network from scratch."""
    settings = SETTINGS[kind]
    children = options.children or settings["children"]
    data = nb.data.load("digits") if kind == "digits" else nb.data.load(options.data, train_images=options.images)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = nb.search(
            PlainCNN(**settings["space"]),
            data,
            "eas",
            trials=1 + children,
            restart=children // 2,
            seed=seed,
            study="study",
            folder=folder,
            device="cpu",
            progress=False,
            batch_size=32,
            epochs=settings["epochs"],
            lr=settings["lr"],
            **FIXED | WAYS[way],
        )
        seconds = time.perf_counter() - started
        scores = [trial.metrics["val_accuracy"] for trial in result.complete]
        quarter = max(1, children // 4)
        entry: dict[str, Any] = {
            "data": kind,
            "way": way,
            "seed": seed,
            "start": round(scores[0], 4),
            "best": round(max(scores), 4),
            "mean_of_first_quarter": round(mean(scores[1 : 1 + quarter]), 4),
            "mean_of_last_quarter": round(mean(scores[-quarter:]), 4),
            "test_accuracy_of_best": round(nb.evaluate(result.best.build(), data)["test_accuracy"], 4),
            "trained": sum(trial.copied_from is None for trial in result.complete),
            "training_macs": sum(
                training_macs(trial, data, settings["epochs"]) for trial in result.complete if trial.copied_from is None
            ),
            "search_seconds": round(seconds, 1),
        }
        if way == "controller":
            entry |= grown_and_from_scratch(result, data, settings, seed)
    return entry


def training_macs(trial: nb.Trial, data: nb.Data, epochs: int) -> int:
    """Return the multiply-adds of so many epochs of training: a backward pass is two forward passes."""
    return 3 * int(trial.metrics["macs"]) * data.count("train") * epochs


def grown_and_from_scratch(
    result: nb.SearchResult, data: nb.Data, settings: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Train the best network on, and the same architecture from scratch with the same compute; test both once."""
    best = result.best
    line = [best]
    while line[-1].parent is not None:
        line.append(result.trials[line[-1].parent])
    spent = sum(training_macs(trial, data, settings["epochs"]) for trial in line)
    spent += training_macs(best, data, settings["final"])
    epochs = math.ceil(spent / training_macs(best, data, 1))
    found: dict[str, Any] = {
        "generations": len(line) - 1,
        "params": best.metrics["params"],
        "macs": best.metrics["macs"],
        "macs_of_start": line[-1].metrics["macs"],
    }
    for name, model, length in (
        ("grown", best.build(), settings["final"]),
        ("scratch", fresh(best, seed), epochs),
    ):
        started = time.perf_counter()
        nb.fit(
            model,
            data,
            epochs=length,
            batch_size=32,
            lr=settings["lr"],
            seed=seed + 100,  # no batches that it has seen in this order
            device="cpu",
            progress=False,
        )
        found[name] = {
            "test_accuracy": round(nb.evaluate(model, data)["test_accuracy"], 4),
            "epochs_now": length,
            "training_macs_in_all": spent if name == "grown" else training_macs(best, data, epochs),
            "seconds_now": round(time.perf_counter() - started, 1),
        }
    return found


def fresh(trial: nb.Trial, seed: int) -> torch.nn.Module:
    """Return an untrained network of the architecture."""
    torch.manual_seed(seed)
    return trial.build(weights=False)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over seeds, and gains with their deviations, seed by seed."""
    of = {way: sorted((r for r in runs if r["way"] == way), key=lambda r: r["seed"]) for way in WAYS}
    figures: dict[str, Any] = {}
    for way in WAYS:
        names = ("start", "best", "mean_of_first_quarter", "mean_of_last_quarter", "test_accuracy_of_best")
        figures[way] = {name: [run[name] for run in of[way]] for name in names}
        figures[way]["training_tera_macs"] = [round(run["training_macs"] / 1e12, 3) for run in of[way]]
        figures[way]["search_seconds"] = [run["search_seconds"] for run in of[way]]
    for way in ("controller", "released"):
        for name in ("best", "mean_of_last_quarter", "test_accuracy_of_best"):
            pairs = zip(of[way], of["random"], strict=True)
            figures[f"{way}_over_random_{name}"] = gain([a[name] - b[name] for a, b in pairs])
    grown = [run["grown"]["test_accuracy"] for run in of["controller"]]
    scratch = [run["scratch"]["test_accuracy"] for run in of["controller"]]
    figures["grown_test_accuracy"], figures["scratch_test_accuracy"] = grown, scratch
    figures["grown_over_scratch"] = gain([a - b for a, b in zip(grown, scratch, strict=True)])
    return figures


def gain(differences: list[float]) -> dict[str, float | None]:
    """Return the mean and the standard deviation of differences."""
    spread = round(stdev(differences), 4) if len(differences) > 1 else None
    return {"mean": round(mean(differences), 4), "deviation": spread}


if __name__ == "__main__":
    main()
