"""Compression policies: their values and files, the space of them, and its search on deployed networks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import nasbench as nb
from compress.calibration import training_inputs
from compress.errors import CompressionError
from compress.policy import PolicySpace, apply_policy, check_policy, load_policy, options_of, save_policy
from compress.policy_objective import PolicyObjective
from compress.pruning import masks, prune
from nasbench.data import Data
from nasbench.errors import ResumeError, SettingError
from nasbench.objective import TrialRun
from nasbench.pareto import dominates
from nasbench.result import SearchResult
from search_spaces import Arch, ArchError

pytest.importorskip("onnxruntime")

OBJECTIVES = ("val_accuracy", "bytes")
LAYERS = ["0", "3", "8"]


@pytest.fixture(scope="module")
def data() -> Data:
    return nb.data.load("digits")


@pytest.fixture(scope="module")
def model(data: Data) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )
    return nb.fit(net, data, epochs=4, batch_size=64, device="cpu", progress=False)


@pytest.fixture(scope="module")
def space(model: nn.Module) -> PolicySpace:
    return PolicySpace(model)


@pytest.fixture(scope="module")
def objective(space: PolicySpace, data: Data) -> Any:
    found = space.objective(data)
    found.want(OBJECTIVES)
    return found


@pytest.fixture(scope="module")
def modal(model: nn.Module) -> PolicySpace:
    """A space of policies with both modes and all kinds."""
    kinds = ("int8", "weights", "dense_shift")
    return PolicySpace(model, bits=(3, 8, 32), kinds=kinds, modes=("symmetric", "asymmetric"))


# Values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "kinds", "options"),
    [
        ((4, 8, 32), ("int8", "weights"), ("weights4", "int8", "float32")),
        ((8,), ("weights",), ("weights8",)),
        ((2, 8), ("weights", "dense_shift"), ("weights2", "shift2", "weights8")),
        ((32, 8), ("int8",), ("float32", "int8")),
        (tuple(range(2, 8)), ("weights",), tuple(f"weights{b}" for b in range(2, 8))),
    ],
)
def test_options_follow_the_bits(bits: tuple[int, ...], kinds: tuple[str, ...], options: tuple[str, ...]) -> None:
    assert options_of(bits, kinds) == options


@pytest.mark.parametrize(
    ("bits", "kinds", "words"),
    [
        ((1, 8), ("weights",), "from 2 to 8, or 32"),
        ((16,), ("weights",), "from 2 to 8, or 32"),
        ((4.0,), ("weights",), "from 2 to 8, or 32"),
        ((True,), ("weights",), "from 2 to 8, or 32"),
        ((), ("weights",), "one at least"),
        ((4, 4), ("weights",), "different values"),
        (4, ("weights",), "a tuple"),
        ((4,), (), "one at least"),
        ((4,), "weights", "a tuple"),
        ((4, 8), ("int8",), "has 4 bits"),
        ((8,), ("int4",), "did you mean 'int8'"),
    ],
)
def test_bits_and_kinds_out_of_range_are_refused(bits: Any, kinds: Any, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        options_of(bits, kinds)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"9": "int8"}, "lacks; .*Known: 0, 3, 8"),
        ({"0": "int9"}, "layer '0': there is no option 'int9'; did you mean 'int8'"),
        ({"0": "float16"}, "did you mean 'float32'"),
        ({"0": 8}, "no option 8"),
        ({"0": "shift3 asymmetric"}, "no option"),
        ({"0": "weights4 sometimes"}, "no option"),
        (["int8"], "maps layers to options"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(model: nn.Module, policy: Any, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        check_policy(policy, model)
    with pytest.raises(CompressionError, match=words):
        apply_policy(model, policy)


def test_a_policy_makes_weights_of_few_values(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    policy = {"0": "weights2", "3": "int8", "8": "weights3 asymmetric"}
    found: Any = apply_policy(model, policy)
    values = {name: [len(row.unique()) for row in found.get_submodule(name).weight] for name in LAYERS}
    assert max(values["0"]) <= 3
    assert 7 < max(values["3"]) <= 255
    assert 4 < max(values["8"]) <= 8
    own: Any = model
    scale = own[3].weight.flatten(1).abs().amax(1) / 127  # of a channel, as onnxruntime has it
    assert torch.all((found[3].weight - own[3].weight).flatten(1).abs().amax(1) <= 0.5001 * scale)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_powers_of_two_move_their_scale_to_the_batch_norm(model: nn.Module, data: Data) -> None:
    found: Any = apply_policy(model, {"3": "shift4", "8": "weights4"})
    assert set(found[3].weight.abs().unique().tolist()) <= {2.0**k for k in range(8)}
    x, _ = next(data.eval_batches("val"))
    with torch.no_grad():
        correlation = torch.corrcoef(torch.stack([found.eval()(x).flatten(), model.eval()(x).flatten()]))[0, 1]
    assert correlation > 0.9
    with pytest.raises(CompressionError, match="8"):
        apply_policy(model, {"8": "shift4"})  # no batch norm behind


def test_masks_stay_under_a_policy(model: nn.Module) -> None:
    sparse = prune(model, 0.25, method="magnitude")
    found: Any = apply_policy(sparse, {"3": "weights4"})
    assert torch.equal(found[3].weight == 0, ~masks(sparse)["3"] | (found[3].weight == 0))
    space = PolicySpace(sparse)
    assert space.layers.keys() == {*LAYERS}


def test_a_policy_file_is_json_by_layer(model: nn.Module, tmp_path: Path) -> None:
    path = save_policy({"8": "int8", "0": "weights4"}, tmp_path / "policy.json")
    assert json.loads(path.read_text()) == {"8": "int8", "0": "weights4"}
    assert list(load_policy(path, model).items()) == [("0", "weights4"), ("8", "int8")]  # in the model's order
    with pytest.raises(CompressionError, match="lacks"):
        load_policy(path, nn.Linear(2, 2))
    for wrong in ({"8": "int9"}, ["int8"]):
        with pytest.raises(CompressionError, match="no option 'int9'|maps layers to options"):
            save_policy(wrong, path)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"8": "int8", "0": "weights4"}
    path.write_text("{")
    with pytest.raises(CompressionError, match="cannot read a policy"):
        load_policy(path, model)
    with pytest.raises(CompressionError, match="cannot read a policy"):
        load_policy(tmp_path / "none.json", model)


# The space ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["space", "modal"])
def either(request: pytest.FixtureRequest) -> PolicySpace:
    found: PolicySpace = request.getfixturevalue(request.param)
    return found


def test_the_space_keeps_the_laws_of_spaces(either: PolicySpace) -> None:
    rng = Random(3)
    for _ in range(30):
        arch = either.sample(rng)
        assert arch in either
        assert either.decode(either.encode(arch)) == either.at(either.index(arch)) == arch
        assert Arch.from_json(arch.to_json()) == arch == either.parse(arch.to_json())
        assert hash(Arch(dict(reversed([*arch.items()])))) == hash(arch)
        mutant = either.mutate(arch, rng)
        assert mutant in either
        assert sum(mutant[d] != arch[d] for d in arch) == 1
        canonical = either.canonical(arch)
        assert canonical in either
        assert either.canonical(canonical) == canonical
        assert either.policy_of(canonical) == either.policy_of(arch)
        assert either.arch_of(either.policy_of(arch)) == canonical


def test_modes_without_effect_are_zero(modal: PolicySpace) -> None:
    arch = modal.arch(dict.fromkeys(modal.layers, "float32") | {f"{name}.mode": "asymmetric" for name in modal.layers})
    assert set(modal.encode(modal.canonical(arch))[1::2]) == {0}
    assert modal.choices["8"] == ("weights3", "int8", "float32")  # no batch norm behind it, so no powers of two
    assert "shift3" in modal.choices["3"]


def test_a_space_is_known_by_its_weights(model: nn.Module, space: PolicySpace) -> None:
    twin = PolicySpace(model)
    assert twin == space
    assert hash(twin) == hash(space)
    assert twin.fingerprint == space.fingerprint
    assert PolicySpace(model, bits=(8, 32)) != space
    smoother = nn.Sequential(*(nn.GELU() if isinstance(layer, nn.ReLU) else layer for layer in model.children()))
    assert PolicySpace(smoother).fingerprint != space.fingerprint, "the same numbers in another network"
    before = space.build(space.uniform()["float32"]).state_dict()
    changed: Any = nn.Sequential(*model.children())
    saved = changed[8].bias.detach().clone()
    try:
        with torch.no_grad():
            changed[8].bias += 1
        assert PolicySpace(changed).fingerprint != space.fingerprint
        after = space.build(space.uniform()["float32"]).state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # it keeps a copy
    finally:
        changed[8].bias.data = saved


def test_uniform_policies(space: PolicySpace, modal: PolicySpace) -> None:
    assert {option: set(arch.values()) for option, arch in space.uniform().items()} == {
        "weights4": {"weights4"},
        "int8": {"int8"},
        "float32": {"float32"},
    }
    assert modal.policy_of(modal.uniform()["shift3"]) == {"0": "shift3", "3": "shift3", "8": "float32"}


def test_excluded_layers_stay_float(model: nn.Module) -> None:
    space = PolicySpace(model, exclude=["0"])
    assert list(space.choices) == ["3", "8"]
    assert "0" not in space.policy_of(space.uniform()["int8"])
    assert space.arch_of({"0": "float32", "3": "int8", "8": "int8"}) == space.uniform()["int8"]
    with pytest.raises(ArchError, match="no decision '0'"):
        space.arch_of({"0": "int8"})


def test_a_mode_that_the_space_lacks_is_refused(space: PolicySpace, model: nn.Module) -> None:
    with pytest.raises(CompressionError, match="'0' has option 'int8 asymmetric'.* modes=\\('symmetric',\\)"):
        space.arch_of({"0": "int8 asymmetric"})
    asymmetric = PolicySpace(model, modes=("asymmetric",))
    with pytest.raises(CompressionError, match="which is symmetric"):
        asymmetric.arch_of({"0": "int8"})
    policy = {"0": "int8 asymmetric", "3": "float32", "8": "weights4 asymmetric"}
    assert asymmetric.policy_of(asymmetric.arch_of(policy)) == policy


def test_models_that_take_small_images_only_have_shifts_by_an_example() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    kinds, example = ("int8", "dense_shift"), torch.rand(2, 1, 8, 8)
    with pytest.raises(CompressionError, match="Give example"):
        PolicySpace(net, bits=(3, 8), kinds=kinds)
    space = PolicySpace(net, bits=(3, 8), kinds=kinds, example=example)
    assert space.layers == {"0": ("shift3", "int8"), "4": ("int8",)}
    built: Any = space.build(space.uniform()["shift3"])
    assert set(built[0].weight.abs().unique().tolist()) <= {1.0, 2.0, 4.0, 8.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": nn.Sequential(nn.ReLU())}, "no convolution"),
        ({"model": {}}, "torch.nn.Module"),
        ({"bits": (4, 9)}, "from 2 to 8"),
        ({"kinds": ("int",)}, "no kind 'int'"),
        ({"modes": ("sym",)}, "no mode 'sym'"),
        ({"modes": ()}, "one mode at least"),
        ({"calibration": 0}, "number of training images"),
        ({"exclude": ("head",)}, "exclude names 'head'"),
        ({"exclude": tuple(LAYERS)}, "all 3 weights are excluded"),
    ],
)
def test_bad_settings_are_refused(model: nn.Module, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        PolicySpace(**{"model": model} | change)


def test_a_model_of_few_bits_is_refused(model: nn.Module) -> None:
    with pytest.raises(CompressionError, match="few bits already"):
        PolicySpace(apply_policy(model, {"0": "weights4"}))
    with pytest.raises(ArchError, match="needs"):
        PolicySpace(model).policy_of({"0": "int8"})


# Measured ----------------------------------------------------------------------------------------------------------


def test_all_float_is_the_model(space: PolicySpace, objective: Any, model: nn.Module, data: Data) -> None:
    found = objective(space.uniform()["float32"], TrialRun())
    own = nb.validate(model, data)
    assert found["val_accuracy"] == own["val_accuracy"]
    assert found["val_loss"] == pytest.approx(own["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_measuring_twice_gives_the_same_bits(space: PolicySpace, objective: Any, data: Data) -> None:
    archs = [space.sample(Random(i)) for i in range(3)]
    first = [objective(arch, TrialRun()) for arch in archs]
    assert [objective(arch, TrialRun()) for arch in archs] == first
    again = space.objective(data)  # exported and calibrated anew
    assert [again(arch, TrialRun()) for arch in archs] == first
    assert all("latency_ms" not in metrics for metrics in first)


def test_bytes_grow_with_the_bits(space: PolicySpace, objective: Any) -> None:
    sizes = [objective(arch, TrialRun())["bytes"] for arch in space.uniform().values()]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


def test_latency_is_measured_where_it_is_asked_for(space: PolicySpace, data: Data) -> None:
    objective = space.objective(data)
    objective.want(["val_accuracy", "latency_ms"])
    found = objective(space.uniform()["int8"], TrialRun())
    assert found["latency_ms"] > 0
    assert found["latency_iqr_ms"] >= 0
    assert objective.settings()["extra"] == ["latency_ms"]


def test_calibration_reads_training_images(space: PolicySpace, data: Data) -> None:
    batches = training_inputs(data, 100, seed=0)
    images = torch.cat(batches)
    assert len(images) == 100
    rows = {image.numpy().tobytes() for image in images}
    train = {x.numpy().tobytes() for batch, _ in data.eval_batches("train") for x in batch}
    assert rows <= train
    assert len(torch.cat(training_inputs(data, 10**6, seed=0))) == data.count("train")
    other = torch.cat(training_inputs(data, 100, seed=1))
    assert not torch.equal(images, other)


def search(space: PolicySpace, objective: Any, name: str, strategy: str, **settings: Any) -> SearchResult:
    """Search with what is deployed already, and results in a quick file."""
    settings = {"objectives": OBJECTIVES, "trials": 6, "seed": 5} | settings
    return nb.search(space, objective, strategy, study=name, storage=f"{name}.log", progress=False, **settings)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("nsga2", {"population_size": 3}),
        ("random", {}),
        ("tpe", {"n_startup_trials": 3}),
        ("evolution", {"population": 3, "objectives": "val_accuracy"}),
        ("local_search", {"objectives": "bytes"}),
    ],
)
def test_every_strategy_searches_policies(
    space: PolicySpace, objective: Any, strategy: str, settings: dict[str, Any]
) -> None:
    result = search(space, objective, "a", strategy, **settings)
    assert len(result.complete) == 6


def test_a_search_repeats_and_resumes(space: PolicySpace, objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"population": 3, "evaluations": 20}
    whole = search(space, objective, "whole", "linas", **settings)
    assert any(trial.note for trial in whole.trials)  # predictors proposed
    asked, call = itertools.count(), PolicyObjective.__call__

    def interrupted(self: PolicyObjective, arch: Arch, run: TrialRun) -> dict[str, float]:
        if next(asked) == 4:
            raise KeyboardInterrupt
        return call(self, arch, run)

    monkeypatch.setattr(PolicyObjective, "__call__", interrupted)
    assert len(search(space, objective, "parts", "linas", **settings).complete) == 4
    again = search(space, objective, "parts", "linas", **settings)
    assert [(t.arch, t.metrics) for t in again.trials] == [(t.arch, t.metrics) for t in whole.trials]
    measured = next(asked)
    assert search(space, objective, "parts", "linas", **settings).rows() == again.rows()  # returns at once
    assert next(asked) == measured + 1
    objective.seed = 1
    try:
        with pytest.raises(ResumeError, match="seed=0"):
            search(space, objective, "parts", "linas", **settings)
    finally:
        objective.seed = 0


def test_the_front_is_kept_and_built(space: PolicySpace, objective: Any) -> None:
    result = search(space, objective, "one", "random")
    front = result.pareto()
    scores = [(t.metrics["val_accuracy"], -t.metrics["bytes"]) for t in front]
    assert not any(dominates(a, b) for a, b in itertools.permutations(scores, 2))
    assert result.hypervolume({"val_accuracy": 0.0, "bytes": 1e6}) > 0
    for trial in front:
        file = trial.file("model.onnx")
        assert file is not None
        assert file.stat().st_size == trial.metrics["bytes"]
        built = trial.build()
        state = space.build(space.canonical(trial.arch)).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in built.state_dict().items())
    loaded = type(result).load(Path("runs/one/result.json"), space)
    assert [t.arch for t in loaded.trials] == [t.arch for t in result.trials]


def test_equal_policies_are_measured_once(modal: PolicySpace, data: Data) -> None:
    objective = modal.objective(data)
    arch = modal.uniform()["float32"]
    assert objective.key(arch | {"0.mode": "asymmetric"}) == objective.key(arch)


@pytest.mark.slow
def test_the_front_door(model: nn.Module, data: Data) -> None:
    space = PolicySpace(model, bits=(4, 8, 32))
    goals = ("val_accuracy", "latency_ms", "bytes")
    result = nb.search(space, data, strategy="linas", objectives=goals, trials=3, constraints="bytes<1e9")
    assert all(trial.metrics["latency_ms"] > 0 for trial in result.complete)
    assert len(result.complete) == 3


# Refused -----------------------------------------------------------------------------------------------------------


def test_settings_of_training_have_no_meaning(space: PolicySpace, data: Data) -> None:
    with pytest.raises(CompressionError, match="'epochs' is about training"):
        nb.search(space, data, "random", epochs=3, progress=False)
    with pytest.raises(CompressionError, match="'recipe' is about training"):
        space.objective(data, recipe=nb.Recipe())
    with pytest.raises(SettingError, match="device 'mps'|run on the CPU"):
        space.objective(data, device="mps")


def test_data_of_another_kind_are_refused(space: PolicySpace, tmp_path: Path) -> None:
    import numpy as np

    wide = nb.data.from_arrays(np.zeros((100, 8, 8, 3), np.uint8), np.arange(100) % 10)
    with pytest.raises(CompressionError, match="does not take a batch"):
        nb.search(space, wide, "random", folder=tmp_path / "runs", progress=False)
    fewer = nb.data.from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4)
    with pytest.raises(CompressionError, match="which has 4 classes"):
        nb.search(space, fewer, "random", folder=tmp_path / "runs", progress=False)
    with pytest.raises(SettingError, match="measured on images"):
        space.objective(nb.data.load("pydoc", characters=20_000))
    assert not (tmp_path / "runs").exists()


def test_without_onnxruntime_nothing_begins(
    space: PolicySpace, data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    with pytest.raises(ImportError, match="deploy"):
        nb.search(space, data, "random", folder=tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists()


def test_a_function_may_judge_policies(space: PolicySpace) -> None:
    result = nb.search(
        space,
        lambda arch: {"score": len(set(arch.values()))},
        "linas",
        objectives={"score": "maximize"},
        trials=5,
        progress=False,
    )
    assert result.best.metrics["score"] >= 2


def test_a_pruner_has_nothing_to_watch(space: PolicySpace, data: Data) -> None:
    with pytest.raises(SettingError, match="a pruner compares validation accuracies.* trials that are trained"):
        nb.search(space, data, "random", trials=2, objectives="val_accuracy", pruner="median")
