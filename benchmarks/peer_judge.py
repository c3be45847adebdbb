"""What the benchmarks on a real model are judged on: windows of text, and questions.

A text file judges by windows of 512 tokens, evenly spread over the joined text; perplexity is the
exponential of the mean loss. Tasks are put as plain text, as benchmarks usually are: a question
between ``Question:`` and ``Answer:``, other prompts as they are; of WinoGrande's rows the
continuation is scored after each of its contexts. Intervals are paired bootstrap 95 % intervals of
the difference from the full model, over windows and over items.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import NAMED_FILES

from llm_pruner import load_eval_dataset
from llm_pruner.data.tokens import Batch, encode_batches, encode_sequences, pad_sequences
from llm_pruner.evaluation.likelihood import sequence_nll
from llm_pruner.stats import paired_interval

Question = tuple[list[tuple[str, str]], int]  # prompts with answers; which one is right
WINDOW = 512  # tokens, of a text that judges
BATCH_SIZE = 8
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # a chat template


def read_texts(path: str) -> list[str]:
    """The texts of a .jsonl file (field ``text``), or the whole of a .txt file."""
    content = Path(path).read_text(encoding="utf-8")
    if not path.endswith(".jsonl"):
        return [content]
    return [json.loads(line)["text"] for line in content.split("\n") if line.strip()]


@dataclass(frozen=True)
class Judge:
    """What models are judged on.

    Attributes:
        texts: name -> windows, of one length but for a text that is shorter.
        tasks: name -> items with choices.
        task_dtype: what models are converted to for tasks; empty: as they are.
        key: tells it from others.
    """

    tokenizer: Any
    texts: dict[str, list[Batch]]
    tasks: dict[str, list[Question]]
    task_dtype: str
    key: str

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        texts: dict[str, str],
        n_tokens: int,
        tasks: dict[str, str],
        n_items: int,
        task_dtype: str = "",
    ) -> Judge:
        """Read the files, by name, up to `n_tokens` tokens and `n_items` items of each."""
        windows: dict[str, list[Batch]] = {}
        parts: list[Any] = []
        for name, path in texts.items():
            whole = "\n\n".join(read_texts(path))
            found = encode_sequences(tokenizer, [whole], max_length=WINDOW)
            full = [one for one in found if len(one.ids) == WINDOW] or found
            count = min(len(full), max(1, n_tokens // WINDOW))
            chosen = [full[number * len(full) // count] for number in range(count)]
            windows[name] = pad_sequences(tokenizer, chosen, 2)
            parts.append([name, [one.ids for one in chosen]])
        items = {name: questions(path, n_items) for name, path in tasks.items()}
        parts += [[name, found, task_dtype] for name, found in items.items()]
        plain = copy.deepcopy(tokenizer)
        plain.chat_template = PLAIN
        return cls(plain, windows, items, task_dtype, hashed(parts))

    def of_model(self, model: Any) -> dict[str, dict[str, Any]]:
        """Loss and number of tokens of every window; whether every item is answered right."""
        found: dict[str, dict[str, Any]] = {}
        for name, batches in self.texts.items():
            sums, counts = sequence_nll(model, batches)
            found[name] = {"loss": sums.tolist(), "tokens": counts.tolist()}
        if self.tasks and self.task_dtype:
            model = copy.deepcopy(model).to(getattr(torch, self.task_dtype))
        for name, items in self.tasks.items():
            pairs = [
                {"prompt": prompt, "reference": answer}
                for item in items
                for prompt, answer in item[0]
            ]
            batches = encode_batches(self.tokenizer, pairs, batch_size=BATCH_SIZE, closed=False)
            sums, _ = sequence_nll(model, batches)
            losses = torch.empty_like(sums)
            losses[[index for batch in batches for index in batch.items]] = sums
            left = iter(losses.tolist())
            each = [(item, list(islice(left, len(item[0])))) for item in items]
            found[name] = {
                "acc": [float(least(losses) == item[1]) for item, losses in each],
                "acc_norm": [float(least(_by_length(*one)) == one[0][1]) for one in each],
            }
        return found


def least(losses: list[float]) -> int:
    """Which of them is the least."""
    return losses.index(min(losses))


def _by_length(item: Question, losses: list[float]) -> list[float]:
    """Losses per character of the answers."""
    return [loss / len(answer) for loss, (_, answer) in zip(losses, item[0], strict=True)]


def changes(
    full: dict[str, Any], judged: dict[str, Any]
) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """Of every text, and all: change of the mean loss, and half its 95 % interval; of accuracy too.

    The intervals are 1.96 standard errors, of windows or of items, which every text or task
    contributes independently.
    """
    texts: dict[str, tuple[float, float]] = {}
    tasks: list[tuple[float, float]] = []
    for name, found in judged.items():
        if "loss" in found:
            texts[name] = _mean(full[name]["loss"], found["loss"], found["tokens"])
        else:
            tasks.append(_mean(full[name]["acc"], found["acc"], [1.0] * len(found["acc"])))
    texts["all kinds"] = _together(list(texts.values()))
    return texts, _together(tasks)


def _mean(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float]
) -> tuple[float, float]:
    old, new, weight = (torch.tensor(x, dtype=torch.float64) for x in (before, after, weights))
    mean = (new - old).sum() / weight.sum()
    spread = (new - old - mean * weight).square().sum().sqrt() / weight.sum()
    return float(mean), 1.96 * float(spread)


def _together(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if not parts:
        return math.nan, math.nan
    half = math.hypot(*(half for _, half in parts)) / len(parts)
    return math.fsum(mean for mean, _ in parts) / len(parts), half


def questions(path: str, n: int) -> list[Question]:
    """At most `n` questions of a file, drawn: WinoGrande's contexts, or items with choices."""
    first = json.loads(Path(path).read_text(encoding="utf-8").partition("\n")[0])
    if "context_options" not in first:
        items: list[Any] = load_eval_dataset(n, path, up_to=True)
        return [
            ([(_asked(item["prompt"]), one) for one in item["choices"]],
             item["choices"].index(item["reference"]))
            for item in items
        ]  # fmt: skip
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = random.Random(0).sample(rows, min(n, len(rows)))
    return [
        ([(context, row["continuation"]) for context in row["context_options"]], row["gold"])
        for row in rows
    ]


