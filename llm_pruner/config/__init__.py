"""What a checkpoint's settings say of its layers, and how they follow a removal; no torch.

Imports the ground.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config_file": "NeedsMemoryError",
        "layer_names": "LayerNames",
        "rules": "prune_config",
    },
)
