"""Who imports whom inside the package: edges and levels, of modules and of rooms.

    python scripts/import_graph.py [FOLDER]     # default: the package of this checkout

A room is a sub-package or a file at the top; imports inside functions and for annotations count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "llm_pruner"
Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, ast.Module]:
    """Syntax tree of every module by dotted name, without the signs (``__init__``) of rooms."""
    files = [path for path in sorted(package.rglob("*.py")) if path.name != "__init__.py"]
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): ast.parse(path.read_text())
        for path in files
    }


def imports(name: str, tree: ast.Module, known: set[str], package: str) -> Iterator[str]:
    """The modules among `known` that the module `name` imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            path = (node.module or "").split(".") if node.module else []
            path = [package, *above, *path] if node.level else path
            targets = [path, *([*path, alias.name] for alias in node.names)]
        else:
            continue
        for first, *rest in targets:
            if first == package and ".".join(rest) in known:
                yield ".".join(rest)


def module_graph(package: Path) -> Graph:
    """Module -> the modules it imports."""
    trees = modules(package)
    return {name: {*imports(name, tree, {*trees}, package.name)} for name, tree in trees.items()}


def room_graph(graph: Graph) -> Graph:
    """Room -> the other rooms it imports."""
    rooms: Graph = {}
    for name, others in graph.items():
        room = name.partition(".")[0]
        rooms.setdefault(room, set()).update(other.partition(".")[0] for other in others)
    return {room: others - {room} for room, others in rooms.items()}


def levels(graph: Graph) -> dict[str, int]:
    """Level of every node: 1 for one that imports nothing, else one above the highest it imports.

    Raises:
        ValueError: there is a cycle; the message shows it.
    """
    found: dict[str, int] = {}

    def level(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise ValueError(f"cycle: {' -> '.join([*path[path.index(name) :], name])}")
        if name not in found:
            found[name] = 1 + max((level(n, (*path, name)) for n in graph[name]), default=0)
        return found[name]

    for name in graph:
        level(name, ())
    return found


def main(folder: str | None = None) -> None:
    """Print both graphs in figures, and what every room imports."""
    package = Path(folder).resolve() if folder else PACKAGE
    graph = module_graph(package)
    for kind, edges in (("modules", graph), ("rooms and files at the top", room_graph(graph))):
        count = sum(map(len, edges.values()))
        print(f"{len(edges)} {kind}: {count} edges, {max(levels(edges).values())} levels, 0 cycles")
    rooms = room_graph(graph)
    by_level = levels(rooms)
    for room in sorted(rooms, key=lambda room: (by_level[room], room)):
        print(f"{by_level[room]:3}  {room:16} {' '.join(sorted(rooms[room]))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
