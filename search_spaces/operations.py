"""The named operations of the papers, as modules from (B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.base import ArchError, nearest
from search_spaces.sparse_operations import sparsified

DARTS_OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The eight operations of DARTS, in the order of its architecture weights."""

SPARSE_OPERATIONS = tuple(f"sparse_{name}" for name in DARTS_OPERATIONS if "conv" in name)
"""The convolutions among them whose weights are pruned as they are searched."""

NASNET_OPERATIONS = (
    "identity",
    "conv_1x3_3x1",
    "conv_1x7_7x1",
    "dilated_conv_3x3",
    "avg_pool_3x3",
    "max_pool_3x3",
    "max_pool_5x5",
    "max_pool_7x7",
    "conv_1x1",
    "conv_3x3",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
)
"""The thirteen operations of NASNet, in the order in which the paper lists them."""


def operation(name: str, c_in: int, c_out: int, stride: int = 1, *, search: bool = False) -> nn.Module:
    """Return an operation by its name: (B, c_in, H, W) to (B, c_out, H / stride, W / stride), rounded up.

    Every convolution is ReLU, convolution, batch norm. Average pools do not count padding. Where channels change, a
    pool is followed by a 1x1 convolution with batch norm, and ``identity``, also where it has a stride, becomes ReLU,
    1x1 convolution, batch norm; a strided ``skip_connect`` is a `FactorizedReduce`. A name that begins with ``sparse_``
    gives the operation with sparse convolutions (`SparseConv2d`).

    Args:
        search: as in a DARTS supernet: batch norms have no scale and shift, and one follows every pool.

    Raises:
        ArchError: there is no such operation (``none`` is no module: a network leaves it out), or it cannot change
            the number of channels.

    Example:
        >>> operation("sep_conv_3x3", 8, 16, stride=2)(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 3, 3])
    """
    if name.startswith("sparse_") and (plain := name.removeprefix("sparse_")) in _MAKERS:
        return sparsified(operation(plain, c_in, c_out, stride, search=search))
    if name not in _MAKERS:
        raise ArchError(f"there is no operation {name!r} to build; {nearest(name, _MAKERS)}")
    return _MAKERS[name](c_in, c_out, stride, not search)


class ConvBN(nn.Sequential):
    """Convolution without bias, padded to keep the image size at stride 1, then batch norm. Torch's own initialisation.

    Example:
        >>> ConvBN(3, 8, kernel=3, stride=2)(torch.zeros(2, 3, 9, 9)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, affine: bool = True, groups: int = 1
    ) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, norm=nn.BatchNorm2d(c_out, affine=affine)))


class ReLUConvBN(nn.Sequential):
    """ReLU, convolution without bias, batch norm: the order of NAS-Bench-201, DARTS and NASNet.

    The ReLU leaves its input as it is, for other operations read the same tensor. `affine` is that of the batch norm.

    Example:
        >>> ReLUConvBN(8, 8, kernel=1)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, affine: bool = True, dilation: int = 1
    ) -> None:
        padding = dilation * (kernel // 2)
        conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)
        super().__init__(OrderedDict(relu=nn.ReLU(), conv=conv, norm=nn.BatchNorm2d(c_out, affine=affine)))


