"""How serving engines work out what a layer is: one line per engine and kind of model.

A checkpoint says of every layer what it is. Some engines ask instead for its index, or for the
number of layers. A `Rule` is one such question, with the place where the engine asks it. Engines
that read what the checkpoint says need no rule: their models are listed as right for any set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.config_file import decoder_part
from ..config.gguf_metadata import BOOL

Settings = Mapping[str, Any]  # the fields of a config.json that describe the decoder
Kinds = Callable[[Settings, int], Sequence[Any] | None]
Derive = Callable[[Settings, int, int], Any]


class _Any:
    """Equal to every kind: a place that any layer may take."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANY = _Any()


@dataclass(frozen=True)
class Said:
    """How a GGUF file can say something that llama.cpp would otherwise derive.

    Attributes:
        key: of the metadata, without the architecture's name before it.
        type: number of the type of its values in GGUF.
        value: what it says, of the kinds of all layers; None if it cannot say that.
    """

    key: str
    type: int
    value: Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Rule:
    """One aspect of layers that an engine does not read from where the checkpoint says it.

    Attributes:
        aspect: what it is about, such as ``sliding-window attention``.
        kinds: the aspect of every layer as a config.json says it, or None if it does not: of its
            fields and the number of layers.
        derive: what the engine takes for it, of the fields, a layer's index and the number of
            layers.
        how: how it does so, in words that follow the names of layers.
        source: where that stands in the engine's code.
        said: how a GGUF file can say it instead, if it can.
        needs: kinds of which one layer has to stay: the engine stops, or goes wrong, without.
    """

    aspect: str
    kinds: Kinds
    derive: Derive
    how: str
    source: str = ""
    said: Said | None = None
    needs: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return self.aspect

    def lacks(self, whole: Sequence[Any], left: Sequence[Any]) -> str:
        """What the kinds that are left lack of those of the whole model, in words."""
        lost = [kind for kind in self.needs if kind in whole and kind not in left]
        return " and ".join(f"{'with' if kind else 'without'} {self}" for kind in lost)

    def can_say(self, kinds: Sequence[Any]) -> bool:
        """Whether a GGUF file can say that these are the kinds of its layers."""
        return self.said is not None and self.said.value(kinds) is not None


@dataclass(frozen=True)
class Engine:
    """What is known of an engine.

    Attributes:
        name: of the engine.
        version: what the rules were read from.
        rules: by model type: what it does not read from the config. Types that are listed without
            a rule are computed right whichever layers are removed.
    """

    name: str
    version: str
    rules: Mapping[str, tuple[Rule, ...]]

    def rules_of(self, config: Settings) -> tuple[Rule, ...] | None:
        """The rules for a config.json, by its type or that of its decoder; None if unknown."""
        parts = [decoder_part(dict(config)), config]
        kinds = [str(part.get("model_type")) for part in parts]
        return next((self.rules[kind] for kind in kinds if kind in self.rules), None)


def _as_list(kinds: Sequence[Any]) -> list[bool] | None:
    """A list by layer; llama.cpp stops where none of them has a sliding window."""
    return [bool(kind) for kind in kinds] if any(kinds) else None


PATTERN = Said("attention.sliding_window_pattern", BOOL, _as_list)
RECURRENT = Said("attention.recurrent_layers", BOOL, lambda kinds: [bool(kind) for kind in kinds])

# What the classes of Gemma-2 and Gemma-3 take where a published config leaves it out.
GEMMA = {
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}

# What a config says of its layers.


def by_type(*names: str) -> Kinds:
    """Whether `layer_types` has one of the names for a layer."""

    def kinds(config: Settings, count: int) -> Sequence[Any] | None:
        types = config.get("layer_types")
        if not isinstance(types, list | tuple) or len(types) != count:
            return None
        return [kind in names for kind in types]

    return kinds


windows = by_type("sliding_attention", "chunked_attention")
linear = by_type("linear_attention")


def windows_if_any(config: Settings, count: int) -> Sequence[Any]:
    """The same for models whose config need not speak of them."""
    return windows(config, count) or [False] * count


def recurrent(config: Settings, count: int) -> Sequence[Any]:
    """Whether a layer has a state instead of attention, in a hybrid model."""
    found = by_type("linear_attention", "mamba", "conv")(config, count)
    return [False] * count if found is None else found


