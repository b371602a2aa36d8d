"""Channel pruning: whole channels leave a network, so that its tensors are smaller and any device computes faster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.channel_changes import changed, possible_change
from compress.channel_scores import Loss, channel_scores
from compress.errors import CompressionError
from compress.models import require_values
from compress.tables import aligned
from compress.weights import weights
from search_spaces.arch import nearest
from search_spaces.channels import Channels, Group, analyse
from search_spaces.reindexing import Reindexing
from search_spaces.tracing import GrowthError

METHODS = ("magnitude", "random", "taylor")
DISTRIBUTIONS = ("uniform", "global")
LEAST = 0.1
"""The least share of its channels that "global" leaves to a group."""

Example = Tensor | tuple[Any, ...]


@dataclass(frozen=True)
class GroupPlan:
    """What becomes of channels that layers share.

    Attributes:
        layers: the layers that make them.
        channels: how many there are.
        kept: those that stay, by their places.
        note: why they all stay, or what is not exact.
    """

    layers: tuple[str, ...]
    channels: int
    kept: tuple[int, ...] = field(repr=False)
    note: str = ""


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """Which channels of a model stay; made by `channel_plan`. Prints as a table.

    Attributes:
        groups: channels by the layers that share them, in the order of the layers.
        change: what becomes of the model's weights.
    """

    groups: tuple[GroupPlan, ...]
    change: Reindexing = field(repr=False)
    _found: Channels = field(repr=False)

    def apply(self) -> nn.Module:
        """Return a copy of the model that has only these channels."""
        return changed(self._found, self.change)

    def __str__(self) -> str:
        table = [("channels of", "channels", "kept", "")]
        for group in self.groups:
            more = f" and {len(group.layers) - 1} more" if len(group.layers) > 1 else ""
            table.append((group.layers[0] + more, f"{group.channels:,}", f"{len(group.kept):,}", group.note))
        return aligned(table, left=(0, 3))


def prune_channels(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    distribution: str = "uniform",
    method: str = "magnitude",
    exclude: Sequence[str] = (),
    example: Example,
    batch: tuple[Any, Any] | None = None,
    loss: Loss | None = None,
    multiple_of: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model with a share of its channels: plain, smaller, and faster on any device.

    Channels that are added or multiplied are one group and go together. Each group keeps the nearest possible number,
    halves up, at least one: where convolutions have groups, equally many in each of them. The model's inputs and
    outputs keep their sizes. Groups that cannot be cut stay whole; `channel_plan` says which, and why.

    The result computes what the model computes with the lost channels set to zero, but for norms over channels
    (LayerNorm, GroupNorm), which take their statistics over those that are left.

    Args:
        model: any module that torch.fx can trace, without masks. It stays as it is.
        density: the share of channels that stay, in (0, 1]. Half the channels are about a quarter of the MACs. A
            mapping has the shares of layers by name; groups without one of these layers stay whole.
        distribution: "uniform": the same share of each group; "global": that share of all channels, those of the
            highest scores in comparison with their group's mean, at least a tenth of each group.
        method: which channels stay. "magnitude": those of the largest weights, L2 norms over the mean norm of the
            tensor, averaged over all that makes or reads the channel and scales of norms; "taylor": the same with
            |sum of weight times gradient| for the norm; "random".
        exclude: names of layers, or of modules that hold layers, whose output channels all stay. What they read may
            still become less.
        example: a batch that the model takes; a tuple if it takes several inputs. Only its shape matters.
        batch: inputs (a tuple if there are several) and targets, for "taylor". The model is in evaluation mode.
        loss: of outputs and targets, a scalar; default: cross entropy.
        multiple_of: numbers of channels are multiples of it where they are not all kept; 8 suits many devices.
        seed: of "random".

    Raises:
        CompressionError: the model cannot be traced, has masks, or no group can be cut; a name is unknown; a density
            is not in (0, 1] or asks what a group cannot do; a batch is missing; weights are not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> small = prune_channels(net, 0.5, example=torch.zeros(1, 3, 8, 8))
        >>> small[0]
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
        >>> small[4]
        Linear(in_features=144, out_features=10, bias=True)

    Source: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900, for groups and norms
    over all of their tensors; ours follows channels by number. "taylor": Molchanov et al., Importance Estimation for
    Neural Network Pruning, CVPR 2019, arXiv:1906.10771, whose squares we take the roots of.
    """
    return channel_plan(
        model,
        density,
        distribution=distribution,
        method=method,
        exclude=exclude,
        example=example,
        batch=batch,
        loss=loss,
        multiple_of=multiple_of,
        seed=seed,
    ).apply()


