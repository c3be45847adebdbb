"""Results as text for the console."""

from __future__ import annotations

import shlex
import textwrap

from ..output_rules import PLAN_FILE
from ..results import Comparison, DepthCurve, PruningPlan, PruningReport, cost_texts
from ..storage.manifest import Manifest
from . import summary
from .summary import VERDICTS, held_out_text, label

UNCLEAR = "~"
UNMEASURED = "What this costs was not measured: use --eval-dataset."


def plan_text(plan: PruningPlan) -> str:
    """A plan: the scores, the steps of the search, and what would be removed."""
    lines = []
    if plan.scores is not None:
        lines.append(f"layer  {plan.scores.unit}")
        for layer, score in plan.scores.items():
            mark = "  remove" if layer in plan.remove else ""
            lines.append(f"{layer:5d}  {score:+.6g}{mark}")
    for step in plan.steps:
        rolled_back = "" if step["kept"] else ", rolled back"
        change = f"total change {step['change']:+.4f} on {step['samples']} items"
        lines.append(f"{summary.step_text(step)}: {change}{rolled_back}")
    lines.append(_headline("Would remove", plan))
    lines.append(f"Its cost: {held_out_text(plan.held_out)}" if plan.held_out else UNMEASURED)
    lines += [summary.GAINED] * summary.gained(plan)
    lines += filter(None, [summary.goals_text(plan), summary.engines_text(plan)])
    return "\n".join(lines) + "\n"


def curve_text(curve: DepthCurve) -> str:
    """A depth curve: one row per number of layers."""
    lines = [
        f"{curve.unit} ({curve.strategy})",
        "",
        "     k   chosen on   held out (95 % interval)",
    ]
    for point in curve.points:
        row = f"{point['n_layers']:6d}{point['change']:>+12.1%}"
        if held := point["held_out"]:
            change, interval = cost_texts(held)
            row += f"{change:>11} {interval}"
        lines.append(f"{row}  {point['removed']}")
    return "\n".join(lines) + "\n"


def manifest_text(manifest: Manifest, plan: PruningPlan, output_dir: str) -> str:
    """What pruning on disk has written."""
    how = "compared by name, shape and size"
    if manifest.sha256:
        gguf = any(file.endswith(".gguf") for file in manifest.files)
        how = f"every byte compared, {'re-read' if gguf else 'reloaded'}"
    return (
        f"{_headline('Removed', plan)}\n\n"
        f"{manifest.bytes_after / 1e6:,.2f} of {manifest.bytes_before / 1e6:,.2f} MB kept, "
        f"{manifest.tensors} tensors, bit for bit ({how}).\n"
        f"{_mtp(manifest)}{_left_behind(manifest)}{_serving(plan)}Checkpoint: {output_dir}\n"
        f"{_cost(plan)}\n"
    )


def _serving(plan: PruningPlan) -> str:
    """Which engines compute the result right, as a line; nothing where that is not known."""
    text = summary.engines_text(plan)
    return f"{text}\n" if text else ""


def _mtp(manifest: Manifest) -> str:
    """That blocks for multi-token prediction are kept, in one line; nothing without any."""
    count = manifest.mtp_tensors
    return (
        f"Kept behind the last layer, for multi-token prediction: {count} tensors.\n"
        if count
        else ""
    )


def _left_behind(manifest: Manifest) -> str:
    """The first files of the source that did not come along, in one line; nothing without any."""
    left = manifest.left_behind
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"Not carried along: {', '.join(left[:3])}{more}.\n" if left else ""


def saved_text(plan: PruningPlan, output_dir: str) -> str:
    """That a plan was carried out in memory, without measuring the result."""
    return (
        f"{_headline('Removed', plan)}\n\n{_serving(plan)}"
        f"Checkpoint, reloaded and verified: {output_dir}\n{_cost(plan)}\n"
    )


def _cost(plan: PruningPlan, note: str = "") -> str:
    if plan.held_out:
        return f"Cost of the cut{note}: {held_out_text(plan.held_out)}."
    return UNMEASURED


def _headline(verb: str, plan: PruningPlan) -> str:
    line = (
        f"{verb} {len(plan.remove)} of {plan.num_layers} layers (0-based): {list(plan.remove)}  "
        f"[{plan.strategy}]"
    )
    return "\n".join(filter(None, [line, summary.lineage_text(plan)]))


