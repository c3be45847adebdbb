"""Every layout of rows and kind of container that is read: what is accepted, and what is scored.

    python benchmarks/layouts.py --model smollm2 > docs/data.md

Each case is written into a folder, as somebody would have it, and read by `load_eval_dataset`; the
table says how many of its tokens are scored, and shows the text that they are of. The cases are
those of tests/data/test_layouts.py, which knows the items that have to come out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow

from llm_pruner import load_eval_dataset, load_model
from llm_pruner.data.tokens import IGNORED, encode_sequences

ASKED, ANSWER = "Which gas do plants take in?", "Carbon dioxide"
PASSAGE = "Leaves take in carbon dioxide."
SYSTEM = "You are a botanist."
WRONG = "Helium"
QUESTION = {"prompt": ASKED, "reference": ANSWER}
USER, ASSISTANT = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}
LONGER = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "What do roots take in?"},
    {"role": "assistant", "content": "Water and salts"},
    USER,
]
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks a word up."}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "stoma"}}}
WITH_TOOLS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "A pore for gases."},
]
WINOGRANDE = {
    "prompt": "The fern outgrew the pot because the",
    "reference": "fern was healthy.",
    "choices": ["fern was healthy.", "pot was healthy."],
}
CHOICES = {**QUESTION, "choices": [WRONG, ANSWER, "Neon", "Argon"]}
TWO = {**QUESTION, "choices": [WRONG, ANSWER]}


@dataclass(frozen=True)
class Case:
    """Data as somebody has it.

    Attributes:
        name: what it is.
        make: writes it into a folder and returns what is given to `load_eval_dataset`.
        items: what has to come out, without the task.
        fields: which field is which, if its names do not say it.
    """

    name: str
    make: Callable[[Path], Any]
    items: list[Any]
    fields: dict[str, str] | None = None


def jsonl(*rows: Any, name: str = "rows.jsonl") -> Callable[[Path], Path]:
    """A file of JSON Lines with these rows."""
    return text("".join(f"{json.dumps(row)}\n" for row in rows), name)


def text(content: str, name: str) -> Callable[[Path], Path]:
    """A file with this text, compressed as its name says."""

    def make(folder: Path) -> Path:
        path = folder / name
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(content.encode()))
        elif name.endswith(".zst"):
            with pyarrow.output_stream(str(path), compression="zstd") as stream:
                stream.write(content.encode())
        else:
            path.write_text(content, encoding="utf-8")
        return path

    return make


def table(*rows: Any) -> pandas.DataFrame:
    """Rows in a table of pandas."""
    return pandas.DataFrame(list(rows))


def _parquet(folder: Path) -> Path:
    datasets.Dataset.from_list([{"messages": [USER, ASSISTANT]}]).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def _arrow(folder: Path) -> Path:
    rows = pyarrow.table({"instruction": [ASKED], "response": [ANSWER]})
    with pyarrow.ipc.new_file(str(folder / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    return folder / "a.arrow"


def _saved(folder: Path) -> Path:
    datasets.Dataset.from_list([QUESTION]).save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_splits(folder: Path) -> Path:
    rows = {"train": [{"text": PASSAGE}], "validation": [QUESTION]}
    splits = {name: datasets.Dataset.from_list(each) for name, each in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def _folder(folder: Path) -> Path:
    jsonl(QUESTION, name="b.jsonl")(folder)
    text(PASSAGE, "a.txt")(folder)
    text("# A card", "README.md")(folder)
    return folder


def _snapshot(folder: Path) -> Path:
    (folder / "data").mkdir()
    jsonl(QUESTION, name="data/test.jsonl")(folder)
    text("# A card", "README.md")(folder)
    return folder


def _several(folder: Path) -> str:
    rows = [{"prompt": f"{ASKED} ({number})", "reference": ANSWER} for number in range(6)]
    return f"{jsonl(*rows)(folder)}=2,{text(PASSAGE, 'b.txt')(folder)}"


def _generator(folder: Path) -> Any:
    return (row for row in [{"question": ASKED, "answer": ANSWER}])


def _streamed(folder: Path) -> Any:
    return datasets.Dataset.from_list([QUESTION]).to_iterable_dataset()


def _chat(*turns: Any, answer: str = ANSWER, **more: Any) -> dict[str, Any]:
    return {"prompt": {"messages": list(turns), **more}, "reference": answer}


CASES = [
    Case("`prompt`, `reference`", jsonl(QUESTION), [QUESTION]),
    Case("`messages`", jsonl({"messages": [USER, ASSISTANT]}), [QUESTION]),
    Case(
        "`messages`, parts of content",
        jsonl({"messages": [{**USER, "content": [{"type": "text", "text": ASKED}]}, ASSISTANT]}),
        [QUESTION],
    ),
    Case(
        "`messages`, system, several turns",
        jsonl({"messages": [*LONGER, ASSISTANT]}),
        [_chat(*LONGER)],
    ),
    Case(
        "`messages`, tools and a call",
        jsonl({"messages": [*WITH_TOOLS, ASSISTANT], "tools": [TOOL]}),
        [_chat(*WITH_TOOLS, tools=[TOOL])],
    ),
    Case(
        "`messages` that end in a call",
        jsonl({"messages": WITH_TOOLS[:2], "tools": [TOOL]}),
        [_chat(USER, tools=[TOOL], answer=json.dumps(CALL["function"])) | {"tool_calls": [CALL]}],
    ),
    Case(
        "ShareGPT: `conversations`, `from`, `value`",
        jsonl(
            {
                "conversations": [
                    {"from": "human", "value": ASKED},
                    {"from": "gpt", "value": ANSWER},
                ]
            }
        ),
        [QUESTION],
    ),
    Case(
        "ShareGPT with `system`",
        jsonl(
            {
                "system": SYSTEM,
                "conversations": [
                    {"from": "human", "value": ASKED},
                    {"from": "gpt", "value": ANSWER},
                ],
            }
        ),
        [_chat(LONGER[0], USER)],
    ),
    Case(
        "Alpaca: `instruction`, `input`, `output`",
        jsonl({"instruction": ASKED, "input": "", "output": ANSWER, "text": "x"}),
        [QUESTION],
    ),
    Case(
        "Alpaca with an input",
        jsonl({"instruction": "Answer this.", "input": ASKED, "output": ANSWER}),
        [{"prompt": f"Answer this.\n\n{ASKED}", "reference": ANSWER}],
    ),
    Case(
        "Dolly: `instruction`, `context`, `response`",
        jsonl({"instruction": ASKED, "context": PASSAGE, "response": ANSWER, "category": "qa"}),
        [{"prompt": f"{PASSAGE}\n{ASKED}", "reference": ANSWER}],
    ),
    Case("`prompt`, `completion`", jsonl({"prompt": ASKED, "completion": ANSWER}), [QUESTION]),
    Case(
        "the same with a `label`, of which one is false",
        jsonl(
            {"prompt": ASKED, "completion": ANSWER, "label": True},
            {"prompt": ASKED, "completion": "A bad answer", "label": False},
        ),
        [QUESTION],
    ),
    Case(
        "`prompt`, `completion` as turns",
        jsonl({"prompt": [USER], "completion": [ASSISTANT]}),
        [QUESTION],
    ),
    Case(
        "preferences: `prompt`, `chosen`, `rejected`",
        jsonl({"prompt": ASKED, "chosen": ANSWER, "rejected": WRONG}),
        [QUESTION],
    ),
    Case(
        "preferences as turns that repeat the prompt",
        jsonl({"prompt": ASKED, "chosen": [USER, ASSISTANT], "rejected": [USER]}),
        [QUESTION],
    ),
    Case(
        "preferences as transcripts",
        jsonl({"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {ANSWER}", "rejected": "x"}),
        [QUESTION],
    ),
    Case("`question`, `answer`", jsonl({"question": ASKED, "answer": ANSWER}), [QUESTION]),
    Case(
        "`question`, a list of answers",
        jsonl({"question": ASKED, "answer": [ANSWER, "CO2"]}),
        [{**QUESTION, "aliases": [ANSWER, "CO2"]}],
    ),
    Case(
        "SQuAD: `context`, `question`, `answers`",
        jsonl(
            {
                "context": PASSAGE,
                "question": ASKED,
                "answers": {"text": [ANSWER], "answer_start": [19]},
            }
        ),
        [{"prompt": f"{PASSAGE}\n{ASKED}", "reference": ANSWER}],
    ),
    Case(
        "`choices` with labels, `answerKey`",
        jsonl(
            {
                "question": ASKED,
                "choices": {"text": CHOICES["choices"], "label": [*"ABCD"]},
                "answerKey": "B",
            }
        ),
        [CHOICES],
    ),
    Case(
        "`choices`, the position of the answer",
        jsonl({"question": ASKED, "choices": CHOICES["choices"], "answer": 1}),
        [CHOICES],
    ),
    Case(
        "`options` by letters",
        jsonl(
            {
                "question": ASKED,
                "options": dict(zip("ABCD", CHOICES["choices"], strict=True)),
                "answer": "B",
            }
        ),
        [CHOICES],
    ),
    Case(
        "columns `A` to `D`, `answer` (.csv)",
        text(f"question,A,B,C,D,answer\n{ASKED},{WRONG},{ANSWER},Neon,Argon,B\n", "rows.csv"),
        [CHOICES],
    ),
    Case(
        "WinoGrande: `sentence` with a blank",
        jsonl(
            {
                "sentence": "The fern outgrew the pot because the _ was healthy.",
                "option1": "fern",
                "option2": "pot",
                "answer": "1",
            }
        ),
        [WINOGRANDE],
    ),
    Case(
        "WinoGrande: `context_options`",
        jsonl(
            {
                "context_options": [
                    "The fern outgrew the pot because the fern",
                    "The fern outgrew the pot because the pot",
                ],
                "continuation": "was healthy.",
                "gold": 0,
            }
        ),
        [WINOGRANDE],
    ),
    Case(
        "Social IQa: `answerA` to `answerC`",
        jsonl(
            {
                "context": PASSAGE,
                "question": ASKED,
                "answerA": WRONG,
                "answerB": ANSWER,
                "answerC": "Neon",
                "label": "2",
            }
        ),
        [
            {
                "prompt": f"{PASSAGE}\n{ASKED}",
                "reference": ANSWER,
                "choices": [WRONG, ANSWER, "Neon"],
            }
        ],
    ),
    Case(
        "PIQA: `goal`, `sol1`, `sol2`",
        jsonl({"goal": ASKED, "sol1": WRONG, "sol2": ANSWER, "label": 1}),
        [TWO],
    ),
    Case(
        "BoolQ: `passage` and a true or false answer",
        jsonl({"question": "is helium a gas", "passage": PASSAGE, "answer": True}),
        [{"prompt": f"{PASSAGE}\nis helium a gas", "reference": "yes", "choices": ["no", "yes"]}],
    ),
    Case("`text`", jsonl({"text": PASSAGE, "id": 1}), [PASSAGE]),
    Case("`content`", jsonl({"content": PASSAGE, "url": "x"}), [PASSAGE]),
    Case(
        "names of its own, `--fields prompt=q,reference=a`",
        jsonl({"q": ASKED, "a": ANSWER, "text": "x"}),
        [QUESTION],
        {"prompt": "q", "reference": "a"},
    ),
    Case(".json, a list", text(json.dumps([QUESTION]), "rows.json"), [QUESTION]),
    Case(".tsv", text(f"prompt\tcompletion\n{ASKED}\t{ANSWER}\n", "rows.tsv"), [QUESTION]),
    Case(".txt", text(PASSAGE, "rows.txt"), [PASSAGE]),
    Case(".md", text(PASSAGE, "rows.md"), [PASSAGE]),
    Case(".jsonl.gz", jsonl(QUESTION, name="rows.jsonl.gz"), [QUESTION]),
    Case(".txt.zst", text(PASSAGE, "rows.txt.zst"), [PASSAGE]),
    Case(".parquet", _parquet, [QUESTION]),
    Case(".arrow", _arrow, [QUESTION]),
    Case("a folder", _folder, [PASSAGE, QUESTION]),
    Case("a folder of folders", _snapshot, [QUESTION]),
    Case("a folder of `save_to_disk`", _saved, [QUESTION]),
    Case("the same with splits", _saved_splits, [QUESTION]),
    Case(
        "several with shares, `a.jsonl=2,b.txt`",
        _several,
        [{"prompt": f"{ASKED} ({number})", "reference": ANSWER} for number in (0, 3)] + [PASSAGE],
    ),
    Case("a list of dicts", lambda folder: [{"messages": [USER, ASSISTANT]}], [QUESTION]),
    Case("a list of texts", lambda folder: [PASSAGE], [PASSAGE]),
    Case("a generator", _generator, [QUESTION]),
    Case("a `Dataset`", lambda folder: datasets.Dataset.from_list([QUESTION]), [QUESTION]),
    Case("an `IterableDataset`", _streamed, [QUESTION]),
    Case("a `DataFrame`", lambda folder: table({"question": ASKED, "answer": ANSWER}), [QUESTION]),
    Case("a `Series` of texts", lambda folder: pandas.Series([PASSAGE, None]), [PASSAGE]),
]


def read(case: Case, folder: Path) -> list[Any]:
    """The items of a case."""
    return load_eval_dataset(3, case.make(folder), up_to=True, fields=case.fields)


def main() -> None:
    """Read every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    _, tokenizer = load_model(parser.parse_args().model, device="cpu")
    print(INTRODUCTION)
    print("| data | items | tokens | scored | what is scored |\n|---|---|---|---|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            items = read(case, Path(folder))
        sequences = encode_sequences(tokenizer, items)
        scored = [[label for label in one.labels[1:] if label != IGNORED] for one in sequences]
        shown = "; ".join(_shown(tokenizer, each) for each in scored)
        n_tokens = sum(len(one.ids) for one in sequences)
        print(f"| {case.name} | {len(items)} | {n_tokens} | {sum(map(len, scored))} | {shown} |")


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return "`" + " ".join(tokenizer.decode(ids).split()).replace("|", "\\|") + "`"


INTRODUCTION = """# Data as it is

What `--eval-dataset`, `--heal-data`, `load_data` and `load_eval_dataset` read. Written by
`python benchmarks/layouts.py --model smollm2 > docs/data.md`; every row is a test.

Of a question the answer is scored; of a conversation all that the assistant says, written by the
model's own chat template, where a turn ends included; of running text every token but the first
of a window. Multiple choice is one item: the right choice is scored here, all choices where
accuracy is measured. WinoGrande's sentences are scored from the option on, not, as in other
harnesses, from behind it, so that both layouts make the same item.
"""


if __name__ == "__main__":
    main()
