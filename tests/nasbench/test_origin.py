"""Origins: remembered on networks of our spaces, in no state_dict, and built again from names alone."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from nasbench.errors import SettingError
from nasbench.objective import WEIGHTS, save_weights
from nasbench.origin import Origin, mark, origin_of
from nasbench.result import Trial
from search_spaces import NASBench201, ResNet, SearchSpace, space
from search_spaces.base import Choices

SPACE = NASBench201(channels=4, cells=1, classes=10, in_channels=1)
ARCH = SPACE.at(7)


@dataclass(frozen=True)
class Own(SearchSpace):
    @cached_property
    def choices(self) -> Choices:
        return {"width": (1, 2)}

    def build(self, arch: Any) -> nn.Module:
        return nn.Linear(1, arch["width"])


def test_a_mark_survives_copies_and_is_in_no_state() -> None:
    model = SPACE.build(ARCH)
    before = list(model.state_dict())
    assert origin_of(model) is None
    assert mark(model, SPACE, ARCH) is model
    assert list(model.state_dict()) == before
    twin = copy.deepcopy(model)
    assert origin_of(twin) == origin_of(model) == Origin(SPACE, ARCH)


def test_foreign_spaces_are_not_remembered() -> None:
    own = Own()
    assert origin_of(mark(own.build(own.at(0)), own, own.at(0))) is None

    class ResNet(Own):  # a name of ours is not enough
        pass

    fake = ResNet()
    assert origin_of(mark(fake.build(fake.at(0)), fake, fake.at(0))) is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("conv_macro", {"classes": 3, "in_channels": 1}),
        ("darts", {"channels": 4, "cells": 3, "classes": 3, "in_channels": 3}),
        ("resnet", {"classes": 3, "in_channels": 1}),
    ],
)
def test_origins_are_built_again_with_the_same_layers(name: str, settings: dict[str, Any]) -> None:
    own = space(name, **settings)
    arch = own.sample(Random(0))
    origin = Origin.from_json(Origin(own, arch).to_json())
    assert origin == Origin(own, arch)
    shapes = {key: value.shape for key, value in own.build(arch).state_dict().items()}
    state = torch.random.get_rng_state()
    model = origin.build()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert all(p.is_meta for p in origin.build("meta").parameters())
    assert origin_of(model) == origin


def test_a_network_out_of_a_supernet_is_built_again_as_it_was() -> None:
    origin = Origin.from_json(Origin(SPACE, ARCH, {}).to_json())
    extracted = SPACE.supernet().extract(ARCH)
    assert {k: v.shape for k, v in origin.build().state_dict().items()} == {
        k: v.shape for k, v in extracted.state_dict().items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"space": "os:system"}}, "'os:system' is no space of search_spaces"),
        ({"space": {"space": "Own"}}, "'Own' is no space of search_spaces"),
        ({"space": {"space": "NASBench201", "widht": 3}}, "this is no network of our spaces"),
        ({"space": {"space": "NASBench201", "channels": -3}}, "this is no network of our spaces.*-3"),
        ({"space": {"space": 3}}, "this is no network of our spaces"),
        ({"arch": {"width": 3}}, "this is no network of our spaces"),
        ({"arch": 3}, "this is no network of our spaces"),
        ({"supernet": 3}, "this is no network of our spaces"),
    ],
)
def test_other_texts_are_refused(change: dict[str, Any], message: str) -> None:
    entry = json.loads(Origin(SPACE, ARCH).to_json())
    with pytest.raises(SettingError, match=message):
        Origin.from_json(json.dumps(entry | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"space": null}', '{"space": "resnet"}'])
def test_no_origins_at_all_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="this is no network of our spaces"):
        Origin.from_json(text)


def test_networks_of_trials_are_marked(tmp_path: Path) -> None:
    for supernet in (None, {}):
        trial = Trial(0, ARCH, "complete", space=SPACE, folder=tmp_path, supernet=supernet)
        canonical = SPACE.canonical(ARCH)
        assert origin_of(trial.build(weights=False)) == Origin(SPACE, canonical)
        network = SPACE.build(canonical) if supernet is None else SPACE.supernet().extract(ARCH)
        (tmp_path / "trials" / "0").mkdir(parents=True, exist_ok=True)
        save_weights(network, tmp_path / "trials" / "0" / WEIGHTS)
        origin = origin_of(trial.build())
        assert origin == Origin(SPACE, canonical if supernet is None else ARCH, supernet)
        assert origin.build().state_dict().keys() == network.state_dict().keys()


def test_networks_of_foreign_trials_are_not() -> None:
    own = Own()
    assert origin_of(Trial(0, own.at(0), "complete", space=own).build(weights=False)) is None


def test_a_resnet_of_ours_is_one() -> None:
    own = ResNet(classes=10, in_channels=1)
    assert origin_of(mark(own.build(own.at(0)), own, own.at(0))) == Origin(own, own.at(0))
