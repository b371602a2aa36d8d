"""How far the published finite difference of DARTS's second order is from the exact product, on the real supernet.

    python -m nasbench.benchmarks.second_order cifar10.npz [--cells 8] [--channels 16] [--batch 8]

`cifar10.npz` holds x_train, y_train. Both are the mixed second derivative of the training loss, applied to the gradient
of the validation loss, in double precision on real images: right after initialisation, and after some first-order
training. Distances are relative to the exact product; `exact_term_to_direct` is the size of the second-order term
relative to the rest of the gradient. What it does to a search is in `one_shot_nasbench201`.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.strategies import ONE_SHOT, bilevel
from nasbench.supernets import SupernetTraining
from search_spaces import DARTS
from search_spaces.base import Mixture


def main() -> None:
    """Measure before and after some training, for every seed, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=500, help="a fifth of them are not used")
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2, help="of first-order training in between")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = [measure(options, seed) for seed in range(options.seeds)]
    figures: dict[str, Any] = {}
    for moment in ("at_initialisation", "after_training"):
        names = runs[0][moment]
        figures[moment] = {name: round(mean(run[moment][name] for run in runs), 4) for name in names}
    figures["runs"] = runs
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "seeds")}
    record(__file__, figures, seeds=range(options.seeds), precision="float64", **settings)


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the distances of one seed, before and after training."""
    data = nb.data.load(options.data, train_images=options.images)
    strategy = ONE_SHOT["darts"].replace(arch_lr=0.01)
    recipe = strategy.recipe.replace(epochs=options.epochs, batch_size=options.batch, lr_end=0.025)
    space = DARTS(channels=options.channels, cells=options.cells).bind(data)
    training = SupernetTraining(space, data, strategy, recipe, seed=seed)
    entry = {"seed": seed, "at_initialisation": distances(training, options.batch)}
    training.run(progress=False)
    return entry | {"after_training": distances(training, options.batch)}


def distances(training: SupernetTraining, size: int) -> dict[str, float]:
    """Compare the two products at the present weights, in double precision."""
    supernet, held = training.supernet, training.held
    assert held is not None
    train, val = (next(iter(half.train_batches(size, seed=7, epoch=0))) for half in (training.data, held))
    rows = [row.detach().double().requires_grad_() for row in training.logits.values()]
    logits = dict(zip(training.logits, rows, strict=True))
    step = training.recipe.lr
    for group in training.optimizer.param_groups:
        group["lr"] = step
    supernet.double()
    for state in training.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    train, val = ((x.double(), y) for x, y in (train, val))

    def mix() -> Mixture:
        return training.strategy.mix(training.space, logits, 0.0, torch.Generator())

    _, ahead, v = bilevel.step_ahead(supernet, mix, rows, train, val, training.optimizer)
    exact, finite = (
        step * torch.cat(bilevel.mixed_derivative(supernet, mix, rows, train, v, exact=way)) for way in (True, False)
    )
    supernet.float()
    for state in training.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    direct = torch.cat(ahead)
    return {
        "finite_to_exact": float((finite - exact).norm() / exact.norm()),
        "cosine_of_terms": cosine(finite, exact),
        "exact_term_to_direct": float(exact.norm() / direct.norm()),
        "finite_term_to_direct": float(finite.norm() / direct.norm()),
        "cosine_of_gradients": cosine(direct - finite, direct - exact),
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(a @ b / (a.norm() * b.norm()))


if __name__ == "__main__":
    main()
