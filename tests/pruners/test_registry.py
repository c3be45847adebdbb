"""Strategies by name: built-in, registered, from a file, from an installed plug-in."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import types

import pytest

from llm_pruner.errors import InvalidPlanError, LoadError, UnknownNameError
from llm_pruner.pruners import avss, measured, registry, similarity
from llm_pruner.pruners.base import BasePruner
from llm_pruner.pruners.registry import (
    BUILTIN,
    check_strategy_name,
    get_strategy,
    register_strategy,
    strategy_names,
)

FILE = '''
"""A strategy of somebody else."""

from llm_pruner import BasePruner, register_strategy


class Deepest(BasePruner):
    def description(self):
        return "Removes the deepest layers."

    def compute_layer_scores(self, eval_data):
        return {index: -float(index) for index in range(self.num_layers)}


@register_strategy("first-first")
class First(Deepest):
    def compute_layer_scores(self, eval_data):
        return {index: float(index) for index in range(self.num_layers)}


HELPER = 7
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_builtin_is_what_pruners_registers():
    for module in (avss, measured, similarity):
        own = [cls for cls in vars(module).values() if isinstance(cls, type)]
        concrete = [cls for cls in own if not inspect.isabstract(cls) and hasattr(cls, "unit")]
        here = {cls.name for cls in concrete if cls.__module__ == module.__name__}
        name = module.__name__.rpartition(".")[2]
        assert here - {"custom"} == {strategy for strategy, home in BUILTIN.items() if home == name}


def test_names_and_classes_belong_together():
    assert strategy_names() == sorted(strategy_names())
    assert set(strategy_names()) >= set(BUILTIN)
    for name in BUILTIN:
        assert get_strategy(name).name == name
    assert get_strategy("smart") is measured.SmartPruner
    assert get_strategy("ablation") is measured.AblationPruner
    assert get_strategy("avss") is avss.AVSSPruner
    assert get_strategy("pruneme") is similarity.PruneMePruner
    assert get_strategy("bi") is similarity.BlockInfluencePruner


def test_names_are_known_before_torch_is_imported():
    code = (
        "import sys; from llm_pruner.pruners.registry import *; check_strategy_name('smart');"
        "assert 'torch' not in sys.modules; get_strategy('smart'); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_registered_class_is_found():
    @register_strategy("mine")
    class Mine(BasePruner):
        pass

    assert Mine.name == "mine"
    assert "mine" in strategy_names()
    assert get_strategy("mine") is Mine
    check_strategy_name("mine")
    assert register_strategy("mine")(Mine) is Mine, "once more, as when a cell is run again"


@pytest.mark.parametrize("name", ["mine", "smart"])
def test_a_name_is_given_once(name):
    class Other(BasePruner):
        pass

    if name == "mine":
        register_strategy("mine")(avss.AVSSPruner)
        avss.AVSSPruner.name = "avss"
    with pytest.raises(InvalidPlanError, match=rf"{name}' is already taken by llm_pruner\.pruners"):
        register_strategy(name)(Other)
    assert Other.name == "custom"
    assert get_strategy(name) is not Other


def test_a_class_of_the_same_name_from_elsewhere_is_another():
    other = type("SmartPruner", (BasePruner,), {"__module__": "elsewhere"})
    with pytest.raises(InvalidPlanError, match=r"already taken by llm_pruner\.pruners"):
        register_strategy("smart")(other)


def test_a_built_in_name_is_taken_before_the_class_is_loaded():
    """The error belongs to whoever takes the name, not to whoever imports SmartPruner later."""
    code = (
        "from llm_pruner import BasePruner, register_strategy\n"
        "from llm_pruner.errors import InvalidPlanError\n"
        "try:\n    register_strategy('smart')(type('Mine', (BasePruner,), {}))\n"
        "except InvalidPlanError: pass\n"
        "else: raise SystemExit(3)\n"
        "from llm_pruner import SmartPruner"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_name_suggests_the_nearest():
    message = r"Unknown strategy 'smrat'\. Did you mean 'smart'\? Known: ablation, avss, .*smart"
    for look in (get_strategy, check_strategy_name):
        with pytest.raises(UnknownNameError, match=message):
            look("smrat")
        with pytest.raises(UnknownNameError, match=r"Unknown strategy 'xyz'\. Known: ablation"):
            look("xyz")


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "name"), [("Deepest", "Deepest"), ("first-first", "First")])
def test_a_file_gives_a_class_or_a_registered_name(file, wanted, name):
    check_strategy_name(f"{file}:{wanted}")
    found = get_strategy(f"{file}:{wanted}")
    assert found.__name__ == name
    assert issubclass(found, BasePruner)
    assert get_strategy(f"{file}:{wanted}").__name__ == name, "once more"


def test_a_strategy_of_a_file_prunes(file, llama, tokenizer, eval_data):
    plan = get_strategy(f"{file}:Deepest")(llama, tokenizer).plan(eval_data, ratio=0.25)
    assert plan.remove == (4, 5)
    plan = get_strategy(f"{file}:first-first")(llama, tokenizer).plan(eval_data, ratio=0.25)
    assert (plan.remove, plan.strategy) == ((2, 3), "first-first")


@pytest.mark.parametrize("wanted", ["Deepset", "HELPER", "nothing", ""])
def test_a_name_that_is_not_in_the_file_is_refused(file, wanted):
    message = rf"Unknown strategy in .*mine\.py '{wanted}'.*Known: Deepest, First"
    with pytest.raises(UnknownNameError, match=message):
        get_strategy(f"{file}:{wanted}")


def test_a_missing_file_is_named(tmp_path):
    for look in (get_strategy, check_strategy_name):
        with pytest.raises(LoadError, match=r"'.*gone\.py' does not exist \(from '.*:Mine'\)"):
            look(f"{tmp_path}/gone.py:Mine")
        with pytest.raises(LoadError, match="does not exist"):
            look(f"{tmp_path}:Mine")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
        ("import no_such_package", "cannot be run: ModuleNotFoundError: .*no_such_package"),
        ("def (", "cannot be run: SyntaxError"),
    ],
)
def test_a_file_that_raises_is_named(tmp_path, code, message):
    path = tmp_path / "broken.py"
    path.write_text(code)
    with pytest.raises(LoadError, match=rf"broken\.py' {message}"):
        get_strategy(f"{path}:Mine")


def test_a_file_that_is_not_python_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(FILE)
    with pytest.raises(LoadError, match=r"notes\.txt' is not a Python file: write FILE\.py:NAME"):
        get_strategy(f"{path}:Deepest")


def test_a_file_may_hold_a_dataclass(file):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    file.write_text(head + FILE + "\n@dataclass\nclass Options:\n    size: int = 1\n")
    assert get_strategy(f"{file}:Deepest").__name__ == "Deepest"


def test_a_file_does_not_give_what_it_does_not_hold(file):
    with pytest.raises(UnknownNameError, match="Known: Deepest, First"):
        get_strategy(f"{file}:smart")


# --- plug-ins ---------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    """An installed package that offers the strategies ``theirs`` and ``broken``."""
    module = types.ModuleType("their_package")
    module.Theirs = type("Theirs", (avss.AVSSPruner,), {"__module__": "their_package"})
    monkeypatch.setitem(sys.modules, "their_package", module)
    values = {"theirs": "their_package:Theirs", "broken": "no_such_package:X", "odd": "sys:odd"}
    points = [
        importlib.metadata.EntryPoint(name, value, "llm_pruner.strategies")
        for name, value in values.items()
    ]

    def entry_points(*, group):
        return [point for point in points if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return module


def test_a_plug_in_is_found_by_name(plugin):
    assert {"theirs", "broken"} <= set(strategy_names())
    check_strategy_name("theirs")
    assert get_strategy("theirs") is plugin.Theirs
    assert plugin.Theirs.name == "theirs"
    assert get_strategy("theirs") is plugin.Theirs
    with pytest.raises(UnknownNameError, match="Did you mean 'theirs'"):
        get_strategy("thiers")


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "no_such_package"), ("odd", "no attribute 'odd'")]
)
def test_a_plug_in_that_cannot_be_imported_is_named(plugin, name, message):
    with pytest.raises(
        LoadError, match=f"Plug-in strategy '{name}' cannot be imported: .*{message}"
    ):
        get_strategy(name)


def test_a_plug_in_that_is_no_strategy_is_refused(plugin):
    plugin.Theirs = 7
    with pytest.raises(LoadError, match="theirs"):
        get_strategy("theirs")


def test_a_plug_in_does_not_replace_a_built_in(plugin, monkeypatch):
    point = importlib.metadata.EntryPoint("smart", "their_package:Theirs", "llm_pruner.strategies")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    assert get_strategy("smart") is measured.SmartPruner
    assert strategy_names().count("smart") == 1
