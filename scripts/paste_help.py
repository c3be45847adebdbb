"""Put the command's --help into USAGE.md, between its markers."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["COLUMNS"] = "88"

from llm_pruner.cli_arguments import build_parser

MARK = "<!-- help -->\n```text\n"


def main() -> None:
    """Rewrite the reference in place."""
    path = Path(__file__).parent.parent / "USAGE.md"
    before, rest = path.read_text(encoding="utf-8").split(MARK)
    after = rest.split("```", 1)[1]
    path.write_text(f"{before}{MARK}{build_parser().format_help()}```{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
