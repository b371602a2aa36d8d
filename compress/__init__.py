"""Neural networks made small: pruned, sparse from the start, stored in few bytes, and reported as they are.

Names are imported when first used, so that `import compress` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.callbacks import DynamicCallback
    from compress.density import Densities, densities
    from compress.dynamic import DynamicSparsity
    from compress.errors import CompressionError
    from compress.exporting import export
    from compress.iso_flop import sparse_ift
    from compress.layer_macs import compare_macs, macs
    from compress.pruning import finalize, masks, prune
    from compress.reporting import Report, report
    from compress.storage import load, save
    from compress.structured import ChannelPlan, channel_plan

_WHERE = {
    "callbacks": ["DynamicCallback"],
    "density": ["Densities", "densities"],
    "dynamic": ["DynamicSparsity"],
    "errors": ["CompressionError"],
    "exporting": ["export"],
    "iso_flop": ["sparse_ift"],
    "layer_macs": ["compare_macs", "macs"],
    "pruning": ["finalize", "masks", "prune"],
    "reporting": ["Report", "report"],
    "storage": ["load", "save"],
    "structured": ["ChannelPlan", "channel_plan"],
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "ChannelPlan",
    "CompressionError",
    "Densities",
    "DynamicCallback",
    "DynamicSparsity",
    "Report",
    "channel_plan",
    "compare_macs",
    "densities",
    "export",
    "finalize",
    "load",
    "macs",
    "masks",
    "prune",
    "report",
    "save",
    "sparse_ift",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"compress has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"compress.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
