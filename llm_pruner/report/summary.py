"""What the console text, the page and the model card all say: order, numbers, words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..results import CONTEXT, Comparison, PruningPlan, PruningReport, cost_text
from ..utils import counted

MINUS = "\u2212"
LITTLE = 0.01  # nats per token, of which no share is given
MUCH = 2.0  # times the full model's perplexity, from which on a model is of little use
GROUPS = {  # of comparisons, in the order of every report, with their titles
    "size": "Size",
    "speed": "Speed",
    "text": "Likelihood of text",
    "tasks": "Tasks",
    "answers": "Answers",
}
VERDICTS = {"worse": "worse", "better": "better", "unclear": "no clear difference"}
IN_GGUF = "in GGUF, re-read"  # how such a checkpoint was checked, in a report's protocol
UNTIMED = (
    "Speed was not measured: transformers computes with the file's weights dequantised, and "
    "llama.cpp's speed is what counts (llama-bench)."
)
CLEAR = (
    "A difference is called clear where its 95 % interval, paired item by item, does not contain 0."
)


def removed_text(plan: PruningPlan) -> str:
    """``3 of 12 layers removed: 2, 7, 8``."""
    layers = ", ".join(map(str, plan.remove))
    return f"{len(plan.remove)} of {plan.num_layers} layers removed: {layers}"


def lineage_text(plan: PruningPlan) -> str:
    """Which layers of the original go, and which are gone then; empty if it is the original.

    ``That is layers 20-25 and 27 of the original 30 (my/model), of which 3, 20-25 and 27 are gone
    now.``
    """
    if not plan.lineage:
        return ""
    first = plan.lineage[0]
    now = [plan.origin[layer] for layer in plan.remove]
    left = {plan.origin[layer] for layer in plan.keep}
    gone = [layer for layer in range(first["num_layers"]) if layer not in left]
    return (
        f"That is layer{'s' * (len(now) > 1)} {runs_text(now)} of the original "
        f"{first['num_layers']} ({first['model_id'] or 'a model in memory'}), of which "
        f"{runs_text(gone)} are gone now."
    )


def runs_text(layers: Sequence[int]) -> str:
    """Layers with neighbours together: ``20-25 and 27``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def engines_text(plan: PruningPlan) -> str:
    """Which serving engines compute the result right, in one line; empty if nothing is known."""
    right = [name for name, found in plan.engines.items() if found == "right"]
    parts = [f"right in {', '.join(right)}"] if right else []
    for name, found in plan.engines.items():
        state, _, reason = found.partition(": ")
        if state == "metadata":
            parts.append(f"right in {name} once --fix-gguf has corrected the converted file")
        elif state != "right":
            parts.append(f"wrong in {name} ({reason})")
    wrong = any(part.startswith("wrong") for part in parts)
    hint = " --serve-with looks for sets that are right." if wrong else ""
    return f"Serving: {'; '.join(parts)}.{hint}" if parts else ""


SPEEDUP, CACHED = "target_speedup", "target_memory"
PARAMETERS = ("target_params", "ratio_of_params")


def figure(goal: str, value: float) -> str:
    """What a goal is about, with its unit: ``391.2 MB of weights``."""
    if goal == SPEEDUP:
        return f"{value:.2f} times the speed"
    if goal in PARAMETERS:
        return f"{value / 1e6:,.1f} M parameters"
    if value < 1e5:
        return f"{value:,.0f} bytes"
    return f"{value / 1e6:,.1f} MB of {'weights and cache' if goal == CACHED else 'weights'}"


def goals_text(plan: PruningPlan, comparisons: Iterable[Comparison] = ()) -> str:
    """What was asked of the pruned model, and what it is, in one line; empty without goals.

    `comparisons` tell what was measured; otherwise what was predicted is said.
    """
    rows = {entry.name: entry for entry in comparisons}
    parts = []
    for one in plan.options.get("goals", ()):
        goal, asked, predicted = one["goal"], one["asked"], one["predicted"]
        if goal.startswith("max_drop "):
            parts.append(_drop_text(one, rows))
            continue
        found = _measured(plan, goal, rows)
        is_now = f"{figure(goal, predicted)} predicted"
        if found is not None:
            is_now = figure(goal, found)
            is_now += f", {predicted:.2f} predicted" if goal == SPEEDUP else ""
        limit = "at least" if goal == SPEEDUP else "at most"
        parts.append(f"{limit} {figure(goal, asked)}: {is_now}")
    return f"Asked for: {'; '.join(parts)}." if parts else ""


