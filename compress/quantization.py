"""Weights on evenly spaced values of 2 to 8 bits: rounded once, or trained through the rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

from compress.errors import CompressionError
from compress.low_bit import LowBit, attach_low_bit, check_bits
from compress.models import copy_of, require_values
from compress.weights import Weight, chosen, holders_of, named, require_own_parameter, weights
from search_spaces.arch import nearest
from search_spaces.masks import Mask

SCALES = ("mse", "max")

Group = int | Literal["tensor"] | None

_SHARES = tuple(0.93**k for k in range(32))  # of the full range, down to a tenth
_TINY = torch.finfo(torch.float32).tiny  # below it, multiples of a scale are not exact


@dataclass(frozen=True)
class Layout:
    """Which entries of a weight share a scale.

    Attributes:
        shape: the weight's.
        group: None: those of an output channel; a number: so many consecutive ones of a channel, the last ones of it
            perhaps fewer; "tensor": all.
        transposed: for the weight of a transposed convolution, whose output channels are not on the first axis, its
            groups; else 0.
    """

    shape: tuple[int, ...]
    group: Group = None
    transposed: int = 0

    @property
    def channels(self) -> int:
        """Output channels, or one for a whole tensor."""
        if self.group == "tensor":
            return 1
        return self.transposed * self.shape[1] if self.transposed else self.shape[0]

    @property
    def size(self) -> int:
        """How many entries share a scale, but for the last ones of a channel."""
        row = self._row
        return min(self.group, row) if isinstance(self.group, int) else row

    @property
    def count(self) -> int:
        """How many scales there are: those of the first channel, of the second, ..."""
        return self.channels * self._parts

    @property
    def _row(self) -> int:
        return math.prod(self.shape) // self.channels

    @property
    def _parts(self) -> int:
        return -(-self._row // self.size)

    def gathered(self, weight: Tensor) -> Tensor:
        """Return the entries that share a scale as rows, (count, size), filled up with zeros."""
        if self.transposed and self.group != "tensor":
            weight = weight.reshape(self.transposed, -1, *self.shape[1:]).transpose(1, 2)
        rows = weight.reshape(self.channels, self._row)
        return F.pad(rows, (0, self._parts * self.size - self._row)).reshape(self.count, self.size)

    def spread(self, values: Tensor) -> Tensor:
        """Return (count,) values so that they broadcast with the weight."""
        if self.group == "tensor":
            return values
        rows = values.view(self.channels, self._parts)
        kernel: tuple[int, ...] = (1,) * (len(self.shape) - 2)
        if self.group is not None:
            rows, kernel = rows.repeat_interleave(self.size, dim=1)[:, : self._row], self.shape[2:]
        if not self.transposed:
            return rows.reshape(self.shape[0], -1 if self.group is not None else 1, *kernel)
        inputs, outputs = self.shape[0] // self.transposed, self.shape[1]
        grid = rows.reshape(self.transposed, outputs, -1, *kernel).transpose(1, 2)
        return grid.expand(-1, inputs, *grid.shape[2:]).reshape(self.shape[0], outputs, *kernel)


class AffineGrid(LowBit):
    """Evenly spaced values: ``(code - zero) * scale`` in float32. The value 0 has a code, so it is exact.

    Args:
        bits: of a code, 2 to 8.
        scale: (layout.count,) float32, normal positive numbers.
        zero: (layout.count,) uint8, the codes that stand for 0.
        layout: which entries share a scale.

    Example:
        >>> grid = AffineGrid(2, torch.tensor([0.5]), torch.tensor([2], dtype=torch.uint8), Layout((1, 4)))
        >>> grid.values(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8))
        tensor([[-1.0000, -0.5000,  0.0000,  0.5000]])
    """

    kind = "affine"
    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, scale: Tensor, zero: Tensor, layout: Layout) -> None:
        super().__init__(bits)
        self.layout = layout
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def codes(self, weight: Tensor) -> Tensor:
        weight, (scale, zero) = weight.detach().float(), self._broadcast()
        if self.scale.dtype != torch.float32:
            found = f"its scales are {self.scale.dtype}, call model.float()"
        elif weight.shape == self.layout.shape:
            codes = (weight / scale).round() + zero
            on_grid = ((codes - zero) * scale == weight) & (codes >= 0) & (codes < 2**self.bits)
            if bool(on_grid.all()):
                return codes.to(torch.uint8)
            found = f"{int((~on_grid).sum()):,} of {weight.numel():,} values are not on it"
        else:
            found = f"the weight is {tuple(weight.shape)}"
        raise CompressionError(
            f"a grid of {self.bits} bits for a weight {self.layout.shape} has no codes for this one: {found}. One that "
            "has left its grid, by training or conversion after it was frozen, needs compress.finalize and a new grid."
        )

    def values(self, codes: Tensor) -> Tensor:
        scale, zero = self._broadcast()
        return (codes.float() - zero) * scale

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse the scales of another number of bits, of which only the code of 0 tells."""
        zero, errors = state.get(f"{prefix}zero"), rest[-1]
        if isinstance(zero, Tensor) and zero.shape == self.zero.shape and not self._takes(zero):
            errors.append(
                f"{prefix}zero is not that of {self.extra_repr()}: give the model the bits it was saved with."
            )
            return
        super()._load_from_state_dict(state, prefix, *rest)

    def _takes(self, zero: Tensor) -> bool:
        return zero.is_meta or int(zero.max()) < 2**self.bits

    def fields(self) -> dict[str, Any]:
        fields = {"group": self.layout.group, "transposed": self.layout.transposed}
        return {name: value for name, value in fields.items() if value}

    def arrays(self) -> dict[str, Tensor]:
        """Return "scale", and "zero" where it is not everywhere the middle code."""
        grid = self.frozen()
        arrays = {"scale": grid.scale}
        return arrays if bool((grid.zero == 2 ** (self.bits - 1)).all()) else arrays | {"zero": grid.zero}

    @classmethod
    def restore(
        cls, bits: int, shape: tuple[int, ...], fields: Mapping[str, Any], arrays: Mapping[str, Tensor]
    ) -> AffineGrid:
        group, transposed = fields.get("group"), fields.get("transposed", 0)
        check_bits(bits)
        _check_group(group)
        if type(transposed) is not int or transposed < 0 or len(shape) < 2 or not math.prod(shape):
            raise CompressionError(f"a weight {shape} with transposed={transposed!r} has no grid.")
        if transposed and shape[0] % transposed:
            raise CompressionError(f"a weight {shape} is none of a transposed convolution of {transposed} groups.")
        if extra := [*(fields.keys() - {"group", "transposed"}), *(arrays.keys() - {"scale", "zero"})]:
            raise CompressionError(f"a grid of evenly spaced values has no {extra[0]!r}.")
        layout = Layout(shape, group, transposed)
        middle = torch.full((layout.count,), 2 ** (bits - 1), dtype=torch.uint8)
        scale, zero = arrays.get("scale"), arrays.get("zero", middle)
        if scale is None or scale.dtype != torch.float32 or scale.shape != (layout.count,):
            raise CompressionError(f"a grid for {shape} needs {layout.count} scales of float32.")
        if zero.dtype != torch.uint8 or zero.shape != (layout.count,) or int(zero.max()) >= 2**bits:
            raise CompressionError(f"a grid for {shape} needs {layout.count} codes of {bits} bits that stand for 0.")
        if not bool((scale.isfinite() & (scale >= _TINY)).all()):
            raise CompressionError("a scale is not a normal positive number.")
        return AffineGrid(bits, scale.clone(), zero.clone(), layout)

    def frozen(self) -> AffineGrid:
        return self

    def extra_repr(self) -> str:
        group = self.layout.group
        share = {None: "channel", "tensor": "tensor"}.get(group, f"{group} weights")  # type: ignore[arg-type]
        return f"{self.bits} bits, a scale per {share}"

    def _broadcast(self) -> tuple[Tensor, Tensor]:
        return self.layout.spread(self.scale), self.layout.spread(self.zero.to(self.scale.dtype))


