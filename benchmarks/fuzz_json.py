"""Plans, curves, reports, manifests and journals for the fuzzer: seeds, changes and checks."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz_files import InconsistentError, Target, write

from llm_pruner.results import DepthCurve, PruningPlan, PruningReport
from llm_pruner.search.journal import Journal
from llm_pruner.storage.manifest import Manifest
from llm_pruner.storage.sources import SINGLE_FILE


class Pairs(list[tuple[str, Any]]):
    """An object, in which a name may be twice."""


class Raw(str):
    """JSON text that stands for itself."""


POOL = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *("", "a", "0", "1", "F32", "BF16", "F4", "BOOL", "F8_E4M3FNUZ", "../a", "a.safetensors"),
    *("lowest", "highest", "format", "llm_pruner.plan/1", "llm_pruner.manifest/1", "\0", "\u2028"),
    *([], [0], [1, 2], [[]], [0, 2**62], Pairs(), Pairs([("a", 1)])),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "1E400", '"\\ud800"', "1.0", "-0", "1e2")),
    *(Raw("9" * size) for size in (400, 4000, 5000)),
    *(Raw("[" * depth + "]" * depth) for depth in (50, 990, 5000)),
    *(Raw('{"a":' * depth + "1" + "}" * depth) for depth in (50, 990, 5000)),
)


def parsed(text: bytes) -> Any:
    """JSON with objects as `Pairs`; ValueError or RecursionError if it is none."""
    return json.loads(text, object_pairs_hook=Pairs)


def written(value: Any) -> str:
    """The text of what `parsed` gives."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{written(one)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def changed_json(value: Any, drawn: random.Random) -> Any:
    """The document with one to four changes."""
    holder = [value]
    for _ in range(drawn.choice((1, 1, 2, 4))):
        places = list(_places(holder))
        if not places:  # everything was deleted
            return value
        parent, index = drawn.choice(places)
        _change(parent, index, places, drawn)
    return holder[0] if len(holder) == 1 else value


