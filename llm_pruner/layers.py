"""The decoder layers of a model as one list: find, observe, bypass, remove.

The only module that knows how models are built.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from .configs import layer_counts, prune_config, text_config
from .errors import UnsupportedModelError
from .likelihood import evaluating
from .results import check_layers

Observer = Callable[[int, torch.Tensor, torch.Tensor], None]

# Attributes in which a layer remembers its place, to address its slot of the KV cache.
SLOT_NAMES = ("layer_idx", "layer_id", "layer_number")
OTHER_TOWERS = ("vision", "visual", "audio", "image", "speech")


class LayerStack(Sequence[nn.Module]):
    """The decoder layers of a causal language model, in order.

    The stack is found by looking: it is the list of modules whose length is the layer count
    of the model's text config. `path` names it where looking is not enough.

    Args:
        model: the model; it is never changed for good by anything in this class.
        path: dotted name of the ``ModuleList``, e.g. ``model.layers``; found if None.

    Attributes:
        model: the model.
        path: dotted name of the layer list inside the model.

    Raises:
        UnsupportedModelError: no stack or several stacks fit, an encoder-decoder model, or
            `path` does not name a list of modules.
    """

    def __init__(self, model: nn.Module, path: str | None = None) -> None:
        self.model = model
        self.path = _find_path(model) if path is None else path
        self._forms: list[_ReturnForm] | None = None
        _layer_list(model, self.path)

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
        return _layer_list(self.model, self.path)

    @property
    def device(self) -> torch.device:
        """Where token ids have to be for the model's forward."""
        return next(self.model.parameters()).device

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(index, hidden_in, hidden_out)`` whenever a layer has run.

        Both tensors are (sequences, tokens, hidden), as they are: padding included. A bypassed
        layer is not reported. The hooks are gone when the block ends, also after an error.
        """

        def hook(index: int) -> Callable[..., None]:
            def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                observer(index, _hidden_in(args, kwargs), _hidden_out(output))

            return call

        with ExitStack() as handles:
            for index, layer in enumerate(self):
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
        removed = check_layers(indices, len(self))
        returns = self._return_forms() if removed else []
        layers = self._list
        originals = {index: layers[index] for index in removed}
        try:
            for index, layer in originals.items():
                layers[index] = _Bypass(layer, returns[index])
            yield self.model
        finally:
            for index, layer in originals.items():
                layers[index] = layer

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
        tensors = [*self.model.parameters(), *self.model.buffers()]
        pruned = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        layers = _layer_list(pruned, self.path)
        _replace_module(pruned, self.path, nn.ModuleList(layers[index] for index in kept))
        config = getattr(pruned, "config", None)
        if config is None or not hasattr(type(pruned), "_from_config"):
            _renumber_by_rank(pruned.get_submodule(self.path), kept)
            return pruned
        prune_config(text_config(config), kept, len(self))
        _sync_with_skeleton(self.model, pruned, self.path, kept)
        return pruned

    def _return_forms(self) -> list[_ReturnForm]:
        """How each layer returns its result, learned from one forward pass of two tokens."""
        if self._forms is None:
            calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

            def hook(index: int) -> Callable[..., None]:
                def call(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    calls[index] = (args, kwargs, output)

                return call

            with ExitStack() as handles, evaluating(self.model):
                for index, layer in enumerate(self):
                    handle = layer.register_forward_hook(hook(index), with_kwargs=True)
                    handles.callback(handle.remove)
                self.model(input_ids=torch.tensor([[0, 1]], device=self.device), use_cache=False)
            self._forms = _learn_forms(calls, len(self))
        return self._forms


Source = int | str | None  # a positional argument, a keyword argument, or nothing


@dataclass(frozen=True)
class _ReturnForm:
    """What a layer returns, and from which of its own inputs a stand-in takes each part.

    Attributes:
        build: makes the layer's kind of result from the parts; None for a bare tensor.
        sources: for each part, the input that the next layer would get it as.
    """

    build: Callable[[list[Any]], Any] | None = None
    sources: tuple[Source, ...] = ()


def _learn_forms(
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]], n_layers: int
) -> list[_ReturnForm]:
    """Return forms from what went in and out of the layers in one pass.

    A layer may return more than the hidden state, and some of it is carried to the next layer
    (a router's state, attention indices). Where part j of a result reappears as an input of the
    next layer, a stand-in has to hand its own such input on.
    """
    forms: list[_ReturnForm] = []
    for index in range(n_layers):
        output = calls[index][2] if index in calls else None
        if not isinstance(output, tuple | list):
            forms.append(_ReturnForm())
            continue
        args, kwargs, _ = calls.get(index + 1, ((), {}, None))
        inputs = _by_source(args, kwargs)
        sources = tuple(
            None if part is None else next((k for k, v in inputs.items() if v is part), None)
            for part in output
        )
        forms.append(_ReturnForm(_builder(output), sources))
    known = {len(form.sources): form for form in forms if form.sources and _goes_on(form)}
    return [
        form if not form.sources or _goes_on(form) else known.get(len(form.sources), form)
        for form in forms
    ]


def _goes_on(form: _ReturnForm) -> bool:
    """Whether anything the layer returns was seen to go on (not so for the last layer)."""
    return any(source is not None for source in form.sources)


def _builder(output: tuple[Any, ...] | list[Any]) -> Callable[[list[Any]], Any]:
    kind: Any = type(output)
    build: Callable[[list[Any]], Any] = getattr(kind, "_make", kind)  # of a named tuple, or not
    return build


def _by_source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Source, Any]:
    inputs: dict[Source, Any] = dict(enumerate(args))
    inputs.update(kwargs)
    return inputs


class _Bypass(nn.Module):
    """Stands in for a layer: hands its input on, answers every attribute like the layer."""

    def __init__(self, layer: nn.Module, form: _ReturnForm) -> None:
        super().__init__()
        # Not a submodule: the layer's parameters must not appear a second time.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_form", form)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden_in(args, kwargs)
        form: _ReturnForm = self.__dict__["_form"]
        if form.build is None:
            return hidden
        inputs = _by_source(args, kwargs)
        parts = [None if source is None else inputs.get(source) for source in form.sources]
        if not _goes_on(form):
            parts[0] = hidden
        return form.build(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def _hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def _hidden_out(output: Any) -> torch.Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def _find_path(model: Any) -> str:
    """Dotted name of the decoder's layer list."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None:
        raise UnsupportedModelError(
            f"{name} has no config that says how many layers it has: name the list of layers, "
            "LayerStack(model, path='...')."
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
            f"No list of {sorted(counts)} modules was found in {name}: name the list of layers, "
            "LayerStack(model, path='...')."
        )
    if len(outermost) > 1:
        raise UnsupportedModelError(
            f"Several lists in {name} could be the decoder layers: {sorted(outermost)}. Name one, "
            "LayerStack(model, path='...')."
        )
    return str(next(iter(outermost)))


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


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _renumber_by_rank(layers: nn.Module, kept: Sequence[int]) -> None:
    """Without a config to build from: slots that held the old index get the new one."""
    for position, old in enumerate(kept):
        for module in layers.get_submodule(str(position)).modules():
            for slot in SLOT_NAMES:
                if vars(module).get(slot) == old:
                    setattr(module, slot, position)


def _sync_with_skeleton(
    original: nn.Module, pruned: nn.Module, path: str, kept: Sequence[int]
) -> None:
    """Give `pruned` every attribute that a model built from its config has.

    Two models without memory are built, from the old and from the new config. Where a kept
    layer differs between them, its behaviour depends on its position: a cache slot is copied,
    anything else is refused. Outside the layers a difference follows from the layer count and
    is copied.
    """
    before, after = _skeleton(original), _skeleton(pruned)
    _compare_tensors(pruned, after)
    depends: list[str] = []
    targets = dict(pruned.named_modules())
    references = dict(before.named_modules())
    for name, module in after.named_modules():
        old_name = _old_name(name, path, kept)
        old, new = _plain(references[old_name]), _plain(module)
        for key in old.keys() | new.keys():
            if old.get(key) == new.get(key):
                continue
            if key in SLOT_NAMES or old_name == name:
                setattr(targets[name], key, new[key])
            else:
                depends.append(f"{old_name}.{key} ({old.get(key)!r} -> {new.get(key)!r})")
    if depends:
        raise UnsupportedModelError(
            f"{type(original).__name__} without these layers cannot be written exactly: kept "
            f"layers would change with their position: {'; '.join(sorted(depends)[:5])}. "
            "Choose other layers."
        )


def _old_name(name: str, path: str, kept: Sequence[int]) -> str:
    """The name that a module of the pruned model had in the original."""
    prefix = path + "."
    if not name.startswith(prefix):
        return name
    position, dot, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{kept[int(position)]}{dot}{rest}"


def _skeleton(model: Any) -> nn.Module:
    """A model without memory, built from the config as it will be read back from disk."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            config = type(model.config).from_pretrained(folder)
        except (ValueError, TypeError, KeyError) as error:
            raise UnsupportedModelError(
                f"The config of {type(model).__name__} without these layers is not valid: {error}"
            ) from error
    with torch.device("meta"):
        built = type(model)._from_config(config)
    assert isinstance(built, nn.Module)
    return built


def _compare_tensors(pruned: nn.Module, skeleton: nn.Module) -> None:
    have = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    want = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    differing = sorted(
        name for name in have.keys() | want.keys() if have.get(name) != want.get(name)
    )
    if differing:
        name = differing[0]
        raise UnsupportedModelError(
            f"{type(pruned).__name__} without these layers cannot be reloaded: "
            f"{len(differing)} tensors differ from what its config describes, first {name!r} "
            f"(here {have.get(name)}, in the config's model {want.get(name)}). Choose other layers."
        )


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values."""
    names = vars(module).keys() - {"training", "_is_hf_initialized"}
    tied = ("_tied_weights_keys", "all_tied_weights_keys")
    return {
        name: vars(module)[name]
        for name in names
        if (not name.startswith("_") or name in tied) and _is_plain(vars(module)[name])
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or isinstance(value, int | float | str | bool)
