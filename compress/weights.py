"""Which weights of a model are compressed: those of convolutions, linear layers and attention, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from compress.errors import CompressionError
from compress.low_bit import LowBit, low_bit_of
from compress.models import require_module
from search_spaces.arch import nearest
from search_spaces.masks import mask_of

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight in its model.

    Attributes:
        name: the layer's name, or the parameter's where a layer has several: "layer1.0.conv1", "attn.in_proj_weight".
        module: the layer.
        attribute: the parameter's name in the layer.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter: what an optimizer moves, unmasked where there is a mask; of `DenseShift` latents."""
        if parametrize.is_parametrized(self.module, self.attribute):
            return self.module.parametrizations[self.attribute].original  # type: ignore[index, union-attr, no-any-return]
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    @property
    def mask(self) -> Tensor | None:
        """The boolean mask over it, or None."""
        return mask_of(self.module, self.attribute)

    @property
    def low_bit(self) -> LowBit | None:
        """The step that gives it few values, or None."""
        return low_bit_of(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that the layer computes with."""
        step = self.low_bit
        return tuple(self.parameter.shape) if step is None else step.weight_shape(self.parameter)

    @property
    def size(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)


def weights(model: nn.Module) -> dict[str, Weight]:
    """Return every weight of convolutions, linear layers and attention, in the order of the modules.

    Biases, norms, embeddings, and positional or class tokens are not among them.

    Raises:
        CompressionError: the model is no module.

    Example:
        >>> list(weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 2))))
        ['0', '3']
        >>> list(weights(nn.MultiheadAttention(8, 2)))
        ['in_proj_weight', 'out_proj']
    """
    require_module(model)
    return {weight.name: weight for weight in _find(model)}


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Weight]:
    """Return the weights that can be masked: all of `weights` but those excluded by name.

    Args:
        model: any module.
        exclude: names of layers, of modules that hold layers, or of parameters ("attn.in_proj_weight").

    Raises:
        CompressionError: an excluded name matches nothing, no weight is left, or one of them is tied to another
            parameter, parametrized or masked already, or no initialised parameter.

    Example:
        >>> list(prunable(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]))
        ['0']
    """
    left = chosen(model, exclude, "prune")
    holders = holders_of(model)
    for weight in left.values():
        if parametrize.is_parametrized(weight.module, weight.attribute):
            state, advice = "parametrized", "remove that first (torch.nn.utils.parametrize), or exclude it."
            if weight.mask is not None:
                state, advice = "masked", "compress.finalize(model) makes masked weights ordinary ones."
            if weight.low_bit is not None:
                state, advice = "of few bits", "compress.finalize(model) makes such weights ordinary ones."
            raise CompressionError(f"{weight.name!r} is {state} already; {advice}")
        require_own_parameter(weight, holders)
    return left


def chosen(model: nn.Module, exclude: Sequence[str], purpose: str) -> dict[str, Weight]:
    """Return all `weights` but those excluded by name.

    Args:
        purpose: what is to be done to them, for messages: "prune".

    Raises:
        CompressionError: an excluded name matches nothing, or no weight is left.
    """
    if isinstance(exclude, str):
        raise CompressionError(f"exclude is a list of names, got {exclude!r}; write exclude=[{exclude!r}].")
    found = weights(model)
    if not found:
        raise CompressionError(
            f"{type(model).__name__} has no convolution, linear layer or attention, so there is nothing to {purpose}."
        )
    left = dict(found)
    for name in exclude:
        matches = [own for own in found if own == name or own.startswith(f"{name}.") or f"{own}.weight" == name]
        if not matches:
            raise CompressionError(
                f"exclude names {name!r}, which holds no weight to {purpose}; {nearest(name, found)}"
            )
        for own in matches:
            left.pop(own, None)
    if not left:
        raise CompressionError(f"all {len(found)} weights are excluded, so there is nothing to {purpose}.")
    return left


def named(
    model: nn.Module,
    values: Mapping[str, Any],
    exclude: Sequence[str],
    what: str,
    select: Callable[[nn.Module, Sequence[str]], dict[str, Weight]],
) -> dict[str, Weight]:
    """Return the weights that a mapping from names to values is about, in the order of the modules.

    Args:
        what: the argument that the mapping is, for messages: "density".
        select: `prunable` or another that takes a model and excluded names.

    Raises:
        CompressionError: the mapping is empty, or names no weight or an excluded one.
    """
    known = weights(model)
    if not values:
        raise CompressionError(f"{what} is an empty mapping; name at least one layer.")
    for name in values:
        if name not in known:
            raise CompressionError(f"{what} names {name!r}, which is no weight of the model; {nearest(name, known)}")
    left = select(model, [*exclude, *(name for name in known if name not in values)])
    if gone := [name for name in values if name not in left]:
        raise CompressionError(f"{what} names {gone[0]!r}, which is excluded too.")
    return left


def holders_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter, by its id: several where it is tied."""
    holders: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{prefix}.{name}".removeprefix("."))
    return holders


def require_own_parameter(weight: Weight, holders: Mapping[int, list[str]]) -> None:
    """Refuse a weight that is no initialised parameter of its own; `holders` are those of its model.

    Raises:
        CompressionError: it is computed from others, tied, or has no shape yet.
    """
    if not (names := holders.get(id(weight.parameter))):
        raise CompressionError(
            f"the weight of {weight.name!r} is no parameter but computed from others, as weight_norm and prune of "
            f"torch.nn.utils do it; remove that first."
        )
    if isinstance(weight.parameter, nn.UninitializedParameter):
        raise CompressionError(f"{weight.name!r} has no shape yet; send one batch through the model first.")
    if len(names) > 1:
        raise CompressionError(
            f"the weight of {weight.name!r} is tied: {' and '.join(names)} are one parameter. Give it up with "
            f"exclude=[{weight.name!r}]."
        )


def _find(model: nn.Module) -> Iterator[Weight]:
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for name in _ATTENTION:
                if getattr(module, name, None) is not None:
                    yield Weight(f"{path}.{name}".removeprefix("."), module, name)
        elif isinstance(module, _ConvNd | nn.Linear):
            yield Weight(path or "weight", module, "weight")
