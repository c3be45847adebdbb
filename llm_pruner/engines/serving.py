"""Which layers may be kept so that engines compute the rest right, and what a GGUF file can say."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config.config_file import decoder_part, layer_count
from ..errors import InvalidPlanError, UnsupportedModelError
from .layer_sets import LayerSets
from .llama_cpp import ARCHITECTURES, HYBRIDS, LLAMA_CPP, gguf_settings
from .rules import RECURRENT, Rule, Said
from .verdict import ENGINES, check_engines, judge, named

NAMED = 2  # sets that an error names
TRIED = 24  # sizes of sets that are looked at for it, the nearest


class GgufLayers:
    """What llama.cpp takes the layers of a GGUF file for, by the file's metadata.

    Args:
        values: the metadata by key.
        num_layers: how many layers there are, without blocks for multi-token prediction.
        vocabulary: how many tokens the file lists.

    Attributes:
        known: whether it is known how llama.cpp computes this architecture.
        rules: each with the kind of every layer.
        settings: what the rules look at.
    """

    def __init__(
        self, values: Mapping[str, Any], num_layers: int, vocabulary: int | None = None
    ) -> None:
        self._num_layers = num_layers
        self._architecture = str(values.get("general.architecture"))
        self.known = self._architecture in ARCHITECTURES
        self.settings = gguf_settings(values, vocabulary)
        _, rules = ARCHITECTURES.get(self._architecture, ("", ()))
        self.rules: list[tuple[Rule, Sequence[Any]]] = []
        for rule in rules:
            listed = self._listed(rule.said)
            derived = [rule.derive(self.settings, i, num_layers) for i in range(num_layers)]
            self.rules.append((rule, derived if listed is None else listed[:num_layers]))

    def meant_by(self, config: Mapping[str, Any]) -> GgufLayers:
        """The same layers with the kinds that the config.json of their checkpoint gives them."""
        meant = copy.copy(self)
        part, count = decoder_part(dict(config)), layer_count(dict(config)) or 0
        meant.rules = []
        for rule, kinds in self.rules:
            given = rule.kinds(part, count)
            meant.rules.append((rule, kinds if given is None else given))
        return meant

    def _listed(self, said: Said | None) -> list[Any] | None:
        value = self.settings.get(said.key) if said else None
        return [bool(kind) for kind in value] if isinstance(value, list) else None

    def said(self, kept: Sequence[int], extra: int = 0) -> dict[str, tuple[int, Any]]:
        """What the file of the layers `kept` has to say so that they are what they were.

        Args:
            kept: 0-based indices of the layers that stay.
            extra: how many blocks for multi-token prediction follow.

        Returns:
            By key: the type of the value in GGUF, and the value; a list has an entry per block.

        Raises:
            UnsupportedModelError: a file cannot say it.
        """
        self._refuse_lost_memory(kept)
        found: dict[str, tuple[int, Any]] = {}
        count = len(kept)
        for rule, kinds in self.rules:
            now = [kinds[index] for index in kept]
            listed = self._listed(rule.said)
            if listed is not None:
                there = [listed[index] for index in kept]
            else:
                there = [rule.derive(self.settings, place, count) for place in range(count)]
            if rule.said is None or there == now or not rule.can_say(kinds):
                continue
            value = rule.said.value(now)
            if value is None:
                raise UnsupportedModelError(
                    f"llama.cpp cannot run {self._architecture} without any layer that has "
                    f"{rule}: keep one of them."
                )
            if isinstance(value, list):
                value = [*value, *[False] * extra]
            found[f"{self._architecture}.{rule.said.key}"] = (rule.said.type, value)
        return found

    def _refuse_lost_memory(self, kept: Sequence[int]) -> None:
        """llama.cpp stops where a hybrid model has no layer left of one of its two kinds."""
        attention, recurrence = self._memory()
        for kind, layers in (("attention", attention), ("recurrence", recurrence)):
            if attention and recurrence and not layers & {*kept}:
                raise UnsupportedModelError(
                    f"llama.cpp cannot run {self._architecture} without any layer that has {kind}: "
                    f"keep one of {sorted(layers)}."
                )

    def _memory(self) -> tuple[set[int], set[int]]:
        """The layers of a hybrid model that attend, and the recurrent ones."""
        for rule, kinds in self.rules:
            if rule.said is RECURRENT:
                recurrent = {index for index, kind in enumerate(kinds) if kind}
                return {*range(len(kinds))} - recurrent, recurrent
        heads = self.settings.get("attention.head_count_kv")
        widths = self.settings.get("feed_forward_length")
        if self._architecture not in HYBRIDS or not isinstance(heads, list):
            return set(), set()
        every = range(self._num_layers)
        networks = {i for i in every if widths[i]} if isinstance(widths, list) else set()
        attention = {i for i in every if heads[i]}
        return attention, {*every} - attention - networks


class Serving:
    """Which layers of a model may be kept so that engines compute the rest right.

    Args:
        engines: names in `ENGINES`.
        rules: with the name of the engine whose each is, and the kind of every layer.
        settings: the fields that rules look at.

    Attributes:
        engines: the names.
        restricts: whether not every set of layers may be removed.
    """

    def __init__(
        self,
        engines: Sequence[str],
        rules: Sequence[tuple[str, Rule, Sequence[Any]]],
        settings: Mapping[str, Any],
    ) -> None:
        self.engines, self._rules, self._settings = tuple(engines), list(rules), settings
        self.restricts = any(rule.how for _, rule, _ in self._rules)
        self._derived: dict[tuple[int, int], tuple[Any, ...]] = {}

    @classmethod
    def of_config(cls, config: Mapping[str, Any], engines: Iterable[str]) -> Serving:
        """What the engines make of the layers of a config.json.

        Raises:
            UnknownNameError: there is no such engine.
            InvalidPlanError: it is not known how an engine computes this kind of model, or it
                computes already the whole one otherwise.
        """
        names = check_engines(engines)
        part, count = decoder_part(dict(config)), layer_count(dict(config)) or 0
        rules: list[tuple[str, Rule, Sequence[Any]]] = []
        for engine in names:
            found = judge(config, engine)
            if found.state != "right":
                already = ", already before any removal" if found.state != "unknown" else ""
                raise InvalidPlanError(
                    f"--serve-with {engine} cannot be promised for this model: "
                    f"{found.reason}{already}. Leave {engine} out, and compare the outputs of both "
                    "programs yourself."
                )
            for rule in ENGINES[engine].rules_of(config) or ():
                rules.append((engine, rule, rule.kinds(part, count) or ()))
        return cls(names, rules, part)

    @classmethod
    def of_gguf(cls, layers: GgufLayers) -> Serving:
        """What llama.cpp makes of the layers of a GGUF file, where the file cannot say it."""
        rules = [
            (LLAMA_CPP.name, rule, kinds) for rule, kinds in layers.rules if not rule.can_say(kinds)
        ]
        return cls((LLAMA_CPP.name,), rules, layers.settings)

    def fits(self, index: int, place: int, count: int) -> bool:
        """Whether layer `index` is computed right as number `place` of `count` layers."""
        derived = self._derived.get((place, count))
        if derived is None:
            derived = tuple(rule.derive(self._settings, place, count) for _, rule, _ in self._rules)
            self._derived[place, count] = derived
        return all(
            kind == kinds[index] for (_, _, kinds), kind in zip(self._rules, derived, strict=True)
        )

    def problem(self, kept: Sequence[int]) -> str:
        """What is wrong with keeping these layers, by their indices; empty if nothing is."""
        count = len(kept)
        found = []
        for engine, rule, kinds in self._rules:
            wrong = [
                index
                for place, index in enumerate(kept)
                if rule.derive(self._settings, place, count) != kinds[index]
            ]
            if wrong:
                found.append(f"{engine}: {rule} of {named(wrong)} {rule.how}")
            if lacking := rule.lacks(kinds, [kinds[index] for index in kept]):
                found.append(f"{engine}: it needs a layer {lacking}")
        return "; ".join(found)

    def refuse_misplaced(self, removed: Sequence[int], num_layers: int) -> None:
        """Raise InvalidPlanError if an engine would not compute the model without `removed` right.

        The message names sets close to this one that it computes right.
        """
        problem = self.problem([layer for layer in range(num_layers) if layer not in removed])
        if not problem:
            return
        sets = LayerSets(num_layers, range(num_layers), self.fits)
        changes = {layer: -1.0 if layer in removed else 1.0 for layer in sets.candidates}
        sizes = sorted(range(1, num_layers), key=lambda size: abs(size - len(removed)))[:TRIED]
        found = [one for size in sizes if (one := sets.cheapest(changes, size))]
        found.sort(key=lambda one: (sum(changes[layer] for layer in one), len(one)))
        close = [list(one) for one in found[:NAMED]]
        raise InvalidPlanError(
            f"Without layers {sorted(removed)} the model would not be computed right ({problem}). "
            f"Sets close to this one that would be: {close or 'none'}."
        )
