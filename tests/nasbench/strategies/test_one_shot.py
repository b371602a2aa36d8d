"""One-shot strategies as values: names, settings, what they refuse."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
import torch

from nasbench.errors import SettingError, SpaceExhausted
from nasbench.strategies import ONE_SHOT, History, PastTrial, TopEvolution, describe, make, settings_of
from nasbench.strategies.one_shot import Decoded
from search_spaces import NASBench201, ResNet
from search_spaces.relaxed import RelaxedCell

SPACE = NASBench201(channels=4, cells=1, classes=3, in_channels=1)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_names_give_strategies_with_json_settings(name: str) -> None:
    strategy = make(name)
    assert strategy is ONE_SHOT[name] or strategy == ONE_SHOT[name]
    entry = describe(strategy)
    assert entry["name"] == name
    assert json.loads(json.dumps(entry)) == entry
    assert make(name, **{k: v for k, v in entry.items() if k in settings_of(name) and k != "relaxation"}) == strategy


def test_settings_of_a_relaxation_are_those_of_its_strategy() -> None:
    assert {"tau", "tau_end", "arch_lr", "second_order"} <= settings_of("gdas")
    assert "tau" not in settings_of("darts")
    strategy: Any = make("gdas", tau=3.0, arch_lr=0.01)
    assert (strategy.relaxation.tau, strategy.relaxation.tau_end, strategy.arch_lr) == (3.0, 0.1, 0.01)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_settings_of_the_supernet_reach_it(name: str) -> None:
    assert "recompute" not in make(name).supernet()
    supernet: Any = SPACE.supernet(**make(name, recompute=True).supernet())
    assert [m.recompute for m in supernet.modules() if isinstance(m, RelaxedCell)] == [True] * 3
    if name != "spos":
        own: Any = SPACE.supernet(**make(name, partial_channels=2, form="textbook").supernet())
        assert {(m.partial_channels, m.form) for m in own.modules() if isinstance(m, RelaxedCell)} == {(2, "textbook")}


def test_published_numbers_are_the_defaults() -> None:
    darts, gdas, drnas, pcdarts, spos = (ONE_SHOT[name] for name in ("darts", "gdas", "drnas", "pcdarts", "spos"))
    assert (darts.recipe.epochs, darts.recipe.batch_size, darts.recipe.lr, darts.recipe.lr_end) == (
        50,
        64,
        0.025,
        0.001,
    )
    assert (darts.recipe.momentum, darts.recipe.nesterov, darts.recipe.weight_decay) == (0.9, False, 3e-4)
    assert (darts.arch_lr, darts.arch_weight_decay) == (3e-4, 1e-3)  # type: ignore[attr-defined]
    assert (gdas.recipe.epochs, gdas.recipe.batch_size, gdas.recipe.nesterov) == (250, 256, True)
    assert drnas.arch_lr == 6e-4  # type: ignore[attr-defined]
    assert (pcdarts.partial_channels, pcdarts.edge_weights, pcdarts.arch_start) == (4, True, 0.3)  # type: ignore[attr-defined]
    assert (spos.population, spos.parents, spos.mutation) == (50, 10, 0.1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("darts", {"tau": 1}, "strategy 'darts' has no setting 'tau'"),
        ("darts", {"second_ordr": True}, "did you mean 'second_order'"),
        ("gdas", {"second_order": True}, "draws its mixtures at random"),
        ("drnas", {"second_order": True}, "draws its mixtures at random"),
        ("darts", {"hessian": "exact"}, "add second_order=True"),
        ("darts", {"second_order": True, "hessian": "full"}, 'hessian=\'full\', but it must be "finite" or "exact"'),
        ("darts", {"arch_lr": 0}, "arch_lr=0, but it must be a number above 0"),
        ("darts", {"arch_lr": "a"}, "arch_lr='a', but it must be a number above 0"),
        ("darts", {"arch_lr": float("inf")}, "arch_lr=inf, but it must be"),
        ("darts", {"arch_lr": True}, "arch_lr=True, but it must be"),
        ("darts", {"arch_weight_decay": None}, "arch_weight_decay=None, but it must be"),
        ("darts", {"stop_skips": "2"}, "stop_skips='2', but it must be a whole number"),
        ("darts", {"second_order": "no"}, "second_order='no', but it must be True or False"),
        ("gdas", {"stop_eigenvalue": True}, "the eigenvalue would be that of one draw"),
        ("gdas", {"tau": "hot"}, "gdas: tau='hot', but it must be a temperature"),
        ("drnas", {"kl": "a"}, "drnas: kl='a', but it must be"),
        ("spos", {"recompute": 1}, "recompute=1, but it must be True or False"),
        ("spos", {"population": 2.5}, "population=2.5 and parents=10"),
        ("top_evolution", {"mutation": "a"}, "mutation='a', but it must be a probability"),
        ("darts", {"arch_start": 1.0}, "arch_start=1.0, but it must be a share of the epochs"),
        ("pcdarts", {"partial_channels": 0}, "partial_channels=0, but it must be a whole number, 1 or more"),
        ("darts", {"stop_skips": 0}, "stop_skips=0"),
        ("darts", {"form": "slow"}, "form='slow'"),
        ("spos", {"population": 1}, "population=1 and parents=10"),
        ("spos", {"mutation": 0}, "mutation=0"),
        ("darts", {"anytime": 2}, "anytime=2, but it must be True or False"),
        ("spos", {"anytime": True}, "anytime=True, but it must be a number of newcomers, a whole number, 0 or more"),
        ("spos", {"anytime": -1}, "anytime=-1, but it must be a number of newcomers"),
        ("dart", {}, "no strategy is called 'dart'; did you mean 'darts'"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make(name, **settings)


def test_edge_weights_need_edge_sites() -> None:
    with pytest.raises(SettingError, match="ResNet has no edge sites"):
        ONE_SHOT["pcdarts"].sites(ResNet())


def test_stop_skips_needs_skip_connections() -> None:
    with pytest.raises(SettingError, match="stop_skips=2, but ResNet has none among its options. Leave stop_skips out"):
        make("darts", stop_skips=2).sites(ResNet())
    assert make("darts", stop_skips=2).sites(SPACE) == SPACE.sites


def test_what_was_decoded_is_the_only_candidate() -> None:
    darts = ONE_SHOT["darts"]
    assert darts.candidates(SPACE, SPACE.at(7), Random(0)) == [SPACE.at(7)]
    assert darts.replace(anytime=False).candidates(SPACE, SPACE.at(7), Random(0)) == []


def test_newcomers_are_drawn_at_first_and_half_of_them_mutations_afterwards() -> None:
    spos, standing = ONE_SHOT["spos"], SPACE.at(7)
    assert spos.candidates(SPACE, None, Random(1)) == [SPACE.sample(rng) for rng in [Random(1)] for _ in range(4)]
    first, *newcomers = spos.candidates(SPACE, standing, Random(1))
    assert first == standing
    changed = [sum(arch[d] != standing[d] for d in SPACE.choices) for arch in newcomers]
    assert (changed[0], changed[2]) == (1, 1)
    assert min(changed[1], changed[3]) > 1
    assert spos.candidates(SPACE, standing, Random(1)) == [first, *newcomers]
    assert spos.replace(anytime=0).candidates(SPACE, standing, Random(1)) == []


def test_a_space_of_one_architecture_has_one_candidate() -> None:
    class One(NASBench201):
        @property
        def choices(self) -> Any:
            return {"e01": ("none",)}

    space = One()
    assert ONE_SHOT["spos"].candidates(space, space.at(0), Random(0)) == [space.at(0)]


def test_single_paths_are_uniform_legal_and_known_on_the_host() -> None:
    spos = ONE_SHOT["spos"]
    rng = torch.Generator().manual_seed(0)
    counts: dict[Any, int] = {}
    for _ in range(500):
        mixture = spos.mix(SPACE, {}, 0.0, rng)
        assert mixture.active is not None
        arch = SPACE.decode(mixture)
        counts[arch["e01"]] = counts.get(arch["e01"], 0) + 1
    assert len(counts) == 5
    assert all(60 < count < 140 for count in counts.values())


def test_decoded_is_proposed_once() -> None:
    arch = SPACE.at(7)
    decoded = Decoded(lambda: arch)
    assert decoded.propose(SPACE, History(), Random(0)) == arch
    with pytest.raises(SpaceExhausted, match="was tried"):
        decoded.propose(SPACE, History([PastTrial(0, arch, (0.5,))]), Random(0))


def test_top_evolution_improves_on_its_first_generation_and_repeats_nothing() -> None:
    strategy = TopEvolution(population=20, parents=5)

    def search(seed: int) -> History:
        history = History()
        for i in range(100):
            arch = strategy.propose(SPACE, history, Random(f"{seed}/{i}"))
            score = sum(op == "nor_conv_3x3" for op in arch.values())
            history.append(PastTrial(i, arch, (float(score),)))
        return history

    history = search(0)
    assert len({trial.arch for trial in history}) == 100
    means = [sum(t.score for t in history[i : i + 20]) / 20 for i in range(0, 100, 20)]
    assert means[-1] > means[0] + 1
    assert [t.arch for t in search(0)] == [t.arch for t in history]


def test_top_evolution_draws_parents_from_whole_generations_only() -> None:
    strategy = TopEvolution(population=10, parents=2)
    history = History([PastTrial(i, SPACE.at(i), (float(i),)) for i in range(10)])
    first = strategy.propose(SPACE, history, Random(5))
    history.append(PastTrial(10, SPACE.at(15_000), (99.0,)))
    assert strategy.propose(SPACE, history, Random(5)) == first
