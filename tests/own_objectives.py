"""Objectives as a user would write them, in a file that tests name."""

from llm_pruner import register_objective
from llm_pruner.evaluation.likelihood import mean_nll

CALLS = []


def likelihood(model, tokenizer, items):
    """The negative loss of each item: higher is better."""
    CALLS.append(len(items))
    return [-mean_nll(model, tokenizer, [item]) for item in items]


@register_objective("loss-of-mine", better="lower", unit="nats of an item")
def loss(model, tokenizer, items):
    """The loss of each item."""
    return [mean_nll(model, tokenizer, [item]) for item in items]


def too_few(model, tokenizer, items):
    """One number for all."""
    return [1.0]


def no_list(model, tokenizer, items):
    """A number alone."""
    return 1.0


def fails(model, tokenizer, items):
    """Asks for a field that is not there."""
    return [item["absent"] for item in items]


def not_a_number(model, tokenizer, items):
    """Nothing that can be compared."""
    return [float("nan")] * len(items)
