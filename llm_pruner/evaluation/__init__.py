"""What a model is worth: likelihood, answers, tasks, speed; two models compared.

Imports the ground, model, data, lm_eval.
"""

from ..lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "likelihood": "mean_nll perplexity",
        "generation": "ModelEvaluator",
        "tasks": "HolisticEvaluator final_number",
        "similarity": "similarity_floor",
        "quality_comparison": "compare_quality",
        "cost_comparison": "compare_cost",
        ".lm_eval.harness": "run_tasks",
        ".lm_eval.task_results": "compare_results",
    },
)
