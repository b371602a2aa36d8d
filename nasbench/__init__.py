"""Neural architecture search: data, training, strategies, studies.

The front door is `search`; names are imported when first used, so that `import nasbench` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasbench import data, strategies
    from nasbench.anytime import plot_anytime
    from nasbench.comparison import Comparison, compare
    from nasbench.data import Data
    from nasbench.errors import (
        CheckpointError,
        DataError,
        ResumeError,
        SettingError,
        StudyError,
        TableError,
        TrainingDiverged,
        WeightsError,
    )
    from nasbench.graphs import draw
    from nasbench.profile import Latency, Profile, measure
    from nasbench.recipe import Recipe
    from nasbench.result import SearchResult, Trial
    from nasbench.study import join, search
    from nasbench.table import Table
    from nasbench.training import Callback, evaluate, fit, recalibrate, validate

_WHERE = {
    "anytime": ["plot_anytime"],
    "comparison": ["Comparison", "compare"],
    "data": ["Data"],
    "errors": [
        "CheckpointError",
        "DataError",
        "ResumeError",
        "SettingError",
        "StudyError",
        "TableError",
        "TrainingDiverged",
        "WeightsError",
    ],
    "graphs": ["draw"],
    "profile": ["Latency", "Profile", "measure"],
    "result": ["SearchResult", "Trial"],
    "study": ["join", "search"],
    "table": ["Table"],
    "recipe": ["Recipe"],
    "training": ["Callback", "evaluate", "fit", "recalibrate", "validate"],
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Callback",
    "CheckpointError",
    "Comparison",
    "Data",
    "DataError",
    "Latency",
    "Profile",
    "Recipe",
    "ResumeError",
    "SearchResult",
    "SettingError",
    "StudyError",
    "Table",
    "TableError",
    "TrainingDiverged",
    "Trial",
    "WeightsError",
    "compare",
    "data",
    "draw",
    "evaluate",
    "fit",
    "join",
    "measure",
    "plot_anytime",
    "recalibrate",
    "search",
    "strategies",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "strategies"):
        return import_module(f"nasbench.{name}")
    if name not in _HOME:
        raise AttributeError(f"nasbench has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"nasbench.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
