"""One-shot searches: the loop, its checkpoints, alarms, and the trials they leave."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nasbench as nb
from nasbench import supernets
from nasbench.errors import CheckpointError, DataError, ResumeError, SettingError, TrainingDiverged
from nasbench.memory import step_bytes
from nasbench.ranks import Ranks
from nasbench.shared_weights import SupernetObjective
from nasbench.strategies import ONE_SHOT
from nasbench.supernets import SupernetTraining, count_operations, count_skips, read_epochs
from search_spaces import ArchError, NASBench201, ResNet

SPACE = NASBench201(channels=4, cells=1)
SMALL: dict[str, Any] = {"epochs": 2, "batch_size": 32, "progress": False}


@pytest.fixture(scope="module")
def data() -> nb.Data:
    return nb.data.load("digits", train_images=320)


@pytest.fixture(scope="module")
def table() -> nb.Table:
    return nb.Table.load("nasbench201-digits")


def trained(data: nb.Data, name: str = "darts", file: Path | None = None, **changes: Any) -> SupernetTraining:
    recipe = {"epochs": 2, "batch_size": 32} | {k: changes.pop(k) for k in ("epochs", "lr", "clip") if k in changes}
    strategy = ONE_SHOT[name].replace(**changes)
    return SupernetTraining(SPACE.bind(data), data, strategy, strategy.recipe.replace(**recipe), file=file)


def numbers(training: SupernetTraining) -> list[torch.Tensor]:
    return [t.clone() for t in (*training.supernet.state_dict().values(), *training.logits.values())]


def same(a: SupernetTraining, b: SupernetTraining) -> bool:
    plain = [[{k: v for k, v in e.items() if "seconds" not in k} for e in training.epochs] for training in (a, b)]
    return plain[0] == plain[1] and all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["darts", "gdas", "drnas", "pcdarts"])
def test_a_search_decodes_one_architecture_and_keeps_its_weights(name: str, data: nb.Data, table: nb.Table) -> None:
    result = nb.search(SPACE, data, name, study="s", table=table, **SMALL)
    (trial,) = result.trials
    assert trial.arch == result.space.decode(result.space.one_hot(trial.arch))
    assert 0 <= trial.metrics["val_accuracy"] <= 1
    assert trial.metrics["table_value"] == pytest.approx(table.query(trial.arch, "test_accuracy"))
    model = trial.build()
    assert nb.validate(model, data)["val_accuracy"] == pytest.approx(trial.metrics["val_accuracy"])
    assert sum(p.numel() for p in model.parameters()) == trial.metrics["params"]
    fresh = trial.build(weights=False)
    assert fresh(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert [e["epoch"] for e in result.epochs] == [1, 2]
    last = result.epochs[-1]
    assert last["arch"] == dict(trial.arch)
    assert (last["rank"], last["val_accuracy"]) == (trial.metrics["rank"], trial.metrics["val_accuracy"])
    assert last["rank_of"] == len(table)
    assert set(result.space.sites) <= set(last["probabilities"])
    assert (Path("runs/s") / "report.html").exists()
    assert (Path("runs/s") / "search.png").exists()
    again = nb.SearchResult.load("runs/s/result.json")
    assert again.epochs == result.epochs
    assert torch.equal(again.best.build()(torch.ones(2, 1, 8, 8)), model(torch.ones(2, 1, 8, 8)))


def test_single_path_searches_by_evolution_with_shared_weights(data: nb.Data) -> None:
    result = nb.search(SPACE, data, "spos", study="s", trials=12, population=6, parents=2, **SMALL)
    assert len({trial.arch for trial in result.complete}) == 12
    best = result.best
    assert nb.validate(best.build(), data)["val_accuracy"] == pytest.approx(best.metrics["val_accuracy"])
    assert [set(e) & {"arch", "probabilities"} for e in result.epochs] == [{"arch"}, {"arch"}]
    weights = sorted(Path("runs/s/trials").glob("*/weights.safetensors"))
    assert len(weights) == 1


def test_constraints_reach_the_sub_networks(data: nb.Data) -> None:
    result = nb.search(
        SPACE, data, "spos", study="s", trials=4, population=2, parents=1, constraints="params<8000", **SMALL
    )
    assert all(trial.metrics["params"] < 8000 for trial in result.complete)
    assert len(result.complete) == 4


def test_a_finished_search_returns_at_once_and_does_not_train(data: nb.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nb.search(SPACE, data, "darts", study="s", **SMALL)
    monkeypatch.setattr(SupernetTraining, "run", lambda *_: pytest.fail("it trained again"))
    again = nb.search(SPACE, data, "darts", study="s", **SMALL)
    assert again.to_json() == first.to_json()


def test_a_timeout_leaves_a_search_that_goes_on(data: nb.Data) -> None:
    settings = SMALL | {"epochs": 3}
    whole = nb.search(SPACE, data, "darts", study="whole", **settings)
    part = nb.search(SPACE, data, "darts", study="part", timeout=0.01, **settings)
    assert part.trials == []
    for _ in range(3):
        rest = nb.search(SPACE, data, "darts", study="part", **settings)
    assert rest.best.arch == whole.best.arch
    assert rest.best.metrics == whole.best.metrics
    assert [e["probabilities"] for e in rest.epochs] == [e["probabilities"] for e in whole.epochs]


def test_second_order_searches(data: nb.Data) -> None:
    finite, exact = (
        nb.search(SPACE, data, "darts", second_order=True, hessian=h, study=h, **SMALL) for h in ("finite", "exact")
    )
    assert finite.epochs[-1]["probabilities"] != exact.epochs[-1]["probabilities"]


# Any time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "off"), [("gdas", False), ("spos", 0)])
def test_scoring_changes_nothing_of_the_training(name: str, off: Any, data: nb.Data) -> None:
    scored, plain = trained(data, name), trained(data, name, anytime=off)
    for training in (scored, plain):
        training.run(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(numbers(scored), numbers(plain), strict=True))
    for with_scores, without in zip(scored.epochs, plain.epochs, strict=True):
        more = {"val_accuracy", "val_loss", "scoring_seconds"} | ({"arch"} if name == "spos" else set())
        assert set(with_scores) - set(without) == more
        assert all(with_scores[k] == v for k, v in without.items() if k != "seconds")
        assert 0 < with_scores["scoring_seconds"] < with_scores["seconds"]
    assert scored.epochs[0]["scoring_seconds"] < scored.epochs[1]["scoring_seconds"]


def test_the_score_is_that_of_a_trial(data: nb.Data) -> None:
    training = trained(data)
    training.run(progress=False)
    network = training.supernet.extract(training.arch)
    nb.recalibrate(network, data, batch_size=32)  # all training images, though a half of them trained the weights
    last = training.epochs[-1]
    assert nb.validate(network, data) == {name: last[name] for name in ("val_accuracy", "val_loss")}


def test_single_paths_choose_the_best_of_newcomers_and_the_last_choice(
    data: nb.Data, monkeypatch: pytest.MonkeyPatch, table: nb.Table
) -> None:
    space, spos = SPACE.bind(data), ONE_SHOT["spos"].replace(anytime=3)
    ranks = Ranks(space, table, "test_accuracy")
    recipe = spos.recipe.replace(epochs=4, batch_size=32)
    training = SupernetTraining(space, data, spos, recipe, ranks=ranks)
    rounds: list[list[Any]] = [[], [], [], []]

    def inherit(self: SupernetTraining, arch: Any) -> Any:
        rounds[len(self.epochs)].append(arch)
        return None, {"val_accuracy": list(arch.values()).count("nor_conv_3x3") / 6, "val_loss": 1.0}

    monkeypatch.setattr(SupernetTraining, "inherit", inherit)
    training.run(progress=False)
    choices = [space.check(entry["arch"]) for entry in training.epochs]
    assert [len({*archs}) for archs in rounds] == [3, 4, 4, 4]
    assert [archs[0] for archs in rounds[1:]] == choices[:-1]
    for entry, choice, archs in zip(training.epochs, choices, rounds, strict=True):
        scores = [list(arch.values()).count("nor_conv_3x3") for arch in archs]
        assert choice == archs[scores.index(max(scores))]  # of equal ones the one that stands
        assert entry["rank"] == ranks.look_up(choice)["rank"]
    with pytest.raises(SettingError, match="has decoded no architecture"):
        _ = training.arch


def test_the_bar_says_how_good_the_choice_is(data: nb.Data, capsys: pytest.CaptureFixture[str]) -> None:
    trained(data, "spos").run()
    assert re.search(r"loss \d\.\d{3}, accuracy 0\.\d{3}, validation 0\.\d{3}", capsys.readouterr().err)


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["darts", "gdas", "drnas", "pcdarts", "spos"])
def test_an_interrupted_training_goes_on_bit_for_bit(name: str, data: nb.Data, tmp_path: Path) -> None:
    whole = trained(data, name, epochs=3)
    whole.run(progress=False)

    class Stop(Exception):
        pass

    def interrupt(after: int) -> Any:
        left = iter(range(after))

        def check() -> None:
            if next(left, None) is None:
                raise Stop

        return check

    for steps in (5, 7):  # an epoch has 4 steps, or 8 where all images train weights
        with pytest.raises(Stop):
            trained(data, name, tmp_path / "c.pt", epochs=3).run(interrupt(steps), progress=False)
    rest = trained(data, name, tmp_path / "c.pt", epochs=3)
    rest.run(progress=False)
    assert same(whole, rest)


@pytest.mark.slow
def test_a_search_killed_by_minus_nine_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    code = """
import nasbench as nb
from search_spaces import NASBench201
data = nb.data.load("digits", train_images=320)
nb.search(NASBench201(channels=4, cells=1), data, "gdas", study="s", epochs=12, batch_size=32, seed=1, progress=False)
"""

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", code], cwd=folder)

    assert start(tmp_path / "whole").wait() == 0
    for kill in range(3):
        process = start(tmp_path / "broken")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(read_epochs(tmp_path / "broken" / "runs" / "s")) <= 2 + 2 * kill:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "broken").wait() == 0
    results = [nb.SearchResult.load(tmp_path / part / "runs" / "s" / "result.json") for part in ("whole", "broken")]
    assert dict(results[0].best.metrics) == dict(results[1].best.metrics)
    assert results[0].best.arch == results[1].best.arch
    states = [r.best.build().state_dict() for r in results]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch_lr": 0.5}, "arch_lr is 0.0003 there and 0.5 here"),
        ({"lr": 0.5}, "lr is 0.025 there and 0.5 here"),
        ({"partial_channels": 2}, "supernet is"),
        ({"anytime": False}, "anytime is True there and False here"),
    ],
)
def test_a_checkpoint_of_another_supernet_is_refused(
    change: dict[str, Any], message: str, data: nb.Data, tmp_path: Path
) -> None:
    trained(data, file=tmp_path / "c.pt").run(progress=False)
    with pytest.raises(CheckpointError, match=f"belongs to another run: .*{message}"):
        trained(data, file=tmp_path / "c.pt", **change)


def test_a_checkpoint_of_something_else_is_refused(data: nb.Data, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="is corrupt, or none"):
        trained(data, file=tmp_path / "c.pt")
    torch.save({"format": 1}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a one-shot search"):
        trained(data, file=tmp_path / "c.pt")


# What is learned, and what is not ------------------------------------------------------------------------------------


def test_weights_and_architecture_learn_from_different_halves(data: nb.Data) -> None:
    training = trained(data)
    assert training.held is not None
    rows = [set(half._rows["train"].tolist()) for half in (training.data, training.held)]
    assert rows[0].isdisjoint(rows[1])
    assert rows[0] | rows[1] == set(data._rows["train"].tolist())
    assert rows[0].isdisjoint(data._rows["val"].tolist())
    own = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert own == {id(p) for p in training.supernet.parameters()}
    assert own.isdisjoint(map(id, training.logits.values()))


def test_architecture_weights_wait_for_their_first_epoch(data: nb.Data) -> None:
    training = trained(data, arch_start=0.5)
    before = [row.detach().clone() for row in training.logits.values()]
    training._epoch(0, 4, 0, 1, lambda: None, supernets.tqdm(disable=True))
    assert all(torch.equal(a, b) for a, b in zip(before, training.logits.values(), strict=True))
    assert training.epochs[0]["arch_loss"] is None
    training._epoch(1, 4, 0, 1, lambda: None, supernets.tqdm(disable=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, training.logits.values(), strict=True))


def test_single_paths_learn_from_all_training_images(data: nb.Data) -> None:
    training = trained(data, "spos")
    assert training.held is None
    assert training.data.count("train") == data.count("train")
    assert training.logits == {}
    with pytest.raises(SettingError, match="has decoded no architecture"):
        _ = training.arch


def test_nan_ends_a_search_with_a_reason(data: nb.Data) -> None:
    with pytest.raises(TrainingDiverged, match=r"are not finite in epoch 1. Lower lr \(it is 1e\+12\), clip"):
        trained(data, lr=1e12, clip=None).run(progress=False)
    with pytest.raises(TrainingDiverged, match=r"or arch_lr \(1e\+30\)"):
        trained(data, "drnas", arch_lr=1e30, arch_start=0.0).run(progress=False)
    training = trained(data)
    with torch.no_grad():
        next(iter(training.logits.values())).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"architecture weights are|the loss is"):
        training.run(progress=False)


# Alarms --------------------------------------------------------------------------------------------------------------


def test_skips_are_those_of_the_normal_cell() -> None:
    assert count_skips({"e01": "skip_connect", "e02": "none"}) == 1
    cell = {"normal2_inputs": "0-1", "normal2_op0": "skip_connect", "reduce2_op0": "skip_connect"}
    assert (count_skips(cell), count_operations(cell)) == (1, 1)


def collapse(training: SupernetTraining, epoch: int) -> None:
    """Make the architecture weights want skip connections only."""
    with torch.no_grad():
        for site, row in training.logits.items():
            row.copy_(5.0 * (torch.arange(len(row)) == training.space.sites[site].index("skip_connect")))


def test_a_collapse_is_announced_once(data: nb.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trained(data, epochs=3)
    collapse(training, 0)
    with pytest.warns(UserWarning, match="skip connections take over: 6 of 6 operations after epoch 1") as caught:
        training.run(progress=False)
    assert len([w for w in caught if "take over" in str(w.message)]) == 1
    assert training.epochs[-1]["skips"] == 6


def test_stop_skips_goes_back_to_the_last_good_epoch(data: nb.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trained(data, epochs=9, stop_skips=6)
    original = SupernetTraining._record

    def record(self: SupernetTraining, epoch: int, *rest: Any) -> dict[str, Any]:
        if epoch == 2:
            collapse(self, epoch)
        return original(self, epoch, *rest)

    monkeypatch.setattr(SupernetTraining, "_record", record)
    with pytest.warns(UserWarning, match="take over"):
        training.run(progress=False)
    assert (len(training.epochs), training.chosen) == (3, 2)
    assert dict(training.arch) == training.epochs[1]["arch"]
    assert training.done()


def test_stop_skips_waits_for_an_architecture_with_fewer(data: nb.Data) -> None:
    training = trained(data, epochs=3, stop_skips=1)
    collapse(training, 0)
    with pytest.warns(UserWarning, match="take over"):
        training.run(progress=False)
    assert (len(training.epochs), training.chosen) == (3, None)  # there was none to go back to
    begins_late = trained(data, epochs=4, stop_skips=6, arch_start=0.5)
    collapse(begins_late, 0)
    with pytest.warns(UserWarning, match="take over"):
        begins_late.run(progress=False)
    assert begins_late.chosen is None  # nothing was learned before the third epoch


@pytest.mark.slow
def test_stop_eigenvalue_goes_back_a_window(data: nb.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trained(data, epochs=30, stop_eigenvalue=True)
    monkeypatch.setattr(SupernetTraining, "_eigenvalue", lambda self, epoch: 1.0 if epoch < 12 else 3.0)
    training.run(progress=False)
    # Windows of five: 4 * 1 + 3 = 7 after 13 epochs, against 5 in those before: 5 / 7 < 0.75.
    assert (len(training.epochs), training.chosen) == (13, 8)
    negative = trained(data, epochs=11, stop_eigenvalue=True)
    monkeypatch.setattr(SupernetTraining, "_eigenvalue", lambda self, epoch: -0.01 if epoch < 5 else 0.02)
    negative.run(progress=False)
    assert negative.chosen is None  # a curvature that was negative has not grown by a third


def test_eigenvalues_are_recorded(data: nb.Data) -> None:
    training = trained(data, stop_eigenvalue=True)
    training.run(progress=False)
    assert all(isinstance(e["eigenvalue"], float) and e["eigenvalue"] != 0 for e in training.epochs)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "darts", "trials": 5}, "decodes one architecture, but trials=5"),
        ({"strategy": "darts", "population": 5}, "has no setting 'population'"),
        ({"strategy": "darts", "amp": True}, "amp=True: supernets are trained in float32"),
        ({"strategy": "darts", "table": "x"}, "table is 'x': give a nasbench.Table"),
        ({"strategy": "random", "trials": 1, "use_table": True}, "this strategy decodes none"),
        ({"strategy": "darts", "workers": 2}, "workers=2, but a one-shot search trains one supernet"),
        ({"strategy": "darts", "pruner": "median"}, "a pruner ends trainings early, but a one-shot search"),
        ({"strategy": "darts", "drop_path": 0.2}, "drop_path=0.2: a supernet has no such thing"),
        ({"strategy": "darts", "auxiliary": 0.1}, "auxiliary=0.1: a supernet has no such thing"),
        (
            {"strategy": "darts", "second_order": True, "nesterov": True},
            "second_order=True looks ahead by a step of plain",
        ),
        (
            {"strategy": "darts", "second_order": True, "recipe": nb.Recipe(epochs=1)},
            "nesterov=True, label_smoothing=0. Use optimizer='sgd'",
        ),
        ({"strategy": "darts", "second_order": True, "label_smoothing": 0.1}, "label_smoothing=0.1. Use optimizer"),
        ({"strategy": "spos", "objectives": ("val_accuracy", "params")}, "SinglePath follows one objective"),
        ({"strategy": "spos", "objectives": {"rank": "minimize"}, "use_table": True}, "does not report 'rank'"),
        ({"strategy": "darts", "cutout": 20}, "cutout=20 is outside 0..8"),
        ({"strategy": "darts", "partial_channels": 3}, "partial_channels=3, but a cell has 4 channels"),
        ({"strategy": "darts", "study": "../x"}, "cannot be a folder name"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, data: nb.Data, table: nb.Table) -> None:
    if settings.pop("use_table", False):
        settings = settings | {"table": table}
    with pytest.raises((SettingError, ArchError), match=message):
        nb.search(SPACE, data, **{**({"progress": False} if "recipe" in settings else SMALL), **settings})
    assert not Path("runs").exists()


def test_too_few_images_are_refused_before_anything_is_written() -> None:
    few = nb.data.from_arrays(np.zeros((8, 8, 8), np.uint8), np.arange(8) % 4, val_fraction=0.5)
    with pytest.raises(DataError, match="half of the 4 training images of arrays has none of class"):
        nb.search(SPACE, few, "darts", **SMALL)
    assert not Path("runs").exists()


def test_a_table_metric_must_be_there(data: nb.Data, table: nb.Table) -> None:
    with pytest.raises(SettingError, match="the table has no metric 'tset_accuracy'; did you mean 'test_accuracy'"):
        nb.search(SPACE, data, "darts", table=(table, "tset_accuracy"), **SMALL)


def test_one_shot_needs_images_and_a_supernet(data: nb.Data, table: nb.Table) -> None:
    with pytest.raises(SettingError, match="trains a supernet: it needs data, .*, not Table"):
        nb.search(SPACE, table, "darts", epochs=1)
    for name in ("darts", "spos"):
        with pytest.raises(ArchError, match="ResNet has no supernet, and one-shot strategies need one"):
            nb.search(ResNet(), data, name, **SMALL)
    assert not Path("runs").exists()
    with pytest.raises(SettingError, match="'darts' trains a supernet, and nothing is trained here"):
        nb.compare(["darts"], SPACE, table)


class Plain(NASBench201):
    """A space whose supernet takes one setting, and whose options are numbers."""

    def supernet(self, *, recompute: bool = False) -> Any:
        return super().supernet(recompute=recompute)


class Numbers(Plain):
    @property
    def choices(self) -> Any:
        return {"width": (8, 16)}


class Anything(NASBench201):
    def supernet(self, **settings: Any) -> Any:
        return super().supernet()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"partial_channels": 2},
            "strategy 'darts' sets partial_channels=2, which the supernet of Plain does not take: it takes recompute. "
            "Leave it out, or use partial_channels=1.",
        ),
        ({"form": "textbook"}, "strategy 'darts' sets form='textbook', .* Leave it out, or use form='fast'."),
        ({"strategy": "pcdarts", "edge_weights": False}, "strategy 'pcdarts' sets partial_channels=4, which .* Plain"),
    ],
)
def test_a_setting_that_a_supernet_does_not_take_is_refused(
    settings: dict[str, Any], message: str, data: nb.Data
) -> None:
    with pytest.raises(SettingError, match=message):
        nb.search(Plain(channels=4, cells=1), data, **{"strategy": "darts", **SMALL, **settings})
    assert not Path("runs").exists()


def test_a_setting_that_a_supernet_takes_reaches_it(data: nb.Data) -> None:
    for space, settings in ((Plain, {"recompute": True}), (Anything, {"partial_channels": 2})):
        strategy = ONE_SHOT["darts"].replace(**settings)
        SupernetObjective(space(channels=4, cells=1).bind(data), data, strategy, strategy.recipe)


def test_stop_skips_without_skips_is_refused(data: nb.Data) -> None:
    with pytest.raises(SettingError, match="counts skip connections for stop_skips=2, but Numbers has none among"):
        nb.search(Numbers(channels=4, cells=1), data, "darts", stop_skips=2, **SMALL)
    assert not Path("runs").exists()


def test_a_step_that_does_not_fit_is_refused_before_it_is_made(data: nb.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Path("runs").exists()
    monkeypatch.setattr(supernets, "free_bytes", lambda device: 1000)
    with pytest.raises(SettingError, match="needs about .* GB at batch_size=32, and 0.0 GB are free on cpu. Lower"):
        nb.search(SPACE, data, "darts", **SMALL)


def test_predicted_memory_is_what_a_larger_step_takes(data: nb.Data) -> None:
    from nasbench.memory import alive_bytes

    training = trained(data)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        training._architecture_gradients(0, (x, y), (x, y), torch.Generator())

    before = numbers(training)
    predicted = step_bytes(training.supernet, step, data.shape, 48)
    assert all(torch.equal(a, b) for a, b in zip(before, numbers(training), strict=True))
    weights = sum(4 * p.numel() for p in training.supernet.parameters())
    assert predicted - weights == pytest.approx(max(alive_bytes(training.supernet, step, data.shape, 48)), rel=0.02)


def test_exact_second_order_is_predicted_to_take_more_memory(data: nb.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = []
    original = supernets.memory.step_bytes
    monkeypatch.setattr(supernets.memory, "step_bytes", lambda *a: needs.append(original(*a)) or needs[-1])
    for settings in ({}, {"second_order": True, "hessian": "exact"}):
        trained(data, **settings).check_memory()
    assert needs[1] > 1.3 * needs[0]


def test_several_objectives_describe_the_one_architecture(data: nb.Data) -> None:
    result = nb.search(SPACE, data, "darts", objectives=("val_accuracy", "params"), study="s", **SMALL)
    assert len(result.pareto()) == 1


def test_a_decoded_architecture_that_breaks_a_constraint_is_said(data: nb.Data) -> None:
    with pytest.warns(UserWarning, match="nothing was found: .*params.*breaks params<10"):
        result = nb.search(SPACE, data, "darts", constraints="params<10", study="s", **SMALL)
    assert result.complete == []
    assert len(result.epochs) == 2


def test_more_metrics_are_another_study(data: nb.Data) -> None:
    nb.search(SPACE, data, "darts", study="s", **SMALL)
    with pytest.raises(ResumeError, match="extra"):
        nb.search(SPACE, data, "darts", study="s", metrics="bytes", **SMALL)
    with pytest.raises(ResumeError, match="was written with strategy"):
        nb.search(SPACE, data, "gdas", study="s", **SMALL)


def test_any_strategy_may_search_shared_weights(data: nb.Data) -> None:
    space = SPACE.bind(data)
    spos = ONE_SHOT["spos"]
    objective = SupernetObjective(space, data, spos, spos.recipe.replace(epochs=2, batch_size=32))
    result = nb.search(space, objective, "random", trials=3, study="s", progress=False)
    seeded = [trial.arch for trial in nb.search(space, lambda a: {"x": 1.0}, "random", objectives={"x": "maximize"},
                                                trials=3, progress=False).trials]  # fmt: skip
    assert [trial.arch for trial in result.trials] == seeded
    assert len(result.epochs) == 2


def test_a_smaller_rate_keeps_its_share_at_the_end(data: nb.Data) -> None:
    result = nb.search(SPACE, data, "darts", lr=0.0005, study="s", **SMALL)
    recipe = result.conditions["objective"]["recipe"]
    assert (recipe["lr"], recipe["lr_end"]) == (0.0005, pytest.approx(0.00002))


def test_label_smoothing_is_in_the_loss_of_the_weights(data: nb.Data) -> None:
    plain, smooth = trained(data), trained(data)
    smooth.recipe = smooth.recipe.replace(label_smoothing=0.5)
    for training in (plain, smooth):
        training.run(progress=False)
    assert plain.epochs[0]["train_loss"] != smooth.epochs[0]["train_loss"]


def test_the_objective_says_what_it_is(data: nb.Data) -> None:
    strategy = ONE_SHOT["darts"]
    objective = SupernetObjective(SPACE.bind(data), data, strategy, strategy.recipe)
    settings = objective.settings()
    assert settings["kind"] == "supernet"
    assert settings["recipe"]["epochs"] == 50
    assert json.loads(json.dumps(settings)) == settings
