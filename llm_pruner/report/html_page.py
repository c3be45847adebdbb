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
from ..progress import duration
from ..results import Comparison, DepthCurve, PruningPlan, PruningReport, cost_texts
from ..visualization.style import COLUMN, file_bytes
from . import summary
from .figures import TEXTS, report_figures, words
from .summary import label, number_text, verdict_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_html(
    report: PruningReport,
    path: str | Path,
    *,
    figures: Mapping[str, Figure] | None = None,
    curve: DepthCurve | None = None,
) -> None:
    """Write the report as one HTML file: what was removed, lost and gained, with pictures.

    Names, prompts and answers are escaped, whatever they contain.

    Args:
        path: the file to write, whole or not at all.
        figures: pictures by name, such as `report_figures` returns; besides those,
            ``activation_comparison`` and ``semantic_comparison``, as `plot_activation_comparison`
            and `plot_semantic_comparison` return them. Figures of the report that are missing are
            drawn here.
        curve: cost by number of layers, where it was measured.

    Raises:
        InvalidDataError: `figures` has an unknown name.
        OutputError: the file cannot be written.
    """
    figures = dict(figures or {})
    if unknown := sorted(figures.keys() - TEXTS.keys()):
        raise InvalidDataError(f"figures has {unknown}; known: {', '.join(TEXTS)}.")
    figures |= report_figures(report, curve=curve, skip={*figures, "holistic_benchmark"})
    plan, said = report.plan, words(report, curve)

    def pictures(*names: str) -> str:
        shown = [name for name in names if name in figures]
        return "".join(_picture(figures[name], name, said) for name in shown)

    choice = pictures("layer_importance", "block_distances", "similarity_matrix")
    choice = choice and f'<div class="pair">\n{choice}</div>\n'
    sections = (
        _summary(report),
        _section("What changed", _comparisons(report) + pictures("comparisons")),
        _section("How the layers were chosen", _choice(plan) + choice),
        _section("Cost by number of layers", pictures("depth_curve")),
        _section("Healing", _healing(report.heal)),
        _section("Inside the model", pictures("activation_comparison", "semantic_comparison")),
        _section("Sample answers", "".join(map(_sample, report.samples))),
        _section("How to reproduce this", _reproduce(report)),
    )
    template = resources.files(__package__).joinpath("report.html")
    page = Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.model_id or 'A model'}: {summary.removed_text(plan)}"),
        body=f"<main>\n{''.join(sections)}</main>",
    )
    write_atomically(path, page)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n" if body else ""


def _summary(report: PruningReport) -> str:
    plan = report.plan
    layers = "".join(
        f'<li class="removed">{i}</li>' if i in plan.remove else f"<li>{i}</li>"
        for i in range(plan.num_layers)
    )
    removed = ", ".join(map(str, plan.remove))
    count, depth = len(plan.remove), plan.num_layers
    tiles = [_tile("layers removed", f"{count} of {depth}", f"{count / depth:.0%} of the depth")]
    for entry in summary.highlights(report.comparisons):
        values = f"{number_text(entry.before, 3)} \u2192 {number_text(entry.after, 3)}"
        tiles.append(_tile(label(entry), values, verdict_text(entry), entry.verdict or "soft"))
    if held := plan.held_out:
        healed = report.heal.get("method", "none") != "none"
        name = "cost of the cut, before healing" if healed else "cost of the cut"
        kinds = {f"{name}: {kind}": one for kind, one in held.get("kinds", {}).items()}
        for title, cost in {name: held, **kinds}.items():
            change, interval = (text.replace("-", summary.MINUS) for text in cost_texts(cost))
            tiles.append(_tile(title, change, f"{cost.get('unit', '')} {interval}".strip()))
    return (
        f"<header>\n<h1>{escape(plan.model_id or 'A model')}, pruned</h1>\n"
        f'<p class="soft">{escape(summary.removed_text(plan))}, chosen by {escape(plan.strategy)}. '
        f"Layer numbers are 0-based. {escape(summary.lineage_text(plan))} "
        f"{escape(summary.goals_text(plan, report.comparisons))} "
        f"{escape(' '.join(summary.remarks(report)))} "
        f"{escape(summary.engines_text(plan))}</p>\n"
        f'<div class="tiles">\n{"".join(tiles)}</div>\n'
        f'<ol class="stack" aria-label="The {depth} layers; removed: {removed}">{layers}'
        f"</ol>\n<p>{_count_verdicts(report.comparisons)}</p>\n</header>\n"
    )


def _tile(name: str, number: str, note: str, look: str = "soft") -> str:
    return (
        f'<div class="tile"><p class="soft">{escape(name)}</p><p class="number">{escape(number)}'
        f'</p><p class="{look}">{escape(note)}</p></div>\n'
    )


