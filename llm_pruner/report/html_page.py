"""A report to share: one HTML file with tables and pictures that needs no network and no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ..atomic_output import write_atomically
from ..errors import InvalidDataError
from ..results import Comparison, DepthCurve, PruningPlan, PruningReport
from ..visualization.blocks import plot_block_distances, plot_similarity_matrix
from ..visualization.quality import plot_comparisons, plot_depth_curve
from ..visualization.scores import plot_layer_importance
from ..visualization.style import COLUMN, file_bytes
from .summary import MINUS, change_text, number_text, removed_text, verdict_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = {
    "text": "Likelihood of text",
    "tasks": "Tasks",
    "answers": "Answers",
    "size": "Size",
    "speed": "Speed",
}
ACTIVATION, SEMANTIC = "activation_comparison", "semantic_comparison"
MODEL_FIGURES = {
    ACTIVATION: (
        "The residual stream, with and without the removed layers",
        "Two line charts along the depth: the size of the state that enters each layer in the full "
        "and in the cut model, and the cosine similarity of both, removed layers shaded.",
    ),
    SEMANTIC: (
        "What both models say next",
        "Bars of the probabilities of the next token in the original and in the pruned model, and "
        "the answers of both to the same prompt.",
    ),
}


def write_html(
    report: PruningReport,
    path: str | Path,
    *,
    figures: Mapping[str, Figure] | None = None,
    curve: DepthCurve | None = None,
) -> None:
    """Write the report as one HTML file: what was removed, lost and gained, with pictures.

    Names, prompts and answers are escaped, whatever they hold. Layer scores, block distances and
    comparisons are drawn from the report.

    Args:
        report: what was measured.
        path: the file to write, whole or not at all.
        figures: what needs the models: ``activation_comparison`` and ``semantic_comparison``, as
            `plot_activation_comparison` and `plot_semantic_comparison` return them.
        curve: cost by number of layers, where it was measured.

    Raises:
        InvalidDataError: `figures` has another name.
        OutputError: the file cannot be written.
    """
    figures = figures or {}
    figures = {k: v for k, v in figures.items() if k in MODEL_FIGURES}
    unknown = sorted(figures.keys() - MODEL_FIGURES.keys())
    if unknown:
        raise InvalidDataError(f"figures has {unknown}; known: {', '.join(MODEL_FIGURES)}.")
    plan = report.plan
    sections = (
        _summary(report),
        _section("What changed", _comparisons(report)),
        _section("How the layers were chosen", _choice(plan)),
        _section("Cost by number of layers", _curve(curve)),
        _section("Repair of the weights", _healing(report.heal)),
        _section("Inside the model", _model_figures(figures)),
        _section("Sample answers", "".join(map(_sample, report.samples))),
        _section("How to reproduce this", _reproduce(report)),
    )
    template = resources.files(__package__).joinpath("report.html")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.model_id}: {removed_text(plan)}"),
        body=f"<main>\n{''.join(sections)}</main>",
    )
    write_atomically(path, page)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def _summary(report: PruningReport) -> str:
    plan = report.plan
    layers = "".join(
        f'<li class="gone">{i}</li>' if i in plan.remove else f"<li>{i}</li>"
        for i in range(plan.num_layers)
    )
    removed = ", ".join(map(str, plan.remove))
    tiles = [
        _tile(
            "layers removed",
            f"{len(plan.remove)} of {plan.num_layers}",
            f"{len(plan.remove) / plan.num_layers:.0%} of the depth",
        ),
        *map(_comparison_tile, _headlines(report.comparisons)),
    ]
    if held := plan.held_out:
        numbers = (f"{held[key]:+.1%}".replace("-", MINUS) for key in ("change", "low", "high"))
        change, low, high = numbers
        name = "cost of the cut" + ", before repair" * (report.heal.get("method", "none") != "none")
        tiles.append(_tile(name, change, f"{held['unit']} ({low} to {high})"))
    return (
        f"<header>\n<h1>{escape(plan.model_id or 'A model')}, pruned</h1>\n"
        f'<p class="soft">{escape(removed_text(plan))}, chosen by {escape(plan.strategy)}. '
        "Layer numbers are 0-based.</p>\n"
        f'<div class="tiles">\n{"".join(tiles)}</div>\n'
        f'<ol class="stack" aria-label="The {plan.num_layers} layers; removed: {removed}">{layers}'
        f"</ol>\n<p>{_count_verdicts(report.comparisons)}</p>\n</header>\n"
    )


def _tile(name: str, number: str, note: str, look: str = "soft") -> str:
    return (
        f'<div class="tile"><p class="soft">{escape(name)}</p><p class="number">{escape(number)}'
        f'</p><p class="{look}">{escape(note)}</p></div>\n'
    )


def _headlines(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """One comparison of each group but answers: the mean of tasks, decoding, or the first."""
    found = []
    for group in ("text", "tasks", "size", "speed"):
        members = [entry for entry in comparisons if entry.group == group]
        main = [entry for entry in members if entry.name.startswith(("task mean", "decode"))]
        sized = [entry for entry in members if entry.unit or group != "size"]
        found += (main or sized or members)[:1]
    return found


def _comparison_tile(entry: Comparison) -> str:
    values = f"{number_text(entry.before, 3)} \u2192 {number_text(entry.after, 3)}"
    name = f"{entry.name} ({entry.unit})" if entry.unit else entry.name
    return _tile(name, values, verdict_text(entry), entry.verdict or "soft")


def _count_verdicts(comparisons: Iterable[Comparison]) -> str:
    verdicts = [entry.verdict for entry in comparisons if entry.group not in ("size", "speed")]
    counts = {kind: verdicts.count(kind) for kind in ("worse", "unclear", "better")}
    total = sum(counts.values())
    if not total:
        return "No quantity of quality was measured with an interval."
    words = [
        f'<span class="worse">{counts["worse"]} worse</span>',
        f'<span class="unclear">{counts["unclear"]} without a clear difference</span>',
        f'<span class="better">{counts["better"]} better</span>',
    ]
    return (
        f"Of {total} measures of quality: {', '.join(words)}. A difference is called clear where "
        "its 95&nbsp;% interval, paired item by item, leaves out zero."
    )


def _comparisons(report: PruningReport) -> str:
    entries = report.comparisons
    if not entries:
        return ""
    heads = ("before", "after", "change", "verdict")
    body = ""
    for group in dict.fromkeys([*GROUPS, *(entry.group for entry in entries)]):
        members = [entry for entry in entries if entry.group == group]
        if members:
            title = escape(GROUPS.get(group, group))
            body += f'<tr><th class="group" colspan="5" scope="colgroup">{title}</th></tr>\n'
            body += "".join(_comparison_row(entry, heads) for entry in members)
    items = report.evaluation_data.get("items")
    caption = f"Measured on {items} items that played no part in the choice." if items else ""
    table = (
        f'<table class="stacks"><caption>{escape(caption)}</caption><thead><tr><th scope="col">'
        + f"quantity</th>{''.join(_head(head) for head in heads)}</tr></thead>\n<tbody>\n{body}"
        + "</tbody></table>\n"
    )
    scores = [entry for entry in entries if entry.group in ("tasks", "answers")]
    drawn = [entry for entry in scores if entry.unit == scores[0].unit]
    picture = ""
    if drawn:
        figure = plot_comparisons(drawn)
        alt = "Bars of each score before and after, and the change with its 95 % interval: "
        alt += "; ".join(f"{entry.name} {change_text(entry)}" for entry in drawn)
        picture = _picture(figure, alt, "Scores before and after, and the change of each.")
    return table + picture


def _head(text: str) -> str:
    note = " (95 % interval)" if text == "change" else ""
    return f'<th class="n" scope="col">{escape(text)}{note}</th>'


def _comparison_row(entry: Comparison, heads: Sequence[str]) -> str:
    name = escape(entry.name + (f" ({entry.unit})" if entry.unit else ""))
    details = [f"{entry.count:,} samples"] if entry.count is not None else []
    details += [f"floor {number_text(entry.floor, 3)}"] if entry.floor is not None else []
    details += [entry.note] if entry.note else []
    small = f'<span class="soft">{escape("; ".join(details))}</span>' if details else ""
    cells = (number_text(entry.before), number_text(entry.after), change_text(entry))
    row = "".join(
        f'<td class="n" data-label="{escape(head)}">{escape(cell)}</td>'
        for head, cell in zip(heads, cells, strict=False)
    )
    look = entry.verdict or "none"
    row += f'<td class="n" data-label="{heads[-1]}"><span class="{look}">'
    row += f"{escape(verdict_text(entry))}</span></td>"
    return f'<tr><th scope="row">{name}{small}</th>{row}</tr>\n'


def _choice(plan: PruningPlan) -> str:
    body, scores = "", plan.scores
    options = {k: v for k, v in plan.options.items() if v is not None and k != "heal"}
    facts = {"strategy": plan.strategy, **{k: _value(v) for k, v in options.items()}}
    body += _facts(facts)
    if plan.steps:
        body += _steps(plan.steps)
    if scores is None:
        return body
    gone = set(plan.remove) & scores.keys()
    first, last = plan.options.get("protect", (0, 0))
    ends = [*range(first), *range(plan.num_layers - last, plan.num_layers)]
    kept = [layer for layer in ends if layer not in plan.remove]
    figure = plot_layer_importance(scores, removed=gone, protected=kept, num_layers=plan.num_layers)
    listed = ", ".join(f"{layer}: {number_text(score)}" for layer, score in scores.items())
    alt = f"Bars of the score of each layer ({scores.unit}), removed layers hatched: {listed}"
    pictures = _picture(figure, alt, f"Score of each layer: {scores.unit}.")
    if scores.blocks is not None:
        figure = plot_block_distances(scores, removed=plan.remove, protected=kept)
        alt = (
            f"Heat map of the distance over every block of layers ({scores.unit}) by first layer "
            "and length, the best block of each length marked."
        )
        pictures += _picture(figure, alt, "Distance over every block of layers, scaled by row.")
        alt = (
            f"Heat map of the distance of every two states along the depth ({scores.unit}); "
            "neighbouring states are close where the map is dark."
        )
        figure = plot_similarity_matrix(scores)
        pictures += _picture(figure, alt, "Distance of every two states along the depth.")
    return f'{body}<div class="pair">\n{pictures}</div>\n'


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = ""
    for step in steps:
        what = str(step.get("action", ""))
        if what == "cut":
            what = f"cut layer {step.get('layer')}"
        elif what == "exchange":
            what = f"removed {_value(step.get('in'))} instead of {_value(step.get('out'))}"
        elif what == "repair":
            what = f"repaired ({step.get('method')})"
        kept = "kept" if step.get("kept") else "rolled back"
        change = step.get("change")
        cost = f"{change:+.2%}" if isinstance(change, float) else ""
        rows += (
            f'<tr><td>{escape(what)}</td><td class="n">{escape(cost)}</td><td>{kept}</td></tr>\n'
        )
    return (
        '<div class="scroll"><table class="narrow"><caption>The search, step by step, on the '
        'items of the choice</caption><thead><tr><th scope="col">step</th>'
        '<th class="n" scope="col">change in all</th><th scope="col">outcome</th></tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _curve(curve: DepthCurve | None) -> str:
    if curve is None:
        return ""
    points = []
    for point in curve.points:
        held = point["held_out"] or {}
        change = held.get("change", point["change"])
        points.append(f"{point['n_layers']}: {change:+.1%}")
    alt = f"Line chart of {curve.unit} against the number of layers removed. {', '.join(points)}"
    return _picture(
        plot_depth_curve(curve), alt, f"Cost by number of layers removed: {curve.unit}."
    )


def _healing(heal: Mapping[str, Any]) -> str:
    if heal.get("method", "none") == "none" or "stages" not in heal:
        return ""
    rows = ""
    lost = heal["cut"] - heal["full"]
    for stage in heal["stages"]:
        loss, back, outcome = "", "", "kept" if stage.get("kept") else "rolled back"
        if "skipped" in stage:
            outcome = f"left out: {stage['skipped']}"
        else:
            loss = f"{stage['loss']:.4f}"
            back = f"{(heal['cut'] - stage['loss']) / lost:.0%}" if lost > 0 else ""
        rows += (
            f'<tr><td>{escape(str(stage["method"]))}</td><td class="n">{loss}</td>'
            f'<td class="n">{back}</td><td>{escape(outcome)}</td></tr>\n'
        )
    return (
        '<div class="scroll"><table class="narrow"><caption>Loss on items that judge the repair: '
        f"{heal['full']:.4f} of the full model, {heal['cut']:.4f} of the cut one</caption>"
        '<thead><tr><th scope="col">repair</th><th class="n" scope="col">loss</th>'
        '<th class="n" scope="col">given back</th>'
        f'<th scope="col">outcome</th></tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
    )


def _model_figures(figures: Mapping[str, Figure]) -> str:
    return "".join(
        _picture(figures[name], alt, f"{caption}.")
        for name, (caption, alt) in MODEL_FIGURES.items()
        if name in figures
    )


def _picture(figure: Figure, alt: str, caption: str) -> str:
    """A figure as an image whose bytes are in the page."""
    data = base64.b64encode(file_bytes(figure, ".svg")).decode()
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    look = "column" if figure.get_figwidth() <= COLUMN else "page"
    return (
        f'<figure class="{look}"><img width="{width}" height="{height}" alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{escape(caption)}</figcaption>'
        "</figure>\n"
    )


def _sample(sample: Mapping[str, str]) -> str:
    answers = "".join(
        f"<div><dt>{name}</dt><dd>{escape(sample[key]) or '(empty)'}</dd></div>"
        for key, name in (("reference", "reference"), ("before", "before"), ("after", "after"))
    )
    return (
        f'<div class="sample"><p>{escape(sample["prompt"])}</p>'
        f'<dl class="answers">{answers}</dl></div>\n'
    )


def _reproduce(report: PruningReport) -> str:
    plan = report.plan
    command = f"<pre><code>{escape(report.command)}</code></pre>\n" if report.command else ""
    data = {f"choice: {k}": v for k, v in plan.data.items() if k != "prompts"}
    data |= {f"evaluation: {k}": v for k, v in report.evaluation_data.items()}
    parts = {
        "Protocol": {**report.protocol, "duration": f"{report.seconds:,.0f} s"},
        "Data": data,
        "Versions": report.versions or plan.versions,
        "Machine": report.machine,
        "Model": {"name": plan.model_id, **plan.model, "output": report.output_dir},
    }
    return command + "".join(
        f"<h3>{name}</h3>\n{_facts({k: _value(v) for k, v in facts.items()})}"
        for name, facts in parts.items()
        if facts
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(value)}</dd>\n"
        for name, value in facts.items()
    )
    return f'<dl class="facts">\n{rows}</dl>\n'


def _value(value: Any) -> str:
    """A value of a JSON file for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float) and math.isfinite(value):
        return number_text(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)
