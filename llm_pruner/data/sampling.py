"""Drawing items from any source, and dividing them so that none serves two purposes."""

from __future__ import annotations

import math
import os
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidDataError, LoadError, UnknownNameError
from ..utils import DEMO_MODEL, logger, user_path
from .hub_datasets import read_hub_dataset
from .items import MAX_LENGTH, EvalItem, check_items, kind_of, of_kind, prompt_keys, prompt_of
from .local_files import is_data_name, name_of, read_local
from .row_formats import DATASETS, DEFAULT_SOURCES, digest, find_benchmarks
from .tables import items_of_object
from .tokens import encode_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | os.PathLike[str] | Iterable[Any]  # a name of a source, or rows themselves
DEMO_DATA = Path(__file__).parent / "demo"
DEMO_FILES = {
    "demo": "calibration.jsonl",
    "demo-eval": "evaluation.jsonl",
    "demo-heal": "healing.jsonl",
}

PASSAGE = 2000  # characters: about 512 tokens of English
# Where a passage may end, the best place first: a paragraph, a line, a sentence, a word.
ENDS = (r"\n[ \t]*\n\s*", r"\n\s*", r"(?<=[.!?\u3002\uff01\uff1f])[\"'\u201d\u2019)\]]*\s+", r"\s+")
NOT_BLANK = re.compile(r"\S")
MARKED = re.compile(r"#{1,6}\s.*|=.*=")  # a heading in Markdown, or as wikis write it
LONGEST_HEADING = 80  # characters


def _check_count(name: str, n: object) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise InvalidDataError(f"{name}={n!r} must be an integer of at least 1.")


@dataclass(frozen=True)
class _Reading:
    """How a source is read.

    Attributes:
        seed: of what is drawn.
        passage: characters that an item of running text has at most.
        fields: which field of a row is which, where its own names do not say it.
    """

    seed: int = 0
    passage: int = PASSAGE
    fields: Mapping[str, str] | None = None

    def draw(
        self, source: object, k: int, subset: str | None = None, split: str | None = None
    ) -> list[EvalItem]:
        """At most `k` items of a benchmark, a local path or a hub id, tried in this order."""
        if not isinstance(source, str | os.PathLike):
            items = items_of_object(source, k, self.seed, self.fields)
        else:
            items = self._named(str(source), k, subset, split)
        return _draw(_cut(items, self.passage), k, self.seed)

    def _named(self, source: str, k: int, subset: str | None, split: str | None) -> list[EvalItem]:
        if not find_benchmarks(source):
            demo = source in DEMO_FILES
            path = DEMO_DATA / DEMO_FILES[source] if demo else user_path(source)
            if demo or os.path.exists(path) or is_data_name(path):
                return read_local(path, k, self.seed, self.fields)
            if "/" not in source:
                raise UnknownNameError.of("dataset", source, [*DATASETS, *DEMO_FILES])
        return read_hub_dataset(source, subset, split, k, self.seed, self.fields)


