"""Values that strategies produce and files carry: scores, a plan, a report; JSON both ways."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import InvalidPlanError, NonFiniteError, UnknownNameError
from .json_files import JsonFile, check_type
from .layer_scores import LayerScores, table_html
from .utils import counted, logger

if TYPE_CHECKING:
    import pandas as pd

MOST_LAYERS = 10_000  # a file that claims a deeper model is damaged
IDENTITY = ("tensors", "weights", "sha256", "revision")  # in `PruningPlan.model`, the first first
# What `PruningPlan.held_out` holds, if it holds anything.
COST = {"change": float, "low": float | None, "high": float | None}
HELD_OUT = {**COST, "unit": str, "items": int}


CONTEXT = 4096  # tokens of a sequence whose cache a limit on memory counts, unless others


@dataclass(frozen=True, repr=False)
class PruningPlan(JsonFile):
    """Which layers of which model to remove, and why.

    Attributes:
        model_id: the model as it was named.
        num_layers: its number of decoder layers.
        remove: the 0-based indices to remove, ascending.
        strategy: the strategy's name, or ``manual``.
        options: what the strategy was asked for (ratio, threshold, protect, ...).
        scores: the layer scores, if the strategy made any.
        steps: what a search tried and measured, if there was one.
        data: what the choice rests on: ``items`` (how many), ``fingerprint`` of all of them, and
            ``prompts``, a short hash of each, so that they are not used for something else.
        held_out: what the choice costs on data that played no part in it: ``change`` (relative),
            ``low`` and ``high`` (95 % paired bootstrap interval; None for one item), ``unit``,
            ``items``, ``fingerprint``; from several sources ``kinds``, ``change``, ``low`` and
            ``high`` of each; empty if that was not measured.
        versions: of the packages that made it.
        model: what tells the model's checkpoint from others (`Checkpoint.identity`); empty for a
            model that was not loaded from one.
        healing: how the weights were healed when the plan was carried out, as `heal_model`
            records it; empty before that.
        drop_mtp: leave out the blocks for multi-token prediction, which are kept otherwise.
        edited: whether the file it was read from had been changed by hand, which leaves nothing of
            what was measured.
        lineage: the cuts that made the model what it was before this one, the first one first:
            ``model_id``, ``num_layers``, ``remove`` and ``strategy`` of each.
        engines: what serving engines make of the result, by name: ``right``, or what is wrong, as
            `engines.verdict.verdicts` says it; those of which nothing is known are not there.

    Raises:
        InvalidPlanError: indices out of range, repeated, or nothing left.
    """

    FORMAT = "llm_pruner.plan/2"
    EARLIER = ("llm_pruner.plan/1",)

    model_id: str
    num_layers: int
    remove: tuple[int, ...]
    strategy: str = "manual"
    options: dict[str, Any] = field(default_factory=dict)
    scores: LayerScores | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    healing: dict[str, Any] = field(default_factory=dict)
    drop_mtp: bool = False
    engines: dict[str, str] = field(default_factory=dict)
    edited: bool = False
    lineage: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if type(self.num_layers) is not int or not 1 <= self.num_layers <= MOST_LAYERS:
            raise InvalidPlanError(
                f"num_layers={self.num_layers!r} must be a whole number from 1 to {MOST_LAYERS}."
            )
        object.__setattr__(self, "model_id", str(self.model_id))  # a Path, perhaps
        object.__setattr__(self, "remove", check_layers(self.remove, self.num_layers))
        if len(self.origin) != self.num_layers:
            raise InvalidPlanError(
                f"The lineage leaves {len(self.origin)} layers, and the model has "
                f"{self.num_layers}: it is damaged."
            )

    @cached_property
    def origin(self) -> tuple[int, ...]:
        """The number that each layer of the model has in the first model of its lineage."""
        if not self.lineage:
            return tuple(range(self.num_layers))
        left = list(range(check_type(self.lineage[0].get("num_layers"), int, "num_layers")))
        for cut in self.lineage:
            check_type(cut.get("model_id"), str, "model_id")
            gone = check_layers(cut.get("remove"), len(left))
            left = [layer for index, layer in enumerate(left) if index not in gone]
        return tuple(left)

    def as_earlier(self) -> list[dict[str, Any]]:
        """The lineage of the model that this plan makes."""
        names = ("model_id", "num_layers", "strategy")
        cut = {**{name: getattr(self, name) for name in names}, "remove": list(self.remove)}
        return [*self.lineage, cut]

    @property
    def keep(self) -> tuple[int, ...]:
        """The 0-based indices that stay, ascending."""
        removed = set(self.remove)
        return tuple(index for index in range(self.num_layers) if index not in removed)

    def __repr__(self) -> str:
        return (
            f"PruningPlan({self.model_id or 'a model in memory'!r}, {self.strategy}: without "
            f"{list(self.remove)} of {self.num_layers} layers)"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        if self.lineage:
            first = ", ".join(str(self.origin[layer]) for layer in self.remove)
            lines.append(f"  of {self.lineage[0].get('model_id')!r} these are layers {first}")
        if held := self.held_out:
            lines.append(
                f"  costs {cost_text(held)}, {held['unit']}, {counted(held['items'], 'item')}"
            )
        lines += [
            f"  {one['goal']}: {one['asked']} asked for, {one['predicted']:.6g} predicted"
            for one in self.options.get("goals", ())
        ]
        if self.steps:
            lines.append(f"  the search took {len(self.steps)} steps: plan.steps")
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per layer: whether it goes, and its score if it has one."""
        import pandas as pd

        layers = range(self.num_layers)
        columns: dict[str, Any] = {"removed": [layer in self.remove for layer in layers]}
        if self.scores is not None:
            columns["score"] = [self.scores.get(layer, math.nan) for layer in layers]
        return pd.DataFrame(columns, index=pd.RangeIndex(self.num_layers, name="layer"))

    def _repr_html_(self) -> str:
        """What goes and what it costs, and by layer the scores if there are any."""
        return table_html(str(self), None if self.scores is None else self.to_frame())

    def check_model(self, num_layers: int, identity: Mapping[str, str]) -> None:
        """Raise InvalidPlanError if the plan was made for another model.

        Args:
            num_layers: depth of the model.
            identity: what is known of its checkpoint, as in `model`; what only one side knows is
                not compared.
        """
        if num_layers != self.num_layers:
            raise InvalidPlanError(
                f"The plan is for a model of {self.num_layers} layers ({self.model_id!r}), this "
                f"one has {num_layers}: use the plan's model, or score this one."
            )
        known = self.model.keys() & identity.keys()
        if "weights" in known:  # whatever commit they come from
            known -= {"revision"}
        for part in (name for name in IDENTITY if name in known):
            if self.model[part] != identity[part]:
                raise InvalidPlanError(
                    f"The plan was made for another model, {self.model_id!r} ({part} "
                    f"{self.model[part]}), than this one ({part} {identity[part]}), and layers "
                    "that one model can do without another may need: score this one, or name the "
                    f"layers yourself ({','.join(map(str, self.remove))})."
                )

    def _items(self) -> Iterator[tuple[str, Any]]:
        for name, value in super()._items():
            yield name, value.to_dict() if isinstance(value, LayerScores) else value

    def _as_changed(self, changed: bool) -> PruningPlan:
        """The layers as they stand, without what was measured."""
        prompts = check_type(self.data.get("prompts", []), list[str], "data.prompts")
        kept = replace(
            self,
            data={"prompts": prompts} if prompts else {},
            scores=None,
            steps=[],
            held_out={},
            healing={},
            engines={},
            edited=self.edited or changed,
        )
        if kept != self:
            why = "was changed since it was written" if changed else "has no checksum"
            logger.warning(
                "The plan for %s %s: its layers are used as they stand, and what it says was "
                "measured is left out.",
                self.model_id,
                why,
            )
        return kept

    @classmethod
    def _convert(cls, values: dict[str, Any]) -> dict[str, Any]:
        """In plan/1 the record of the healing was an option."""
        options = dict(values.get("options", {}))
        held_out = values.get("held_out") or {}
        for name, expected in HELD_OUT.items() if held_out else ():
            check_type(held_out[name], expected, name)
        for kind in held_out.get("kinds", {}).values():
            for name, expected in COST.items():
                check_type(kind[name], expected, name)
        return {**values, "healing": options.pop("heal", {}), "options": options}


