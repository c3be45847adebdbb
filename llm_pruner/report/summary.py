"""What every report says in the same words: numbers, changes, verdicts."""

from __future__ import annotations

from ..results import Comparison, PruningPlan

MINUS = "\u2212"


def removed_text(plan: PruningPlan) -> str:
    """``3 of 12 layers removed: 2, 7, 8``."""
    layers = ", ".join(map(str, plan.remove))
    return f"{len(plan.remove)} of {plan.num_layers} layers removed: {layers}"


def number_text(value: float, digits: int = 4) -> str:
    """A value with `digits` digits, a whole number with all of its digits."""
    whole = float(value).is_integer() or abs(value) >= 10**digits
    return f"{value:,.0f}" if whole else f"{value:#,.{digits}g}".rstrip(".")


def change_text(entry: Comparison) -> str:
    """``+0.102 (+0.061 to +0.149)``, without the interval where there is none."""
    numbers = (entry.change, entry.low, entry.high)
    change, *ends = (_signed(number) for number in numbers if number is not None)
    return f"{change} ({' to '.join(ends)})" if len(ends) == 2 else change


def _signed(number: float) -> str:
    size = number_text(abs(number), 3)
    return size if size == "0" else f"{'+' if number > 0 else MINUS}{size}"


def verdict_text(entry: Comparison) -> str:
    """A comparison in words: what can be said of it, and how much of the value changed."""
    words = {"worse": "worse", "better": "better", "unclear": "no clear difference"}
    share = abs(entry.change / entry.before) if entry.before else 0.0
    size = f"{share:.1%} {'more' if entry.change > 0 else 'less'}" if share >= 0.0005 else ""
    if not entry.verdict:
        return size or "unchanged"
    word = words[entry.verdict]
    return f"{word}, {size}" if size and entry.verdict != "unclear" else word
