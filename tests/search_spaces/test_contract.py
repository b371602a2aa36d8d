"""What every registered space must do. A new space gets these tests by its line in SPACES and in SETTINGS."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import search_spaces
from nasbench.strategies import bilevel
from nasbench.strategies.relaxation import Softmax
from search_spaces import SPACES, ArchError, Mixture, SearchSpace, space

# Small settings, where the default network is large.
SETTINGS: dict[str, dict[str, Any]] = {
    "conv_macro": {"widths": (4, 8)},
    "darts": {"channels": 4, "cells": 3},
    "densenet": {"growths": (4, 6), "slots": 3, "layers_of_start": 1},
    "gpt": {"widths": (8, 16), "depths": (1, 2), "heads": (1, 2), "ratios": (1, 2)},
    "mobilenet": {"depths": (1, 2), "width": 0.25, "stem": "cifar"},
    "nasbench201": {"channels": 4, "cells": 1},
    "nasnet": {"filters": 4, "repeats": 1},
    "plain_cnn": {"widths": (4, 8), "fc_widths": (8, 16), "blocks": 2, "slots": 2, "fc_slots": 1},
    "resnet": {"depths": (1, 2), "widths": (4, 8)},
    "vit": {"widths": (8, 16), "heads": (1, 2), "ratios": (1.5, 2.0), "depths": (1, 2), "head_dim": 4},
}
IMAGES = SimpleNamespace(classes=5, channels=2, height=8, width=8)
TEXTS = SimpleNamespace(classes=5, context=8)


def data(bound: SearchSpace) -> SimpleNamespace:
    """What the space's networks read."""
    return TEXTS if hasattr(bound, "context") else IMAGES


def example(bound: SearchSpace, batch: int) -> tuple[Tensor, torch.Size]:
    """Return inputs of the space's networks, and the shape of the logits for them."""
    generator = torch.Generator().manual_seed(0)
    if data(bound) is TEXTS:
        return torch.randint(5, (batch, 8), generator=generator), torch.Size((batch, 5, 8))
    return torch.randn(batch, 2, 8, 8, generator=generator), torch.Size((batch, 5))


@pytest.fixture(params=[*SPACES, "darts both"])
def bound(request: pytest.FixtureRequest) -> SearchSpace:
    name, _, ops = request.param.partition(" ")
    unbound = space(name, **SETTINGS.get(name, {}) | ({"ops": ops} if ops else {}))
    return unbound.bind(data(unbound))


def test_defaults_need_no_settings() -> None:
    for name in SPACES:
        assert isinstance(space(name), SearchSpace)


def test_same_seed_gives_the_same_archs_whatever_ran_before(bound: SearchSpace) -> None:
    def draw() -> list[Any]:
        rng = Random(7)
        return [bound.sample(rng) for _ in range(200)]

    first = draw()
    bound.mutate(first[0], Random(1))
    torch.rand(1)
    assert draw() == first
    assert len(set(first)) > 20
    assert all(arch in bound for arch in first)


def test_archs_round_trip(bound: SearchSpace) -> None:
    rng = Random(0)
    for arch in (bound.sample(rng) for _ in range(50)):
        assert bound.parse(arch.to_json()) == arch
        assert bound.decode(bound.encode(arch)) == arch
        assert bound.at(bound.index(arch)) == arch
        assert list(arch) == list(bound.choices)


def test_a_space_is_made_again_from_its_json(bound: SearchSpace) -> None:
    settings = json.loads(bound.to_json())
    again = space(settings.pop("space"), **settings)
    assert again == bound
    assert again.fingerprint == bound.fingerprint


def test_first_and_last_index(bound: SearchSpace) -> None:
    assert bound.encode(bound.at(0)) == (0,) * len(bound.choices)
    assert bound.index(bound.at(bound.size - 1)) == bound.size - 1


def test_options_can_be_stored_by_optuna_and_json(bound: SearchSpace) -> None:
    for options in bound.choices.values():
        assert isinstance(options, tuple)
        assert len(set(options)) == len(options) > 0
        assert all(option is None or type(option) in (str, int, float) for option in options)


def test_moves(bound: SearchSpace) -> None:
    rng = Random(0)
    for _ in range(20):
        a, b = bound.sample(rng), bound.sample(rng)
        mutant, child = bound.mutate(a, rng), bound.crossover(a, b, rng)
        assert sum(a[d] != mutant[d] for d in a) == 1
        assert all(child[d] in (a[d], b[d]) for d in a)
        assert mutant in bound
        assert child in bound
    near = list(bound.neighbours(a))
    assert len(set(near)) == len(near) <= sum(len(options) - 1 for options in bound.choices.values())
    assert all(sum(a[d] != n[d] for d in a) == 1 and n in bound for n in near)


