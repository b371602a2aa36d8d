"""The command line: what it prints, what it leaves on disk, and what it says to a bad line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nasbench as nb
from nasbench.cli import main
from search_spaces import NASBench201

ROOT = Path(__file__).parents[2]
SPACE = NASBench201()
CELL = "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|"
TINY = ["--space", "nasbench201", "--space-set", "channels=4", "cells=1", "--data-set", "train_images=200"]
TINY += ["--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of one small search, and what it wrote to standard output and standard error."""
    folder = tmp_path_factory.mktemp("searched")
    command = [sys.executable, "-m", "nasbench", "search", *TINY, "--trials", "3", "--folder", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    numbers = rng.random(SPACE.size)
    metrics = {"val_accuracy": numbers, "val_loss": 1 - numbers, "seconds": numbers, "error_rate": 1 - numbers}
    return nb.Table(SPACE, metrics, conditions={"data": "none"}).save(tmp_path_factory.mktemp("table") / "t.npz")


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """Run a command that is to end with this status; return what it printed, or its error."""
    capsys.readouterr()
    assert main(words) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


# Search, worker, report --------------------------------------------------------------------------------------------


def test_a_search_says_what_it_found_and_where_it_lies(searched: tuple[Path, str, str]) -> None:
    folder, out, err = searched
    (home,) = (path for path in folder.iterdir() if path.is_dir())
    assert home.name == "nasbench201-digits-evolution-1"
    result = nb.SearchResult.load(home / "result.json")
    best = result.best
    lines = out.splitlines()
    assert lines[0] == f"best of 3: trial {best.number}"
    assert lines[1].strip() == str(best.arch)
    assert f"val_accuracy {best.metrics['val_accuracy']:.4f}" in lines[2]
    assert f"params {best.metrics['params']:,}" in lines[2]
    number = best.number if best.copied_from is None else best.copied_from
    tested = nb.evaluate(best.build(), nb.data.load("digits", train_images=200))
    assert f"on test images, read this once: test_accuracy {tested['test_accuracy']:.4f}" in lines[3]
    told = dict(line.split(":", 1) for line in lines[4:])
    assert told.keys() == {"model", "report", "plot", "study"}
    assert Path(told["model"].strip()) == home / "trials" / str(number) / "weights.safetensors"
    assert all(Path(told[name].strip()).is_file() for name in ("model", "report", "plot"))
    assert f"(run again with --study {home.name} to go on)" in told["study"]
    assert "3/3" in err
    conditions = result.conditions
    assert conditions["objective"]["recipe"]["epochs"] == 1
    assert conditions["space"]["channels"] == 4


def test_a_finished_search_is_only_told_again(
    searched: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nb.SearchResult, "report", lambda self, path=None: None)
    monkeypatch.setattr(nb.SearchResult, "plot", lambda self, path=None: None)
    monkeypatch.setattr("nasbench.training.fit", None)
    name = "nasbench201-digits-evolution-1"
    line = ["search", *TINY, "--trials", "3", "--folder", str(searched[0]), "--study", name]
    assert said(capsys, *line) == searched[1]


def test_a_worker_finds_all_it_needs_in_the_study(
    searched: tuple[Path, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nb.SearchResult, "report", lambda self, path=None: None)
    monkeypatch.setattr(nb.SearchResult, "plot", lambda self, path=None: None)
    name, folder = "nasbench201-digits-evolution-1", str(searched[0])
    assert said(capsys, "worker", "--study", name, "--folder", folder, "--quiet") == ""
    error = said(capsys, "worker", "--study", "digit", "--folder", folder, status=2)
    assert f"nasbench: StudyError: there is no study 'digit' in {folder}/" in error
    assert "trials=0: a search needs" in said(
        capsys, "worker", "--study", name, "--folder", folder, "--trials", "0", "--quiet", status=2
    )


def test_a_report_is_written_again(
    searched: tuple[Path, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, folder = "nasbench201-digits-evolution-1", searched[0]
    (folder / name / "report.html").unlink()
    out = said(capsys, "report", name, "--folder", str(folder))
    assert f"report: {folder / name / 'report.html'}" in out
    assert "SearchResult of NASBench201: 3 complete" in out
    assert "<html" in (folder / name / "report.html").read_text()
    said(capsys, "report", name, "--folder", str(folder), "--output", str(tmp_path / "mine.html"))
    assert {p.name for p in tmp_path.iterdir()} == {"mine.html", "search.png"}
    error = said(capsys, "report", "digits", "--folder", str(folder), status=2)
    assert f"StudyError: there is no study 'digits' in {folder}/; found {name}." in error


def test_a_report_goes_where_the_study_is_now(
    searched: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "nasbench201-digits-evolution-1"
    saved = json.loads((searched[0] / name / "result.json").read_text())
    saved["folder"] = f"runs/{name}"  # as a search in another working directory wrote it
    (tmp_path / "moved" / name).mkdir(parents=True)
    (tmp_path / "moved" / name / "result.json").write_text(json.dumps(saved))
    said(capsys, "report", name, "--folder", str(tmp_path / "moved"))
    assert (tmp_path / "moved" / name / "report.html").is_file()
    assert not (tmp_path / "runs").exists()


# Tables ------------------------------------------------------------------------------------------------------------


def test_a_search_in_a_table(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "search", "--table", str(table), "--strategy", "random", "--trials", "20", "--seed", "3")
    assert out.startswith("best of 20: trial ")
    assert "test images" not in out
    assert "model:" not in out
    assert list(tmp_path.iterdir()) == []
    more = ["--objectives", "val_accuracy", "val_loss", "--strategy", "nsga2", "--set", "population_size=4"]
    out = said(capsys, "search", "--table", str(table), "--trials", "20", *more)
    assert re.match(r"1 architectures? that no other beats in val_accuracy and val_loss:\n  trial \d+: val_acc", out)
    assert len(out.splitlines()) == 2
    out = said(capsys, "search", "--table", str(table), "--trials", "5", "--objectives", "error_rate:minimize")
    assert re.search(r"best of 5: trial \d+\n.*\n  error_rate 0\.\d+$", out.strip())


def test_a_kept_search_in_a_table_has_no_model(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--table", str(table), "--trials", "3", "--study", "mine", "--storage", "x.log"]
    out = said(capsys, "search", *line)
    assert f"report: {Path('runs/mine/report.html')}" in out
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert "model:" not in out


def test_a_table_is_shown(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "table", "show", str(table))
    loaded = nb.Table.load(table)
    arch, value = loaded.best("val_loss", minimize=True)
    assert out.startswith("Table(NASBench201, 15,625 of 15,625 architectures")
    assert f"best val_loss: {value:.4f}  {arch}" in out
    assert "best seconds" not in out
    assert '"data": "none"' in out
    for text in (CELL, SPACE.parse(CELL).to_json()):
        out = said(capsys, "table", "show", str(table), "--arch", text)
        assert f"val_accuracy {loaded.query(CELL, 'val_accuracy'):.4f}" in out


# Bad lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("search --space nasbench21", "ArchError: there is no search space 'nasbench21'; did you mean 'nasbench201'"),
        (
            "search --space no.such:Space",
            "ArchError: cannot load the search space 'no.such:Space': No module named 'no'",
        ),
        ("search --space nasbench201 --space-set chanels=4", "ArchError: cannot make NASBench201 with {'chanels': 4}"),
        ("search --space-set channels", "SettingError: 'channels' is no setting. Write KEY=VALUE, such as lr=0.05."),
        (
            "search --data digit",
            "DataError: no data set 'digit', and no such folder or .npz file; did you mean 'digits'",
        ),
        ("search --data no/such.npz", "DataError: there is no no/such.npz"),
        ("search --table nasbench201", "TableError: "),
        ("search --strategy evolutoin", "SettingError: no strategy is called 'evolutoin'; did you mean 'evolution'"),
        (
            "search --objectives val_acc",
            "SettingError: the objective does not report 'val_acc'; did you mean 'val_accuracy'",
        ),
        ("search --constraint params", "SettingError: 'params' is no constraint"),
        ("search --pruner medain", "SettingError: no pruner is called 'medain'; did you mean 'median'"),
        ("search --trials 0", "SettingError: trials=0: a search needs a whole number of trials, at least 1"),
        ("search --trials 1 --epochs 0", "SettingError: recipe: epochs=0, but it must be a whole number, 1 or more"),
        ("search --timeout -1", "SettingError: timeout=-1.0: give a positive number of seconds"),
        ("search --workers 0", "SettingError: workers=0: a search needs at least one worker"),
        ("search --set =3", "SettingError: '=3' is no setting"),
        ("search --set lr=fast", "SettingError: recipe: lr='fast', but it must be a number above 0"),
        (
            "search --set populatoin=3",
            "SettingError: strategy 'evolution' has no setting 'populatoin'; did you mean 'popu",
        ),
        ("search --study a/b", "SettingError: study name 'a/b' cannot be a folder name"),
        ("search --storage study.db", "SettingError: storage 'study.db' is neither a URL nor a journal file"),
        ("search --folder FILE", "StudyError: cannot write to the study's folder FILE/nasbench201-digits-evolution-1"),
        ("search --device gpu", "SettingError: "),
        ("worker --study mine", "StudyError: there is no study 'mine' in runs/"),
        ("report mine", "StudyError: there is no study 'mine' in runs/; found none."),
        ("table show no-such-table", "TableError: "),
        ("table show TABLE --arch |conv~0|", "ArchError: "),
        ("search --table TABLE --epochs 3", "SettingError: 'epochs' is about training, but nothing is trained"),
        ("search --table TABLE --objectives error_rate", "SettingError: is more 'error_rate' better?"),
        ("search --table TABLE --objectives error_rate:up", "SettingError: objective 'error_rate' has direction 'up'"),
        ("search --table TABLE --space resnet", "TableError: this is a table of NASBench201, asked about ResNet"),
    ],
)
def test_a_bad_line_ends_with_the_reason(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    places = {"TABLE": str(table), "FILE": __file__}
    error = said(capsys, *(places.get(word, word) for word in line.split()), status=2)
    assert f"nasbench: {message.replace('FILE', __file__)}" in error
    assert "Traceback" not in error
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("line", [[], ["serach"], ["search", "--trials", "many"], ["report"], ["table"], ["worker"]])
def test_a_line_that_is_no_command_shows_the_usage(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    assert "usage: nasbench" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nasbench.data.load", interrupt)
    assert "interrupted; run the same line again to go on" in said(capsys, "search", status=130)
    monkeypatch.setattr("compress.actions.read", interrupt)
    Path("x.safetensors").touch()
    assert said(capsys, "compress", "report", "x.safetensors", status=130).strip().endswith("interrupted")


@pytest.mark.parametrize("line", [["--help"], ["search", "--help"], ["serach"]])
def test_help_and_usage_come_before_torch(line: list[str]) -> None:
    program = f"""
import sys
from nasbench.cli import main
try:
    main({line!r})
finally:
    heavy = ("torch", "optuna", "numpy", "torchvision", "sklearn", "matplotlib", "pandas")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "[]"
    if "--help" in line:
        assert done.returncode == 0
        assert "search a space" in done.stdout if line == ["--help"] else "--constraint" in done.stdout
