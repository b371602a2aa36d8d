"""What each weight is worth before or after training: magnitude, SNIP, GraSP and SynFlow.

The larger a score, the sooner the weight is kept. All of them work on a copy of the model: its weights, mode,
statistics and gradients, and torch's random state stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from compress.errors import CompressionError
from compress.models import copy_of, differentiable, require_values
from compress.weights import weights

Scores = dict[str, Tensor]
Loss = Callable[[Any, Any], Tensor]

_TEMPERATURE = 200  # by which GraSP divides the logits
_TINY = 1e-100  # SynFlow's input: so small that all activations are in their linear range


def magnitude(model: nn.Module, names: Sequence[str]) -> Scores:
    """Return the absolute weights.

    Args:
        model: any module.
        names: weights of it, as `compress.weights` calls them.

    Raises:
        CompressionError: a weight is not finite, all are zero, or the model is on the ``meta`` device.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = nn.init.constant_(layer.weight, -0.5)
        >>> magnitude(layer, ["weight"])
        {'weight': tensor([[0.5000, 0.5000]])}
    """
    require_values(model)
    found = weights(model)
    return _usable({name: found[name].parameter.detach().abs() for name in names}, "magnitude")


def snip(
    model: nn.Module,
    names: Sequence[str],
    batch: tuple[Any, Any] | None,
    loss: Loss | None = None,
    *,
    seed: int = 0,
    fresh: bool = False,
) -> Scores:
    """Return how much the loss on a batch, in training mode, would change with each weight: ``|weight * gradient|``.

    That is the absolute gradient of a multiplicative mask where all of it is 1.

    Args:
        model: any module that takes x.
        names: weights of it, as `compress.weights` calls them.
        batch: (x, y), inputs and targets.
        loss: of outputs and targets; cross-entropy if None.
        seed: of dropout and fresh weights.
        fresh: whether to score Xavier-normal weights in place of the model's own of these names.

    Raises:
        CompressionError: there is no batch or it does not fit model and loss, the model is on the ``meta`` device, a
            score is not finite, or all are zero, as before a last layer of zeros.

    Example:
        >>> scores = snip(nn.Linear(4, 2), ["weight"], (torch.rand(8, 4), torch.arange(8) % 2))
        >>> scores["weight"].shape
        torch.Size([2, 4])

    Source: Lee et al., SNIP, ICLR 2019, arXiv:1810.02340.
    """
    x, y = _checked(batch, "snip")
    twin, parameters = _twin(model, names)
    with _isolated(parameters[0].device, seed):
        if fresh:
            for parameter in parameters:
                nn.init.xavier_normal_(parameter)
        grads = _gradients(twin.train(), parameters, x, y, loss or cross_entropy)
    products = [(parameter * grad).abs().detach() for parameter, grad in zip(parameters, grads, strict=True)]
    return _usable(dict(zip(names, products, strict=True)), "snip")


def grasp(
    model: nn.Module,
    names: Sequence[str],
    batch: tuple[Any, Any] | None,
    loss: Loss | None = None,
    *,
    seed: int = 0,
) -> Scores:
    """Return how much the flow of gradients would shrink without each weight: ``weight * (Hessian @ gradient)``.

    Outputs are divided by 200 before the loss. The batch goes through in two halves, with all classes in both: where y
    holds one class for each example, each class is halved. The paper takes 10 to 25 examples of each class.

    Args:
        model, names, batch, loss, seed: see `snip`.

    Raises:
        CompressionError: there is no batch of at least two or it does not fit model and loss, torch cannot take second
            derivatives of the model, it is on the ``meta`` device, a score is not finite, or all are zero.

    Example:
        >>> scores = grasp(nn.Linear(4, 2), ["weight"], (torch.rand(8, 4), torch.arange(8) % 2))
        >>> scores["weight"].shape
        torch.Size([2, 4])

    Source: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020,
    arXiv:2002.07376. Their score has the other sign and the largest are removed; their code sorts the batch by class
    and cuts it in the middle, so that the halves have different classes.
    """
    x, y = _checked(batch, "grasp")
    if len(x) < 2:
        raise CompressionError(f"GraSP halves the batch, which has {len(x)} example; give some of each class.")
    if y.ndim == 0 or len(y) != len(x):
        raise CompressionError(f"GraSP halves the batch: x and y must be of one length, got {_shapes(x, y)}.")
    twin, parameters = _twin(model, names)
    criterion = loss or cross_entropy
    by_class = y.ndim == 1 and not y.is_floating_point()
    order = torch.argsort(y, stable=True).to(x.device) if by_class else torch.arange(len(x), device=x.device)
    halves = [(x[half], y[half.to(y.device)]) for half in (order[::2], order[1::2])]

    def cooled(outputs: Any, targets: Any) -> Tensor:
        return criterion(outputs / _TEMPERATURE, targets)

    products = [torch.zeros_like(parameter) for parameter in parameters]
    twin.train()
    # Fused attention has no second derivative.
    with _isolated(parameters[0].device, seed), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        first = [_gradients(twin, parameters, *half, cooled) for half in halves]
        flow = [a + b for a, b in zip(*first, strict=True)]
        for half in halves:
            grads = _gradients(twin, parameters, *half, cooled, create_graph=True)
            dot = torch.stack([(own * grad).sum() for own, grad in zip(flow, grads, strict=True)]).sum()
            try:
                second = torch.autograd.grad(dot, parameters, materialize_grads=True)
            except RuntimeError as error:
                raise CompressionError(
                    f"GraSP needs second derivatives, which torch cannot take here: {error}. Take 'snip', 'synflow' or "
                    "'magnitude'."
                ) from error
            for product, part in zip(products, second, strict=True):
                product += part
    values = [(parameter * product).detach() for parameter, product in zip(parameters, products, strict=True)]
    return _usable(dict(zip(names, values, strict=True)), "grasp")


def synflow(
    model: nn.Module,
    names: Sequence[str],
    batch: tuple[Any, Any] | None,
    choose: Callable[[Scores, float], Scores],
    *,
    rounds: int = 100,
) -> Scores:
    """Return the masks left after many rounds of scoring by the flow through all paths, and pruning a little.

    The flow is the sum of outputs of a copy in double precision, in evaluation mode, with absolute weights, on equal
    inputs; a score is ``|weight * its gradient|``. In theory no layer is emptied before all are.

    Args:
        model, names: see `snip`.
        batch: (x, y), of which only the shape of one x is used.
        choose: masks of the scores at a part of the way, from 1 / rounds to 1. Weights that went before have score -1.
        rounds: how many times.

    Raises:
        CompressionError: there is no batch of floating-point inputs that the model takes, the model is on the ``meta``
            device, or no path has a score.

    Example:
        >>> from search_spaces.masks import top_k_mask
        >>> def halve(scores, part):
        ...     return {name: top_k_mask(own, round(own.numel() * 0.5**part)) for name, own in scores.items()}
        >>> masks = synflow(nn.Linear(4, 2), ["weight"], (torch.rand(8, 4), None), halve)
        >>> int(masks["weight"].sum())
        4

    Source: Tanaka et al., Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic Flow, NeurIPS
    2020, arXiv:2006.05467. Theirs also adds absolute biases, and feeds ones. Here biases and running means are zero and
    the inputs tiny, which ranks the same where there are none, and keeps activations such as ReLU6 from saturating.
    """
    x, _ = _checked(batch, "synflow")
    if not x.is_floating_point():
        raise CompressionError(
            f"SynFlow feeds equal numbers in place of x, which holds {x.dtype}; take another method."
        )
    twin, parameters = _twin(model, names)
    twin.double().eval()
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            if name.rpartition(".")[2] in ("bias", "running_mean"):
                tensor.zero_()
            elif isinstance(tensor, nn.Parameter):
                tensor.abs_()
    ones = torch.full_like(x[:1], _TINY, dtype=torch.double, device=parameters[0].device)
    masks = {name: torch.ones_like(own, dtype=torch.bool) for name, own in zip(names, parameters, strict=True)}
    for step in tqdm(range(1, rounds + 1), desc="synflow", unit="round", leave=False, delay=1):
        try:
            with torch.enable_grad():
                grads = torch.autograd.grad(twin(ones).sum(), parameters, materialize_grads=True)
        except Exception as error:
            raise CompressionError(f"the flow of an input as {_shapes(x)} cannot be computed: {error}") from error
        flows = [(parameter.detach() * grad).abs_() for parameter, grad in zip(parameters, grads, strict=True)]
        found = _usable(dict(zip(names, flows, strict=True)), "synflow")
        masks = choose({name: own.masked_fill_(~masks[name], -1.0) for name, own in found.items()}, step / rounds)
        with torch.no_grad():
            for name, parameter in zip(names, parameters, strict=True):
                parameter.mul_(masks[name])
    return masks


def _twin(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, list[Tensor]]:
    """Return a copy of the model to score, and its weights."""
    require_values(model)
    twin = copy_of(model)
    found = weights(twin)
    return twin, [found[name].parameter.requires_grad_() for name in names]


def _gradients(
    model: nn.Module, parameters: Sequence[Tensor], x: Any, y: Any, loss: Loss, create_graph: bool = False
) -> tuple[Tensor, ...]:
    device = parameters[0].device
    try:
        with torch.enable_grad():
            value = loss(model(differentiable(model, x.to(device))), y.to(device))
            return torch.autograd.grad(value, parameters, create_graph=create_graph, materialize_grads=True)
    except Exception as error:
        raise CompressionError(
            f"the gradient of the loss cannot be computed for a batch of {_shapes(x, y)}: {error}"
        ) from error


def _shapes(x: Tensor, y: Tensor | None = None) -> str:
    """Return the shapes of a batch in words."""
    parts = {"x": x} if y is None else {"x": x, "y": y}
    return " and ".join(f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype}" for name, tensor in parts.items())


@contextmanager
def _isolated(device: torch.device, seed: int) -> Iterator[None]:
    """Give what runs inside random numbers of its own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def _checked(batch: tuple[Any, Any] | None, method: str) -> tuple[Any, Any]:
    if batch is None and method == "synflow":
        raise CompressionError(
            "'synflow' needs batch=(x, None) for the shape of x alone: any tensor of the shape of inputs will do."
        )
    if batch is None:
        raise CompressionError(f"{method!r} needs data to score the weights: give batch=(x, y), inputs and targets.")
    x, y = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
    if not (isinstance(x, Tensor) and x.ndim and len(x) and (isinstance(y, Tensor) or method == "synflow")):
        got = f"({type(x).__name__}, {type(y).__name__})" if x is not None else type(batch).__name__
        raise CompressionError(f"batch is (x, y), tensors of inputs and of their targets, got {got}.")
    return x, y


def _usable(scores: Scores, method: str) -> Scores:
    for name, own in scores.items():
        if not bool(own.isfinite().all()):
            raise CompressionError(
                f"{method!r} gives weights of {name!r} scores that are not finite: a weight or an input is NaN or too "
                f"large for the network."
            )
    if not any(bool(own.any()) for own in scores.values()):
        raise CompressionError(
            f"{method!r} gives all weights the score 0, as where one layer, often the last, is all zeros: initialise "
            "it, or take another method."
        )
    return scores
