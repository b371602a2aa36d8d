"""DenseShift: weights that are a sign times a power of two, never zero, of 2 to 8 bits each.

With b bits a weight is one of ±2^0, ..., ±2^K, K = 2^(b-1) - 1. There is no scale: the batch norm behind the layer
takes it up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from compress.errors import CompressionError
from compress.layer_macs import Example, Macs, assumed_input, macs
from compress.low_bit import LowBit, attach_low_bit, check_bits
from compress.models import copy_of, require_values
from compress.shift_conversion import conversions, rescale
from compress.weights import named, prunable, weights
from search_spaces.arch import nearest

INITS = ("scratch", "low_variance", "convert")
"""How the latents of `dense_shift` start."""
NEAR = 1e-3
"""The size of latents near their thresholds: their standard deviation with "low_variance", their largest value where
they are made from a weight."""


class ShiftGrid(LowBit):
    """The values ±2^0, ..., ±2^K; a code is the exponent, plus 2^(b-1) for a negative one.

    Args:
        bits: b, 2 to 8; K = 2^(b-1) - 1.

    Raises:
        CompressionError: the bits are out of range.

    Example:
        >>> grid = ShiftGrid(3)
        >>> grid.codes(torch.tensor([1.0, 8.0, -1.0, -4.0]))
        tensor([0, 3, 4, 6], dtype=torch.uint8)
        >>> grid.table()
        tensor([ 1.,  2.,  4.,  8., -1., -2., -4., -8.])
    """

    kind: ClassVar[str] = "shift"

    def __init__(self, bits: int) -> None:
        check_bits(bits)
        super().__init__(bits)

    @property
    def largest(self) -> int:
        """The largest exponent, K."""
        return int(2 ** (self.bits - 1) - 1)

    def table(self) -> Tensor:
        """Return the value of every code, (2^bits,) float32."""
        positive = torch.tensor([2.0**exponent for exponent in range(self.largest + 1)])
        return torch.cat([positive, -positive])

    def codes(self, weight: Tensor) -> Tensor:
        weight = weight.detach()
        weight = weight.float() if weight.element_size() < 4 else weight
        mantissa, exponent = torch.frexp(weight)  # 2^S is 0.5 * 2^(S+1)
        on_grid = (mantissa.abs() == 0.5) & (exponent > 0) & (exponent <= self.largest + 1)
        if not bool(on_grid.all()):
            raise CompressionError(
                f"a weight of {self.bits} bits is one of ±1, ±2, ..., ±2^{self.largest}, found "
                f"{float(weight[~on_grid][0]):g}. One that has left its grid, by training after it was frozen, needs "
                "compress.finalize and compress.dense_shift."
            )
        codes: Tensor = exponent - 1 + (mantissa < 0) * 2 ** (self.bits - 1)
        return codes.to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        return self.table().to(codes.device)[codes.int()]

    @classmethod
    def restore(
        cls, bits: int, shape: tuple[int, ...], fields: Mapping[str, Any], arrays: Mapping[str, Tensor]
    ) -> Self:
        if fields or arrays:
            raise CompressionError(f"a shift grid has nothing but its bits, got {', '.join([*fields, *arrays])}.")
        return cls(bits)

    def frozen(self) -> ShiftGrid:
        return self

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the values of the grid that are nearest, of a weight's shape and type; of zero it is 1."""
        size: Tensor = (weight.abs() / 1.5).clamp(
            max=2.0**self.largest
        )  # between 2^S and 2^(S+1) the middle is 1.5 * 2^S
        exponent: Tensor = torch.frexp(size).exponent.clamp(0, self.largest)
        return torch.ldexp(torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype), exponent)

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class _Shift(torch.autograd.Function):
    """The power of two that latents stand for; its gradient is that of the square root."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor) -> Tensor:
        ctx.save_for_backward(latents)
        value = torch.ones_like(latents[0])
        for t in latents[1:]:
            value.mul_(2).mul_(t > 0).clamp_(min=1)  # one more shift, or none
        return torch.where(latents[0] >= 0, value, -value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (latents,) = ctx.saved_tensors
        on = latents[1:] > 0
        shifts = [torch.zeros_like(latents[0])]
        for one in on:
            shifts.append((shifts[-1] + 1) * one)
        root = (shifts[-1] + 1).sqrt()
        parts = [grads[0] * root]
        rest = torch.where(latents[0] >= 0, grads[0], -grads[0]) / (2 * root)
        for before, one in zip(reversed(shifts[:-1]), reversed(on), strict=True):
            parts.insert(1, rest * (before + 1))
            rest = rest * one
        return torch.stack(parts)


class DenseShift(ShiftGrid):
    """A trainable power-of-two weight: what is stored, and moved by an optimizer, are 2^(b-1) latents for each weight.

    They lie one after the other along the first axis, (2^(b-1) O, ...), so that the memory format of images fits them.

    The first decides the sign: at zero and above it is +. The others, t_1 to t_K, make the exponent: S_0 = 0, and S_j
    is S_(j-1) + 1 where t_j > 0, else 0. The weight is exactly ±2^S with S = S_K. Gradients are those of ±sqrt(S + 1),
    where the sign and the steps of t pass gradients through unchanged.

    Args:
        bits: b, 2 to 8.

    Example:
        >>> latents = torch.tensor([-1.0, 0.0, 1.0, 2.0, -1.0, 2.0, 1.0, 0.1], requires_grad=True)  # sign, t_1 ...
        >>> weight = DenseShift(3)(latents)  # -2^1: only the last is above 0; and +2^3
        >>> weight
        tensor([-2.,  8.], grad_fn=<_ShiftBackward>)
        >>> weight.sum().backward()
        >>> latents.grad[::2]  # of the first weight: sqrt(2), and -1 / (2 sqrt(2)) where a step of t changes S by 1
        tensor([ 1.4142, -0.0000, -0.7071, -0.3536])

    Source: Li et al., DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization, ICCV 2023,
    arXiv:2208.09708. The released code has 3 bits only; this is its rule for any number of them.
    """

    def forward(self, weight: Tensor) -> Tensor:
        value: Tensor = _Shift.apply(weight.unflatten(0, (self.largest + 1, -1)))
        return value

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return latents whose weight is the nearest to this one, one after the other along the first axis.

        Each is as far from its threshold as the weight is from where its decision changes: `NEAR` times the distance in
        octaves for t, in weights for the sign, and at most `NEAR`.
        """
        octaves = (weight.abs() / 1.5).log2()  # S is the number of thresholds 0, 1, 2, ... that lie below
        latents = [weight, *(octaves - (self.largest - j) for j in range(1, self.largest + 1))]
        return NEAR * torch.cat(latents).clamp(-1, 1)

    def weight_shape(self, stored: Tensor) -> tuple[int, ...]:
        return stored.shape[0] // (self.largest + 1), *stored.shape[1:]

    def frozen(self) -> ShiftGrid:
        return ShiftGrid(self.bits)