def channel_plan(
    model: nn.Module,
    density: float | Mapping[str, float],
    *,
    distribution: str = "uniform",
    method: str = "magnitude",
    exclude: Sequence[str] = (),
    example: Example,
    batch: tuple[Any, Any] | None = None,
    loss: Loss | None = None,
    multiple_of: int = 1,
    seed: int = 0,
) -> ChannelPlan:
    """Return which channels `prune_channels` would keep, and which groups stay whole and why; arguments are the same.

    Raises:
        CompressionError: as `prune_channels`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> print(channel_plan(net, 0.5, example=torch.zeros(1, 3, 8, 8)))
        channels of  channels  kept
        0                   8     4
        3                  10    10  they reach the model's output, whose size is the task's.
    """
    _check(model, density, distribution, method, batch, multiple_of)
    try:
        found = analyse(model, example)
    except GrowthError as error:
        raise CompressionError(f"the channels of {_name(model)} cannot be followed: {error}") from error
    inputs = example if isinstance(example, tuple) else (example,)
    scores = channel_scores(found, method, batch, loss, seed)
    asked = _asked(found, density)
    notes: dict[Group, str] = dict.fromkeys(_excluded(found, exclude), "it is excluded.")
    least = {group: _kept(group, 0.0, scores[group], multiple_of) for group in found.groups}
    for group, fewest in least.items():
        if group not in notes and len(fewest) == group.size:
            notes[group] = f"no smaller number of channels is possible: {_limit(group, multiple_of)}."
    if distribution == "global":  # what cannot be cut has no part in the budget
        notes |= possible_change(found, {group: own for group, own in least.items() if group not in notes}, inputs)[1]
    while True:
        shares = {group: share for group, share in asked.items() if group not in notes}
        if distribution == "global":
            shares = _global_shares(shares, scores)
        rows = {group: _kept(group, share, scores[group], multiple_of) for group, share in shares.items()}
        rows = {group: kept for group, kept in rows.items() if len(kept) < group.size}
        change, refused = possible_change(found, rows, inputs)
        if not refused:
            break
        notes |= refused
    if isinstance(density, Mapping):
        _check_fulfilled(asked, notes)
    wanted = {group for group, share in asked.items() if share < 1}
    if not found.groups or (wanted and wanted <= notes.keys()):
        reasons = " ".join(f"{group.makers[0]}: {note}" for group, note in notes.items())
        raise CompressionError(f"no channels of {_name(model)} can be pruned. {reasons or 'It has no layers.'}")
    plans = []
    for group in found.groups:
        kept = tuple(rows.get(group, range(group.size)))
        note = "a norm over them gets other statistics" if group in rows and group.even else notes.get(group, "")
        plans.append(GroupPlan(group.makers, group.size, kept, note))
    return ChannelPlan(tuple(plans), change, found)


# What is asked -----------------------------------------------------------------------------------------------------


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _check(
    model: nn.Module,
    density: float | Mapping[str, float],
    distribution: str,
    method: str,
    batch: tuple[Any, Any] | None,
    multiple_of: int,
) -> None:
    for name, share in density.items() if isinstance(density, Mapping) else [("", density)]:
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            of = f" of {name!r}" if name else ""
            raise CompressionError(f"the density{of} is the share of channels that stay, in (0, 1], got {share!r}.")
    if distribution not in DISTRIBUTIONS:
        raise CompressionError(f"no distribution of channels {distribution!r}; {nearest(distribution, DISTRIBUTIONS)}")
    if isinstance(density, Mapping) and distribution != "uniform":
        raise CompressionError("a mapping has the density of each layer itself; leave out the distribution.")
    if method not in METHODS:
        raise CompressionError(f"no method {method!r} to prune channels; {nearest(method, METHODS)}")
    if method == "taylor" and batch is None:
        raise CompressionError("method='taylor' looks at gradients; give batch=(inputs, targets).")
    if type(multiple_of) is not int or multiple_of < 1:
        raise CompressionError(f"multiple_of is a whole number of at least 1, got {multiple_of!r}.")
    require_values(model)
    masked = [weight.name for weight in weights(model).values() if weight.mask is not None]
    if masked:
        raise CompressionError(
            f"{masked[0]!r} has a mask; make masked weights ordinary ones with compress.finalize(model) first."
        )


