"""Channels of a network changed in number, wherever that can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from search_spaces.channels import Channels, Group
from search_spaces.reindexing import Reindexing
from search_spaces.tracing import GrowthError, check_same_calls, copied


def possible_change(
    found: Channels, rows: Mapping[Group, Sequence[int]], inputs: tuple[Any, ...]
) -> tuple[Reindexing, dict[Group, str]]:
    """Return the change of all groups that can be changed together, and of the others the reasons.

    Args:
        found: the channels of a model.
        rows: what becomes of groups: for each new channel the one that it was.
        inputs: those of the model, with which a changed copy of it is tried.
    """

    def attempt(groups: Sequence[Group], run: bool) -> Reindexing:
        change = found.reindex_groups({group: rows[group] for group in groups}, exact=False)
        if run:
            check_same_calls(found.traces, changed(found, change), inputs, None)
        return change

    def accept(more: Sequence[Group], run: bool) -> None:
        try:
            attempt([*accepted, *more], run)
            accepted.extend(more)
        except GrowthError as error:
            if len(more) == 1:
                refused[more[0]] = str(error)
            elif more:  # few are refused: they are found by halves
                accept(more[: len(more) // 2], run)
                accept(more[len(more) // 2 :], run)

    refused: dict[Group, str] = {}
    accepted: list[Group] = []
    accept(list(rows), run=False)
    try:
        return attempt(accepted, run=True), refused
    except GrowthError:  # rare, and slow to find: code that computes with the size of a layer
        groups, accepted = accepted, []
        accept(groups, run=True)
        return attempt(accepted, run=False), refused


def changed(found: Channels, change: Reindexing) -> nn.Module:
    """Return a copy of the model with other channels."""
    new = copied(found.model)
    change.apply(new)
    return new
