"""Results as text for people."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Any

from ..results import Comparison, DepthCurve, Manifest, PruningPlan, PruningReport

GROUPS = ("size", "speed", "text", "tasks", "answers")
UNCLEAR = "~"


def plan_text(plan: PruningPlan) -> str:
    """A plan for people: the scores, and what would go."""
    lines = []
    if plan.scores is not None:
        lines.append(f"layer  {plan.scores.unit}")
        for layer, score in plan.scores.items():
            mark = "  remove" if layer in plan.remove else ""
            lines.append(f"{layer:5d}  {score:+.6g}{mark}")
    for step in plan.steps:
        what = f"cut layer {step['layer']}" if step["action"] == "cut" else ""
        if step["action"] == "exchange":
            what = f"removed {step['in']} instead of {step['out']}"
        elif step["action"] == "repair":
            what = f"repaired ({step['method']})"
        undone = "" if step["kept"] else ", rolled back"
        lines.append(
            f"{what}: total change {step['change']:+.4f} on {step['samples']} samples{undone}"
        )
    lines.append(_headline("Would remove", plan))
    if plan.held_out:
        lines.append(f"Its cost: {_held_out(plan.held_out)}")
    return "\n".join(lines) + "\n"


def _held_out(held: dict[str, Any]) -> str:
    return (
        f"{held['change']:+.1%} (95 % interval {held['low']:+.1%} to {held['high']:+.1%}), "
        f"{held['unit']}, {held['items']} unseen items"
    )


def curve_text(curve: DepthCurve) -> str:
    """A curve for people: one row per number of layers."""
    lines = [f"{curve.unit} ({curve.strategy})", "", "     k   chosen on   unseen (95 % interval)"]
    for point in curve.points:
        row = f"{point['n_layers']:6d}{point['change']:>+12.1%}"
        if held := point["held_out"]:
            row += f"{held['change']:>+9.1%} ({held['low']:+.1%} to {held['high']:+.1%})"
        lines.append(f"{row}  {point['removed']}")
    return "\n".join(lines) + "\n"


def manifest_text(manifest: Manifest, plan: PruningPlan, output_dir: str) -> str:
    """What pruning on disk has written, for people."""
    hashed = all(entry["sha256"] for entry in manifest.tensors.values())
    how = "every byte compared, reloaded" if hashed else "compared by name, shape and size"
    return (
        f"{_headline('Removed', plan)}\n\n"
        f"{manifest.bytes_after / 1e6:,.2f} of {manifest.bytes_before / 1e6:,.2f} MB kept, "
        f"{len(manifest.tensors)} tensors, bit for bit ({how}).\n"
        f"Checkpoint: {output_dir}\n{_cost(plan)}\n"
    )


def saved_text(plan: PruningPlan, output_dir: str) -> str:
    """That a plan was carried out in memory and not measured, for people."""
    return (
        f"{_headline('Removed', plan)}\n\nCheckpoint, reloaded and verified: {output_dir}\n"
        f"{_cost(plan)}\n"
    )


def _cost(plan: PruningPlan) -> str:
    if plan.held_out:
        return f"Cost of the cut: {_held_out(plan.held_out)}."
    return "What this costs was not measured: --eval-dataset does."


def _headline(verb: str, plan: PruningPlan) -> str:
    return (
        f"{verb} {len(plan.remove)} of {plan.num_layers} layers (0-based): {list(plan.remove)}  "
        f"[{plan.strategy}]"
    )


def report_text(report: PruningReport) -> str:
    """A report for people: one row per quantity, before and after, by group."""
    lines = [_headline("Removed", report.plan), ""]
    lines.append(f"{'':30}{'before':>12}{'after':>12}{'change':>10}   95 % interval")
    rows = sorted(report.comparisons, key=lambda row: GROUPS.index(row.group))
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [group, *map(_comparison, members)]
    if any(row.verdict == "unclear" for row in rows):
        lines.append(f"{UNCLEAR} not told apart from no change: the interval holds 0.")
    for sample in report.samples:
        prompt = textwrap.shorten(sample["prompt"], 72)
        full, cut = (textwrap.shorten(sample[key], 40) for key in ("before", "after"))
        lines += ["", prompt] if sample is report.samples[0] else [prompt]
        lines.append(f"  before: {full}   after: {cut}")
    lines += ["", _footnote(report)]
    return "\n".join(lines) + "\n"


def _comparison(row: Comparison) -> str:
    """One row: changes of size and speed in percent, others in their own unit."""
    style = _style(row.before, row.after)
    values = f"{style.format(row.before):>12}{style.format(row.after):>12}"
    relative = row.group in ("size", "speed") and row.before != 0

    def change(number: float) -> str:
        if relative:
            return f"{number / row.before:+.1%}"
        return style.replace(":", ":+").format(number)

    name = f"{row.name} ({row.unit})" if row.unit else row.name
    line = f"  {name:28}{values}"
    line += f"{change(row.change):>10}"
    if row.low is not None and row.high is not None:
        line += f"   {change(row.low)} to {change(row.high)}"
    line += f" {UNCLEAR}" * (row.verdict == "unclear")
    return line if row.floor is None else f"{line}   (floor {style.format(row.floor)})"


def _style(*values: float) -> str:
    """A format for numbers of this size."""
    largest = max(map(abs, values))
    if largest >= 1000 or (largest >= 3 and all(value == int(value) for value in values)):
        return "{:,.0f}"
    return "{:,.1f}" if largest >= 100 else "{:,.2f}" if largest >= 20 else "{:,.3f}"


def _footnote(report: PruningReport) -> str:
    heal, healed = report.heal, ""
    if heal["method"] != "none":
        tasks = heal["cut_quality"]["tasks"]
        mean = f", task mean {tasks['mean']:.3f}" if tasks else ""
        healed = (
            f"{_repairs(heal)}\n"
            f"Without healing: perplexity {heal['cut_quality']['perplexity']:,.3f}{mean}.\n"
        )
    held = report.plan.held_out
    note = " (not healed)" if healed else ""
    return (
        f"Cost of the cut{note}: {_held_out(held)}.\n{healed}"
        f"Quality on {report.evaluation_data['items']} items that played no part in the choice.\n"
        f"Checkpoint, reloaded and verified: {report.output_dir}"
    )


def _repairs(heal: dict[str, Any]) -> str:
    """What each repair bought: losses on the items that judge them."""
    lost = heal["cut"] - heal["full"]
    lines = [f"Healing, held-out loss: {heal['full']:.4f} full, {heal['cut']:.4f} cut"]
    for stage in heal["stages"]:
        if "skipped" in stage:
            lines.append(f"  {stage['method']}: left out. {stage['skipped']}")
            continue
        verdict = "kept" if stage["kept"] else "no better, rolled back"
        back = f", {(heal['cut'] - stage['loss']) / lost:.0%} of the loss returned" * (lost > 0)
        lines.append(f"  {stage['method']}: {stage['loss']:.4f}{back} ({verdict})")
    return "\n".join(lines)
