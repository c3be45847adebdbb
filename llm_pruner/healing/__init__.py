"""Healing a pruned model's weights, in closed form or by training; each result is judged.

Imports the ground, model, data, evaluation.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "heal": "HEALERS heal_model",
        "job": "Healing HealingJob",
        "linear": "heal_linear",
        "lora": "heal_full heal_lora",
        "lora_settings": "LoraSettings",
        "own_words": "self_generated",
    },
)
