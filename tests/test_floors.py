"""The shape of the package: imports run one way, everything has a docstring, imports are lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llm_pruner

PACKAGE = Path(llm_pruner.__file__).parent
# A module may import those above it, and nothing else of the package.
ORDER = """
    __init__ errors processes output lora results text configs architectures stats registry utils
    hub sources shards batching likelihood similarity surgery layers weights states sweeps gates
    streaming writers replay layouts files data card harness evaluation speed objectives comparison
    quality search closed_form trainer healing rounds checkpoint slicer base bases pruners figures
    plots_scores plots_blocks plots_quality plots_model visualization report workflow arguments cli
""".split()
# These look upwards when they run, or for their annotations; what they import first may not.
LATE = {"registry", "cli", "workflow"}
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}
HEAVY = ("torch", "transformers", "matplotlib", "pandas", "datasets", "sentence_transformers")


def imported(tree: ast.AST, late: bool) -> set[str]:
    """Modules of the package that `tree` imports; `late` adds functions and annotations."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not late:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not late:
            continue
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                found |= {name.split(".")[0]} if name else {alias.name for alias in node.names}
            elif name.split(".")[0] == "llm_pruner":
                rest = name.split(".")[1:]
                found |= set(rest[:1]) or {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {part[1] for part in parts if part[0] == "llm_pruner" and len(part) > 1}
        found |= imported(node, late)
    return {name if name in MODULES else "__init__" for name in found}


def test_the_order_names_every_module_once():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    allowed = set(ORDER[: ORDER.index(name)])
    assert imported(MODULES[name], late=name not in LATE) <= allowed


def test_the_parser_sees_every_kind_of_import():
    code = """
from . import data
from .errors import LoadError
import llm_pruner.utils
from llm_pruner.stats import RunningMean
from . import __version__
if TYPE_CHECKING:
    from .base import BasePruner
class Box:
    from .layers import LayerStack
def late():
    from .cli import main
"""
    early = {"data", "errors", "utils", "stats", "layers", "__init__"}
    assert imported(ast.parse(code), late=False) == early
    assert imported(ast.parse(code), late=True) == early | {"base", "cli"}


def public(tree: ast.AST, place: str) -> list[tuple[str, ast.AST]]:
    """Public functions, classes and their methods, by dotted name; no nested functions."""
    found = []
    for node in ast.iter_child_nodes(tree):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        if isinstance(node, kinds) and not node.name.startswith("_"):
            name = f"{place}.{node.name}"
            found.append((name, node))
            if isinstance(node, ast.ClassDef):
                found += public(node, name)
    return found


def bases(node: ast.AST) -> set[str]:
    """The simple names of a class's bases."""
    return {ast.unparse(base).split(".")[-1] for base in getattr(node, "bases", [])}


def test_everything_public_has_a_docstring():
    """But methods that fill in one of a base class in the package, whose docstring holds."""
    named = [pair for name, tree in MODULES.items() for pair in public(tree, name)]
    classes = {name.split(".")[-1]: node for name, node in named if isinstance(node, ast.ClassDef)}

    def inherited(name: str) -> bool:
        *_, owner, method = name.split(".")
        above = bases(classes[owner]) if owner in classes else set()
        while above:
            base = above.pop()
            if base in classes:
                above |= bases(classes[base])
                for entry in classes[base].body:
                    if getattr(entry, "name", None) == method and ast.get_docstring(entry):
                        return True
        return False

    assert len(named) > 100
    missing = [name for name, node in named if not ast.get_docstring(node) and not inherited(name)]
    overloads = {
        name
        for name, node in named
        if any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", []))
    }
    assert not set(missing) - overloads
    assert all(ast.get_docstring(tree) for tree in MODULES.values())


def loaded_by(*arguments: str) -> set[str]:
    """The heavy packages that a fresh Python has imported after running with these arguments."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert any(line.rsplit("|", 1)[-1].strip() == "llm_pruner" for line in lines)
    names = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in lines}
    return names & set(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import llm_pruner"),
        ("-c", "import llm_pruner.registry, llm_pruner.results, llm_pruner.utils"),
        ("-c", "import llm_pruner.cli"),
        ("-m", "llm_pruner.cli", "--help"),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments):
    assert loaded_by(*arguments) == set()


def test_the_probe_sees_what_is_heavy():
    assert "torch" in loaded_by("-c", "import llm_pruner; llm_pruner.LayerStack")


def test_every_public_name_can_be_had():
    assert llm_pruner.__all__ == sorted(llm_pruner.__all__)
    for name in llm_pruner.__all__:
        assert getattr(llm_pruner, name).__name__ == name
        assert name in dir(llm_pruner)
    with pytest.raises(AttributeError, match="no attribute 'Prunner'"):
        _ = llm_pruner.Prunner
