"""Evaluation and calibration items: from benchmarks, files and the hub to token batches.

Imports the ground.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "hub_datasets": "load_dataset_from_hub upload_dataset_to_hub",
        "row_formats": "DATASETS normalize_item",
        "sampling": "DataSplit load_data load_eval_dataset safe_sample split_items",
        "items": "EvalItem",
    },
)
