"""Searching architecture and bits at once, against the best architecture compressed afterwards, and random draws.

    python -m nasbench.benchmarks.joint_search [cifar10.npz] [--seeds 3] [--trials 16]

`cifar10.npz` holds x_train, y_train, x_test, y_test; without it, scanned digits alone are searched. Depths and widths
of a ResNet and the bits of its parts are one space. Every way evaluates equally many candidates:

- joint: LINAS over the joint space; every candidate is trained, compressed, deployed and measured.
- random: the same with random candidates.
- two stages: half of the trials find the most accurate architecture by evolution, the other half search its bits, layer
  by layer, with LINAS. Those need no training, so this way takes less time.

A front is judged by the volume it dominates, in shares of the box between a reference fixed beforehand (the accuracy of
guessing, and 1.05 times the bytes and 1.5 times the latency of the largest network in float32) and the best thinkable.
Two seeds run at a time, on one thread each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

import compress
import nasbench as nb
from nasbench.benchmarks.common import in_processes, record
from nasbench.benchmarks.policy_search_cifar10 import OBJECTIVES, measured, volume
from nasbench.benchmarks.small_runs import spread
from nasbench.objective import TrialRun
from nasbench.pareto import front
from nasbench.style import SERIES, look, new_figure, save_figure
from search_spaces import ResNet

WAYS = ("joint", "random", "two stages")
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 4, "batch_size": 64},
    "images": {"epochs": 5, "batch_size": 64},
}


def main() -> None:
    """Search in all ways with every seed, record and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="cifar10.npz")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--population", type=int, default=5, help="of LINAS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        kind, seed, file = options.child
        Path(file).write_text(json.dumps(run(options, kind, int(seed))))
        return
    kinds = ["digits", *(["images"] if options.data else [])]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for (kind, _), found in in_processes(__file__, [(k, str(s)) for k in kinds for s in range(options.seeds)]):
        runs[kind].append(found)
    figures: dict[str, Any] = {}
    for kind, found in runs.items():
        found.sort(key=lambda one: int(one["seed"]))
        volumes = {way: [one["hypervolume"][way] for one in found] for way in WAYS}
        figures[kind] = {
            "hypervolume": {way: spread(values) for way, values in volumes.items()},
            "joint minus two stages": spread(
                [a - b for a, b in zip(volumes["joint"], volumes["two stages"], strict=True)]
            ),
            "joint minus random": spread([a - b for a, b in zip(volumes["joint"], volumes["random"], strict=True)]),
            "seconds": {way: spread([one["seconds"][way] for one in found]) for way in WAYS},
            "runs": found,
        }
    conditions = {"images": options.images, "trials": options.trials, "population": options.population}
    record(__file__, figures, seeds=range(options.seeds), threads_of_a_process=1, settings=SETTINGS, **conditions)
    plot(runs)


def run(options: Any, kind: str, seed: int) -> dict[str, Any]:
    """Search in all ways with one seed."""
    digits = kind == "digits"
    data = nb.data.load("digits") if digits else nb.data.load(options.data, train_images=options.images)
    space = ResNet(depths=(1, 2), widths=(4, 8, 16)).bind(data)
    joint = space * compress.bits(4, 8, 32)
    recipe = SETTINGS[kind]
    largest = space.check({name: max(choices) for name, choices in space.choices.items()})  # type: ignore[type-var]
    torch.manual_seed(seed)
    policies = compress.PolicySpace(space.build(largest), bits=(32,))
    objective = policies.objective(data, seed=seed, device="cpu")
    objective.want(OBJECTIVES)
    whole = objective(policies.sample(Random(0)), TrialRun())
    reference = {
        "val_accuracy": 1 / data.classes,
        "bytes": 1.05 * whole["bytes"],
        "latency_ms": 1.5 * whole["latency_ms"],
    }
    found: dict[str, Any] = {"seed": seed, "reference": reference, "hypervolume": {}, "seconds": {}, "points": {}}
    common: dict[str, Any] = {"seed": seed, "device": "cpu", "progress": False}
    linas = {"population": options.population, "objectives": OBJECTIVES}
    for way in WAYS:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            common["folder"] = folder
            if way == "joint":
                result = nb.search(joint, data, "linas", trials=options.trials, **linas, **recipe, **common)
            elif way == "random":
                result = nb.search(
                    joint, data, "random", trials=options.trials, objectives=OBJECTIVES, **recipe, **common
                )
            else:
                half = options.trials // 2
                first = nb.search(
                    space, data, "evolution", trials=half, population=half // 2, sample=2, **recipe, **common
                )
                bits = compress.PolicySpace(first.best.build(), bits=(4, 8, 32))
                result = nb.search(bits, data, "linas", trials=options.trials - half, **linas, **common)
        points = [measured(trial.metrics) for trial in result.complete]
        found["points"][way] = points
        found["hypervolume"][way] = volume(points, reference)
        found["seconds"][way] = round(time.perf_counter() - started, 1)
    return found


@look()
def plot(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the fronts of accuracy and bytes of all seeds."""
    figure = new_figure(3.8 * len(runs), 3.4, layout="constrained")
    for axes, (kind, found) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        for way, colour in zip(WAYS, SERIES, strict=False):
            for number, one in enumerate(found):
                points = one["points"][way]
                best = front([(p["val_accuracy"], -p["bytes"]) for p in points])
                ordered = sorted((points[i]["bytes"] / 1e3, points[i]["val_accuracy"]) for i in best)
                label = way if number == 0 else None
                axes.step(*zip(*ordered, strict=True), where="post", color=colour, lw=1.3, label=label)
                axes.scatter(*zip(*ordered, strict=True), s=8, color=colour)
        axes.set(xlabel="kilobytes of the deployed file", title="digits" if kind == "digits" else "CIFAR-10")
        axes.set_xscale("log")
        axes.set_xticks([10, 15, 20, 30, 40, 60])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.0%}")
    first = figure.axes[0]
    first.set_ylabel("validation accuracy")
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save_figure(figure, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
