"""Names and patterns in quantisation settings follow the layers that a removal renumbers.

A pattern selects modules of the source checkpoint; what is written in its place selects those of
them that are kept, under their new names, and nothing else. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import UnsupportedModelError
from .layer_names import LayerNames
from .pattern_dialects import (
    AUTO_ROUND,
    DYNAMIC,
    GLOB,
    PART,
    PLAIN,
    REGEX,
    SKIP,
    Dialect,
    Roots,
    with_parents,
)

# Where config.json, or a config inside it, keeps such settings.
QUANTIZATION_PARTS = ("quantization_config", "compression_config", "quantization")
# Files beside config.json that hold such settings.
QUANTIZATION_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "quant_config.json",
    "quant_model_description.json",
)
# Modules that wrap the decoder: quantisation settings often name it from another root.
WRAPPERS = frozenset(
    "model language_model text_model base_model transformer decoder backbone llm thinker".split()
)
DIALECT_OF_KEYS = {"dynamic": DYNAMIC, "extra_config": AUTO_ROUND}
DIALECT_OF_ENTRIES = dict.fromkeys(
    "modules_to_not_convert llm_int8_skip_modules skip_modules ignored_layers".split(), SKIP
)


def module_names(tensors: Iterable[str]) -> frozenset[str]:
    """The tensors' names and those of all modules that contain them."""
    found = set(tensors)
    for name in list(found):
        while (name := name.rpartition(".")[0]) and name not in found:
            found.add(name)
    return frozenset(found)


def follow_config(
    config: dict[str, Any], names: LayerNames, kept: Sequence[int], modules: Collection[str]
) -> dict[str, Any]:
    """A config.json whose quantisation settings follow the layers; all else is as it was.

    The arguments and errors are those of `follow_removal`.
    """
    follower = _Follower(names, kept, modules)

    def follow(part: dict[str, Any]) -> dict[str, Any]:
        new = dict(part)
        for name, value in part.items():
            if name in QUANTIZATION_PARTS:
                new[name] = follower.value(value, name)
            elif isinstance(value, dict):
                new[name] = follow(value)
        return new

    return follow(config)


def follow_removal(
    settings: Any, names: LayerNames, kept: Sequence[int], modules: Collection[str]
) -> Any:
    """A JSON value of quantisation settings in which what selects modules follows the layers.

    Args:
        settings: the value; it is not changed.
        names: the layers.
        kept: the indices of those that stay.
        modules: the `module_names` of the source checkpoint.

    Raises:
        UnsupportedModelError: a pattern selects modules that no pattern selects afterwards.
    """
    return _Follower(names, kept, modules).value(settings)


