"""Whether an engine computes a model as its config means it: one comparison, layer by layer.

What the config says of every kept layer is held against what the engine will take it for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config.config_file import decoder_part, layer_count
from ..errors import UnknownNameError
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

    def __str__(self) -> str:
        return f"{self.engine}: {self.state}" + (f" ({self.reason})" if self.reason else "")


def check_engines(names: Iterable[str]) -> tuple[str, ...]:
    """The names of engines, each once.

    Raises:
        UnknownNameError: there is no such engine.
    """
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in ENGINES:
            raise UnknownNameError.of("engine", name, ENGINES)
    return found


def judge(config: Mapping[str, Any], engine: str) -> Verdict:
    """What an engine makes of the model that a config.json describes.

    Raises:
        UnknownNameError: there is no such engine.
    """
    check_engines([engine])
    part = decoder_part(dict(config))
    count = layer_count(dict(config))
    rules = ENGINES[engine].rules_of(config)
    if rules is None or count is None:
        kind = part.get("model_type") or config.get("model_type")
        return Verdict(engine, "unknown", f"nothing is known of {kind} there")
    wrong: list[tuple[Rule, list[int]]] = []
    for rule in rules:
        kinds = rule.kinds(part, count)
        if kinds is None:
            return Verdict(engine, "unknown", f"the config does not say which layers have {rule}")
        places = [i for i in range(count) if rule.derive(part, i, count) != kinds[i]]
        if places:
            wrong.append((rule, places))
    if not wrong:
        return Verdict(engine, "right")
    sayable = all(rule.can_say(rule.kinds(part, count) or ()) for rule, _ in wrong)
    reasons = (f"{rule} of {named(places)} {rule.how}" for rule, places in wrong)
    return Verdict(engine, "metadata" if sayable else "wrong", "; ".join(reasons))


def judge_all(config: Mapping[str, Any]) -> list[Verdict]:
    """What every known engine makes of the model that a config.json describes."""
    return [judge(config, engine) for engine in ENGINES]


def named(layers: Sequence[int]) -> str:
    """``layers 3, 4``; only the first of many."""
    more = f" and {len(layers) - MOST_NAMED} more" if len(layers) > MOST_NAMED else ""
    word = "layer" if len(layers) == 1 else "layers"
    return f"{word} {', '.join(map(str, layers[:MOST_NAMED]))}{more}"
