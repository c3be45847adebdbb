"""Carrying out a choice of layers: removed for good, healed, verified, written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_output import check_output
from ..checkpoint.mergekit import write_mergekit_yaml
from ..checkpoint.save import check_saveable, save_checkpoint
from ..checkpoint.verify import verify_removal
from ..data.items import EvalItem, fingerprint, refuse_overlap
from ..distributed import on_first
from ..errors import InvalidPlanError
from ..goals.budget import Removable, engines_of
from ..healing.heal import heal_model
from ..healing.job import Heal, Healing
from ..healing.lora_settings import LoraSettings
from ..model.layer_stack import LayerStack
from ..model.loading import model_fingerprint
from ..results import PruningPlan, check_layers
from ..storage.origin import lineage_of, model_identity, read_for
from ..utils import package_versions
from .healing_search import HealedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LayerRemover:
    """What every strategy does once its layers are chosen; see `BasePruner`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: LayerStack
    num_layers: int
    removable: Removable
    _healed: HealedModel

    def prune_and_save(
        self,
        layers: Sequence[int],
        output_dir: str | Path,
        model_id: str,
        *,
        heal: Heal = "none",
        heal_data: Sequence[EvalItem] | None = None,
        lora: LoraSettings | None = None,
        overwrite: bool = False,
        plan: PruningPlan | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Remove `layers` for good and write a complete checkpoint that is checked by reloading.

        The returned model shares the memory of the kept weights with the original, which stays
        whole; healed weights are copies.

        Args:
            layers: 0-based indices to remove.
            output_dir: folder to write; it appears complete or not at all.
            model_id: name of the original model, for the record.
            heal: ``none``; ``linear`` (closed form, no training); ``lora`` or ``full`` (training
                on top); or a `Healing`, which limits tokens and time too.
            heal_data: items to heal with, other than those the layers were chosen on.
            lora: how to train, for ``lora`` and ``full``.
            overwrite: replace an output folder that is not empty.
            plan: how the layers were chosen, for the record in ``pruning_plan.json``.

        Raises:
            InvalidPlanError: indices that do not fit the model, or none.
            InvalidDataError: healing without data, or with items that the layers were chosen on.
            OutputError: the output exists, or cannot be written.
            UnsupportedModelError: the architecture cannot express the pruned model, or be healed.
            VerificationError: the written checkpoint does not compute what it should.
        """
        if isinstance(layers, PruningPlan):
            raise InvalidPlanError(
                "prune_and_save takes a plan's layers, and the plan for the record: "
                "prune_and_save(plan.remove, ..., plan=plan)."
            )
        plan = plan or self.manual_plan(layers, model_id)
        if tuple(sorted(layers)) != plan.remove or not plan.remove:
            raise InvalidPlanError(
                f"layers={sorted(layers)} must be at least one layer, and those of the plan "
                f"({list(plan.remove)})."
            )
        pruned, _ = self.save_pruned(
            plan, output_dir, heal=heal, heal_data=heal_data, lora=lora, overwrite=overwrite
        )
        return pruned, self.tokenizer

    def save_pruned(
        self,
        plan: PruningPlan,
        output_dir: str | Path,
        *,
        heal: Heal = "none",
        heal_data: Sequence[EvalItem] | None = None,
        lora: LoraSettings | None = None,
        overwrite: bool = False,
    ) -> tuple[PreTrainedModel, PruningPlan]:
        """`prune_and_save` for a plan: the pruned model, and the plan with the healing's record."""
        reads = read_for(self.model)
        on_first(lambda: check_output(output_dir, overwrite=overwrite, reads=reads))
        check_saveable(self.model, self.num_layers, heals=Healing.of(heal).heals)
        pruned, done = self.carry_out(plan, heal, heal_data, lora)
        files = pruned, self.tokenizer, done, output_dir
        on_first(lambda: save_checkpoint(*files, overwrite=overwrite))
        return pruned, done

    def carry_out(
        self,
        plan: PruningPlan,
        heal: Heal = "none",
        heal_data: Sequence[EvalItem] | None = None,
        lora: LoraSettings | None = None,
    ) -> tuple[PreTrainedModel, PruningPlan]:
        """The model without the plan's layers, verified and healed, and the plan with the record.

        Nothing is written; see `prune_and_save` for the arguments and errors.
        """
        plan.check_model(self.num_layers, self.identity)
        self.removable.refuse_misplaced(plan.remove)
        if Healing.of(heal).heals and heal_data:
            chosen_on = plan.data.get("prompts", ())
            refuse_overlap(heal_data, chosen_on, "to heal with", "the layers were chosen on")
        pruned, record = self.heal(plan.remove, heal, heal_data, lora)
        return pruned, replace(plan, healing=record)

    def heal(
        self,
        layers: Sequence[int],
        method: Heal,
        heal_data: Sequence[EvalItem] | None,
        lora: LoraSettings | None = None,
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model without `layers`, verified and healed, and the record of the healing.

        See `heal_model`. The last result is kept: a search that heals as it goes has healed the
        set that it ends with.
        """
        self.layers.require_weights("removing layers for good")

        def make() -> tuple[Any, dict[str, Any]]:
            pruned = self.layers.remove(layers)
            verify_removal(self.layers, layers, pruned)
            return heal_model(
                self.layers, layers, pruned, self.tokenizer, method, heal_data, lora=lora
            )

        data = fingerprint(heal_data) if heal_data else ""
        how = Healing.of(method)
        settings = lora.identity() if lora and how.trains else ""
        removed = ",".join(map(str, sorted(layers)))
        return self._healed.get(
            (model_fingerprint(self.model), removed, how.identity(), data, settings), make
        )

    def manual_plan(self, layers: Sequence[int], model_id: str) -> PruningPlan:
        """A plan for layers that were chosen by hand."""
        return PruningPlan(
            model_id=model_id,
            num_layers=self.num_layers,
            remove=check_layers(layers, self.num_layers),
            versions=package_versions(),
            model=self.identity,
            engines=self._engines(layers),
            lineage=self.lineage,
        )

    @cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """The cuts that the model comes from; see `PruningPlan.lineage`."""
        return lineage_of(self.model, self.num_layers)

    def _engines(self, removed: Sequence[int]) -> dict[str, str]:
        kept = [index for index in range(self.num_layers) if index not in removed]
        return engines_of(self.model, kept)

    def export_mergekit_yaml(
        self, layers: Sequence[int], yaml_path: str | Path, model_id: str
    ) -> None:
        """Write a MergeKit passthrough recipe that keeps all layers but `layers`."""
        on_first(lambda: write_mergekit_yaml(self.layers, layers, yaml_path, model_id))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells the model's checkpoint from others; see `PruningPlan.check_model`."""
        return model_identity(self.model, self.num_layers)
