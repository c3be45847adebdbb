"""The shape of the package: imports run one way, everything has a docstring, imports are lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import import_graph
import pytest

import llm_pruner

PACKAGE = Path(llm_pruner.__file__).parent
# Files at the top that every room may use; each may import those before it.
GROUND = (
    "lazy_names errors plugins streams distributed chat_template utils output_rules atomic_output "
    "progress json_files layer_scores results stats hub"
).split()
# What a room may import besides the ground. Nothing below a line imports anything above it.
ROOMS = {
    "config": "",
    "engines": "config",
    "storage": "config",
    "model": "config storage",
    "offload": "config storage model",
    "data": "",
    "lm_eval": "model",
    "evaluation": "model data lm_eval",
    "search": "engines model data evaluation",
    "healing": "model data evaluation",
    "visualization": "model data evaluation",
    "report": "storage visualization",
    "checkpoint": "config engines storage model report",
    "goals": "config engines storage model data evaluation search report checkpoint",
    "pruners": "config engines storage model offload data evaluation search healing checkpoint "
    "goals",
    "workflow": "storage model data lm_eval evaluation healing visualization report checkpoint "
    "pruners",
    "estimate": "storage model data evaluation search healing goals pruners",
    "cli_request": "goals healing",
    "cli_values": "engines goals",
    "cli_arguments": "engines goals pruners cli_request cli_values",
    "cli_checks": "storage search pruners cli_request",
    "cli_jobs": "config storage model offload data lm_eval evaluation search healing "
    "visualization report checkpoint goals pruners workflow estimate cli_request",
    "cli": "cli_request cli_arguments cli_checks cli_jobs",
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
HEAVY = ("torch", "transformers", "matplotlib", "pandas", "datasets", "sentence_transformers")


def test_every_room_may_import_those_before_it_alone():
    graph = import_graph.module_graph(PACKAGE)
    rooms = import_graph.room_graph(graph)
    assert {*GROUND, *ROOMS} == rooms.keys()
    for place, name in enumerate(GROUND):
        assert rooms[name] <= set(GROUND[:place]), name
    for place, (name, others) in enumerate(ROOMS.items()):
        assert set(others.split()) <= set([*ROOMS][:place]), name
        assert rooms[name] <= {*GROUND, *others.split()}, name
    import_graph.levels(graph)  # raises where modules import each other


def test_a_room_is_small_and_has_a_sign():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        assert folder.parent == PACKAGE
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 8, folder
        sign = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        may_import = ", ".join(["the ground", *ROOMS[folder.name].split()])
        assert sign.splitlines()[-1] == f"Imports {may_import}."


def test_the_parser_sees_every_kind_of_import():
    code = """
from . import box
from ..errors import LoadError
import llm_pruner.utils
from llm_pruner.stats import RunningMean
from llm_pruner import hub
if TYPE_CHECKING:
    from ..pruners.base import BasePruner
class Box:
    from ..model.layer_stack import LayerStack
def late():
    from ..cli import main
import torch
"""
    known = {*"model.box errors utils stats hub pruners.base model.layer_stack cli torch".split()}
    found = set(import_graph.imports("model.other", ast.parse(code), known, "llm_pruner"))
    assert found == known - {"torch"}


def test_a_cycle_is_found():
    with pytest.raises(ValueError, match="cycle: b -> c -> b"):
        import_graph.levels({"a": {"b"}, "b": {"c"}, "c": {"b"}})


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
        ("-c", "import llm_pruner.pruners.registry, llm_pruner.results, llm_pruner.utils"),
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
