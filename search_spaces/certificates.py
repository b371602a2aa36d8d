"""What growth did to a network: how its weights moved, and how far its outputs did."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from search_spaces.tracing import GrowthError, copied, switched

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # of Adam, RMSprop, Adagrad
_LINEAR = ("momentum_buffer", "exp_avg", "grad_avg", "exp_inf")  # of SGD and RMSprop, Adam, RMSprop, Adamax


class Map(Protocol):
    """What becomes of a parameter: `ParameterMap`, or `Padding`."""

    def values(self, tensor: Tensor) -> Tensor:
        """Return what the tensor becomes."""

    def gradients(self, tensor: Tensor, power: int = 1) -> Tensor:
        """Return what a gradient of the tensor becomes, or its square (2), or what does not grow with it (0)."""


@dataclass(frozen=True)
class Padding:
    """A kernel with zeros around it.

    Attributes:
        sides: how many on each side, as `torch.nn.functional.pad` takes them.
    """

    sides: tuple[int, ...]

    def values(self, tensor: Tensor) -> Tensor:
        """Return the tensor with zeros around it."""
        return F.pad(tensor, self.sides)

    def gradients(self, tensor: Tensor, power: int = 1) -> Tensor:
        """Return the gradient with zeros around it."""
        return F.pad(tensor, self.sides)


@dataclass(frozen=True)
class Transfer:
    """How a grown network came from the one before it.

    Attributes:
        action: what was done, in words.
        changed: names of the layers that changed or were added, as they are called now.
        maps: by the names of parameters and buffers now, what became of those whose shape changed.
        renamed: modules that are called otherwise now: the name now, and the name before.
        added: parameters that were not there before.
    """

    action: str
    changed: tuple[str, ...]
    maps: Mapping[str, Map] = field(repr=False, default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    added: frozenset[str] = frozenset()

    def before(self, name: str) -> str | None:
        """Return what a parameter was called before; ``None`` if it is new."""
        if name in self.added:
            return None
        for now, then in self.renamed.items():
            if name.startswith(f"{now}."):
                return f"{then}{name[len(now) :]}"
        return name


@dataclass(frozen=True)
class Certificate:
    """What was done to a network, and how far its outputs moved.

    The largest differences between outputs, in float64: the same was done to a copy of the network in float64, with the
    same random numbers.

    Attributes:
        transfer: what was done.
        given: in evaluation, on the given example.
        random: in evaluation, on random batches of its shape.
        training: in training mode, on the given example; ``None`` where training fails on it. Where the network drops
            out, this is large: other numbers are drawn.
        rounding: of the network itself, with the rounding of its own precision: in evaluation, on the given example,
            relative to the largest output.
    """

    transfer: Transfer
    given: float
    random: float
    training: float | None
    rounding: float

    def __str__(self) -> str:
        training = "unknown" if self.training is None else f"{self.training:.1e}"
        return (
            f"{self.transfer.action}\n  changed: {', '.join(self.transfer.changed)}\n  largest difference in float64: "
            f"{self.given:.1e} on the example, {self.random:.1e} on random batches, {training} in training mode\n"
            f"  in its own precision: {self.rounding:.1e} of the largest output"
        )


Grow = Callable[[nn.Module, tuple[Any, ...]], tuple[nn.Module, Transfer]]


def certified(
    grow: Grow, model: nn.Module, inputs: tuple[Any, ...], generator: torch.Generator
) -> tuple[nn.Module, Certificate]:
    """Grow a network, and a copy of it in float64 in the same way, and compare both with what they were before.

    Args:
        grow: makes a larger network from a network and an example.
        model: the network; it stays as it is.
        inputs: the example.
        generator: where `grow` has its random numbers from.
    """
    state = generator.get_state()
    new, transfer = grow(model, inputs)
    generator.set_state(state)
    given = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    old = copied(model).double()
    own = torch.Generator().manual_seed(0)
    drawn = [tuple(_random(x, own) for x in given) for _ in range(2)]
    try:
        pair = [old, grow(old, given)[0]]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            with switched(model, False), switched(new, False):
                before, after = (_outputs(copied(network), inputs) for network in (model, new))
            first, *others = [_difference([network.eval() for network in pair], batch) for batch in (given, *drawn)]
            try:
                training = _difference([network.train() for network in pair], given)
            except ValueError:  # batch norm does not train on a single value
                training = None
    except Exception as error:
        raise GrowthError(
            f"{type(model).__name__} does not run in float64, in which a certificate is measured, or not on random "
            f"batches: {type(error).__name__}: {error} Leave the certificate out."
        ) from error
    largest = max((float(x.abs().max()) for x in before if x.numel()), default=0.0)
    return new, Certificate(transfer, first, max(others), training, _largest(before, after) / (largest or 1.0))


def _outputs(network: nn.Module, batch: tuple[Any, ...]) -> list[Tensor]:
    torch.default_generator.manual_seed(0)  # so that dropout drops the same where nothing changed before it
    outputs = [leaf for leaf in tree_leaves(network(*batch)) if isinstance(leaf, Tensor)]
    if not outputs:
        raise TypeError("it gives no tensors to compare.")
    return [leaf if leaf.is_floating_point() or leaf.is_complex() else leaf.double() for leaf in outputs]


def _difference(networks: list[nn.Module], batch: tuple[Any, ...]) -> float:
    return _largest(*(_outputs(network, batch) for network in networks))


def _largest(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference; infinite where only one of them is no number."""
    found = [0.0]
    for a, b in zip(before, after, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf))
        found += [float(difference.max())] if difference.numel() else []
    return max(found)