def rotary(config: Settings, count: int) -> Sequence[Any] | None:
    """Whether `no_rope_layers` gives a layer rotary positions, as it does despite its name."""
    kinds = config.get("no_rope_layers")
    if not isinstance(kinds, list | tuple) or len(kinds) != count:
        return None
    return [bool(kind) for kind in kinds]


def experts(config: Settings, count: int) -> Sequence[Any]:
    """Whether a layer is a mixture of experts, by the list or else by the step."""
    layers, step = config.get("moe_layers"), config.get("interleave_moe_layer_step") or 1
    if layers is None:
        return [(index + 1) % step == 0 for index in range(count)]
    return [index in layers for index in range(count)]


def all_have(name: str) -> Kinds:
    """Every layer has what a field of the config asks for."""
    return lambda config, count: [bool(config.get(name))] * count


def anything(config: Settings, count: int) -> Sequence[Any]:
    """Whatever the engine takes the layers for."""
    return [ANY] * count


def scales(config: Settings, count: int) -> Sequence[Any]:
    """What attention is divided by the root of."""
    return [float(config.get("query_pre_attn_scalar") or GEMMA["query_pre_attn_scalar"])] * count


# What engines take for it.


def every(
    period: int | str,
    aspect: str,
    kinds: Kinds,
    source: str,
    *,
    special: bool = False,
    first: bool = False,
    default: int = 1,
    switch: str = "",
    off: bool = False,
    complete: bool = False,
    said: Said | None = None,
    needs: tuple[bool, ...] = (),
) -> Rule:
    """The last layer of every period, or the first, is `special`, and all others are not.

    Args:
        period: the number of layers, or the field that has it (`default` without one).
        switch: a field; if it is there, and 0, no layer has it, or all do (`off`).
        complete: the engine stops unless there is one whole period.
        needs: see `Rule`.
    """

    def derive(settings: Settings, index: int, count: int) -> bool | None:
        if switch and not settings.get(switch, True):
            return off
        given = settings.get(period, default) if isinstance(period, str) else period
        length = given if type(given) is int and given > 0 else 1
        if complete and count < length:
            return None
        hit = index % length == (0 if first else length - 1)
        return special if hit else not special

    length = default if isinstance(period, str) else period
    kind = "with" if special else "without"
    how = f"follows from position (every {_ordinal(length)} layer is {kind})"
    if length == 1:
        how = f"follows from position (by {period})"
    return Rule(aspect, kinds, derive, how, source, said, needs)


def reads(aspect: str, kinds: Kinds, source: str, *needs: bool) -> Rule:
    """The engine reads what the config says, and needs a layer of each of these kinds."""
    return Rule(aspect, kinds, lambda s, i, c: ANY, "", source, needs=needs)


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def windows_every(period: int | str, source: str, **options: Any) -> Rule:
    """All layers but one of every period have a sliding window; see `every` for the options."""
    return every(period, "sliding-window attention", windows, source, **options)


def rotary_every(period: int, source: str, kinds: Kinds = rotary, **options: Any) -> Rule:
    """All layers but one of every period have rotary positions; see `every` for the options."""
    return every(period, "rotary position", kinds, source, **options)


def experts_every(field: str, source: str, default: int = 1) -> Rule:
    """One layer of every period is a mixture of experts."""
    return every(field, "mixture of experts", experts, source, special=True, default=default)


def linear_every(field: str, source: str, **options: Any) -> Rule:
    """All layers but one of every period have linear attention; see `every` for the options."""
    return every(field, "linear attention", linear, source, **options)


def no_windows(source: str) -> Rule:
    """Every layer looks at the whole text."""
    how = "is not known there"
    return Rule("sliding-window attention", windows_if_any, lambda s, i, c: False, how, source)


def scale_by_count(special: int, source: str) -> Rule:
    """Gemma: attention has another scale at the depth of the largest model."""

    def derive(settings: Settings, index: int, count: int) -> float:
        width, heads, head = (
            settings.get(name) or GEMMA[name]
            for name in ("hidden_size", "num_attention_heads", "head_dim")
        )
        return float(width // heads if count == special else head)

    how = f"follows from the number of layers (another one at {special})"
    return Rule("attention scale", scales, derive, how, source)
