"""Hostile data files for `faults.py`, on which layers are chosen."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from fault_judges import a_plan
from fault_models import DEEP, DIGITS, SPECIAL, Area, short, special
from fault_rooms import SCORED, SEARCHES, Base, Case, items

Items = list[dict[str, str]] | list[str]


# --- data -----------------------------------------------------------------------------------------
def as_csv(rows: list[dict[str, str]], names: list[str] | None = None, end: str = "\n") -> str:
    """Rows as CSV, perhaps under other names."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator=end)
    writer.writerow(names or list(rows[0]))
    writer.writerows(row.values() for row in rows)
    return target.getvalue()


def as_jsonl(rows: Items) -> str:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def whole(rows: list[dict[str, str]], between: str) -> list[dict[str, str]]:
    """One text of all rows, which is cut into passages as a file is."""
    return [{"text": between.join(texts(rows))}]


def with_row(row: str) -> Callable[[list[dict[str, str]]], str]:
    """JSON Lines in which one row is this text."""
    return lambda rows: as_jsonl(rows[:20]) + row + "\n" + as_jsonl(rows[20:])


def texts(rows: list[dict[str, str]]) -> list[str]:
    """Rows as running text."""
    return [f"{row['prompt']} {row['reference']}" for row in rows]


# What stands in the file; the items that it must give, or None if it must be refused.
Sound = Callable[[list[dict[str, str]]], Items]
SAME: Sound = lambda rows: rows  # noqa: E731
CSV: dict[str, tuple[Callable[[list[dict[str, str]]], str | bytes], Sound | None]] = {
    "clean": (as_csv, SAME),
    "CRLF": (lambda rows: as_csv(rows, end="\r\n"), SAME),
    "a BOM": (lambda rows: as_csv(rows).encode("utf-8-sig"), SAME),
    "names in capitals": (lambda rows: as_csv(rows, ["PROMPT", " Reference "]), SAME),
    "a third column": (
        lambda rows: as_csv([{**row, "note": "5"} for row in rows]),
        SAME,
    ),
    "the column prompt twice": (
        lambda rows: as_csv(
            [{**row, "x": "t005"} for row in rows], ["prompt", "reference", "prompt"]
        ),
        None,
    ),
    "the column reference twice": (
        lambda rows: as_csv(
            [{**row, "x": "t005"} for row in rows], ["prompt", "reference", "reference"]
        ),
        None,
    ),
    "Prompt and prompt": (
        lambda rows: as_csv(
            [{**row, "x": "t005"} for row in rows], ["Prompt", "reference", "prompt"]
        ),
        None,
    ),
    "all columns twice": (
        lambda rows: as_csv(
            [{**row, "x": "t005", "y": "t006"} for row in rows], ["prompt", "reference"] * 2
        ),
        None,
    ),
    "a column without name": (
        lambda rows: as_csv([{**row, "x": "t005"} for row in rows], ["prompt", "reference", ""]),
        SAME,
    ),
    "a cell too many": (lambda rows: as_csv(rows) + "a,b,c\n", None),
    "a cell too few": (lambda rows: as_csv(rows) + "a\n", None),
    "an open quote": (lambda rows: as_csv(rows) + '"a,b\n', None),
    "NUL in a cell": (lambda rows: as_csv(rows) + "t0\0,t005\n", None),
    "UTF-16": (lambda rows: as_csv(rows).encode("utf-16"), None),
    "latin-1": (lambda rows: (as_csv(rows) + "caf\u00e9,t005\n").encode("latin-1"), None),
    "semicolons": (lambda rows: as_csv(rows).replace(",", ";"), None),
    "the first line alone": (lambda rows: "prompt,reference\n", None),
    "empty": (lambda rows: "", None),
    "white space": (lambda rows: " \n\n", None),
    "a cell of 200,000 characters": (lambda rows: as_csv(rows) + f"{'a' * 200_000},b\n", None),
    "an empty reference": (lambda rows: as_csv(rows) + "t005,\n", None),
    "no first line": (lambda rows: as_csv(rows).split("\n", 1)[1], None),
    "a nested cell": (lambda rows: as_csv(rows) + f'"{"[" * 50_000}",b\n', None),
}
ROWS: dict[str, str] = {
    "null": "null",
    "a number": "5",
    "a list": "[1]",
    "an empty object": "{}",
    "deep nesting": DEEP,
    "deep nesting inside": f'{{"prompt": {DEEP}, "reference": "t005"}}',
    "NaN": "NaN",
    "NaN as prompt": '{"prompt": NaN, "reference": "t005"}',
    "Infinity as reference": '{"prompt": "t005", "reference": -Infinity}',
    "5,000 digits": f'{{"prompt": {DIGITS}, "reference": "t005"}}',
    "5,000 digits alone": DIGITS,
    "true as prompt": '{"prompt": true, "reference": "t005"}',
    "a list as prompt": '{"prompt": ["t005"], "reference": "t005"}',
    "an object as prompt": '{"prompt": {"a": 1}, "reference": "t005"}',
    "an empty prompt": '{"prompt": "", "reference": "t005"}',
    "white space as reference": '{"prompt": "t005", "reference": "  "}',
    "a lone surrogate": '{"prompt": "t005 \\ud800", "reference": "t005"}',
    "a lone surrogate as key": '{"\\ud800": 1}',
    "a lone surrogate as task": '{"task": "\\ud800", "prompt": "t005", "reference": "t005"}',
    "a lone surrogate in text": '{"text": "\\udfff"}',
    "no JSON": "{prompt: t005}",
    "cut": '{"prompt": "t0',
    "NUL": "\0",
    "other fields": '{"frage": "t005", "antwort": "t006"}',
    "one choice": '{"prompt": "a", "reference": "b", "choices": ["b"]}',
    "choices without the reference": '{"prompt": "a", "reference": "b", "choices": ["c", "d"]}',
    "choices as text": '{"prompt": "a", "reference": "b", "choices": "b"}',
    "choices as numbers": '{"prompt": "a", "reference": "b", "choices": {"text": 5}}',
    "nested choices": '{"prompt": "a", "reference": "b", "choices": [["b"], ["c"]]}',
    "choices null inside": '{"prompt": "a", "reference": "b", "choices": ["b", null]}',
    "aliases as number": '{"prompt": "a", "reference": "b", "aliases": 5}',
    "aliases of objects": '{"prompt": "a", "reference": "b", "aliases": [{}]}',
    "an answer of 5,000 digits": f'{{"question": "a", "choices": ["b", "c"], "answer": {DIGITS}}}',
    "a negative answer": '{"question": "a", "choices": ["b", "c"], "answer": -2}',
    "an answer too large": '{"question": "a", "choices": ["b", "c"], "answer": 2}',
    "a superscript as answer": '{"question": "a", "choices": ["b", "c"], "answer": "\u00b2"}',
    "labels of another length": (
        '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, "answerKey": "B"}'
    ),
    "labels that repeat": (
        '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "A"]}, "answerKey": "A"}'
    ),
    "mc1_targets as list": '{"question": "a", "mc1_targets": [1]}',
    "mc1_targets without a true one": '{"question": "a", "mc1_targets": {"b": 0, "c": 0}}',
    "mc1_targets of lists": '{"question": "a", "mc1_targets": {"choices": [["b"]], "labels": [1]}}',
    "gsm8k without number": '{"question": "a", "answer": "b\\n#### x"}',
    "an empty list of answers": '{"question": "a", "answer": []}',
    "an answer object": '{"question": "a", "answer": {"value": 5.5, "aliases": 5}}',
    "Prompt and prompt": '{"Prompt": "t005", "prompt": "t006", "reference": "t007"}',
    "the key prompt twice": '{"prompt": "t005", "prompt": "t006", "reference": "t007"}',
}
JSONS: dict[str, tuple[Callable[[list[dict[str, str]]], str | bytes], Sound | None]] = {
    "clean": (json.dumps, SAME),
    "one list in an object": (lambda rows: json.dumps({"data": rows}), SAME),
    "two lists in an object": (lambda rows: json.dumps({"a": rows, "b": rows}), None),
    "columns": (lambda rows: json.dumps({n: [r[n] for r in rows] for n in rows[0]}), None),
    "JSON Lines": (as_jsonl, SAME),
    "a text": (lambda rows: '"x"', None),
    "a number": (lambda rows: "5", None),
    "null": (lambda rows: "null", None),
    "an empty list": (lambda rows: "[]", None),
    "nested deep": (lambda rows: DEEP, None),
    "nested objects": (lambda rows: '{"a":' * 50_000 + "1" + "}" * 50_000, None),
    "lists of lists": (lambda rows: json.dumps([[row] for row in rows]), None),
    "UTF-16": (lambda rows: json.dumps(rows).encode("utf-16"), None),
    "a BOM": (lambda rows: json.dumps(rows).encode("utf-8-sig"), SAME),
    "cut": (lambda rows: json.dumps(rows)[:-5], None),
    "something after its end": (lambda rows: json.dumps(rows) + "x", None),
    "texts": (lambda rows: json.dumps(texts(rows)), texts),
    "mixed with texts": (lambda rows: json.dumps([*rows[:20], *texts(rows[20:])]), None),
}
TXT: dict[str, tuple[Callable[[list[dict[str, str]]], str | bytes], Sound | None]] = {
    "clean": (lambda rows: "\n\n".join(texts(rows)), lambda rows: whole(rows, "\n\n")),
    "CRLF": (
        lambda rows: "\r\n\r\n".join(texts(rows)).encode(),
        lambda rows: whole(rows, "\r\n\r\n"),
    ),
    "empty": (lambda rows: "", None),
    "white space": (lambda rows: "\n \n\t\n", None),
    "one paragraph": (lambda rows: "t005 t006", None),
    "the same paragraph": (lambda rows: "t005 t006\n\n" * 40, None),
    "bytes that are no UTF-8": (lambda rows: b"\xff\xfe\xfd" * 9, None),
    "UTF-16": (lambda rows: "\n\n".join(texts(rows)).encode("utf-16"), None),
}
KINDS = {".csv": CSV, ".json": JSONS, ".txt": TXT}


