"""Rows of benchmarks as evaluation items: one format, whatever their fields are called.

An item is ``{"task", "prompt", "reference"}``, with ``"choices"`` for multiple choice (the
reference is one of them) and ``"aliases"`` for open questions with several accepted answers
(the reference is the first of them), or a plain string for running text. The prompt is the bare
question; chat templates and ``Question: ... Answer:`` are added when it is given to a model.

A new benchmark is one row of `DATASETS`, plus one small function if its layout is new.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from string import ascii_uppercase
from typing import Any

from ..errors import InvalidDataError
from ..utils import shown
from .conversations import from_chosen, from_messages, from_prompt
from .items import NOTHING, EvalItem, Item, accepted, bare_question, plain, qa_item, text_of


def digest(*parts: object) -> bytes:
    """A hash that is the same in every run, to shuffle and split by."""
    return hashlib.sha256(repr(parts).encode()).digest()


def _given(
    prompt: object,
    reference: object,
    choices: object = None,
    tool_calls: object = None,
    **rest: object,
) -> Item:
    """An item as this package has it."""
    item = from_prompt(prompt, reference, **rest)
    if tool_calls not in NOTHING:
        item["tool_calls"] = tool_calls
    if choices not in NOTHING:
        item["choices"] = _choice_texts(choices)[0]
        if item["reference"] not in item["choices"]:
            raise InvalidDataError(
                f"reference {item['reference']!r:.80} is not one of the choices: "
                f"{item['choices']!r:.200}."
            )
    return item


def _choice_texts(choices: object) -> tuple[list[str], list[str]]:
    """Texts and labels of the choices: a list, ``{text, label}``, or texts by their labels."""
    table: dict[str, Any] = choices if isinstance(choices, dict) else {"text": choices}
    if "text" not in table:
        table = {"text": list(table.values()), "label": list(table)}
    texts, labels = table.get("text"), table.get("label") or []
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) < 2:
        raise InvalidDataError(f"choices must be two or more texts: {shown(choices)}.")
    if labels and len(labels) != len(texts):
        raise InvalidDataError(f"{len(texts)} choices with {len(labels)} labels: {shown(choices)}.")
    return [text_of(text, "a choice") for text in texts], [
        text_of(label, "a label") for label in labels
    ]


def _choice(question: object, choices: object, gold: object, context: object = "") -> Item:
    texts, labels = _choice_texts(choices)
    given = plain(gold)
    key = "" if given is None else given.strip()
    if given is not None and key in ("", "-1"):
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
    prompt = bare_question(question, context)
    return {"prompt": prompt, "reference": found.pop(), "choices": texts}


def _shuffle(question: object, answer: object, *others: object) -> Item:
    """An item whose choices are in an order that depends on the texts alone."""
    prompt, reference = bare_question(question), text_of(answer, "the answer")
    texts = accepted([answer, *others])
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
    aliases = correct.split(";") if isinstance(correct, str) else correct
    return qa_item(question, best, aliases)


def _hellaswag(context: object, endings: object, label: object, **parts: object) -> Item:
    if not isinstance(endings, list):
        raise InvalidDataError(f"endings must be a list of texts: {shown(endings)}.")
    if parts.get("ctx_a") and parts.get("ctx_b"):  # `ctx` joins them without a capital
        second = text_of(parts["ctx_b"], "ctx_b")
        context = f"{text_of(parts['ctx_a'], 'ctx_a')} {second[0].upper()}{second[1:]}"
    if parts.get("activity_label"):
        label_text = text_of(parts["activity_label"], "activity_label")
        context = f"{label_text}: {text_of(context, 'ctx')}"
    return _choice(_untagged(context), [_untagged(ending) for ending in endings], label)


def _untagged(value: object) -> str:
    """Text without the ``[header]``, ``[title]``, ``[step]`` marks of WikiHow."""
    text = re.sub(r"(?<=[^\s.!?])\s+\[title\]", ".", text_of(value, "the context or an ending"))
    return " ".join(re.sub(r"\[(header|title|step|substeps)\]", "", text).split())


def _gsm8k(question: object, answer: object) -> Item:
    number = re.search(r"####\s*\$?(-?[0-9.,]*[0-9])", text_of(answer, "the answer"))
    if number is None:
        raise InvalidDataError(f"no number after '####' in the answer: {answer!r:.80}.")
    return {"prompt": bare_question(question), "reference": number[1].replace(",", "")}


def _open(question: object, answer: object, aliases: object = None, context: object = "") -> Item:
    """An answer as text, a list of accepted texts, TriviaQA's or SQuAD's object, or GSM8K's."""
    if isinstance(answer, str) and "\n####" in answer:
        return _gsm8k(question, answer)
    if isinstance(answer, dict):
        known: dict[str, Any] = answer
        answer, aliases = known.get("value", known.get("text")), known.get("aliases")
    if isinstance(answer, list):
        answers: list[Any] = answer or ["<unk>"]
        answer, aliases = answers[0], answers[1:]
    if answer == "<unk>":
        raise InvalidDataError("the row has no answer (or '<unk>'): use a split with labels.")
    return qa_item(bare_question(question, context), answer, aliases)


