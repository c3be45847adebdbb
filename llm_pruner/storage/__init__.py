"""Where checkpoints lie: folders, the hub and its cache; their tensors as headers and bytes.

Imports the ground, config.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "sources": "open_source",
        "safetensors_files": "read_checkpoint",
        "manifest": "Manifest tensor_origin",
        "origin": "model_identity",
    },
)
