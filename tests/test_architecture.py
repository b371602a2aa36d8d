"""The arrows of the house: compress -> nasbench -> search_spaces -> torch, and nothing heavy at import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("search_spaces", "nasbench", "compress")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES]
# Slow to load, or not there without an extra: imported inside the functions that need them.
LAZY = (
    *("torchvision", "sklearn", "matplotlib", "pandas", "scipy", "PIL", "pygraphviz"),
    *("optuna_dashboard", "onnx", "onnxruntime", "onnxscript"),
)


def imports(source: str, *, at_import: bool) -> Iterator[str]:
    """Yield the top-level names that a file imports: all of them, or those that run when the file is imported."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        elif at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif at_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    return set(imports((ROOT / path).read_text(), at_import=at_import))


def test_imports_are_read_as_python_runs_them() -> None:
    source = """
import a.b
from c import d
from . import own
if TYPE_CHECKING:
    import types_only
else:
    import e
class C:
    import f
    def method(self):
        import late
try:
    import g
except ImportError:
    pass
"""
    assert set(imports(source, at_import=True)) == {"a", "c", "e", "f", "g"}
    assert set(imports(source, at_import=False)) == {"a", "c", "e", "f", "g", "types_only", "late"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "search_spaces"], ids=str)
def test_search_spaces_import_torch_only(path: Path) -> None:
    assert imported(path) - {"torch", "search_spaces"} - sys.stdlib_module_names == set()


# Benchmarks are scripts that nothing imports.
@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "nasbench" and p.parts[1] != "benchmarks"], ids=str)
def test_nasbench_does_not_import_compress(path: Path) -> None:
    at_the_edge = path == Path("nasbench/cli.py")  # the command line may import anything, inside its functions
    assert "compress" not in imported(path, at_import=at_the_edge)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_heavy_is_imported_at_module_top(path: Path) -> None:
    assert imported(path, at_import=True).isdisjoint(LAZY)


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_every_module_imports(module: str) -> None:
    loaded = importlib.import_module(module)
    assert Path(loaded.__file__ or "").is_relative_to(ROOT), "not the code of this working copy: pip install -e ."


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    script = f"import sys, {package}; print(*(set({LAZY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_command_line_parses_before_it_loads_torch() -> None:
    script = "import sys, nasbench.cli; print(*({'torch', 'numpy', 'optuna', 'compress'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_resolve_and_no_function_is_hidden_by_its_module(package: str) -> None:
    public = importlib.import_module(package)
    names = getattr(public, "__all__", [])
    assert len(set(names)) == len(names)
    children = {module.split(".")[1] for module in MODULES if module.startswith(f"{package}.")}
    for name in names:
        value = getattr(public, name)
        # With lazy names, `nasbench.search` would be the function on its first use and the module on its second.
        assert (name in children) == isinstance(value, ModuleType), f"{package}.{name} is a module or a function?"