@dataclass(frozen=True, repr=False)
class DepthCurve(JsonFile):
    """What it costs to remove 1, 2, ... layers, to choose a number by looking.

    Attributes:
        model_id: the model as it was named.
        num_layers: its number of decoder layers.
        strategy: what chose the layers at every depth.
        unit: what a change is.
        points: for each number of layers a dict: ``n_layers``; ``removed``, 0-based, ascending;
            ``change``, relative, on the data the choice was made on; ``held_out``, as in
            `PruningPlan`, or None.
        data: fingerprint and size of the data the choice rests on.
        versions: of the packages that made it.

    Raises:
        InvalidPlanError: points that are not of growing depth, or without a finite change.
    """

    FORMAT = "llm_pruner.curve/1"

    model_id: str
    num_layers: int
    strategy: str
    unit: str
    points: list[dict[str, Any]]
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_id", str(self.model_id))
        depths = [point["n_layers"] for point in self.points]
        if not depths or depths != sorted(set(depths)):
            raise InvalidPlanError(f"The points of a curve need growing depths, got {depths}.")
        for point in self.points:
            removed = check_layers(point["removed"], self.num_layers)
            if len(removed) != point["n_layers"] or not math.isfinite(point["change"]):
                raise InvalidPlanError(f"This point of a curve is damaged: {point}.")
            for name, expected in COST.items() if point.get("held_out") else ():
                check_type(point["held_out"][name], expected, name)

    def __repr__(self) -> str:
        first, last = (point["n_layers"] for point in (self.points[0], self.points[-1]))
        return (
            f"DepthCurve({self.model_id!r}, {self.strategy}: {first} to {last} of "
            f"{self.num_layers} layers, {self.unit})"
        )

    def to_frame(self) -> pd.DataFrame:
        """A table with one row per number of layers, ``n_layers`` its index."""
        import pandas as pd

        rows = []
        for point in self.points:
            held = point.get("held_out") or {}
            kept = {name: held[name] for name in COST if held}
            found = {f"held_out_{name}": value for name, value in kept.items()}
            removed = ", ".join(map(str, point["removed"]))
            row = {"n_layers": point["n_layers"], "change": point["change"]}
            rows.append({**row, **found, "removed": removed})
        return pd.DataFrame(rows).set_index("n_layers")

    def _repr_html_(self) -> str:
        """A table."""
        return table_html(repr(self), self.to_frame())


