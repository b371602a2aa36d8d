"""Trained layers as layers of powers of two: what each channel is multiplied with, and its batch norm divides by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.errors import CompressionError
from compress.norms import norms_behind
from compress.weights import Weight, weights
from search_spaces.tracing import GrowthError, trace

if TYPE_CHECKING:
    from compress.shift import ShiftGrid

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OCTAVES = tuple(
    i / 4 for i in range(-2, 13)
)  # of scales that are tried, above that where the largest weight just fits
_TOP = 15  # the largest exponent that is used: weights below 2^-15 of the largest do not matter
_LEAST, _MOST = 1e-30, 1e37  # weight decay leaves channels of such weights: beyond, they are as good as zero


@dataclass(frozen=True, eq=False)
class Conversion:
    """How a layer becomes one of powers of two.

    Attributes:
        norm: name of the batch norm behind it.
        factor: (out,), what its weights are multiplied with before the nearest powers of two are taken.
        gain: (out,), how many times larger the layer's outputs then are; near the factor.
        reach: (out,), how far a latent is from its threshold where the weight is an octave away: as far as an optimizer
            moves it while it would move the float weight by its own root mean square. Outputs that are larger by the
            gain have gradients that are smaller by it.
    """

    norm: str
    factor: Tensor
    gain: Tensor
    reach: Tensor


def conversions(
    model: nn.Module, grids: Mapping[str, ShiftGrid], inputs: tuple[Any, ...], required: bool
) -> dict[str, Conversion]:
    """Return how layers are converted, by name, without those that cannot be.

    Args:
        model: any module that torch.fx can trace.
        grids: of the layers' weights, by name.
        inputs: what the model takes.
        required: refuse if one of them cannot be converted.

    Raises:
        CompressionError: one that is required cannot, or none; a weight is not finite, or the model cannot be traced.
    """
    try:
        norms = norms_behind(trace(model, inputs))
    except GrowthError as error:
        raise CompressionError(f"the batch norms of {type(model).__name__} cannot be found: {error}") from error
    found, converted = weights(model), {}
    reasons: dict[str, str] = {}
    for name, grid in grids.items():
        weight = found[name].parameter.detach()
        if not bool(weight.isfinite().all()):
            raise CompressionError(f"{name!r} has weights that are infinite or no number, so none is nearest to them.")
        if not norms.get(name):
            reasons[name] = "no batch norm follows it, and it alone, to take up its scale"
        elif not isinstance(found[name].module, _LAYERS):
            reasons[name] = f"it is a {type(found[name].module).__name__}"
        elif not bool(weight.flatten(1).any(1).all()):
            reasons[name] = "a channel has only zeros, and powers of two have none"
        else:
            factor, gain = fit_channels(weight, grid)
            reach = weight.flatten(1).double().square().mean(1).sqrt() / gain
            converted[name] = Conversion(norms[name], factor, gain, reach.clamp(min=_LEAST).to(weight.dtype))
    if reasons and (required or not converted):
        name, reason = next(iter(reasons.items()))
        raise CompressionError(f"{name!r} cannot be converted: {reason}. Leave it out, or train it from scratch.")
    return converted


def rescale(model: nn.Module, weight: Weight, conversion: Conversion) -> None:
    """Multiply a layer's weight, and let its batch norm divide what comes of it: in evaluation and in training."""
    layer: Any = weight.module
    norm = model.get_submodule(conversion.norm)
    assert isinstance(norm, _BatchNorm)
    gain = conversion.gain
    with torch.no_grad():
        layer.weight.mul_(conversion.factor.view(-1, *[1] * (len(weight.shape) - 1)))
        if layer.bias is not None:
            layer.bias.mul_(gain)
        if norm.running_mean is None or norm.running_var is None:
            return  # a batch's own statistics grow with the outputs
        larger = (gain.double().square() * norm.running_var).clamp(max=_MOST)
        if norm.affine:  # eps is added to a larger variance now
            norm.weight.mul_(((larger + norm.eps) / (norm.running_var + norm.eps)).sqrt() / gain)
        norm.running_mean.mul_(gain)
        norm.running_var.copy_(larger)


def fit_channels(weight: Tensor, grid: ShiftGrid) -> tuple[Tensor, Tensor]:
    """Return the factors, (out,), after which a weight's channels are nearest to the grid in angle, and the gains.

    The values v nearest to f w stand for w up to the scale <w, v> / <v, v>, whose inverse is the gain.
    """
    flat = weight.flatten(1).float()
    largest = flat.abs().amax(1).clamp(min=_LEAST)
    flat = flat / largest.unsqueeze(1)  # so that no square of a small weight is lost
    start = torch.full_like(largest, 2.0 ** min(grid.largest, _TOP))
    best = torch.full_like(start, -1.0)
    factors, gains = start.clone(), start.clone()
    for factor in (start * 2**octave for octave in _OCTAVES):
        near = grid.nearest(flat * factor.unsqueeze(1))
        inner, square = (flat * near).sum(1), near.square().sum(1)
        better = (fit := inner.square() / square) > best
        best = torch.where(better, fit, best)
        factors, gains = torch.where(better, factor, factors), torch.where(better, square / inner, gains)
    return factors / largest, (gains / largest).clamp(max=_MOST)
