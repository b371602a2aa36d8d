"""Searching bits layer by layer on CIFAR-10 images: LINAS and NSGA-II against random policies and uniform bits.

    python -m nasbench.benchmarks.policy_search_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. A ResNet is trained once per seed. Every strategy then measures
equally many policies, each deployed for real: validation accuracy of the onnxruntime session, bytes of its file, and
its median latency on one image. Fronts are compared by the volume they dominate, in shares of the box between the
reference point, fixed before anything is searched (accuracy of guessing, 1.05 times the bytes and 1.5 times the latency
of float32), and the best thinkable (all images right, no bytes, no time). Two seeds run at a time, one thread each.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.pareto import front, hypervolume
from nasbench.style import MUTED, SERIES, look, new_figure, save_figure

STRATEGIES = ("linas", "nsga2", "random")
OBJECTIVES = ("val_accuracy", "bytes", "latency_ms")


def main() -> None:
    """Search with every strategy and seed, record and plot."""
    parser = small_runs.arguments(__doc__, images=3000, epochs=8)
    parser.add_argument("--width", type=int, default=16, help="of the first block")
    parser.add_argument("--measurements", type=int, default=60, help="policies that a strategy may measure")
    parser.add_argument("--population", type=int, default=15)
    options = parser.parse_args()
    if small_runs.did_child(options, run):
        return
    runs = small_runs.run_all(__file__, ["all"], options.seeds)["all"]
    figures: dict[str, Any] = {
        "hypervolume": {name: small_runs.spread([one["hypervolume"][name] for one in runs]) for name in ROWS},
        "linas minus nsga2": small_runs.spread(
            [one["hypervolume"]["linas"] - one["hypervolume"]["nsga2"] for one in runs]
        ),
        "runs": runs,
    }
    small_runs.record_runs(__file__, figures, options)
    plot(runs)


ROWS = (*STRATEGIES, "uniform")


def run(options: Any, _: str, seed: int) -> dict[str, Any]:
    """Train a network, search its bits with every strategy, and test what stands out once."""
    data = nb.data.load(options.data, train_images=options.images)
    model = small_runs.resnet8(options.width, data, seed)
    nb.fit(model, data, epochs=options.epochs, batch_size=options.batch, seed=seed, device="cpu", progress=False)
    space = compress.PolicySpace(model, bits=(3, 4, 8, 32))
    objective = space.objective(data, seed=seed, device="cpu")
    objective.want(OBJECTIVES)
    uniform = {option: measured(objective(arch, nb.objective.TrialRun())) for option, arch in space.uniform().items()}
    whole = uniform["float32"]
    reference = {
        "val_accuracy": 1 / data.classes,
        "bytes": 1.05 * whole["bytes"],
        "latency_ms": 1.5 * whole["latency_ms"],
    }
    found: dict[str, Any] = {"uniform": uniform, "reference": reference, "hypervolume": {}, "points": {}, "seconds": {}}
    for name in STRATEGIES:
        started = time.perf_counter()
        settings = {"linas": {"population": options.population}, "nsga2": {"population_size": options.population}}
        with tempfile.TemporaryDirectory() as folder:
            result = nb.search(
                *(space, data, name),
                objectives=OBJECTIVES,
                trials=options.measurements,
                folder=folder,
                seed=seed,
                device="cpu",
                progress=False,
                **settings.get(name, {}),
            )
            points = [measured(trial.metrics) for trial in result.complete]
        found["points"][name] = points
        found["hypervolume"][name] = volume(points, reference)
        found["seconds"][name] = round(time.perf_counter() - started, 1)
    found["hypervolume"]["uniform"] = volume(list(uniform.values()), reference)
    return found


def measured(metrics: Any) -> dict[str, float]:
    """Return the objectives of one policy."""
    return {name: round(float(metrics[name]), 5) for name in OBJECTIVES}


def volume(points: list[dict[str, float]], reference: dict[str, float]) -> float:
    """Return the share of the box that the points dominate."""
    ideal = {"val_accuracy": 1.0, "bytes": 0.0, "latency_ms": 0.0}
    scores = [[(one[n] - reference[n]) / (ideal[n] - reference[n]) for n in OBJECTIVES] for one in points]
    return round(hypervolume(scores, [0.0] * len(OBJECTIVES)), 5)


@look()
def plot(runs: list[dict[str, Any]]) -> None:
    """Draw the first seed's policies: accuracy against bytes, and against latency."""
    figure = new_figure(7.6, 3.4, layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, key, unit in ((both[0], "bytes", 1e3), (both[1], "latency_ms", 1.0)):
        for name, colour in zip(STRATEGIES, SERIES, strict=False):
            points = runs[0]["points"][name]
            best = front([(one["val_accuracy"], -one[key]) for one in points])
            ordered = sorted((points[i][key] / unit, points[i]["val_accuracy"]) for i in best)
            axes.scatter(
                [one[key] / unit for one in points],
                [one["val_accuracy"] for one in points],
                s=6,
                color=colour,
                alpha=0.3,
            )
            axes.step(*zip(*ordered, strict=True), where="post", color=colour, label=name, lw=1.5)
        for option, one in runs[0]["uniform"].items():
            axes.scatter([one[key] / unit], [one["val_accuracy"]], marker="x", s=28, color="black", zorder=3)
            axes.annotate(
                option, (one[key] / unit, one["val_accuracy"]), (4, -9), textcoords="offset points", fontsize=7
            )
        axes.set_xlabel("kilobytes of the file" if key == "bytes" else "milliseconds an image")
    both[0].set_ylabel("validation accuracy")
    both[0].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    both[1].annotate(
        "crosses: all layers alike", (1, 1.02), xycoords="axes fraction", ha="right", fontsize=8, color=MUTED
    )
    save_figure(figure, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
