"""Rows of benchmarks as evaluation items: one format, whatever their fields are called.

An item is ``{"task", "prompt", "reference"}``, with ``"choices"`` for multiple choice (the
reference is one of them) and ``"aliases"`` for open questions with several accepted answers
(the reference is the first of them), or a plain string for running text. The prompt is the bare
question; chat templates and ``Question: ... Answer:`` are added when it is given to a model.

A new benchmark is one row of `DATASETS`, plus one small function if its layout is new.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDataError
from ..utils import shown

if TYPE_CHECKING:
    from .items import EvalItem


Item = dict[str, Any]
MAX_DIGITS = 1000  # of a number
NOTHING: tuple[object, ...] = (None, "", [])  # what stands where a row has no value


def digest(*parts: object) -> bytes:
    """A hash that is the same in every run, to shuffle and split by."""
    return hashlib.sha256(repr(parts).encode()).digest()


def _plain(value: object) -> str | None:
    """Text as it is, a number as text; None for everything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return str(int(value)) if abs(int(value)) < 10**MAX_DIGITS else None
    return str(value) if isinstance(value, float) and math.isfinite(value) else None


def _text(value: object, field: str) -> str:
    """`value` as stripped text; numbers become text."""
    text = _plain(value)
    if text is None:
        raise InvalidDataError(f"{field} is a {type(value).__name__}, not text: {shown(value)}.")
    if not text.strip():
        raise InvalidDataError(f"{field} is empty: remove or fill it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidDataError(f"{field} is not valid Unicode text: {error}.") from None
    return text.strip()


def _bare_question(value: object, context: object = "") -> str:
    """The question without its ``Question:`` and ``Answer:`` labels, after its passage if any."""
    text = _text(value, "the question")
    if text.count("Question:") <= 1:  # more than one: a few-shot prompt, left as it is
        text = text.removeprefix("Question:").removesuffix("\nAnswer:").strip()
    passage = _text(context, "the context") if context and context != value else ""
    return f"{passage}\n{text}" if passage else _text(text, "the question")


def _accepted(answers: Iterable[object]) -> list[str]:
    """The distinct answers, in order, without blank ones."""
    given = (answer for answer in answers if not (isinstance(answer, str) and not answer.strip()))
    texts = [_text(answer, "an answer") for answer in given]
    return list(dict.fromkeys(texts))


def _qa(prompt: object, reference: object, choices: object = None, aliases: object = None) -> Item:
    item: Item = {"prompt": _bare_question(prompt), "reference": _text(reference, "the reference")}
    if choices not in NOTHING:
        item["choices"] = _choice_texts(choices)[0]
        if item["reference"] not in item["choices"]:
            raise InvalidDataError(
                f"reference {item['reference']!r:.80} is not one of the choices: "
                f"{item['choices']!r:.200}."
            )
    if aliases not in NOTHING:
        if not isinstance(aliases, list):
            raise InvalidDataError(f"aliases must be a list of texts: {shown(aliases)}.")
        item["aliases"] = _accepted([item["reference"], *aliases])
    return item


def _choice_texts(choices: object) -> tuple[list[str], list[str]]:
    """Texts and labels of the choices, which are a list or ``{text, label}``."""
    table: dict[str, Any] = choices if isinstance(choices, dict) else {"text": choices}
    texts, labels = table.get("text"), table.get("label") or []
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) < 2:
        raise InvalidDataError(f"choices must be two or more texts: {shown(choices)}.")
    if labels and len(labels) != len(texts):
        raise InvalidDataError(f"{len(texts)} choices with {len(labels)} labels: {shown(choices)}.")
    return [_text(text, "a choice") for text in texts], [
        _text(label, "a label") for label in labels
    ]


def _choice(question: object, choices: object, gold: object, context: object = "") -> Item:
    texts, labels = _choice_texts(choices)
    plain = _plain(gold)
    key = "" if plain is None else plain.strip()
    if plain is not None and key in ("", "-1"):
        raise InvalidDataError(f"the row has no answer (label {gold!r}): use a split with labels.")
    found = {text for text, label in zip(texts, labels, strict=False) if label == key}
    if not found and key:  # a number from 0, a letter, or the text itself
        is_number = re.fullmatch(r"[0-9]{1,3}", key)
        found = {
            text
            for index, text in enumerate(texts)
            if text == gold
            or key == ascii_uppercase[index : index + 1]
            or (is_number and int(key) == index)
        }
    if len(found) != 1:
        raise InvalidDataError(
            f"answer {shown(gold)} names {len(found)} of the choices {texts!r:.200}: it must be "
            "one label, one position counted from 0, one letter or the text of one choice."
        )
    prompt = _bare_question(question, context)
    return {"prompt": prompt, "reference": found.pop(), "choices": texts}


