"""The two steps of a one-shot search as functions: weights on training images, architecture on validation images.

Neither the weights nor a buffer of the supernet are changed by an architecture step, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from search_spaces.base import Mixture, Supernet

Batch = tuple[Tensor, Tensor]
Mix = Callable[[], Mixture]
"""Gives the mixture of one forward, differentiable in the architecture weights."""

PERTURBATION = 0.01
"""Length of the finite difference's step in weight space, divided by the norm of the validation gradient."""


def weight_gradients(
    supernet: Supernet, mixture: Mixture, batch: Batch, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Set the gradients of the weights that the mixture uses, averaged over processes; return loss and logits."""
    x, y = batch
    for parameter in supernet.parameters():
        parameter.grad = None
    logits = supernet(x, _constant(mixture))
    loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    loss.backward()
    average([p.grad for p in supernet.parameters() if p.grad is not None])
    return loss.detach(), logits.detach()


def first_order(
    supernet: Supernet, mix: Mix, architecture: Sequence[Tensor], batch: Batch, penalty: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the validation loss, and its gradient with respect to the architecture weights for weights held fixed.

    Nothing is computed for the weights: they do not ask for gradients meanwhile.

    Args:
        architecture: the architecture weights, leaves that `mix` depends on.
        batch: validation images and labels.
        penalty: added to the loss, a function of the architecture weights.
    """
    with _still(supernet), _fixed(supernet):
        loss = _loss(supernet, mix, batch)
        total = loss if penalty is None else loss + penalty.to(loss.device)
        gradients = _gradients(total, architecture)
    average(gradients)
    return loss.detach(), gradients


def second_order(
    supernet: Supernet,
    mix: Mix,
    architecture: Sequence[Tensor],
    train: Batch,
    val: Batch,
    optimizer: torch.optim.Optimizer,
    penalty: Tensor | None = None,
    *,
    exact: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Return the validation loss after one step on the training batch, and its gradient through that step.

    The step is w' = w - lr (momentum * buffer + gradient + decay * w), with the optimizer's present learning rate and
    buffers. The gradient is that of L_val(w', a) with respect to a, minus lr times the `mixed_derivative` of L_train at
    w along the gradient of L_val at w'.

    Args:
        optimizer: SGD of the supernet's weights, without Nesterov's momentum: the step is its own but for clipping.
        exact: see `mixed_derivative`.

    Source: Liu et al., DARTS, ICLR 2019, arXiv:1806.09055, equations 7 and 8. The authors' code copies the model and
    adds and subtracts the steps, which rounds; we put the very weights back.
    """
    loss, direct, v = step_ahead(supernet, mix, architecture, train, val, optimizer, penalty)
    mixed = mixed_derivative(supernet, mix, architecture, train, v, exact=exact)
    (step,) = {group["lr"] for group in optimizer.param_groups}
    gradients = [first - step * second for first, second in zip(direct, mixed, strict=True)]
    average(gradients)
    return loss, gradients


def step_ahead(
    supernet: Supernet,
    mix: Mix,
    architecture: Sequence[Tensor],
    train: Batch,
    val: Batch,
    optimizer: torch.optim.Optimizer,
    penalty: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the validation loss after one training step, its gradient in the architecture, and in the weights there.

    The weights are put back; see `second_order` for the step.
    """
    weights = _weights(supernet)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    with _still(supernet):
        moves = _gradients(_loss(supernet, lambda: _constant(mix()), train), weights)
        average(moves)
        with torch.no_grad():
            for weight, move in zip(weights, moves, strict=True):
                group = groups[id(weight)]
                move.add_(weight, alpha=group["weight_decay"])
                buffer = optimizer.state.get(weight, {}).get("momentum_buffer")
                if buffer is not None:
                    move.add_(buffer, alpha=group["momentum"])
                move.mul_(-group["lr"])
        with _moved(weights, moves, 1.0):
            loss = _loss(supernet, mix, val)
            total = loss if penalty is None else loss + penalty.to(loss.device)
            both = _gradients(total, [*architecture, *weights])
    v = both[len(architecture) :]
    average(v)
    return loss.detach(), both[: len(architecture)], v


def mixed_derivative(
    supernet: Supernet, mix: Mix, architecture: Sequence[Tensor], batch: Batch, v: Sequence[Tensor], *, exact: bool
) -> list[Tensor]:
    """Return the derivative in the architecture of the loss's derivative in the weights along `v`.

    Args:
        exact: differentiate twice; else take a central finite difference over a step of 0.01 / norm(v) along v, as
            published. ReLUs and max pools have kinks, which the first does not see and the second averages over: the
            two can be far apart.
    """
    weights = _weights(supernet)
    with _still(supernet):
        if exact:
            with _twice_differentiable():
                loss = _loss(supernet, mix, batch)
                inner = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
                product = torch.stack([(a * b).sum() for a, b in zip(inner, v, strict=True)]).sum()
                return _gradients(product, architecture)
        epsilon = PERTURBATION / float(nn.utils.get_total_norm(v))
        sides = []
        with _fixed(supernet):
            for sign in (1, -1):
                with _moved(weights, v, sign * epsilon):
                    sides.append(_gradients(_loss(supernet, mix, batch), architecture))
    return [(plus - minus) / (2 * epsilon) for plus, minus in zip(*sides, strict=True)]


def dominant_eigenvalue(
    supernet: Supernet, mix: Mix, architecture: Sequence[Tensor], batch: Batch, rng: torch.Generator, steps: int = 20
) -> float:
    """Return the eigenvalue of largest size of the validation loss's Hessian in the architecture weights.

    By power iteration with exact products. As it grows during a search, the cell it finds gets worse at evaluation.

    Source: Zela et al., Understanding and Robustifying Differentiable Architecture Search, ICLR 2020, arXiv:1909.09656.
    They build the whole Hessian; we iterate.
    """
    with _still(supernet), _fixed(supernet), _twice_differentiable():
        gradients = torch.autograd.grad(
            _loss(supernet, mix, batch), architecture, create_graph=True, materialize_grads=True
        )
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        vector = torch.randn(len(flat), generator=rng).to(flat)
        value = torch.zeros((), dtype=flat.dtype)
        for _ in range(steps):
            vector = vector / vector.norm()
            product = torch.autograd.grad(flat @ vector, architecture, retain_graph=True, materialize_grads=True)
            image = torch.cat([part.flatten() for part in product])
            value, vector = vector @ image, image
            if not float(image.norm()) > 0:
                break
    return float(value)


def average(tensors: Sequence[Tensor]) -> None:
    """Average tensors over the processes of a data-parallel search, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1 and tensors:
        for kind in {(t.dtype, t.device) for t in tensors}:
            own = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = torch.cat([t.flatten() for t in own])
            place = flat.device
            if dist.get_backend() == "nccl" and place.type == "cpu":  # architecture weights live on the host
                flat = flat.cuda()
            dist.all_reduce(flat)
            flat = flat.to(place).div_(dist.get_world_size())
            parts = flat.split([t.numel() for t in own])
            torch._foreach_copy_(own, [part.view_as(t) for part, t in zip(parts, own, strict=True)])


def _twice_differentiable() -> AbstractContextManager[None]:
    """Let attention be computed by kernels that can be differentiated twice; torch's fused ones cannot."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


def _loss(supernet: Supernet, mix: Mix, batch: Batch) -> Tensor:
    return F.cross_entropy(supernet(batch[0], mix()), batch[1])


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:  # a drawn path may lead nowhere: the loss then depends on none of them
        return [torch.zeros_like(each) for each in inputs]
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def _constant(mixture: Mixture) -> Mixture:
    return mixture.map(Tensor.detach)


def _weights(supernet: Supernet) -> list[nn.Parameter]:
    return [parameter for parameter in supernet.parameters() if parameter.requires_grad]


@contextmanager
def _moved(weights: Sequence[Tensor], along: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Move the weights while the block runs; afterwards they are the very same."""
    with torch.no_grad():
        kept = [weight.clone() for weight in weights]
        torch._foreach_add_(list(weights), list(along), alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), kept)


@contextmanager
def _still(supernet: Supernet) -> Iterator[None]:
    """Let batch norms use batch statistics as in training, but record none."""
    norms = [m for m in supernet.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def _fixed(supernet: Supernet) -> Iterator[None]:
    """Let the weights ask for no gradient."""
    weights = _weights(supernet)
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
