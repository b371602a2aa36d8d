"""Mixtures: a weight for every option of every site of a supernet, as values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from search_spaces.arch import ArchError, Choices, nearest


class Mixture(Mapping[str, Tensor]):
    """A weight for every option of every site of a supernet: what it mixes its paths by.

    Mostly the sites are a space's decisions; a space may have others (`SearchSpace.sites`). Weights need not sum to 1.

    Args:
        weights: for every site a vector of as many weights as it has options.
        active: if the mixture is a sample, for every site the positions of the weights that are not zero. They are
            known on the host, so a path is skipped without waiting for the device to tell its weight.
        add_others: add the weights of the options that are not active to what a site gives. They are zero, so this
            changes no output, but they have a gradient.

    Example:
        >>> Mixture({"e01": torch.tensor([0.0, 1.0])}, active={"e01": (1,)})
        Mixture(e01=[0.0, 1.0])
    """

    __slots__ = ("_weights", "active", "add_others")

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        active: Mapping[str, tuple[int, ...]] | None = None,
        add_others: bool = False,
    ) -> None:
        self._weights = dict(weights)
        self.active = None if active is None else dict(active)
        self.add_others = add_others

    def map(self, function: Callable[[Tensor], Tensor]) -> Mixture:
        """Return the mixture with this function of every weight vector, and otherwise the same.

        Example:
            >>> Mixture({"e01": torch.tensor([0.0, 1.0])}).map(lambda row: 2 * row)
            Mixture(e01=[0.0, 2.0])
        """
        return Mixture({site: function(row) for site, row in self.items()}, self.active, self.add_others)

    def __getitem__(self, site: str) -> Tensor:
        try:
            return self._weights[site]
        except KeyError:
            raise KeyError(f"{site!r} is no site of this mixture; {nearest(site, self._weights)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"Mixture({', '.join(f'{site}={weights.tolist()}' for site, weights in self.items())})"

    def check(self, sites: Choices, *, values: bool = False, optional: Choices | None = None) -> Self:
        """Return the mixture itself if it has a vector of the right length for each of these sites and no others.

        Args:
            sites: the sites it must have, with their options.
            values: look at the numbers too, which waits for the device they are on.
            optional: sites it may have.

        Raises:
            ArchError: a site is missing or unknown, a vector has another length, or a weight is NaN or infinite.
        """
        if missing := [site for site in sites if site not in self]:
            raise ArchError(
                f"a mixture needs a weight vector for every site; {missing[0]!r} has none, this one has those of "
                f"{', '.join(self) or 'no site'}. Use space.one_hot(arch), or a relaxation."
            )
        known = {**sites, **(optional or {})}
        for site, weights in self.items():
            if site not in known:
                raise ArchError(f"a mixture was given weights for {site!r}, which is no site; {nearest(site, known)}")
            if weights.shape != (len(known[site]),):
                raise ArchError(
                    f"the mixture's weights of site {site!r} have shape {tuple(weights.shape)}, but it has "
                    f"{len(known[site])} options: {', '.join(map(str, known[site]))}. Give one weight for each."
                )
            if values and not bool(torch.isfinite(weights).all()):
                raise ArchError(
                    f"the mixture's weights of site {site!r} are {weights.tolist()}: NaN or infinite weights choose "
                    "nothing. The search that made them diverged; lower its learning rates."
                )
        return self


def one_hot(sites: Choices, chosen: Mapping[str, int | None]) -> Mixture:
    """Return the mixture with weight 1 on the chosen position of every site and 0 elsewhere; None chooses nothing.

    Example:
        >>> one_hot({"a": ("x", "y"), "b": ("x", "y")}, {"a": 1, "b": None})
        Mixture(a=[0.0, 1.0], b=[0.0, 0.0])
    """
    weights = {site: torch.zeros(len(options)) for site, options in sites.items()}
    active: dict[str, tuple[int, ...]] = {}
    for site, position in chosen.items():
        active[site] = () if position is None else (position,)
        if position is not None:
            weights[site][position] = 1.0
    return Mixture(weights, active)
