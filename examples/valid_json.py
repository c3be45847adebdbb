"""An objective of one's own: how many of the model's answers are valid JSON.

    llm-pruner --model smollm2 --eval-dataset prompts.jsonl --n-layers 4 \\
        --objective examples/valid_json.py:valid-json

The items need prompts that ask for JSON; what their references say does not matter here. An
objective is a function of a model, its tokenizer and a few items, which gives each item a number.
"""

import json

from llm_pruner import ModelEvaluator, register_objective

FENCE = "```"


@register_objective("valid-json", unit="share of answers that are valid JSON")
def valid_json(model, tokenizer, items):
    """1.0 for every item whose answer is a JSON object or list, else 0.0."""
    evaluator = ModelEvaluator(model, tokenizer, batch_size=len(items), max_new_tokens=64)
    answers = evaluator.generate([item["prompt"] for item in items])
    return [float(is_json(answer)) for answer in answers]


def is_json(answer):
    """Whether an answer, perhaps in a fenced block, is an object or a list."""
    inside = answer.split(FENCE)[1].removeprefix("json") if answer.count(FENCE) >= 2 else answer
    try:
        return isinstance(json.loads(inside), dict | list)
    except ValueError:
        return False
