"""The package's front: lazy names, and spaces by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import search_spaces
from search_spaces import SPACES, ArchError, NASBench201, ResNet, space


def run(code: str) -> str:
    root = str(Path(search_spaces.__file__).parents[1])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.strip()


def test_import_is_light_until_a_name_is_used() -> None:
    assert run("import sys, search_spaces; print('torch' in sys.modules, search_spaces.SPACES['resnet'])") == (
        "False search_spaces.resnet:ResNet"
    )


def test_spaces_import_torch_and_nothing_heavier() -> None:
    heavy = "{'torchvision', 'sklearn', 'matplotlib', 'pandas', 'optuna', 'PIL', 'nasbench', 'compress'}"
    code = f"import sys, search_spaces as s; [s.space(n) for n in s.SPACES]; print(sorted({heavy} & set(sys.modules)))"
    assert run(code) == "[]"


def test_every_public_name_is_there() -> None:
    for name in search_spaces.__all__:
        assert getattr(search_spaces, name) is not None
    assert dir(search_spaces) == sorted(search_spaces.__all__)
    with pytest.raises(AttributeError, match="module 'search_spaces' has no attribute 'Darts'"):
        search_spaces.Darts  # noqa: B018


def test_space_by_name_and_by_path() -> None:
    assert space("NASBench201", channels=8) == NASBench201(channels=8)
    assert space("search_spaces.resnet:ResNet", depths=(1,)) == ResNet(depths=(1,))


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        (
            "nasbench21",
            {},
            f"no search space 'nasbench21'; did you mean 'nasbench201' .*Known: {', '.join(SPACES)}",
        ),
        ("no.such.module:Space", {}, "cannot load the search space 'no.such.module:Space': No module named 'no'"),
        ("search_spaces.resnet:ResNets", {}, "cannot load .* has no attribute 'ResNets'"),
        (":ResNet", {}, "cannot load the search space ':ResNet'"),
        ("search_spaces.base:Arch", {}, "not a subclass of search_spaces.SearchSpace"),
        ("search_spaces.base:SearchSpace", {}, "cannot make SearchSpace"),
        ("nasbench201", {"chanels": 8}, "cannot make NASBench201 with {'chanels': 8}: .*unexpected keyword"),
        ("nasbench201", {"channels": 0}, "NASBench201 was given channels=0"),
    ],
)
def test_unknown_spaces_and_settings(name: str, settings: dict[str, int], problem: str) -> None:
    with pytest.raises(ArchError, match=problem):
        space(name, **settings)