@dataclass(frozen=True)
class Comparison:
    """One quantity of two models: before and after.

    Attributes:
        name: what it is, such as ``perplexity`` or ``arc_easy (acc)``.
        group: where it belongs: ``text``, ``tasks``, ``answers``, ``size`` or ``speed``.
        unit: of the values; empty for a plain number.
        before, after: the values.
        higher_is_better: True or False; None where neither is.
        count: items behind both values, or timed runs; None where nothing was sampled.
        low, high: 95 % interval of ``after - before``, paired over the items or runs; None where
            nothing was sampled.
        floor: what chance, or an unrelated answer, scores; None where there is no such thing.
        note: how it was measured, in a few words.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """

    name: str
    group: str
    unit: str
    before: float
    after: float
    higher_is_better: bool | None = None
    count: int | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        numbers = (self.before, self.after, self.low, self.high, self.floor)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise NonFiniteError(f"{self.name} is not finite: {self}. Check the checkpoint.")

    @property
    def change(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``unclear`` where the interval holds 0.

        Empty without an interval, and for a clear change of what is neither good nor bad.
        """
        if self.low is None or self.high is None:
            return ""
        if self.low <= 0 <= self.high:
            return "unclear"
        if self.higher_is_better is None:
            return ""
        return "better" if (self.low > 0) == self.higher_is_better else "worse"

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        ends = ""
        if self.low is not None and self.high is not None:
            ends = f", 95 % interval {self.low:+.4g} to {self.high:+.4g}"
        verdict = f": {self.verdict}" if self.verdict else ""
        values = f"{self.before:.4g} to {self.after:.4g}{unit}"
        return f"{self.name}: {values} ({self.change:+.4g}{ends}){verdict}"

    def _repr_html_(self) -> str:
        """One line."""
        return table_html(str(self))


@dataclass(frozen=True, repr=False)
class PruningReport(JsonFile):
    """A plan that was carried out: what it cost and what it bought.

    ``report["perplexity"]`` is the comparison of that name.

    Attributes:
        plan: the plan.
        output_dir: where the checkpoint lies.
        comparisons: every quantity of the original and of the pruned (and healed) model.
        heal: the plan's ``healing``, and under ``cut_quality`` what the removal costs without it
            on the evaluation data.
        evaluation_data: fingerprint and size of the data behind the comparisons.
        samples: questions of that data with ``prompt``, ``reference``, ``before``, ``after``.
        command: the command line; empty for a script.
        versions: of the packages that made it.
        machine: what it ran on: ``cpu``, ``cores``, ``threads``, ``gpu``, ``device``, ``dtype``.
        protocol: how it was measured: ``seed``, ``items``, ``bootstrap_draws``, ``batch_size``, ...
        seconds: how long it took to remove, heal, write and compare, once layers were chosen.

    Raises:
        InvalidPlanError: two comparisons of one name.
    """

    FORMAT = "llm_pruner.report/2"

    plan: PruningPlan
    output_dir: str
    comparisons: list[Comparison]
    heal: dict[str, Any] = field(default_factory=dict)
    evaluation_data: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        names = [row.name for row in self.comparisons]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise InvalidPlanError(f"Comparisons of the same name: {repeated}: name each once.")

    def __getitem__(self, name: str) -> Comparison:
        """The comparison called `name`; UnknownNameError if there is none."""
        for row in self.comparisons:
            if row.name == name:
                return row
        raise UnknownNameError.of("comparison", name, [row.name for row in self.comparisons])

    def __repr__(self) -> str:
        return f"PruningReport({self.plan!r}, {counted(len(self.comparisons), 'comparison')})"

    def __str__(self) -> str:
        return "\n".join([str(self.plan), *(f"  {row}" for row in self.comparisons)])

    def _repr_html_(self) -> str:
        """What went, and the comparisons as a table."""
        columns = ["unit", "before", "after", "change", "low", "high", "count"]
        names = {"low": "change from", "high": "change to"}
        return table_html(str(self.plan), self.to_frame()[columns].rename(columns=names))

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in self.comparisons)

    def to_frame(self) -> pd.DataFrame:
        """The comparisons as a table, one row each, ``name`` its index, with ``change``."""
        import pandas as pd

        frame = pd.DataFrame([asdict(row) for row in self.comparisons]).set_index("name")
        frame.insert(frame.columns.get_loc("after") + 1, "change", frame["after"] - frame["before"])
        return frame

    def _items(self) -> Iterator[tuple[str, Any]]:
        for name, value in super()._items():
            if name == "comparisons":
                value = [asdict(one) for one in value]
            yield name, json.loads(value.to_json()) if isinstance(value, PruningPlan) else value


def cost_texts(cost: Mapping[str, Any], before: str = "") -> tuple[str, str]:
    """A change in percent, and in brackets its 95 % interval with `before` before it."""
    change, *ends = (f"{cost[name]:+.1%}" for name in COST if cost[name] is not None)
    return change, f"({before}{' to '.join(ends) if ends else 'one item: no interval'})"


def cost_text(cost: Mapping[str, Any], before: str = "") -> str:
    """`cost_texts` in one line."""
    return " ".join(cost_texts(cost, before))


def check_layers(layers: Any, num_layers: int) -> tuple[int, ...]:
    """`layers` as an ascending tuple of 0-based indices into a stack of `num_layers`.

    Raises:
        InvalidPlanError: not integers, out of range, negative, repeated, or every layer.
    """
    allowed = f"indices are whole numbers from 0 to {num_layers - 1}, the model's last layer"
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise InvalidPlanError(f"layers={layers!r:.80} must be a list of indices: {allowed}.")
    indices = list(layers)
    for index in indices:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise InvalidPlanError(f"Layer {index!r} is not an index: {allowed}.")
        if not 0 <= index < num_layers:
            raise InvalidPlanError(f"Layer {index} is out of range: {allowed}.")
    repeated = sorted(index for index, count in Counter(map(int, indices)).items() if count > 1)
    if repeated:
        raise InvalidPlanError(f"Layers {repeated} are listed more than once: list each once.")
    if len(indices) == num_layers:
        raise InvalidPlanError(f"All {num_layers} layers would be removed: keep at least one.")
    return tuple(sorted(int(index) for index in indices))
