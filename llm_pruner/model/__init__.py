"""A model and its decoder layers: load, run, find, bypass, remove.

Imports the ground, config, storage.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "loading": "load_model",
        "layer_stack": "LayerStack",
    },
)