class _Names:
    """Names, found by characters that they contain."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = frozenset(names)

    @cached_property
    def _text(self) -> str:
        return "\n".join(["", *self.all, ""])

    def selected(self, dialect: Dialect, pattern: str) -> set[str]:
        """The names that a pattern selects."""
        matches = dialect.matcher(pattern)
        return {name for name in self.containing(dialect.required(pattern)) if matches(name)}

    def containing(self, part: str) -> Iterator[str]:
        """Those with these characters in a row."""
        if not part:
            yield from self.all
            return
        place = self._text.find(part)
        while place >= 0:
            end = self._text.find("\n", place)
            yield self._text[self._text.rfind("\n", 0, place) + 1 : end]
            place = self._text.find(part, end)


class _Renamed:
    """Names before the removal and after it."""

    def __init__(self, before: Iterable[str], names: LayerNames, kept: Sequence[int]) -> None:
        self.new_name = {name: names.rename(name, kept) for name in before}
        self.before = _Names(self.new_name)
        self.after = _Names(name for name in self.new_name.values() if name is not None)

    @cached_property
    def _counts(self) -> Counter[str]:
        """How many names there are below each name, itself included."""
        return Counter(above for name in self.after.all for above in with_parents(name))

    def roots(self, selected: set[str]) -> Roots:
        """The names `selected`, in short: one for all that are below it, where all are there."""
        there = Counter(above for name in selected for above in with_parents(name))
        found = set()
        for name in selected:
            whole = [above for above in with_parents(name) if there[above] == self._counts[above]]
            root = min(whole, key=len, default=name)
            found.add((root, bool(whole) and self._counts[root] > (root in selected)))
        return sorted(found)


@dataclass(frozen=True)
class _Numbered:
    """A pattern that names layers by number: what precedes the number, and its successor."""

    head: str
    tail: str
    following: tuple[str, ...]  # the pattern for the new numbers; empty if no layer is left


class _Follower:
    def __init__(self, names: LayerNames, kept: Sequence[int], modules: Collection[str]) -> None:
        self.names, self.kept, self._modules = names, kept, modules
        parts = [prefix.removesuffix(".").split(".") for prefix in names.prefixes]
        self._roots: dict[str, _Follower] = {}
        self._known_words = WRAPPERS.union(*parts)
        lists = "|".join(sorted(re.escape(words[-1]) for words in parts))
        self._number = re.compile(
            rf"(.*?(?<!\w)(?:{lists})(?:\\?\.|\[\.\]))((?:0|[1-9]\d*)(?!\d)|\((?:\?:)?\d+(?:\|\d+)*\))(.*)"
        )

    @cached_property
    def _all(self) -> _Renamed:
        return _Renamed(self._modules, self.names, self.kept)

    @cached_property
    def _tensors(self) -> _Renamed:
        parents = {name.rpartition(".")[0] for name in self._all.new_name}
        return _Renamed(self._all.new_name.keys() - parents, self.names, self.kept)

    def value(self, value: Any, field: str = "", awq: bool = False) -> Any:
        """A JSON value, found in this field, that follows the layers."""
        if isinstance(value, dict):
            awq = value.get("quant_method", "awq" if "zero_point" in value or awq else "") == "awq"
            return self._dict(value, DIALECT_OF_KEYS.get(field, GLOB), awq)
        if not isinstance(value, list):
            return value
        dialect = DIALECT_OF_ENTRIES.get(field, GLOB)
        dialect = PART if awq and dialect is SKIP else dialect
        new: list[Any] = []
        for part in value:
            if isinstance(part, str):
                new += self.patterns(part, dialect)
            else:
                new.append(self.value(part, field, awq))
        return new

    def _dict(self, value: dict[str, Any], dialect: Dialect, awq: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, part in value.items():
            new = self.value(part, name, awq)
            if isinstance(part, str) and self.names.index(part) is not None:
                new = self.names.rename(part, self.kept)
            if new is None and part is not None:
                continue
            for key in self.patterns(name, dialect):
                found.setdefault(key, new)
        return found

    def patterns(self, text: str, dialect: Dialect) -> list[str]:
        """What takes the place of a name or pattern; nothing if no layer of it is left."""
        if any(text.startswith(sign) for sign in REGEX.signs):
            dialect = REGEX
        sign = next((sign for sign in dialect.signs if text.startswith(sign)), "")
        numbered = self._numbered(text.removeprefix(sign))
        try:
            found = self._patterns(text.removeprefix(sign), dialect, numbered)
        except re.error as error:
            raise self._refusal(text, f"it is not a regular expression: {error}") from error
        if found is None:
            raise self._refusal(text, "no other pattern selects what is left of it")
        return [sign + pattern for pattern in found]

    def _numbered(self, text: str) -> _Numbered | None:
        """None for what does not name layers of the decoder by number."""
        match = self._number.fullmatch(text)
        if match is None or not self._known_words.issuperset(re.findall(r"[^\W\d]\w*", match[1])):
            return None
        head, numbers, tail = match.groups()
        old = [f"{head}{number}" for number in re.findall(r"\d+", numbers)]
        if head not in self.names.prefixes and not self._all.new_name.keys().isdisjoint(old):
            return None  # another list of modules
        names = LayerNames((head,), self.names.num_layers)
        new = [name.removeprefix(head) for x in old if (name := names.rename(x, self.kept))]
        opening = numbers[: len(numbers) - len(numbers.lstrip("(?:"))]
        spelled = f"{head}{opening}{'|'.join(new)}{')' if opening else ''}{tail}"
        return _Numbered(head.replace("\\", ""), tail, (spelled,) if new else ())

    def _patterns(
        self, text: str, dialect: Dialect, numbered: _Numbered | None
    ) -> Sequence[str] | None:
        """The patterns, or None if there are none; checked against all modules where in doubt."""
        if self._is_certain(text, dialect, numbered):
            return numbered.following if numbered else [text]
        renamed = self._tensors if dialect.of_tensors else self._all
        selected = renamed.before.selected(dialect, text)
        if not selected and numbered and numbered.head not in self.names.prefixes:
            other = self._from_root(numbered.head)
            patterns = other._patterns(text, dialect, numbered) if other else numbered.following
            if patterns is not None and not _selected(renamed.after, dialect, patterns):
                return patterns
        wanted = {new for old in selected if (new := renamed.new_name[old]) is not None}
        candidates = [*([numbered.following] if numbered else []), [text]]
        for patterns in candidates:
            if _selected(renamed.after, dialect, patterns) == wanted:
                return patterns
        patterns = dialect.spell(renamed.roots(wanted), self.names)
        return patterns if _selected(renamed.after, dialect, patterns) == wanted else None

    def _is_certain(self, text: str, dialect: Dialect, numbered: _Numbered | None) -> bool:
        """Whether the text shows what it selects: modules of layers by name, or nothing by number.

        ``layers.1`` may select layer 10 too, and ``layers.1.mlp`` what ends so elsewhere.
        """
        if not dialect.is_pattern(text):
            return True
        if not PLAIN.fullmatch(text):
            return False
        if numbered is None:
            return re.search(r"\d", text) is None
        named = re.match(r"\.[^\W\d]", numbered.tail) is not None
        unique = not (dialect.of_tensors and numbered.head in self._elsewhere)
        return named and numbered.head in self.names.prefixes and unique

    @cached_property
    def _elsewhere(self) -> set[str]:
        """The layers' prefixes that are parts of other names too."""
        found = self._all.before.containing
        return {x for x in self.names.prefixes if any(not self.names.split(n) for n in found(x))}

    def _from_root(self, head: str) -> _Follower | None:
        """The same layers under the names that another program gives them, if `head` is plain."""
        if not PLAIN.fullmatch(head):
            return None
        if head not in self._roots:
            parts = map(self.names.split, self._all.new_name)
            modules = frozenset(f"{head}{part[1]}{part[2]}" for part in parts if part)
            names = LayerNames((head,), self.names.num_layers)
            self._roots[head] = _Follower(names, self.kept, modules)
        return self._roots[head]

    def _refusal(self, pattern: str, reason: str) -> UnsupportedModelError:
        removed = sorted(set(range(self.names.num_layers)).difference(self.kept))
        return UnsupportedModelError(
            f"The quantisation settings select modules by {pattern!r}, which cannot follow the "
            f"removal of layers {removed}: {reason}. Write the names of the modules into the "
            "checkpoint's settings instead, or remove other layers."
        )


def _selected(names: _Names, dialect: Dialect, patterns: Iterable[str]) -> set[str]:
    return set().union(*(names.selected(dialect, pattern) for pattern in patterns))
