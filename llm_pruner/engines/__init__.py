"""What the programs that serve models take a layer for, as data; and whether that is right.

Imports the ground, config.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "serving": "Serving",
        "verdict": "ENGINES Verdict judge judge_all",
    },
)
