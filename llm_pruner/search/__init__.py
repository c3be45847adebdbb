"""Which layers cost least: objectives, measured without layers, and the search over sets.

Imports the ground, engines, model, data, evaluation.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "objectives": "OBJECTIVES",
        "removal_quality": "RemovalQuality",
        "layer_search": "search_layers",
    },
)
