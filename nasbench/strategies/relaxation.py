"""Relaxations: how the architecture weights of a one-shot search become the mixture of one step.

Architecture weights live on the host, a vector for every site, and so do the draws: a sampled path is known before the
device is asked for anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet as DirichletDistribution
from torch.distributions import kl_divergence
from torch.nn import functional as F

from nasbench.errors import SettingError
from nasbench.recipe import is_number
from search_spaces.base import Choices, Mixture

Logits = Mapping[str, Tensor]
Rule = tuple[Callable[[Any], bool], str]
COUNT: Rule = (lambda value: type(value) is int and value >= 1, "a whole number, at least 1")
TRUE_OR_FALSE: Rule = (lambda value: isinstance(value, bool), "True or False")


def check_settings(owner: str, settings: object, **rules: Rule) -> None:
    """Raise `SettingError` if a setting breaks its rule: a test, and what the value must be in words.

    Example:
        >>> check_settings("gdas", Gumbel(), tau=(lambda tau: tau > 99, "above 99"))
        Traceback (most recent call last):
        nasbench.errors.SettingError: gdas: tau=10.0, but it must be above 99.
    """
    for name, (good, words) in rules.items():
        if not good(value := getattr(settings, name)):
            raise SettingError(f"{owner}: {name}={value!r}, but it must be {words}.")


class Relaxation(ABC):
    """Turns architecture weights into mixtures: a frozen dataclass of settings.

    Example:
        >>> logits = Softmax().initial({"edge": ("none", "skip", "conv")}, torch.Generator().manual_seed(0))
        >>> mixture = Gumbel().mix(logits, 0.5, torch.Generator().manual_seed(0))
        >>> mixture.active
        {'edge': (2,)}
    """

    sampled: bool = False
    """Whether each mixture is a random draw."""

    @abstractmethod
    def mix(self, logits: Logits, progress: float, rng: torch.Generator) -> Mixture:
        """Return the mixture of one step, differentiable in the architecture weights.

        Args:
            logits: for every site a vector with a weight for each option, on the CPU.
            progress: how much of the search is over, 0 in its first epoch and 1 in its last.
            rng: decides the draw.
        """

    @abstractmethod
    def probabilities(self, logits: Logits) -> Mixture:
        """Return what the architecture weights say of every option, without noise and without gradient."""

    def penalty(self, logits: Logits) -> Tensor | None:
        """Return what the architecture step adds to the validation loss, or None."""
        return None

    def initial(self, sites: Choices, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the architecture weights a search begins with: normal, with deviation 0.001, as in DARTS."""
        return {site: 1e-3 * torch.randn(len(options), generator=rng) for site, options in sites.items()}


@dataclass(frozen=True)
class Softmax(Relaxation):
    """All options at once, weighted by the softmax of the architecture weights.

    Example:
        >>> Softmax().mix({"edge": torch.zeros(2)}, 0.0, torch.Generator())
        Mixture(edge=[0.5, 0.5])

    Source: Liu et al., DARTS: Differentiable Architecture Search, ICLR 2019, arXiv:1806.09055.
    """

    def mix(self, logits: Logits, progress: float, rng: torch.Generator) -> Mixture:
        return Mixture(_by_length(logits, lambda rows: rows.softmax(1)))

    def probabilities(self, logits: Logits) -> Mixture:
        return Mixture(_by_length(_detached(logits), lambda rows: rows.softmax(1)))


