"""A model's tensors by name, and a copy of a model filled with stored ones, whatever sizes they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compress.errors import CompressionError
from search_spaces.masks import Mask, attach, detach, mask_of


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter or buffer in its module, and the boolean mask over it."""

    module: nn.Module
    attribute: str
    tensor: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as it is in a file.

    Attributes:
        tensor: its values; those a mask drops are zero.
        mask: the boolean mask, or None.
        encoding: "dense", "bitmask" or "gaps".
        groups: of the convolution whose weight it is, else 1.
        root: the name under which the file has it.
    """

    tensor: Tensor
    mask: Tensor | None
    encoding: str
    groups: int
    root: str


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Return the parameters and buffers that a state_dict has, by name; a masked weight is one, by its plain name.

    Raises:
        CompressionError: a module has an extra state, which is no tensor.
    """
    found: dict[str, Slot] = {}
    for path, module, covered in _walk(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CompressionError(
                f"{path!r} ({type(module).__name__}) has an extra state, which is no tensor to store."
            )
        own: dict[str, Slot] = {}
        for attribute in covered:
            original = module.parametrizations[attribute].original  # type: ignore[index, union-attr]
            own[attribute] = Slot(module, attribute, original, mask_of(module, attribute))
        persistent = {a: b for a, b in module._buffers.items() if a not in module._non_persistent_buffers_set}
        for attribute, tensor in (module._parameters | persistent).items():
            if tensor is not None:
                own[attribute] = Slot(module, attribute, tensor)
        found |= {f"{path}.{attribute}".removeprefix("."): slot for attribute, slot in own.items()}
    return found


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yield all modules by all their names, with the attributes that a mask alone covers; masks themselves are none."""
    hidden: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in hidden:
            continue
        covered = []
        for attribute, steps in getattr(module, "parametrizations", {}).items():
            if len(steps) == 1 and isinstance(steps[0], Mask):
                covered.append(attribute)
                hidden |= {id(steps), id(steps[0])}
        yield path, module, covered


def fill(model: nn.Module, stored: Mapping[str, Stored], path: str | Path) -> None:
    """Put stored tensors and masks into a model, and give its layers their sizes.

    Args:
        model: a copy: where this fails, it is half filled.
        stored: a tensor for each of its own, by name.
        path: where they come from, for messages.

    Raises:
        CompressionError: the model has other tensors, or a layer that has no such sizes.
    """
    done: set[int] = set()
    for _, module, covered in list(_walk(model)):
        for attribute in () if id(module) in done else covered:
            detach(module, attribute)
        done.add(id(module))
    slots = slots_of(model)
    if slots.keys() != stored.keys():
        raise CompressionError(
            f"{path} does not fit the module: {_listed(stored.keys() - slots.keys())} only in the file, "
            f"{_listed(slots.keys() - stored.keys())} only in the module. Give the network that was saved, with the "
            "layers it then had."
        )
    layers: dict[nn.Module, dict[str, str]] = {}
    for name, slot in slots.items():
        layers.setdefault(slot.module, {}).setdefault(slot.attribute, name)
    for module, names in layers.items():
        _resize(module, {attribute: (name, slots[name].tensor, stored[name]) for attribute, name in names.items()})
    filled: dict[int, tuple[Tensor, Stored]] = {}  # what is one tensor in the model stays one
    for name, slot in slots.items():
        new = stored[name]
        if id(slot.tensor) not in filled:
            filled[id(slot.tensor)] = _filled(slot.tensor, new.tensor), new
        tensor, first = filled[id(slot.tensor)]
        if first.root != new.root and not torch.equal(first.tensor, new.tensor):
            raise CompressionError(
                f"{first.root!r} and {name!r} are one tensor in the module and two in {path}. Give a module in which "
                "they are two."
            )
        if getattr(slot.module, slot.attribute) is not tensor:
            setattr(slot.module, slot.attribute, tensor)
    for name, slot in slots.items():
        if (mask := stored[name].mask) is not None and mask_of(slot.module, slot.attribute) is None:
            attach(slot.module, slot.attribute, mask)


def _filled(old: Tensor, new: Tensor) -> Tensor:
    """Return the module's own tensor with these values; of one on the meta device, one like it."""
    if old.is_meta:
        new = new.clone()
        return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    old.grad = None
    old.data = new.to(old.device, copy=True)
    return old


def _listed(names: Set[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3])) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _resize(module: nn.Module, tensors: Mapping[str, tuple[str, Tensor, Stored]]) -> None:
    """Give a layer the sizes that its stored tensors have.

    Raises:
        CompressionError: they are not those of such a layer, or its kind has no sizes that are known here.
    """
    shapes = {attribute: tuple(stored.tensor.shape) for attribute, (_, _, stored) in tensors.items()}
    same = all(shapes[attribute] == old.shape for attribute, (_, old, _) in tensors.items())
    groups = tensors["weight"][2].groups if "weight" in tensors else 1
    if same and getattr(module, "groups", 1) == groups:
        return
    sizes, expected = _sizes(module, shapes, groups)
    for attribute, (name, old, _) in tensors.items():
        if not sizes or shapes[attribute] != expected.get(attribute, tuple(old.shape)):
            grouped = f" (groups={groups})" if isinstance(module, _ConvNd) else ""
            raise CompressionError(
                f"{name!r} is {_times(shapes[attribute])} in the file{grouped} and {_times(old.shape)} in the "
                f"module, a {type(module).__name__} that cannot be given it. Give a module with the stored shapes."
            )
    for attribute, size in sizes.items():
        setattr(module, attribute, size)


def _sizes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return what a layer's sizes are called and would be, and the shapes that its tensors then have."""
    weight = shapes.get("weight", ())
    if isinstance(module, _ConvNd) and weight[2:] == module.kernel_size and len(weight) > 2 and 0 not in weight[:2]:
        turned = isinstance(module, _ConvTransposeNd)
        out_channels, in_channels = (weight[1] * groups, weight[0]) if turned else (weight[0], weight[1] * groups)
        if (in_channels if turned else out_channels) % groups == 0:
            sizes = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
            return sizes, {"weight": weight, "bias": (out_channels,)}
    elif isinstance(module, nn.Linear) and len(weight) == 2:
        return {"out_features": weight[0], "in_features": weight[1]}, {"weight": weight, "bias": weight[:1]}
    elif isinstance(module, nn.Embedding) and len(weight) == 2 and (module.padding_idx or 0) < weight[0]:
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}, {"weight": weight}
    elif isinstance(module, _NormBase):
        size = next(shape for name, shape in shapes.items() if name != "num_batches_tracked")
        if len(size) == 1:
            return {"num_features": size[0]}, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), size)
    elif isinstance(module, nn.GroupNorm) and len(weight) == 1 and weight[0] % module.num_groups == 0:
        return {"num_channels": weight[0]}, {"weight": weight, "bias": weight}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(weight) == len(module.normalized_shape):
        return {"normalized_shape": weight}, {"weight": weight, "bias": weight}
    elif isinstance(module, nn.PReLU) and len(weight) == 1:
        return {"num_parameters": weight[0]}, {"weight": weight}
    return {}, {}


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