def _shuffle(question: object, answer: object, *others: object) -> Item:
    """An item whose choices are in an order that depends on the texts alone."""
    prompt, reference = _bare_question(question), _text(answer, "the answer")
    texts = _accepted([answer, *others])
    choices = sorted(texts, key=lambda text: digest(prompt, text))
    return {"prompt": prompt, "reference": reference, "choices": _choice_texts(choices)[0]}


def _truthfulqa(question: object, targets: object) -> Item:
    """Multiple choice with one true answer, ``{choices, labels}`` or ``{answer: 0 or 1}``."""
    if not isinstance(targets, dict):
        raise InvalidDataError(f"mc1_targets must be an object: {shown(targets)}.")
    if isinstance(targets.get("choices"), list) and isinstance(targets.get("labels"), list):
        if len(targets["choices"]) != len(targets["labels"]):
            raise InvalidDataError(f"mc1_targets has other labels than choices: {shown(targets)}.")
        pairs = list(zip(targets["choices"], targets["labels"], strict=True))
    else:
        pairs = list(targets.items())
    true = [answer for answer, label in pairs if label == 1]
    if len(true) != 1:
        raise InvalidDataError(f"mc1_targets marks {len(true)} answers as true, not one.")
    return _shuffle(question, true[0], *(answer for answer, label in pairs if label != 1))


def _truthfulqa_gen(question: object, best: object, correct: object) -> Item:
    return _qa(question, best, aliases=correct.split(";") if isinstance(correct, str) else correct)


def _hellaswag(context: object, endings: object, label: object, **parts: object) -> Item:
    if not isinstance(endings, list):
        raise InvalidDataError(f"endings must be a list of texts: {shown(endings)}.")
    if parts.get("ctx_a") and parts.get("ctx_b"):  # `ctx` joins them without a capital
        second = _text(parts["ctx_b"], "ctx_b")
        context = f"{_text(parts['ctx_a'], 'ctx_a')} {second[0].upper()}{second[1:]}"
    if parts.get("activity_label"):
        label_text = _text(parts["activity_label"], "activity_label")
        context = f"{label_text}: {_text(context, 'ctx')}"
    return _choice(_untagged(context), [_untagged(ending) for ending in endings], label)


def _untagged(value: object) -> str:
    """Text without the ``[header]``, ``[title]``, ``[step]`` marks of WikiHow."""
    text = re.sub(r"(?<=[^\s.!?])\s+\[title\]", ".", _text(value, "the context or an ending"))
    return " ".join(re.sub(r"\[(header|title|step|substeps)\]", "", text).split())


def _gsm8k(question: object, answer: object) -> Item:
    number = re.search(r"####\s*\$?(-?[0-9.,]*[0-9])", _text(answer, "the answer"))
    if number is None:
        raise InvalidDataError(f"no number after '####' in the answer: {answer!r:.80}.")
    return {"prompt": _bare_question(question), "reference": number[1].replace(",", "")}


def _open(question: object, answer: object, aliases: object = None, context: object = "") -> Item:
    """An answer as text, a list of accepted texts, TriviaQA's ``{value, aliases}`` or GSM8K's."""
    if isinstance(answer, str) and "\n####" in answer:
        return _gsm8k(question, answer)
    if isinstance(answer, dict):
        accepted: dict[str, Any] = answer
        answer, aliases = accepted.get("value"), accepted.get("aliases")
    elif isinstance(answer, list) and answer:
        answers: list[Any] = answer
        answer, aliases = answers[0], answers[1:]
    if answer == "<unk>":
        raise InvalidDataError("the row has no answer (value '<unk>'): use a split with labels.")
    return _qa(_bare_question(question, context), answer, aliases=aliases)


@dataclass(frozen=True)
class Layout:
    """Fields a row must have (``a|b``: one of them), and the function that makes an item of them.

    Field names are compared in lower case, with ``_`` for spaces. `convert` takes the values in
    the order of `fields`, and those of `optional` that are present by name.
    """

    convert: Callable[..., Item]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def values(self, row: Mapping[str, Any]) -> list[Any] | None:
        """The values of the required fields; None if one is missing."""
        names = [next((n for n in f.split("|") if n in row), None) for f in self.fields]
        return None if None in names else [row[name] for name in names if name]