@dataclass(frozen=True)
class Gumbel(Relaxation):
    """One option a site, drawn by the Gumbel-max trick; its weight is 1 and carries the gradient of a softened draw.

    The softened draw is the softmax of (log-probabilities + Gumbel noise) / tau. Only the drawn option is computed, so
    only its entry of the softened draw gets a gradient, as in the method's formula.

    Args:
        tau: temperature in the first epoch.
        tau_end: temperature in the last; it changes linearly.
        add_others: add the weights of the options that were not drawn to what an edge gives, as the authors' code does:
            they are zero, but have a gradient.

    Raises:
        SettingError: a temperature is not above 0.

    Example:
        >>> mixture = Gumbel().mix({"edge": torch.zeros(3)}, 0.0, torch.Generator().manual_seed(1))
        >>> mixture.active, [round(weight, 6) for weight in mixture["edge"].tolist()]
        ({'edge': (0,)}, [1.0, 0.0, 0.0])

    Source: Dong and Yang, Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019, arXiv:1910.04465.
    """

    tau: float = 10.0
    tau_end: float = 0.1
    add_others: bool = False
    sampled = True

    def __post_init__(self) -> None:
        above = (lambda v: is_number(v) and v > 0, "a temperature, a number above 0")
        check_settings("gdas", self, tau=above, tau_end=above, add_others=TRUE_OR_FALSE)

    def mix(self, logits: Logits, progress: float, rng: torch.Generator) -> Mixture:
        tau = self.tau + (self.tau_end - self.tau) * progress
        weights: dict[str, Tensor] = {}
        active: dict[str, tuple[int, ...]] = {}
        for site, row in logits.items():
            noise = -torch.empty_like(row).exponential_(generator=rng).log()
            soft = ((row.log_softmax(0) + noise) / tau).softmax(0)
            chosen = int(soft.argmax())
            hard = F.one_hot(torch.tensor(chosen), len(row)).to(soft.dtype)
            weights[site] = hard - soft.detach() + soft
            active[site] = (chosen,)
        return Mixture(weights, active, self.add_others)

    def probabilities(self, logits: Logits) -> Mixture:
        return Mixture(_by_length(_detached(logits), lambda rows: rows.softmax(1)))


@dataclass(frozen=True)
class Dirichlet(Relaxation):
    """All options at once, weighted by a draw from a Dirichlet distribution with concentration elu(weights) + 1.

    The gradient passes through the draw (pathwise). Architecture weights begin at about zero: the uniform distribution.

    Args:
        kl: weight of the divergence from the uniform distribution in the architecture step; the authors describe it and
            use weight decay instead, as we do by default.

    Raises:
        SettingError: `kl` is below 0.

    Example:
        >>> mixture = Dirichlet().mix({"edge": torch.zeros(3)}, 0.0, torch.Generator().manual_seed(0))
        >>> round(float(mixture["edge"].sum()), 5)
        1.0

    Source: Chen et al., DrNAS: Dirichlet Neural Architecture Search, ICLR 2021, arXiv:2006.10355. Without the authors'
    progressive stages, which drop options and raise the share of channels halfway.
    """

    kl: float = 0.0
    sampled = True

    def __post_init__(self) -> None:
        check_settings("drnas", self, kl=(lambda v: is_number(v) and v >= 0, "a number, 0 or more"))

    def mix(self, logits: Logits, progress: float, rng: torch.Generator) -> Mixture:
        # torch draws Dirichlet samples from its global generator only.
        seed = int(torch.randint(2**62, (), generator=rng))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Mixture(_by_length(logits, lambda rows: DirichletDistribution(_concentration(rows)).rsample()))

    def probabilities(self, logits: Logits) -> Mixture:
        def mean(rows: Tensor) -> Tensor:
            concentration = _concentration(rows)
            return concentration / concentration.sum(1, keepdim=True)

        return Mixture(_by_length(_detached(logits), mean))

    def penalty(self, logits: Logits) -> Tensor | None:
        if self.kl == 0:
            return None
        terms = []
        for row in logits.values():
            ours, uniform = DirichletDistribution(_concentration(row)), DirichletDistribution(torch.ones_like(row))
            terms.append(kl_divergence(ours, uniform))
        return self.kl * torch.stack(terms).sum()


def _concentration(rows: Tensor) -> Tensor:
    return (F.elu(rows) + 1).clamp_min(torch.finfo(rows.dtype).tiny)  # rounding makes it 0 for weights below -17


def _detached(logits: Logits) -> dict[str, Tensor]:
    return {site: row.detach() for site, row in logits.items()}


def _by_length(logits: Logits, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Apply a function of rows to all sites: those with equally many options at once."""
    groups: dict[int, list[str]] = {}
    for site, row in logits.items():
        groups.setdefault(len(row), []).append(site)
    found: dict[str, Tensor] = {}
    for sites in groups.values():
        found |= zip(sites, function(torch.stack([logits[site] for site in sites])).unbind(), strict=True)
    return {site: found[site] for site in logits}