def data_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A data file with something wrong in it, on which layers are chosen."""
    base.copy("m", room / "m")
    rows, sound, name = items(40, seed=drawn.randrange(1, 10**6)), None, "d.jsonl"
    kind = drawn.choice(["rows", "rows", *KINDS, *KINDS, "special", "folder", "few", "name"])
    must = garbage = False
    if kind == "rows":
        what = drawn.choice(list(ROWS))
        (room / name).write_text(with_row(ROWS[what])(rows), encoding="utf-8")
        garbage, what = True, f"jsonl row: {what}"
    elif kind in KINDS:
        name, what = f"d{kind}", drawn.choice(list(KINDS[kind]))
        write, sound = KINDS[kind][what]
        raw = write(rows)
        (room / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        must, garbage, what = what == "clean", sound is None, f"{kind[1:]}: {what}"
    elif kind == "special":
        name, what = (
            f"d{drawn.choice(['.jsonl', '.csv', '.txt', '.json', ''])}",
            drawn.choice(SPECIAL),
        )
        special(room / name, what)
        garbage, what = True, f"{name} is {what}"
    elif kind == "folder":
        what, sound = folder_of_data(drawn, room / "d", rows)
        name, garbage = "d", sound is None
    elif kind == "few":
        what, few = drawn.choice(
            [
                ("one row", rows[:1]),
                ("two rows", rows[:2]),
                ("the same row", rows[:1] * 40),
                ("long prompts", [{**row, "prompt": row["prompt"] * 3000} for row in rows]),
                ("unknown words", [{"prompt": f"\u200b{n}", "reference": "😀"} for n in range(40)]),
            ]
        )
        (room / name).write_text(as_jsonl(few))
    else:
        name = drawn.choice(
            [
                *["nope.jsonl", "nope", "no/pe", "https://x.org/d.jsonl", "~", "~nouser/d.csv"],
                *["", "x" * 300, f"{'x' * 300}.csv", "d\n.csv", "\udcff.csv", "m", "."],
                *["/dev/null", "d.parquet", "demo-x", "m/config.json", "m/model.safetensors"],
                *["a b/c", "sciq", "\ud83d.txt", "x/" * 3000],
            ]
        )
        what, garbage = f"the name {short(name)!r}", True
        (room / "d.parquet").write_bytes(b"PAR1")
    words = ["--model", "m", *SEARCHES["bi"], *SCORED, "--dry-run", "--json"]
    words[words.index("--eval-dataset") + 1] = name
    twin = None
    if sound is not None:
        wanted = sound(rows)

        def twin(room: Path, other: Path) -> list[str]:
            base.copy("m", other / "m")
            (other / "d.jsonl").write_text(as_jsonl(wanted))
            return [word if word != name else "d.jsonl" for word in words]

    return Case(
        f"data: {what if len(what) < 60 else kind}",
        what,
        words,
        twin=twin,
        must=must,
        garbage=garbage,
        check=None if sound else a_plan,
    )


def folder_of_data(
    drawn: random.Random, folder: Path, rows: list[dict[str, str]]
) -> tuple[str, Sound | None]:
    """A folder of data; says what, and which items it must give."""
    folder.mkdir()
    what = drawn.choice(
        "empty|a FIFO|a folder in it|a loop|500 files|a broken file|hidden".split("|")
    )
    if what != "empty":
        (folder / "d.jsonl").write_text(as_jsonl(rows))
    if what == "a FIFO":
        os.mkfifo(folder / "e.jsonl")
    elif what == "a folder in it":
        (folder / "e.jsonl").mkdir()
    elif what == "a loop":
        (folder / "e.jsonl").symlink_to("e.jsonl")
    elif what == "a broken file":
        (folder / "e.jsonl").write_text("{")
    elif what == "500 files":
        for number in range(500):
            (folder / f"{number}.txt").write_text(f"t{number % 60:03d} t005 t{number % 59:03d}")
        (folder / "d.jsonl").unlink()
        return "folder: 500 files", texts_of_many
    elif what == "hidden":
        (folder / "notes.md").write_text("mine")
        return "folder: a file of another kind", SAME
    return f"folder: {what}", None


def texts_of_many(rows: list[dict[str, str]]) -> list[str]:
    """The items of 500 small files, by name."""
    names = sorted(f"{number}.txt" for number in range(500))
    numbers = [int(name.split(".")[0]) for name in names]
    return [f"t{number % 60:03d} t005 t{number % 59:03d}" for number in numbers]


AREAS = {"data": Area(300, data_case)}
