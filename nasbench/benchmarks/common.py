"""What benchmark scripts share: recording figures with their conditions, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nasbench.data import Data
from nasbench.devices import processor
from nasbench.files import atomic_write
from nasbench.training import fit
from search_spaces.base import Arch, SearchSpace

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


def train_from_scratch(
    space: SearchSpace, arch: Arch, data: Data, seed: int, *, device: str = "cpu", **settings: Any
) -> nn.Module:
    """Return an architecture's network trained alone, its first weights and all else drawn from a seed."""
    torch.manual_seed(seed)
    return fit(space.build(arch), data, seed=seed, device=device, progress=False, **settings)


def in_processes(
    script: str, jobs: Sequence[tuple[str, ...]], at_once: int = 2
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Start a script anew for every job, on one thread each; yield jobs and what they found, as they end.

    The script gets its own arguments again, with ``--child``, the words of the job, and a file to write JSON to.
    """
    module = f"nasbench.benchmarks.{Path(script).stem}"
    todo, running = list(jobs), dict[tuple[str, ...], tuple[subprocess.Popen[bytes], Path]]()
    with tempfile.TemporaryDirectory() as folder:
        while todo or running:
            while todo and len(running) < at_once:
                job, file = todo.pop(0), Path(folder) / f"{len(todo)}.json"
                command = [sys.executable, "-m", module, *sys.argv[1:], "--child", *job, str(file)]
                running[job] = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}), file
            time.sleep(0.5)
            for job, (process, file) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        raise SystemExit(f"{' '.join(job)} ended with status {process.returncode}")
                    found = json.loads(file.read_text())
                    print(*job, found, flush=True)
                    yield job, found
