"""The ``llm-pruner`` command: reads a request, calls the library, prints.

Knows nothing a script could not call. Everything heavy is imported after the request has been
checked, so that help and mistakes answer at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from io import StringIO

from .atomic_output import hold_output
from .cli_arguments import parse_request
from .cli_checks import check_request
from .cli_jobs import fix_converted, run_in_memory, run_on_disk, show_output
from .cli_request import Request
from .distributed import group, launched, on_first, one_only, rank, reported_by_first
from .errors import (
    InvalidPlanError,
    LLMPrunerError,
    OutOfMemoryError,
    OutputError,
)
from .hub import how_to_repeat, push_to_hub
from .plugins import place_in_own_code
from .streams import check_said, open_streams, say, say_aside
from .utils import logger

INTERRUPTED = 130
NO_MEMORY = ("allocate memory", "out of memory", "can't start new thread")  # how libraries say it
SIGNALLED = 128  # plus the number of the signal that ended a process
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    Of several processes the first alone prints, but for errors that it does not have.
    """
    open_streams()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    request = None
    try:
        with redirect_stdout(StringIO()) if rank() > 0 else nullcontext():
            request = parse_request(sys.argv[1:] if argv is None else argv)
            _run(request)
        check_said()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("LLM_PRUNER_DEBUG"):
            raise
        code, message = _explained(error)
        if request is not None or _is_first():  # all processes have the same words
            _print_error(message)
        return code
    return 0


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and what to say of it."""
    if isinstance(error, LLMPrunerError):
        return error.exit_code, str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    if place := place_in_own_code(error):
        return LLMPrunerError.exit_code, f"Your own code failed, in {place}: {text}."
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        advice = "Use a smaller --batch-size, or --max-memory to read layers from the disk."
        return OutOfMemoryError.exit_code, f"The memory does not suffice ({text}). {advice}"
    if isinstance(error, OSError):
        return OutputError.exit_code, f"The system refused something: {text}."
    return UNEXPECTED, (
        f"Unexpected {text}. This is a fault of llm_pruner: please report it, with what "
        "LLM_PRUNER_DEBUG=1 shows. No partial output was left."
    )


def _is_first() -> bool:
    try:
        return rank() == 0
    except InvalidPlanError:  # the environment is what is wrong
        return True


def _run(request: Request) -> None:
    logger.setLevel(logging.ERROR if request.quiet or rank() > 0 else logging.INFO)
    _end_by_exceptions()
    if one_only():
        logger.warning("accelerate launch --cpu starts one process; for several use torchrun.")
    try:
        if request.show is not None:
            show_output(request, request.show)
            return
        with group(request.timeout), ExitStack() as held:
            check_request(request)
            if request.fix_gguf is not None:
                fix_converted(request, request.fix_gguf)
                return
            if not request.writes_nothing:
                on_first(lambda: held.enter_context(hold_output(request.output)))
            if request.needs_model:
                run_in_memory(request)
            else:
                run_on_disk(request)
        if request.push_to_hub is not None and rank() == 0:  # the others need not wait for it
            _push(request, request.push_to_hub)
    except SystemExit:
        if launched() > 1:  # a launcher ends all processes when one of them has ended
            _print_error(
                f"stopped by the launcher: another process has ended.{_how_to_resume(request)}"
            )
        raise
    except KeyboardInterrupt:
        if rank() == 0:
            say_aside(f"\ninterrupted; nothing half-written.{_how_to_resume(request)}")
        raise


def _end_by_exceptions() -> None:
    """Let signals that would end the process raise, so that what was begun is cleaned up."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _send_again


def _send_again(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception was lost: one raised while garbage is collected is."""
    error = lost.exc_value
    if isinstance(error, KeyboardInterrupt):
        number = int(signal.SIGINT)
    elif isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > SIGNALLED:
        number = error.code - SIGNALLED
    else:
        sys.__unraisablehook__(lost)
        return
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def _how_to_resume(request: Request) -> str:
    """A hint, if something was left to resume from."""
    left = [request.beside(ending) for ending in ("journal.jsonl", "healing")]
    if not any(path.exists() for path in left):
        return ""
    if launched() > 1:
        return " Go on with the same command and --resume."
    words = [*request.words, *([] if request.resume else ["--resume"])]
    return f" Resume with: {shlex.join(['llm-pruner', *words])}"


def _print_error(message: str) -> None:
    """Print an error; of several processes that have the same one the first alone does."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # the launcher would end this before it is said
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not reported_by_first(message):
        process = "" if _is_first() else f"rank {rank()}: "
        say_aside(f"error: {process}{message}")


def _exit(number: int, frame: object) -> None:
    """End by an exception, so that what was begun is cleaned up."""
    raise SystemExit(SIGNALLED + number)


def _push(request: Request, repo_id: str) -> None:
    """Upload the output, which is complete, and print where it is."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if request.quiet or not sys.stderr.isatty():
        disable_progress_bars()
    logger.info("Uploading %s to %s", request.output, repo_id)
    try:
        with hold_output(request.output):
            url = push_to_hub(request.output, repo_id)
    except KeyboardInterrupt:
        say_aside(f"\n{how_to_repeat(request.output, repo_id)}")
        raise
    if request.json:
        say_aside(f"Uploaded: {url}")
    else:
        say(f"Uploaded: {url}\n")


if __name__ == "__main__":
    sys.exit(main())
