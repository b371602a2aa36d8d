"""DASS: search and prune at once, and the training of a sparse network alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

from nasbench import training
from nasbench.data import Data
from nasbench.errors import SettingError
from nasbench.recipe import Recipe, is_number
from nasbench.strategies.one_shot import Differentiable, Phase
from nasbench.strategies.relaxation import TRUE_OR_FALSE, Softmax, check_settings
from search_spaces.base import ArchError, Supernet
from search_spaces.sparse_operations import (
    BUDGETS,
    fix_masks,
    kept,
    learn_scores,
    share_out,
    sparse_layers,
    sparsified,
)

RECIPE = Recipe(batch_size=128, nesterov=False, weight_decay=3e-4)
"""How `train_sparse` trains."""
PHASES = ("pretrain", "prune", "fine-tune")
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class DASS(Differentiable):
    """Search among sparse networks: train a dense supernet, learn scores that say what to prune, and train the rest.

    First weights and architecture weights learn in turns, as in DARTS. Then the scores learn alone, and with them the
    masks; weights and architecture weights stay as they are. Then, with the masks fixed, weights and architecture
    weights learn again. Each phase has its own optimizer and its own cosine from its learning rate to `lr_end`.

    Args:
        density: the share of weights that is kept of every sparse layer; or by the layer's name in the supernet, as
            ``compress.density.densities(space.bind(data).supernet(), 0.1)`` has them, and layers not named stay dense.
        budget: "layer", or "global": the density is that of all sparse layers together, and scores share it out.
        spare_depthwise: leave depthwise convolutions dense.
        shares: how the epochs are shared out to the three phases, each of which has one at least.
        prune_lr: learning rate of the scores.

    Raises:
        SettingError: a value out of range, or a way to end the search early.

    Source: Mousavi et al., DASS: Differentiable Architecture Search for Sparse Neural Networks, ACM TECS 2023. Their
    code has second order on, and one cosine over 100 epochs in each phase, so that of the scores ends halfway. It keeps
    the pruned weights under the mask, where ours are zero: the networks compute the same.
    """

    density: float | Mapping[str, float] = 0.1
    budget: str = "layer"
    spare_depthwise: bool = False
    shares: Sequence[float] = (100, 50, 100)
    prune_lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "density", _exact(self.density))
        if isinstance(self.shares, list):
            object.__setattr__(self, "shares", tuple(self.shares))
        check_settings(
            f"strategy {self.name!r}",
            self,
            density=(_is_density, "the share of weights that is kept, above 0 and at most 1, or one for each layer"),
            budget=(lambda v: v in BUDGETS, " or ".join(f'"{budget}"' for budget in BUDGETS)),
            spare_depthwise=TRUE_OR_FALSE,
            shares=(_are_shares, "three numbers above 0"),
            prune_lr=(lambda v: is_number(v) and v > 0, "a number above 0"),
            **dict.fromkeys(
                ("stop_skips", "stop_eigenvalue"),
                (lambda v: not v, "left out: a search that ends early prunes nothing"),
            ),
        )

    def check(self, supernet: Supernet) -> None:
        if not sparse_layers(supernet):
            space = type(supernet.space).__name__
            raise SettingError(
                f"strategy {self.name!r} prunes sparse operations, but the supernet of {space} has none. Use "
                'DARTS(ops="sparse"), or ops="both".'
            )
        try:
            kept(supernet, self.density, budget=self.budget, spare_depthwise=self.spare_depthwise)
        except ArchError as error:
            raise SettingError(f"strategy {self.name!r}: {error}") from None

    def phases(self, recipe: Recipe) -> tuple[Phase, ...]:
        first, last = _parts(recipe.epochs, self.shares)
        scores = recipe.replace(
            epochs=last - first, lr=self.prune_lr, lr_end=min(recipe.lr_end, self.prune_lr), warmup=0
        )
        how: dict[str, Any] = {"budget": self.budget, "spare_depthwise": self.spare_depthwise}
        prune = Phase(scores, PHASES[1], partial(learn_scores, density=self.density, **how), architecture=False)
        if self.budget == "global":
            share: Any = partial(share_out, density=self.density)  # type: ignore[arg-type]
            prune = dataclasses.replace(prune, after_step=share)
        return (
            Phase(recipe.replace(epochs=first), PHASES[0]),
            prune,
            Phase(recipe.replace(epochs=recipe.epochs - last, warmup=0), PHASES[2], fix_masks),
        )


def train_sparse(
    network: _Network,
    data: Data,
    density: float | Mapping[str, float],
    recipe: Recipe | None = None,
    *,
    epochs: Sequence[int] = (600, 20, 200),
    lr: Sequence[float] = (0.025, 0.1, 0.01),
    budget: str = "layer",
    spare_depthwise: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    **changes: Any,
) -> _Network:
    """Train a network to a density, in place, and return it with its masks: dense, then the scores, then the rest.

    Args:
        network: dense. Where it has sparse layers, these are pruned; else all its convolutions and linear layers are.
        density, budget, spare_depthwise: as in `learn_scores`.
        recipe: of all three trainings, but for `epochs` and `lr`; `changes` replace its fields.
        epochs, lr: of the three trainings.
        seed: of batches, augmentation, dropout and drop-path.
        device, progress: as in `nasbench.fit`.

    Raises:
        SettingError: a bad recipe or device, or a density that does not fit the network; it is as it was.
        TrainingDiverged: the loss or the gradient is no longer finite.

    Example:
        >>> from nasbench.data import load
        >>> data = load("digits", train_images=256)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> _ = train_sparse(network, data, 0.1, epochs=(2, 1, 1), device="cpu", progress=False)
        >>> [int((layer.weight != 0).sum()) for layer in (network[1], network[3])]
        [205, 32]

    Source: Sehwag et al., HYDRA, NeurIPS 2020, arXiv:2002.10509; the numbers are those of DASS for CIFAR-10.
    """
    recipe = (recipe or RECIPE).replace(**changes)
    if len(epochs) != 3 or len(lr) != 3:
        raise SettingError(f"train_sparse: epochs={epochs!r} and lr={lr!r}, but there are three trainings.")
    recipes = [
        recipe.replace(epochs=e, lr=rate, lr_end=min(recipe.lr_end, rate)) for e, rate in zip(epochs, lr, strict=True)
    ]
    density = _exact(density)
    how: dict[str, Any] = {"budget": budget, "spare_depthwise": spare_depthwise}
    try:
        kept(network if sparse_layers(network) else sparsified(copy.deepcopy(network)), density, **how)
    except ArchError as error:
        raise SettingError(f"train_sparse: {error}") from None
    if not sparse_layers(network):
        sparsified(network)
    fit = partial(training.fit, network, data, seed=seed, device=device, progress=progress)
    fit(recipe=recipes[0])
    learn_scores(network, density, **how)
    fit(recipe=recipes[1], callbacks=[_ShareOut(float(density))] if budget == "global" else [])  # type: ignore[arg-type]
    fix_masks(network)
    return fit(recipe=recipes[2])


class _ShareOut(training.Callback):
    def __init__(self, density: float) -> None:
        self.density = density

    def on_step(self, run: training.Run) -> None:
        share_out(run.model, self.density)


def _parts(epochs: int, shares: Sequence[float]) -> tuple[int, int]:
    """Return the epochs after which the second and the third phase begin."""
    if epochs < len(shares):
        raise SettingError(
            f"epochs={epochs}, but the search has {len(shares)} phases: give {len(shares)} epochs at least."
        )
    first = round(epochs * shares[0] / sum(shares))
    last = round(epochs * (shares[0] + shares[1]) / sum(shares))
    first = min(max(first, 1), epochs - 2)
    return first, min(max(last, first + 1), epochs - 1)


def _exact(density: Any) -> Any:
    """Return a density as JSON can hold it. Where a mapping has whole counts, as that of compress, these are kept."""
    if not isinstance(density, Mapping):
        return density
    if (counts := getattr(density, "counts", None)) is None:
        return dict(density)
    return {name: count / density.sizes[name] for name, count in counts.items()}  # type: ignore[attr-defined]


def _is_density(value: Any) -> bool:
    each = value.values() if isinstance(value, Mapping) else [value]
    return all(is_number(v) and 0 < v <= 1 for v in each)


def _are_shares(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == len(PHASES) and all(is_number(v) and v > 0 for v in value)


SEARCH = DASS(
    "dass",
    Softmax(),
    Recipe(
        epochs=250,
        batch_size=32,
        lr=0.025,
        lr_end=0.001,
        momentum=0.0,
        nesterov=False,
        weight_decay=1e-3,
        clip=5.0,
        amp=False,
    ),
)
"""With the numbers of the authors' code."""
