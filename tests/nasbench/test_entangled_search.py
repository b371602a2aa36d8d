"""One-shot searches of weight-entangled spaces, from end to end: ConvMacro, MobileNetV3, ViT, and GPT on a text."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import nasbench as nb
from nasbench.data import keyed_generator
from nasbench.errors import SettingError
from nasbench.shared_weights import SupernetObjective
from nasbench.strategies import ONE_SHOT
from nasbench.strategies.one_shot import Differentiable
from nasbench.supernets import SupernetTraining
from search_spaces import GPT, ArchError, ConvMacro, MobileNetV3, SearchSpace, ViT

SPACES: dict[str, SearchSpace] = {
    "conv": ConvMacro(kernels=(1, 3), widths=(2, 4)),
    "mobile": MobileNetV3(kernels=(1, 3), expands=(2, 3), depths=(1, 2), width=0.2, stem="cifar"),
    "vit": ViT(widths=(8, 12), heads=(1, 2), ratios=(1, 2), depths=(1, 2), head_dim=4),
    "gpt": GPT(widths=(8, 16), heads=(1, 2), ratios=(1, 2), depths=(1, 2)),
}
METHODS: dict[str, dict[str, Any]] = {
    "darts": {"strategy": "darts"},
    "second-order": {"strategy": "darts", "second_order": True},
    "gdas": {"strategy": "gdas"},
    "drnas": {"strategy": "drnas", "arch_start": 0.0},
    "spos": {"strategy": "spos", "trials": 3, "population": 2, "parents": 1, "anytime": 1},
}
CASES = [*(("conv", method) for method in METHODS), ("mobile", "darts"), ("mobile", "spos"), ("vit", "second-order")]
CASES += [("vit", "drnas"), ("gpt", "gdas"), ("gpt", "spos")]
SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def digits() -> nb.Data:
    return nb.data.load("digits", train_images=160)


@pytest.fixture(scope="module")
def text() -> nb.Data:
    return nb.data.load("pydoc", characters=6_000, context=16)


@pytest.fixture
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than these searches; other tests have it."""
    monkeypatch.setattr(SupernetObjective, "check_memory", lambda *_: None)
    monkeypatch.setattr(nb.SearchResult, "report", lambda *_: None)
    monkeypatch.setattr(nb.SearchResult, "plot", lambda *_: None)


