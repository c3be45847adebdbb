"""Hostile plans and journals for `faults.py`.

Each function draws one case and prepares its room.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from fault_judges import differing, plan_of
from fault_models import (
    DEEP,
    DIGITS,
    ODD,
    SPECIAL,
    WHOLE,
    Area,
    joined,
    parted,
    places,
    short,
    special,
    twin_of_model,
    with_value,
)
from fault_rooms import LAYERS, SCORED, SEARCHES, Base, Case, Ended


def plans_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A plan with something wrong in it, carried out on disk."""
    base.copy("m", room / "m")
    base.copy("d.jsonl", room / "d.jsonl")
    plan = base.json(f"{drawn.choice(list(SEARCHES))}.plan.json")
    text, garbage, check = json.dumps(plan), True, None
    removed, roll = plan["remove"], drawn.random()
    path = room / "p.json"
    if roll < 0.03:
        kind, what, garbage = "clean", "nothing is wrong", False
    elif roll < 0.2:
        numbers = [one for one in places(plan) if isinstance(_at(plan, one), float)]
        where = drawn.choice([one for one in numbers if one[0] == "held_out"] or numbers)
        kind, garbage = "plan: a measured value edited", False
        new = drawn.choice([-0.001, 0.5, _at(plan, where) + 0.01])
        what, text = f"{'.'.join(map(str, where))} = {new}", with_value(plan, where, repr(new))
        if where[0] == "held_out":
            check = said_edited
    elif roll < 0.3:
        removed = sorted(drawn.sample(range(LAYERS), drawn.randint(1, 4)))
        kind, what, garbage = "plan: other layers", f"remove = {removed}", False
        text = json.dumps({**plan, "remove": removed})
    elif roll < 0.42:
        raw = drawn.choice(
            [
                *["[]", "[0,1,2,3,4,5,6,7]", "[1,1]", "[-1]", "[8]", "[1.0]", "[true]", '["1"]'],
                *['"12"', "null", "1", '{"1":2}', "[[1]]", f"[{DIGITS}]", "[1e400]", DEEP],
                *["[2,null]"],
            ]
        )
        kind, what = "plan: remove", f"remove = {short(raw)}"
        text = with_value(plan, ("remove",), raw)
    elif roll < 0.48:
        part = drawn.choice(["tensors", "weights"])
        kind, what = "plan: of another model", f"model.{part} is another"
        text = json.dumps({**plan, "model": {**plan["model"], part: "0" * 16}})
    elif roll < 0.56:
        what = drawn.choice(list(WHOLE))
        kind, garbage = f"plan: whole file {what}", what not in ("CRLF", "a long key", "with a BOM")
        path.write_bytes(WHOLE[what](text) or b"")
        text = ""
    elif roll < 0.6:
        kind, what = "plan: is no file", drawn.choice(SPECIAL)
        special(path, what)
        text = ""
    else:
        where, raw = drawn.choice(_top_first(drawn, plan)), drawn.choice(ODD)
        kind, what = f"plan: field {where[0]}", f"{'.'.join(map(str, where))} = {short(raw)}"
        free = len(where) > 1 and where[0] in ("options", "data", "steps")  # as anybody likes
        garbage = not free and not _same_kind(_at(plan, where), raw)
        text = with_value(plan, where, raw)
        if where[0] == "remove":
            garbage = True
    if text:
        path.write_text(text)
    words = ["--model", "m", "--plan", "p.json"]
    if number % 6 == 0:
        words += ["--dry-run", "--json", *SCORED]
        return Case(kind, f"dry run: {what}", words, garbage=garbage, must=kind == "clean")
    words += ["--output", "o", *drawn.choice([[], [], ["--json"], ["--verify"]])]
    return Case(
        kind, what, words, removed, garbage=garbage, check=check, must=kind == "clean", intact=True
    )


