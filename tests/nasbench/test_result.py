"""Results: the best and the front, rows and files, networks with their weights."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import nasbench as nb
from nasbench.errors import SettingError, StudyError, WeightsError
from nasbench.objective import WEIGHTS, save_weights
from nasbench.result import SearchResult, Trial, collect
from nasbench.strategies import distributions
from search_spaces import ArchError, NASBench201, ResNet
from search_spaces.base import Choices, SearchSpace

SPACE = NASBench201(channels=4, cells=1, classes=10, in_channels=1)
BOTH = {"val_accuracy": "maximize", "params": "minimize"}
CELL = "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"
SAME = "|skip_connect~0|+|none~0|none~1|+|none~0|nor_conv_3x3~1|none~2|"  # computes what CELL computes


@dataclass(frozen=True)
class Own(SearchSpace):
    """A space of a user: its name says nothing to `search_spaces`."""

    classes: int | None = None

    @cached_property
    def choices(self) -> Choices:
        return {"width": (1, 2.5, None), "op": ("a", "b")}

    def build(self, arch: Any) -> nn.Module:
        raise NotImplementedError


def trial(number: int, accuracy: float | None = 0.5, params: int = 100, **settings: Any) -> Trial:
    metrics = {} if accuracy is None else {"val_accuracy": accuracy, "params": params}
    given = {"state": "complete", "finished": number, "seconds": 1.5, "space": SPACE} | settings
    return Trial(number, SPACE.at(number), metrics=metrics, **given)


def result(*trials: Trial, **objectives: str) -> SearchResult:
    return SearchResult(SPACE, objectives or {"val_accuracy": "maximize"}, trials)


MIXED = (
    trial(0, 0.5, 300),
    trial(1, None, state="failed", reason="ValueError: no"),
    trial(2, 0.9, 500, finished=4),
    trial(3, 0.9, 900, finished=3, copied_from=0),
    trial(4, None, state="pruned", reason="params = 9 breaks params<5", finished=2),
    trial(5, 0.2, 100),
)


# Questions ---------------------------------------------------------------------------------------------------------


def test_the_best_of_equals_finished_first() -> None:
    assert result(*MIXED).best.number == 3
    assert [t.number for t in result(*MIXED).pareto()] == [3], "the trial whose weights a search keeps"
    assert result(*MIXED, params="minimize").best.number == 5
    assert [t.number for t in result(*MIXED).complete] == [0, 3, 2, 5]


def test_the_front_is_what_no_other_trial_beats() -> None:
    assert [t.number for t in result(*MIXED, **BOTH).pareto()] == [0, 2, 5]
    assert [t.number for t in result(*MIXED).pareto("params", "val_accuracy")] == [0, 2, 5]
    rng = np.random.default_rng(0)
    many = [
        trial(i, float(a), int(p)) for i, (a, p) in enumerate(zip(rng.random(60), rng.permutation(60), strict=True))
    ]

    def beats(a: Trial, b: Trial) -> bool:
        return a.metrics["val_accuracy"] > b.metrics["val_accuracy"] and a.metrics["params"] < b.metrics["params"]

    expected = [t for t in many if not any(beats(other, t) for other in many)]
    assert 1 < len(expected) < 60
    assert result(*many, **BOTH).pareto() == expected
    assert result(**BOTH).pareto() == []


def test_questions_without_an_answer() -> None:
    with pytest.raises(StudyError, match=r"there is no single best for val_accuracy, params. Use result.pareto\(\)"):
        _ = result(*MIXED, **BOTH).best
    with pytest.raises(StudyError, match="no trial completed. They said: ValueError: no"):
        _ = result(MIXED[1]).best
    with pytest.raises(StudyError, match="no trial completed"):
        _ = result().best
    with pytest.raises(SettingError, match="metric 'val_los' was not measured; .*Known: params, val_accuracy"):
        result(*MIXED).pareto("val_los")
    odd = dataclasses.replace(MIXED[0], metrics={"val_accuracy": 0.1, "score": 1.0})
    with pytest.raises(
        SettingError, match=r"is more 'score' better\? Only objectives and val_accuracy, .* known direct"
    ):
        result(odd).pareto("score")


def test_the_hypervolume_is_of_the_objectives_with_their_directions() -> None:
    better = {"val_accuracy": "maximize", "params": "minimize"}
    trials = trial(0, 0.5, 100), trial(1, 0.75, 200), trial(2, None, state="failed"), trial(3, 0.25, 300)
    found = result(*trials, **better)
    reference = {"val_accuracy": 0.25, "params": 300}
    assert found.hypervolume(reference) == 0.25 * 200 + 0.25 * 100  # two steps; trial 3 is no better anywhere
    assert found.hypervolumes(reference) == [50, 75, 75]
    assert result(**better).hypervolume(reference) == 0


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ({"val_accuracy": 0.5}, "no 'params'"),
        ({"val_accuracy": 0.5, "params": 9, "macs": 1}, "names 'macs'"),
        ({"val_accuracy": 0.5, "params": math.inf}, "finite"),
    ],
)
def test_a_reference_is_a_finite_number_for_each_objective(reference: dict[str, float], words: str) -> None:
    found = result(trial(0), val_accuracy="maximize", params="minimize")
    with pytest.raises(SettingError, match=words):
        found.hypervolume(reference)


def test_repr_counts_and_names_the_best() -> None:
    counts = "SearchResult of NASBench201: 4 complete, 1 pruned, 1 failed"
    assert repr(result(*MIXED)) == f"{counts}; best val_accuracy 0.9 in trial 3"
    assert repr(result(*MIXED, **BOTH)) == counts
    assert repr(result()) == "SearchResult of NASBench201: no trials"
    assert repr(SearchResult(SPACE, BOTH, (), folder=Path("runs/a"))).endswith("no trials; in runs/a")


# Rows and files ----------------------------------------------------------------------------------------------------


def test_rows_have_everything_of_a_trial() -> None:
    rows = result(*MIXED).rows()
    metrics = {"val_accuracy": 0.9, "params": 900}
    rest = {"seconds": 1.5, "copied_from": 0, "reason": None}
    assert rows[3] == {"number": 3, "state": "complete", **SPACE.at(3), **metrics, **rest}
    assert rows[1]["reason"] == "ValueError: no"
    assert "val_accuracy" not in rows[1]


def test_a_frame_holds_the_rows() -> None:
    pytest.importorskip("pandas")
    frame = result(*MIXED).to_frame()
    assert frame.shape == (6, 13)
    assert list(frame["val_accuracy"].dropna()) == [0.5, 0.9, 0.9, 0.2]
    assert list(frame["e01"]) == [SPACE.at(i)["e01"] for i in range(6)]


def test_without_pandas_there_are_still_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_frame needs pandas: pip install pandas. Or use result.rows\(\)"):
        result(*MIXED).to_frame()


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    runs = ({"val_accuracy": 0.4, "seconds": 2.0}, {"val_accuracy": 0.6, "seconds": 2.5})
    rich = trial(6, 0.1, runs=runs, parent=2, note={"op": [1, "x"]}, seconds=None)
    saved = SearchResult(SPACE, BOTH, [*MIXED, rich], folder=tmp_path, conditions={"seed": 3})
    path = saved.save(tmp_path / "deep" / "result.json")
    loaded = SearchResult.load(path)
    assert loaded.space == SPACE
    assert loaded.trials == saved.trials
    assert all((t.space, t.folder) == (SPACE, tmp_path) for t in loaded.trials)
    assert (loaded.objectives, loaded.conditions) == (BOTH, {"seed": 3})
    assert loaded.to_json() == saved.to_json()
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize("space", [ResNet(depths=(1, 2), widths=(8,)), NASBench201(channels=3)])
def test_spaces_by_name_come_back_with_their_settings(space: SearchSpace) -> None:
    first = Trial(0, space.at(1), "complete", {"score": 1.0})
    loaded = SearchResult.from_json(SearchResult(space, {"score": "maximize"}, [first]).to_json())
    assert loaded.space == space
    assert hash(loaded.space) == hash(space)
    assert loaded.trials == [first]


def test_a_space_of_the_users_own_has_to_be_given() -> None:
    mine = SearchResult(Own(), {"score": "maximize"}, [Trial(0, Own().at(5), "complete", {"score": 1})]).to_json()
    assert SearchResult.from_json(mine, Own()).best.arch == Own().arch(width=None, op="b")
    with pytest.raises(
        ArchError, match=r"no search space 'Own'; Known: .*resnet.* SearchResult.load\(path, space.bind\(data\)\)"
    ):
        SearchResult.from_json(mine)
    with pytest.raises(StudyError, match=r"belongs to \{'space': 'Own', 'classes': None\}, not to Own\(classes=3\)"):
        SearchResult.from_json(mine, Own(classes=3))


def edited(change: str, value: Any) -> str:
    entry = json.loads(result(*MIXED).to_json())
    *path, last = change.split(".")
    inner = entry
    for key in path:
        inner = inner[int(key)] if key.isdecimal() else inner[key]
    inner[last] = value
    return json.dumps(entry)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("not json", StudyError, r"this is no saved search result \(JSONDecodeError: .*Write one with save\(\)"),
        ("[]", StudyError, "this is no saved search result"),
        ("{}", StudyError, r"this is no saved search result \(KeyError: 'space'\)"),
        (edited("format", 2), StudyError, "result has format 2, this version reads up to 1. Update nasbench"),
        (edited("space", "NASBench201"), StudyError, "this is no saved search result"),
        (edited("space.space", "Nasbench21"), ArchError, "no search space 'Nasbench21'; did you mean 'nasbench201'"),
        (edited("space.space", "os:path"), ArchError, "there is no search space 'os:path'"),  # it would be imported
        (edited("trials", None), StudyError, "this is no saved search result"),
        (edited("trials.0.colour", "red"), StudyError, "this is no saved search result .*colour"),
        (
            edited("trials.0.arch.e01", "conv"),
            ArchError,
            "decision 'e01' of NASBench201 has option 'conv'; choices are",
        ),
        (edited("trials.0.arch", {"depth": 3}), ArchError, "an architecture of NASBench201 needs 'e01', 'e02'"),
    ],
)
def test_a_text_that_is_no_result_is_refused(text: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SearchResult.from_json(text)


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError, match=r"cannot read a search result from .*x.json: .*Name a file that save\(\) wrote"
    ):
        SearchResult.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(StudyError, match=r"cannot read a search result from .*x.json: .*codec can't decode"):
        SearchResult.load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(result(*MIXED).to_json()[:-100])
    with pytest.raises(StudyError, match="this is no saved search result"):
        SearchResult.load(tmp_path / "x.json")


def test_a_folder_that_is_a_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write .*/file/result.json: .*name a folder you can write to"):
        result(*MIXED).save(tmp_path / "file" / "result.json")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["search.png", "search.svg", "search"])
def test_a_plot_is_a_figure_and_a_file(tmp_path: Path, name: str) -> None:
    figure = result(*MIXED).plot(tmp_path / name)
    assert figure.axes
    start = (tmp_path / name).read_bytes()[:8]
    assert start.startswith(b"<?xml") if name.endswith("svg") else start == b"\x89PNG\r\n\x1a\n"


# Networks ----------------------------------------------------------------------------------------------------------


def with_weights(folder: Path, cell: str = CELL, **settings: Any) -> tuple[Trial, nn.Module]:
    """Return a trial whose weights lie in the folder, and the network they are of."""
    arch = SPACE.parse(cell)
    network = SPACE.build(SPACE.canonical(arch)).eval()
    save_weights(network, folder / "trials" / "4" / WEIGHTS)
    return Trial(
        **{"number": 4, "arch": arch, "state": "complete", "space": SPACE, "folder": folder} | settings
    ), network


@pytest.mark.parametrize(
    "settings", [{}, {"number": 7, "copied_from": 4}, {"number": 7, "copied_from": 4, "arch": SPACE.parse(SAME)}]
)
def test_build_gives_the_trained_network(tmp_path: Path, settings: dict[str, Any]) -> None:
    built, network = with_weights(tmp_path, **settings)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(built.build()(x), network(x))
    assert not built.build().training
    fresh = built.build(weights=False)
    assert fresh.training
    assert not torch.equal(fresh.eval()(x), network(x))


def test_build_says_why_there_are_no_weights(tmp_path: Path) -> None:
    advice = r"Use build\(weights=False\) and nasbench.fit\(model, data\)"
    found, _ = with_weights(tmp_path)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(WeightsError, match=f"(?s){match}.*{advice}"):
            dataclasses.replace(found, **changes).build()

    refused("trial 4 was not trained here, its metrics were looked up or computed", folder=None)
    refused(
        "trial 4 is failed .TrainingDiverged: nan.: it has no trained weights",
        state="failed",
        reason=("TrainingDiverged: nan"),
    )
    refused("trial 4 is pruned", state="pruned")
    refused("trial 5 has no weights at .*/trials/5/weights.safetensors: only the best trials keep theirs", number=5)
    refused("the weights at .*/trials/4/weights.safetensors do not fit the network", arch=SPACE.at(0))
    (tmp_path / "trials" / "4" / WEIGHTS).write_bytes(b"cut short")
    refused("the weights at .*/trials/4/weights.safetensors do not fit the network")


def test_a_study_folder_may_be_moved(tmp_path: Path) -> None:
    built, network = with_weights(tmp_path / "here")
    SearchResult(SPACE, BOTH, [built], folder=tmp_path / "here").save(tmp_path / "here" / "result.json")
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = SearchResult.load(tmp_path / "there" / "result.json")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.trials[0].build()(x), network(x))


# Studies -----------------------------------------------------------------------------------------------------------


def test_collect_reads_an_optuna_study() -> None:
    study = optuna.create_study(directions=["maximize"])
    asked = [study.ask(distributions(SPACE)) for _ in range(6)]
    asked[3].set_user_attr("metrics", {"val_accuracy": 0.25, "macs": 7})
    asked[3].set_user_attr("copied_from", 1)
    study.tell(asked[3], 0.25)
    asked[0].set_user_attr("error", "ValueError: no")
    study.tell(asked[0], state=optuna.trial.TrialState.FAIL)
    asked[1].set_user_attr("violation", "macs = 9 breaks macs<5")
    study.tell(asked[1], state=optuna.trial.TrialState.PRUNED)
    asked[4].report(0.1, 1)
    asked[4].set_user_attr("reason", "stopped by the pruner")
    study.tell(asked[4], state=optuna.trial.TrialState.PRUNED)
    study.tell(study.ask(), 1.0)  # has no architecture: not one of ours

    found = collect(study, SPACE, {"val_accuracy": "maximize"}, None, {})
    assert [(t.number, t.state, t.finished, t.reason) for t in found.trials] == [
        (0, "failed", 1, "ValueError: no"),
        (1, "pruned", 2, "macs = 9 breaks macs<5"),
        (3, "complete", 0, None),
        (4, "pruned", 3, "stopped by the pruner"),
    ]
    best = found.best
    assert (dict(best.metrics), best.copied_from) == ({"val_accuracy": 0.25, "macs": 7}, 1)
    assert dict(best.arch) == asked[3].params
    assert nb.SearchResult is SearchResult
