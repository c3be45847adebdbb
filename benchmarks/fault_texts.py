"""Hostile texts for `faults.py`: data files, model cards and chat templates."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_files import DEEP, DIGITS, SPECIAL, Area, short, special
from fault_rooms import SCORED, SEARCHES, Base, Case, Ended, items, plan_of

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
    "an answer key of 5,000 digits": f'{{"question": "a", "choices": ["b", "c"], "answer": {DIGITS}}}',
    "a negative answer": '{"question": "a", "choices": ["b", "c"], "answer": -2}',
    "an answer too large": '{"question": "a", "choices": ["b", "c"], "answer": 2}',
    "an answer that is a superscript": '{"question": "a", "choices": ["b", "c"], "answer": "\u00b2"}',
    "labels of another length": (
        '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A"]}, "answerKey": "B"}'
    ),
    "labels that repeat": (
        '{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "A"]}, "answerKey": "A"}'
    ),
    "mc1_targets as list": '{"question": "a", "mc1_targets": [1]}',
    "mc1_targets without a true one": '{"question": "a", "mc1_targets": {"b": 0, "c": 0}}',
    "mc1_targets with lists": '{"question": "a", "mc1_targets": {"choices": [["b"]], "labels": [1]}}',
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
    "clean": (lambda rows: "\n\n".join(texts(rows)), texts),
    "CRLF": (lambda rows: "\r\n\r\n".join(texts(rows)).encode(), texts),
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
            [("one row", rows[:1]), ("two rows", rows[:2]), ("the same row", rows[:1] * 40)]
            + [("long prompts", [{**row, "prompt": row["prompt"] * 3000} for row in rows])]
            + [
                (
                    "unknown words",
                    [{"prompt": f"\u200b{n}", "reference": "\U0001f600"} for n in range(40)],
                )
            ]
        )
        (room / name).write_text(as_jsonl(few))
    else:
        name = drawn.choice(
            [
                "nope.jsonl",
                "nope",
                "no/pe",
                "https://x.org/d.jsonl",
                "~",
                "~nouser/d.csv",
                "",
                "x" * 300,
            ]
            + [
                f"{'x' * 300}.csv",
                "d\n.csv",
                "\udcff.csv",
                "m",
                ".",
                "/dev/null",
                "d.parquet",
                "demo-x",
            ]
            + ["m/config.json", "m/model.safetensors", "a b/c", "sciq", "\ud83d.txt", "x/" * 3000]
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


def a_plan(room: Path, ended: Ended) -> str | None:
    """A plan must have been printed that can be."""
    try:
        removed = plan_of(ended.out)["remove"]
    except ValueError:
        return "no plan was printed"
    if not removed or not all(type(one) is int and 0 <= one < 8 for one in removed):
        return f"a plan that cannot be: {removed}"
    return None


# --- model cards and chat templates ---------------------------------------------------------------
FIELDS = (
    "license language datasets tags pipeline_tag license_name license_link base_model model-index "
    "library_name widget x"
).split()
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{two}: &{two} [{','.join([f'*{one}'] * 9)}]\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_VALUES = [
    *"2020-13-45 2020-01-01 2001-12-14t21:59:43.10-05:00 12:30:45 190:20:30 0x1F 0o17 0b11".split(),
    *"1e400 .nan -.inf 1_000 null ~ yes no true 5 5.5 '' [] {} [[]] [null] [5,true] <<".split(),
    *[
        "!!python/object/apply:os.system [echo]",
        "!!binary x",
        "!!binary '/w=='",
        "!x y",
        "!!set {a}",
    ],
    *["!!omap [a: 1]", "!!int x", "!!float x", "!!timestamp x", "!!bool x", "!!null x", "!!map []"],
    *["&a [*a]", "*a", "{a: b}", "[1,[2,[3]]]", '"\\ud800"', '"\\0"', "'a\n\n b'", "|\n  a\n  b"],
    *[
        "a: b: c",
        "- - - -",
        "\tx",
        "@x",
        "`x`",
        "%x",
        "x #y",
        "[a",
        "{a",
        '"a',
        "? a",
        "mit, apache-2.0",
    ],
    *[DIGITS, f"-{DIGITS}", f"0x{'f' * 5000}", "[" * 10_000, "[" * 400 + "]" * 400, "x" * 10**6],
    *[
        "{? [a]: b}",
        "{[a]: b}",
        "{1: b, true: c}",
        "<script>alert(1)</script>",
        "|---|",
        "---",
        "...",
    ],
    *[
        "en\n...\n---\nx: y",
        "\u2028",
        "\x07",
        "\ufeff",
        "caf\u00e9",
        "\U0001f600",
        "=",
        "!!str",
        "\r",
    ],
]
CARDS: dict[str, bytes] = {
    "no end": b"---\nlicense: mit\n",
    "empty": b"",
    "CRLF": b"---\r\nlicense: mit\r\n---\r\n# x\r\n",
    "BOM": b"\xef\xbb\xbf---\nlicense: mit\n---\n",
    "UTF-16": "---\nlicense: mit\n---\n".encode("utf-16"),
    "latin-1": "---\nlicense: caf\u00e9\n---\n".encode("latin-1"),
    "NUL bytes": b"---\nlicense: m\0it\n---\n",
    "billion laughs": f"---\n{LAUGHS}license: *i\n---\n".encode(),
    "billion laughs as tags": f"---\n{LAUGHS}tags: *i\n---\n".encode(),
    "billion laughs unused": f"---\n{LAUGHS}---\n".encode(),
    "a list": b"---\n- a\n- b\n---\n",
    "a number": b"---\n5\n---\n",
    "a date": b"---\n2020-13-45\n---\n",
    "a duplicate": b"---\nlicense: mit\nlicense: gpl\n---\n",
    "a merge": b"---\nx: &x {license: mit}\n<<: *x\n---\n",
    "a merge of itself": b"---\nx: &x\n  <<: *x\nlicense: mit\n---\n",
    "a complex key": b"---\n? [a, b]\n: c\nlicense: mit\n---\n",
    "a key that is a list": b"---\n? {a: b}\n: c\n---\n",
    "two documents": b"---\na: b\n--- \nc: d\n---\n",
    "a directive": b"---\n%YAML 9.9\n---\nlicense: mit\n---\n",
    "nested deep": b"---\nx: " + b"[" * 50_000 + b"\n---\n",
    "nested by indent": b"---\n" + b"".join(b" " * n + b"a:\n" for n in range(1500)) + b"---\n",
    "5 MB": b"---\nlicense: mit\n---\n" + b"# words\n" * 600_000,
    "5 MB of dashes": b"---\n" + b"-" * 5_000_000 + b"\n",
    "many lines before no end": b"---\n" + b"a\n\n" * 200_000,
    "numbers as keys": b"---\n1: 2\n2.5: 3\nnull: 4\ntrue: 5\nlicense: mit\n---\n",
}
TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "raises without a system message": "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}"
    "{% endif %}x",
    "a syntax error": "{% for %}",
    "an open block": "{% if true %}x",
    "an unknown filter": "{{ messages | nope }}",
    "an unknown tag": "{% nope %}",
    "an unknown function": "{{ nope() }}",
    "a division by zero": "{{ 1 / 0 }}",
    "an index that is not there": "{{ messages[99].x.y }}",
    "a text and a number": "{{ 'x' + 5 }}",
    "a range too long": "{% for i in range(1000000000) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 10000000000 }}",
    "a list of lists": "{% set a = [1] * 100000000 %}{{ (a * 100) | length }}",
    "a high power": "{{ 10 ** 10 ** 10 }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "an include": "{% include 'config.json' %}",
    "an import": "{% import 'os' as os %}",
    "10 MB": "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "nothing": "",
    "a constant": "hello",
    "the messages dropped": "{% for m in messages %}{% endfor %}",
    "None": "{{ none }}",
    "a lone surrogate": "{{ '\\ud800' }}",
    "NUL": "{{ '\\x00' }}{{ messages[0].content }}",
    "another prompt each time": "{{ range(1000000) | random }}{{ messages[0].content }}",
    "nested 5,000 deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "10,000 blocks": "{% if true %}" * 10_000 + "x" + "{% endif %}" * 10_000,
    "sound": "{% for m in messages %}t004 {{ m['content'] }} t005 {% endfor %}t006 ",
}
FAILING = tuple(TEMPLATES)[: tuple(TEMPLATES).index("10 MB")]
TEMPLATE_VALUES = [
    "5",
    "true",
    "[]",
    "{}",
    '{"default": 5}',
    '[{"name": "default", "template": 5}]',
]
TEMPLATE_VALUES += ['[{"name": "default"}]', '["x"]', "[5]", '{"a": "x"}', '"\\ud800"']


def cards_case(drawn: random.Random, number: int, room: Path, base: Base) -> Case:
    """A model card, pruned on disk; or a chat template, with which layers are scored."""
    model = base.copy("m", room / "m")
    if number % 3 == 0:
        return template_case(drawn, number, model, base)
    path, roll = model / "README.md", drawn.random()
    kind, what = "card: clean", "the base's own card"
    if roll < 0.6:
        field, value = drawn.choice(FIELDS), drawn.choice(YAML_VALUES)
        kind, what = f"card: {field}", f"{field}: {short(value)}"
        text = f"---\nlanguage: de\n{field}: {value}\n---\n# x\n"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif roll < 0.9:
        what = drawn.choice(list(CARDS))
        kind = f"card: {what}"
        path.write_bytes(CARDS[what])
    elif roll < 0.97:
        what = drawn.choice(SPECIAL)
        kind = "card is no file"
        special(path, what)
        what = f"card: {what}"
    words = ["--model", "m", "--layers", "1,2", "--output", "o"]
    clean = kind == "card: clean"
    return Case(
        kind,
        what,
        words,
        [1, 2],
        intact=True,
        must=clean,
        check=a_card_licensed if clean else a_card,
    )


def a_card(room: Path, ended: Ended, licence: str | None = None) -> str | None:
    """The card of the output must be one that the hub can read, and of a usual size."""
    import yaml

    raw = (room / "o" / "README.md").read_bytes()
    if len(raw) > 2_000_000:
        return f"a card of {len(raw):,} bytes"
    try:
        parts = raw.decode().split("\n---\n", 1)
        found: Any = yaml.safe_load(parts[0].removeprefix("---\n"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        return f"the card cannot be read: {type(error).__name__} {str(error)[:100]}"
    if not isinstance(found, dict) or "llm_pruner" not in found.get("tags", ()):
        return "the card has lost its tags"
    if licence is not None and found.get("license") != licence:
        return f"the licence is {found.get('license')!r}"
    if not parts[1].lstrip().startswith("# "):
        return "the card's text does not follow its metadata"
    return None


def a_card_licensed(room: Path, ended: Ended) -> str | None:
    """The same, of a sound card."""
    return a_card(room, ended, "mit")


def template_case(drawn: random.Random, number: int, model: Path, base: Base) -> Case:
    """A chat template with something wrong in it."""
    base.copy("d.jsonl", model.parent / "d.jsonl")
    what, failing, roll = drawn.choice(list(TEMPLATES)), False, drawn.random()
    path = model / "tokenizer_config.json"
    values = json.loads(path.read_text())
    if roll < 0.55:
        (model / "chat_template.jinja").write_text(TEMPLATES[what])
        failing = what in FAILING
    elif roll < 0.8:
        path.write_text(json.dumps({**values, "chat_template": TEMPLATES[what]}))
        failing = what in FAILING
    elif roll < 0.9:
        raw = drawn.choice(TEMPLATE_VALUES)
        what = f"chat_template: {raw}"
        path.write_text(f'{path.read_text().rstrip()[:-1]}, "chat_template": {raw}}}')
    else:
        what = drawn.choice(SPECIAL)
        special(model / "chat_template.jinja", what)
        what = f"chat_template.jinja: {what}"
    words = ["--model", "m", *SEARCHES["bi"], *SCORED, "--dry-run", "--json"]

    def check(room: Path, ended: Ended) -> str | None:
        if failing and "template" not in ended.err:
            return "a template that cannot be used, and not a word of it"
        return a_plan(room, ended)

    return Case(f"template: {what}", f"template: {what}", words, check=check, must=what == "sound")


AREAS = {"data": Area(300, data_case), "cards": Area(330, cards_case)}