def test_canonical_is_idempotent_and_in_the_space(bound: SearchSpace) -> None:
    rng = Random(0)
    for arch in (bound.sample(rng) for _ in range(50)):
        canonical = bound.canonical(arch)
        assert canonical in bound
        assert bound.canonical(canonical) == canonical


def test_graph_leads_from_input_to_output(bound: SearchSpace) -> None:
    graph = bound.graph(bound.at(bound.size - 1))
    reached = {"input"}
    for _ in graph:
        reached |= {to for start, to, _ in graph if start in reached}
    assert "output" in reached
    assert all(isinstance(label, str) for _, _, label in graph)


def _step(model: nn.Module, bound: SearchSpace) -> float:
    """Train one step on fixed inputs and return the loss."""
    x, shape = example(bound, 6)
    y = torch.randint(5, (6, *shape[2:]), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    logits = model(x)
    assert logits.shape == shape
    loss = F.cross_entropy(logits, y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_networks_train_a_step(bound: SearchSpace) -> None:
    rng = Random(0)
    for arch in (bound.sample(rng) for _ in range(8)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = bound.build(arch)
        first = _step(model, bound)
        assert first > 0
        assert _step(model, bound) < first  # the same batch again


def test_networks_are_fresh_and_repeat_under_a_seed(bound: SearchSpace) -> None:
    arch = bound.sample(Random(0))
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(bound.build(arch).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
    assert all(states[0][k].data_ptr() != states[1][k].data_ptr() for k in states[0] if states[0][k].numel())


def test_networks_can_be_copied_traced_and_built_without_memory(bound: SearchSpace) -> None:
    x, shape = example(bound, 2)
    for arch in (bound.sample(Random(seed)) for seed in range(4)):
        model = bound.build(arch).eval()
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
        with torch.device("meta"):
            meta = bound.build(arch)
        assert [p.shape for p in meta.parameters()] == [p.shape for p in model.parameters()]
        assert meta(x.to("meta")).shape == shape


def test_top_level_children_have_the_same_names_in_all_networks(bound: SearchSpace) -> None:
    # A joint policy of architecture and compression has one decision for each.
    names = {tuple(n for n, _ in bound.build(bound.sample(Random(seed))).named_children()) for seed in range(6)}
    assert len(names) == 1
    assert len(names.pop()) > 1


def test_build_refuses_other_archs_and_unbound_spaces(bound: SearchSpace) -> None:
    arch = bound.at(0)
    with pytest.raises(ArchError, match="needs"):
        bound.build(type(arch)({}))
    with pytest.raises(ArchError, match="has no decision 'extra'"):
        bound.build(arch | {"extra": 1})
    known = "classes and context" if data(bound) is TEXTS else "classes and in_channels"
    with pytest.raises(ArchError, match=f"does not know {known} yet"):
        type(bound)().build(type(bound)().at(0))


def test_spaces_are_values(bound: SearchSpace) -> None:
    twin = type(bound)(**{f: getattr(bound, f) for f in bound.__dataclass_fields__})  # type: ignore[attr-defined]
    assert twin == bound
    assert hash(twin) == hash(bound)
    assert pickle.loads(pickle.dumps(bound)) == bound  # noqa: S301 - our own bytes
    assert bound.bind(data(bound)) == bound
    with pytest.raises(ArchError, match="was made with classes=5, the data has 6"):
        bound.bind(SimpleNamespace(**vars(data(bound)) | {"classes": 6}))


def test_fingerprints_differ_between_spaces() -> None:
    prints = [space(name).fingerprint for name in SPACES]
    assert len(set(prints)) == len(prints)
    for a, b in itertools.pairwise(SPACES):
        assert space(a) != space(b)


def test_fingerprint_is_the_same_in_every_process() -> None:
    code = "from search_spaces import SPACES, space; print([space(n).fingerprint for n in SPACES])"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(search_spaces.__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert other.stdout.strip() == str([space(n).fingerprint for n in SPACES])


def test_architecture_steps_of_every_kind(bound: SearchSpace) -> None:
    if type(bound).supernet is SearchSpace.supernet:
        pytest.skip("has no supernet")
    supernet = bound.supernet()
    logits = Softmax().initial(bound.sites, torch.Generator().manual_seed(0))
    rows = [row.requires_grad_() for row in logits.values()]
    x, shape = example(bound, 6)
    batch = x, torch.randint(5, (6, *shape[2:]), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.01, momentum=0.9)

    def mix() -> Mixture:
        return Softmax().mix(logits, 0.0, torch.Generator())

    for exact in (False, True):
        loss, gradients = bilevel.second_order(supernet, mix, rows, batch, batch, optimizer, exact=exact)
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
        assert sum(bool(gradient.any()) for gradient in gradients) > len(gradients) / 2  # kernels on 1x1 images: none
    value = bilevel.dominant_eigenvalue(supernet, mix, rows, batch, torch.Generator().manual_seed(0), steps=2)
    assert math.isfinite(value)
