"""DenseShift on CIFAR-10 images: weights that are powers of two, against float weights, from scratch and transferred.

    python -m nasbench.benchmarks.dense_shift_cifar10 cifar10.npz [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. The network is a ResNet of three blocks. From scratch, all
variants train in the same way for as many epochs, DenseShift from both of its random starts. Transferred ones start
from a float network trained for that long, whose weights are converted and trained as long again; float networks are
trained on as long, too. The baseline is one float weight that is rounded to the nearest power of two, with gradients
passed straight through. The plot shows which share of the weights changed code, and sign, during each epoch. Two
processes run at a time, on one thread each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import compress
import nasbench as nb
from nasbench.benchmarks import small_runs
from nasbench.style import MUTED, SERIES, look, new_figure, save_figure

BITS = (2, 3, 4)
LINES = (("shift, low_variance", "-", "DenseShift"), ("rounded, scratch", (0, (3, 2)), "rounded"))


def main() -> None:
    """Train every variant with every seed, record and plot."""
    parser = small_runs.arguments(__doc__, images=2000, epochs=8)
    parser.add_argument("--width", type=int, default=8, help="of the first block")
    options = parser.parse_args()
    if small_runs.did_child(options, train):
        return
    names = ["float:scratch:0", "float:transfer:0"]
    names += [f"shift:{start}:{bits}" for start in ("scratch", "low_variance", "transfer") for bits in BITS]
    names += [f"rounded:scratch:{bits}" for bits in BITS]
    runs = small_runs.run_all(__file__, names, options.seeds)
    figures: dict[str, Any] = {}
    for name in names:
        kind, start, bits = name.split(":")
        against = None if kind == "float" else runs[f"float:{'transfer' if start == 'transfer' else 'scratch'}:0"]
        title = f"{kind}, {start}" + (f", {bits} bits" if kind != "float" else "")
        figures[title] = small_runs.summary(runs[name], against)
    small_runs.record_runs(__file__, figures, options)
    plot(figures)


def train(options: Any, name: str, seed: int) -> dict[str, Any]:
    """Train one network and test it."""
    kind, start, bits = name.split(":")
    data = nb.data.load(options.data, train_images=options.images)
    model = small_runs.resnet8(options.width, data, seed)
    if start == "transfer":
        small_runs.train(model, data, seed, options)
    if kind == "float":
        return small_runs.train(model, data, seed + 100, options)
    if kind == "shift":
        init = "convert" if start == "transfer" else start
        model = compress.dense_shift(model, int(bits), init=init, seed=seed)
    else:
        round_weights(model, int(bits))
    watch = Watch()
    found = small_runs.train(model, data, seed + 100, options, [watch])
    return found | {"codes_changed": watch.codes, "signs_changed": watch.signs}


class Watch(nb.Callback):
    """Notes after every epoch which share of the weights has another code, and another sign, than after the last."""

    def __init__(self) -> None:
        self.codes: list[float] = []
        self.signs: list[float] = []

    def on_start(self, run: nb.Run) -> None:
        self._last = self._snapshot(run.model)

    def on_epoch(self, run: nb.Run) -> None:
        now = self._snapshot(run.model)
        before, after = (torch.cat([w.flatten() for w in some.values()]) for some in (self._last, now))
        self.codes.append(round(float((before != after).float().mean()), 5))
        self.signs.append(round(float((before.sign() != after.sign()).float().mean()), 5))
        self._last = now

    def _snapshot(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: module.weight.detach().clone()
            for name, module in model.named_modules()
            if parametrize.is_parametrized(module, "weight")
        }


class Rounded(nn.Module):
    """One float weight, rounded to a sign and a power of two; the gradient passes straight through.

    The scale of a layer is a power of two as well, so that its values begin within the range.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.top = int(weight.detach().abs().max().log2().round())
        self.least = self.top - (2 ** (bits - 1) - 1)

    def forward(self, weight: Tensor) -> Tensor:
        exponent = weight.detach().abs().clamp_min(1e-30).log2().round().clamp(self.least, self.top)
        rounded = torch.where(weight.detach() < 0, -1.0, 1.0) * torch.exp2(exponent)
        return weight + (rounded - weight).detach()


def round_weights(model: nn.Module, bits: int) -> None:
    """Round the weights of the layers that DenseShift would replace."""
    twin = compress.dense_shift(model, bits)
    for name, module in twin.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            own = model.get_submodule(name)
            parametrize.register_parametrization(own, "weight", Rounded(own.get_parameter("weight"), bits))


@look()
def plot(figures: dict[str, Any]) -> None:
    """Draw which shares of codes and of signs change in an epoch, by epoch."""
    figure = new_figure(7.6, 3.2, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, title in ((left, "codes_changed", "codes"), (right, "signs_changed", "signs")):
        for bits, colour in zip(BITS, SERIES, strict=False):
            for kind, style, label in LINES:
                runs = figures[f"{kind}, {bits} bits"]["runs"]
                curve = [sum(values) / len(runs) for values in zip(*(run[key] for run in runs), strict=True)]
                epochs = range(1, len(curve) + 1)
                axes.plot(epochs, curve, color=colour, ls=style, label=f"{label}, {bits} bits")
        axes.set(xlabel="epoch", title=title)
        axes.set_yscale("log")
    left.set_ylabel("share that changes in an epoch")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    right.annotate("means of the seeds", (1, 1.02), xycoords="axes fraction", ha="right", fontsize=8, color=MUTED)
    save_figure(figure, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
