"""One-shot strategies: one supernet is trained, and architectures are read from it with the weights they share in it.

A `Differentiable` strategy also learns architecture weights, on a half of the training images that the weights do not
see, and decodes one architecture. `SinglePath` trains uniformly drawn paths and leaves the choice to evolution.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nasbench.errors import SettingError, SpaceExhausted
from nasbench.recipe import Recipe, is_number
from nasbench.strategies.base import History, Strategy
from nasbench.strategies.evolution import TopEvolution
from nasbench.strategies.relaxation import TRUE_OR_FALSE, Dirichlet, Gumbel, Relaxation, Softmax, check_settings
from search_spaces.base import Arch, Choices, Mixture, SearchSpace, Supernet, nearest
from search_spaces.relaxed import FORMS
from search_spaces.sparse_operations import sparse_layers

SKIPS = {"skip_connect", "identity"}
"""What options that are skip connections are called."""


def _nothing(supernet: Supernet) -> None:
    """What is to be done of most supernets."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a supernet's training, with an optimizer of its own.

    Attributes:
        recipe: how the parameters that ask for gradients are trained, for as many epochs.
        name: what is trained.
        enter: prepares the supernet, before the optimizer is made.
        after_step: called after each of the optimizer's steps.
        architecture: whether the architecture weights learn.
    """

    recipe: Recipe
    name: str = "train"
    enter: Callable[[Supernet], object] = _nothing
    after_step: Callable[[Supernet], object] = _nothing
    architecture: bool = True


class OneShot(ABC):
    """How a supernet is trained and how architectures are then chosen: a frozen dataclass of settings.

    Example:
        >>> from nasbench.strategies import ONE_SHOT
        >>> strategy = ONE_SHOT["gdas"].replace(tau=5.0)
        >>> strategy.name, strategy.relaxation, strategy.recipe.epochs
        ('gdas', Gumbel(tau=5.0, tau_end=0.1, add_others=False), 250)
    """

    name: str
    recipe: Recipe
    """How the supernet's weights are trained, unless the search says otherwise."""
    trials: int
    """Architectures that a search evaluates with shared weights, unless it says otherwise."""
    many_objectives: ClassVar[bool] = False
    """Whether the choice can be judged by several objectives at once."""

    @abstractmethod
    def sites(self, space: SearchSpace) -> Choices:
        """Return the sites that have architecture weights; none if paths are drawn uniformly.

        Raises:
            SettingError: the space lacks sites that the strategy learns weights for.
        """

    def check(self, supernet: Supernet) -> None:
        """Raise `SettingError` if this is no supernet for the strategy."""
        if sparse_layers(supernet):
            raise SettingError(
                f"strategy {self.name!r} would train the sparse operations of {supernet.space!r} densely. Use "
                'strategy="dass", which learns what to prune, or ops="dense".'
            )

    def phases(self, recipe: Recipe) -> tuple[Phase, ...]:
        """Return the phases of training, whose epochs are those of the recipe in all: mostly it is one."""
        return (Phase(recipe),)

    @abstractmethod
    def supernet(self) -> dict[str, Any]:
        """Return the settings for ``space.supernet(...)``, as far as they are not its defaults."""

    @abstractmethod
    def mix(self, space: SearchSpace, logits: Mapping[str, Tensor], progress: float, rng: torch.Generator) -> Mixture:
        """Return the mixture of one forward; see `Relaxation.mix`."""

    def candidates(self, space: SearchSpace, standing: Arch | None, rng: Random) -> list[Arch]:
        """Return the architectures to score after an epoch: the best of them is what the search would choose now.

        Args:
            space: what the architectures are of.
            standing: what the architecture weights decode to now; where there are none, the best of the epoch before.
            rng: decides the draws.
        """
        return []

    @abstractmethod
    def proposer(self, decode: Callable[[], Arch]) -> Strategy:
        """Return what proposes architectures once the supernet is trained; `decode` gives the one it has learned."""

    def settings(self) -> dict[str, Any]:
        """Return the JSON-able settings a study is checked against; the recipe is the objective's."""
        found = dataclasses.asdict(self)  # type: ignore[call-overload]
        for name in ("name", "recipe", "trials"):
            del found[name]
        if relaxation := getattr(self, "relaxation", None):
            found["relaxation"]["kind"] = type(relaxation).__qualname__
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def replace(self, **changes: Any) -> Self:
        """Return the strategy with some settings changed, those of its relaxation included; the recipe is the search's.

        Raises:
            SettingError: no such setting, or a bad value.
        """
        own = settings_of(self)
        if unknown := sorted(changes.keys() - own):
            raise SettingError(f"strategy {self.name!r} has no setting {unknown[0]!r}; {nearest(unknown[0], own)}")
        relaxation = getattr(self, "relaxation", None)
        if relaxation is not None:
            inner = {f.name for f in dataclasses.fields(relaxation)}
            if mine := {name: changes.pop(name) for name in list(changes) if name in inner}:
                changes["relaxation"] = dataclasses.replace(relaxation, **mine)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class Differentiable(OneShot):
    """Learn weights and architecture weights in turns, then keep the options that weigh most.

    Each step takes a batch of each half of the training images: first the architecture weights move along the gradient
    of the loss on the one (Adam), then the network's weights on the other.

    Args:
        name: the strategy's name.
        relaxation: how architecture weights become a mixture.
        recipe: how weights are trained.
        second_order: differentiate through the next weight step; `Softmax` alone.
        hessian: of second order, "finite" (difference, as published) or "exact" (differentiating twice).
        arch_lr: learning rate of Adam, whose betas are 0.5 and 0.999.
        arch_weight_decay: of Adam.
        arch_start: share of the epochs in which only the weights learn.
        partial_channels: send one in so many channels through the mixtures and pass the others by; 1 sends all.
        edge_weights: learn a weight for each incoming edge of a node too.
        stop_skips: once an architecture had fewer skip connections than this (in its normal cell, where a space has
            one), stop when one has as many, and choose the last that had fewer; or None. The weights are those of the
            last epoch all the same.
        stop_eigenvalue: stop when the largest eigenvalue of the validation loss's Hessian in the architecture weights
            has grown by a third within five epochs, and choose the architecture of five epochs before. Not for
            relaxations that draw at random.
        form: "fast", or "textbook": one operation after the other.
        recompute: keep no activations inside of cells or blocks, but compute them again in the backward pass.
        anytime: after every epoch, score the architecture that is decoded, with the weights it shares. It costs a
            forward pass of its network over the validation images, and one over up to 2,048 training images.

    Raises:
        SettingError: a value out of range, or second order with random draws.

    Source: DARTS+ (Liang et al. 2019, arXiv:1909.06035) for `stop_skips`; Zela et al., ICLR 2020, arXiv:1909.09656, for
    `stop_eigenvalue`; `Relaxation` names those of the methods.
    """

    name: str
    relaxation: Relaxation
    recipe: Recipe
    second_order: bool = False
    hessian: str = "finite"
    arch_lr: float = 3e-4
    arch_weight_decay: float = 1e-3
    arch_start: float = 0.0
    partial_channels: int = 1
    edge_weights: bool = False
    stop_skips: int | None = None
    stop_eigenvalue: bool = False
    form: str = "fast"
    recompute: bool = False
    anytime: bool = True
    trials: int = field(default=1, init=False)
    many_objectives = True

    def __post_init__(self) -> None:
        check_settings(
            f"strategy {self.name!r}",
            self,
            hessian=(lambda v: v in ("finite", "exact"), '"finite" or "exact"'),
            form=(lambda v: v in FORMS, " or ".join(f'"{form}"' for form in FORMS)),
            arch_lr=(lambda v: is_number(v) and v > 0, "a number above 0"),
            arch_weight_decay=(lambda v: is_number(v) and v >= 0, "a number, 0 or more"),
            arch_start=(lambda v: is_number(v) and 0 <= v < 1, "a share of the epochs, 0 or more and below 1"),
            partial_channels=(lambda v: type(v) is int and v >= 1, "a whole number, 1 or more"),
            stop_skips=(lambda v: v is None or (type(v) is int and v >= 1), "a whole number, 1 or more, or None"),
            **dict.fromkeys(("second_order", "edge_weights", "stop_eigenvalue", "recompute", "anytime"), TRUE_OR_FALSE),
        )
        if self.stop_eigenvalue and self.relaxation.sampled:
            raise SettingError(
                f"strategy {self.name!r} draws its mixtures at random: the eigenvalue would be that of one draw. Leave "
                "stop_eigenvalue out, or use strategy='darts'."
            )
        if self.second_order and self.relaxation.sampled:
            raise SettingError(
                f"strategy {self.name!r} draws its mixtures at random: a step ahead would be that of another draw. "
                'Leave second_order out, or use strategy="darts".'
            )
        if self.hessian == "exact" and not self.second_order:
            raise SettingError('hessian="exact" is about the second order: add second_order=True.')

    def sites(self, space: SearchSpace) -> Choices:
        if self.edge_weights and not space.edge_sites:
            raise SettingError(
                f"strategy {self.name!r} learns a weight for every edge, but {type(space).__name__} has no edge sites. "
                "Use a space of cells such as DARTS, another strategy, or edge_weights=False."
            )
        if self.stop_skips is not None and not any(SKIPS & {*options} for options in space.choices.values()):
            raise SettingError(
                f"strategy {self.name!r} counts skip connections for stop_skips={self.stop_skips}, but "
                f"{type(space).__name__} has none among its options. Leave stop_skips out."
            )
        return {**space.sites, **(space.edge_sites if self.edge_weights else {})}

    @property
    def arch_decay(self) -> float:
        """The weight decay of Adam: none where the relaxation has a penalty of its own."""
        return 0.0 if getattr(self.relaxation, "kl", 0) else self.arch_weight_decay

    def supernet(self) -> dict[str, Any]:
        found: dict[str, Any] = {"form": self.form} if self.form != "fast" else {}
        if self.recompute:
            found["recompute"] = True
        if self.partial_channels > 1:
            found["partial_channels"] = self.partial_channels
        return found

    def mix(self, space: SearchSpace, logits: Mapping[str, Tensor], progress: float, rng: torch.Generator) -> Mixture:
        return self.relaxation.mix(logits, progress, rng)

    def candidates(self, space: SearchSpace, standing: Arch | None, rng: Random) -> list[Arch]:
        return [standing] if self.anytime and standing is not None else []

    def proposer(self, decode: Callable[[], Arch]) -> Strategy:
        return Decoded(decode)


