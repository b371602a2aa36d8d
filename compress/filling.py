"""A model's tensors by name, and a copy of a model filled with stored ones, whatever sizes they have."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from compress.errors import CompressionError
from compress.low_bit import LowBit, attach_low_bit, freeze_low_bit, low_bit_of
from compress.models import copy_of
from search_spaces.masks import Mask, attach, detach, mask_of


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter or buffer as its module stores it, with the boolean mask and the low-bit step over it."""

    module: nn.Module
    attribute: str
    tensor: Tensor
    mask: Tensor | None = None
    low_bit: LowBit | None = None

    def value(self) -> Tensor:
        """Return what is stored, or, where it is of few bits, the weight that it stands for."""
        with torch.no_grad():
            found: Tensor = self.tensor if self.low_bit is None else getattr(self.module, self.attribute)
            return found.detach()


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as it is in a file.

    Attributes:
        tensor: its values; those a mask drops are zero.
        mask: the boolean mask, or None.
        encoding: "dense", "bitmask", "gaps" or "codes".
        groups: of the convolution whose weight it is, else 1.
        root: the name under which the file has it.
        low_bit: the frozen grid that its values are on, or None.
        fresh: whether the tensor is memory of its own, not the file's.
        bytes: of its arrays in the file.
    """

    tensor: Tensor
    mask: Tensor | None
    encoding: str
    groups: int
    root: str
    low_bit: LowBit | None
    fresh: bool
    bytes: int


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Return the parameters and buffers that a state_dict has, by name.

    A masked weight, or one of few bits, is one, by its plain name.

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
            own[attribute] = Slot(
                module, attribute, original, mask_of(module, attribute), low_bit_of(module, attribute)
            )
        persistent = {a: b for a, b in module._buffers.items() if a not in module._non_persistent_buffers_set}
        for attribute, tensor in (module._parameters | persistent).items():
            if tensor is not None:
                own[attribute] = Slot(module, attribute, tensor)
        # In an order that does not change where a mask was attached or removed.
        found |= {f"{path}.{attribute}".removeprefix("."): own[attribute] for attribute in sorted(own, reverse=True)}
    return found


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yield all modules by all their names, with the attributes that only our steps cover; the steps are left out."""
    hidden: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in hidden:
            continue
        covered = []
        for attribute, steps in getattr(module, "parametrizations", {}).items():
            if steps.is_tensor and all(isinstance(step, Mask | LowBit) for step in steps):
                covered.append(attribute)
                hidden |= set(map(id, steps.modules()))
        yield path, module, covered


def blank_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model to be filled: its parameters have no values yet, so that none is copied in vain.

    Raises:
        CompressionError: it cannot be copied.
    """
    blank = {
        id(p): nn.Parameter(torch.empty_like(p), p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter and not p.is_meta
    }
    try:
        return copy.deepcopy(model, blank)
    except Exception:  # noqa: BLE001 - anything that a module stores may refuse
        return copy_of(model)  # which says why that is not possible


def fill(model: nn.Module, stored: Mapping[str, Stored], path: str | Path) -> None:
    """Put stored tensors, masks and low-bit grids into a model, and give its layers their sizes.

    Args:
        model: a copy: where this fails, it is half filled. Its own masks and low-bit steps are removed.
        stored: a tensor for each of its own, by name. Fresh ones become the model's.
        path: where they come from, for messages.

    Raises:
        CompressionError: the model has other tensors, or a layer that has no such sizes, or no such numbers.
    """
    _make_plain(model)
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
    taken: set[str] = set()
    for name, slot in slots.items():
        new = stored[name]
        if _counts(slot.tensor) != _counts(new.tensor):
            raise CompressionError(
                f"{name!r} is {new.tensor.dtype} in the file and {slot.tensor.dtype} in the module, which is another "
                "kind of number. Give the network that was saved."
            )
        if id(slot.tensor) not in filled:
            filled[id(slot.tensor)] = _filled(slot.tensor, new.tensor, own=new.fresh and new.root not in taken), new
            taken.add(new.root)
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
    for name, slot in slots.items():
        if (step := stored[name].low_bit) is not None and low_bit_of(slot.module, slot.attribute) is None:
            attach_low_bit(slot.module, slot.attribute, copy.deepcopy(step).to(filled[id(slot.tensor)][0].device))
            filled[id(slot.tensor)][0].requires_grad_(False)


def _make_plain(model: nn.Module) -> None:
    """Remove masks and low-bit steps."""
    done: set[int] = set()
    for _, module, covered in list(_walk(model)):
        for attribute in () if id(module) in done else covered:
            if low_bit_of(module, attribute) is not None:
                freeze_low_bit(module, attribute)  # which gives the parameter the shape of the weight
                module.parametrizations[attribute].original.requires_grad_(True)  # type: ignore[index, union-attr]
            detach(module, attribute)
        done.add(id(module))


def _filled(old: Tensor, values: Tensor, own: bool) -> Tensor:
    """Return the module's tensor with these values, copied unless they are its own; of one on meta, one like it."""
    if old.is_meta:
        values = values if own else values.clone()
        return nn.Parameter(values, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else values
    old.grad = None
    old.data = values.to(old.device, copy=not own)
    return old


def _counts(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


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
