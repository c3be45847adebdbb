"""Which files of a checkpoint come along with the pruned weights, and which stay behind.

Every road writes the same ones. What is not known to be harmless stays behind: the next format of
weights would otherwise lie beside the pruned ones at its full depth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from ..output_rules import PLAN_FILE
from ..report.model_card import CARD_FILE
from ..storage.sources import INDEX_FILE, PICKLES, Source

MODULES_FILE = "modules.json"  # of sentence-transformers: the folders of what follows the model
# What a pruned checkpoint has of its own.
WRITTEN_ANEW = (
    INDEX_FILE,
    "config.json",
    PLAN_FILE,
    "pruning_manifest.json",
    CARD_FILE,
    "pruning_report.json",
    "report.html",
)
# Tokenizers, settings, templates, code, documents and pictures.
CARRIED_SUFFIXES = tuple(
    ".json .jsonl .model .tiktoken .spm .bpe .vocab .codes .jinja .jinja2 .j2 .template .yaml .yml "
    ".toml .cfg .ini .py .pyi .c .cc .cpp .cu .cuh .h .hpp .sh .bat .ipynb .txt .md .rst .html "
    ".css .js .tex .bib .pdf .csv .tsv .png .jpg .jpeg .gif .svg .webp .bmp .ico .mp3 .mp4 .wav "
    ".flac .mov .webm .ttf .otf".split()
)
CARRIED_NAMES = re.compile(
    r"(licen[cs]e|notice|copying|copyright|authors|citation|changelog|readme|acknowledg\w*|"
    r"version|makefile|[.]gitattributes|dockerfile|merges|vocab|third.party.*)([-_. ]\w[\w.-]*)?|"
    r"tokenizer\.model\.v\d+\w*|.*\.sentencepiece",
    re.IGNORECASE,
)
# Suffixes of weights: the files around these in a folder belong to them.
WEIGHT_SUFFIXES = (
    *PICKLES,
    *".safetensors .gguf .ggml .llamafile .h5 .keras .msgpack .ot .onnx .onnx_data .data .npz .npy "
    ".pkl .pickle .joblib .tflite .litertlm .task .pte .ptl .mlmodel .rten .mnn .weight .rkllm "
    ".engine .plan .nemo .tensors .distcp .mar .pb .pdparams .caffemodel .exl2 .exl3 "
    ".tar .gz .tgz .bz2 .xz .zst .zip .7z .rar".split(),
)
LARGE = 10_000_000  # bytes: a file of no known kind that has more holds weights
# Names of what describes weights that stay behind, or a training that is over.
DESCRIPTIONS = re.compile(
    r".*\.index\.json|params\.json|openvino_.*|ov_config\.json|genai_config\.json|"
    r"ndarray-cache.*\.json|tensor-cache\.json|mlc-chat-config\.json|llm_config\.json|"
    r".+\.(curve|partial_plan)\.json|.+\.journal\.jsonl|"  # beside an output of llm_pruner
    r"adapter_config\.json|adapter_model\..*|trainer_state\.json|zero_to_fp32\.py|Modelfile"
)
EXPORTS = re.compile(
    r"original|onnx|openvino|coreml|tflite|tensorrt|gguf|mlc|metal|executorch|"
    r".*\.(mlpackage|mlmodelc)|checkpoint-\d+|global_step_?\d+|runs|wandb",
    re.IGNORECASE,
)


def side_files(source: Source, pruned: Collection[str]) -> tuple[list[str], list[str]]:
    """The files to carry along byte for byte, and those to leave behind; both sorted.

    Neither list has what is written anew, or hidden files but .gitattributes. A folder with
    weights in it stays behind as a whole, unless `MODULES_FILE` names it.

    Args:
        source: the checkpoint.
        pruned: its files of weights that are pruned: in neither list.
    """
    files = [file for file in source.files() if file not in WRITTEN_ANEW and not _is_hidden(file)]
    others = [file for file in files if file not in pruned]
    modules = _module_folders(source) if MODULES_FILE in others else ()
    folders = {
        file.partition("/")[0]
        for file in others
        if "/" in file and not file.startswith(modules) and _belongs_to_weights(source, file)
    }
    outputs = _output_folders(others)
    carried = [
        file
        for file in others
        if not file.startswith(outputs) and _is_carried(file, modules, folders)
    ]
    return carried, sorted(set(others).difference(carried))


def _output_folders(files: Collection[str]) -> tuple[str, ...]:
    """The folders below a checkpoint that outputs of llm_pruner lie in."""
    plans = (file for file in files if file.endswith(f"/{PLAN_FILE}"))
    return tuple(file.removesuffix(PLAN_FILE) for file in plans)


def _is_hidden(file: str) -> bool:
    parts = file.split("/")
    return file != ".gitattributes" and any(part.startswith(".") for part in parts)


def _is_carried(file: str, modules: tuple[str, ...], folders: set[str]) -> bool:
    if file.startswith(modules):
        return True
    folder, _, _ = file.rpartition("/")
    if folder and file.partition("/")[0] in folders:
        return False
    name = file.rpartition("/")[2]
    if DESCRIPTIONS.fullmatch(name) or name.lower().endswith(WEIGHT_SUFFIXES):
        return False
    return _is_known(name)


def _is_known(name: str) -> bool:
    return name.lower().endswith(CARRIED_SUFFIXES) or CARRIED_NAMES.fullmatch(name) is not None


def _belongs_to_weights(source: Source, file: str) -> bool:
    """Whether this file shows that its folder holds weights, or a model for another program."""
    folder, _, path = file.partition("/")
    name = path.rpartition("/")[2]
    if EXPORTS.fullmatch(folder) or name == "adapter_config.json":
        return True
    if name.lower().endswith(WEIGHT_SUFFIXES):
        return True
    return not _is_known(name) and source.size(file) > LARGE


def _module_folders(source: Source) -> tuple[str, ...]:
    """The folders of what follows the model in a sentence-transformers pipeline."""
    try:
        found = json.loads(source.read(MODULES_FILE, 0, source.size(MODULES_FILE)))
    except ValueError as error:
        raise source.broken(MODULES_FILE, f"not valid JSON: {error}") from error
    modules = [entry for entry in found if isinstance(entry, dict)] if type(found) is list else []
    paths = [
        str(entry.get("path") or "").strip("/")
        for entry in modules
        if not str(entry.get("type")).endswith(".Transformer")
    ]
    return tuple(f"{path}/" for path in paths if path)
