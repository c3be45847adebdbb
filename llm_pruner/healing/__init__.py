"""Repairing the weights of a pruned model: closed form and training, each judged."""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "heal": "heal_model",
        "lora_settings": "LoraSettings",
    },
)