class FakeQuantize(AffineGrid):
    """Rounds a weight to a grid, and lets the gradient through the rounding: what is stored stays float and trains.

    The gradient of a weight beyond the grid is zero. Where the scales are learned, theirs is that of the learned step
    size. Made by `of`; the arguments are those of `AffineGrid`, and:

    Args:
        symmetric: never use code 0, so that there are as many values below 0 as above.
        learned_step: whether the scales are a parameter. Else they stay as they are.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153. They take one step for a layer,
    start from ``2 mean(|w|) / sqrt(largest code)``, and use one more code below 0 than above; here there may be a step
    for each channel or group, which starts from the scale that was asked for, and codes are symmetric.
    """

    def __init__(
        self, bits: int, scale: Tensor, zero: Tensor, layout: Layout, *, symmetric: bool, learned_step: bool
    ) -> None:
        super().__init__(bits, scale, zero, layout)
        self.symmetric = symmetric
        if learned_step:
            del self.scale
            self.scale = nn.Parameter(scale)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bits: int,
        *,
        group: Group = None,
        symmetric: bool = True,
        learned_step: bool = False,
        scale: str = "mse",
        transposed: int = 0,
    ) -> Self:
        """Return the step for a weight, with scales that suit it.

        Example:
            >>> weight = torch.tensor([[-0.9, -0.2, 0.0, 0.3], [0.0, 1.0, 2.0, 7.0]])
            >>> FakeQuantize.of(weight, 4, scale="max", symmetric=False)(weight)
            tensor([[-0.8800, -0.1600,  0.0000,  0.3200],
                    [ 0.0000,  0.9333,  1.8667,  7.0000]])
        """
        layout = Layout(tuple(weight.shape), group, transposed)
        rows = layout.gathered(weight.detach().float())
        top = 2**bits - 1
        if symmetric:
            steps = rows.abs().amax(1) / (2 ** (bits - 1) - 1)
        else:
            steps = (rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)) / top
        steps = torch.where(steps >= _TINY, steps, 1.0)
        zero = torch.full_like(steps, 2 ** (bits - 1)) if symmetric else (-rows.amin(1).clamp(max=0) / steps).round()
        if scale == "mse":
            steps = _least_error(rows, steps, zero, int(symmetric), top)
        return cls(bits, steps, zero.to(torch.uint8), layout, symmetric=symmetric, learned_step=learned_step)

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero = self._broadcast()
        largest = 2 ** (self.bits - 1) - 1
        learned = isinstance(self.scale, nn.Parameter)
        # A largest weight that is only by its rounding beyond the largest value still has a gradient.
        margin, factor = (0.0, (self.layout.size * largest) ** -0.5) if learned else (0.5, 0.0)
        rounded: Tensor = _Round.apply(weight, scale, zero, int(self.symmetric), 2**self.bits - 1, margin, factor)
        return rounded

    def frozen(self) -> AffineGrid:
        scale, zero = self._positive().detach().clone(), self.zero.clone()
        return AffineGrid(self.bits, scale, zero, self.layout)

    def _takes(self, zero: Tensor) -> bool:
        middle = 2 ** (self.bits - 1)
        return super()._takes(zero) and (not self.symmetric or zero.is_meta or bool((zero == middle).all()))

    def _positive(self) -> Tensor:
        # An optimizer may push a learned scale through 0; below 0 it gives the same values as above.
        return self.scale.abs().clamp(min=_TINY) if isinstance(self.scale, nn.Parameter) else self.scale

    def _broadcast(self) -> tuple[Tensor, Tensor]:
        return self.layout.spread(self._positive()), self.layout.spread(self.zero.to(self.scale.dtype))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, margin: float, factor: float
    ) -> Tensor:
        ratio = weight / scale
        steps = (ratio.round() + zero).clamp(low, high) - zero
        place = ratio + zero
        inside = (place > low - margin) & (place < high + margin)
        slope = torch.where(inside, steps - ratio, steps) * factor if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, slope)
        ctx.shape = scale.shape
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (inside, slope) = grads, ctx.saved_tensors
        to_weight = grad * inside if ctx.needs_input_grad[0] else None
        to_scale = None if slope is None else (grad * slope).sum_to_size(ctx.shape)
        return to_weight, to_scale, None, None, None, None, None


