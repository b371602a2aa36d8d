"""What every benchmark script shares: recording figures with their conditions."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nasbench.devices import processor
from nasbench.files import atomic_write

_STARTED = time.time()


def record(script: str, figures: dict[str, Any], seeds: Sequence[int] = (), **conditions: Any) -> Path:
    """Write figures, seeds, command, commit, versions, threads and seconds to a JSON file beside the script."""
    here = Path(script).resolve()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here.parent, capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=here.parent, capture_output=True, text=True, check=False
    )
    entry = {
        "figures": figures,
        "seeds": list(seeds),
        "conditions": conditions,
        "command": " ".join(["python", "-m", f"nasbench.benchmarks.{here.stem}", *sys.argv[1:]]),
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy", "optuna")},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - _STARTED, 1),
    }
    path = here.with_suffix(".json")
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n")
    print(json.dumps(figures, indent=1), f"\nwritten to {path}")
    return path
