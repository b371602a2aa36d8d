"""What each channel of a network is worth: over all weights that make or read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressionError
from compress.models import differentiable
from search_spaces.channels import Channels, Group, Slot
from search_spaces.tracing import switched, undisturbed

Loss = Callable[[Any, Any], Tensor]


def channel_scores(
    found: Channels, method: str, batch: tuple[Any, Any] | None, loss: Loss | None, seed: int
) -> dict[Group, Tensor]:
    """Return for every group the score of each channel; see `compress.structured.prune_channels` for the methods.

    Raises:
        CompressionError: a score or the loss is not finite.
    """
    if method == "random":
        draw = torch.Generator().manual_seed(seed)
        return {group: torch.rand(group.size, generator=draw) for group in found.groups}
    named = found.model.named_parameters(remove_duplicate=False)
    values = {name: p.detach().float() for name, p in named if name.rpartition(".")[2] != "bias"}
    if method == "taylor":
        assert batch is not None
        gradients = _gradients(found.model, batch, loss)
        sums = {name: value * gradients[name].float() for name, value in values.items() if name in gradients}
    else:
        sums = {name: value**2 for name, value in values.items()}
    scores = {}
    for group in found.groups:
        total, count = torch.zeros(2, group.size)
        for slot in group.slots:
            if slot.tensor in sums:
                known = slot.channels >= 0
                places = slot.channels[known]
                own = torch.zeros(group.size).index_add(0, places, _summed(sums[slot.tensor], slot)[known])
                own = own.abs() if method == "taylor" else own.sqrt()
                if not bool(own.isfinite().all()):
                    raise CompressionError(
                        f"{slot.tensor!r} has weights or gradients that are not finite, so its channels have no order."
                    )
                here = torch.zeros(group.size).index_fill(0, places, 1.0)
                total += own / (own.sum() / here.sum()).clamp(min=torch.finfo(own.dtype).tiny)
                count += here
        scores[group] = total / count.clamp(min=1)
    return scores


def _summed(tensor: Tensor, slot: Slot) -> Tensor:
    """Return the sums over the weights of each position of a slot; a grouped convolution's are group after group."""
    parts = tensor.chunk(len(slot.channels) // tensor.shape[slot.axis])
    flat = [part.transpose(0, slot.axis).reshape(part.shape[slot.axis], -1) for part in parts]
    return torch.cat([part.sum(1) for part in flat]).cpu()


def _gradients(model: nn.Module, batch: tuple[Any, Any], loss: Loss | None) -> dict[str, Tensor]:
    inputs, targets = batch
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with switched(model, False), undisturbed(model), torch.enable_grad():
        outputs = model(*(differentiable(model, x) for x in (inputs if isinstance(inputs, tuple) else (inputs,))))
        value = (loss or F.cross_entropy)(outputs, targets)
        if not bool(torch.isfinite(value)):
            raise CompressionError(f"the loss on the batch is {value.item()}, so gradients say nothing.")
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}