class FactorizedConv(nn.Sequential):
    """ReLU, a 1 x kernel and a kernel x 1 convolution, each of which halves one side at stride 2, then batch norm.

    Example:
        >>> FactorizedConv(8, 16, kernel=7, stride=2)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 2, 2])
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, affine: bool = True) -> None:
        half = kernel // 2
        row = nn.Conv2d(c_in, c_out, (1, kernel), stride=(1, stride), padding=(0, half), bias=False)
        column = nn.Conv2d(c_out, c_out, (kernel, 1), stride=(stride, 1), padding=(half, 0), bias=False)
        norm = nn.BatchNorm2d(c_out, affine=affine)
        super().__init__(OrderedDict(relu=nn.ReLU(), row=row, column=column, norm=norm))


class SepConv(nn.Sequential):
    """ReLU, depthwise and 1x1 convolution, batch norm; then the same at stride 1. The first 1x1 sets the channels.

    Example:
        >>> SepConv(8, 16, kernel=5, stride=2)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 2, 2])
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, affine: bool = True) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (c, s) in enumerate(((c_in, stride), (c_out, 1)), start=1):
            parts[f"relu{i}"] = nn.ReLU()
            parts[f"depthwise{i}"] = nn.Conv2d(c, c, kernel, stride=s, padding=kernel // 2, groups=c, bias=False)
            parts[f"pointwise{i}"] = nn.Conv2d(c, c_out, 1, bias=False)
            parts[f"norm{i}"] = nn.BatchNorm2d(c_out, affine=affine)
        super().__init__(parts)


class DilConv(nn.Sequential):
    """ReLU, depthwise convolution of dilation 2, 1x1 convolution, batch norm.

    Example:
        >>> DilConv(8, 8, kernel=5)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, affine: bool = True) -> None:
        depthwise = nn.Conv2d(
            c_in, c_in, kernel, stride=stride, padding=kernel - 1, dilation=2, groups=c_in, bias=False
        )
        pointwise, norm = nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine)
        super().__init__(OrderedDict(relu=nn.ReLU(), depthwise=depthwise, pointwise=pointwise, norm=norm))


class FactorizedReduce(nn.Module):
    """Halve the image without losing pixels: two strided 1x1 convolutions, the second a pixel further, side by side.

    ReLU (unless ``relu=False``), the convolutions of half the channels each, batch norm. The map is shifted over a
    border of zeros, which only images of odd size get to see.

    Raises:
        ArchError: `c_out` is odd.

    Example:
        >>> FactorizedReduce(8, 16)(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(self, c_in: int, c_out: int, affine: bool = True, relu: bool = True) -> None:
        super().__init__()
        if c_out % 2:
            raise ArchError(
                f"a factorized reduction to {c_out} channels has to make one half of them with each of two "
                "convolutions: give an even number of channels."
            )
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        shifted = F.pad(x, (-1, 1, -1, 1))
        out: Tensor = self.norm(torch.cat([self.conv1(x), self.conv2(shifted)], dim=1))
        return out


class DropPath(nn.Module):
    """Drop the whole input of single examples, with probability `p`, and divide the others by ``1 - p``.

    Does nothing in evaluation or at ``p = 0``. Training sets `p` as it goes on (``Recipe(drop_path=...)``). Draws from
    torch's global generator, as dropout does.

    Args:
        p: probability of dropping an example, at least 0 and below 1.
        depth: share of the recipe's probability that training gives to this one: below 1 for the first layers of a
            network whose schedule grows with depth (ScheduledDropPath).

    Raises:
        ValueError: `p` is outside this range.

    Example:
        >>> path = DropPath(0.5)
        >>> sorted(set(path(torch.ones(64, 3)).flatten().tolist()))
        [0.0, 2.0]
        >>> path.eval()(torch.ones(1, 3))
        tensor([[1., 1., 1.]])

    Source: Larsson et al., FractalNet, ICLR 2017, arXiv:1605.07648; per example as in Huang et al., Deep Networks with
    Stochastic Depth, ECCV 2016, arXiv:1603.09382, with the scaling moved from evaluation to training.
    """

    def __init__(self, p: float = 0.0, depth: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"DropPath was given p={p!r}; it is a probability, at least 0 and below 1.")
        self.p = p
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * kept.div_(1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _pool(kind: type[nn.MaxPool2d] | type[nn.AvgPool2d], kernel: int) -> Callable[[int, int, int, bool], nn.Module]:
    settings = {"count_include_pad": False} if kind is nn.AvgPool2d else {}

    def make(c_in: int, c_out: int, stride: int, affine: bool) -> nn.Module:
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            pool=kind(kernel, stride=stride, padding=kernel // 2, **settings)
        )
        if c_in != c_out:
            parts["conv"] = nn.Conv2d(c_in, c_out, 1, bias=False)
        if c_in != c_out or not affine:
            parts["norm"] = nn.BatchNorm2d(c_out, affine=affine)
        return nn.Sequential(parts) if len(parts) > 1 else parts["pool"]

    return make


def _identity(c_in: int, c_out: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 and c_in == c_out else ReLUConvBN(c_in, c_out, 1, stride, affine)


def _skip_connect(c_in: int, c_out: int, stride: int, affine: bool) -> nn.Module:
    if stride == 2:
        return FactorizedReduce(c_in, c_out, affine)
    return _identity(c_in, c_out, stride, affine)


def _conv(kind: Callable[..., nn.Module], kernel: int, **settings: int) -> Callable[[int, int, int, bool], nn.Module]:
    return lambda c_in, c_out, stride, affine: kind(c_in, c_out, kernel, stride, affine, **settings)


_MAKERS: dict[str, Callable[[int, int, int, bool], nn.Module]] = {  # (c_in, c_out, stride, affine)
    "identity": _identity,
    "skip_connect": _skip_connect,
    "avg_pool_3x3": _pool(nn.AvgPool2d, 3),
    **{f"max_pool_{k}x{k}": _pool(nn.MaxPool2d, k) for k in (3, 5, 7)},
    **{f"conv_{k}x{k}": _conv(ReLUConvBN, k) for k in (1, 3)},
    **{f"conv_1x{k}_{k}x1": _conv(FactorizedConv, k) for k in (3, 7)},
    "dilated_conv_3x3": _conv(ReLUConvBN, 3, dilation=2),
    **{f"sep_conv_{k}x{k}": _conv(SepConv, k) for k in (3, 5, 7)},
    **{f"dil_conv_{k}x{k}": _conv(DilConv, k) for k in (3, 5)},
}
