"""The dialects in which quantisation settings select modules by name.

A dialect knows what a pattern matches, and how to spell a list of modules without any doubt. Where
those who read the settings differ, one of them is followed: for AutoRound's regexes vLLM, which
searches where SGLang matches the whole name; for AWQ's lists AutoAWQ, not transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate

from .layer_names import LayerNames

# Modules to spell: the name, and whether everything below it is meant too.
Roots = Sequence[tuple[str, bool]]
# A name without wildcards; the dot that some put at its end keeps layers.1. from meaning layers.10.
PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*\.?")
END = r"(?:(?<=\.)|(?=\.|$))"  # where a component of a name ends


@dataclass(frozen=True)
class Dialect:
    """A way to select modules.

    Attributes:
        matcher: pattern -> whether it selects a name; re.error for a pattern that is none.
        required: pattern -> characters that every name it selects contains.
        spell: patterns that select these modules and no others.
        is_pattern: whether a text is one; if not, it is the name of a single module.
        of_tensors: a module is selected together with all below it, so that only tensors count.
        signs: what may stand before a pattern.
    """

    matcher: Callable[[str], Callable[[str], object]]
    required: Callable[[str], str]
    spell: Callable[[Roots, LayerNames], list[str]]
    is_pattern: Callable[[str], object]
    of_tensors: bool = False
    signs: tuple[str, ...] = ()


def with_parents(name: str) -> list[str]:
    """A name, and those of all modules that contain it."""
    ends = [place for place, character in enumerate(name) if character == "."]
    return [name, *(name[:end] for end in ends)]


def _always(text: str) -> bool:
    return True


def _longest(parts: Iterable[str]) -> str:
    return max(parts, key=len, default="")


def _glob_required(pattern: str) -> str:
    return _longest(re.split(r"[*?]|\[.*", pattern))


def _regex_required(pattern: str) -> str:
    """Nothing for what takes more than a look."""
    text = pattern.replace(r"\.", "\0")
    if re.search(r"[\\|()\[\]{}]", text):
        return ""
    return _longest(re.split(r".[*+?]+|[.^$]", text)).replace("\0", ".")


def _skip_matcher(pattern: str) -> Callable[[str], object]:
    """A regex from the beginning on, or the end of a module's name: so transformers reads it."""
    ending = re.compile(re.escape(pattern) + END).search
    if PLAIN.fullmatch(pattern):
        return ending
    if _is_glob(pattern):
        return re.compile(f"{translate(pattern)}|{translate(pattern + '.*')}").match
    try:
        beginning = re.compile(f"(?:{pattern}){END}").match
    except re.error:  # then it can only be meant as it stands
        return ending
    return lambda name: any(map(beginning, with_parents(name))) or ending(name)


def _skip_required(pattern: str) -> str:
    if PLAIN.fullmatch(pattern):
        return pattern
    return _glob_required(pattern) if _is_glob(pattern) else ""


def _is_glob(pattern: str) -> bool:
    """Whether a star does not follow what a regex would repeat."""
    return "\\" not in pattern and re.search(r"(?<![.\])])\*", pattern) is not None


def _one_of(options: Iterable[str]) -> str:
    options = list(options)
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


def _spell_regex(roots: Roots, names: LayerNames) -> list[str]:
    """Anchored and escaped; layers of which the same modules are meant share one."""
    outside: list[str] = []
    inside: dict[str, dict[int, list[str]]] = {}
    for name, whole in roots:
        below = r"(?:\..*)?" if whole else ""
        parts = names.split(name)
        if parts is None:
            outside.append(re.escape(name) + below)
        else:
            prefix, index, rest = parts
            inside.setdefault(prefix, {}).setdefault(index, []).append(re.escape(rest) + below)
    found = [_one_of(outside)] if outside else []
    for prefix, layers in inside.items():
        alike: dict[str, list[str]] = {}
        for index, rests in sorted(layers.items()):
            alike.setdefault(_one_of(rests), []).append(str(index))
        found += [re.escape(prefix) + _one_of(same) + rest for rest, same in alike.items()]
    return [f"^{regex}$" for regex in found]


def _spell_glob(roots: Roots, names: LayerNames) -> list[str]:
    return [text for name, whole in roots for text in (name, f"{name}.*")[: 1 + whole]]


def _spell_names(roots: Roots, names: LayerNames) -> list[str]:
    return [name for name, _ in roots]


def _spell_parts(roots: Roots, names: LayerNames) -> list[str]:
    return [f"{name}." if whole else name for name, whole in roots]


GLOB = Dialect(  # the whole name, with wildcards of the shell: ModelOpt; names alone: most lists
    lambda pattern: re.compile(translate(pattern)).match,
    _glob_required,
    _spell_glob,
    is_pattern=re.compile(r"[*?\[]").search,
)
REGEX = Dialect(  # compressed-tensors, for entries that begin so
    lambda pattern: re.compile(pattern).match,
    _regex_required,
    _spell_regex,
    is_pattern=_always,
    signs=("re:",),
)
DYNAMIC = Dialect(  # GPTQModel: the first that matches counts
    REGEX.matcher, _regex_required, _spell_regex, is_pattern=_always, signs=("+:", "-:")
)
AUTO_ROUND = Dialect(  # a name, or a regex if it has a character that makes it one
    lambda pattern: re.compile(pattern).search,
    _regex_required,
    _spell_regex,
    is_pattern=re.compile(r"[*+?^$()\[\]{}|\\]").search,
)
SKIP = Dialect(  # lists that transformers reads
    _skip_matcher,
    _skip_required,
    _spell_names,
    is_pattern=_always,
    of_tensors=True,
)
PART = Dialect(  # AutoAWQ: any part of a name, so that layers.1 means layers.10 too
    lambda pattern: lambda name: pattern in name,
    lambda pattern: pattern,
    _spell_parts,
    is_pattern=_always,
    of_tensors=True,
)
