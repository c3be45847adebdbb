"""Small results for tests of the report and of the figures."""

from __future__ import annotations

import math

import numpy as np

from llm_pruner.layer_scores import LayerScores
from llm_pruner.results import Comparison, DepthCurve, PruningPlan, PruningReport

UNIT = "angular distance (arccos(cos)/pi)"


def block_scores(depth=6, unknown=(), strategy="pruneme", **options):
    rng = np.random.default_rng(depth)
    blocks = [[float(v) for v in rng.random(depth - start)] for start in range(depth)]
    for start, length in unknown:
        blocks[start][length - 1] = math.nan
    scores = dict.fromkeys(range(depth), 0.0)
    return LayerScores(scores, strategy=strategy, unit=UNIT, blocks=blocks, **options)


COMPARISONS = [
    Comparison("perplexity", "text", "", 8.0, 10.0, False, 60, 1.0, 3.0, note="nats"),
    Comparison("arc_easy (acc)", "tasks", "", 0.5, 0.75, True, 20, -0.1, 0.6, floor=0.25),
    Comparison("own task", "tasks", "", 0.5, 0.75, True, 40, 0.1, 0.4),
    Comparison("task mean", "tasks", "", 0.5, 0.75, True, 60, -0.1, 0.4),
    Comparison("similarity", "answers", "", 0.9, 0.5, True, 20, -0.5, -0.3),
    Comparison("parameters", "size", "", 2_100_352, 1_608_064),
    Comparison("memory", "size", "MB", 8.4, 6.3, False),
    Comparison("generation", "speed", "tokens/s", 100.0, 130.0, True, 5, 20.0, 40.0),
]


def make_report(name="my/model", **changes):
    scores = block_scores(6, strategy=name)
    held = {"change": -0.1, "low": -0.2, "high": -0.05, "unit": "likelihood", "items": 60}
    plan = PruningPlan(name, 6, (2, 3), strategy=name, scores=scores, held_out=held)
    sample = dict.fromkeys(("prompt", "reference", "before", "after"), name)
    values = {"comparisons": COMPARISONS, "samples": [sample], "command": f"llm-pruner {name}"}
    values |= {"machine": {name: name}, "protocol": {"seed": 7, name: [name, None, True, 0.5]}}
    values |= {"evaluation_data": {"items": 60, "fingerprint": "abc"}, "versions": {name: name}}
    stages = [{"method": name, "loss": 1.25, "kept": True}, {"method": "lora", "skipped": name}]
    values |= {"heal": {"method": "linear", "full": 1.0, "cut": 2.0, "stages": stages}}
    return PruningReport(plan, "out", **{**values, **changes})


def make_depth_curve(
    changes, strategy="smart", measured=True, model_id="m", num_layers=80, unit="likelihood"
):
    """Points 1, 2, ...; on held-out data, if measured, 2 points worse, from 4 worse to 1 better."""
    points = []
    for count, change in enumerate(changes, 1):
        held = {"change": change - 0.02, "low": change - 0.04, "high": change + 0.01, "unit": unit}
        point = {"n_layers": count, "removed": list(range(count)), "change": change}
        points.append({**point, "held_out": held if measured else None})
    return DepthCurve(model_id, num_layers, strategy, unit, points)
