"""What compressors need of a model: that it can be copied, and that its weights have values, and its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import CompressionError
from search_spaces.layouts import laid_out, layout_for
from search_spaces.tracing import GrowthError, copied


def require_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        CompressionError: it is none; says what it is.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, Mapping):
        given = f"a mapping of {len(model)} entries; load a state_dict into its model: model.load_state_dict(...)."
    elif isinstance(model, str):
        given = f"the string {model!r}; build or load the model first."
    elif isinstance(model, type):
        given = f"the class {model.__name__}; make a model of it: {model.__name__}(...)."
    else:
        given = f"{type(model).__name__}."
    raise CompressionError(f"model is a torch.nn.Module, got {given}")


def copy_of(model: nn.Module, share_parameters: bool = False) -> nn.Module:
    """Return a deep copy of a model, on request with the very parameters of the model.

    Raises:
        CompressionError: it is no module, or cannot be copied.
    """
    require_module(model)
    try:
        return copied(model, share_parameters)
    except GrowthError as error:
        raise CompressionError(str(error)) from error


def require_values(model: nn.Module) -> None:
    """Refuse a model on the ``meta`` device.

    Raises:
        CompressionError: it is there, or no module.
    """
    require_module(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CompressionError(
            f"{type(model).__name__} is on the meta device, where weights have no values; build it for real."
        )


def differentiable(model: nn.Module, x: Any) -> Any:
    """Return inputs in a memory format in which a model's gradients are right: `search_spaces.layouts.layout_for`."""
    if not isinstance(x, Tensor) or layout_for(model, x.device) == torch.channels_last:
        return x
    return laid_out(x, torch.contiguous_format)


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tensors that a model gives for a batch, as it is now, without gradients.

    Raises:
        CompressionError: it does not take the batch.
    """
    try:
        with torch.no_grad():
            return [x for x in tree_leaves(model(*inputs)) if isinstance(x, Tensor)]
    except Exception as error:
        shapes = ", ".join(" x ".join(map(str, x.shape)) for x in inputs)
        raise CompressionError(f"the model does not take a batch of {shapes}: {error}") from error