def _top_first(drawn: random.Random, plan: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Places of a plan, those at the top as often as all others."""
    return drawn.choice([[(name,) for name in plan], places(plan)])


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


def _same_kind(value: Any, raw: str) -> bool:
    """Whether a JSON text could stand in the place of a value."""
    try:
        new = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, int | float) and isinstance(new, int | float):
        return new == new and abs(new) < 1e300 and isinstance(value, bool) == isinstance(new, bool)
    if value in ([], {}) or (isinstance(value, str) and raw == '"\\ud800"'):
        return False
    return value is None or new is None or type(value) is type(new)


def said_edited(room: Path, ended: Ended) -> str | None:
    """A measurement that was edited by hand must not stand in the card as one."""
    card = (room / "o" / "README.md").read_text()
    if "The cut alone" not in card:
        return None
    if re.search(r"edited|by hand|altered|checksum|no longer", card + ended.err + ended.out, re.I):
        return None
    return "the card repeats a value that was edited by hand"


# --- journals -------------------------------------------------------------------------------------
def journals_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A journal with something wrong in it, which a run goes on with."""
    name = drawn.choice(["ablation", "smart", "smart3"])
    base.copy("m", room / "m")
    base.copy("d.jsonl", room / "d.jsonl")
    path = base.copy(f"{name}.journal.jsonl", room / "o.journal.jsonl")
    lines = path.read_text().splitlines()
    where = drawn.randrange(len(lines))
    line, kind, foreign = lines[where], "", False
    wanted: dict[str, Any] | None = base.json(f"{name}.plan.json")
    kinds = (
        "digit digit digit values cut duplicate reorder swap field bytes special weights".split()
    )
    kind = drawn.choice(kinds) if number % 40 else "clean"
    what = kind
    if kind == "digit":
        found = drawn.choice(list(re.finditer(r"\d", line)))
        inside = list(re.finditer(r"(?<=\d)\d?\.\d", line))
        found = drawn.choice(inside) if inside and drawn.random() < 0.7 else found
        new = str((int(found[0][-1]) + drawn.randint(1, 9)) % 10)
        at = found.end() - 1
        lines[where] = f"{line[:at]}{new}{line[at + 1 :]}"
        what = f"line {where}: {line[max(0, at - 12) : at + 3]!r}, last but two -> {new}"
    elif kind == "values":
        entry = json.loads(line)
        values = entry["values"]
        raw = drawn.choice(
            [
                *["Infinity", "-Infinity", "NaN", "1e400", "1e308", "-5.0", "null", '"7"', "[7]"],
                *[DIGITS, "{}", "true", "0", "1e-320", DEEP],
            ]
        )
        if drawn.random() < 0.3:
            cut = drawn.choice(
                [[], [[]], [values[0][:-1]], [*values, values[0]], values[0], 5, "x"]
            )
            lines[where] = json.dumps({**entry, "values": cut})
            what = f"values of another shape: {json.dumps(cut)[:40]}"
        else:
            lines[where] = re.sub(
                r"\s+", " ", with_value(entry, ("values", 0, drawn.randrange(len(values[0]))), raw)
            )
            what = f"a value is {short(raw)}"
    elif kind == "cut":
        at = drawn.randrange(len(line))
        lines[where:] = drawn.choice([[line[:at]], [line[:at], *lines[where + 1 :]]])
        what = f"line {where} is cut at {at}"
    elif kind == "duplicate":
        lines += drawn.choice([[line], lines, [line] * 2000])
    elif kind == "reorder":
        drawn.shuffle(lines)
    elif kind == "swap" and len(lines) > 1:
        other = drawn.choice([n for n in range(len(lines)) if n != where])
        one, two = json.loads(line), json.loads(lines[other])
        field = drawn.choice(["values", "removed", "chunk"])
        one[field], two[field] = two[field], one[field]
        lines[where], lines[other] = json.dumps(one), json.dumps(two)
        what = f"{field} of lines {where} and {other} swapped"
    elif kind == "field":
        entry = json.loads(line)
        field, raw = drawn.choice(list(entry)), drawn.choice(ODD)
        lines[where] = re.sub(r"\s+", " ", with_value(entry, (field,), raw))
        what = f"{field} = {short(raw)}"
    elif kind == "weights":
        wanted = None
        header, data = parted(room / "m" / "model.safetensors")
        for _ in range(drawn.choice([1, 40, 4000])):
            at = drawn.randrange(len(data) // 4) * 4
            data = data[:at] + data[at : at + 2] + b"\x80\x3f" + data[at + 4 :]
        joined(room / "m" / "model.safetensors", header, data)
        what = "the weights have been changed in place since"
    path.write_text("\n".join(lines) + "\n")
    if kind == "special":
        what = drawn.choice(SPECIAL)
        special(path, what)
        foreign = True
    elif kind == "bytes":
        raw = path.read_bytes()
        options = {
            "UTF-16": raw.decode().encode("utf-16"),
            "BOM": b"\xef\xbb\xbf" + raw,
            "CRLF": raw.replace(b"\n", b"\r\n"),
            "a foreign text": b"Dear diary,\ntoday I pruned.\n",
            "bytes that are no UTF-8": b"\xff\xfe\x00mine" + raw[:20],
            "empty": b"",
            "one line of 5 MB": b'{"x": "' + b"y" * 5_000_000 + b'"}\n',
            "other JSON lines": b'{"prompt": "mine"}\n' * 3,
            "nested deep": DEEP.encode() + b"\n",
            "NUL bytes": b"\0" * 1000 + raw,
            "no newline at the end": raw.rstrip(b"\n"),
        }
        what = drawn.choice(list(options))
        path.write_bytes(options[what])
        foreign = what in ("a foreign text", "bytes that are no UTF-8", "other JSON lines")
    words = ["--model", "m", *SEARCHES[name], *SCORED, "--dry-run", "--json", "--output", "o"]

    def check(room: Path, ended: Ended) -> str | None:
        return differing(plan_of(ended.out), wanted) if wanted else None

    return Case(
        f"journal: {kind}",
        what,
        [*words, "--resume"],
        check=check,
        must=kind == "clean",
        may_change=("nowhere",) if foreign else ("o.journal.jsonl",),
        twin=None if wanted else twin_of_model,
    )


AREAS = {"plans": Area(330, plans_case), "journals": Area(330, journals_case)}
