"""The model card of a pruned checkpoint: ``README.md`` with the metadata that the hub reads."""

from __future__ import annotations

import os
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_output import write_atomically
from ..errors import OutputError
from ..hub import http_error
from ..results import Comparison, PruningPlan, PruningReport
from ..utils import logger, readable, regular_file, user_path
from . import summary

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


CARD_FILE = "README.md"
TAGS = ("llm_pruner", "depth-pruning", "pruned")
# What holds for a pruned model as for its source; results, widgets and access rules do not.
CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
MAX_METADATA = 1_000_000  # characters; long lists of results are in it
MAX_FIELD = 100_000  # characters of one field
MAX_READ = 4 * MAX_METADATA  # bytes of a card: what follows its metadata is not used
NOTHING: tuple[Any, ...] = (
    "",
    "~",
    "null",
    "Null",
    "NULL",
    [],
)  # how YAML writes that there is nothing
# The hub knows finetune, adapter, merge and quantized; the first is nearest to a pruned model.
RELATION = "finetune"


def write_card(report: PruningReport, folder: str | Path) -> None:
    """Write the model card of a pruned checkpoint as ``README.md`` into its folder.

    Licence, language, datasets, tags and pipeline are those of the card that was saved with the
    checkpoint, or of the original model's; the scores of the tasks become evaluation results.
    Names are escaped.

    Raises:
        OutputError: the card cannot be written, or the folder has one that is not by llm_pruner.
    """
    path = Path(folder) / CARD_FILE
    try:
        there = _beginning(path) if os.path.lexists(path) else None
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{str(path)!r} cannot be read ({reason}): move it away.") from None
    if there is not None and TAGS[0] not in _metadata(there)["tags"]:
        raise OutputError(
            f"{str(path)!r} is a model card that llm_pruner did not write: move it, or write to "
            "another folder."
        )
    original = there or original_card(report.plan.model_id)
    write_atomically(path, card_text(report.plan, original, report, gguf=pruned_gguf(folder)))


def pruned_gguf(folder: str | Path) -> str:
    """The name of the pruned GGUF file, or of its first part, in a folder; empty without any."""
    return min((found.name for found in Path(folder).glob("*-pruned*.gguf")), default="")


def original_card(model_id: str | Path) -> str:
    """The beginning of a model's card, with all its metadata; empty if it cannot be read.

    It is read from the model's folder or from the hub.
    """
    try:
        folder = user_path(model_id)
        if os.path.isdir(folder):
            path = folder / CARD_FILE
            return _beginning(path) if os.path.lexists(path) else ""
        if not _is_hub_id(model_id):
            return ""
        from huggingface_hub import hf_hub_download

        return _beginning(Path(hf_hub_download(str(model_id), CARD_FILE)))
    except (OSError, ValueError, http_error()) as error:
        message = "No card of %s can be read (%.200s): add the licence to %s yourself."
        logger.info(message, model_id, " ".join(str(error).split()), CARD_FILE)
    return ""


def _beginning(path: Path) -> str:
    with regular_file(path).open("rb") as file:
        return file.read(MAX_READ).decode("utf-8", "replace")


def card_text(
    plan: PruningPlan, original: str = "", report: PruningReport | None = None, *, gguf: str = ""
) -> str:
    """The card of a model pruned by `plan`.

    Args:
        original: the card of the original model, whose metadata is carried over.
        report: what was measured, if something was.
        gguf: name of the file, or of the first, of a model in GGUF.
    """
    from huggingface_hub import ModelCard, ModelCardData

    meta: dict[str, Any] = _metadata(original)
    theirs = meta.pop("tags")
    meta.setdefault("pipeline_tag", "text-generation")
    if _is_hub_id(plan.model_id):
        meta |= {"base_model": str(plan.model_id), "base_model_relation": RELATION}
    name = f"{Path(plan.model_id).name.removesuffix('.gguf') or 'model'}-pruned"
    results = _eval_results(report.comparisons) if report else []
    if results:
        meta |= {"eval_results": results, "model_name": name}
    library = "gguf" if gguf else "transformers"
    data = ModelCardData(library_name=library, tags=[*TAGS, *theirs], **meta)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(name, plan, report, gguf)}"
    return str(ModelCard(readable(text)))


def _metadata(card: str) -> dict[str, str | list[str]]:
    """What a card's metadata says in the fields `CARRIED`, and a list of ``tags``.

    The card is foreign: of these fields only text and lists of texts are taken.
    """
    kept: dict[str, str | list[str]] = {"tags": []}
    fields = _fields(card)
    for name in (*CARRIED, "tags"):
        values = [value for value in map(_texts, fields.get(name, ())) if value not in NOTHING]
        if not values:
            continue
        if len(values) == 1 and isinstance(values[0], list if name == "tags" else list | str):
            kept[name] = values[0]
        else:
            logger.info("The original card's %s is no text or list of texts: left out.", name)
    return kept


