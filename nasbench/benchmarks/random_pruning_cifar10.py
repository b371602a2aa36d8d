"""Random pruning before training on CIFAR-10 images: ResNets of growing width at 50 to 95 % sparsity, against dense.

    python -m nasbench.benchmarks.random_pruning_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. Every network is a ResNet of three blocks; its mask is drawn once,
by ERK or uniformly, and never changes. All are trained in the same way on training and validation images and tested
once; besides accuracy, their calibration, their accuracy under FGSM attack and how well they tell noise from images.
The plot shows what sparsity costs, by width. Sizes are those that two processor cores can do in half an hour, far below
the published ones. Two processes run at a time, on one thread each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.robustness import robustness
from nasbench.style import MUTED, SERIES, look, new_figure, save_figure

DENSITIES = (0.5, 0.2, 0.1, 0.05)
BOTH = (0.1, 0.05)  # densities at which uniform pruning is tried too


def main() -> None:
    """Train every variant with every seed, record and plot."""
    parser = small_runs.arguments(__doc__, images=5000, epochs=8)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16, 32], help="of the first block")
    options = parser.parse_args()
    if small_runs.did_child(options, train):
        return
    rules = ["dense", *(f"erk:{d}" for d in DENSITIES), *(f"uniform:{d}" for d in BOTH)]
    names = [f"{width}:{rule}" for width in reversed(options.widths) for rule in rules]
    runs = small_runs.run_all(__file__, names, options.seeds)
    figures: dict[str, Any] = {}
    for width in options.widths:
        dense = runs[f"{width}:dense"]
        figures[f"width {width}"] = {
            rule: small_runs.summary(runs[f"{width}:{rule}"], None if rule == "dense" else dense)
            | {key: small_runs.spread([run[key] for run in runs[f"{width}:{rule}"]]) for key in SIDE}
            for rule in rules
        }
    figures["erk above uniform"] = {
        f"width {width}, density {d}": small_runs.spread(
            [
                a["test_accuracy"] - b["test_accuracy"]
                for a, b in zip(runs[f"{width}:erk:{d}"], runs[f"{width}:uniform:{d}"], strict=True)
            ]
        )
        for width in options.widths
        for d in BOTH
    }
    small_runs.record_runs(__file__, figures, options)
    plot(figures, options.widths)


SIDE = ("ece", "nll", "ood_auroc", "fgsm_accuracy")


def train(options: Any, name: str, seed: int) -> dict[str, Any]:
    """Train one network and test it."""
    width, rule, density = (name + ":1").split(":")[:3]
    data = nb.data.load(options.data, train_images=options.images)
    model = small_runs.resnet8(int(width), data, seed)
    if rule != "dense":
        model = compress.prune(model, float(density), distribution=rule, seed=seed)
    found = small_runs.train(model, data, seed, options)
    side = robustness(model, data, split="test")
    return found | {key: round(side[key], 4) for key in SIDE}


@look()
def plot(figures: dict[str, Any], widths: list[int]) -> None:
    """Draw test accuracy against sparsity, and what each sparsity costs against dense by width."""
    figure = new_figure(7.6, 3.3, layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = {0.0: "dense"} | {1 - d: f"erk:{d}" for d in DENSITIES}
    for width, colour in zip(widths, SERIES, strict=False):
        points = [figures[f"width {width}"][rule]["test_accuracy"] for rule in shown.values()]
        left.errorbar(list(shown), *zip(*points, strict=True), color=colour, marker="o", ms=4, capsize=2, label=width)
    for density, colour in zip(DENSITIES, SERIES[len(widths) :], strict=False):
        points = [figures[f"width {width}"][f"erk:{density}"]["gain"] for width in widths]
        right.errorbar(
            *(widths, *zip(*points, strict=True)), color=colour, marker="o", ms=4, capsize=2, label=f"{1 - density:.0%}"
        )
    left.set(xlabel="sparsity (ERK, random masks)", ylabel="test accuracy")
    left.legend(title="width of the first block", ncols=2)
    right.axhline(0, color=MUTED, lw=1)
    right.set(xlabel="width of the first block", ylabel="test accuracy, minus that of dense", xscale="log")
    right.set_xticks(widths, widths, minor=False)
    right.minorticks_off()
    right.legend(title="sparsity", ncols=2)
    for axes in (left, right):
        axes.yaxis.set_major_formatter(lambda share, _: f"{round(100 * share, 1):g}%")
    left.set_title("mean ± standard deviation of the seeds", loc="left", fontsize=8, color=MUTED)
    save_figure(figure, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
