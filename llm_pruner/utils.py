"""Plumbing shared by the other modules: devices, prompts, progress, loading a model."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InvalidPlanError, LoadError
from .processes import launched, launched_here, local_rank

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def model_fingerprint(model: torch.nn.Module) -> str:
    """Short hash of a model's config and of a sample of every tensor, to tell models apart."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(config.to_json_string().encode() if config is not None else b"")
    for _, sample in sorted((name, _sample(name, tensor)) for name, tensor in _tensors(model)):
        digest.update(sample)
    return digest.hexdigest()[:16]


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    values = flat[:: max(1, flat.numel() // 256)].float().cpu()
    return f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode() + values.numpy().tobytes()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The entries of the state dict; what accelerate keeps on the disk is read from there."""
    state = model.state_dict()
    yield from ((name, tensor) for name, tensor in state.items() if not tensor.is_meta)
    if not any(tensor.is_meta for tensor in state.values()):
        return
    from accelerate.utils import align_module_device

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        names = [(name, prefix + name) for name in (*module._parameters, *module._buffers)]
        away = [(name, full) for name, full in names if full in state and state[full].is_meta]
        if away:
            with align_module_device(module, "cpu"):
                yield from ((full, getattr(module, name)) for name, full in away)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of what decides how a prompt becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        type(tokenizer).__name__,
        str(getattr(tokenizer, "chat_template", None)),
        backend.to_str() if backend is not None else str(len(tokenizer)),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
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


def package_versions() -> dict[str, str]:
    """Versions of this package and of those whose numbers it passes on."""
    names = ("torch", "transformers")
    own = importlib.import_module(__package__).__version__
    return {"llm_pruner": own, **{name: importlib.metadata.version(name) for name in names}}


def resolve_model_id(model_id: str) -> str:
    """The folder of the embedded model for ``demo``, and `model_id` itself otherwise."""
    return str(DEMO_DIR) if model_id == DEMO_MODEL else model_id


def load_model(
    model_id: str,
    *,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, or a wrapper around one, and its tokenizer, for evaluation.

    Args:
        model_id: ``demo``, a local folder, or an id on the Hugging Face hub.
        device: where to put it; the best device of the machine if None; ``auto`` spreads it
            over all devices with accelerate.
        dtype: ``auto`` (as stored), or ``float32``, ``bfloat16``, ``float16``.
        trust_remote_code: run code that comes with the checkpoint. Off unless asked for.

    Raises:
        LoadError: the model cannot be found or read; the message says what to do.
    """
    spread = str(device) == "auto"
    if spread and launched_here() > 1:
        raise LoadError(
            f"device='auto' (--device auto) spreads a model over all devices of a machine, and "
            f"{launched_here()} processes are on this one: start one (--nproc_per_node 1)."
        )
    model, tokenizer = read_model(
        model_id,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map="auto" if spread else None,
    )
    if not spread:
        try:
            place: Any = device or get_device()
            model = model.to(place)
        except (RuntimeError, AssertionError) as error:
            raise LoadError(
                f"Cannot put the model on device {str(device)!r}: {error} Use cpu, or a device "
                "that this machine has."
            ) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def read_model(
    model_id: str, *, dtype: str, trust_remote_code: bool, **placement: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer as transformers places them; see `load_model`.

    Args:
        model_id, dtype, trust_remote_code: see `load_model`.
        placement: further arguments of ``from_pretrained``.

    Raises:
        LoadError: the model cannot be found or read, or tensors of it are missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    source, auto, _ = model_class(model_id, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = auto.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options, **placement
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise LoadError(explain_load_failure("model", model_id, error)) from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise LoadError(
            f"Cannot load model {model_id!r}: {len(missing)} of its tensors are not in the "
            f"checkpoint and would be random, such as {missing[0]}. It is damaged, or not the "
            "checkpoint of a causal language model."
        )
    return model, tokenizer


def model_class(model_id: str, **options: Any) -> tuple[str, Any, Any]:
    """Where a model is, the ``Auto`` class that builds it, and its config.

    That for causal language models, or for image-text models where only that one knows it.

    Args:
        model_id: see `load_model`.
        options: ``trust_remote_code``, ``revision``.

    Raises:
        LoadError: the config cannot be found or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    source = resolve_model_id(model_id)
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise LoadError(explain_load_failure("model", model_id, error)) from error
    wraps = type(config) in AutoModelForImageTextToText._model_mapping
    causal = type(config) in AutoModelForCausalLM._model_mapping or not wraps
    return source, AutoModelForCausalLM if causal else AutoModelForImageTextToText, config


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


def format_bytes(size: float) -> str:
    """A number of bytes in GiB, or MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


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