def _fields(card: str) -> dict[str, list[Any]]:
    """The YAML nodes of each field of a card's metadata, several where the field is repeated.

    Nodes are texts: nothing is built of them, neither dates nor objects, nor what references
    would multiply.
    """
    import yaml

    begin = re.match(r"\s*---[\r\n]+", card)
    if begin is None:
        return {}
    text = card[begin.end() : begin.end() + MAX_METADATA]
    end = re.search(r"[\r\n]---(?=[\r\n]|\Z)", text)
    if end is None:
        logger.info("The metadata of the original card has no end and is skipped.")
        return {}
    try:
        root: Any = yaml.compose(text[: end.start()], yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        logger.info("The metadata of the original card is not YAML and is skipped: %.300s", reason)
        return {}
    found: dict[str, list[Any]] = {}
    if root is not None and root.id == "mapping":
        for name, node in (pair for pair in root.value if pair[0].id == "scalar"):
            found.setdefault(name.value, []).append(node)
    return found


def _texts(node: Any) -> str | list[str] | None:
    """The text or the list of texts that a YAML node is; None if it is neither."""
    parts = node.value if node.id == "sequence" else [node]
    if any(part.id != "scalar" for part in parts):
        return None
    texts = [part.value for part in parts]
    if sum(map(len, texts)) > MAX_FIELD:
        return None
    if any(text != text.encode("utf-8", "replace").decode() for text in texts):  # half characters
        return None
    return texts if node.id == "sequence" else texts[0]


def _is_hub_id(model_id: str | Path) -> bool:
    name = str(model_id)
    return (
        re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII) is not None
        and not name.startswith(".")
        and not os.path.exists(name)
    )


def _eval_results(comparisons: list[Comparison]) -> list[EvalResult]:
    """The pruned model's score in each task, as the hub lists them."""
    from huggingface_hub import EvalResult

    results = []
    for entry in comparisons:
        if entry.group != "tasks" or entry.name == "task mean":
            continue
        task, metric = re.fullmatch(r"(.*?)(?: \(([\w,. -]+)\))?", entry.name, re.DOTALL).groups()  # type: ignore[union-attr]
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"\W+", "_", task.lower()),
                dataset_name=task,
                metric_type=metric or "score",
                metric_value=entry.after,
            )
        )
    return results


def _body(name: str, plan: PruningPlan, report: PruningReport | None, gguf: str) -> str:
    source = inert(plan.model_id if _is_hub_id(plan.model_id) else Path(plan.model_id).name)
    serving = inert(summary.engines_text(plan))
    lineage = f" {inert(summary.lineage_text(plan))}".rstrip()
    return f"""# {inert(name)}

{source or "A model"} with {summary.removed_text(plan)} (0-based).{lineage} Nothing but \
the number of layers differs in its architecture.{" " if serving else ""}{serving}

## What it cost

{_cost(plan, report)}

## How to use it

{_usage(name, gguf)}

## How it was made

{_history(plan, report)}
"""


def _usage(name: str, gguf: str) -> str:
    """How to run the model, as a block of code."""
    folder = re.sub(r"[^\w./-]", "_", name, flags=re.ASCII)
    if gguf:
        file = re.sub(r"[^\w./-]", "_", gguf, flags=re.ASCII)
        return f"""```bash
llama-cli -m path/to/{file}
```

In transformers, which reads GGUF of many architectures:

{_loading(f'"path/to", gguf_file="{file}"')}"""
    return _loading(f'"path/to/{folder}"')


def _loading(what: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({what})
tokenizer = AutoTokenizer.from_pretrained({what})
```"""


def _cost(plan: PruningPlan, report: PruningReport | None) -> str:
    lines = []
    if held := plan.held_out:
        kinds = {inert(kind): one for kind, one in held.get("kinds", {}).items()}
        cost = summary.held_out_text({**held, "unit": inert(held["unit"]), "kinds": kinds})
        lines.append(f"The cut alone: {cost}.\n")
    if goals := summary.goals_text(plan, report.comparisons if report else ()):
        lines.append(f"{inert(goals)}\n")
    if report is not None and report.comparisons:
        lines += ["| | before | after | change (95 % interval) | |", "|---|---:|---:|---:|---|"]
        entries = chain.from_iterable(summary.by_group(report.comparisons).values())
        lines += [f"| {' | '.join(map(inert, summary.cells(entry)))} |" for entry in entries]
        source = summary.evaluated_on(report)
        lines += ["", summary.CLEAR + (f" Measured on {source}." if source else "")]
    if report is not None:
        lines += [f"\n{inert(text)}" for text in summary.remarks(report)]
    return "\n".join(lines) or "This was not measured."


def _history(plan: PruningPlan, report: PruningReport | None) -> str:
    method = plan.healing.get("method", "none")
    healed = f"healed with {inert(method)}" if method != "none" else "not healed"
    versions = (report.versions if report else {}) or plan.versions
    listed = ", ".join(f"{inert(name)} {inert(version)}" for name, version in versions.items())
    measured = ", what was measured in `pruning_report.json` and `report.html`" if report else ""
    edited = " The plan was edited by hand: what it said was measured is left out."
    lines = [
        f"Layers chosen by: {inert(plan.strategy)}. Weights: {healed}. "
        f"Made with {listed or 'llm_pruner'}.",
        f"The plan is in `pruning_plan.json`{measured}.{edited if plan.edited else ''}",
    ]
    if report and report.command:
        fence = "`" * (3 + max(map(len, re.findall("`+", report.command)), default=0))
        lines.append(f"{fence}bash\n{' '.join(report.command.split())}\n{fence}")
    return "\n\n".join(lines)


def inert(text: object) -> str:
    """`text` on one line, read as plain text by Markdown, also in a table, and by HTML."""
    line = " ".join(str(text).split())
    line = "".join(c for c in line if c.isprintable())
    escaped = re.sub(r"([\\`*_\[\]|~@$]|:(?! )|^[#+=>-]|(?<=\bwww)\.)", r"\\\1", line)
    escaped = re.sub(r"^(\d+)([.)])(?= |$)", r"\1\\\2", escaped)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