def _drop_text(one: Mapping[str, Any], rows: Mapping[str, Comparison]) -> str:
    """A limit on a drop, what it was on the items that checked it, and on those reported."""
    name, share = one["goal"].removeprefix("max_drop "), one["asked"].endswith("%")

    def said(drop: float) -> str:
        return f"{drop:+.1%}" if share else f"{drop:+.3f}"

    text = (
        f"{name} worse by at most {one['asked']}: {said(one['predicted'])} (95 % interval up to "
        f"{said(one['high'])}) on the {one['items']} items that checked it"
    )
    row = rows.get({"mean": "task mean"}.get(name, name))
    if row is None:
        return text
    drop = row.change if name == "perplexity" else -row.change
    found = drop / row.before if share and row.before else drop
    limit = float(one["asked"].rstrip("%")) / (100 if share else 1)
    more = ", which is more than that (--confident leaves room for chance)" * (found > limit)
    return f"{text}, {said(found)} on those reported{more}"


def _measured(plan: PruningPlan, goal: str, rows: Mapping[str, Comparison]) -> float | None:
    """The figure of a goal, from what was compared; None if it was not."""
    if goal == SPEEDUP:
        what = plan.options.get("speedup_of", "decode")
        timed = [entry for name, entry in rows.items() if name.startswith(f"{what}, batch ")]
        return timed[-1].after / timed[-1].before if timed else None
    if goal in PARAMETERS:
        return rows["parameters"].after if "parameters" in rows else None
    if "weights" not in rows:
        return None
    weights = 1e6 * rows["weights"].after
    if goal != CACHED:
        return weights
    cache = rows.get("cache per token")
    context = int(plan.options.get("context", CONTEXT))
    return weights + (cache.after * context if cache else 0.0)


GAINED = (
    "A cost above 0 means that the items are likelier without these layers, not that answers are "
    "as good: look at tasks, answers and KL divergence."
)


def held_out_text(held_out: Mapping[str, Any]) -> str:
    """What a plan costs on held-out items, with its interval and unit, and on each kind of them."""
    items = counted(held_out["items"], "held-out item")
    text = f"{cost_text(held_out, '95 % interval ')}, {held_out['unit']}, {items}"
    kinds = [f"{kind} {cost_text(one)}" for kind, one in held_out.get("kinds", {}).items()]
    return f"{text}: {', '.join(kinds)}" if kinds else text


def gained(plan: PruningPlan) -> bool:
    """Whether held-out items are clearly likelier without the layers of a plan."""
    low = plan.held_out.get("low")
    return low is not None and low > 0


def evaluated_on(report: PruningReport) -> str:
    """How many items are behind the comparisons; empty where the report does not say."""
    items = report.evaluation_data.get("items")
    return f"{items} items that played no part in the choice" if items else ""