def _yes_no(question: object, passage: object, answer: object) -> Item:
    if not isinstance(answer, bool):
        return _open(question, answer, context=passage)
    return _choice(question, ["no", "yes"], int(answer), passage)


def _social(context: object, question: object, *answers: object) -> Item:
    *choices, label = answers
    number = plain(label)
    if number not in ("1", "2", "3"):
        raise InvalidDataError(f"label {shown(label)} must be 1, 2 or 3: use a split with labels.")
    return _choice(question, choices, int(number) - 1, context)


def _letters(question: object, *values: object) -> Item:
    *choices, answer = values
    return _choice(question, choices, answer)


def _two(question: object, first: object, second: object, label: object) -> Item:
    return _choice(question, [first, second], label)


def _blank(sentence: object, first: object, second: object, answer: object) -> Item:
    """A sentence with a blank for one of two words: each choice is all that follows with it."""
    before, blank, after = text_of(sentence, "the sentence").partition("_")
    if not blank:
        raise InvalidDataError(f"the sentence has no '_' for the options: {shown(sentence)}.")
    words = [text_of(option, "an option") for option in (first, second)]
    return _continued(before, [f"{word}{after}" for word in words], plain(answer) == "2", answer)


def _blank_filled(contexts: object, continuation: object, gold: object) -> Item:
    """The same, where each option has been put in the sentence up to it."""
    if not isinstance(contexts, list) or len(contexts) != 2:
        raise InvalidDataError(f"context_options must be two texts: {shown(contexts)}.")
    first, second = (text_of(context, "a context").split() for context in contexts)
    same = len(list(takewhile(bool, map(eq, first, second))))
    tail = text_of(continuation, "the continuation")
    choices = [" ".join([*words[same:], tail]) for words in (first, second)]
    return _continued(" ".join(first[:same]), choices, gold == 1, gold)


def _continued(before: str, choices: list[str], second: bool, gold: object) -> Item:
    if plain(gold) not in ("0", "1", "2"):
        raise InvalidDataError(f"the row has no answer ({shown(gold)}): use a split with labels.")
    return _choice(before, choices, int(second))


