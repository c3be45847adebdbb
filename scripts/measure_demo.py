"""Measure the demo model, whole and with layers removed, and print Markdown tables.

Run ``python scripts/measure_demo.py``. It uses plain transformers only, none of the package, so it
can serve as an independent check of the package's own figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
PROTECTED = 2
NEW_TOKENS = 24


@dataclass(frozen=True)
class Score:
    """Fractions of right answers, and the mean loss per token of the references."""

    generated: float
    chosen: float
    nll: float
    per_task: dict[str, float]
    outputs: list[str]


def load_items(path: Path) -> list[dict]:
    """Read an item file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def render(item: dict) -> str:
    return f"Question: {item['prompt']}\nAnswer:"


def without(model: LlamaForCausalLM, removed: Sequence[int]) -> LlamaForCausalLM:
    """A copy of the model that lacks the given layers."""
    pruned = copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(pruned.model.layers) if i not in set(removed)]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    pruned.model.layers = nn.ModuleList(kept)
    pruned.config.num_hidden_layers = len(kept)
    return pruned


def continuation_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> list[tuple[float, int]]:
    """For (prompt, continuation) pairs: the summed loss of the continuation and its tokens."""
    results = []
    for start in range(0, len(pairs), 64):
        chunk = pairs[start : start + 64]
        heads = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in chunk]
        batch = tokenizer(
            [p + c for p, c in chunk], padding=True, padding_side="right", return_tensors="pt"
        )
        ids = batch["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none"
        )
        ends = batch["attention_mask"].sum(1).tolist()
        for row, head, end in zip(losses, heads, ends, strict=True):
            results.append((row[head - 1 : end - 1].sum().item(), end - head))
    return results


def mean_nll(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[dict]
) -> float:
    """Loss per token of the reference answers and of the end that must follow them."""
    pairs = [(render(item), f" {item['reference']}{tokenizer.eos_token}") for item in items]
    losses = continuation_losses(model, tokenizer, pairs)
    return sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[dict]
) -> list[str]:
    """Greedy answers, questions of similar length together."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]["prompt"]))
    answers = [""] * len(items)
    for start in range(0, len(order), 50):
        chunk = order[start : start + 50]
        batch = tokenizer(
            [render(items[i]) for i in chunk],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        with torch.no_grad():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(chunk, texts, strict=True):
            answers[i] = text.strip()
    return answers


def choose(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[dict]
) -> list[bool]:
    """For multiple-choice items: is the reference the most likely choice?"""
    pairs = [(render(item), f" {choice}") for item in items for choice in item["choices"]]
    losses = [loss for loss, _ in continuation_losses(model, tokenizer, pairs)]
    right = []
    for number, item in enumerate(items):
        four = losses[4 * number : 4 * number + 4]
        right.append(item["choices"][four.index(min(four))] == item["reference"])
    return right


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[dict]) -> Score:
    """All figures of one model on one item set."""
    outputs = generate(model, tokenizer, items)
    correct = [text == item["reference"] for text, item in zip(outputs, items, strict=True)]
    tasks = sorted({item["task"] for item in items})
    per_task = {
        task: _mean([c for c, item in zip(correct, items, strict=True) if item["task"] == task])
        for task in tasks
    }
    chosen = choose(model, tokenizer, [item for item in items if "choices" in item])
    nll = mean_nll(model, tokenizer, items)
    return Score(_mean(correct), _mean(chosen), nll, per_task, outputs)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def header(tasks: Sequence[str]) -> str:
    """The head of a Markdown table of scores."""
    names = ["model", "generated", "multiple choice", "loss per token", *tasks]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def row(name: str, result: Score) -> str:
    """One line of a Markdown table of scores."""
    cells = [name, f"{result.generated:.1%}", f"{result.chosen:.1%}", f"{result.nll:.3f}"]
    return "| " + " | ".join([*cells, *(f"{v:.0%}" for v in result.per_task.values())]) + " |"


def accuracy_report(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[dict]
) -> str:
    """The table for the whole model alone."""
    result = score(model, tokenizer, items)
    return header(list(result.per_task)) + "\n" + row("full", result)


def search(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: list[dict],
    count: int,
    worst: bool = False,
) -> list[int]:
    """Remove layers one by one, each time the one whose loss is lowest (or highest) after it."""
    removed: list[int] = []
    candidates = range(PROTECTED, model.config.num_hidden_layers - PROTECTED)
    for _ in range(count):
        trials = {
            layer: mean_nll(without(model, [*removed, layer]), tokenizer, items)
            for layer in candidates
            if layer not in removed
        }
        removed.append((max if worst else min)(trials, key=trials.__getitem__))
    return removed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "llm_pruner" / "demo")
    parser.add_argument("--items", type=Path, default=ROOT / "llm_pruner" / "data" / "demo")
    parser.add_argument("--samples", action="store_true", help="also print some answers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = load_items(args.items / "calibration.jsonl")
    evaluation = load_items(args.items / "evaluation.jsonl")

    full = score(model, tokenizer, evaluation)
    print(header(list(full.per_task)), row("full", full), sep="\n")
    for layer in range(model.config.num_hidden_layers):
        print(row(f"without {layer}", score(without(model, [layer]), tokenizer, evaluation)))

    middle = range(PROTECTED, model.config.num_hidden_layers - PROTECTED)
    greedy = search(model, tokenizer, calibration, 4)
    selections = {
        "greedy 2": greedy[:2],
        "greedy 3": greedy[:3],
        "greedy 4": greedy,
        "worst 3": search(model, tokenizer, calibration, 3, worst=True),
        **{f"random 3, seed {s}": random.Random(s).sample(middle, 3) for s in range(3)},
        "early 3": [1, 2, 3],
        "last 3": list(range(model.config.num_hidden_layers))[-3:],
    }
    scores = {}
    for name, removed in selections.items():
        scores[name] = score(without(model, removed), tokenizer, evaluation)
        label = f"{name} ({', '.join(map(str, sorted(removed)))})"
        print(row(label, scores[name]), flush=True)
    if args.samples:
        for i, item in enumerate(evaluation[:20]):
            answers = [scores[n].outputs[i] for n in ("greedy 3", "greedy 4", "worst 3")]
            print(
                f"- {item['prompt']} **{item['reference']}**: {full.outputs[i]} / "
                + " / ".join(answers)
            )


if __name__ == "__main__":
    main()
