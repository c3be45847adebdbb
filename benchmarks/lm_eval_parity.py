"""Does the built-in multiple-choice scorer give what lm-eval gives, item by item?

    python benchmarks/lm_eval_parity.py --data FOLDER [--model MODEL] [--limit N] [--repeats N]

FOLDER holds `TASK.jsonl` for the tasks below, rows with `query`, `choices` and `gold`, or with the
columns of SciQ; a task whose file is missing is left out. Both scorers get the same model, the same
rendered prompts and the same batch size. `acc` takes the choice of the greatest log-likelihood,
`acc_norm` that of the greatest per character. The column *time* is lm-eval's time divided by ours,
each the best of `--repeats` in turns, tokenization included. Exit status 1 if an item differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from llm_pruner import HolisticEvaluator, load_model
from llm_pruner.utils import render_prompt

TASKS = ("arc_easy", "hellaswag", "sciq")


def read_items(task: str, path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Items with `prompt`, `choices` and `reference`; prompts as lm-eval's tasks word them."""
    items = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        row = json.loads(line)
        if "correct_answer" in row:
            choices = [row[f"distractor{number}"] for number in (1, 2, 3)] + [row["correct_answer"]]
            prompt = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
            gold = 3
        else:
            choices, gold, prompt = row["choices"], row["gold"], row["query"]
            prompt = f"{prompt}\nAnswer:" if prompt.startswith("Question: ") else prompt
        if len(set(choices)) < len(choices):
            continue  # which of two equal choices is the reference only their position tells
        item = {"task": task, "prompt": prompt, "choices": choices, "reference": choices[gold]}
        items.append(item)
    return items


def definition(
    task: str, items: list[dict[str, Any]], tokenizer: Any, folder: str
) -> dict[str, Any]:
    """A task of lm-eval over the same items, each with its prompt as rendered for the model."""
    path = Path(folder) / f"{task}.rows.jsonl"
    rows = (
        {
            "prompt": render_prompt(tokenizer, item["prompt"]),
            "choices": item["choices"],
            "gold": item["choices"].index(item["reference"]),
        }
        for item in items
    )
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    metrics = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True}
        for metric in ("acc", "acc_norm")
    ]
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        **{"doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "gold"},
        "metric_list": metrics,
    }


def best_times(works: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of the fastest run of each; they take turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def compare(
    model: Any, tokenizer: Any, task: str, items: list[dict[str, Any]], folder: str, repeats: int
) -> tuple[list[str], int]:
    """The cells of one line of the table, and the number of items that differ."""
    options = {"tasks": [definition(task, items, tokenizer, folder)], "backend": "lm-eval"}
    ours = HolisticEvaluator(model, tokenizer, batch_size=16)
    theirs = HolisticEvaluator(model, tokenizer, batch_size=16, **options)
    works = [lambda: ours.run_benchmark(items), theirs.run_benchmark]
    own_time, other_time = best_times(works, repeats)
    cells, different = [task, f"{len(items):,}"], set()
    for part in ("item_scores", "norm_scores"):
        mine, other = (getattr(evaluator, part)[task] for evaluator in (ours, theirs))
        cells += [f"{sum(mine) / len(mine):.4f}", f"{sum(other) / len(other):.4f}"]
        pairs = enumerate(zip(mine, other, strict=True))
        different |= {row for row, (one, another) in pairs if one != another}
    return [*cells, str(len(different)), f"{other_time / own_time:.2f}"], len(different)


def main() -> int:
    """Compare all tasks, print a table; the exit status says whether every item agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with TASK.jsonl files")
    parser.add_argument("--model", action="append", help="default: demo; repeatable")
    parser.add_argument("--limit", type=int, help="items per task (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: 3)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    heads = ["model", "task", "items", "acc", "acc, lm-eval", "acc_norm", "acc_norm, lm-eval"]
    print("| " + " | ".join([*heads, "items that differ", "time"]) + " |\n" + "|---" * 9 + "|")
    different = 0
    for name in args.model or ["demo"]:
        model, tokenizer = load_model(name)
        for task in TASKS:
            path = args.data / f"{task}.jsonl"
            if not path.is_file():
                continue
            items = read_items(task, path, args.limit)
            with tempfile.TemporaryDirectory() as folder:
                cells, wrong = compare(model, tokenizer, task, items, folder, args.repeats)
            different += wrong
            print("| " + " | ".join([Path(name).name, *cells]) + " |", flush=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