def searched(name: str, data: nb.Data, method: str, **changes: Any) -> nb.SearchResult:
    return nb.search(SPACES[name], data, study="s", **{**METHODS[method], **SMALL, **changes})


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_search_finds_an_architecture_with_the_weights_it_shares(
    name: str, method: str, digits: nb.Data, text: nb.Data
) -> None:
    data = text if name == "gpt" else digits
    result = searched(name, data, method)
    space, best = result.space, result.best
    assert best.arch in space
    assert best.metrics.keys() == {"val_accuracy", "val_loss", "params", "macs"}
    assert [e["epoch"] for e in result.epochs] == [1, 2]
    assert all(0 <= e["val_accuracy"] <= 1 and e["arch"] in space for e in result.epochs)
    if method != "spos":
        assert result.epochs[-1]["arch"] == dict(best.arch)
        assert result.epochs[-1]["val_accuracy"] == best.metrics["val_accuracy"]
        assert result.epochs[-1]["probabilities"].keys() == space.choices.keys()
    training = reopened(result, data, method)
    assert len(training.epochs) == 2
    x, _ = next(data.eval_batches("val", 8))
    network, scores = training.inherit(best.arch)
    model = best.build()
    kept = network.state_dict()
    assert all(torch.equal(kept[key], tensor) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(model(x), network.eval()(x), rtol=1e-5, atol=1e-5)  # they lie otherwise in memory
    assert scores.items() <= best.metrics.items()
    assert scores == pytest.approx(nb.validate(model, data))
    supernet = training.supernet.eval()
    torch.testing.assert_close(
        supernet(x, space.one_hot(best.arch)), supernet.extract(best.arch)(x), rtol=1e-5, atol=1e-5
    )
    fresh = best.build(weights=False)
    assert best.metrics["params"] == parameters(model) == parameters(fresh)
    assert fresh(x).shape == model(x).shape


def reopened(result: nb.SearchResult, data: nb.Data, method: str) -> SupernetTraining:
    """The finished training of a study, from its checkpoint."""
    own = {k: v for k, v in METHODS[method].items() if k not in ("strategy", "trials")}
    strategy = ONE_SHOT[METHODS[method]["strategy"]].replace(**own)
    recipe = nb.Recipe(**result.conditions["objective"]["recipe"])
    return SupernetTraining(result.space, data, strategy, recipe, file=Path("runs/s/supernet.pt"))


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize(("name", "method"), [("conv", "gdas"), ("gpt", "drnas")])
def test_an_interrupted_search_ends_as_the_unbroken_one(
    name: str, method: str, digits: nb.Data, text: nb.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text if name == "gpt" else digits
    whole = searched(name, data, method, folder="whole", epochs=3)
    set_rate = SupernetTraining._set_rate

    def interrupt(self: SupernetTraining, step: int, steps: int) -> None:
        if step > steps:
            raise KeyboardInterrupt
        set_rate(self, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(SupernetTraining, "_set_rate", interrupt)
        part = searched(name, data, method, folder="part", epochs=3)
    assert (len(part.epochs), part.trials) == (1, [])
    rest = searched(name, data, method, folder="part", epochs=3)
    plain = [[{k: v for k, v in e.items() if "seconds" not in k} for e in r.epochs] for r in (whole, rest)]
    assert plain[0] == plain[1]
    assert [(t.arch, t.metrics) for t in whole.trials] == [(t.arch, t.metrics) for t in rest.trials]
    states = [r.best.build().state_dict() for r in (whole, rest)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("method", ["darts", "second-order", "gdas", "drnas"])
@pytest.mark.parametrize("name", SPACES)
def test_architecture_weights_of_every_site_move(name: str, method: str, text: nb.Data) -> None:
    # Of 16x16, so that no layer sees a single pixel, to which all kernels are the same.
    data = text if name == "gpt" else nb.data.load("digits", train_images=96, size=16)
    own = {k: v for k, v in METHODS[method].items() if k not in ("strategy", "trials")}
    strategy = ONE_SHOT[METHODS[method]["strategy"]].replace(arch_weight_decay=0.0, anytime=False, **own)
    assert isinstance(strategy, Differentiable)
    space = SPACES[name].bind(data)
    training = SupernetTraining(space, data, strategy, strategy.recipe.replace(epochs=1, batch_size=16))
    training.run(progress=False)
    start = strategy.relaxation.initial(strategy.sites(space), keyed_generator(0))
    moved = {site: float((row.detach() - start[site]).abs().max()) for site, row in training.logits.items()}
    assert moved.keys() == space.choices.keys()
    assert min(moved.values()) > 0.01 * strategy.arch_lr, moved


@pytest.mark.usefixtures("_bare")
def test_recomputed_blocks_change_nothing(text: nb.Data) -> None:
    plain, less = (
        searched("gpt", text, "gdas", epochs=1, recompute=recompute, folder=str(recompute)).best
        for recompute in (False, True)
    )
    assert less.arch == plain.arch
    assert less.metrics == pytest.approx(plain.metrics, rel=1e-4)


@pytest.mark.usefixtures("_bare")
def test_adamw_trains_a_supernet(digits: nb.Data) -> None:
    result = searched("vit", digits, "drnas", optimizer="adamw", lr=0.002, epochs=4)
    assert result.conditions["objective"]["recipe"]["optimizer"] == "adamw"
    losses = [e["train_loss"] for e in result.epochs]
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("_bare")
def test_constraints_hold_for_what_evolution_tries(digits: nb.Data) -> None:
    space = SPACES["conv"].bind(digits)
    sizes = sorted(parameters(space.build(space.sample(Random(i)))) for i in range(20))
    result = searched("conv", digits, "spos", constraints=f"params<{sizes[10]}", epochs=1)
    assert len(result.complete) == 3
    assert all(trial.metrics["params"] < sizes[10] for trial in result.complete)


@pytest.mark.usefixtures("_bare")
@pytest.mark.parametrize("name", SPACES)
def test_a_derived_network_costs_what_a_built_one_does(name: str, digits: nb.Data, text: nb.Data) -> None:
    data = text if name == "gpt" else digits
    space = SPACES[name].bind(data)
    supernet, rng = space.supernet(), Random(0)
    for arch in (space.sample(rng) for _ in range(3)):
        derived, built = supernet.extract(arch), space.build(arch)
        assert repr(derived) == repr(built)  # the same layers, so the same latency
        assert nb.measure(derived, data.shape).to_dict() == nb.measure(built, data.shape).to_dict()


@pytest.mark.usefixtures("_bare")
def test_latency_and_bytes_are_measured_of_the_derived_network(text: nb.Data) -> None:
    best = searched("gpt", text, "gdas", metrics=("latency_ms", "bytes", "peak_bytes"), epochs=1).best
    cost = nb.measure(best.build(weights=False), text.shape).to_dict()
    counted = ("bytes", "peak_bytes", "params", "macs")
    assert {name: best.metrics[name] for name in counted} == {name: cost[name] for name in counted}
    assert 0 < best.metrics["latency_ms"] < 1000


def test_a_search_leaves_its_report(tmp_path: Path) -> None:
    rhyme = tmp_path / "rhyme.txt"
    rhyme.write_text("One, two, buckle my shoe; three, four, knock at the door.\n" * 60)
    space = GPT(widths=(8, 16), heads=(1, 2), ratios=(1, 2), depths=(1,))
    result = nb.search(space, nb.data.load(rhyme, context=16), "gdas", study="s", **SMALL)
    assert (Path("runs/s") / "report.html").exists()
    assert (Path("runs/s") / "search.png").exists()
    assert nb.SearchResult.load("runs/s/result.json").epochs == result.epochs
    nb.plot_anytime({"gdas": result}, tmp_path / "anytime.png", metric="val_loss")
    assert (tmp_path / "anytime.png").exists()


# What entangled supernets do not have ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("conv", {"strategy": "pcdarts"}, "'pcdarts' learns a weight for every edge, but ConvMacro has no edge sites"),
        ("gpt", {"strategy": "pcdarts", "edge_weights": False}, "partial_channels=4, which the supernet of GPT does"),
        ("vit", {"strategy": "darts", "partial_channels": 2}, "partial_channels=2, which the supernet of ViT does not"),
        ("mobile", {"strategy": "darts", "form": "textbook"}, "'textbook', .* MobileNetV3 does not take: it takes rec"),
        ("gpt", {"strategy": "darts", "stop_skips": 2}, "counts skip connections for stop_skips=2, but GPT has none"),
        ("gpt", {"strategy": "gdas", "add_others": True}, "add_others=True: in weight-entangled supernets .* Leave"),
        ("conv", {"strategy": "gdas", "add_others": True}, "options that were not drawn have gradients anyway"),
    ],
)
def test_what_entangled_supernets_lack_is_refused_before_anything_is_written(
    name: str, settings: dict[str, Any], message: str, digits: nb.Data, text: nb.Data
) -> None:
    with pytest.raises((SettingError, ArchError), match=message):
        nb.search(SPACES[name], text if name == "gpt" else digits, study="s", **{**SMALL, **settings})
    assert not Path("runs").exists()