def _places(node: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Every value below: the list or object that holds it, and its index there."""
    for index, entry in enumerate(node):
        yield node, index
        value = entry[1] if isinstance(node, Pairs) else entry
        if isinstance(value, list):
            yield from _places(value)


def _change(
    parent: list[Any], index: int, places: list[tuple[list[Any], int]], drawn: random.Random
) -> None:
    named = isinstance(parent, Pairs)
    name, value = parent[index] if named else ("", parent[index])
    other_parent, other_index = drawn.choice(places)
    other = other_parent[other_index]
    if isinstance(other_parent, Pairs):
        other = drawn.choice(other)  # a name, or its value
    how = drawn.randrange(8)
    if how == 0:
        del parent[index]
        return
    if how == 1:  # twice
        parent.insert(index, (name, drawn.choice((value, other))) if named else value)
        return
    if how == 2 and named:
        name = drawn.choice((f"{name}x", name.upper(), str(drawn.choice(POOL[:30])), str(other)))
    elif how in (3, 4) and type(value) in (int, float):
        value = drawn.choice((value + 1, value - 1, -value, value * 2, value + 64, 0))
    elif how == 5:
        value = [value] if drawn.random() < 0.5 else Pairs([("a", value)])
    elif how == 6 and not _holds(other, parent):
        value = other
    else:
        value = drawn.choice(POOL)
    if isinstance(value, list) and any(value is one for one in POOL):
        value = type(value)(value)
    parent[index] = (name, value) if named else value


def _holds(value: Any, wanted: list[Any]) -> bool:
    """Whether a list is below another: it must not become its own entry."""
    return isinstance(value, list) and (
        value is wanted
        or any(_holds(one[1] if isinstance(value, Pairs) else one, wanted) for one in value)
    )


# --- plans, reports, journals -------------------------------------------------------------------

KINDS: dict[bytes, Any] = {
    b"plan": PruningPlan,
    b"curve": DepthCurve,
    b"report": PruningReport,
    b"manifest": Manifest,
    b"journal": Journal,
}
KEY = "k"


def json_seeds() -> list[list[bytes]]:
    """A file of every kind, and of every earlier format."""
    scores = {"strategy": "ablation", "unit": "x", "removes": "lowest", "scores": {"0": 0.5}}
    held_out = {"change": -0.1, "low": -0.2, "high": 0.0, "unit": "x", "items": 3}
    plan = {
        "format": "llm_pruner.plan/2",
        "model_id": "m",
        "num_layers": 4,
        "remove": [1, 3],
        "strategy": "ablation",
        "options": {"ratio": 0.5},
        "scores": {**scores, "blocks": [[0.5]]},
        "steps": [{"change": -0.1, "removed": [1]}],
        "data": {"items": 2, "fingerprint": "f", "prompts": ["p"]},
        "held_out": held_out,
        "versions": {"torch": "2"},
        "model": {"tensors": "t"},
        "healing": {"stages": []},
        "drop_mtp": False,
        "engines": {"vllm": "right"},
    }
    earlier = {
        "format": "llm_pruner.plan/1",
        "model_id": "m",
        "num_layers": 4,
        "remove": [1],
        "options": {"heal": {"loss": 1.0}},
    }
    point = {"n_layers": 1, "removed": [2], "change": -0.1, "held_out": held_out}
    curve = {
        "format": "llm_pruner.curve/1",
        "model_id": "m",
        "num_layers": 4,
        "strategy": "smart",
        "unit": "x",
        "points": [point, {**point, "n_layers": 2, "removed": [1, 2], "held_out": None}],
    }
    comparison = {"name": "perplexity", "group": "text", "unit": "", "before": 2.0, "after": 3.0}
    report = {
        "format": "llm_pruner.report/2",
        "plan": plan,
        "output_dir": "o",
        "comparisons": [{**comparison, "count": 3, "low": 0.1, "high": 0.2, "floor": None}],
        "samples": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}],
        "seconds": 1.5,
    }
    file = {"from": ["a"], "tensors": 1, "layout": "l"}
    manifest = {
        "format": "llm_pruner.manifest/2",
        "source": "s",
        "revision": None,
        "num_layers": 4,
        "remove": [1],
        "prefixes": ["model.layers."],
        "bytes_before": 8,
        "bytes_after": 4,
        "tensors": 1,
        "files": {SINGLE_FILE: file},
        "from_memory": ["x"],
        "sha256": {"x": "0"},
    }
    tensor = {"from": "l.1.w", "from_file": "a", "file": "b", "dtype": "F32", "shape": [1]}
    before = {
        name: manifest[name]
        for name in "source revision num_layers remove bytes_before bytes_after".split()
    }
    before |= {"format": "llm_pruner.manifest/1", "tensors": {"l.0.w": {**tensor, "sha256": "0"}}}
    line = {"key": KEY, "removed": [0, 2], "chunk": 1, "values": [[0.5, 1.5], [2.0]]}
    lines = json.dumps([line, {**line, "removed": []}])
    documents = {b"curve": curve, b"report": report}
    return [
        [b"plan", json.dumps(plan).encode()],
        [b"plan", json.dumps(earlier).encode()],
        [b"manifest", json.dumps(manifest).encode()],
        [b"manifest", json.dumps(before).encode()],
        *([kind, json.dumps(document).encode()] for kind, document in documents.items()),
        [b"journal", b"\n".join(map(str.encode, map(json.dumps, json.loads(lines))))],
    ]


def change_json(files: list[bytes], drawn: random.Random) -> list[bytes]:
    """Change a document; in a journal, one line."""
    kind, text = files
    lines = text.split(b"\n") if kind == b"journal" else [text]
    number = drawn.randrange(len(lines))
    encoding = "utf-16" if drawn.random() < 0.02 else "utf-8"
    lines[number] = written(changed_json(parsed(lines[number]), drawn)).encode(encoding)
    return [kind, b"\n".join(lines)]


def check_json(files: list[bytes], place: Path) -> None:
    """Read a file, write what was read, and read that."""
    name, text = (*files, b"", b"")[:2]
    kind = KINDS.get(name) or [*KINDS.values()][sum(name) % len(KINDS)]
    path = write(place / "json", {"file": text}) / "file"
    if kind is Journal:
        check_journal(path)
        return
    value = kind.load(path)
    text_again = value.to_json()
    again = kind.from_json(text_again)
    if again != value:
        raise InconsistentError(f"{kind.__name__}, written and read again, is another")
    if again.to_json() != text_again:
        raise InconsistentError(f"{kind.__name__} is written in two ways")
    path.write_text(text_again, encoding="utf-8")


def check_journal(path: Path) -> None:
    """Read a journal; its entries have the types they should have, and survive being written."""
    journal = Journal(path)
    entries = journal.read(KEY)
    for removed, chunk, values in entries:
        if any(type(one) is not int for one in (*removed, chunk)):
            raise InconsistentError("a journal's layers or chunk are no whole numbers")
        if any(not math.isfinite(one) for part in values for one in part):
            raise InconsistentError("a journal's values are not finite")
    path.unlink()
    for entry in entries:
        journal.append(KEY, *entry)
    if journal.read(KEY) != entries:
        raise InconsistentError("a journal, written and read again, is another")


JSON = Target(json_seeds, check_json, change_json)