@dataclass(frozen=True)
class SinglePath(OneShot):
    """Train one uniformly drawn path at each step, then let evolution search with the shared weights.

    All training images train the weights; candidates are scored on the validation images.

    Args:
        name: the strategy's name.
        recipe: how weights are trained.
        population, parents, mutation: of the evolution that follows; see `TopEvolution`.
        recompute: keep no activations inside of cells or blocks, but compute them again in the backward pass.
        anytime: after every epoch, how many newcomers meet the best architecture of the epoch before: half of them its
            mutations by one decision, half drawn uniformly, in the first epoch all. The best of them is recorded, and
            the evolution afterwards knows nothing of it. Each of the 1 + `anytime` costs a forward pass over the
            validation images, and one over up to 2,048 training images. 0: none.

    Source: Guo et al., Single Path One-Shot Neural Architecture Search with Uniform Sampling, ECCV 2020,
    arXiv:1904.00420.
    """

    name: str
    recipe: Recipe
    population: int = 50
    parents: int = 10
    mutation: float = 0.1
    recompute: bool = False
    anytime: int = 4
    trials: int = field(default=1000, init=False)

    def __post_init__(self) -> None:
        check_settings(
            f"strategy {self.name!r}",
            self,
            recompute=TRUE_OR_FALSE,
            anytime=(lambda v: type(v) is int and v >= 0, "a number of newcomers, a whole number, 0 or more"),
        )
        TopEvolution(self.population, self.parents, self.mutation)  # says what is wrong with them

    def sites(self, space: SearchSpace) -> Choices:
        return {}

    def supernet(self) -> dict[str, Any]:
        return {"recompute": True} if self.recompute else {}

    def mix(self, space: SearchSpace, logits: Mapping[str, Tensor], progress: float, rng: torch.Generator) -> Mixture:
        return space.one_hot(space.sample(Random(int(torch.randint(2**62, (), generator=rng)))))

    def candidates(self, space: SearchSpace, standing: Arch | None, rng: Random) -> list[Arch]:
        if not self.anytime:
            return []
        found = [] if standing is None else [standing]
        for i in range(self.anytime):
            mutate = standing is not None and space.size > 1 and not i % 2
            for _ in range(50):  # none is scored twice, unless the space is too small
                newcomer = space.mutate(found[0], rng) if mutate else space.sample(rng)
                if newcomer not in found:
                    found.append(newcomer)
                    break
        return found

    def proposer(self, decode: Callable[[], Arch]) -> Strategy:
        return TopEvolution(self.population, self.parents, self.mutation)


