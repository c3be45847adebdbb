"""The decoder layers of a model as one list: find, observe, bypass, remove.

The only module that knows how models are built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property, partial
from itertools import islice, zip_longest
from typing import Any, TypeVar, overload

import torch
from torch import nn

from ..config.layer_names import LayerNames
from ..config.outer_rules import refuse_injected
from ..config.rules import OTHER_TOWERS, layer_counts, prune_config, text_config
from ..errors import InvalidPlanError, UnsupportedModelError
from ..results import check_layers
from .bypass import Bypass, ReturnForm, hidden_in, hidden_out, learn_forms, with_hidden
from .forward import (
    computed,
    evaluating,
    hook_after,
    hook_before,
    refuse_adapters,
    undoing,
    using,
)
from .loading import model_fingerprint
from .removal import remove_layers, skeleton

TRIALS, ALTERNATIVES = 4, 3  # removals tried for the message of a refusal, and sets it names
InputObserver = Callable[[int, torch.Tensor], None]
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
T = TypeVar("T")


class LayerStack(Sequence[nn.Module]):
    """The decoder layers of a causal language model, in order.

    Args:
        model: the model; nothing in this class changes it for good.
        path: dotted name of the ``ModuleList``, e.g. ``model.layers``; if None, the list whose
            length is the layer count of the model's text config.

    Attributes:
        model: the model.
        paths: dotted name of the layer list inside the model; of every list where a layer is
            made of entries of several lists (XLM's attentions, feed-forwards and norms) or two
            stacks share one depth (HRM).

    Raises:
        UnsupportedModelError: no stack or several stacks fit, an encoder-decoder model, or
            `path` does not name a list of modules.
    """

    def __init__(self, model: nn.Module, path: str | None = None) -> None:
        self.model = model
        self.paths = _find_paths(model) if path is None else (path,)
        self._forms: dict[str, list[ReturnForm]] = {}
        for name in self.paths:
            _layer_list(model, name)

    def __repr__(self) -> str:
        where = " and ".join(self.paths)
        return f"<{len(self)} layers at {where} of {type(self.model).__name__}>"

    def __len__(self) -> int:
        return len(self._list)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[nn.Module]: ...
    def __getitem__(self, index: int | slice) -> nn.Module | Sequence[nn.Module]:
        return list(self._list)[index]

    @property
    def _list(self) -> nn.ModuleList:
        return _layer_list(self.model, self.paths[0])

    @property
    def names(self) -> LayerNames:
        """The layers as they are named among the model's modules and tensors."""
        return LayerNames(tuple(f"{path}." for path in self.paths), len(self))

    @property
    def device(self) -> torch.device:
        """Where token ids have to be for the model's forward."""
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device  # offloaded: moved by hooks

    @property
    def offloaded(self) -> bool:
        """Whether the weights are read from the checkpoint layer by layer."""
        return False

    def require_weights(self, purpose: str) -> None:
        """Raise UnsupportedModelError if `purpose` needs weights that are not in memory."""

    @property
    def fingerprint(self) -> str:
        """Short hash that tells models apart; see `model_fingerprint`."""
        return model_fingerprint(self.model)

    def run_all(self, calls: Iterable[Callable[[], T]], *, alike: bool = False) -> Iterator[T]:
        """Make `calls`, which run the model, and yield what they return, in their order.

        Here each call is made when its result is asked for; offloaded models advance all together.
        Calls are `alike` if they run the model on the same inputs, and differ only in the layers
        that they bypass.
        """
        for call in calls:
            yield call()

    def prepare(self) -> None:
        """Find out what bypassing layers takes, ahead of a `run_all` that does it."""

    @property
    def can_bypass(self) -> bool:
        """Whether layers pass nothing but the hidden state to one another."""
        return self.can_replay

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(index, hidden_in, hidden_out)`` whenever a layer has run.

        Both tensors are (sequences, tokens, hidden), padding included. A bypassed layer is not
        reported. The hooks are removed when the block ends, also after an error.

        Raises:
            UnsupportedModelError: the layers are not one list (see `paths`).
        """
        if len(self.paths) > 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has its layers in several lists ({self.paths}), so "
                "there is no hidden state between them to read: use a strategy that measures "
                "(ablation, smart)."
            )

        def seen(index: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not isinstance(layer, Bypass):
                observer(index, hidden_in(args, kwargs), hidden_out(output))

        with using(self.model), _after_each(self, seen):
            yield

    def bypass(self, indices: Iterable[int]) -> AbstractContextManager[nn.Module]:
        """Inside the block the model computes as if the layers `indices` were not there.

        A `Bypass` takes the place of each, so masks, positions and layer kinds stay as they are.
        The layers are back when the block ends, also after an error. For forward passes; to
        generate text, which addresses the KV cache by layer index, use `remove`.

        Raises:
            InvalidPlanError: `indices` do not fit the stack.
        """
        return self._bypassed(check_layers(indices, len(self)))

    @contextmanager
    def _bypassed(self, removed: Collection[int]) -> Iterator[nn.Module]:
        in_parts = len({path.rpartition(".")[0] for path in self.paths}) < len(self.paths)
        with using(self.model), undoing() as back:
            forms = {path: self._return_forms(path) for path in self.paths} if removed else {}
            for path in forms:
                layers = _layer_list(self.model, path)
                bypasses: dict[str, nn.Module] = {}
                for index in removed:
                    adds = in_parts and not isinstance(layers[index], nn.LayerNorm)
                    bypasses[str(index)] = Bypass(layers[index], forms[path][index], adds=adds)
                # one call each way: an interrupt is before or after it
                back.append(partial(layers._modules.update, dict(layers._modules)))
                layers._modules.update(bypasses)
            yield self.model

    @contextmanager
    def observe_inputs(self, indices: Iterable[int], observer: InputObserver) -> Iterator[None]:
        """Call ``observer(index, hidden)`` with the input of the layers `indices` before they run.

        Unlike with `observe`, bypassed layers are reported too: their input passes through.

        Raises:
            UnsupportedModelError: see `replay`.
        """
        self._require_one_state()

        def seen(index: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
            observer(index, hidden_in(args, kwargs))

        with using(self.model), undoing() as back:
            for index in indices:
                hook_before(back, self[index], partial(seen, index))
            yield

    @contextmanager
    def replay(
        self, start: int, hidden: torch.Tensor, removed: Iterable[int] = ()
    ) -> Iterator[nn.Module]:
        """Inside the block a forward pass begins at layer `start`, on the stored state `hidden`.

        The layers below do nothing. The result is that of the pass in which `hidden` was observed;
        give it the same token ids and mask.

        Args:
            start: the layer whose input is `hidden`.
            hidden: (sequences, tokens, hidden), from `observe_inputs` or `observe`.
            removed: layers to bypass from `start` on; those below do not matter.

        Raises:
            InvalidPlanError: `start` or `removed` do not fit the stack.
            UnsupportedModelError: the layers pass on more than the hidden state, are not one
                list, or are offloaded.
        """
        if not 0 <= start < len(self):
            raise InvalidPlanError(f"start={start} must be from 0 to {len(self) - 1}, a layer.")
        self._require_one_state()

        def enter(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return with_hidden(args, kwargs, hidden)

        skipped = {*range(start), *check_layers(removed, len(self))}
        with self._bypassed(skipped) as model, undoing() as back:
            hook_before(back, self[start], enter)
            yield model

    def _require_one_state(self) -> None:
        if self.offloaded or not self._passes_one_state():
            why = "are offloaded" if self.offloaded else "pass on more than the hidden state"
            raise UnsupportedModelError(
                f"The layers of {type(self.model).__name__} {why}, so a pass cannot begin in their "
                "middle: run whole passes, with LayerStack.bypass."
            )

    def _passes_one_state(self) -> bool:
        return len(self.paths) == 1 and all(form.carried <= 1 for form in self._return_forms())

    @cached_property
    def can_replay(self) -> bool:
        """Whether `replay` gives exactly the result of the whole pass.

        Tried out on two tokens, because a layer may use something that a lower layer has left
        outside the hidden state (shared keys and values). False for offloaded layers.
        """
        if self.offloaded or not self._passes_one_state():
            return False
        states: dict[int, torch.Tensor] = {}
        starts = sorted({len(self) // 2, len(self) - 1})
        with evaluating(self.model):
            with self.observe_inputs(range(len(self)), states.__setitem__):
                whole = computed(self._probe())
            if len(states) < len(self):  # some layers run for images alone, say
                return False
            for start in starts:
                with self.replay(start, states[start]):
                    try:
                        again = computed(self._probe())
                    except (LookupError, TypeError, AttributeError):  # lower layers did not run
                        return False
                if not torch.allclose(again, whole, rtol=1e-4, atol=1e-5, equal_nan=True):
                    return False
        return True

    def _probe(self) -> Any:
        """The model's output for two tokens."""
        ids = torch.tensor([[0, 1]], device=self.device)
        return self.model(input_ids=ids, use_cache=False)

    def remove(self, indices: Iterable[int]) -> Any:
        """A new model without the layers `indices`.

        Every tensor is shared: the copy takes almost no memory, and the original stays whole. The
        copy has its own config, layer indices and cache slots. It is compared attribute by
        attribute with a model built freshly from that config, which is what reloading will build.

        Raises:
            InvalidPlanError: `indices` do not fit the stack.
            UnsupportedModelError: the architecture's config cannot express the pruned model. The
                message names what stands in the way, and sets close to this one that work.
        """
        with using(self.model):
            return self._removed(frozenset(check_layers(indices, len(self))))

    def _removed(self, removed: frozenset[int]) -> Any:
        reference = skeleton(self.model)
        try:
            return remove_layers(self.model, self.names, self._kept(removed), reference)
        except UnsupportedModelError as error:
            alternatives = self._alternatives(removed, reference)
            raise UnsupportedModelError(f"{error} {alternatives}") from error

    def _kept(self, removed: Collection[int]) -> list[int]:
        return [index for index in range(len(self)) if index not in removed]

    def _alternatives(self, removed: frozenset[int], reference: nn.Module | None) -> str:
        """A sentence that names sets close to a refused one that can be removed.

        Only the closest few that pass the config rules are tried: each trial builds a model.
        """
        tried, working = [], []
        for layers in islice(filter(self._passes_config_rules, self._close_to(removed)), TRIALS):
            tried.append(sorted(layers))
            with suppress(UnsupportedModelError):
                remove_layers(self.model, self.names, self._kept(layers), reference)
                working.append(sorted(layers))
            if len(working) == ALTERNATIVES:
                break
        if working:
            return f"Sets close to this one that can be removed: {working}."
        if tried:
            return f"Nor can the sets closest to it: {tried}."
        return "Nor can any set of one layer more or less."

    def _close_to(self, removed: frozenset[int]) -> Iterator[frozenset[int]]:
        """Sets of one layer more, and of one less (or of another single layer); nearest first."""

        def distance(index: int) -> int:
            return min((abs(index - other) for other in removed), default=0)

        others = sorted(self._kept(removed), key=distance)
        larger = [removed | {index} for index in others] if len(others) > 1 else []
        smaller = [removed - {index} for index in sorted(removed)]
        if len(removed) == 1:
            smaller = [frozenset({index}) for index in others]
        for pair in zip_longest(larger, smaller):
            yield from (layers for layers in pair if layers)

    def _passes_config_rules(self, removed: frozenset[int]) -> bool:
        config: Any = copy.deepcopy(self.model.config)
        try:
            refuse_injected(config, self._kept(removed))
            prune_config(text_config(config), self._kept(removed), len(self))
        except UnsupportedModelError:
            return False
        return True

    def _return_forms(self, path: str | None = None) -> list[ReturnForm]:
        """How each layer of a list returns its result, learned from one pass of two tokens."""
        path = path or self.paths[0]
        if path not in self._forms:
            layers = _layer_list(self.model, path)
            calls: dict[int, Any] = {}

            def seen(index: int, layer: nn.Module, *call: Any) -> None:
                calls[index] = call

            with _after_each(layers, seen), evaluating(self.model):
                self._probe()
            self._forms[path] = learn_forms(calls, len(layers))
        return self._forms[path]


@contextmanager
def _after_each(layers: Iterable[nn.Module], call: Callable[..., None]) -> Iterator[None]:
    """Inside the block: ``call(index, layer, args, kwargs, output)`` after every layer."""
    with undoing() as back:
        for index, layer in enumerate(layers):
            hook_after(back, layer, partial(call, index))
        yield


def _find_paths(model: Any) -> tuple[str, ...]:
    """Dotted name of the decoder's layer list, or of the lists that make up its layers."""
    refuse_adapters(model)
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None:
        raise UnsupportedModelError(
            f"{name} has no config that says how many layers it has: name the list of layers, "
            "LayerStack(model, path='...') or --layers-path."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; only decoder-only language models are supported."
        )
    counts = layer_counts(text_config(config))
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in counts
        and not any(tower in path for tower in OTHER_TOWERS)
    }
    inside = tuple(f"{path}." for path in found)
    outermost = {path: found[path] for path in found if not path.startswith(inside)}
    if not outermost:
        raise UnsupportedModelError(
            f"No list of layers was found in {name}: its config counts {sorted(counts) or 'none'} "
            "under the names that are known, and no list is as long. Name the list, "
            "LayerStack(model, path='...') or --layers-path."
        )
    text = text_config(config)
    if len(outermost) > 1 and text is not config:  # another tower may be as deep
        own = {path: found for path, found in outermost.items() if _owner(model, path) is text}
        outermost = own or outermost
    parents = {path.rpartition(".")[0] for path in outermost}
    kinds = {type(layer) for module in outermost.values() for layer in module}
    if len(outermost) > 1 and len(parents) > 1 and len(kinds) > 1:
        raise UnsupportedModelError(
            f"Several lists in {name} could be the decoder layers: {sorted(outermost)}. Name one, "
            "LayerStack(model, path='...') or --layers-path."
        )
    return tuple(outermost)


def _owner(model: nn.Module, path: str) -> Any:
    """The config of the nearest module above `path` that has one."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return config
    return None


def _layer_list(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(f"{type(model).__name__} has no module {path!r}.") from error
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise UnsupportedModelError(
            f"{path!r} of {type(model).__name__} is a {type(found).__name__}, not a list of layers."
        )
    return found
