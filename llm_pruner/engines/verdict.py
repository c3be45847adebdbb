"""Whether an engine computes a model as its config means it: one comparison, layer by layer.

What the config says of every kept layer is held against what the engine will take it for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config.config_file import decoder_part, layer_count
from ..errors import InvalidPlanError, UnknownNameError
from .llama_cpp import LLAMA_CPP
from .mlx import MLX
from .rules import Rule
from .vllm import VLLM

ENGINES = {engine.name: engine for engine in (LLAMA_CPP, VLLM, MLX)}

State = Literal["right", "wrong", "metadata", "unknown"]
MOST_NAMED = 6  # layers in a sentence


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a model.

    Attributes:
        engine: its name in `ENGINES`.
        state: ``right``; ``wrong``; ``metadata``: right once a GGUF file says what its converter
            does not write (`fix_gguf`); ``unknown``: this kind of model was never looked at.
        reason: which layers are wrong, and how; empty if it is right.
    """

    engine: str
    state: State
    reason: str = ""

    def in_words(self) -> str:
        """``right``, ``wrong: ...``; ``metadata: ...`` for what `fix_gguf` makes right."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


def check_engines(names: Iterable[str]) -> tuple[str, ...]:
    """The names of engines, each once.

    Raises:
        UnknownNameError: there is no such engine.
    """
    found = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    for name in found:
        if name not in ENGINES:
            raise UnknownNameError.of("engine", name, ENGINES)
    return found


def judge(config: Mapping[str, Any], engine: str, kept: Sequence[int] | None = None) -> Verdict:
    """What an engine makes of the model that a config.json describes, or of some of its layers.

    Args:
        config: the contents of config.json, or a config of transformers as a dict.
        engine: a name in `ENGINES`.
        kept: the 0-based indices of the layers that are left; all if None.

    Raises:
        UnknownNameError: there is no such engine.
    """
    check_engines([engine])
    part, depth = decoder_part(dict(config)), layer_count(dict(config))
    rules = ENGINES[engine].rules_of(config)
    if rules is None or depth is None:
        kind = part.get("model_type") or config.get("model_type")
        return Verdict(engine, "unknown", f"nothing is known of {kind} there")
    left = range(depth) if kept is None else kept
    try:
        return _judged(engine, rules, part, depth, left)
    except (TypeError, LookupError, ValueError, ArithmeticError, AttributeError) as error:
        return Verdict(engine, "unknown", f"the config's values do not go together ({error})")


def _judged(
    engine: str, rules: Iterable[Rule], part: dict[str, Any], depth: int, left: Sequence[int]
) -> Verdict:
    count = len(left)
    reasons: list[str] = []
    sayable = True
    for rule in rules:
        whole = rule.kinds(part, depth)
        if whole is None:
            return Verdict(engine, "unknown", f"the config does not say which layers have {rule}")
        kinds = [whole[index] for index in left]
        places = [i for i in range(count) if rule.derive(part, i, count) != kinds[i]]
        if places:
            reasons.append(f"{rule} of its {named(places)} {rule.how}")
            sayable = sayable and rule.can_say(kinds)
        if lacking := rule.lacks(whole, kinds):
            reasons.append(f"it needs a layer {lacking}")
            sayable = False
    if not reasons:
        return Verdict(engine, "right")
    return Verdict(engine, "metadata" if sayable else "wrong", "; ".join(reasons))


def judge_all(config: Mapping[str, Any], kept: Sequence[int] | None = None) -> list[Verdict]:
    """What every known engine makes of a model; see `judge`."""
    return [judge(config, engine, kept) for engine in ENGINES]


def verdicts(config: Mapping[str, Any], kept: Sequence[int] | None = None) -> dict[str, str]:
    """The same in words, by engine, for those of which something is known."""
    found = judge_all(config, kept)
    return {one.engine: one.in_words() for one in found if one.state != "unknown"}


def refuse_wrong(config: Mapping[str, Any], engines: Iterable[str]) -> None:
    """Raise InvalidPlanError unless all `engines` compute the model of a config.json right."""
    for engine in check_engines(engines):
        found = judge(config, engine)
        if found.state != "right":
            raise InvalidPlanError(
                f"--serve-with {engine} cannot be promised for these layers: {found.reason}. "
                "Remove others, or let a strategy choose, which considers only sets that are right."
            )


def named(layers: Sequence[int]) -> str:
    """``layers 3, 4``; only the first of many."""
    more = f" and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
    word = "layer" if len(layers) == 1 else "layers"
    return f"{word} {', '.join(map(str, layers[:MOST_NAMED]))}{more}"
