"""The named operations of the papers, as modules from (B, c_in, H, W) to (B, c_out, H / stride, W / stride)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class ConvBN(nn.Sequential):
    """Convolution without bias, padded to keep the image size at stride 1, then batch norm. Torch's own initialisation.

    Example:
        >>> ConvBN(3, 8, kernel=3, stride=2)(torch.zeros(2, 3, 9, 9)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        super().__init__(OrderedDict(conv=conv, norm=nn.BatchNorm2d(c_out)))


class ReLUConvBN(nn.Sequential):
    """ReLU, convolution without bias, batch norm: the order of NAS-Bench-201, DARTS and NASNet.

    The ReLU leaves its input as it is, for other operations read the same tensor.

    Example:
        >>> ReLUConvBN(8, 8, kernel=1)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        super().__init__(OrderedDict(relu=nn.ReLU(), conv=conv, norm=nn.BatchNorm2d(c_out)))


class DropPath(nn.Module):
    """Drop the whole input of single examples, with probability `p`, and divide the others by ``1 - p``.

    Does nothing in evaluation or at ``p = 0``. Training sets `p` as it goes on (``Recipe(drop_path=...)``). Draws from
    torch's global generator, as dropout does.

    Args:
        p: probability of dropping an example, at least 0 and below 1.

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

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"DropPath was given p={p!r}; it is a probability, at least 0 and below 1.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * kept.div_(1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
