"""Models larger than the memory: layers are read from the checkpoint one after the other.

Imports the ground, config, storage, model.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "offloaded_stack": "load_streamed load_within",
    },
)
