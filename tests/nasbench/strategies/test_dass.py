"""DASS: its three phases, what each leaves alone, and the trials and networks it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasbench as nb
from nasbench.errors import SettingError
from nasbench.strategies import ONE_SHOT, describe, make
from nasbench.strategies.dass import PHASES, train_sparse
from nasbench.supernets import SupernetTraining
from search_spaces import DARTS, NASBench201
from search_spaces.masks import keep_count
from search_spaces.sparse_operations import masks, sparse_layers

SPACE = DARTS(channels=2, cells=1, ops="sparse")
SMALL: dict[str, Any] = {"epochs": 3, "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def data() -> nb.Data:
    return nb.data.load("digits", train_images=128)


def trained(data: nb.Data, file: Path | None = None, epochs: int = 5, **changes: Any) -> SupernetTraining:
    strategy = ONE_SHOT["dass"].replace(**{"density": 0.2, "anytime": False} | changes)
    recipe = strategy.recipe.replace(epochs=epochs, batch_size=48, momentum=0.9)  # one step an epoch
    return SupernetTraining(SPACE.bind(data), data, strategy, recipe, file=file)


def weights(supernet: nn.Module) -> dict[str, Tensor]:
    """The stored weights and biases, by the names that they have when there are no masks."""
    return {
        name.replace("parametrizations.weight.original", "weight"): p.detach().clone()
        for name, p in supernet.named_parameters()
        if not name.endswith("scores")
    }


def scores(supernet: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in supernet.named_parameters() if name.endswith("scores")}


def counts(network: nn.Module) -> dict[str, int]:
    return {name: int(layer.weight.count_nonzero()) for name, layer in sparse_layers(network).items()}


def exact(network: nn.Module, density: float) -> dict[str, int]:
    return {name: keep_count(density, layer.weight.numel()) for name, layer in sparse_layers(network).items()}


# Phases --------------------------------------------------------------------------------------------------------------


def test_each_phase_leaves_alone_what_it_does_not_train(data: nb.Data) -> None:
    training = trained(data, second_order=True)
    seen: list[tuple[str, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
    record = training._record

    def watch(epoch: int, *args: Any) -> dict[str, Any]:
        net = training.supernet
        logits = {site: row.detach().clone() for site, row in training.logits.items()}
        kept = {name: mask.clone() for name, mask in masks(net).items()}
        seen.append((training._phase(epoch)[0].name, weights(net), scores(net), kept, logits))
        return record(epoch, *args)

    training._record = watch  # type: ignore[method-assign]
    training.run(progress=False)
    assert [phase for phase, *_ in seen] == ["pretrain", "pretrain", "prune", "fine-tune", "fine-tune"]
    assert [entry["phase"] for entry in training.epochs] == [phase for phase, *_ in seen]
    assert [entry["arch_loss"] is None for entry in training.epochs] == [False, False, True, False, False]

    def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    (_, w0, s0, m0, a0), (_, w1, s1, _, a1), (_, w2, s2, m2, a2), (_, w3, s3, m3, a3), (_, w4, _, m4, a4) = seen
    assert not (s0 or m0 or s1 or m2 or s3)
    assert not same(w0, w1) and not same(a0, a1)
    assert same(w1, w2) and same(a1, a2) and s2
    assert same(m3, m4) and not same(w3, w4) and not same(a3, a4) and not same(a2, a3)
    for name, mask in m4.items():
        final = w4[f"{name}.weight"]
        assert not final[~mask].any()  # neither momentum nor weight decay moves what is pruned
        assert int(mask.sum()) == keep_count(0.2, mask.numel())
    assert counts(training.supernet) == exact(training.supernet, 0.2)


def test_each_phase_has_a_cosine_of_its_own(data: nb.Data) -> None:
    training, rates = trained(data), []
    for epoch in range(5):
        training._set_rate(3 * epoch, 3)
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.013, 0.1, 0.025, 0.013])


@pytest.mark.parametrize(
    ("epochs", "expected"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 1, 2]), (50, [20, 10, 20]), (250, [100, 50, 100])]
)
def test_epochs_are_shared_out(epochs: int, expected: list[int]) -> None:
    dass = ONE_SHOT["dass"]
    assert [phase.recipe.epochs for phase in dass.phases(dass.recipe.replace(epochs=epochs))] == expected


def test_very_unequal_shares_leave_an_epoch_to_each_phase() -> None:
    for shares in ((1, 1, 1000), (1000, 1, 1), (1, 1000, 1)):
        strategy: Any = make("dass", shares=shares)
        found = [phase.recipe.epochs for phase in strategy.phases(strategy.recipe.replace(epochs=10))]
        assert sorted(found) == [1, 1, 8]


@pytest.mark.parametrize("settings", [{}, pytest.param({"budget": "global"}, marks=pytest.mark.slow)])
def test_an_interrupted_search_goes_on_bit_for_bit_in_every_phase(
    settings: dict[str, Any], data: nb.Data, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def interrupt(after: int) -> Callable[[], None]:
        left = iter(range(after))

        def check() -> None:
            if next(left, None) is None:
                raise Stop

        return check

    settings = settings | {"epochs": 6, "shares": (1, 1, 1)}
    whole = trained(data, **settings)
    whole.run(progress=False)
    for done, steps in ((0, 1), (1, 1), (2, 1), (3, 2)):  # each ends some epochs, and is stopped in the next
        part = trained(data, tmp_path / "c.pt", **settings)
        assert len(part.epochs) == done
        with pytest.raises(Stop):
            part.run(interrupt(steps), progress=False)
    rest = trained(data, tmp_path / "c.pt", **settings)
    assert [entry["phase"] for entry in rest.epochs] == [PHASES[0], PHASES[0], PHASES[1], PHASES[1], PHASES[2]]
    rest.run(progress=False)
    a, b = whole.supernet.state_dict(), rest.supernet.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(whole.logits[site], rest.logits[site]) for site in whole.logits)
    plain = [[{k: v for k, v in e.items() if "seconds" not in k} for e in t.epochs] for t in (whole, rest)]
    assert plain[0] == plain[1]
    if "budget" in settings:
        total = sum(layer.weight.numel() for layer in sparse_layers(whole.supernet).values())
        assert sum(counts(whole.supernet).values()) == keep_count(0.2, total)


# Searches ------------------------------------------------------------------------------------------------------------


def test_a_search_gives_a_masked_network_and_a_fresh_one(data: nb.Data) -> None:
    result = nb.search(SPACE, data, strategy="dass", density=0.1, study="s", **SMALL)
    best = result.best
    assert [entry["phase"] for entry in result.epochs] == list(PHASES)
    assert all("val_accuracy" in entry for entry in result.epochs)
    model = best.build()
    assert counts(model) == exact(model, 0.1)
    assert masks(model).keys() == sparse_layers(model).keys()
    assert nb.validate(model, data)["val_accuracy"] == pytest.approx(best.metrics["val_accuracy"])
    assert result.epochs[-1]["val_accuracy"] == best.metrics["val_accuracy"]
    nb.fit(model, data, epochs=1, batch_size=64, device="cpu", progress=False)
    assert counts(model) == exact(model, 0.1)
    fresh = best.build(weights=False)
    assert sparse_layers(fresh) and not masks(fresh)
    assert fresh(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    again = nb.SearchResult.load("runs/s/result.json").best
    assert counts(again.build()) == exact(model, 0.1)
    with pytest.raises(nb.ResumeError):
        nb.search(SPACE, data, strategy="dass", density=0.2, study="s", **SMALL)


def test_densities_of_layers_and_both_kinds_of_operations(data: nb.Data) -> None:
    space = DARTS(channels=2, cells=1, ops="both").bind(data)
    layers = sparse_layers(space.supernet())
    keep = {name: (m.weight.numel() + 2) // 3 for name, m in layers.items() if not name.startswith("stem")}

    class Densities(dict[str, float]):
        """As compress gives them: shares of a rule, and the whole counts that come of them."""

        counts, sizes = keep, {name: layers[name].weight.numel() for name in keep}

    shares = Densities(dict.fromkeys(keep, 0.3))
    dass = ONE_SHOT["dass"].replace(density=shares)
    training = SupernetTraining(space, data, dass, dass.recipe.replace(epochs=3, batch_size=48))
    training.run(progress=False)
    assert {name: int(mask.sum()) for name, mask in masks(training.supernet).items()} == keep
    model, _ = training.inherit(training.arch)
    found = {name: int(mask.sum()) for name, mask in masks(model).items()}
    head = model.get_submodule("head.linear")
    assert isinstance(head, nn.Linear)
    assert found["head.linear"] == keep["head.linear"]
    assert not any(name.startswith("stem") for name in found)
    assert len(found) == len(sparse_layers(model)) - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, "density=0.0, but it must be the share of weights that is kept, above 0 and at most 1"),
        ({"density": 2}, "density=2, but it must be"),
        ({"density": {"stem.0.conv": "a"}}, "density={'stem.0.conv': 'a'}, but it must be"),
        ({"density": {"stem.0.con": 0.1}}, "'dass': density names 'stem.0.con', .*did you mean 'stem.0.conv'"),
        ({"density": {"stem.0.conv": 0.1}, "budget": "global"}, "a density for each layer says all"),
        ({"budget": "model"}, 'budget=\'model\', but it must be "layer" or "global"'),
        ({"shares": (1, 2)}, r"shares=\(1, 2\), but it must be three numbers above 0"),
        ({"prune_lr": 0}, "prune_lr=0, but it must be a number above 0"),
        ({"stop_skips": 2}, "stop_skips=2, but it must be left out: a search that ends early prunes nothing"),
        ({"spare_depthwise": 1}, "spare_depthwise=1, but it must be True or False"),
        ({"epochs": 2}, "epochs=2, but the search has 3 phases: give 3 epochs at least"),
        ({"strategy": "darts", "density": 0.1}, "strategy 'darts' has no setting 'density'"),
        ({"strategy": "darts"}, "strategy 'darts' would train the sparse operations of DARTS.* densely. Use .*dass"),
        ({"strategy": "spos"}, "strategy 'spos' would train the sparse operations"),
        ({"strategy": "random"}, "has sparse operations, which this strategy would train densely. Use .*dass"),
        ({"space": DARTS(channels=2, cells=1)}, 'the supernet of DARTS has none. Use DARTS.ops="sparse"'),
        ({"space": NASBench201(channels=4, cells=1)}, 'the supernet of NASBench201 has none. Use DARTS.ops="sparse"'),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(settings: dict[str, Any], message: str, data: nb.Data) -> None:
    arguments = {"space": SPACE, "data": data, "strategy": "dass", "study": "s"} | SMALL | settings
    with pytest.raises(SettingError, match=message):
        nb.search(**arguments)
    assert not Path("runs").exists()


def test_a_description_makes_the_same_strategy_again() -> None:
    strategy = make("dass", density={"stem.0.conv": 0.5}, shares=[1, 1, 1], second_order=True)
    entry = describe(strategy)
    assert (entry["density"], entry["shares"]) == ({"stem.0.conv": 0.5}, [1, 1, 1])
    again = {k: v for k, v in entry.items() if k not in ("name", "relaxation", "trials")}
    assert make("dass", **again) == strategy


# Networks alone ------------------------------------------------------------------------------------------------------


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_a_network_is_trained_dense_then_pruned_then_trained(budget: str, data: nb.Data) -> None:
    network = plain()
    trained = train_sparse(
        network, data, 0.1, epochs=(2, 2, 2), batch_size=32, budget=budget, device="cpu", progress=False
    )
    assert trained is network
    found = counts(network)
    assert found == exact(network, 0.1) if budget == "layer" else sum(found.values()) == keep_count(0.1, 72 + 2880)
    twin = train_sparse(
        plain(), data, 0.1, epochs=(2, 2, 2), batch_size=32, budget=budget, device="cpu", progress=False
    )
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_a_network_is_pruned_by_density_of_each_layer(data: nb.Data) -> None:
    network = train_sparse(plain(), data, {"4": 0.01}, epochs=(1, 1, 1), batch_size=32, device="cpu", progress=False)
    assert counts(network) == {"0": 72, "4": 29}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0}, "train_sparse: density is 0"),
        ({"density": {"5": 0.1}}, "train_sparse: density names '5', which is no sparse layer"),
        ({"epochs": (1, 1)}, "there are three trainings"),
        ({"epochs": (1, 0, 1)}, "epochs=0, but it must be a whole number, 1 or more"),
        ({"batch_sise": 3}, "a recipe has no field 'batch_sise'"),
    ],
)
def test_bad_trainings_leave_the_network_as_it_is(change: dict[str, Any], message: str) -> None:
    network = plain()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(SettingError, match=message):
        train_sparse(network, **{"data": SimpleNamespace(), "density": 0.1} | change)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert not sparse_layers(network)
