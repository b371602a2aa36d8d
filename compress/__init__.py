"""Neural networks made small: pruned, sparse from the start, stored in few bytes, and reported as they are.

Names are imported when first used, so that `import compress` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.cached_labels import SoftLabels, soft_labels
    from compress.callbacks import DynamicCallback
    from compress.comparison import Comparison
    from compress.density import Densities, densities
    from compress.deployed import Deployed
    from compress.deployment import Deployer, to_int8
    from compress.distillation import DistillationLoss, distill
    from compress.dynamic import DynamicSparsity
    from compress.errors import CompressionError
    from compress.exporting import export
    from compress.inspection import Inspection, inspect
    from compress.iso_flop import sparse_ift
    from compress.joint import Bits, JointSpace, bits
    from compress.layer_macs import compare_macs, macs
    from compress.low_bit_models import changed_codes, code_snapshot, freeze, low_bits
    from compress.policy import PolicySpace, apply_policy, load_policy, save_policy
    from compress.pruning import finalize, masks, prune
    from compress.quantization import quantize
    from compress.reporting import Report, report
    from compress.sensitivity import LayerSensitivity, Sensitivities, assign_bits, sensitivities
    from compress.shift import dense_shift
    from compress.stages import Stage
    from compress.storage import load, save
    from compress.structured import ChannelPlan, channel_plan

_WHERE = {
    "cached_labels": ["SoftLabels", "soft_labels"],
    "callbacks": ["DynamicCallback"],
    "comparison": ["Comparison"],
    "density": ["Densities", "densities"],
    "deployed": ["Deployed"],
    "deployment": ["Deployer", "to_int8"],
    "distillation": ["DistillationLoss", "distill"],
    "dynamic": ["DynamicSparsity"],
    "errors": ["CompressionError"],
    "exporting": ["export"],
    "inspection": ["Inspection", "inspect"],
    "iso_flop": ["sparse_ift"],
    "joint": ["Bits", "JointSpace", "bits"],
    "layer_macs": ["compare_macs", "macs"],
    "low_bit_models": ["changed_codes", "code_snapshot", "freeze", "low_bits"],
    "policy": ["PolicySpace", "apply_policy", "load_policy", "save_policy"],
    "pruning": ["finalize", "masks", "prune"],
    "quantization": ["quantize"],
    "reporting": ["Report", "report"],
    "sensitivity": ["LayerSensitivity", "Sensitivities", "assign_bits", "sensitivities"],
    "shift": ["dense_shift"],
    "stages": ["Stage"],
    "storage": ["load", "save"],
    "structured": ["ChannelPlan", "channel_plan"],
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Bits",
    "ChannelPlan",
    "Comparison",
    "CompressionError",
    "Densities",
    "Deployed",
    "Deployer",
    "DistillationLoss",
    "DynamicCallback",
    "DynamicSparsity",
    "Inspection",
    "JointSpace",
    "LayerSensitivity",
    "PolicySpace",
    "Report",
    "Sensitivities",
    "SoftLabels",
    "Stage",
    "apply_policy",
    "assign_bits",
    "bits",
    "changed_codes",
    "channel_plan",
    "code_snapshot",
    "compare_macs",
    "dense_shift",
    "densities",
    "distill",
    "export",
    "finalize",
    "freeze",
    "inspect",
    "load",
    "load_policy",
    "low_bits",
    "macs",
    "masks",
    "prune",
    "quantize",
    "report",
    "save",
    "save_policy",
    "sensitivities",
    "soft_labels",
    "sparse_ift",
    "to_int8",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"compress has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"compress.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
