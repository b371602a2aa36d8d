"""Strategies: how the next architecture is chosen.

`make("evolution", population=20)` gives one by name. `STRATEGIES` maps the names of black-box strategies to what makes
them; `ONE_SHOT` holds those that train one supernet and read architectures from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from optuna.samplers import BaseSampler

from nasbench.errors import SettingError
from nasbench.strategies.base import History, PastTrial, Proposal, Strategy, distributions
from nasbench.strategies.dass import DASS
from nasbench.strategies.dass import SEARCH as _DASS
from nasbench.strategies.eas import EAS
from nasbench.strategies.evolution import Grid, LocalSearch, RegularizedEvolution, TopEvolution
from nasbench.strategies.one_shot import METHODS as _METHODS
from nasbench.strategies.one_shot import Differentiable, OneShot, SinglePath
from nasbench.strategies.one_shot import settings_of as _one_shot_settings
from nasbench.strategies.predictor import Linas, kendall_taus
from nasbench.strategies.reinforce import Reinforce
from nasbench.strategies.relaxation import Dirichlet, Gumbel, Relaxation, Softmax
from nasbench.strategies.samplers import SAMPLERS, UNFIT, OptunaStrategy, sampler_options
from search_spaces.base import nearest

__all__ = [
    "DASS",
    "EAS",
    "ONE_SHOT",
    "SAMPLERS",
    "STRATEGIES",
    "Differentiable",
    "Dirichlet",
    "Grid",
    "Gumbel",
    "History",
    "Linas",
    "LocalSearch",
    "OneShot",
    "OptunaStrategy",
    "PastTrial",
    "Proposal",
    "RegularizedEvolution",
    "Reinforce",
    "Relaxation",
    "SinglePath",
    "Softmax",
    "Strategy",
    "TopEvolution",
    "describe",
    "distributions",
    "kendall_taus",
    "make",
    "settings_of",
]

STRATEGIES: dict[str, Callable[..., Strategy | OptunaStrategy]] = {
    "evolution": RegularizedEvolution,
    "top_evolution": TopEvolution,
    "local_search": LocalSearch,
    "grid": Grid,
    "reinforce": Reinforce,
    "eas": EAS,
    "linas": Linas,
    **{name: partial(OptunaStrategy, name) for name in SAMPLERS},
}

ONE_SHOT: dict[str, OneShot] = {**_METHODS, _DASS.name: _DASS}
"""The one-shot strategies by name, with the numbers of their papers as defaults: those for the space of DARTS."""


def settings_of(name: str) -> set[str]:
    """Return the names of a strategy's settings.

    Raises:
        SettingError: unknown name, with the nearest ones.

    Example:
        >>> sorted(settings_of("evolution"))
        ['aging', 'crossover', 'population', 'sample']
    """
    if name in ONE_SHOT:
        return _one_shot_settings(ONE_SHOT[name])
    if name in UNFIT:
        raise SettingError(f"Optuna's {name!r} is not offered: {UNFIT[name]}. {nearest('', STRATEGIES)}")
    if name not in STRATEGIES:
        raise SettingError(f"no strategy is called {name!r}; {nearest(name, {**STRATEGIES, **ONE_SHOT})}")
    kind = STRATEGIES[name]
    return set(inspect.signature(kind).parameters) if isinstance(kind, type) else sampler_options(name)


def make(name: str, **settings: Any) -> Strategy | OptunaStrategy | OneShot:
    """Return the strategy of this name with these settings.

    Raises:
        SettingError: unknown name or setting, with the nearest ones.

    Example:
        >>> make("evolution", population=20)
        RegularizedEvolution(population=20, sample=3, aging=True, crossover=0.0)
    """
    known = settings_of(name)
    if name in ONE_SHOT:
        return ONE_SHOT[name].replace(**settings)
    if name not in SAMPLERS and (unknown := sorted(settings.keys() - known)):
        choices = nearest(unknown[0], known) if known else "it has none."
        raise SettingError(f"strategy {name!r} has no setting {unknown[0]!r}; {choices}")
    return STRATEGIES[name](**settings)


def describe(strategy: Strategy | OptunaStrategy | OneShot | BaseSampler) -> dict[str, Any]:
    """Return a strategy's name and settings as JSON-able values: what a study is checked against.

    Example:
        >>> describe(LocalSearch())
        {'name': 'local_search'}
    """
    if isinstance(strategy, BaseSampler):
        return {"name": f"optuna:{type(strategy).__name__}"}
    if isinstance(strategy, OptunaStrategy | OneShot):
        return {"name": strategy.name, **strategy.settings()}
    names = {kind: name for name, kind in STRATEGIES.items()}
    own = f"{type(strategy).__module__}:{type(strategy).__qualname__}"
    return {"name": names.get(type(strategy), own), **strategy.settings()}