def _count_verdicts(comparisons: Iterable[Comparison]) -> str:
    measures = [entry for entry in comparisons if entry.group not in ("size", "speed")]
    verdicts = [entry.verdict for entry in measures if entry.higher_is_better is not None]
    names = {"worse": "worse", "unclear": "without a clear difference", "better": "better"}
    counts = {verdict: verdicts.count(verdict) for verdict in names}
    if not any(counts.values()):
        return "No measure of quality has an interval."
    listed = ", ".join(
        f'<span class="{verdict}">{count} {names[verdict]}</span>'
        for verdict, count in counts.items()
    )
    return f"Of {sum(counts.values())} measures of quality: {listed}. {summary.CLEAR}"


def _comparisons(report: PruningReport) -> str:
    body = ""
    for group, members in summary.by_group(report.comparisons).items():
        title = escape(summary.GROUPS.get(group, group))
        body += f'<tr><th class="group" colspan="5" scope="colgroup">{title}</th></tr>\n'
        body += "".join(map(_comparison_row, members))
    if not body:
        return ""
    source = summary.evaluated_on(report)
    caption = f"Measured on {source}." if source else ""
    heads = ("before", "after", "change (95 % interval)", "verdict")
    columns = "".join(f'<th class="n" scope="col">{head}</th>' for head in heads)
    return (
        f'<table class="stacks"><caption>{escape(caption)}</caption><thead><tr><th scope="col">'
        f"quantity</th>{columns}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"
    )


def _comparison_row(entry: Comparison) -> str:
    details = []
    if entry.count is not None:
        details.append(f"{entry.count:,} {'runs' if entry.group == 'speed' else 'items'}")
    if entry.floor is not None:
        details.append(f"floor {number_text(entry.floor, 3)}")
    if entry.note:
        details.append(entry.note)
    small = f'<span class="soft">{escape("; ".join(details))}</span>' if details else ""
    name, *cells, verdict = map(escape, summary.cells(entry))
    cells.append(f'<span class="{entry.verdict or "none"}">{verdict}</span>')
    row = "".join(
        f'<td class="n" data-label="{head}">{cell}</td>'
        for head, cell in zip(("before", "after", "change", "verdict"), cells, strict=True)
    )
    return f'<tr><th scope="row">{name}{small}</th>{row}</tr>\n'


def _choice(plan: PruningPlan) -> str:
    options = {name: value for name, value in plan.options.items() if value is not None}
    body = _facts({"strategy": plan.strategy, **options})
    rows = []
    for step in plan.steps:
        change = step.get("change")
        cost = f"{change:+.2%}" if isinstance(change, float) else ""
        outcome = "kept" if step.get("kept") else "rolled back"
        rows.append((summary.step_text(step), cost, str(step.get("samples", "")), outcome))
    caption = "The search, step by step; changes on few sequences are rough"
    return body + _table(caption, ("step", "total change", "sequences", "outcome"), rows)


def _healing(heal: Mapping[str, Any]) -> str:
    rows = summary.healing_stages(heal)
    if not rows:
        return ""
    caption = (
        f"Loss on held-out items of the healing's own: {heal['full']:.4f} of the full model, "
        f"{heal['cut']:.4f} of the pruned one before healing"
    )
    return _table(caption, ("stage", "loss", "loss returned", "outcome"), rows)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A narrow table whose first and last columns are text and the others numbers."""
    if not rows:
        return ""
    looks = ["", *[' class="n"'] * (len(heads) - 2), ""]

    def row(tag: str, cells: Sequence[str], scope: str = "") -> str:
        pairs = zip(looks, cells, strict=True)
        parts = (f"<{tag}{look}{scope}>{escape(cell)}</{tag}>" for look, cell in pairs)
        return f"<tr>{''.join(parts)}</tr>\n"

    head, body = row("th", heads, ' scope="col"'), "".join(row("td", cells) for cells in rows)
    return (
        f'<div class="scroll"><table class="narrow"><caption>{escape(caption)}</caption>'
        f"<thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _picture(figure: Figure, name: str, said: Mapping[str, str]) -> str:
    """A figure as an image whose bytes are in the page."""
    data = base64.b64encode(file_bytes(figure, ".svg")).decode()
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    look = "column" if figure.get_figwidth() <= COLUMN else "page"
    caption, alt = (escape(text.format(**said)) for text in TEXTS[name])
    return (
        f'<figure class="{look}"><img width="{width}" height="{height}" alt="{alt}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{caption}</figcaption></figure>\n'
    )


def _sample(sample: Mapping[str, str]) -> str:
    answers = "".join(
        f"<div><dt>{key}</dt><dd>{escape(sample[key]) or '(empty)'}</dd></div>"
        for key in ("reference", "before", "after")
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
        "Protocol": {**report.protocol, "carried out and compared in": duration(report.seconds)},
        "Data": data,
        "Versions": report.versions or plan.versions,
        "Machine": report.machine,
        "Model": {"name": plan.model_id, **plan.model, "output": report.output_dir},
    }
    return command + "".join(
        f"<h3>{name}</h3>\n{_facts(facts)}" for name, facts in parts.items() if facts
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_value(value))}</dd>\n"
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
