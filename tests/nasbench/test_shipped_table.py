"""The table that comes with the library, against trainings made here and now."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import nasbench as nb
from nasbench.storage import environment
from nasbench.table import SHIPPED
from search_spaces import NASBench201


@pytest.fixture(scope="module")
def table() -> nb.Table:
    return nb.Table.load("nasbench201-digits")


def test_every_cell_has_an_answer(table: nb.Table) -> None:
    space = NASBench201()
    assert len(table) == 5545
    assert (SHIPPED / "nasbench201-digits.npz").stat().st_size < 200_000
    for index in range(0, space.size, 97):
        arch = space.at(index)
        assert table.query(arch) == table.query(space.canonical(arch))
    for metric in ("val_accuracy", "test_accuracy"):
        values = np.stack([table.values(metric, seed) for seed in range(3)])
        assert values.min() > 0.05
        assert values.max() < 1
    assert table.values("seconds").min() > 0


def test_its_spreads_are_told(table: nb.Table) -> None:
    spread = table.conditions["spreads"]["val_accuracy"]
    runs = np.stack([table.values("val_accuracy", seed) for seed in range(3)], axis=1)
    assert spread["between_architectures"] == pytest.approx(runs.mean(axis=1).std(), abs=1e-4)
    assert spread["between_seeds"] == pytest.approx(runs.std(axis=1, ddof=1).mean(), abs=1e-4)
    assert spread["between_architectures"] > spread["between_seeds"] / np.sqrt(3), "cells must differ more than noise"


@pytest.mark.parametrize("index", [624, 7777, 15000])
def test_a_row_is_found_again(table: nb.Table, index: int) -> None:
    conditions = table.conditions
    data = nb.data.load("digits")
    assert data.fingerprint == conditions["objective"]["data"]["fingerprint"]
    settings = dict(conditions["space"])
    assert settings.pop("space") == "NASBench201"
    space = NASBench201(**settings)
    arch = space.canonical(space.at(index))
    recipe = nb.Recipe.from_json(json.dumps(conditions["objective"]["recipe"]))
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions["environment"]["threads"])
    try:
        same_machine = environment() == conditions["environment"]
        found = []
        for seed in conditions["objective"]["seeds"]:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = space.build(arch)
            nb.fit(model, data, recipe, seed=seed, device="cpu", progress=False)
            found.append(nb.validate(model, data)["val_accuracy"])
    finally:
        torch.set_num_threads(threads)
    stored = [table.query(arch, "val_accuracy", seed=seed) for seed in range(3)]
    if same_machine:
        assert found == pytest.approx(stored, abs=1e-6)
    assert np.mean(found) == pytest.approx(np.mean(stored), abs=0.1)
