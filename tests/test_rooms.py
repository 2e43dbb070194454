"""Which room imports which (docs/architecture.md), and that nothing heavy is imported for --help."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmcli"
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())
# cli composes all rooms; training and evaluation may use media and models.
MAY_IMPORT = {
    "cli": set(ROOMS),
    "training": {"core", "media", "models"},
    "evaluation": {"core", "media", "models"},
}
HEAVY = {
    *("torch", "torchvision", "torchaudio", "transformers", "sentence_transformers", "huggingface_hub"),
    *("pyarrow", "numpy", "pandas", "PIL", "av", "ray", "datasets", "scipy", "rich"),
}


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Names of imported modules; `everywhere`: also those imported inside functions or for type checks."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else list(_at_import(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_import(node)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room: str) -> None:
    allowed = MAY_IMPORT.get(room, {"core"}) | {room}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for name in imports(path, everywhere=True)
        if name.startswith("mmcli.") and name.split(".")[1] in ROOMS and name.split(".")[1] not in allowed
    ]
    assert wrong == []


def test_core_is_light() -> None:
    """All but what holds arrays, which no other module of it needs when it is imported."""
    arrays = ("samples", "classified")
    for path in (PACKAGE / "core").glob("*.py"):
        names = set(imports(path, everywhere=False))
        roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert roots <= ({"mmcli", "numpy"} if path.stem in arrays else {"mmcli"})
        assert not {name for name in names if name.startswith(tuple(f"mmcli.core.{one}" for one in arrays))}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["embed", "--help"], ["ask", "--help"], ["inspect", "--help"], ["--version"], ["embd"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from mmcli.cli.boundary import run; run(sys.argv[1:]); sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_help_is_quick() -> None:
    """0.3 s of computing at most; the best of several, since other processes may be busy."""
    best = 1e9
    for _ in range(10):
        start = _seconds_of_children()
        subprocess.run([sys.executable, "-m", "mmcli", "--help"], capture_output=True, check=True)
        best = min(best, _seconds_of_children() - start)
        if best < 0.3:
            break
    assert best < 0.3


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
