"""Joint searches: architecture, masks and bits in one space, trained, deployed and measured as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import nasbench as nb
from compress.errors import CompressionError
from compress.joint import Bits, JointSpace, bits
from compress.low_bit_models import low_bits
from compress.policy import apply_policy, parse
from compress.pruning import masks
from compress.weights import weights
from nasbench import training
from nasbench.data import Data
from nasbench.errors import SettingError
from nasbench.objective import TrainObjective, TrialRun
from nasbench.recipe import Recipe
from search_spaces import DARTS, Arch, ArchError, ConvMacro, MobileNetV3, NASBench201, ResNet
from search_spaces.base import Choices, SearchSpace

pytest.importorskip("onnxruntime")

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 128, "device": "cpu"}
INNER = ResNet(depths=(1,), widths=(4, 8))
ALL = bits(4, 8, 32, density=(1.0, 0.5), sparse_ift=(None, "wide"))


@pytest.fixture(scope="module")
def data() -> Data:
    return nb.data.load("digits")


class Simulated(nn.Module):
    """A deployment without ONNX: quick, for tests of the search around it."""

    bytes: int

    def __init__(self, model: nn.Module, calibration: Any) -> None:
        super().__init__()
        self.model, self.bytes = model, 0

    def deploy(self, policy: dict[str, str]) -> Any:
        own = weights(self.model)
        bits = {name: 32 if option == "float32" else parse(option)[1] for name, option in policy.items()}
        found = Simulated(apply_policy(self.model, policy).eval(), None)
        found.bytes = sum(own[name].size * bits[name] for name in policy) // 8
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x)
        return logits

    def save(self, path: Path) -> None:
        path.write_bytes(bytes(self.bytes))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.deployment.Deployer", Simulated)


@pytest.fixture(scope="module")
def space(data: Data) -> JointSpace:
    return (INNER * bits(4, 8, 32)).bind(data)


@pytest.fixture(scope="module")
def objective(space: JointSpace, data: Data) -> Any:
    found = space.objective(data, **QUICK)
    found.want(["val_accuracy", "bytes", "file_bytes"])
    return found


def all_of(space: JointSpace, option: str, **more: Any) -> Arch:
    """Return the smallest architecture with one option for all parts."""
    smallest = {name: options[0] for name, options in space.choices.items()}
    return space.check(smallest | {f"bits.{part}": option for part in space.parts} | more)


# The space ---------------------------------------------------------------------------------------------------------


def test_a_space_times_bits_is_a_space(data: Data) -> None:
    space = (INNER * ALL).bind(data)
    assert space.parts == ("stem", "stage0", "stage1", "stage2", "head")
    own = ["bits.stem", "bits.stage0", "bits.stage1", "bits.stage2", "bits.head", "density", "sparse_ift"]
    assert list(space.choices) == [*INNER.choices, *own]
    assert space.size == INNER.size * 3**5 * 2 * 2
    assert space == (INNER.bind(data) * ALL)
    assert hash(space) == hash(INNER.bind(data) * ALL)
    assert space.fingerprint != (INNER * bits(4, 8)).bind(data).fingerprint
    with pytest.raises(ArchError, match="does not know"):
        _ = (INNER * ALL).choices
    with pytest.raises(TypeError):
        _ = 3 * bits(4)  # type: ignore[operator]


@pytest.mark.parametrize("inner", [INNER, NASBench201(channels=4, cells=1), MobileNetV3(depths=(1, 2), width=0.25)])
def test_the_space_keeps_the_laws_of_spaces(inner: SearchSpace, data: Data) -> None:
    space, rng = (inner * ALL).bind(data), Random(3)
    for _ in range(8):
        arch = space.sample(rng)
        assert arch in space
        assert space.decode(space.encode(arch)) == space.at(space.index(arch)) == arch
        assert Arch.from_json(arch.to_json()) == arch
        mutant = space.mutate(arch, rng)
        assert sum(mutant[d] != arch[d] for d in arch) == 1
        assert space.crossover(arch, mutant, rng) in space
        canonical = space.canonical(arch)
        assert canonical in space
        assert space.canonical(canonical) == canonical
        assert space.inner(canonical) == space.space.canonical(space.inner(arch))
        assert space.graph(arch) == space.space.graph(space.inner(arch))


def test_what_has_no_effect_is_the_first_option(data: Data) -> None:
    space = (NASBench201(channels=4, cells=1) * ALL).bind(data)
    empty = space.space.parse("|skip_connect~0|+|none~0|none~1|+|none~0|none~1|none~2|")
    arch = space.check({**space.sample(Random(0)), **empty} | {f"bits.{part}": "float32" for part in space.parts})
    arch = arch | {"density": 1.0, "sparse_ift": "wide"}
    canonical = space.canonical(arch)
    assert canonical["sparse_ift"] is None
    assert [canonical[f"bits.{part}"] for part in ("stem", "stage1", "stage3")] == ["float32", "weights4", "weights4"]
    sparse = space.canonical(arch | {"density": 0.5})
    assert sparse["sparse_ift"] == "wide"


def test_parts_without_weights_have_no_decision(data: Data) -> None:
    assert (MobileNetV3() * bits(4, 8)).bind(data).parts == (
        *("stem", "first", "stage0", "stage1", "stage2", "stage3", "stage4", "final", "head"),
    )


@dataclass(frozen=True)
class Clashing(SearchSpace):
    """A space that has a density itself."""

    @cached_property
    def choices(self) -> Choices:
        return {"density": (1, 2)}

    def build(self, arch: Arch) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 2))


def test_decisions_do_not_clash() -> None:
    assert list((Clashing() * bits(4, 8)).choices) == ["density", "bits.0"]
    with pytest.raises(ArchError, match="rename it"):
        _ = (Clashing() * bits(4, 8, density=(1.0, 0.5))).choices


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bits(1), "from 2 to 8"),
        (lambda: bits(), "one at least"),
        (lambda: bits(4, kinds=("int8",)), "has 4 bits"),
        (lambda: bits(4, kinds=("dense_shift",)), "a training of their own"),
        (lambda: bits(4, density=(0.0,)), "share of the weights"),
        (lambda: bits(4, density=(0.5, 0.5)), "different values"),
        (lambda: bits(4, sparse_ift=(None, "wider")), "did you mean 'wide'"),
        (lambda: bits(4, sparse_ift=(None, "wide")), "leaves all dense"),
        (lambda: INNER * bits(4) * bits(8), "has bits already"),
        (lambda: DARTS(ops="sparse") * bits(4), "sparse operations"),
        (lambda: JointSpace(INNER, {"bits": 4}), "a space times bits"),  # type: ignore[arg-type]
        (lambda: JointSpace(INNER, bits(4), one_shot="darts"), "Known: spos"),
        (lambda: JointSpace(INNER, bits(4, density=(0.5,)), one_shot="spos"), "dense"),
    ],
)
def test_bad_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        make()


def test_networks_are_masked_and_have_few_bits(data: Data) -> None:
    space = (INNER * ALL).bind(data)
    x = torch.zeros(2, 1, 8, 8)
    dense = all_of(space, "weights4", **{"bits.head": "float32"})
    model = space.build(dense)
    assert {step.bits for step in low_bits(model).values()} == {4}
    assert "head.linear" not in low_bits(model)
    assert not masks(model)
    sparse: Any = space.build(dense | {"density": 0.5})
    kept = sum(int(mask.sum()) for mask in masks(sparse).values())
    assert kept == round(0.5 * sum(mask.numel() for mask in masks(sparse).values()))
    larger = space.build(dense | {"density": 0.5, "sparse_ift": "wide"})
    assert sum(p.numel() for p in larger.parameters()) > 1.5 * sum(p.numel() for p in model.parameters())
    assert model(x).shape == sparse(x).shape == larger(x).shape == (2, 10)
    weight = sparse.stage1[0].conv1.conv.weight
    assert len(weight[0].unique()) <= 15
    nb.fit(sparse, data, **QUICK, progress=False)  # the rounding and the masks hold while it trains
    assert len(sparse.stage1[0].conv1.conv.weight[0].unique()) <= 15
    assert kept == sum(int(mask.sum()) for mask in masks(sparse).values())


# Measured ----------------------------------------------------------------------------------------------------------


def test_all_float_is_what_training_gives(space: JointSpace, objective: Any, data: Data) -> None:
    arch = all_of(space, "float32")
    recipe = Recipe(epochs=1, batch_size=128)
    plain = TrainObjective(space.space, data, recipe, seeds=(0,), device="cpu")(space.inner(arch), TrialRun())
    found = objective(arch, TrialRun())
    assert {name: found[name] for name in ("val_accuracy", "params", "macs")} == {
        name: plain[name] for name in ("val_accuracy", "params", "macs")
    }
    assert objective.preview(arch, ["params", "bytes"]) == {"params": plain["params"]}


@pytest.mark.slow
def test_measuring_twice_gives_the_same_bits(space: JointSpace, objective: Any, data: Data) -> None:
    arch = space.sample(Random(1))
    first = objective(arch, TrialRun())
    again = space.objective(data, **QUICK)
    again.want(objective.wanted)
    assert again(arch, TrialRun()) == first
    assert "latency_ms" not in first


@pytest.mark.usefixtures("simulated")
def test_networks_that_differ_in_bits_are_trained_once(
    space: JointSpace, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, fit = [], training.fit
    monkeypatch.setattr(training, "fit", lambda *args, **settings: (fits.append(1), fit(*args, **settings))[1])
    objective = space.objective(data, **QUICK)
    sizes = [objective(all_of(space, option), TrialRun())["bytes"] for option in ("weights4", "int8", "float32")]
    assert len(fits) == 1
    assert sizes == sorted({*sizes})

    class Watched(TrialRun):
        watched = True
        reports: ClassVar[list[int]] = []

        def report(self, epoch: int, value: float) -> None:
            self.reports.append(epoch)

    objective = space.objective(data, **QUICK | {"epochs": 2})
    for option in ("weights4", "int8"):
        objective(all_of(space, option), Watched())
    assert Watched.reports == [1, 1], "a pruner sees every trial"


@pytest.mark.usefixtures("simulated")
def test_masks_save_bytes_of_the_packed_file(data: Data) -> None:
    space = (ResNet(depths=(1,), widths=(16,)) * bits(8, kinds=("weights",), density=(1.0, 0.1))).bind(data)
    objective = space.objective(data, **QUICK)
    objective.want(["val_accuracy", "file_bytes"])
    dense, sparse = (objective(all_of(space, "weights8", density=d), TrialRun()) for d in (1.0, 0.1))
    assert sparse["params"] < 0.2 * dense["params"]
    assert sparse["macs"] < dense["macs"]
    assert sparse["file_bytes"] < dense["file_bytes"]


@pytest.mark.usefixtures("simulated")
def test_a_killed_training_goes_on(space: JointSpace, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    goals = ("val_accuracy", "bytes")
    settings: dict[str, Any] = {"objectives": goals, "trials": 3, "seed": 2, "progress": False, "population": 2}
    settings |= {"evaluations": 10, **QUICK}
    whole = nb.search(space, data, "linas", study="whole", storage="whole.log", **settings)
    steps = iter(range(1000))

    def check(run: Any) -> None:
        if next(steps) == 12:  # in the second network
            raise KeyboardInterrupt

    monkeypatch.setattr("nasbench.worker._Run.check", check)
    stopped = nb.search(space, data, "linas", study="parts", storage="parts.log", **settings)
    assert len(stopped.complete) == 1
    again = nb.search(space, data, "linas", study="parts", storage="parts.log", **settings)
    assert [(t.arch, t.metrics) for t in again.trials] == [(t.arch, t.metrics) for t in whole.trials]
    assert (
        again.hypervolume({"val_accuracy": 0.0, "bytes": 1e9})
        == whole.hypervolumes({"val_accuracy": 0.0, "bytes": 1e9})[-1]
    )


@pytest.mark.slow
def test_the_best_is_built_and_trained_further(data: Data) -> None:
    space = INNER * bits(3, 5, kinds=("weights",))
    result = nb.search(space, data, "random", trials=2, study="a", storage="a.log", progress=False, **QUICK)
    best = result.best
    file = best.file("model.onnx")
    assert file is not None
    assert file.stat().st_size == best.metrics["bytes"]
    model = best.build()
    # Weights alone have few bits, so the deployed network computes what torch does.
    assert nb.validate(model, data)["val_accuracy"] == pytest.approx(best.metrics["val_accuracy"], abs=0.01)
    assert {step.bits for step in low_bits(model).values()} <= {3, 5}
    more = nb.fit(model, data, progress=False, **QUICK)
    assert nb.validate(more, data)["val_loss"] < best.metrics["val_loss"]


@pytest.mark.slow
def test_the_front_door(data: Data) -> None:
    goals = ("val_accuracy", "latency_ms", "bytes")
    space = MobileNetV3(depths=(1,), width=0.25, stem="cifar") * bits(4, 8)
    result = nb.search(space, data, strategy="linas", objectives=goals, trials=1, progress=False, **QUICK)
    assert result.complete[0].metrics["latency_ms"] > 0
    assert isinstance(result.space, JointSpace)


@pytest.mark.usefixtures("simulated")
def test_networks_out_of_one_supernet(data: Data) -> None:
    space = JointSpace(ConvMacro(widths=(4, 8)), bits(4, 8), one_shot="spos")
    goals = ("val_accuracy", "bytes")
    settings: dict[str, Any] = {"objectives": goals, "trials": 3, "study": "s", "progress": False, **QUICK}
    result = nb.search(space, data, "random", storage="s.log", **settings)
    assert len(result.complete) == 3
    trial = result.pareto()[0]
    assert 0 <= nb.validate(trial.build(), data)["val_accuracy"] <= 1
    assert nb.search(space, data, "random", storage="s.log", **settings).rows() == result.rows()


# Refused -----------------------------------------------------------------------------------------------------------


def test_settings_and_data_that_do_not_fit(space: JointSpace, data: Data) -> None:
    with pytest.raises(SettingError, match="measured on images"):
        (INNER * bits(4)).objective(nb.data.load("pydoc", characters=20_000))
    with pytest.raises(SettingError, match="no setting 'epoch'; did you mean 'epochs'"):
        nb.search(space, data, "linas", epoch=3, progress=False)
    with pytest.raises(SettingError, match="does not report 'byte'"):
        nb.search(space, data, "random", objectives="byte", progress=False)


def test_bits_are_no_paths_of_a_supernet(space: JointSpace, data: Data) -> None:
    with pytest.raises(ArchError, match="one_shot"):
        nb.search(space, data, "spos", progress=False)


def test_bits_are_values() -> None:
    assert bits(4, 8) == Bits() == Bits((4, 8))
    assert len({bits(4, 8), Bits(), bits(4)}) == 2
