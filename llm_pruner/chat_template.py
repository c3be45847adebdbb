"""Chat templates, which are foreign programs: rendered within limits of time and of size."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # for one text; usual templates need a thousandth
CHARACTERS = 10_000_000  # of one text
Work: TypeAlias = Callable[[], object]
_idle: list[_Renderer] = []  # threads that wait for work; taken and given back in one step each


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> str:
    """The text that the tokenizer's chat template makes of `messages`.

    Args:
        messages: dicts with `role` and `content`.
        options: what else ``apply_chat_template`` takes.

    Raises:
        LoadError: the template fails, does not end, or gives no text that can be used.
    """
    return render_within_limits(
        lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options)
    )


def render_within_limits(work: Work) -> str:
    """The text that `work`, which runs a chat template, returns.

    It runs in a thread of its own, which can be stopped.

    Raises:
        LoadError: it fails, does not end, or gives no text that can be used.
    """
    text = _result(work)
    if isinstance(text, Exception):  # whatever jinja2 and the template raise
        reason = " ".join(f"{type(text).__name__}: {text}".split())
        raise _unusable(f"fails ({reason:.300})") from text
    if len(text) > CHARACTERS:
        raise _unusable(f"gives {len(text):,} characters, more than {CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _unusable(f"gives text that is not valid Unicode ({error})") from None
    return text


def _unusable(reason: str) -> LoadError:
    return LoadError(
        f"The chat template of the tokenizer {reason}: fix or remove chat_template in "
        "tokenizer_config.json, or the file chat_template.jinja."
    )


def _result(work: Work) -> str | Exception:
    """What `work` returns or raises in a thread that is stopped if it takes too long."""
    try:
        renderer = _idle.pop()
    except IndexError:
        renderer = _Renderer()
    if not renderer.is_alive():  # it has stayed behind when this process was forked
        renderer = _Renderer()
    renderer.work.put(work)
    try:
        result = renderer.results.get(timeout=SECONDS)
    except Empty:
        renderer.stop()
        raise _unusable(f"does not end within {SECONDS:g} seconds") from None
    except BaseException:  # the user has interrupted it
        renderer.stop()
        raise
    _idle.append(renderer)
    return result


class _Stopped(BaseException):
    """Ends a thread from outside."""


class _Renderer(threading.Thread):
    """A thread that does one piece of work after another."""

    def __init__(self) -> None:
        super().__init__(name="llm_pruner chat template", daemon=True)
        self.work: SimpleQueue[Work] = SimpleQueue()
        self.results: SimpleQueue[str | Exception] = SimpleQueue()
        self.start()

    def run(self) -> None:
        with suppress(_Stopped):
            while True:
                self.results.put(_attempt(self.work.get()))

    def stop(self) -> None:
        """End the thread as soon as it runs Python code again."""
        stopped = ctypes.py_object(_Stopped)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), stopped)
        self.work.put(str)  # wakes it, should it wait already


def _attempt(work: Work) -> str | Exception:
    try:
        return str(work())
    except Exception as error:  # raised again by the thread that asked
        return error
