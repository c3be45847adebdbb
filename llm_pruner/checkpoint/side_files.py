"""stub"""

from .sources import INDEX_FILE, PICKLES

WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")
A = (
    INDEX_FILE,
    "config.json",
    "pruning_plan.json",
    "pruning_manifest.json",
    "README.md",
    "pruning_report.json",
    "report.html",
)


def side_files(source):
    return [
        f
        for f in source.files()
        if f not in A
        and not f.endswith((*WEIGHTS, ".index.json"))
        and not any(p.startswith(".") for p in f.split("/"))
    ], []