def _made_by(found: Channels, name: str) -> list[Group]:
    """Return the groups of the channels that a layer gives, or layers in a module of this name."""
    return [
        group
        for group in found.groups
        if any(
            slot.role != "reads" and (slot.tensor == name or slot.tensor.startswith(f"{name}.")) for slot in group.slots
        )
    ]


def _excluded(found: Channels, exclude: Sequence[str]) -> list[Group]:
    if isinstance(exclude, str):
        raise CompressionError(f"exclude is a list of names, got {exclude!r}; write exclude=[{exclude!r}].")
    known = {*found.layers, *weights(found.model)}
    excluded: list[Group] = []
    for name in exclude:
        groups = _made_by(found, name)
        if not groups and not any(own == name or own.startswith(f"{name}.") for own in known):
            raise CompressionError(f"exclude names {name!r}, which holds no layer; {nearest(name, known)}")
        excluded += groups
    return excluded


def _asked(found: Channels, density: float | Mapping[str, float]) -> dict[Group, float]:
    """Return the share that each group shall keep."""
    if not isinstance(density, Mapping):
        return dict.fromkeys(found.groups, density)
    asked: dict[Group, tuple[float, str]] = {}
    for name, share in density.items():
        if name not in found.layers:
            raise CompressionError(f"density names {name!r}, which is no layer; {nearest(name, found.layers)}")
        if not (groups := _made_by(found, name)):
            raise CompressionError(f"density names {name!r}, whose channels are those of the model's input.")
        for group in groups:
            other, first = asked.setdefault(group, (share, name))
            if other != share:
                raise CompressionError(
                    f"{first!r} and {name!r} have the same channels, and shall keep {other} and {share} of them. Give "
                    "one of them, or both the same."
                )
    return {group: share for group, (share, _) in asked.items()}


def _check_fulfilled(asked: Mapping[Group, float], notes: Mapping[Group, str]) -> None:
    for group, share in asked.items():
        if share < 1 and group in notes:
            raise CompressionError(f"{group.makers[0]!r} cannot keep {share} of its channels: {notes[group]}")


# Which channels stay -----------------------------------------------------------------------------------------------


def _unit(group: Group) -> int:
    """Return in how many equal steps a group can be taken away, each with the same share of every cell."""
    return math.gcd(*map(len, group.cells))


def _kept(group: Group, share: float, scores: Tensor, multiple_of: int) -> list[int]:
    """Return the channels of the highest scores, as near as can be to a share of each cell."""
    unit = _unit(group)
    step = group.size // unit
    steps = [i for i in range(1, unit + 1) if i * step % multiple_of == 0 or i == unit]
    chosen = min(steps, key=lambda i: (abs(i - share * unit), -i))
    return sorted(channel for cell in _ranked(group, scores) for channel in cell[: len(cell) * chosen // unit])


def _limit(group: Group, multiple_of: int) -> str:
    if _unit(group) > 1:
        return f"it must be a multiple of {math.lcm(multiple_of, group.size // _unit(group))}"
    return "equal shares of its cells must go" if group.size > 1 else "it has one"


def _ranked(group: Group, scores: Tensor) -> list[list[int]]:
    """Return the channels of each cell, those of the highest scores first."""
    values = scores.tolist()
    return [sorted(cell, key=lambda channel: -values[channel]) for cell in group.cells]


def _global_shares(asked: Mapping[Group, float], scores: Mapping[Group, Tensor]) -> dict[Group, float]:
    """Return the share of each group, if together they keep what is asked of all channels, by score."""
    budget = sum(share * group.size for group, share in asked.items())
    chosen: dict[Group, int] = {}
    others: list[tuple[float, int, Group]] = []
    for number, group in enumerate(asked):
        unit = _unit(group)
        chosen[group] = math.ceil(LEAST * unit)
        values = torch.zeros(unit)
        for cell in _ranked(group, scores[group]):
            values += scores[group][cell].view(unit, -1).sum(1) / group.size * unit
        others += [(-float(value), number, group) for value in values[chosen[group] :]]
    left = budget - sum(group.size // _unit(group) * steps for group, steps in chosen.items())
    for _, _, group in sorted(others, key=lambda other: other[:2]):
        if (left := left - group.size // _unit(group)) < 0:
            break
        chosen[group] += 1
    return {group: steps / _unit(group) for group, steps in chosen.items()}
