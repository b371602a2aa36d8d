"""Architectures: one option for every decision of a space, as values; and what is said of unknown names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping

Option = str | int | float | None
Choices = Mapping[str, tuple[Option, ...]]


class ArchError(ValueError):
    """An architecture does not belong to the space it was given to."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known names, then all of them.

    Example:
        >>> nearest("nasbench21", ["darts", "nasbench201"])
        "did you mean 'nasbench201'? Known: darts, nasbench201."
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}Known: {', '.join(names)}."


class Arch(Mapping[str, Option]):
    """One option for every decision of a space: a frozen, hashable mapping, ordered like the space.

    Get one from a space (``space.sample(rng)``, ``space.arch(...)``), which checks it; the constructor only stores it.

    Example:
        >>> arch = Arch({"depth": 2, "width": 16})
        >>> arch
        Arch(depth=2, width=16)
        >>> Arch.from_json(arch.to_json()) == arch
        True
        >>> arch | {"width": 32}
        Arch(depth=2, width=32)
    """

    __slots__ = ("_hash", "_values")

    def __init__(self, values: Mapping[str, Option]) -> None:
        self._values = dict(values)
        self._hash: int | None = None

    def __getitem__(self, name: str) -> Option:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(f"{name!r} is no decision of this architecture; {nearest(name, self._values)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._values.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Arch) else NotImplemented

    def __or__(self, changes: Mapping[str, Option]) -> Arch:
        return Arch(self._values | dict(changes))

    def __repr__(self) -> str:
        plain = all(name.isidentifier() for name in self._values)
        items = (f"{k}={v!r}" if plain else f"{k!r}: {v!r}" for k, v in self._values.items())
        return f"Arch({', '.join(items)})" if plain else f"Arch({{{', '.join(items)}}})"

    def __reduce__(self) -> tuple[type[Arch], tuple[dict[str, Option]]]:
        return Arch, (self._values,)

    def to_json(self) -> str:
        """Return the architecture as a JSON object, in the order of its decisions."""
        return json.dumps(self._values)

    @classmethod
    def from_json(cls, text: str) -> Arch:
        """Read what `to_json` wrote. Check it with ``space.check(arch)``.

        Raises:
            ArchError: the text is no JSON object of strings, numbers and nulls.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArchError(
                f"not an architecture: {text[:80]!r} is no JSON ({error}). Write one with arch.to_json()."
            ) from None
        if not isinstance(values, dict) or not all(v is None or type(v) in (str, int, float) for v in values.values()):
            raise ArchError(
                f"not an architecture: {text[:80]!r} is no JSON object of strings, numbers and nulls. "
                "Write one with arch.to_json()."
            )
        return cls(values)