def judge_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what models are judged on."""
    parser.add_argument("--judge", **NAMED_FILES, help="texts: .txt, or .jsonl with a field text")
    parser.add_argument("--judge-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--tasks", **NAMED_FILES, help="items with choices")
    parser.add_argument("--task-items", type=int, default=200, help="of each task")
    parser.add_argument("--task-dtype", default="", help="such as bfloat16; default: the model's")


def asked_judge(tokenizer: Any, args: argparse.Namespace) -> Judge:
    """What `judge_options` were given."""
    return Judge.of(tokenizer, dict(args.judge), args.judge_tokens, dict(args.tasks),
                    args.task_items, args.task_dtype)  # fmt: skip


def compared(full: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A model's figures on one text or task, and how far they are from the full model's."""
    if "loss" in found:
        before, after, weights = (
            torch.tensor(values, dtype=torch.float64)
            for values in (full["loss"], found["loss"], found["tokens"])
        )
        mean, other = (side.sum() / weights.sum() for side in (after, before))
        figures = {"perplexity": float(mean.exp()), "change": float(mean - other)}
        low, high = paired_interval(before, after, weights)
        return {**figures, "low": low, "high": high, "tokens": int(weights.sum())}
    figures = {}
    for key in ("acc", "acc_norm"):
        before, after = (torch.tensor(side[key], dtype=torch.float64) for side in (full, found))
        low, high = paired_interval(before, after)
        mean = float(after.mean())
        change = {"change": mean - float(before.mean()), "low": low, "high": high}
        figures[key] = {"mean": mean, **change, "items": len(after)}
    return figures


def _asked(prompt: str) -> str:
    """A question between ``Question:`` and ``Answer:``; another prompt as it is."""
    prompt = prompt.strip()
    if prompt.startswith("Question:"):
        return f"{prompt}\nAnswer:"
    return f"Question: {prompt}\nAnswer:" if prompt.endswith("?") else prompt


def hashed(parts: Any) -> str:
    """A short hash of what JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
