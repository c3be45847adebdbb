"""Hostile model cards and chat templates for `faults.py`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fault_judges import a_plan
from fault_models import DIGITS, SPECIAL, Area, short, special
from fault_rooms import SCORED, SEARCHES, Base, Case, Ended

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
    *["!!python/object/apply:os.system [echo]", "!!binary x", "!!binary '/w=='", "!x y"],
    *["!!set {a}", "!!omap [a: 1]", "!!int x", "!!float x", "!!timestamp x", "!!bool x"],
    *["!!null x", "!!map []", "&a [*a]", "*a", "{a: b}", "[1,[2,[3]]]", '"\\ud800"', '"\\0"'],
    *["'a\n\n b'", "|\n  a\n  b", "a: b: c", "- - - -", "\tx", "@x", "`x`", "%x", "x #y", "[a"],
    *["{a", '"a', "? a", "mit, apache-2.0", DIGITS, f"-{DIGITS}", f"0x{'f' * 5000}", "[" * 10_000],
    *["[" * 400 + "]" * 400, "x" * 10**6, "{? [a]: b}", "{[a]: b}", "{1: b, true: c}"],
    *["<script>alert(1)</script>", "|---|", "---", "...", "en\n...\n---\nx: y", "\u2028", "\x07"],
    *["\ufeff", "caf\u00e9", "\U0001f600", "=", "!!str", "\r"],
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
    "raises without a system message": "{% if messages[0].role != 'system' %}"
    "{{ raise_exception('no') }}"
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
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}"
    "{% endfor %}",
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
    *["5", "true", "[]", "{}", '{"default": 5}', '[{"name": "default", "template": 5}]'],
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


AREAS = {"cards": Area(330, cards_case)}