def _cut(items: Sequence[EvalItem], passage: int) -> list[EvalItem]:
    """The items, running text among them in passages; shorter ones where there is little of it."""
    total = sum(len(item) for item in items if isinstance(item, str))
    passage = min(passage, max(SHORTEST, total // FEWEST))
    found: list[EvalItem] = []
    for item in items:
        found += passages(item, passage) if isinstance(item, str) else [item]
    return found


def passages(text: str, size: int = PASSAGE) -> list[str]:
    """A text in passages of at most `size` characters, in its order.

    A passage ends with a paragraph if one ends in its second half, else with a line, a sentence, a
    word, or in the middle of one. It does not end with a heading, which opens the next one.

    Returns:
        All of the text but the white space between passages; none of them is blank. A last one of
        less than a tenth of `size` is left out unless it is the only one.
    """
    found: list[str] = []
    end = 0
    while next_word := NOT_BLANK.search(text, end):
        begin = next_word.start()
        end = begin + _length(text[begin : begin + size + 1], size)
        found.append(text[begin:end].strip())
    if len(found) > 1 and len(found[-1]) < size / 10:
        found.pop()
    return found


def _length(text: str, size: int) -> int:
    """How many characters of `text` make one passage."""
    if len(text) <= size:
        return len(text)
    for pattern in ENDS:
        ends = [m.start() for m in re.finditer(pattern, text) if size // 2 <= m.start() <= size]
        for end in reversed(ends):
            last = re.split(ENDS[0], text[:end].rstrip())[-1]
            if not is_heading(last) or pattern != ENDS[0]:
                return end
    return size


def is_heading(paragraph: str) -> bool:
    """Whether a paragraph is a single line that only names what follows."""
    line = paragraph.strip()
    if "\n" in line or len(line) > LONGEST_HEADING:
        return False
    return MARKED.fullmatch(line) is not None or line[-1:].isalnum()


def _draw(items: list[EvalItem], k: int, seed: int) -> list[EvalItem]:
    """At most `k` of the items, in their order."""
    chosen = random.Random(seed).sample(range(len(items)), min(k, len(items)))
    return [items[index] for index in sorted(chosen)]


def safe_sample(
    dataset_name: str, subset: str | None, split: str | None, k: int, *, seed: int = 0
) -> list[EvalItem]:
    """At most `k` items of one source, drawn by `seed`; none and a warning if it fails.

    Args:
        dataset_name: a short name of `DATASETS`, a hub id, or a local file or folder.
        subset: the dataset's configuration; None for the usual one.
        split: the split to draw from; None for the usual one.
    """
    _check_count("k", k)
    try:
        return _Reading(seed).draw(dataset_name, k, subset, split)
    except (LoadError, InvalidDataError, UnknownNameError) as error:
        logger.warning("No items from %s: %s", dataset_name, error)
        return []


def load_eval_dataset(
    n: int,
    source: Source | None = None,
    *,
    seed: int = 0,
    up_to: bool = False,
    passage: int = PASSAGE,
    fields: Mapping[str, str] | None = None,
) -> list[EvalItem]:
    """`n` evaluation items, drawn by `seed`; fewer, with a warning, if the source has fewer.

    Args:
        source: None for an even mixture of `DEFAULT_SOURCES`, in which the others make up for one
            that fails; or ``demo``, ``demo-eval`` or ``demo-heal`` (items of this package), a
            short name of `DATASETS`, a file (.jsonl, .json, .csv, .tsv, .txt, .md, .parquet,
            .arrow; texts also as .gz, .bz2, .zst), a folder of such files or of ``save_to_disk``,
            or a hub id. Write ``./sciq`` for a folder with the name of a benchmark. Several of
            them, separated by commas, give as many items each, or in proportion to shares,
            ``a.jsonl=2,b.txt``; each is a kind of data (`kind_of`). Or rows themselves, see
            `items_of_object`: a list, a generator, a ``Dataset``, a ``DataFrame``.
        up_to: `n` is an upper limit: no warning if there are fewer.
        passage: characters that an item of running text has at most, see `passages`; fewer where
            there would be less than 16 of them.
        fields: which field is which, ``{"prompt": "q", "reference": "a"}``, in rows that have
            these fields and whose layout is not known.

    Raises:
        InvalidDataError: `n` or `passage` below 1, or a source with unusable content.
        LoadError: the source, or every source of the mixture, cannot be loaded.
        UnknownNameError: no such source.
    """
    _check_count("n", n)
    _check_count("passage", passage)
    reading = _Reading(seed, passage, fields)
    if source is None:
        items = _mixture(n, seed)
    elif isinstance(source, str) and len(shares := _sources(source)) > 1:
        items = _of_kinds(shares, n, reading)
    else:
        items = reading.draw(source, n)
    if len(items) < n and not up_to:
        logger.warning("%d items requested, only %d available: using these.", n, len(items))
    return items


def _sources(source: str) -> dict[str, float]:
    """The sources that are named, and how much of each."""
    if "," not in source or os.path.exists(user_path(source)):
        return {source: 1.0}
    shares: dict[str, float] = {}
    for part in source.split(","):
        name, equals, share = part.strip().rpartition("=")
        name, share = (name, share) if equals else (share, "1")
        try:
            amount = float(share)
        except ValueError:
            amount = math.nan
        if not (name and 0 < amount < math.inf) or name in shares:
            raise InvalidDataError(
                f"{source!r} must be different sources separated by commas, each with a positive "
                "share if they differ, e.g. a.jsonl=2,b.txt."
            )
        shares[name] = amount
    return shares


def _of_kinds(shares: Mapping[str, float], n: int, reading: _Reading) -> list[EvalItem]:
    """`n` items of several sources by their shares, each with the name of its source."""
    total = math.fsum(shares.values())
    kinds = _kind_names(list(shares))
    pools = []
    for (name, share), kind in zip(shares.items(), kinds, strict=True):
        count = max(1, round(n * share / total))
        items = reading.draw(name, count)
        pools.append([of_kind(item, kind) for item in items])
    return [item for pool in pools for item in pool]


def _kind_names(sources: Sequence[str]) -> list[str]:
    """Short names of sources: those of files without folder and ending, where they differ."""
    stems = [name_of(Path(name)) or name for name in sources]
    return stems if len(set(stems)) == len(stems) else list(sources)


def _mixture(n: int, seed: int) -> list[EvalItem]:
    pools, reasons = [], []
    for name in DEFAULT_SOURCES:
        try:
            pools.append(_Reading(seed).draw(name, n))
        except (LoadError, InvalidDataError) as error:
            reasons.append(f"{name}: {error}")
    if not pools:
        names = ", ".join(DEFAULT_SOURCES)
        raise LoadError(
            f"None of the default datasets ({names}) could be loaded. Give your own data "
            f"(--eval-dataset FILE), or the source 'demo'. The first reason: {reasons[0]}"
        )
    for reason in reasons:
        logger.warning("No items from %s", reason)
    rounds = zip_longest(*pools)
    return [item for items in rounds for item in items if item is not None][:n]


def split_items(
    items: Sequence[EvalItem], first: float = 0.5, *, seed: int = 0
) -> tuple[list[EvalItem], list[EvalItem]]:
    """Split into two lists that have no prompt in common.

    Which list a prompt goes to depends on `seed` and the prompts, not on their order.

    Args:
        first: size of the first list: a fraction between 0 and 1, or a number of items. Repeated
            prompts stay together, which can make the list shorter, never longer.

    Raises:
        InvalidDataError: the items cannot be used, or one list would be empty.
    """
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(check_items(items)):
        groups.setdefault(prompt_of(item), []).append(index)
    fraction = isinstance(first, float) and 0 < first < 1
    if not (fraction or type(first) is int):
        raise InvalidDataError(f"first={first!r} must be a fraction between 0 and 1 or an integer.")
    wanted = max(1, round(first * len(items))) if fraction else first
    taken: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: digest(seed, prompt)):
        if len(taken) + len(groups[prompt]) <= wanted:
            taken.update(groups[prompt])
    if not 0 < len(taken) < len(items):
        raise InvalidDataError(
            f"Cannot put {wanted} of {len(items)} items with {len(groups)} different prompts on "
            "one side: both sides need at least one. Give more items or another number."
        )
    left = [item for index, item in enumerate(items) if index in taken]
    right = [item for index, item in enumerate(items) if index not in taken]
    return left, right


FEWEST, SHORTEST = 16, 40  # passages that a text gives if it can, and characters of each
HEAL_ITEMS = 12  # healing items per scoring item, if the source has as many


@dataclass(frozen=True, repr=False)
class DataSplit:
    """Items for three purposes, none in two of them.

    Attributes:
        scoring: what layers are chosen on.
        healing: what weights are healed on; empty without healing.
        held_out: what quality before and after is reported on.
    """

    scoring: list[EvalItem]
    healing: list[EvalItem]
    held_out: list[EvalItem]

    def __repr__(self) -> str:
        return (
            f"DataSplit({len(self.scoring)} items to score on, {len(self.healing)} to heal with, "
            f"{len(self.held_out)} held out)"
        )

    def within(
        self, tokenizer: PreTrainedTokenizerBase, n_tokens: int, max_length: int = MAX_LENGTH
    ) -> DataSplit:
        """The same with no more items to score on, nor held out, than have `n_tokens` tokens.

        Of the items to heal with, twelve times as many stay. An item of one sequence counts for
        `max_length` tokens at most. Those that stay are drawn by their prompts; at least one stays
        of each list.
        """
        scoring, healing, held_out = (
            _fitting(part, tokenizer, many * n_tokens, max_length)
            for part, many in ((self.scoring, 1), (self.healing, HEAL_ITEMS), (self.held_out, 1))
        )
        return DataSplit(scoring, healing, held_out)

    @property
    def judging(self) -> list[EvalItem]:
        """The former name of `held_out`."""
        return self.held_out


def load_data(
    source: Source | None,
    n_samples: int = 80,
    *,
    heal_source: Source | None = None,
    healing: bool = False,
    taken: Collection[str] = (),
    seed: int = 0,
    passage: int = PASSAGE,
    fields: Mapping[str, str] | None = None,
) -> DataSplit:
    """Load `n_samples` items to score on and as many held out; more to heal with if asked.

    Args:
        source: see `load_eval_dataset`; ``demo`` has its own held-out and healing items.
        n_samples: items for each purpose; healing takes up to twelve times as many.
        heal_source: another source for the healing items; the rest of `source` if None. Items
            whose prompt or text already serves another purpose are left out.
        healing: whether to load healing items.
        taken: `prompt_keys` of items to leave out everywhere, such as those a plan is based on.
        seed: of the sampling.
        passage, fields: see `load_eval_dataset`.

    Raises:
        LoadError, InvalidDataError: the source cannot be read or holds too few items.
    """
    _check_count("n_samples", n_samples)
    draw = partial(load_eval_dataset, seed=seed, passage=passage, fields=fields)
    pool = draw(n_samples * (2 + HEAL_ITEMS), source, up_to=True)
    pool = _others(pool, taken)
    if isinstance(source, str) and source == DEMO_MODEL:
        heal_source = "demo-heal" if heal_source is None else heal_source
        held_out = draw(n_samples, "demo-eval")
    else:
        held_out, pool = split_items(pool, min(n_samples, len(pool) // 2), seed=seed)
    scoring, rest = pool, list[EvalItem]()
    if len(pool) > n_samples:  # the same items to score on, with or without healing
        scoring, rest = split_items(pool, n_samples, seed=seed)
    elif healing and heal_source is None:
        scoring, rest = split_items(pool, len(pool) // 2, seed=seed)
    if len(scoring) < n_samples:
        counts = len(scoring), len(held_out), n_samples
        logger.info("%d items choose, %d are held out; up to %d each were wanted.", *counts)
    if not healing:
        return DataSplit(scoring, [], held_out)
    if heal_source is not None:
        loaded = draw(n_samples * HEAL_ITEMS, heal_source, up_to=True)
        rest = _others(loaded, {*taken, *prompt_keys([*scoring, *held_out])})
        if left_out := len(loaded) - len(rest):
            message = "%d of %d healing items serve another purpose already and are left out."
            logger.info(message, left_out, len(loaded))
    return DataSplit(scoring, rest, held_out)


def _fitting(
    items: list[EvalItem], tokenizer: PreTrainedTokenizerBase, n_tokens: int, max_length: int
) -> list[EvalItem]:
    """Items that have at most `n_tokens` tokens together, or one of each kind; in their order.

    Kinds have tokens in proportion to their items, so that shares of sources stay what they are.
    """
    counts = Counter[int]()
    for sequence in encode_sequences(tokenizer, items, max_length=max_length) if items else ():
        counts[sequence.item] += len(sequence.ids)
    kinds = Counter(kind_of(item) for item in items)
    left = {kind: n_tokens * number / len(items) for kind, number in kinds.items()}
    taken: list[int] = []
    for index in sorted(counts, key=lambda index: digest(prompt_of(items[index]))):
        kind = kind_of(items[index])
        if counts[index] <= left[kind] or kind in kinds:
            taken.append(index)
            left[kind] -= counts[index]
            kinds.pop(kind, None)  # it has an item now
    return [items[index] for index in sorted(taken)]


def _others(items: Sequence[EvalItem], taken: Collection[str]) -> list[EvalItem]:
    return [item for item, key in zip(items, prompt_keys(items), strict=True) if key not in taken]
