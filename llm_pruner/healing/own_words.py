"""Healing data that the full model writes itself: what it would say, in its own words."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

from ..data.items import EvalItem, check_items, prompt_of
from ..data.tokens import encode_prompt
from ..distributed import on_first
from ..errors import InvalidDataError
from ..evaluation.generation import end_ids, greedy
from ..model.forward import position_limit
from ..progress import duration, progress
from ..utils import at_least_one, logger
from .job import MIN_ITEMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENING = 16  # tokens of a text that the model goes on from
NOTE_EVERY = 30.0  # seconds between two lines of the log
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}  # from the model's whole distribution


def self_generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    *,
    prompts: Sequence[EvalItem] = (),
    max_new_tokens: int = 128,
    batch_size: int = 8,
    minutes: float | None = None,
) -> list[EvalItem]:
    """At most `n` items, whose answers or texts the model has sampled itself.

    A question of `prompts` is answered anew: its reference is the model's answer, its aliases are
    dropped. A running text is continued from its first few tokens. Where there are no prompts, the
    texts begin with nothing but the token that opens a text.

    Source: LLM-QAT (Liu et al., arXiv:2305.17888), section 3.1, which lets the full model write the
    data that a quantised one is trained on. Departures: questions of the user's are answered; no
    part is decoded greedily.

    Args:
        n: how many items; of more prompts, as many are drawn, fewer are used repeatedly. An answer
            that is empty, and what was written before, is left out.
        seed: of the draw and of all sampling. The random state outside is not touched.
        prompts: items to take prompts and beginnings from, such as the healing items.
        max_new_tokens: longest answer or continuation; at most half of the model's positions.
        minutes: writing ends with the batch in which they are up, but not before there are items
            enough to heal with.

    Returns:
        Items for `heal_model`; of several processes, those of the first.

    Raises:
        InvalidDataError: no prompts, and a tokenizer without a token to begin with; nothing but
            empty answers; or prompts that cannot be used.
    """
    at_least_one(n=n, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if prompts:
        check_items(prompts)
        places = random.Random(seed).sample(range(len(prompts)), len(prompts))
        chosen: list[EvalItem] = [prompts[place] for place in sorted(islice(cycle(places), n))]
    else:
        chosen = [""] * n
    most = min(max_new_tokens, max(1, position_limit(model) // 2))
    room = position_limit(model) - most
    openings = [_opening(tokenizer, item, room) for item in chosen]
    written: list[EvalItem] = on_first(
        lambda: _write(model, tokenizer, chosen, openings, most, batch_size, seed, minutes)
    )
    if not written:
        raise InvalidDataError(
            f"The model ended all {len(chosen)} texts at once: give prompts of another kind, or "
            "data to heal with."
        )
    return written


def _opening(tokenizer: PreTrainedTokenizerBase, item: EvalItem, room: int) -> list[int]:
    """The tokens that the model is to continue."""
    if isinstance(item, dict):
        return encode_prompt(tokenizer, item["prompt"], room)
    ids = list(tokenizer(item, verbose=False)["input_ids"])[: min(OPENING, room)] if item else []
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if not ids and start is None:
        raise InvalidDataError(
            "The tokenizer has no token that begins or ends a text: pass prompts to go on from."
        )
    return ids or [start]


def _write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[EvalItem],
    openings: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    minutes: float | None,
) -> list[EvalItem]:
    """What the model makes of the openings, in the order of the items."""
    found: dict[int, EvalItem] = {}
    ends, before = set(end_ids(model, tokenizer)), set[tuple[str, str]]()
    order = sorted(range(len(items)), key=lambda place: -len(openings[place]))
    if minutes is not None:  # what is written in time should be of all lengths
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        random.Random(seed).shuffle(batches)
        order = [place for batch in batches for place in batch]
    start = noted = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in progress(range(0, len(order), batch_size), "Writing healing data"):
            places = order[first : first + batch_size]
            given = [openings[place] for place in places]
            options = {**SAMPLED, "eos_token_id": sorted(ends) or None}
            for place, new in zip(
                places, greedy(model, given, max_new_tokens, **options).tolist(), strict=True
            ):
                stop = next((at for at, token in enumerate(new) if token in ends), len(new))
                item = items[place]
                head = [] if isinstance(item, dict) else openings[place]
                text = str(tokenizer.decode([*head, *new[:stop]], skip_special_tokens=True)).strip()
                asked = prompt_of(item) if isinstance(item, dict) else ""
                if text and (asked, text) not in before:
                    before.add((asked, text))
                    found[place] = text
                    if isinstance(item, dict):
                        found[place] = {"prompt": item["prompt"], "reference": text}
            done, now = min(first + batch_size, len(order)), time.monotonic()
            if minutes is not None and now - start > 60 * minutes and len(found) >= MIN_ITEMS:
                logger.info("Time is up: %d of %d healing items are written.", done, len(order))
                break
            if now - noted > NOTE_EVERY:
                noted = now
                left = duration((now - start) / done * (len(order) - done))
                logger.info("Written: %d of %d healing items; %s left", done, len(order), left)
    return [found[place] for place in sorted(found)]