def _random(x: Any, generator: torch.Generator) -> Any:
    if not isinstance(x, Tensor) or x.dtype == torch.bool or not x.numel():
        return x
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    if x.is_complex():
        return x
    return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator, dtype=x.dtype).to(x.device)


def carry_momentum(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    new_optimizer: torch.optim.Optimizer,
    new_model: nn.Module,
    transfer: Transfer,
) -> None:
    """Give a fresh optimizer of a grown network the state that the old one would have: instead of starting again.

    Momentum is an average of gradients, and moves as gradients do: of a channel with c copies, each copy's filters get
    a c-th of the gradient, and the weights that read it get all of it (which for the weights themselves is the other
    way round). New layers start without state.

    Args:
        optimizer: of the network before.
        model: the network before.
        new_optimizer: of the network after; it is changed.
        new_model: the network after.
        transfer: what was done, ``certificate.transfer``.

    Raises:
        GrowthError: the optimizers are of different classes, the networks and optimizers do not belong together, or the
            optimizer keeps something else than averages of gradients and of their squares.

    Example:
        >>> from search_spaces.net2net import widen
        >>> net, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(1, 2)
        >>> old = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        >>> net(x).sum().backward()
        >>> old.step()
        >>> wide, certificate = widen(net, "0", 5, example=x, certificate=True)
        >>> new = torch.optim.SGD(wide.parameters(), 0.1, momentum=0.9)
        >>> carry_momentum(old, net, new, wide, certificate.transfer)
        >>> new.state[wide[0].weight]["momentum_buffer"].shape
        torch.Size([5, 2])
    """
    if not isinstance(transfer, Transfer):
        raise GrowthError(f"transfer is {type(transfer).__name__}; give certificate.transfer.")
    if type(optimizer) is not type(new_optimizer):
        raise GrowthError(
            f"what {type(optimizer).__name__} keeps says nothing to {type(new_optimizer).__name__}. Use the same class."
        )
    before_held, held = (
        {id(parameter) for group in owner.param_groups for parameter in group["params"]}
        for owner in (optimizer, new_optimizer)
    )
    for ids, network, which in ((before_held, model, "old"), (held, new_model, "new")):
        if ids.isdisjoint(map(id, network.parameters())):
            raise GrowthError(
                f"the {which} optimizer holds no parameter of the {which} network. Give those of one pair."
            )
    parameters = dict(model.named_parameters())
    carried: dict[Tensor, dict[str, Any]] = {}
    for name, parameter in new_model.named_parameters():
        before = transfer.before(name)
        if before is not None and before not in parameters:
            raise GrowthError(
                f"there is no parameter {before!r} in the old network; the transfer is of another growth."
            )
        if before is None or (old := parameters[before]) not in optimizer.state or id(parameter) not in held:
            continue
        state: dict[str, Any] = {}
        for key, value in optimizer.state[old].items():
            if not isinstance(value, Tensor) or value.shape != old.shape:
                state[key] = copy.deepcopy(value)
            elif key not in _SQUARES + _LINEAR:
                known = type(optimizer).__name__
                raise GrowthError(f"{known} keeps {key!r}, which cannot be carried over. Start a fresh {known}.")
            elif name in transfer.maps:
                power = 2 if key in _SQUARES else 1
                if key == "momentum_buffer" and "square_avg" in optimizer.state[old]:
                    power = 0  # of RMSprop: divided by the size of gradients already
                state[key] = transfer.maps[name].gradients(value, power)
            else:
                state[key] = value.clone()
            shape = getattr(state[key], "shape", ())
            if shape not in ((), parameter.shape):  # of a step count it is ()
                raise GrowthError(
                    f"{key!r} of {name!r} would have the shape {[*shape]}, and the parameter has "
                    f"{[*parameter.shape]}: the transfer is of another growth. Carry over after each, one by one."
                )
        carried[parameter] = state
    new_optimizer.state.update(carried)
