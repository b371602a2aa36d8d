"""Masks over weights: which entries of a weight count, by score or for good. Shared by DASS and by `compress`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def keep_count(density: float, total: int) -> int:
    """Return how many of `total` weights a density keeps: ``round(density * total)``, and at least one.

    Example:
        >>> keep_count(0.1, 10), keep_count(0.001, 10), keep_count(1.0, 10)
        (1, 1, 10)

    Source: the released code of DASS keeps ``n - floor((1 - k) * n)``, whose floating-point floor is off by one
    (``k=0.9, n=10`` masks nothing).
    """
    return min(total, max(1, round(density * total)))


def top_k_mask(scores: Tensor, keep: int) -> Tensor:
    """Return a boolean mask of the `keep` largest scores, of their shape; of equal ones, the first in memory order.

    Raises:
        ValueError: `keep` is not between 0 and the number of scores, or a score is not a number.

    Example:
        >>> top_k_mask(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 3)
        tensor([[ True,  True],
                [False,  True]])
    """
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"asked to keep {keep} of {scores.numel()} scores")
    flat = scores.detach().reshape(-1)
    if bool(torch.isnan(flat).any()):
        raise ValueError("some scores are not a number (NaN), so none of them can be ranked")
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    if keep == 0:
        return mask.view(scores.shape)
    threshold = torch.kthvalue(flat, flat.numel() - keep + 1).values
    above = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)[: keep - int(above.sum())]
    mask.copy_(above)
    mask[ties] = True
    return mask.view(scores.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scores, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, scores, mask = ctx.saved_tensors
        (grad,) = grads
        to_weight = grad * mask if ctx.needs_input_grad[0] else None
        to_scores = grad * weight * scores.sign() if ctx.needs_input_grad[1] else None
        return to_weight, to_scores, None


def straight_through(weight: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Return the weight with all but the `keep` entries of largest absolute score set to zero.

    Backward, the weight gets the gradient of the kept entries; the scores get, kept or not, that of the masked weight
    times the weight times the sign of the score, as if the mask were the score's absolute value.

    Args:
        weight: any shape.
        scores: of the same shape.
        keep: how many entries are kept.

    Example:
        >>> weight, scores = torch.tensor([2.0, 3.0]), torch.tensor([0.1, -0.5], requires_grad=True)
        >>> straight_through(weight, scores, 1).sum().backward()
        >>> scores.grad
        tensor([ 2., -3.])

    Source: Ramanujan et al., What's Hidden in a Randomly Weighted Neural Network?, CVPR 2020, arXiv:1911.13299, with
    absolute scores as in Sehwag et al., HYDRA, NeurIPS 2020, arXiv:2002.10509.
    """
    masked: Tensor = _StraightThrough.apply(weight, scores, top_k_mask(scores.abs(), keep))
    return masked


class Mask(nn.Module):
    """A parametrization that multiplies a weight with a boolean mask, one byte for each entry, in `state_dict`.

    The gradient of a masked entry is exactly zero.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is stored when the masked weight is assigned: the masked entries are zero."""
        return weight * self.mask

    def extra_repr(self) -> str:
        kept = "?" if self.mask.is_meta else f"{int(self.mask.sum()):,}"
        return f"{kept} of {self.mask.numel():,} kept"


def attach(module: nn.Module, name: str, mask: Tensor) -> None:
    """Mask a parameter of a module from now on, and set its masked entries to zero; the Parameter stays the same one.

    A `state_dict` of the module without masks can be loaded afterwards: its masked entries are dropped.

    Args:
        module: the owner of the parameter.
        name: the parameter's name in it, such as "weight".
        mask: boolean, of the parameter's shape.

    Raises:
        ValueError: the mask is not boolean or has another shape, or the parameter is parametrized already.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> attach(layer, "weight", torch.eye(2, dtype=torch.bool))
        >>> layer.weight == 0
        tensor([[False,  True],
                [ True, False]])
    """
    parameter = getattr(module, name)
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; give torch.bool of shape "
            f"{tuple(parameter.shape)}"
        )
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{name!r} is parametrized already; remove that first (torch.nn.utils.parametrize)")
    first = not _has_masks(module)
    own_class(module)
    own = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)  # device, memory format
    with torch.no_grad():
        parameter.mul_(own)
    parametrize.register_parametrization(module, name, Mask(own), unsafe=True)
    if first:
        module.register_load_state_dict_pre_hook(_load_unmasked)


def detach(module: nn.Module, name: str) -> None:
    """Make the masked weight an ordinary parameter again, its masked entries zero; the Parameter stays the same one."""
    masked = getattr(module, name).detach()
    own_class(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    with torch.no_grad():
        getattr(module, name).copy_(masked)
    if not _has_masks(module):
        hooks = module._load_state_dict_pre_hooks  # a handle of it would not survive a deep copy
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _load_unmasked]:
            del hooks[key]


def mask_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the mask of a module's parameter, or None if it has none."""
    if not parametrize.is_parametrized(module, name):
        return None
    steps = module.parametrizations[name]  # type: ignore[index]
    return next((step.mask for step in steps if isinstance(step, Mask)), None)


def _has_masks(module: nn.Module) -> bool:
    return any(mask_of(module, name) is not None for name in getattr(module, "parametrizations", ()))


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    Torch keeps the parametrized names as properties of a class, which deep copies share: what it adds to or removes
    from one of them would break the others.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _load_unmasked(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the entries of a module without masks stand for those of one with masks."""
    for name, steps in getattr(module, "parametrizations", {}).items():
        if f"{prefix}{name}" not in state or not isinstance(steps[0], Mask) or steps[0].mask.is_meta:
            continue
        plain = state.pop(f"{prefix}{name}")
        inner = f"{prefix}parametrizations.{name}"
        mask = steps[0].mask
        if plain.shape == mask.shape:
            plain = plain * mask.to(plain.device)
        state.setdefault(f"{inner}.original", plain)
        state.setdefault(f"{inner}.0.mask", mask)
