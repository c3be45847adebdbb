"""Pruned checkpoints in memory, written, verified by reloading and published in one step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_output import PLAN_FILE, staged_output
from ..model.architecture_rules import as_stored, loadable_config
from ..report.model_card import CARD_FILE, card_text, original_card
from ..results import PruningPlan
from ..utils import count_bytes
from .verify import verify_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SIDE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@contextmanager
def new_checkpoint(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Write and verify a checkpoint; publish it, with what the block adds, when the block ends.

    Yields:
        The folder that becomes `output_dir`; it holds everything but the model card.

    Raises:
        OutputError: it cannot be written.
        VerificationError: it does not load cleanly, or computes something else than `pruned`.
    """
    with staged_output(output_dir, overwrite=overwrite, need=count_bytes(pruned)) as stage:
        write_model(pruned, stage)
        tokenizer.save_pretrained(stage)
        _carry_along(pruned, stage)
        plan.save(stage / PLAN_FILE)
        verify_checkpoint(stage, pruned)
        yield stage


def save_checkpoint(
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PruningPlan,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write a complete plain checkpoint with its plan and card; see `new_checkpoint`."""
    with new_checkpoint(pruned, tokenizer, plan, output_dir, overwrite=overwrite) as stage:
        card = card_text(plan, original_card(plan.model_id))
        (stage / CARD_FILE).write_text(card, encoding="utf-8")


def _carry_along(model: Any, stage: Path) -> None:
    """Copy the original checkpoint's processor settings."""
    from transformers.utils.hub import cached_file

    source = getattr(model.config, "_name_or_path", "")
    for name in SIDE_FILES if source else ():
        found = cached_file(
            source,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if found and not (stage / name).exists():
            shutil.copyfile(found, stage / name)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, with a config and weights that load as the model that was saved."""
    with as_stored(model):
        model.save_pretrained(folder)
    config = loadable_config(model)
    if config is not model.config:
        config.save_pretrained(folder)
    _drop_missing_code(folder / "config.json")


def _drop_missing_code(path: Path) -> None:
    """Leave no reference to code that was not written: such a checkpoint would not load.

    Nobody trusted that code, or it belongs to classes for other tasks.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    code = config.get("auto_map") or {}
    there = {
        name: reference
        for name, reference in code.items()
        if not isinstance(reference, str)  # a tokenizer's, which is written by itself
        or "--" in reference  # in another repository
        or (path.parent / f"{reference.rpartition('.')[0]}.py").exists()
    }
    if there != code:
        config["auto_map"] = there
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
