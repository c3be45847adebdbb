"""Checkpoints: pruned on disk or from memory, verified, published in one step.

Imports the ground, config, engines, storage, model, report.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "gguf": "fix_gguf",
        "on_disk": "check_manifest prune_checkpoint",
        "mergekit": "write_mergekit_yaml",
        "verify": "verify_checkpoint verify_removal",
    },
)
