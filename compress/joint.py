"""Architecture and compression searched as one space: `space * compress.bits(4, 8)`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from compress.density import check_density
from compress.errors import CompressionError
from compress.iso_flop import KINDS as SPARSE_IFT
from compress.iso_flop import sparse_ift as larger
from compress.policy import FLOAT, apply_policy, options_of
from compress.pruning import prune
from compress.weights import weights
from nasbench.origin import mark
from nasbench.strategies import ONE_SHOT
from search_spaces.arch import nearest
from search_spaces.base import Arch, ArchError, Choices, Option, SearchSpace, Supernet

if TYPE_CHECKING:
    from compress.joint_objective import JointObjective
    from nasbench.data import Data
    from nasbench.recipe import Recipe

BITS, _DENSITY, _SPARSE_IFT = "bits.", "density", "sparse_ift"
_DRAWS = 4  # architectures whose parts are compared


@dataclass(frozen=True)
class Bits:
    """What a joint search may do to a network beside choosing it; made by `bits`. A space times this is a `JointSpace`.

    Attributes:
        bits, kinds: of each part of the network, as for `compress.PolicySpace`.
        density: shares of the weights that are kept, one for the whole network.
        sparse_ift: kinds of larger sparse layers, or None for layers as they are.
    """

    bits: tuple[int, ...] = (4, 8)
    kinds: tuple[str, ...] = ("int8", "weights")
    density: tuple[float, ...] = (1.0,)
    sparse_ift: tuple[str | None, ...] = (None,)

    def __post_init__(self) -> None:
        if "dense_shift" in self.kinds:
            raise CompressionError(
                "a joint search trains networks in floats, and powers of two need a training of their own: leave "
                "dense_shift out of kinds, and give it to a network that is found: compress.dense_shift, nasbench.fit."
            )
        options_of(self.bits, self.kinds)
        for name in ("density", "sparse_ift"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values or len({*values}) < len(values):
                raise CompressionError(f"{name} is a tuple of different values, one at least, got {values!r}.")
        for share in self.density:
            check_density(share, "density")
        for kind in self.sparse_ift:
            if kind is not None and kind not in SPARSE_IFT:
                raise CompressionError(f"there is no kind {kind!r} of Sparse-IFT; {nearest(kind, SPARSE_IFT)}")
        if self.sparse_ift != (None,) and min(self.density) == 1:
            raise CompressionError(
                f"sparse_ift={self.sparse_ift} makes layers larger by as much as their density makes them sparse, but "
                f"density={self.density} leaves all dense. Add one below 1, such as density=(1.0, 0.5)."
            )

    def __rmul__(self, space: object) -> JointSpace:
        return JointSpace(space, self) if isinstance(space, SearchSpace) else NotImplemented


def bits(
    *bits: int,
    kinds: tuple[str, ...] = ("int8", "weights"),
    density: tuple[float, ...] = (1.0,),
    sparse_ift: tuple[str | None, ...] = (None,),
) -> Bits:
    """Return what is to be searched together with a space's architectures: ``space * compress.bits(4, 8)``.

    Args:
        *bits: options for each part of the network: 2 to 8, and 32 for float.
        kinds: what may be done to a layer: "int8" or "weights"; see `compress.PolicySpace`.
        density: options for the share of weights that are kept: masks drawn at random before training, by the rule
            "erk" (`compress.prune`).
        sparse_ift: options of `compress.sparse_ift`, or None: at a density d below 1, layers that are larger by 1/d, at
            the multiply-adds of the dense network.

    Raises:
        CompressionError: a value is out of range or given twice, or a kind is unknown.

    Example:
        >>> from search_spaces import ResNet
        >>> space = ResNet(classes=10, in_channels=1) * bits(4, 8, density=(1.0, 0.5))
        >>> list(space.choices)[6:]
        ['bits.stem', 'bits.stage0', 'bits.stage1', 'bits.stage2', 'bits.head', 'density']
    """
    return Bits(bits, tuple(kinds), tuple(map(float, density)), tuple(sparse_ift))


@dataclass(frozen=True)
class JointSpace(SearchSpace):
    """Networks of a space, and what is done to make them small: one assignment for both.

    Its decisions are those of the space, "bits.PART" for every part of the network, and "density" and "sparse_ift"
    where these have more than one option. Parts are the children of the networks (`named_children`) that all
    architectures have and that hold weights, such as "stem", "stage1" and "head"; weights elsewhere stay float.

    `nasbench.search` trains every network that it tries in floats, with its masks; then it is quantized, deployed and
    measured. Networks of few bits do better after more epochs: ``nasbench.fit(trial.build(), data)`` trains through the
    rounding. With `one_shot`, one supernet is trained instead, and the networks are taken out of it.

    Args:
        space: of architectures. Its `classes` and `in_channels` are taken from the data where they were left out.
        policy: what is done to them.
        one_shot: None, or the name of the strategy that trains a supernet, "spos". Its networks are dense, and have the
            sizes and form that the supernet gives them.

    Raises:
        CompressionError: density or Sparse-IFT is searched with a supernet, no such strategy trains one, or the space
            has bits or sparse operations already.

    Example:
        >>> from random import Random
        >>> from search_spaces import ResNet
        >>> space = ResNet(classes=10, in_channels=1, widths=(4, 8)) * bits(4, 8)
        >>> arch = space.sample(Random(0))
        >>> arch["bits.head"] in ("weights4", "int8"), space.build(arch)(torch.zeros(2, 1, 8, 8)).shape
        (True, torch.Size([2, 10]))
    """

    space: SearchSpace
    policy: Bits
    one_shot: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.space, SearchSpace) or not isinstance(self.policy, Bits):
            raise CompressionError(
                f"a joint space is a space times bits, ResNet() * compress.bits(4, 8), got {self.space!r:.60} and "
                f"{self.policy!r:.60}."
            )
        if isinstance(self.space, JointSpace):
            raise CompressionError("the space has bits already; give all of them at once: compress.bits(4, 8, 32).")
        if getattr(self.space, "ops", "dense") != "dense":
            raise CompressionError(
                f'{self.space!r} has sparse operations, which would be trained densely: use ops="dense", and search '
                "the density: compress.bits(4, 8, density=(1.0, 0.5))."
            )
        if self.one_shot is None:
            return
        if self.one_shot not in ONE_SHOT or ONE_SHOT[self.one_shot].trials == 1:
            many = [name for name, strategy in ONE_SHOT.items() if strategy.trials > 1]
            raise CompressionError(
                f"{self.one_shot!r} trains no supernet of which all networks can be taken; "
                f"{nearest(self.one_shot, many)}"
            )
        if self.policy.density != (1.0,):
            raise CompressionError(
                f"density={self.policy.density}: the networks of a supernet are dense. Leave density out, or one_shot."
            )

    def bind(self, data: Data) -> Self:
        """Return the space with what its architectures leave ``None`` taken from the data.

        Raises:
            ArchError: the space was made for other data.
        """
        return dataclasses.replace(self, space=self.space.bind(data))

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The children of all networks that have bits of their own.

        Raises:
            ArchError: the space is not bound to data.
        """
        drawn = [self._parts_of(self.space.sample(Random(i))) for i in range(_DRAWS)]
        return tuple(name for name in drawn[0] if all(name in own for own in drawn) and any(own[name] for own in drawn))

    @cached_property
    def choices(self) -> Choices:
        options = options_of(self.policy.bits, self.policy.kinds)
        more: dict[str, tuple[Option, ...]] = {f"{BITS}{name}": options for name in self.parts}
        for name in (_DENSITY, _SPARSE_IFT):
            if len(own := getattr(self.policy, name)) > 1:
                more[name] = own
        if clash := self.space.choices.keys() & more.keys():
            raise ArchError(f"{type(self.space).__name__} has a decision {min(clash)!r} of its own: rename it.")
        return {**self.space.choices, **more}

    def is_valid(self, arch: Arch) -> bool:
        """Its architecture has to be valid in its own space."""
        return self.space.is_valid(self.inner(arch))

    def canonical(self, arch: Arch) -> Arch:
        """Return the assignment with the canonical architecture, and the first option for what has no effect on it.

        These are the bits of a part in which this architecture has no weights, and Sparse-IFT at density 1.
        """
        inner = self.space.canonical(self.inner(arch))
        weighted = self._weighted(inner)
        still: dict[str, Option] = {
            f"{BITS}{name}": self.choices[f"{BITS}{name}"][0] for name in self.parts if not weighted.get(name)
        }
        if _SPARSE_IFT in self.choices and self.density(arch) == 1:
            still[_SPARSE_IFT] = self.choices[_SPARSE_IFT][0]
        return arch | inner | still

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the graph of the architecture."""
        return self.space.graph(self.inner(arch))

    def graphs(self, arch: Arch) -> dict[str, list[tuple[str, str, str]]]:
        """Return the graphs of the architecture."""
        return self.space.graphs(self.inner(arch))

    def build(self, arch: Arch) -> nn.Module:
        """Return a fresh network with masks and low-bit weights, which any training loop keeps.

        Raises:
            ArchError: the assignment is not of this space, or the space is not bound to data.
            CompressionError: the architecture cannot be made larger as its Sparse-IFT wants it.
        """
        return self.compressed(self.network(arch), arch)

    def network(self, arch: Arch) -> nn.Module:
        """Return a fresh float network, with masks where its density is below 1: what is trained."""
        arch = self.check(arch)
        inner, density, kind = self.inner(arch), self.density(arch), self.sparse_ift(arch)
        if self.one_shot is not None:
            settings = ONE_SHOT[self.one_shot].supernet()
            return mark(self.space.supernet(**settings).extract(inner), self.space, inner, settings)
        model = self.space.build(inner)
        if density < 1 and kind is not None:
            return larger(model, kind, 1 - density)
        mark(model, self.space, inner)
        return model if density == 1 else prune(model, density)

    def compressed(self, model: nn.Module, arch: Mapping[str, Option]) -> nn.Module:
        """Return a copy of one of these networks with low-bit weights."""
        return apply_policy(model, self.policy_of(arch, model))

    def policy_of(self, arch: Mapping[str, Option], model: nn.Module) -> dict[str, str]:
        """Return the options of a network's layers: each has that of its part, or stays float."""
        return {name: str(arch.get(f"{BITS}{name.partition('.')[0]}", FLOAT)) for name in weights(model)}

    def supernet(self, *args: Any, **settings: Any) -> Supernet:
        """Refuse: bits are no paths of a supernet.

        Raises:
            ArchError: says how to search with shared weights.
        """
        raise ArchError(
            'bits have no supernet. Give JointSpace(space, compress.bits(4, 8), one_shot="spos") to a strategy such as '
            "linas: its networks are taken from one supernet."
        )

    def inner(self, arch: Mapping[str, Option]) -> Arch:
        """Return the architecture alone."""
        return Arch({name: arch[name] for name in self.space.choices})

    def density(self, arch: Mapping[str, Option]) -> float:
        """Return the share of the weights that an assignment keeps."""
        return float(arch.get(_DENSITY, self.policy.density[0]))  # type: ignore[arg-type]

    def sparse_ift(self, arch: Mapping[str, Option]) -> str | None:
        """Return the kind of larger layers that an assignment has, if any."""
        kind = arch.get(_SPARSE_IFT, self.policy.sparse_ift[0])
        return None if kind is None else str(kind)

    def objective(
        self, data: Data, *, recipe: Recipe | None = None, seed: int = 0, device: str = "auto", **changes: Any
    ) -> JointObjective:
        """Return what trains, deploys and measures these networks.

        Args:
            data: images, the space is bound to them.
            recipe: how to train; of the supernet, with `one_shot`.
            seed: of everything random.
            device: where to train.
            **changes: fields of the recipe.

        Raises:
            ImportError: the packages of the extra `deploy` are not installed.
            SettingError, ArchError: recipe, data and space do not fit each other.
        """
        from compress.joint_objective import JointObjective

        return JointObjective(self.bind(data), data, recipe, changes, seed=seed, device=device)

    def to_json(self) -> str:
        """Return the settings of both spaces as JSON."""
        settings = {"space": type(self).__name__, "of": json.loads(self.space.to_json())}
        return json.dumps(settings | {"policy": dataclasses.asdict(self.policy), "one_shot": self.one_shot})

    def _parts_of(self, inner: Arch) -> dict[str, bool]:
        """Return the children of a network, and whether they have weights."""
        with torch.device("meta"):
            model = self.space.build(inner)
        return {name: bool(weights(child)) for name, child in model.named_children()}

    @cached_property
    def _remembered(self) -> dict[Arch, dict[str, bool]]:
        return {}

    def _weighted(self, inner: Arch) -> dict[str, bool]:
        found = self._remembered.get(inner)
        if found is None:
            found = self._remembered[inner] = self._parts_of(inner)
        return found
