"""Evolution on CIFAR-10 images, unbroken and killed three times inside training: the same study to the last bit.

    python -m nasbench.benchmarks.resume_cifar10 cifar10.npz [--images 2500] [--trials 14] [--seeds 3]

`cifar10.npz` holds x_train, y_train, x_test, y_test. Every search runs in a process of its own on one thread.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import nasbench as nb
from nasbench.benchmarks.common import record
from nasbench.files import sha256
from nasbench.objective import WEIGHTS, TrainObjective
from search_spaces import NASBench201

POPULATION = 5
KILLS = 3


def main() -> None:
    """Search once for every seed, and once more with kills; compare and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        search(options, Path(options.child[0]), int(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        whole = [start(home / f"whole{seed}", seed) for seed in range(options.seeds)]
        for process in whole:
            finish(process)
        kills = [kill_inside_training(home / "broken", random.Random(i)) for i in range(KILLS)]
        finish(start(home / "broken", 0))
        figures = {
            "searches": [gain(home / f"whole{seed}") for seed in range(options.seeds)],
            "killed_in": kills,
            "resumed_equals_unbroken": outcome(home / "broken") == outcome(home / "whole0"),
            "weights_sha256": [weights(home / "whole0"), weights(home / "broken")],
        }
    record(
        __file__,
        figures,
        seeds=range(options.seeds),
        threads_of_a_search=1,
        space=NASBench201(channels=8, cells=1).to_json(),
        images=options.images,
        trials=options.trials,
        epochs=options.epochs,
        population=POPULATION,
    )


def search(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """Run or continue one search."""
    torch.set_num_threads(1)
    TrainObjective.checkpoint_every = 1.0
    data = nb.data.load(options.data, train_images=options.images)
    nb.search(
        NASBench201(channels=8, cells=1),
        data,
        "evolution",
        trials=options.trials,
        epochs=options.epochs,
        batch_size=32,
        population=POPULATION,
        study="study",
        folder=folder,
        seed=seed,
        device="cpu",
        progress=False,
    )


def start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    """Start a search in a process of its own."""
    command = [sys.executable, "-m", "nasbench.benchmarks.resume_cifar10", *sys.argv[1:]]
    command += ["--child", str(folder), str(seed)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a search to end well."""
    if process.wait() != 0:
        raise SystemExit(f"a search ended with status {process.returncode}")


def kill_inside_training(folder: Path, rng: random.Random) -> str:
    """Go on with a search, kill it by -9 at a random moment of a training, and say where that was."""

    def times() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in folder.glob("study/trials/*/checkpoint-*.pt")}

    before = times()
    process = start(folder, 0)
    wanted = rng.randint(2, 8)  # checkpoints that it is to write first
    while wanted:
        time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit("the search ended before it could be killed")
        try:
            now = times()
        except FileNotFoundError:  # a trial ended meanwhile
            continue
        wanted -= now != before
        before = now
    time.sleep(rng.uniform(0, 1))
    while not (running := sorted(p.parent.name for p in folder.glob("study/trials/*/checkpoint-*.pt"))):
        time.sleep(0.05)  # between two trials: wait for the next training
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return f"trial {', '.join(running)}"


def outcome(folder: Path) -> list[Any]:
    """Return all of a study but its times."""
    trials = nb.SearchResult.load(folder / "study" / "result.json").trials
    return [(t.number, t.arch, t.state, dict(t.metrics), t.copied_from) for t in trials]


def weights(folder: Path) -> str:
    """Return the SHA-256 of the best trial's weights."""
    (path,) = (folder / "study").glob(f"trials/*/{WEIGHTS}")
    return sha256(path)


def gain(folder: Path) -> dict[str, float]:
    """Return how the search did against its own random trials, on validation images."""
    trials = nb.SearchResult.load(folder / "study" / "result.json").complete
    scores = [t.metrics["val_accuracy"] for t in trials]
    drawn, evolved = scores[:POPULATION], scores[POPULATION:]
    return {
        "random_mean": round(sum(drawn) / len(drawn), 4),
        "evolved_mean": round(sum(evolved) / len(evolved), 4),
        "best": round(max(scores), 4),
        "best_of_random": round(max(drawn), 4),
    }


if __name__ == "__main__":
    main()
