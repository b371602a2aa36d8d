"""A whole search where two processes share every training step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import nasbench as nb

ROOT = Path(__file__).parents[2]


SMALL = ("--space", "nasbench201", "--space-set", "channels=4", "cells=1")


def both_ranks(tmp_path: Path, *arguments: str, space: tuple[str, ...] = SMALL) -> list[tuple[int, str, str]]:
    """Run `nasbench search` with these arguments on two ranks; return status, output and errors of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "nasbench", "search", "--study", "shared", *arguments]
    command += [*space, "--data-set", "train_images=200"]
    ranks = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                command,
                env=os.environ | environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300) for process in ranks]
    return [(process.returncode, *texts) for process, texts in zip(ranks, said, strict=True)]


def check_search(tmp_path: Path, said: list[tuple[int, str, str]], trials: int) -> nb.SearchResult:
    assert [status for status, *_ in said] == [0, 0], said
    assert f"best of {trials}" in said[0][1]
    assert not said[1][1], "rank 0 alone speaks"
    result = nb.SearchResult.load(tmp_path / "runs" / "shared" / "result.json")
    assert len(result.complete) == trials
    data = nb.data.load("digits", train_images=200)
    found = nb.validate(result.best.build(), data)["val_accuracy"]
    assert found == result.best.metrics["val_accuracy"]
    return result


@pytest.mark.slow
def test_two_processes_train_as_one_search(tmp_path: Path) -> None:
    check_search(tmp_path, both_ranks(tmp_path, "--trials", "2", "--epochs", "1"), trials=2)


@pytest.mark.slow
def test_two_processes_grow_one_network(tmp_path: Path) -> None:
    space = ("--space", "plain_cnn", "--space-set", "widths=[4,8]", "fc_widths=[8,16]", "blocks=2", "slots=2")
    settings = ("--strategy", "eas", "--trials", "3", "--epochs", "1", "--set", "widen=1", "deepen=1")
    result = check_search(tmp_path, both_ranks(tmp_path, *settings, space=space), trials=3)
    assert [trial.parent for trial in result.trials] == [None, 0, 0]


@pytest.mark.slow
def test_two_processes_train_one_supernet(tmp_path: Path) -> None:
    settings = ("--strategy", "darts", "--epochs", "2", "--set", "batch_size=20")
    result = check_search(tmp_path, both_ranks(tmp_path, *settings), trials=1)
    assert [epoch["epoch"] for epoch in result.epochs] == [1, 2]
    assert result.epochs[-1]["val_accuracy"] == result.best.metrics["val_accuracy"]  # rank 0 scores while 1 waits
    again = both_ranks(tmp_path, *settings)  # a finished search returns at once on all ranks
    assert [status for status, *_ in again] == [0, 0], again


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path: Path) -> None:
    said = both_ranks(tmp_path, "--strategy", "gdas", "--epochs", "1", "--set", "batch_size=1")
    assert [status for status, *_ in said] == [2, 2], said
    assert all("batch_size=1, but 2 processes share every batch equally: give a multiple of 2" in e for *_, e in said)
