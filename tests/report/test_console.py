"""Results as text for the console."""

from __future__ import annotations

from dataclasses import replace

from llm_pruner.report.console import plan_text, report_text
from llm_pruner.results import Comparison, PruningPlan, PruningReport


def test_a_report_for_people():
    """Groups in their order, changes of size in percent, what is not told apart marked."""
    plan = PruningPlan("m", 4, (1,), held_out={
        "change": -0.1, "low": -0.2, "high": -0.05, "unit": "u", "items": 9,
    })  # fmt: skip
    rows = [
        Comparison("perplexity", "text", "", 2.0, 2.5, False, 9, 0.25, 0.75),
        Comparison("task mean", "tasks", "", 0.5, 0.4375, True, 9, -0.125, 0.0, floor=0.25),
        Comparison("decode", "speed", "tokens/s", 1000.0, 1250.0, True, 6, 100.0, 300.0),
        Comparison("parameters", "size", "", 1_000_000, 750_000, False),
    ]
    report = PruningReport(plan, "out", rows, {"method": "none"}, {"items": 9})
    lines = report_text(report).splitlines()
    assert [" ".join(line.split()) for line in lines[2:12]] == [
        "before after change n 95 % interval",
        "size",
        "parameters 1,000,000 750,000 -25.0%",
        "speed",
        "decode (tokens/s) 1,000 1,250 +25.0% 6 +10.0% to +30.0%",
        "text",
        "perplexity 2.000 2.500 +0.500 9 +0.250 to +0.750",
        "tasks",
        "task mean 0.500 0.438 -0.062 9 -0.125 to +0.000 ~ (floor 0.250)",
        "~ no clear difference: the interval contains 0.",
    ]
    sure = replace(report, comparisons=rows[:1])
    assert "~" not in report_text(sure)


def test_plan_and_report_read_well():
    plan = PruningPlan("demo", 12, (3, 4), strategy="smart")
    want = (
        "layers (0-based): [3, 4]  [smart]\nWhat this costs was not measured: use --eval-dataset.\n"
    )
    assert plan_text(plan).endswith(want)