def by_group(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons by group, in the order of `GROUPS`; unknown groups come last."""
    groups: dict[str, list[Comparison]] = {name: [] for name in GROUPS}
    for entry in comparisons:
        groups.setdefault(entry.group, []).append(entry)
    return {name: members for name, members in groups.items() if members}


def highlights(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """One comparison of each group but answers: the mean of the tasks, decoding, or the first."""
    chosen = []
    for group, members in by_group(comparisons).items():
        main = [entry for entry in members if entry.name.startswith(("task mean", "decode"))]
        with_unit = [entry for entry in members if entry.unit or group != "size"]
        if group in GROUPS and group != "answers":
            chosen += (main or with_unit or members)[:1]
    return chosen


def step_text(step: Mapping[str, Any]) -> str:
    """What a step of a search did: ``removed layer 7``."""
    action = step.get("action")
    if action == "cut":
        if "layers" in step:
            return f"removed layers {_listed(step['layers'])}"
        return f"removed layer {step.get('layer')}"
    if action == "exchange":
        return f"removed {_listed(step.get('in'))} instead of {_listed(step.get('out'))}"
    if action == "start":
        return "first result, by block influence"
    if action == "stop":
        return f"ended: {step.get('why')}"
    if action == "repair":
        return f"healed ({step.get('method')})"
    return str(action)


def _listed(layers: Any) -> str:
    return ", ".join(map(str, layers)) if isinstance(layers, list | tuple) else str(layers)


class HealingStage(NamedTuple):
    """One stage of healing, for people."""

    method: str
    loss: str  # on held-out items, after the stage; empty if it was skipped
    returned: str  # how much of the lost loss is back, in percent; empty if none was lost
    outcome: str


def healing_stages(heal: Mapping[str, Any]) -> list[HealingStage]:
    """What each stage of healing did; empty without healing."""
    stages = []
    for stage in heal.get("stages", ()):
        if "skipped" in stage:
            stages.append(HealingStage(stage["method"], "", "", f"skipped: {stage['skipped']}"))
            continue
        lost = heal["cut"] - heal["full"]
        returned = f"{(heal['cut'] - stage['loss']) / lost:.0%}" if lost > 0 else ""
        outcome = "kept" if stage["kept"] else "no better, rolled back"
        stages.append(HealingStage(stage["method"], f"{stage['loss']:.4f}", returned, outcome))
    return stages


def quality_text(report: PruningReport) -> str:
    """Perplexity in short: what healing has given back of it, or that little is left without it."""
    rows = {one.name: one for one in report.comparisons if one.group in ("text", "tasks")}
    row, cut = rows.get("perplexity"), report.heal.get("cut_quality")
    if row is None:
        return ""
    if cut is None:
        times = row.after / row.before
        return (
            f"Perplexity is {times:.1f} times the full model's: remove fewer layers, or heal."
            if times > MUCH
            else ""
        )
    values = [f"{value:,.3f}" for value in (row.before, cut["perplexity"], row.after)]
    text = f"Perplexity: {values[0]} of the full model, {values[1]} cut, {values[2]} healed"
    lost = math.log(cut["perplexity"] / row.before)
    if lost > LITTLE:
        back = math.log(cut["perplexity"] / row.after) / lost
        text += f", which is {back:.0%} of the lost log-likelihood back"
    if (mean := rows.get("task mean")) and cut["tasks"]:
        text += f"; task mean: {mean.before:.3f}, {cut['tasks']['mean']:.3f}, {mean.after:.3f}"
    return f"{text}."


def weights_text(report: PruningReport) -> str:
    """Why the output is larger than its source, if it is; empty otherwise."""
    row = next((one for one in report.comparisons if one.name == "weights"), None)
    if row is None or row.after <= row.before:
        return ""
    dtype = report.machine.get("dtype", "another one")
    half = ", or --dtype bfloat16 from the start halves them" if dtype == "float32" else ""
    return (
        f"The weights take more room than before, {number_text(row.before)} MB then and "
        f"{number_text(row.after)} MB now: what has changed is not written in the precision of the "
        f"source, but in {dtype}. Quantising the result makes them smaller{half}."
    )


def remarks(report: PruningReport) -> list[str]:
    """What has to be known to read the numbers of a report, a sentence or two each."""
    untimed = "" if any(one.group == "speed" for one in report.comparisons) else UNTIMED
    gguf = report.protocol.get("checkpoint") == IN_GGUF
    found = (
        GAINED if gained(report.plan) else "",
        quality_text(report),
        _below_floor(report.comparisons),
        weights_text(report),
        untimed if gguf else "",
    )
    return [text for text in found if text]


def _below_floor(comparisons: Iterable[Comparison]) -> str:
    """The scores that were above what guessing gives and are not any more; empty without any."""
    low = [
        f"{one.name} ({number_text(one.after, 3)}, floor {number_text(one.floor, 3)})"
        for one in comparisons
        if one.group in ("tasks", "answers")
        and one.floor is not None
        and one.after <= one.floor < one.before
    ]
    if not low:
        return ""
    return f"No better than guessing, or than unrelated answers, is now: {', '.join(low)}."


def label(entry: Comparison) -> str:
    """The name of a quantity, with its unit."""
    return f"{entry.name} ({entry.unit})" if entry.unit else entry.name


def number_text(value: float, digits: int = 4) -> str:
    """A value with `digits` significant digits; a whole number with all of its digits."""
    whole = float(value).is_integer() or abs(value) >= 10**digits
    return f"{value:,.0f}" if whole else f"{value:#,.{digits}g}".rstrip(".")


def change_text(entry: Comparison) -> str:
    """``+0.102 (+0.061 to +0.149)``, without the interval where there is none."""
    numbers = (entry.change, entry.low, entry.high)
    change, *ends = (_signed(number) for number in numbers if number is not None)
    return f"{change} ({' to '.join(ends)})" if len(ends) == 2 else change


def _signed(number: float) -> str:
    size = number_text(abs(number), 3)
    return size if size == "0" else f"{'+' if number > 0 else MINUS}{size}"


def verdict_text(entry: Comparison) -> str:
    """The verdict, and by how much the value changed: ``worse, 25.0% more``.

    A loss in nats has no zero that counts, and shares of small values say nothing: there are none.
    """
    counts = (
        entry.before and "nats" not in entry.unit and abs(entry.change) < 10 * abs(entry.before)
    )
    relative = abs(entry.change / entry.before) if counts else 0.0
    more = f"{relative:.1%} {'more' if entry.change > 0 else 'less'}" if relative >= 0.0005 else ""
    if not entry.verdict:
        return more or ("unchanged" if not entry.change else "")
    words = VERDICTS[entry.verdict]
    return f"{words}, {more}" if more and entry.verdict != "unclear" else words


def cells(entry: Comparison) -> tuple[str, str, str, str, str]:
    """A row of a table: name, before, after, change, verdict."""
    before, after = number_text(entry.before), number_text(entry.after)
    return label(entry), before, after, change_text(entry), verdict_text(entry)
