"""What every test starts from: one thread, its own folder as the working directory, and a fixed global seed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

# Before torch is loaded, and so for child processes too: small networks are fastest, and bit-equal, on one thread.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")


@pytest.fixture(autouse=True)
def _fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    random.seed(0)