def output_text(
    plan: PruningPlan, report: PruningReport | None, manifest: Manifest | None, folder: str
) -> str:
    """What was done to the model in a folder, and how to do it again.

    Args:
        report: what was measured, if something was.
        manifest: where its tensors came from, if it was pruned on disk.
    """
    if report is not None:
        text = report_text(report)
    elif manifest is not None:
        text = manifest_text(manifest, plan, folder)
    else:
        text = saved_text(plan, folder)
    source, method = plan.data.get("source"), plan.healing.get("method", "none")
    heal = "" if method == "none" else f" --heal {method}"
    asked = [f"{name}={value}" for name, value in plan.options.items() if name != "goals"]
    lines = [
        f"Made from {plan.model_id or 'a model in memory'} ({plan.num_layers} layers).",
        *[f"Chosen with: {', '.join(asked)}." for _ in asked[:1]],
        *[f"Chosen on {plan.data['items']} items of {source}." for _ in [source] if source],
        *[f"Made by: {report.command}" for report in [report] if report and report.command],
        "To do it again:",
        f"  llm-pruner --model {shlex.quote(plan.model_id or 'MODEL')} --plan "
        f"{shlex.quote(f'{folder}/{PLAN_FILE}')}{heal} --output NEW",
    ]
    return text + "\n" + "\n".join(lines) + "\n"


def report_text(report: PruningReport) -> str:
    """A report: one row per quantity, before and after, by group."""
    lines = [_headline("Removed", report.plan), ""]
    head = f"{'':30}{'before':>12}{'after':>12}{'change':>10}{'n':>7}   95 % interval"
    lines.append(head)
    for group, members in summary.by_group(report.comparisons).items():
        lines += [group, *map(_comparison, members)]
    if any(entry.verdict == "unclear" for entry in report.comparisons):
        lines.append(f"{UNCLEAR} {VERDICTS['unclear']}: the interval contains 0.")
    lines.append("n: items or token sequences, or timed runs, behind both values.")
    if report.samples:
        lines.append("")
    for sample in report.samples:
        before, after = (textwrap.shorten(sample[key], 40) for key in ("before", "after"))
        lines.append(textwrap.shorten(sample["prompt"], 72))
        lines.append(f"  before: {before}   after: {after}")
    lines += ["", _footnote(report)]
    return "\n".join(lines) + "\n"


def _comparison(entry: Comparison) -> str:
    """One row: changes of size and speed in percent, others in their own unit."""
    style = _style(entry.before, entry.after)
    values = f"{style.format(entry.before):>12}{style.format(entry.after):>12}"
    relative = entry.group in ("size", "speed") and entry.before != 0

    def change(number: float) -> str:
        if relative:
            return f"{number / entry.before:+.1%}"
        return style.replace(":", ":+").format(number)

    count = "" if entry.count is None else f"{entry.count:,}"
    line = f"  {label(entry):28}{values}{change(entry.change):>10}{count:>7}"
    if entry.low is not None and entry.high is not None:
        line += f"   {change(entry.low)} to {change(entry.high)}"
    line += f" {UNCLEAR}" * (entry.verdict == "unclear")
    line = line if entry.floor is None else f"{line}   (floor {style.format(entry.floor)})"
    return line.rstrip()


def _style(*values: float) -> str:
    """A format for a column of numbers of this size."""
    largest = max(map(abs, values))
    if largest >= 1000 or (largest >= 3 and all(value == int(value) for value in values)):
        return "{:,.0f}"
    return "{:,.1f}" if largest >= 100 else "{:,.2f}" if largest >= 20 else "{:,.3f}"


def _footnote(report: PruningReport) -> str:
    heal, healing = report.heal, []
    if heal["method"] != "none":
        losses = f"{heal['full']:.4f} full, {heal['cut']:.4f} cut"
        healing = [f"Healing, loss on held-out items of its own: {losses}"]
        for method, loss, returned, outcome in summary.healing_stages(heal):
            back = f", {returned} of the loss returned" if returned else ""
            result = f"{loss}{back} ({outcome})" if loss else outcome
            healing.append(f"  {method}: {result}")
    checked = report.protocol.get("checkpoint", "reloaded and verified")
    lines = [
        *filter(None, [summary.goals_text(report.plan, report.comparisons)]),
        _cost(report.plan, " (not healed)" if healing else ""),
        *healing,
        *summary.remarks(report),
        f"Quality on {summary.evaluated_on(report)}.",
        *filter(None, [summary.engines_text(report.plan)]),
        f"Checkpoint, {checked}: {report.output_dir}",
    ]
    return "\n".join(lines)