def dense_shift(
    model: nn.Module,
    bits: int | Mapping[str, int] = 3,
    *,
    init: str = "scratch",
    exclude: Sequence[str] = (),
    include_ends: bool = False,
    example: Example | None = None,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Return the model with weights that are powers of two, and are trained as such by any training loop.

    Every convolution, linear layer and attention is changed, but neither the convolution that is called first nor the
    layer that is called last. `compress.low_bits` names those that were. With b bits, each of their weights is trained
    by 2^(b-1) numbers (2, 4, 8 at 2, 3, 4 bits), which is what the model's parameters, optimizers and ``state_dict``
    hold, until `freeze`. Make the optimizer afterwards. `compress.save` stores b bits for each weight;
    `compress.export` and `finalize` turn them into ordinary float weights of the same values. A processor multiplies
    those like any others: what few bits save is size.

    How the weights start, `init`:

    - "scratch": random, latents of mean 0 and Kaiming's standard deviation by fan-out. The model's weights are
      forgotten. It takes long trainings: in a short one few latents reach their thresholds, so few codes change.
    - "low_variance": random, of a standard deviation of `NEAR`: so near to its threshold, a latent needs few steps to
      cross it. The paper takes it to transfer what other layers have learnt; in short trainings it is better from
      scratch, too.
    - "convert": the nearest to the model's own, of which every output channel is first multiplied by the factor that
      fits the grid best. The batch norm behind the layer divides by it. Layers with no batch norm of their own behind
      them stay float, as do transposed convolutions and layers with a channel of zeros; in transformers that is all of
      them. Latents are as far from their thresholds as the float weights, measured in steps of an optimizer, so that
      training goes on at about the same pace.

    From scratch, a layer with no norm behind it gets weights of 1 and above for good; better exclude it. Converting to
    few bits costs accuracy, much of it at 2, until the network is trained on. Measuring the statistics of its batch
    norms anew (`nasbench.recalibrate`) helps as well.

    Args:
        model: any module; it stays as it is unless `inplace`.
        bits: 2 to 8 for all layers, or for those that a mapping names, the first and the last too.
        init: one of `INITS`.
        exclude: names of layers, of modules that hold layers, or of parameters, that stay float.
        include_ends: change the first convolution and the last layer, too.
        example: a batch that the model takes, by which first and last layer and batch norms are found; a tuple if it
            takes several inputs. Default: the first of an image of 32 x 32, one of 224 x 224 and a vector that it
            takes.
        seed: of random latents.
        inplace: change the model itself. Its Parameter objects stay, and take the shape of the latents.

    Raises:
        CompressionError: bits or init are none, a name is unknown, a weight is empty, float16, tied, parametrized,
            masked or has few bits already, the model does not take the example, no layer is left, or, with "convert",
            torch.fx cannot trace the model, a weight is not finite, or a layer that `bits` names cannot be converted.
            The model is unchanged then.

    Example:
        >>> from compress.low_bit_models import low_bits
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> net = net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8, 10))
        >>> shifted = dense_shift(net, 2)
        >>> low_bits(shifted)
        {'2': DenseShift(2 bits)}
        >>> shifted[2].weight.unique().tolist()
        [-2.0, -1.0, 1.0, 2.0]

    Source: Li et al., DenseShift, ICCV 2023, arXiv:2208.09708, for the weights and the random latents. Conversion, with
    one factor for each channel, is ours.
    """
    if init not in INITS:
        raise CompressionError(f"there is no init {init!r} of shift weights; {nearest(init, INITS)}")
    require_values(model)
    if isinstance(bits, Mapping):
        chosen = _named(model, bits, exclude)
    else:
        check_bits(bits)
        ends = [] if include_ends else ends_of(model, macs(model, _inputs(model, example)))
        chosen = dict.fromkeys(prunable(model, [*exclude, *ends]), bits)
    _check_latents(model, chosen)
    if init == "convert":
        converted = conversions(
            model,
            {name: ShiftGrid(own) for name, own in chosen.items()},
            _inputs(model, example),
            required=isinstance(bits, Mapping),
        )
        chosen = {name: chosen[name] for name in converted}
    target = model if inplace else copy_of(model)
    found, generator = weights(target), torch.Generator().manual_seed(seed)
    for name, own in chosen.items():
        weight = found[name]
        if init == "convert":
            rescale(target, weight, converted[name])
        attach_low_bit(weight.module, weight.attribute, DenseShift(own))
        with torch.no_grad():
            if init == "convert":
                reach = converted[name].reach.repeat(len(weight.parameter) // weight.shape[0])
                weight.parameter.mul_(reach.view(-1, *[1] * (len(weight.shape) - 1)) / NEAR)
            else:
                fan_out = weight.shape[0] * math.prod(weight.shape[2:])
                spread = math.sqrt(2 / fan_out) if init == "scratch" else NEAR
                weight.parameter.copy_(spread * torch.randn(weight.parameter.shape, generator=generator))
    return target


def ends_of(model: nn.Module, cost: Macs) -> list[str]:
    """Return the layer that is called first, if it is a convolution, and the one that is called last."""
    called = [name for name, own in cost.items() if own.dense]
    first = weights(model)[called[0]].module
    return [*([called[0]] if isinstance(first, nn.modules.conv._ConvNd) else []), called[-1]]


def _check_latents(model: nn.Module, names: Iterable[str]) -> None:
    found = weights(model)
    for name in names:
        if not found[name].size:
            raise CompressionError(f"the weight of {name!r} is empty: {found[name].shape}. Exclude it.")
        if found[name].parameter.dtype == torch.float16:
            raise CompressionError(
                f"the weight of {name!r} is torch.float16, whose range is too small for latents; call "
                "model.float() first, and train under torch.autocast."
            )


def _inputs(model: nn.Module, example: Example | None) -> tuple[Any, ...]:
    example = assumed_input(model) if example is None else example
    return example if isinstance(example, tuple) else (example,)


def _named(model: nn.Module, bits: Mapping[str, int], exclude: Sequence[str]) -> dict[str, int]:
    for name, own in bits.items():
        check_bits(own, f"bits[{name!r}]")
    return {name: bits[name] for name in named(model, bits, exclude, "bits", prunable)}