@dataclass(frozen=True)
class Decoded(Strategy):
    """Propose the one architecture that a supernet has learned, once."""

    decode: Callable[[], Arch]
    many_objectives = True

    def propose(self, space: SearchSpace, history: History, rng: Random) -> Arch:
        arch = self.decode()
        if arch in history.tried:
            raise SpaceExhausted("the supernet has decoded one architecture, and it was tried")
        return arch


def settings_of(strategy: OneShot) -> set[str]:
    """Return the names of the settings that `OneShot.replace` takes, `recipe` left out."""
    own = {f.name for f in dataclasses.fields(strategy) if f.init}  # type: ignore[arg-type]
    relaxation = getattr(strategy, "relaxation", None)
    if relaxation is not None:
        own |= {f.name for f in dataclasses.fields(relaxation)}
    return own - {"name", "relaxation", "recipe"}


_RECIPE = Recipe(
    epochs=50, batch_size=64, lr=0.025, lr_end=0.001, nesterov=False, weight_decay=3e-4, clip=5.0, amp=False
)
_LONG = _RECIPE.replace(epochs=250)

METHODS: dict[str, OneShot] = {
    "darts": Differentiable("darts", Softmax(), _RECIPE),
    "gdas": Differentiable("gdas", Gumbel(), _LONG.replace(batch_size=256, nesterov=True, weight_decay=5e-4)),
    "drnas": Differentiable("drnas", Dirichlet(), _RECIPE.replace(lr=0.1, lr_end=0.0), arch_lr=6e-4, arch_start=0.4),
    "pcdarts": Differentiable(
        "pcdarts",
        Softmax(),
        _RECIPE.replace(batch_size=256, lr=0.1, lr_end=0.0),
        arch_lr=6e-4,
        arch_start=0.3,
        partial_channels=4,
        edge_weights=True,
    ),
    "spos": SinglePath("spos", _LONG),
}
"""Those of this module by name; `nasbench.strategies.ONE_SHOT` has all."""
