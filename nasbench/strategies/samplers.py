"""Optuna's samplers as strategies: built anew for every trial, so that a study resumes exactly where it was."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from nasbench.errors import SettingError
from nasbench.strategies.base import distributions
from search_spaces.base import SearchSpace, nearest

SAMPLERS = {
    "random": "RandomSampler",
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsga2": "NSGAIISampler",
    "nsga3": "NSGAIIISampler",
}
UNFIT = {
    "cmaes": "CMA-ES cannot handle named options and would silently draw at random",
    "qmc": "quasi-random sequences need numbers and would silently draw at random",
    "bruteforce": "it stops Optuna's own loop, which is not used here; the strategy 'grid' tries everything once",
}


_PARAMS = "nasbench:params"
"""The trial attribute that keeps a sample until all its parameters are set."""


class OptunaStrategy:
    """One of Optuna's samplers by name, with its own options.

    Args:
        name: "random", "tpe", "gp", "nsga2" or "nsga3".
        options: arguments of the sampler's class, except its seed.

    Raises:
        SettingError: an unknown sampler, an option it does not have, or one that cannot work on named choices.

    Example:
        >>> OptunaStrategy("tpe", n_startup_trials=5).settings()
        {'n_startup_trials': 5}
        >>> OptunaStrategy("tpee")
        Traceback (most recent call last):
        nasbench.errors.SettingError: Optuna has no sampler 'tpee' here; did you mean 'tpe'? ...
    """

    many_objectives = True

    def __init__(self, name: str, **options: Any) -> None:
        if name in UNFIT:
            raise SettingError(f"Optuna's {name!r} is not offered: {UNFIT[name]}. {nearest('', SAMPLERS)}")
        if name not in SAMPLERS:
            raise SettingError(f"Optuna has no sampler {name!r} here; {nearest(name, SAMPLERS)}")
        self.name = name
        self.options = options
        self._kind: type[BaseSampler] = getattr(optuna.samplers, SAMPLERS[name])
        known = sampler_options(name)
        if unknown := sorted(options.keys() - known):
            raise SettingError(f"{SAMPLERS[name]} has no option {unknown[0]!r}; {nearest(unknown[0], known)}")
        try:
            json.dumps(options)
        except TypeError:
            raise SettingError(
                f"the options {options} cannot be kept with a study: give numbers and strings, or make the sampler "
                "yourself and pass it as the strategy."
            ) from None
        try:
            self._make(0)
        except (TypeError, ValueError) as error:
            raise SettingError(f"{SAMPLERS[name]} refuses {options}: {error}") from error

    def settings(self) -> dict[str, Any]:
        """Return the options, as a study is checked against."""
        return dict(self.options)

    def sampler(self, space: SearchSpace, seed: int = 0) -> BaseSampler:
        """Return an Optuna sampler whose proposals depend on the seed, the trial's number and the history only."""
        return ReseededSampler(self._make, space, seed)

    def _make(self, seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._kind(seed=seed, **self.options)  # type: ignore[call-arg]


def sampler_options(name: str) -> set[str]:
    """Return the options of one of Optuna's samplers."""
    return set(inspect.signature(getattr(optuna.samplers, SAMPLERS[name])).parameters) - {"seed"}


class ReseededSampler(BaseSampler):
    """Delegates each trial to a sampler newly made from (seed, trial number), which samples the whole space at once.

    Optuna's own seeded samplers start their random numbers over in every process, and so repeat their first proposals
    after a restart.
    """

    def __init__(self, make: Callable[[int], BaseSampler], space: SearchSpace, seed: int) -> None:
        self._make = make
        self._seed = seed
        self._distributions = distributions(space)
        self._current: tuple[int, BaseSampler] | None = None

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if self._current is None or self._current[0] != trial.number:
            digest = hashlib.sha256(f"{self._seed}/{trial.number}".encode()).digest()
            self._current = trial.number, self._make(int.from_bytes(digest[:4], "big"))
        return self._current[1]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space."""
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample everything now: a trial that died half-sampled is then sampled again with the same result."""
        if _PARAMS in trial.system_attrs:
            return dict(trial.system_attrs[_PARAMS])
        inner = self._of(trial)
        params = inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))
        for name, distribution in self._distributions.items():
            if name not in params:
                params[name] = inner.sample_independent(study, trial, name, distribution)
        params = {name: params[name] for name in self._distributions}
        study._storage.set_trial_system_attr(trial._trial_id, _PARAMS, params)
        return params

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Sample a parameter outside the space, for studies that have more than the space's choices."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Let the trial's sampler prepare."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Let the trial's sampler take note of the result."""
        self._of(trial).after_trial(study, trial, state, values)
