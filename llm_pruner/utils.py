"""What every room uses: devices, counts, prompts, progress, versions."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .chat_template import render_chat
from .distributed import launched, local_rank
from .errors import InvalidDataError, InvalidPlanError, LoadError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger("llm_pruner")
T = TypeVar("T")
DEMO_MODEL = "demo"
DEMO_DIR = Path(__file__).parent / "demo"
_progress_bars = True


def get_device() -> torch.device:
    """The best device of this machine: CUDA, then MPS, then the CPU.

    Of several processes each has the GPU of its own number.

    Raises:
        LoadError: there are fewer GPUs than processes.
    """
    import torch

    if torch.cuda.is_available() and launched() == 1:
        return torch.device("cuda")
    if torch.cuda.is_available():
        if local_rank() >= (there := torch.cuda.device_count()):
            raise LoadError(
                f"Process {local_rank()} of this machine has no GPU, of which there are {there}: "
                f"start {there} processes (--nproc_per_node {there}), or use --device cpu."
            )
        return torch.device("cuda", local_rank())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, each shared (tied) tensor counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters in memory, each shared (tied) tensor counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of what decides how a prompt becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        type(tokenizer).__name__,
        str(getattr(tokenizer, "chat_template", None)),
        backend.to_str() if backend is not None else str(len(tokenizer)),
    )
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def format_prompt(q: str) -> str:
    """``Question: ...`` newline ``Answer:``, the plain question format of base models.

    A prompt that already ends in ``Answer:`` is returned as it is.
    """
    q = q.strip()
    return q if q.endswith("Answer:") else f"Question: {q}\nAnswer:"


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text a model should be given for `prompt`.

    That is the tokenizer's own chat template where there is one (with the opening of the
    assistant's turn), and `format_prompt` otherwise.

    Raises:
        LoadError: the chat template cannot be used.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        return render_chat(tokenizer, messages, add_generation_prompt=True)
    return format_prompt(prompt)


def clean_output(text: str) -> str:
    """A generated answer without what a model adds around it.

    Cuts at the first invented follow-up question, strips a repeated ``Answer:`` label and
    surrounding white space, and joins the remaining lines with single spaces.
    """
    text = text.split("\nQuestion:")[0].strip()
    text = text.removeprefix("Answer:")
    return " ".join(text.split())


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """`items` with a progress bar on stderr, unless stderr is no terminal or bars are off."""
    if not (_progress_bars and sys.stderr.isatty()):
        return items
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(
        items, desc=description, total=total, leave=False, dynamic_ncols=True, file=sys.stderr
    )
    return bar


def disable_progress_bars() -> None:
    """Show no progress bars from now on, neither ours nor those of transformers."""
    from transformers.utils import logging as transformers_logging

    global _progress_bars
    _progress_bars = False
    silence: Any = transformers_logging.disable_progress_bar
    silence()


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Inside the block a library's own progress bars stay away, where bars are off."""
    with nullcontext() if _progress_bars else redirect_stderr(StringIO()):
        yield


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Inside the block the logger `name` of a library reports only errors."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def package_versions() -> dict[str, str]:
    """Versions of this package and of those whose numbers it passes on."""
    names = ("torch", "transformers")
    own = importlib.import_module(__package__).__version__
    return {"llm_pruner": own, **{name: importlib.metadata.version(name) for name in names}}


def resolve_model_id(model_id: str | Path) -> str:
    """The folder of the embedded model for ``demo``, and `model_id` itself otherwise."""
    return str(DEMO_DIR) if str(model_id) == DEMO_MODEL else str(model_id)


def user_path(text: str | Path) -> Path:
    """A path as the user typed it, with ``~`` written out; nothing needs to be there.

    Raises:
        LoadError: nothing could have such a name.
    """
    try:
        path = Path(text).expanduser()
        os.fsencode(path)
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # what opens it will say so, if it has to be there
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadError(
            f"{str(text)!r:.200} cannot be a path ({reason}): give the path of a file or folder."
        ) from None
    return path


SPECIAL_FILES = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def regular_file(path: str | Path) -> Path:
    """`path` itself, if opening it cannot wait for anybody: a file, a folder or nothing yet.

    Raises:
        LoadError: it is a pipe, a socket or a device, or leads to one.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # what opens it will say so
        return Path(path)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return Path(path)
    kind = SPECIAL_FILES.get(stat.S_IFMT(mode), "device")
    raise LoadError(f"{str(path)!r} is a {kind}: give a file.")


def parse_bytes(text: str) -> int:
    """The number of bytes that ``4GiB``, ``500 MB`` or ``4294967296`` means.

    Raises:
        InvalidPlanError: it means none.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", 1):
        units |= {f"{letter}b": 1000**power, f"{letter}ib": 1024**power}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(found[1]) * units.get(found[2], 0)) if found else 0
    if size < 1:
        raise InvalidPlanError(f"{text!r} must be a size of memory, e.g. 4GiB, 500MB.")
    return size


def parse_seconds(text: str) -> float:
    """The number of seconds that ``30m``, ``90 s`` or ``1.5h`` means.

    Raises:
        InvalidPlanError: it means none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip().lower())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidPlanError(f"{text!r} must be a time, e.g. 30m, 90s, 2h.")
    return seconds


def duration(seconds: float) -> str:
    """A time in hours, minutes or seconds, rounded."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def format_bytes(size: float) -> str:
    """A number of bytes in GiB, or MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def readable(text: str) -> str:
    """Text that UTF-8 can write: the name of a file may hold bytes of another encoding."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # halves of characters that no file system has
        return text.encode("utf-8", "replace").decode()


def shown(value: object) -> str:
    """The beginning of any value, for messages."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return "a value too large to be shown"


def explain_load_failure(kind: str, name: str, error: Exception) -> str:
    """One message for everything that can go wrong when something is fetched by name."""
    reason = " ".join(str(error).split())
    if len(reason) > 300:
        reason = reason[:297] + "..."
    if "trust_remote_code" in str(error):
        return (
            f"Cannot load {kind} {name!r}: it comes with code of its own. Read that code, and if "
            "you trust it, pass trust_remote_code=True (--trust-remote-code)."
        )
    return (
        f"Cannot load {kind} {name!r}: {type(error).__name__}: {reason} "
        f"Give a local path or an id that exists on huggingface.co; without a network only "
        f"local paths, the local cache and 'demo' work."
    )


def at_least_one(**values: int) -> None:
    """Raise InvalidDataError if one of the named values is below 1."""
    for name, value in values.items():
        if value < 1:
            raise InvalidDataError(f"{name}={value} must be at least 1.")