@dataclass(frozen=True)
class Layout:
    """Fields a row must have (``a|b``: one of them), and the function that makes an item of them.

    Field names are compared in lower case, with ``_`` for spaces. `convert` takes the values in
    the order of `fields`, and those of `optional` that are present by (first) name.
    """

    convert: Callable[..., Item]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def values(self, row: Mapping[str, Any]) -> list[Any] | None:
        """The values of the required fields; None if one is missing."""
        names = [self._met(field, row) for field in self.fields]
        return None if None in names else [row[name] for name in names if name]

    def options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the others that are present."""
        met = {field.split("|")[0]: self._met(field, row) for field in self.optional}
        return {field: row[name] for field, name in met.items() if name}

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """The fields that a row lacks, by the first of their names."""
        return [field.split("|")[0] for field in self.fields if self._met(field, row) is None]

    @staticmethod
    def _met(field: str, row: Mapping[str, Any]) -> str | None:
        return next((name for name in field.split("|") if name in row), None)

    def __str__(self) -> str:
        return ", ".join(self.fields)


QUESTION, ANSWER = "question|question_stem|query|prompt", "answerkey|gold|answer|label"
ASKED = "prompt|question|query|input|inputs|problem"
SAID = "completion|chosen|response|output|answer|target|targets|solution"
CHAT = ("system|system_prompt", "tools", "history")
ITEM = Layout(_given, ("prompt", "reference"), ("choices", "aliases", "tool_calls"))
SCIQ = Layout(_shuffle, ("question", "correct_answer", "distractor1", "distractor2", "distractor3"))
TRUTHFULQA = Layout(_truthfulqa, ("question", "mc1_targets"))
TRUTHFULQA_GEN = Layout(_truthfulqa_gen, ("question", "best_answer", "correct_answers"))
HELLASWAG = Layout(_hellaswag, ("ctx", "endings", "label"), ("activity_label", "ctx_a", "ctx_b"))
CHOICE = Layout(_choice, (QUESTION, "choices|options", ANSWER), ("context|article|passage",))
GSM8K = Layout(_gsm8k, ("question", "answer"))
OPEN = Layout(_open, ("question|context", "answer|answers"), ("aliases", "context|passage"))
LAYOUTS = (
    ITEM,
    Layout(from_messages, ("messages|conversations|conversation",), CHAT),
    SCIQ,
    TRUTHFULQA,
    TRUTHFULQA_GEN,
    HELLASWAG,
    Layout(_yes_no, ("question", "passage", "answer")),
    Layout(_two, ("goal", "sol1", "sol2", "label")),
    Layout(_social, ("context", "question", "answera", "answerb", "answerc", "label")),
    Layout(_blank, ("sentence", "option1", "option2", "answer")),
    Layout(_blank_filled, ("context_options", "continuation", "gold")),
    CHOICE,
    Layout(_letters, ("question", "a", "b", "c", "d", "answer")),
    Layout(from_prompt, ("instruction", SAID), ("input", "context", *CHAT)),
    Layout(from_prompt, ("question", "answer|answers", "system")),
    OPEN,
    Layout(qa_item, ("context", "continuation")),
    Layout(from_prompt, (ASKED, SAID), ("context", "label", *CHAT)),
    Layout(from_chosen, ("chosen",), CHAT[:2]),
)
TEXT = "text|content|document"


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


def normalize_item(
    item: Mapping[str, Any] | str, dataset_name: str, fields: Mapping[str, str] | None = None
) -> EvalItem:
    """One row of any known layout as an item.

    Args:
        item: the row, as a file or the hub gives it. Text, or a row whose only usable field is
            `text`, `content` or `document`, is running text and becomes a string.
        dataset_name: a short name of `DATASETS`, a hub id, or any other name, for which the
            fields alone decide. It becomes the item's task unless the row names one.
        fields: which field is which, such as ``{"prompt": "q", "reference": "a"}``, where the
            row's own names do not say it.

    Raises:
        InvalidDataError: no known layout has these fields, or a value cannot be used.
    """
    try:
        return to_item(item, dataset_name, fields)
    except InvalidDataError as error:
        raise InvalidDataError(f"{dataset_name}: {error}") from None


def to_item(item: object, dataset_name: str, fields: Mapping[str, str] | None = None) -> EvalItem:
    """`normalize_item` without the dataset's name in its errors."""
    if isinstance(item, str):
        return text_of(item, "the text")
    if not isinstance(item, Mapping):
        raise InvalidDataError(f"a row must be an object or a text: {shown(item)}.")
    given = {k: v for k, v in item.items() if v is not None}
    if twice := clash(given):
        raise InvalidDataError(f"{twice} name the same field: leave one of them out.")
    row = met = {field_name(k): v for k, v in given.items()}
    task = row.get("task")
    if fields:
        check_fields(fields)
    if fields and all(field_name(source) in row for source in fields.values()):
        row = {field_name(field): row[field_name(source)] for field, source in fields.items()}
    known = [name for name in find_benchmarks(dataset_name) if DATASETS[name].layout.values(row)]
    if task in NOTHING:
        task = known[0] if len(known) == 1 else dataset_name.split("/")[-1]
    else:
        text_of(task, "the task")
    for layout in [DATASETS[name].layout for name in known[:1]] or LAYOUTS:
        values = layout.values(row)
        if values is not None:
            return {"task": str(task), **layout.convert(*values, **layout.options(row))}
    if (text := next((row[name] for name in TEXT.split("|") if name in row), None)) is not None:
        return text_of(text, "text")
    raise InvalidDataError(_unknown(met, row, fields))


def check_fields(fields: Mapping[str, str]) -> None:
    """Raise InvalidDataError if a mapping gives names to what is no field of any layout."""
    known = {name for one in LAYOUTS for each in (*one.fields, *one.optional)
             for name in each.split("|")} | {*TEXT.split("|")}  # fmt: skip
    for field, source in fields.items():
        if field_name(field) not in known:
            turned = f" Turned round it would be {source}={field}." if source in known else ""
            raise InvalidDataError(
                f"--fields {field}={source}: {field!r} is none of the fields that are known, such "
                f"as prompt, reference, choices, messages or text.{turned}"
            )


def _unknown(
    met: Mapping[str, Any], row: Mapping[str, Any], fields: Mapping[str, str] | None
) -> str:
    """Which fields a row has, which layout comes nearest, and how to say what they are.

    Args:
        met: the row as it is.
        row: the same with the names that `fields` gives.
    """
    nearest = min(LAYOUTS, key=lambda one: len(one.missing(row)) / len(one.fields))
    lacks = nearest.missing(row)
    near = f"; the nearest is {nearest}, of which {lacks[0]} is missing" if len(lacks) == 1 else ""
    texts = [name for name, value in met.items() if isinstance(value, str) and value.strip()]
    pairs = zip(("prompt", "reference"), [*texts, "FIELD", "FIELD"], strict=False)
    example = ",".join(f"{field}={name}" for field, name in pairs)
    absent = [name for name in (fields or {}).values() if field_name(name) not in met]
    asked = f" --fields names {', '.join(absent)}, not among them." if absent else ""
    return (
        f"fields with a value: {sorted(met)!r:.500}. No known layout has these{near}.{asked} Say "
        f"which is which with --fields (fields=): --fields {example}, or --fields text=FIELD."
    )
