"""Run the tests with the lowest versions that requirements.txt and pyproject.toml name.

    python scripts/lowest_versions.py [FOLDER]     # default: a temporary folder, removed at the end

Makes a fresh virtual environment there, with every direct requirement at its floor, whatever those
need at the versions that fit, and torch as constraints.txt has it. Prints the floors; the exit
status is that of pytest. The floors of torch, ruff and mypy are not tested.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def floors() -> list[str]:
    """``name==floor`` of every direct requirement, in alphabetical order."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    found = {f"{m[1]}=={m[2]}" for line in lines if (m := re.match(r"([\w-]+)>=([\d.]+)", line))}
    return sorted(pin for pin in found if not pin.startswith("torch=="))


def tested_torch() -> str:
    """The line of constraints.txt for torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def run(folder: Path) -> int:
    """Install the floors into `folder`, run the tests, and return pytest's exit status."""
    pins = [*floors(), tested_torch()]
    print("\n".join(pins), flush=True)
    venv.create(folder, clear=True, with_pip=True)
    constraints = folder / "lowest.txt"
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(constraints), "-e", ".[test]"]
    subprocess.run(install, cwd=ROOT, check=True)
    return subprocess.run([python, "-m", "pytest"], cwd=ROOT).returncode


def main(folder: str | None = None) -> int:
    """Run in `folder`, or in a temporary one."""
    if folder:
        return run(Path(folder))
    with tempfile.TemporaryDirectory() as temporary:
        return run(Path(temporary))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
