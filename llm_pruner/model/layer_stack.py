"""The decoder layers of a model as one list: find, observe, bypass, remove.

The only module that knows how models are built.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar, overload

import torch
from torch import nn

from ..errors import InvalidPlanError, UnsupportedModelError
from ..results import check_layers
from .bypass import Bypass, ReturnForm, hidden_in, hidden_out, learn_forms
from .config_rules import OTHER_TOWERS, layer_counts, text_config
from .forward import evaluating
from .loading import model_fingerprint
from .removal import cut_layers

Entry = Callable[[int, torch.Tensor], None]
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
T = TypeVar("T")


class LayerStack(Sequence[nn.Module]):
    """The decoder layers of a causal language model, in order.

    The stack is found by looking: it is the list of modules whose length is the layer count
    of the model's text config. `path` names it where looking is not enough.

    Args:
        model: the model; it is never changed for good by anything in this class.
        path: dotted name of the ``ModuleList``, e.g. ``model.layers``; found if None.

    Attributes:
        model: the model.
        paths: dotted name of the layer list inside the model; of all of them where a layer is
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
    def device(self) -> torch.device:
        """Where token ids have to be for the model's forward."""
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device  # offloaded: moved by hooks

    @property
    def streamed(self) -> bool:
        """Whether the weights are read from the checkpoint layer by layer."""
        return False

    def require_weights(self, purpose: str) -> None:
        """Raise UnsupportedModelError if `purpose` needs weights that are not in memory."""

    @property
    def fingerprint(self) -> str:
        """Short hash that tells models apart, see `model_fingerprint`."""
        return model_fingerprint(self.model)

    def sweep(self, calls: Iterable[Callable[[], T]], *, alike: bool = False) -> Iterator[T]:
        """What `calls`, which run the model, return, in their order.

        Here each is made when its result is asked for. Where the weights are not in memory all are
        made at once, layer by layer, so that every weight is read once for all of them.

        Args:
            calls: functions without arguments.
            alike: whether they run the model on the same inputs, and differ only in the layers
                they bypass.
        """
        for call in calls:
            yield call()

    def prepare(self) -> None:
        """Find out what bypassing layers takes, before a sweep in which it is done."""

    @property
    def can_bypass(self) -> bool:
        """Whether the layers depend on one another by nothing but the hidden state."""
        return self.can_replay

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(index, hidden_in, hidden_out)`` whenever a layer has run.

        Both tensors are (sequences, tokens, hidden), as they are: padding included. A bypassed
        layer is not reported. The hooks are gone when the block ends, also after an error.

        Raises:
            UnsupportedModelError: the layers are not one list (see `paths`).
        """
        if len(self.paths) > 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has its layers in several lists ({self.paths}), so "
                "there is no hidden state between them to read: use a strategy that measures "
                "(ablation, smart)."
            )

        def hook(index: int) -> Callable[..., None]:
            def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                observer(index, hidden_in(args, kwargs), hidden_out(output))

            return call

        with ExitStack() as handles:
            for index, layer in enumerate(self):
                if not isinstance(layer, Bypass):
                    handle = layer.register_forward_hook(hook(index), with_kwargs=True)
                    handles.callback(handle.remove)
            yield

    @contextmanager
    def bypass(self, indices: Iterable[int]) -> Iterator[nn.Module]:
        """Inside the block the model computes as if the layers `indices` were not there.

        Each is replaced by a stand-in that returns its input and answers for every other
        attribute like the layer itself, so masks, positions and layer kinds stay as they are.
        The layers are back when the block ends, also after an error. For forward passes; to
        generate text, which addresses the KV cache by layer number, use `remove`.

        Raises:
            InvalidPlanError: `indices` do not fit the stack.
        """
        with self._standing_in(check_layers(indices, len(self))) as model:
            yield model

    @contextmanager
    def _standing_in(self, removed: Collection[int]) -> Iterator[nn.Module]:
        forms = {path: self._return_forms(path) for path in self.paths} if removed else {}
        in_parts = len({path.rpartition(".")[0] for path in self.paths}) < len(self.paths)
        originals = [
            (path, index, _layer_list(self.model, path)[index])
            for path in forms
            for index in removed
        ]
        try:
            for path, index, layer in originals:
                adds = in_parts and not isinstance(layer, nn.LayerNorm)
                stand_in = Bypass(layer, forms[path][index], adds=adds)
                _layer_list(self.model, path)[index] = stand_in
            yield self.model
        finally:
            for path, index, layer in originals:
                _layer_list(self.model, path)[index] = layer

    @contextmanager
    def entering(self, places: Iterable[int], observer: Entry) -> Iterator[None]:
        """Call ``observer(index, hidden)`` with the input of the layers `places` before they run.

        Unlike with `observe`, the stand-in of a bypassed layer counts: what would enter the layer
        passes through it.
        """

        def hook(index: int) -> Callable[..., None]:
            def call(module: nn.Module, args: Any, kwargs: Any) -> None:
                observer(index, hidden_in(args, kwargs))

            return call

        with ExitStack() as handles:
            for index in places:
                handle = self._list[index].register_forward_pre_hook(hook(index), with_kwargs=True)
                handles.callback(handle.remove)
            yield

    @contextmanager
    def replay(
        self, start: int, hidden: torch.Tensor, removed: Iterable[int] = ()
    ) -> Iterator[nn.Module]:
        """Inside the block a forward pass begins at layer `start`, on the stored state `hidden`.

        The layers below do nothing, so the pass costs what the layers from `start` on cost, and
        its result is that of the pass `hidden` was observed in. Token ids and mask have to be
        those of that pass.

        Args:
            start: the layer that gets `hidden` as its input.
            hidden: (sequences, tokens, hidden), as `entering` or `observe` reports it for that
                layer.
            removed: layers to bypass from `start` on; those below do not matter.

        Raises:
            InvalidPlanError: `start` or `removed` do not fit the stack.
            UnsupportedModelError: the layers hand on more than the hidden state, or are not one
                list.
        """
        if not 0 <= start < len(self):
            raise InvalidPlanError(f"start={start} must be from 0 to {len(self) - 1}, a layer.")
        if not self._hands_on_one_state():
            raise UnsupportedModelError(
                f"The layers of {type(self.model).__name__} hand on more than the hidden state, so "
                "a pass cannot begin in their middle."
            )
        with self._replay(start, hidden, check_layers(removed, len(self))) as model:
            yield model

    @contextmanager
    def _replay(
        self, start: int, hidden: torch.Tensor, removed: Sequence[int] = ()
    ) -> Iterator[nn.Module]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        with self._standing_in({*range(start), *removed}) as model:
            handle = self._list[start].register_forward_pre_hook(enter, with_kwargs=True)
            try:
                yield model
            finally:
                handle.remove()

    def _hands_on_one_state(self) -> bool:
        carried = [len(form.sources) - form.sources.count(None) for form in self._return_forms()]
        return len(self.paths) == 1 and max(carried) <= 1

    @cached_property
    def can_replay(self) -> bool:
        """Whether `replay` gives exactly what the whole pass gives.

        Tried out on two tokens, because a layer may use what a layer below has left elsewhere
        than in the hidden state (keys and values shared between layers).
        """
        if not self._hands_on_one_state():
            return False
        given = {"input_ids": torch.tensor([[0, 1]], device=self.device), "use_cache": False}
        states: dict[int, torch.Tensor] = {}
        starts = sorted({len(self) // 2, len(self) - 1})
        with evaluating(self.model):
            with self.entering(range(len(self)), states.__setitem__):
                whole = self.model(**given).logits
            if len(states) < len(self):  # some layers run for images alone, say
                return False
            for start in starts:
                with self._replay(start, states[start]):
                    try:
                        again = self.model(**given).logits
                    except (LookupError, TypeError, AttributeError):  # what is missing below
                        return False
                if not torch.allclose(again, whole, rtol=1e-4, atol=1e-5, equal_nan=True):
                    return False
        return True

    def remove(self, indices: Iterable[int]) -> Any:
        """A new model without the layers `indices`.

        The module tree is copied and every tensor shared, so the copy costs no memory worth
        naming and the original stays whole and usable beside it. The copy has its own config,
        layer numbering and cache slots, and is compared attribute by attribute with a model
        built freshly from that config: what reloading will build.

        Raises:
            InvalidPlanError: `indices` do not fit the stack.
            UnsupportedModelError: the pruned model cannot be expressed in the architecture's
                config; the message says which layers depend on their position.
        """
        removed = set(check_layers(indices, len(self)))
        kept = [index for index in range(len(self)) if index not in removed]
        try:
            return cut_layers(self.model, self.paths, kept)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} {self._what_can_go(removed)}") from error

    def _what_can_go(self, removed: set[int]) -> str:
        """A sentence that names removals like the refused one that would work."""

        def works(layers: set[int]) -> bool:
            try:
                kept = [index for index in range(len(self)) if index not in layers]
                cut_layers(self.model, self.paths, kept)
            except UnsupportedModelError:
                return False
            return True

        alone = [index for index in range(len(self)) if works({index})]
        others = [index for index in range(len(self)) if index not in removed]
        sets = [removed - {index} for index in removed] if len(removed) > 1 else []
        sets += [removed | {index} for index in others] if len(others) > 1 else []
        near = [sorted(layers) for layers in sets if works(layers)][:5]
        hint = f" Sets near this one that can be removed: {near}." if near else ""
        return f"Layers that can be removed alone: {alone or 'none'}.{hint}"

    def _return_forms(self, path: str | None = None) -> list[ReturnForm]:
        """How each layer of a list returns its result, learned from one pass of two tokens."""
        path = path or self.paths[0]
        if path not in self._forms:
            layers = _layer_list(self.model, path)
            calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

            def hook(index: int) -> Callable[..., None]:
                def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    calls[index] = (args, kwargs, output)

                return call

            with ExitStack() as handles, evaluating(self.model):
                for index, layer in enumerate(layers):
                    handle = layer.register_forward_hook(hook(index), with_kwargs=True)
                    handles.callback(handle.remove)
                self.model(input_ids=torch.tensor([[0, 1]], device=self.device), use_cache=False)
            self._forms[path] = learn_forms(calls, len(layers))
        return self._forms[path]


def _find_paths(model: Any) -> tuple[str, ...]:
    """Dotted name of the decoder's layer list, or of the lists that make up its layers."""
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
    outermost = {
        path: module
        for path, module in found.items()
        if not any(path.startswith(other + ".") for other in found)
    }
    if not outermost:
        raise UnsupportedModelError(
            f"No list of layers was found in {name}: its config counts {sorted(counts) or 'none'} "
            "under the names that are known, and no list is as long. Name the list, "
            "LayerStack(model, path='...') or --layers-path."
        )
    parents = {path.rpartition(".")[0] for path in outermost}
    kinds = {type(layer) for module in outermost.values() for layer in module}
    if len(outermost) > 1 and len(parents) > 1 and len(kinds) > 1:
        raise UnsupportedModelError(
            f"Several lists in {name} could be the decoder layers: {sorted(outermost)}. Name one, "
            "LayerStack(model, path='...') or --layers-path."
        )
    return tuple(outermost)


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