ITEM = Layout(_qa, ("prompt", "reference"), ("choices", "aliases"))
SCIQ = Layout(_shuffle, ("question", "correct_answer", "distractor1", "distractor2", "distractor3"))
TRUTHFULQA = Layout(_truthfulqa, ("question", "mc1_targets"))
TRUTHFULQA_GEN = Layout(_truthfulqa_gen, ("question", "best_answer", "correct_answers"))
HELLASWAG = Layout(_hellaswag, ("ctx", "endings", "label"), ("activity_label", "ctx_a", "ctx_b"))
CHOICE = Layout(
    _choice,
    ("question|question_stem|query", "choices", "answerkey|gold|answer|label"),
    ("context",),
)
GSM8K = Layout(_gsm8k, ("question", "answer"))
OPEN = Layout(_open, ("question|context", "answer"), ("aliases", "context"))
CONTINUATION = Layout(_qa, ("context", "continuation"))
LAYOUTS = (ITEM, SCIQ, TRUTHFULQA, TRUTHFULQA_GEN, HELLASWAG, CHOICE, OPEN, CONTINUATION)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is on the hub, a split of it that has labels, and its layout."""

    repo_id: str
    subset: str | None
    split: str
    layout: Layout


DATASETS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", GSM8K),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC-Easy", "test", CHOICE),
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", "test", CHOICE),
    "hellaswag": Benchmark("Rowan/hellaswag", None, "validation", HELLASWAG),
    "sciq": Benchmark("allenai/sciq", None, "test", SCIQ),
    "truthfulqa": Benchmark("truthfulqa/truthful_qa", "multiple_choice", "validation", TRUTHFULQA),
    "truthfulqa_gen": Benchmark(
        "truthfulqa/truthful_qa", "generation", "validation", TRUTHFULQA_GEN
    ),
    "openbookqa": Benchmark("allenai/openbookqa", "main", "test", CHOICE),
    "triviaqa": Benchmark("mandarjoshi/trivia_qa", "rc.nocontext", "validation", OPEN),
}
DEFAULT_SOURCES = ("gsm8k", "arc_easy", "sciq", "truthfulqa", "openbookqa", "triviaqa")


def find_benchmarks(dataset_name: str, subset: str | None = None) -> list[str]:
    """Short names of the benchmarks that a short name, a hub id or an old bare id refers to."""
    key = dataset_name.lower()
    names = [
        name
        for name, row in DATASETS.items()
        if key.replace("-", "_") == name or f"/{row.repo_id}".lower().endswith(f"/{key}")
    ]
    return [name for name in names if DATASETS[name].subset == subset] or names


def field_name(name: object) -> str:
    """The name of a field as layouts have it."""
    return str(name).strip().lower().replace(" ", "_")


def clash(names: Iterable[object]) -> str:
    """Those of `names` that cannot be in one row because they name the same field, or nothing."""
    groups: dict[str, list[object]] = {}
    for name in filter(field_name, names):  # a table may have several columns without a name
        groups.setdefault(field_name(name), []).append(name)
    twice = next((group for group in groups.values() if len(group) > 1), [])
    return " and ".join(f"{name!r:.80}" for name in twice)


def normalize_item(item: Mapping[str, Any] | str, dataset_name: str) -> EvalItem:
    """One row of any known layout as an item.

    Args:
        item: the row, as a file or the hub gives it. Text, or a row whose only usable field is
            `text`, is running text and becomes a string.
        dataset_name: a short name of `DATASETS`, a hub id, or any other name, for which the
            fields alone decide. It becomes the item's task unless the row names one.

    Raises:
        InvalidDataError: no known layout has these fields, or a value cannot be used.
    """
    try:
        return to_item(item, dataset_name)
    except InvalidDataError as error:
        raise InvalidDataError(f"{dataset_name}: {error}") from None


def to_item(item: object, dataset_name: str) -> EvalItem:
    """`normalize_item` without the dataset's name in its errors."""
    if isinstance(item, str):
        return _text(item, "the text")
    if not isinstance(item, Mapping):
        raise InvalidDataError(f"a row must be an object or a text: {shown(item)}.")
    given = {k: v for k, v in item.items() if v is not None}
    if twice := clash(given):
        raise InvalidDataError(f"{twice} name the same field: leave one of them out.")
    row = {field_name(k): v for k, v in given.items()}
    known = [name for name in find_benchmarks(dataset_name) if DATASETS[name].layout.values(row)]
    task = known[0] if len(known) == 1 else dataset_name.split("/")[-1]
    if row.get("task") not in NOTHING:
        _text(row["task"], "the task")
        task = str(row["task"])
    for layout in [DATASETS[name].layout for name in known[:1]] or LAYOUTS:
        values = layout.values(row)
        if values is not None:
            options = {name: row[name] for name in layout.optional if name in row}
            return {"task": task, **layout.convert(*values, **options)}
    if "text" in row:
        return _text(row["text"], "text")
    accepted = "; ".join(", ".join(layout.fields) for layout in LAYOUTS)
    raise InvalidDataError(
        f"fields with a value: {sorted(row)!r:.500}. No known layout has these. Accepted (a|b: "
        f"one of them): {accepted}; text. Rename the fields to 'prompt' and 'reference'."
    )
