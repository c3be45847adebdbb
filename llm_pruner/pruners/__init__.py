"""The strategies: which decoder layers a model can do without.

Imports the ground, config, engines, storage, model, offload, data, evaluation, search, healing, checkpoint, goals.
"""  # noqa: E501

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "base": "BasePruner",
        "measured": "AblationPruner MeasuredPruner SmartPruner",
        "similarity": "BlockInfluencePruner PruneMePruner SimilarityPruner",
        "avss": "AVSSPruner",
        "healing_search": "Repairs",
        "registry": "get_strategy register_strategy",
    },
)