def _least_error(rows: Tensor, steps: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Return that share of the steps with which each row is rounded with the least squared error."""
    best, least = steps, torch.full_like(steps, torch.inf)
    for share in _SHARES:
        step = (steps * share).clamp(min=_TINY)
        codes = (rows / step[:, None]).round_().add_(zero[:, None]).clamp_(low, high)
        error = codes.sub_(zero[:, None]).mul_(step[:, None]).sub_(rows).square_().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def quantize(
    model: nn.Module,
    bits: int | Mapping[str, int] = 4,
    *,
    group: Group = None,
    symmetric: bool = True,
    learned_step: bool = False,
    scale: str = "mse",
    exclude: Sequence[str] = (),
    inplace: bool = False,
) -> nn.Module:
    """Return the model with weights of few bits, which train on as floats behind their rounding.

    All weights of convolutions, linear layers and attention are rounded, the first and the last layer, too: these lose
    most, so `exclude` them where accuracy matters more than bytes. Biases, norms, embeddings and activations stay
    float. A masked model may be quantized; its masked weights stay exactly zero.

    It is smaller when saved by `compress.save`, and not faster: it computes with floats. With 2 or 3 bits the
    statistics of batch norms no longer fit: without further training, call `nasbench.training.recalibrate`.

    Training goes on as before, in any loop. Scales stay as they are, unless they are learned: take
    ``learned_step=True`` for more than a short fine-tuning, and make the optimizer afterwards, as the scales are
    parameters then. They have one axis, so that those who spare biases and norms weight decay spare them, too.

    Args:
        model: any module of float32 weights; it stays as it is unless `inplace`.
        bits: 2 to 8; or a mapping of layers to bits, such as `assign_bits` returns, where layers that it does not name
            stay float.
        group: which weights share a scale: None: those of an output channel; a number, such as 64: so many consecutive
            ones of a channel; "tensor": all of a layer.
        symmetric: values from ``-(2^(bits-1) - 1)`` to ``2^(bits-1) - 1`` times the scale, so three values for 2 bits.
            If False, ``2^bits`` values from the least to the largest weight, 0 among them.
        learned_step: learn the scales in training; needs symmetric values.
        scale: how the scales are chosen: "mse": those of 32, from the full range to a tenth of it, that round with the
            least squared error; "max": the largest weight is the largest value.
        exclude: names of layers, of modules that hold layers, or of parameters, that stay float.
        inplace: change the model itself. Its Parameter objects stay.

    Raises:
        CompressionError: the model is no module, on the ``meta`` device, or has no weights; a setting is out of range;
            a name is unknown; a weight is tied, parametrized other than by a mask, quantized already, computed from
            others, not float32, or not finite. The model is unchanged then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> small = quantize(net, bits=3, exclude=["0"])
        >>> max(len(row.unique()) for row in small[3].weight)
        7

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
    CVPR 2018, arXiv:1712.05877, for weights alone; with `learned_step` see `FakeQuantize`.
    """
    widths = _widths(model, bits, exclude)
    check_settings(group, scale)
    if learned_step and not symmetric:
        raise CompressionError("learned_step=True learns scales of symmetric values; leave out symmetric=False.")
    target = model if inplace else copy_of(model)
    own = weights(target)
    for name, width in widths.items():
        weight = own[name]
        step = fake_quantize(weight, width, group=group, symmetric=symmetric, learned_step=learned_step, scale=scale)
        attach_low_bit(weight.module, weight.attribute, step)
    return target


def fake_quantize(weight: Weight, bits: int, **settings: Any) -> FakeQuantize:
    """Return the step that rounds a weight of a model, behind its mask; the settings are those of `FakeQuantize.of`."""
    layer = weight.module
    transposed = layer.groups if isinstance(layer, _ConvTransposeNd) else 0
    with torch.no_grad():
        return FakeQuantize.of(getattr(layer, weight.attribute), bits, transposed=transposed, **settings)


def check_settings(group: Group, scale: str) -> None:
    """Refuse settings of `quantize` that make no sense.

    Raises:
        CompressionError: says which.
    """
    _check_group(group)
    if scale not in SCALES:
        raise CompressionError(f"there is no way {scale!r} to choose scales; {nearest(scale, SCALES)}")


def quantizable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Weight]:
    """Return the weights that can be given few bits: all of `weights` but those excluded by name, masked ones too.

    Args:
        model: any module.
        exclude: names of layers, of modules that hold layers, or of parameters.

    Raises:
        CompressionError: see `quantize`.

    Example:
        >>> list(quantizable(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]))
        ['0']
    """
    require_values(model)
    left = chosen(model, exclude, "quantize")
    holders = holders_of(model)
    for weight in left.values():
        _check(weight, holders)
    return left


def _check(weight: Weight, holders: Mapping[int, list[str]]) -> None:
    name = weight.name
    if weight.low_bit is not None:
        raise CompressionError(
            f"{name!r} is of few bits already; compress.finalize(model) makes such weights ordinary ones."
        )
    chains: Any = getattr(weight.module, "parametrizations", {})
    if weight.attribute in chains and not all(isinstance(step, Mask) for step in chains[weight.attribute]):
        raise CompressionError(
            f"{name!r} is parametrized already; remove that first (torch.nn.utils.parametrize), or exclude it."
        )
    require_own_parameter(weight, holders)
    parameter = weight.parameter
    if parameter.dtype != torch.float32:
        raise CompressionError(f"the weight of {name!r} is {parameter.dtype}; call model.float() first.")
    if not parameter.numel() or not bool(parameter.detach().isfinite().all()):
        raise CompressionError(f"the weight of {name!r} is empty or not finite everywhere, so it has no grid.")


def _widths(model: nn.Module, bits: int | Mapping[str, int], exclude: Sequence[str]) -> dict[str, int]:
    """Return the bits of each layer that gets few."""
    if not isinstance(bits, Mapping):
        check_bits(bits)
        return dict.fromkeys(quantizable(model, exclude), bits)
    for name, width in bits.items():
        check_bits(width, f"bits[{name!r}]")
    return {name: bits[name] for name in named(model, bits, exclude, "bits", quantizable)}


def _check_group(group: Any) -> None:
    if group is not None and group != "tensor" and (type(group) is not int or group < 1):
        raise CompressionError(
            f"group is None for a scale per channel, a number of weights from 1, or 'tensor', got {group!r}."
        )
