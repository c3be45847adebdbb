"""Rows of chats, instructions and preferences as evaluation items.

A conversation of one question and its answer becomes the item that the same question has in any
other layout. A longer one keeps its turns, as chat templates take them; what follows the
assistant's last turn is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import InvalidDataError
from ..json_files import parse_json
from ..utils import shown
from .items import NOTHING, Item, bare_question, calls_text, qa_item, text_of

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
MARKED = re.compile(r"\n\n(Human|Assistant):")  # how a transcript in one text names its speakers


class UnfitRowError(InvalidDataError):
    """A sound row with nothing in it to be learned from, which is left out and counted."""


def from_messages(
    messages: object, system: object = None, tools: object = None, history: object = None
) -> Item:
    """A chat: turns with `role` and `content`, or with `from` and `value`."""
    return _item([*_opening(system, history), *_turns(messages)], tools)


def from_prompt(
    prompt: object,
    answer: object,
    system: object = None,
    tools: object = None,
    history: object = None,
    input: object = None,
    context: object = None,
    aliases: object = None,
    label: object = None,
) -> Item:
    """What is asked, with what is answered; either may be turns of a conversation.

    An answer whose `label` is false is one that people did not want.
    """
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
        raise UnfitRowError("its label is false: the answer is marked as a bad one.")
    if isinstance(answer, list) and answer and not any(isinstance(one, dict) for one in answer):
        answers: list[Any] = answer
        answer, aliases = answers[0], aliases or answers[1:]
    if isinstance(prompt, dict) and "messages" in prompt:
        conversation: dict[str, Any] = prompt
        prompt, tools = conversation["messages"], conversation.get("tools", tools)
    if isinstance(prompt, str) and isinstance(answer, list) and _opens_with(prompt, answer):
        prompt = []
    opening = _opening(system, history)
    if not isinstance(prompt, list) and not isinstance(answer, list) and not opening:
        asked = bare_question(prompt, context or None)
        added = text_of(input, "the input") if input else ""
        return qa_item(f"{asked}\n\n{added}" if added else asked, answer, aliases)
    asked_turns = prompt if isinstance(prompt, list) else _asked(prompt, input, context)
    answered = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return _item([*opening, *_turns(asked_turns, open=True), *_turns(answered)], tools)


def from_chosen(chosen: object, system: object = None, tools: object = None) -> Item:
    """The preferred one of two conversations: turns, or a transcript in one text."""
    if isinstance(chosen, str):
        parts = MARKED.split(f"\n\n{chosen.strip()}")
        if len(parts) < 3:
            raise InvalidDataError(
                f"chosen has no turns, and there is no prompt beside it: {shown(chosen)}."
            )
        pairs = zip(parts[1::2], parts[2::2], strict=True)
        chosen = [
            {"role": speaker.lower(), "content": text} for speaker, text in pairs if text.strip()
        ]
    return from_messages(chosen, system, tools)


def _opens_with(prompt: str, turns: list[Any]) -> bool:
    """Whether the first turn, after what the system says, is the prompt itself."""
    asked = [turn for turn in _turns(turns) if turn["role"] != "system"][:1]
    return any(str(turn.get("content", "")).strip() == prompt.strip() for turn in asked)


def _asked(prompt: object, added: object, context: object) -> list[dict[str, Any]]:
    parts = [bare_question(prompt, context or None), *([added] if added else [])]
    return [_turn("user", "\n\n".join(text_of(part, "the prompt") for part in parts))]


def _opening(system: object, history: object) -> list[dict[str, Any]]:
    """What came before: the system's words, and pairs of a question and its answer."""
    turns = [] if system in NOTHING else [_turn("system", system)]
    if not isinstance(history, list | None):
        raise InvalidDataError(f"history must be a list of pairs: {shown(history)}.")
    for pair in history or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InvalidDataError(f"history must be a list of pairs: {shown(pair)}.")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    return turns


def _turn(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": text_of(content, f"the text of the {role}")}


def _turns(messages: object, *, open: bool = False) -> list[dict[str, Any]]:
    """The turns of a conversation, checked, each with `role` and `content`."""
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not (messages or open):
        raise InvalidDataError(f"a conversation must be a list of turns: {shown(messages)}.")
    return [_read_turn(number, message) for number, message in enumerate(messages, start=1)]


def _read_turn(number: int, message: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidDataError(f"turn {number} is not an object: {shown(message)}.")
    given = {key: value for key, value in message.items() if value is not None}
    speaker, said = given.pop("role", given.pop("from", None)), given.pop("content", None)
    said = given.pop("value", None) if said is None else said
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise InvalidDataError(
            f"turn {number} has the role {shown(speaker)}: roles are {known}, in 'role' or 'from'."
        )
    if not isinstance(calls := given.get("tool_calls", []), list):
        raise InvalidDataError(f"turn {number} has tool_calls that are no list: {shown(calls)}.")
    if not calls:
        given.pop("tool_calls", None)
    if said in (None, "") and role == "assistant" and "tool_calls" in given:
        return {"role": role, "content": "", **given}
    return {"role": role, "content": _content(number, said), **given}


def _content(number: int, said: object) -> str:
    """The text of a turn, which may be in parts."""
    if isinstance(said, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in said]
        if odd := [part for part in parts if part.get("type", "text") != "text"]:
            kind = shown(odd[0].get("type"))
            raise UnfitRowError(f"turn {number} holds {kind}: only text is read.")
        said = "\n".join(text_of(part.get("text"), f"turn {number}") for part in parts)
    return text_of(said, f"the text of turn {number}")


def _item(turns: list[dict[str, Any]], tools: object) -> Item:
    roles = [turn["role"] for turn in turns]
    answers = [
        place for place, role in enumerate(roles) if role == "assistant" and "user" in roles[:place]
    ]
    if not answers:
        raise UnfitRowError(
            f"no turn of an assistant answers a user, so there is nothing to score: the roles are "
            f"{', '.join(roles)}."
        )
    before, answer = turns[: answers[-1]], turns[answers[-1]]
    calls = {"tool_calls": answer["tool_calls"]} if "tool_calls" in answer else {}
    reference = answer["content"] or calls_text(answer["tool_calls"])
    listed = _tools(tools)
    if len(before) == 1 and not listed:
        return qa_item(before[0]["content"], reference) | calls
    prompt = {"messages": before, **({"tools": listed} if listed else {})}
    return {"prompt": prompt, "reference": reference, **calls}


def _tools(tools: object) -> list[Any]:
    """The tools that a model may call; many tables hold them as JSON."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise InvalidDataError(f"tools must be a list, or one as JSON: {error}.") from None
    if not tools:
        return []
    if not isinstance(tools, Iterable) or isinstance(tools, str | dict):
        raise InvalidDataError(f"tools must be a list: {shown(tools)}.")
    return list(tools)
