"""A whole search where two processes share every training step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import nasbench as nb

ROOT = Path(__file__).parents[2]


def test_two_processes_train_as_one_search(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "nasbench", "search", "--trials", "2", "--epochs", "1", "--study", "shared"]
    command += ["--space", "nasbench201", "--space-set", "channels=4", "cells=1", "--data-set", "train_images=200"]
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
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "best of 2" in said[0][0]
    assert not said[1][0], "rank 0 alone speaks"
    result = nb.SearchResult.load(tmp_path / "runs" / "shared" / "result.json")
    assert len(result.complete) == 2
    data = nb.data.load("digits", train_images=200)
    found = nb.validate(result.best.build(), data)["val_accuracy"]
    assert found == result.best.metrics["val_accuracy"]
