"""Search spaces: a space is a mapping of named choices, an architecture one option for each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any, Self

from torch import Tensor, nn

from search_spaces.arch import Arch, ArchError, Choices, Option, nearest
from search_spaces.mixture import Mixture, one_hot

__all__ = ["Arch", "ArchError", "Choices", "Mixture", "Option", "SearchSpace", "Supernet", "nearest", "one_hot"]


class Supernet(nn.Module, ABC):
    """All networks of a space in one module that shares their weights. It owns weights only: mixtures are passed to it.

    Made by ``space.supernet()``. For every architecture of the space, in training and in evaluation mode,
    ``supernet(x, space.one_hot(arch))`` equals ``supernet.extract(arch)(x)``.

    Attributes:
        space: the space whose networks these are.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space

    @abstractmethod
    def forward(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Return what the space's networks do: logits (B, classes) of images (B, in_channels, H, W), say.

        Every path is weighted by the mixture.

        Raises:
            ArchError: the mixture does not fit the space's sites.
        """

    @abstractmethod
    def extract(self, arch: Arch) -> nn.Module:
        """Return the network of one architecture with copies of its weights and running statistics.

        A plain module of the supernet's own size, with no parameter of a path not taken and no reference to the
        supernet.

        Raises:
            ArchError: the architecture is not of this space.
        """


class SearchSpace(ABC):
    """What can be built: named choices, and a network for every assignment of them.

    A space is one file with one frozen dataclass: its fields are its settings, `choices` and `build` its substance.
    Settings `classes` and `in_channels` may be left ``None``; `bind` fills them in from the data. Everything else here
    is derived; `is_valid`, `canonical`, `graph`, `graphs` and `parse` are the hooks a space may override. A space whose
    networks can share weights has a `supernet` too, and where its sites are not its decisions `sites`, `one_hot` and
    `strongest`.

    Example:
        >>> from random import Random
        >>> from search_spaces import NASBench201
        >>> space = NASBench201(channels=8, cells=1, classes=10, in_channels=1)
        >>> space.size
        15625
        >>> arch = space.sample(Random(0))
        >>> arch in space, space.decode(space.encode(arch)) == arch
        (True, True)
    """

    @property
    @abstractmethod
    def choices(self) -> Choices:
        """The decisions, in order, each with its options (cache it: `functools.cached_property`)."""

    @abstractmethod
    def build(self, arch: Arch) -> nn.Module:
        """Return a fresh network of the architecture: (B, in_channels, H, W) images to (B, classes) logits.

        A language model maps (B, T) tokens to (B, classes, T) logits.

        Raises:
            ArchError: the architecture is not of this space, or the space is not bound to data.
        """

    # Hooks ---------------------------------------------------------------------------------------------------------

    def is_valid(self, arch: Arch) -> bool:
        """Whether an assignment of legal options is a legal architecture. All are, unless a space says otherwise."""
        return True

    def canonical(self, arch: Arch) -> Arch:
        """Return the one architecture that stands for all that compute the same function, so none is trained twice."""
        return arch

    def graph(self, arch: Arch) -> list[tuple[str, str, str]]:
        """Return the architecture as edges (from, to, label) for drawing. Default: the decisions as a chain."""
        steps = [f"{name} = {option}" for name, option in arch.items()]
        nodes = ["input", *steps, "output"]
        return [(a, b, "") for a, b in pairwise(nodes)]

    def graphs(self, arch: Arch) -> dict[str, list[tuple[str, str, str]]]:
        """Return all graphs to draw by title, where an architecture has several cells. Default: `graph`, untitled."""
        return {"": self.graph(arch)}

    def parse(self, text: str) -> Arch:
        """Read an architecture of this space from text: JSON, or a space's own notation."""
        return self.check(Arch.from_json(text))

    # Shared weights: for spaces with a supernet ----------------------------------------------------------------------

    def supernet(self, *args: Any, **settings: Any) -> Supernet:
        """Return a fresh supernet of the space; a space that has one takes settings of its own, by name.

        Raises:
            ArchError: the space has none, or is not bound to data.
        """
        having = (
            "one-shot strategies need one: use DARTS, NASBench201, ConvMacro or another that has one, or evolution."
        )
        raise ArchError(f"{type(self).__name__} has no supernet, and {having}")

    @property
    def sites(self) -> Choices:
        """Where a supernet mixes, each site with its options: the decisions, unless a space says otherwise."""
        return self.choices

    @property
    def edge_sites(self) -> Choices:
        """Further sites, which a mixture may have: for a node, a weight for each of its incoming edges."""
        return {}

    def one_hot(self, arch: Arch) -> Mixture:
        """Return the mixture that is this very architecture: weight 1 on its path, 0 elsewhere.

        Raises:
            ArchError: the architecture is not of this space.
        """
        return one_hot(self.sites, {site: options.index(arch[site]) for site, options in self.sites.items()})

    def strongest(self, mixture: Mixture) -> Arch:
        """Return the architecture that a mixture weights most: at every site its heaviest option."""
        return Arch({site: options[int(mixture[site].argmax())] for site, options in self.sites.items()})

    # Membership ----------------------------------------------------------------------------------------------------

    def arch(self, values: Mapping[str, Option] | None = None, /, **named: Option) -> Arch:
        """Return the checked architecture with these options, ordered like the space."""
        return self.check(Arch({**(values or {}), **named}))

    def check(self, arch: Mapping[str, Option]) -> Arch:
        """Return the architecture, ordered like the space, or say what is wrong with it.

        Raises:
            ArchError: a decision is missing or unknown, an option is not among the choices, or `is_valid` says no.
        """
        name = type(self).__name__
        hint = "Use space.sample(rng), or test with `arch in space`."
        if not isinstance(arch, Mapping):
            raise ArchError(f"{name} was given {type(arch).__name__} {arch!r:.80}, not an architecture. {hint}")
        if missing := [d for d in self.choices if d not in arch]:
            raise ArchError(
                f"an architecture of {name} needs {', '.join(map(repr, missing))}, got {dict(arch)}. {hint}"
            )
        if unknown := [d for d in arch if d not in self.choices]:
            raise ArchError(f"{name} has no decision {unknown[0]!r}; {nearest(unknown[0], self.choices)} {hint}")
        for decision, options in self.choices.items():
            option = arch[decision]
            if not any(option == o and type(option) is type(o) for o in options):
                legal = ", ".join(map(repr, options))
                raise ArchError(f"decision {decision!r} of {name} has option {option!r}; choices are {legal}. {hint}")
        ordered = Arch({d: arch[d] for d in self.choices})
        if not self.is_valid(ordered):
            raise ArchError(f"{ordered} breaks a rule of {name}: {(type(self).is_valid.__doc__ or '').strip()} {hint}")
        return ordered

    def __contains__(self, arch: object) -> bool:
        try:
            self.check(arch)  # type: ignore[arg-type]
        except ArchError:
            return False
        return True

    # Moves ---------------------------------------------------------------------------------------------------------

    def sample(self, rng: Random) -> Arch:
        """Draw an architecture uniformly: every decision on its own, redrawn until `is_valid`."""
        return self._redraw(lambda: Arch({d: rng.choice(options) for d, options in self.choices.items()}))

    def mutate(self, arch: Arch, rng: Random) -> Arch:
        """Change one decision, chosen uniformly, to another of its options, redrawn until `is_valid`."""
        free = [d for d, options in self.choices.items() if len(options) > 1]
        if not free:
            raise ArchError(f"{type(self).__name__} has one architecture only: there is nothing to mutate.")

        def draw() -> Arch:
            decision = rng.choice(free)
            return arch | {decision: rng.choice([o for o in self.choices[decision] if o != arch[decision]])}

        return self._redraw(draw)

    def crossover(self, a: Arch, b: Arch, rng: Random) -> Arch:
        """Take every decision from one parent or the other with equal chance, redrawn until `is_valid`."""
        return self._redraw(lambda: Arch({d: rng.choice((a, b))[d] for d in self.choices}))

    def neighbours(self, arch: Arch) -> Iterator[Arch]:
        """Yield every valid architecture that differs from this one in exactly one decision, in the space's order."""
        for decision, options in self.choices.items():
            for option in options:
                if option != arch[decision]:
                    candidate = arch | {decision: option}
                    if self.is_valid(candidate):
                        yield candidate

    def _redraw(self, draw: Callable[[], Arch]) -> Arch:
        for _ in range(10_000):
            if self.is_valid(candidate := draw()):
                return candidate
        name = type(self).__name__
        raise ArchError(f"no valid architecture of {name} in 10,000 draws: its is_valid is too strict to sample.")

    # Numbers -------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of assignments, valid or not: the product of the numbers of options."""
        return math.prod(len(options) for options in self.choices.values())

    def encode(self, arch: Mapping[str, Option]) -> tuple[int, ...]:
        """Return the position of every option among its choices.

        Raises:
            ArchError: the architecture is not of this space.
        """
        try:
            return tuple(options.index(arch[d]) for d, options in self.choices.items())
        except (KeyError, ValueError, TypeError):
            return self.encode(self.check(arch))  # says what is wrong

    def decode(self, code: Sequence[int] | Mixture) -> Arch:
        """Return the architecture whose `encode` is this, or the one that a mixture weights most.

        ``decode(one_hot(arch)) == arch`` for every architecture of a space with a supernet.

        Raises:
            ArchError: the code has the wrong length or a position out of range; a mixture lacks a site, or has a weight
                that is NaN or infinite.
        """
        if isinstance(code, Mixture):
            return self.check(self.strongest(code.check(self.sites, values=True, optional=self.edge_sites)))
        if len(code) != len(self.choices):
            name, count = type(self).__name__, len(self.choices)
            raise ArchError(f"a code of {name} has {count} positions, got {len(code)}: {code!r}.")
        for (decision, options), position in zip(self.choices.items(), code, strict=True):
            if not 0 <= position < len(options):
                raise ArchError(f"position {position} of decision {decision!r} is outside 0..{len(options) - 1}.")
        return Arch({d: options[i] for (d, options), i in zip(self.choices.items(), code, strict=True)})

    def index(self, arch: Mapping[str, Option]) -> int:
        """Return the architecture's number in 0..size-1: its code read as digits, the first decision the highest."""
        number = 0
        for position, options in zip(self.encode(arch), self.choices.values(), strict=True):
            number = number * len(options) + position
        return number

    def at(self, index: int) -> Arch:
        """Return the architecture whose `index` is this.

        Raises:
            ArchError: the index is outside 0..size-1.
        """
        if not 0 <= index < self.size:
            raise ArchError(f"{type(self).__name__} has architectures 0..{self.size - 1}, asked for {index}.")
        code: list[int] = []
        for options in reversed(list(self.choices.values())):
            index, position = divmod(index, len(options))
            code.append(position)
        return self.decode(code[::-1])

    def archs(self) -> Iterator[Arch]:
        """Yield every valid architecture in the order of `index`."""
        return (arch for arch in map(self.at, range(self.size)) if self.is_valid(arch))

    # Settings ------------------------------------------------------------------------------------------------------

    def bind(self, data: Any) -> Self:
        """Return the space with what was left ``None`` taken from the data.

        That is `classes`, and `in_channels` and `image_size` of images or `context` of a text.

        Raises:
            ArchError: the space was made for other classes, channels or sizes than the data has.
        """
        # here: there
        names = {"classes": "classes", "in_channels": "channels", "image_size": "height", "context": "context"}
        found = {own: getattr(data, theirs, None) for own, theirs in names.items()}
        changes = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if (value := found.get(field.name)) is not None:
                if (own := getattr(self, field.name)) is None:
                    changes[field.name] = value
                elif own != value:
                    raise ArchError(
                        f"{type(self).__name__} was made with {field.name}={own}, the data has {value}. "
                        f"Leave {field.name} out: it is taken from the data."
                    )
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def require(self, *settings: str) -> None:
        """Raise `ArchError` if one of these settings is still ``None``: the space was not bound to data."""
        if unset := [s for s in settings if getattr(self, s) is None]:
            name, lacking = type(self).__name__, " and ".join(unset)
            raise ArchError(f"{name} does not know {lacking} yet. Use space.bind(data), or {name}({unset[0]}=...).")

    def require_positive(self, *settings: str) -> None:
        """Raise `ArchError` unless these settings are positive integers, or of those that `bind` sets not yet set."""
        for name in settings:
            value = getattr(self, name)
            unbound = value is None and name in ("classes", "in_channels", "image_size", "context")
            if not unbound and (type(value) is not int or value < 1):
                raise ArchError(f"{type(self).__name__} was given {name}={value!r}; it is a positive integer.")

    def require_options(self, *settings: str, ascending: bool = True) -> None:
        """Raise `ArchError` unless these settings are tuples of positive integers, each of them once.

        Lists, as JSON has them, are made tuples: they would make the space unhashable.

        Args:
            ascending: each must be greater than the last.
        """
        owner, order = type(self).__name__, "in ascending order" if ascending else "each once"
        for name in settings:
            options = getattr(self, name)
            if isinstance(options, list):
                options = tuple(options)
                object.__setattr__(self, name, options)
            if not isinstance(options, tuple) or any(type(option) is not int or option < 1 for option in options):
                raise ArchError(
                    f"{owner} was given {name}={options!r}; it is a tuple of positive integers (on the command line a "
                    f"list, {name}=[4,8])."
                )
            right = sorted(set(options)) == list(options) if ascending else len(set(options)) == len(options)
            if not options or not right:
                raise ArchError(f"{owner} was given {name}={options!r}; it needs at least one option, {order}.")

    def to_json(self) -> str:
        """Return the space's class name and settings as JSON: what a study or a table is checked against."""
        return json.dumps({"space": type(self).__name__, **dataclasses.asdict(self)})  # type: ignore[call-overload]

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the settings and choices: equal for equal spaces, in every process."""
        text = self.to_json() + json.dumps({d: list(o) for d, o in self.choices.items()})
        return hashlib.sha256(text.encode()).hexdigest()[:12]
