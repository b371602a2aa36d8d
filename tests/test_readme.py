"""The README's snippets run as written, but for smaller numbers; and each figure has a file that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest

from search_spaces import NASBench201

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(block: str, known: Mapping[str, object] | None = None, **smaller: str) -> dict[str, object]:
    """Execute a block in which each of these numbers, which must be there, is replaced; `known` names are there."""
    for old, new in smaller.items():
        assert f"{old}=" in block, f"{old}= is not in the snippet"
        block = re.sub(rf"\b{old}=\d+", f"{old}={new}", block)
    import nasbench

    scope: dict[str, object] = {"__name__": "__main__", "nb": nasbench, "NASBench201": NASBench201}
    scope |= known or {}
    exec(block, scope)  # noqa: S102
    return scope


def test_the_front_door_opens(tmp_path: Path) -> None:
    scope = run(BLOCKS[0], trials="2", epochs="1")
    assert len(scope["result"].trials) == 2  # type: ignore[attr-defined]
    assert (tmp_path / "search.png").exists()
    assert (tmp_path / "runs" / "first" / "report.html").exists()


@pytest.mark.slow
def test_one_supernet_is_searched(tmp_path: Path) -> None:
    import nasbench as nb

    small = nb.data.load("digits", train_images=200)
    scope = run(BLOCKS[1], {"data": small}, cells="3", channels="4", epochs="1")
    assert scope["result"].best.arch in scope["result"].space  # type: ignore[attr-defined]
    assert (tmp_path / "weights.png").exists()


def test_sizes_are_searched() -> None:
    import nasbench as nb

    small = nb.data.load("digits", train_images=200)
    scope = run(BLOCKS[2], {"data": small}, epochs="1")
    assert scope["result"].best.arch in scope["result"].space  # type: ignore[attr-defined]


def test_a_network_is_made_small(tmp_path: Path) -> None:
    import nasbench as nb

    small = nb.data.load("digits", train_images=600)
    result = nb.search(NASBench201(channels=4, cells=1), small, "random", trials=1, epochs=1, progress=False)
    run(BLOCKS[3], {"data": small, "result": result, "model": result.best.build()}, epochs="1", interval="1")
    assert (tmp_path / "sparse.safetensors").exists()


@pytest.mark.slow
def test_few_bits_int8_and_teachers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import compress
    import nasbench as nb

    small = nb.data.load("digits", train_images=400)
    space = NASBench201(channels=4, cells=1).bind(small)
    model = nb.fit(space.build(space.at(7812)), small, epochs=1, progress=False)
    x, _ = next(small.eval_batches("train", batch_size=8))
    known = {"data": small, "model": model, "x": x, "compress": compress}
    scope = run(BLOCKS[4], known, epochs="1", trials="2")
    assert (tmp_path / "model.onnx").exists()
    assert len(scope["result"].trials) == 2  # type: ignore[attr-defined]


@pytest.mark.slow
def test_architecture_and_bits_are_searched_at_once() -> None:
    pytest.importorskip("onnxruntime")
    import compress
    import nasbench as nb

    small = nb.data.load("digits", train_images=200)
    scope = run(BLOCKS[5], {"data": small, "compress": compress}, epochs="1", trials="2")
    assert len(scope["result"].trials) == 2  # type: ignore[attr-defined]


def test_the_comparison_runs(tmp_path: Path) -> None:
    run(BLOCKS[6], trials="12", seeds="2")
    assert (tmp_path / "comparison.png").exists()


def test_the_space_and_the_strategy_work_together() -> None:
    import nasbench as nb

    scope = run(BLOCKS[7] + BLOCKS[8])
    data = nb.data.load("digits", train_images=100)
    space = scope["Chain"]().bind(data)  # type: ignore[operator]
    assert space.sample(Random(0)) in space
    result = nb.search(space, data, scope["MutateBest"](), trials=2, epochs=1, progress=False)  # type: ignore[operator]
    assert len(result.complete) == 2


@pytest.mark.parametrize("name", sorted(set(re.findall(r"nasbench/benchmarks/(\w+)\.json", TEXT))))
def test_every_figure_has_its_script_and_its_file(name: str) -> None:
    folder = ROOT / "nasbench" / "benchmarks"
    assert (folder / f"{name}.py").exists()
    entry = json.loads((folder / f"{name}.json").read_text())
    assert entry.keys() >= {"figures", "seeds", "command", "commit", "versions", "threads", "seconds"}
