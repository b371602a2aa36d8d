"""What can be done with every layer of a network, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.channels import Channels, Group, analyse
from search_spaces.sites import check_layer, kernel_grown, new_site
from search_spaces.tracing import GrowthError


@dataclass(frozen=True)
class Verdict:
    """Whether something can be done.

    Attributes:
        possible: whether it can.
        note: how, or why not.
    """

    possible: bool
    note: str = ""

    def __bool__(self) -> bool:
        return self.possible


@dataclass(frozen=True)
class LayerReport:
    """What can be done with a layer.

    Attributes:
        name: of the layer.
        kind: its class.
        channels: how many it gives.
        widen: whether it can get more channels.
        deepen: whether a layer can be put behind it.
        kernel: whether its kernel can grow.
        prune: whether it can lose channels, by itself or with the layers that it is tied to.
        tied: names of the other layers whose channels change with its own, for example because they are added.
    """

    name: str
    kind: str
    channels: int
    widen: Verdict
    deepen: Verdict
    kernel: Verdict
    prune: Verdict
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What can be done with the layers of a model; prints as a table, with the reasons below.

    Layers that are tied have the same number in the column of that name.

    Attributes:
        rows: one for every layer, in the order in which they are called.
    """

    rows: tuple[LayerReport, ...]

    def __getitem__(self, name: str) -> LayerReport:
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        notes: dict[str, int] = {}

        def cell(verdict: Verdict) -> str:
            if not verdict.note:
                return "yes" if verdict else "no"
            number = notes.setdefault(verdict.note, len(notes) + 1)
            return f"{'yes' if verdict else 'no'} [{number}]"

        table: list[tuple[str, ...]] = [("layer", "kind", "channels", "widen", "deepen", "kernel", "prune", "tied")]
        ties: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            verdicts = (cell(verdict) for verdict in (row.widen, row.deepen, row.kernel, row.prune))
            tie = ties.setdefault(tuple(sorted((row.name, *row.tied))), len(ties) + 1) if row.tied else ""
            table.append((row.name, row.kind, str(row.channels), *verdicts, str(tie)))
        if not ties:
            table = [row[:-1] for row in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join(lines + [f"[{number}] {note}" for note, number in notes.items()])


def explain(model: nn.Module, example: Tensor | tuple[Any, ...]) -> Explanation:
    """Return what can be done with every layer of a model, and why not. The model stays as it is.

    Args:
        model: any network that torch.fx can trace.
        example: a batch that the model takes; a tuple if it takes several inputs. Only its shape matters.

    Raises:
        GrowthError: the model cannot be traced, does not take the example, or has hooks.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> print(explain(net, torch.zeros(1, 3, 8, 8)))
        layer  kind    channels  widen   deepen   kernel  prune
        0      Conv2d  4         yes     yes      yes     yes
        3      Linear  2         no [1]  yes [2]  no [3]  no [1]
        [1] they reach the model's output, whose size is the task's.
        [2] by a residual branch that starts at zero: no activation follows it alone
        [3] it is a Linear: only convolutions grow, and not transposed ones.
    """
    found = analyse(model, example)
    tried: dict[tuple[int, ...], tuple[Verdict, Verdict]] = {}
    places: dict[str, tuple[Group, set[int]]] = {}
    refused: dict[str, Verdict] = {}
    for name in found.layers:
        try:
            group, channels = found.place(name)
            places[name] = group, set(channels)
        except GrowthError as error:
            refused[name] = Verdict(False, str(error))
    rows = []
    for name, layer in found.layers.items():
        deepen = _verdict(lambda name: _deepening(found, name), name)
        kernel = _verdict(lambda name: _kernel_growth(found, name), name)
        if name in refused:
            widen = prune = refused[name]
            tied: list[str] = []
        else:
            group, own = places[name]
            key = (id(group), *sorted(own))  # of layers that are tied one is enough
            if key not in tried:
                tried[key] = _changes(found, group, sorted(own))
            widen, prune = tried[key]
            tied = [o for o, (other, theirs) in places.items() if o != name and other is group and theirs & own]
        rows.append(LayerReport(name, layer.kind, layer.outputs, widen, deepen, kernel, prune, tuple(tied)))
    return Explanation(tuple(rows))


def _verdict(attempt: Callable[[str], str], name: str) -> Verdict:
    try:
        return Verdict(True, attempt(name))
    except GrowthError as error:
        return Verdict(False, str(error))


def _changes(found: Channels, group: Group, own: list[int]) -> tuple[Verdict, Verdict]:
    """Try to copy channels of a layer, and to remove one, or one from each cell."""

    def widen(name: str) -> str:
        step, draw = group.step(own), torch.Generator().manual_seed(0)
        try:
            found.widening(group, own, step, draw)
        except GrowthError:
            step = len(own)
            found.widening(group, own, step, draw)
        return "" if step == 1 else f"by multiples of {step}"

    def prune(name: str) -> str:
        gone = {next(channel for channel in cell if channel in own) for cell in group.cells if set(cell) & set(own)}
        found.reindex(group, [channel for channel in range(group.size) if channel not in gone], exact=False)
        return "" if len(gone) == 1 else f"by multiples of {len(gone)}"

    return _verdict(widen, ""), _verdict(prune, "")


def _deepening(found: Channels, name: str) -> str:
    site = new_site(found, name)
    return "" if site.identity else f"by a residual branch that starts at zero: {site.reason}"


def _kernel_growth(found: Channels, name: str) -> str:
    check_layer(found, found.layers[name])
    conv = found.model.get_submodule(name)
    kernel_grown(conv, tuple(size + 2 for size in getattr(conv, "kernel_size", ())))
    return ""
