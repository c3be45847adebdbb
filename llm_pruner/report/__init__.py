"""Results for people: text for the console, a page to share, a model card.

Imports the ground, storage, visualization.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "figures": "report_figures save_figures",
        "html_page": "write_html",
        "model_card": "write_card",
    },
)
