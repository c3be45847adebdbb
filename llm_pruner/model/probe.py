"""Inputs that two models are compared on: text, and what else the model takes.

They are made from the config alone. How an image has to be laid out for a class is found by trial:
a few layouts are common, and the first that the model runs on, and that changes what it computes,
is taken.
"""

from __future__ import annotations

import inspect
import math
import re
import weakref
from collections.abc import Iterator
from itertools import chain, product
from typing import Any

import torch

from ..utils import logger
from .forward import computed, evaluating, input_device, keeping_state, position_limit

Inputs = dict[str, torch.Tensor]
Layout = dict[str, torch.Tensor]  # arguments of a model's forward beside the token ids
PROBE_TOKENS = 16
MOST_PLACEHOLDERS = 1024
# The argument that takes a modality, and the part of the config that describes its encoder.
MODALITIES = {
    "image": ("pixel_values", ("vision_config", "vq_config")),
    "video": ("pixel_values_videos", ("vision_config",)),
    "audio": ("input_features", ("audio_config", "encoder_config")),
}
TOKEN_TYPES = {"image": 1, "video": 2, "audio": 3}
# Arguments that say how patches lie in a picture.
GRIDS = {
    "image_grid_thw",
    "video_grid_thw",
    "image_grid_hw",
    "spatial_shapes",
    "image_position_ids",
}
# What stands before channels, height and width: pictures, tiles of one, several of each.
LEADING = [(1,), (1, 1), (1, 2), (1, 3), (1, 5), (1, 7), (1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 4)]
_FOUND: weakref.WeakKeyDictionary[Any, dict[str, Inputs]] = weakref.WeakKeyDictionary()


def probe_inputs(model: Any) -> dict[str, Inputs]:
    """Arguments of the model's forward, by modality: ``text``, and ``image``, ``video``, ``audio``.

    Token ids are (1, tokens). A modality that the model takes, but for which no known layout
    works, is named in a warning.
    """
    if model not in _FOUND:
        generator = torch.Generator().manual_seed(0)
        found = {"text": {"input_ids": _text(model, generator)}}
        accepted = inspect.signature(model.forward).parameters
        with evaluating(model), keeping_state(model):
            for modality, (argument, _) in MODALITIES.items():
                if argument in accepted:
                    inputs = _trial(model, modality, found["text"]["input_ids"])
                    if inputs is not None:
                        found[modality] = inputs
        _FOUND[model] = found
    return _FOUND[model]


def _text(model: Any, generator: torch.Generator) -> torch.Tensor:
    """Fixed tokens within the model's vocabulary and length, none of them a placeholder."""
    config = model.config.get_text_config(decoder=True)
    length = min(PROBE_TOKENS, position_limit(model))
    special = set(_special_ids(model.config))
    words = [index for index in range(config.vocab_size) if index not in special]
    drawn = torch.randint(0, len(words), (1, length), generator=generator)
    return torch.tensor(words, device=input_device(model))[drawn.to(input_device(model))]


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")) and type(value) is int:
            yield value


def _trial(model: Any, modality: str, text: torch.Tensor) -> Inputs | None:
    """The first layout of a modality that the model runs on and heeds; a warning without any."""
    reasons: list[str] = []
    for layout in _layouts(model, modality):
        inputs = _with_placeholders(model, modality, text, layout, reasons)
        if inputs is not None and _matters(model, inputs, MODALITIES[modality][0]):
            return inputs
    logger.warning(
        "%s is not compared given %s: no known layout of its %s works.",
        type(model).__name__,
        modality,
        MODALITIES[modality][0],
    )
    logger.debug("Trials: %s", reasons)
    return None


def _with_placeholders(
    model: Any, modality: str, text: torch.Tensor, layout: Layout, reasons: list[str]
) -> Inputs | None:
    """The layout with token ids that hold as many placeholders as it has features.

    A model that is given another number of them says in its error how many features there are.
    """
    token = _placeholder(model, modality)
    tried, counts = set(), [0] if token is None else [1]
    while counts:
        count = counts.pop(0)
        if count in tried or count > MOST_PLACEHOLDERS:
            continue
        tried.add(count)
        inputs = _arranged(model, modality, text, layout, token, count)
        try:
            model(**inputs, use_cache=False)
        except Exception as error:  # of whatever kind: this layout is not the model's
            reasons.append(f"{type(error).__name__}: {error}")
            if token is not None and len(tried) == 1:
                counts = [int(number) for number in re.findall(r"\d+", str(error))[:6]]
                counts += _feature_counts(model, modality, layout)
        else:
            return inputs
    return None


def _placeholder(model: Any, modality: str) -> int | None:
    """The token that stands for a feature of the modality, if the config names one."""
    known = model.get_input_embeddings().num_embeddings
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        value = getattr(model.config, name, None)
        if type(value) is int and 0 <= value < known:
            return value
    return None


def _arranged(
    model: Any, modality: str, text: torch.Tensor, layout: Layout, token: int | None, count: int
) -> Inputs:
    """A few words, the placeholders, and the other words; the arguments that mark them."""
    media = torch.full((1, count), token or 0, device=text.device)
    ids = torch.cat([text[:, :4], media, text[:, 4:]], 1)
    inputs = {**layout, "input_ids": ids}
    accepted = inspect.signature(model.forward).parameters
    marks = torch.zeros_like(ids)
    marks[:, 4 : 4 + count] = 1
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = marks * TOKEN_TYPES[modality]
    if "token_type_ids" in accepted:
        inputs["token_type_ids"] = marks
    if "cross_attention_mask" in accepted and "aspect_ratio_ids" in layout:
        tiles = layout["pixel_values"].shape[2]
        inputs["cross_attention_mask"] = torch.ones(
            1, ids.shape[1], 1, tiles, dtype=torch.long, device=ids.device
        )
    inputs["attention_mask"] = torch.ones_like(ids)
    return inputs


def _feature_counts(model: Any, modality: str, layout: Layout) -> list[int]:
    """How many features the model makes of a layout, where it has a method that says it."""
    method = getattr(model, f"get_{modality}_features", None)
    if method is None:
        return []
    accepted = inspect.signature(method).parameters
    try:
        features = method(**{name: value for name, value in layout.items() if name in accepted})
    except Exception as error:
        logger.debug("No features: %s: %s", type(error).__name__, error)
        return []
    width = model.config.get_text_config(decoder=True).hidden_size
    found = []
    for part in (features, getattr(features, "pooler_output", None)):
        parts = part if isinstance(part, list | tuple) else [part]
        tensors = [one for one in parts if isinstance(one, torch.Tensor)]
        found.append(sum(one.numel() // width for one in tensors if one.shape[-1] == width))
    return [count for count in found if count]


def _matters(model: Any, inputs: Inputs, argument: str) -> bool:
    """Whether the model computes something else for another image."""
    first = computed(model(**inputs, use_cache=False))
    other = computed(model(**{**inputs, argument: -inputs[argument]}, use_cache=False))
    return first.shape != other.shape or not torch.equal(first, other)


def _layouts(model: Any, modality: str) -> Iterator[Layout]:
    """The ways to lay out a small input of the modality, as arguments of the forward."""
    argument, parts = MODALITIES[modality]
    names = [name for name in parts if getattr(model.config, name, None) is not None]
    encoder = getattr(model.config, names[0]) if names else model.config
    accepted = inspect.signature(model.forward).parameters
    if modality == "audio":
        shapes = _audio(encoder)
    elif GRIDS & accepted.keys():
        shapes = chain(_patches(encoder, modality), _pictures(encoder))
    else:
        shapes = chain(_pictures(encoder), _patches(encoder, modality))
    for shape, companions in shapes:
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(shape, generator=generator).to(model.dtype)
        layout = {argument: values, **companions}
        device = input_device(model)
        yield {name: value.to(device) for name, value in layout.items() if name in accepted}


def _first(encoder: Any, *names: str, default: int) -> int:
    """The first of these fields that there is; of a pair the larger."""
    for name in names:
        value = getattr(encoder, name, None)
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


Shapes = Iterator[tuple[tuple[int, ...], Layout]]


def _pictures(encoder: Any) -> Shapes:
    """Shapes of pictures, alone, in a list or in tiles, and the arguments that come with them."""
    channels = _first(encoder, "num_channels", "in_channels", "in_chans", default=3)
    least = 2 * _first(encoder, "patch_size", default=14)
    least *= _first(encoder, "spatial_merge_size", default=2)
    largest = _first(encoder, "image_size", default=least)
    lengths = dict.fromkeys([min(least, largest), largest])  # small if the model allows it
    for size, lead in product(lengths, LEADING):
        shape = (*lead, channels, size, size)
        companions = {
            "pixel_attention_mask": torch.ones(*lead, size, size, dtype=torch.bool),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, math.prod(lead), dtype=torch.long),
        }
        sizes = torch.tensor([[size, size]])
        yield shape, {**companions, "image_sizes": sizes, "image_sizes_videos": sizes}
        yield shape, companions  # some take sizes for other towers than theirs


def _patches(encoder: Any, modality: str) -> Shapes:
    """Pixel values as a list of patches, which some models take with the shape of their grid."""
    channels = _first(encoder, "num_channels", "in_channels", "in_chans", default=3)
    patch = _first(encoder, "patch_size", default=14)
    frames = _first(encoder, "temporal_patch_size", "tubelet_size", default=2)
    merge = _first(encoder, "spatial_merge_size", "merge_size", default=2)
    side = 2 * merge
    count, volume = side * side, channels * patch * patch
    grid = torch.tensor([[1, side, side]])
    of = "video" if modality == "video" else "image"
    square = torch.stack(
        torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1
    ).reshape(1, count, 2)
    companions = {
        f"{of}_grid_thw": grid,
        "image_grid_hw": grid[:, 1:],
        "image_merge_sizes": torch.tensor([merge]),
        "video_merge_sizes": torch.tensor([merge]),
        "video_compression_mask": torch.ones(count // merge**2, dtype=torch.bool),
        "spatial_shapes": grid[:, 1:],
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.bool),
        "image_position_ids": square,
        "video_position_ids": square[None],
        "num_frames_per_video": torch.tensor([1]),
    }
    for shape in (
        (count, frames * volume),
        (count, volume),
        (count, channels, patch, patch),
        (count, channels, frames, patch, patch),
        (count, frames, channels, patch, patch),
        (1, count, volume),
        (1, 1, count, volume),
    ):
        yield shape, companions


def _audio(encoder: Any) -> Shapes:
    """Shapes of a spectrogram, and the masks that come with it."""
    bins = _first(encoder, "num_mel_bins", "input_feat_size", "input_dim", default=80)
    longest = _first(encoder, "max_source_positions", default=64)
    window = _first(encoder, "n_window", default=0)
    lengths = dict.fromkeys((2 * longest, 2 * window or 64, 64, 128))
    for frames in lengths:
        for shape in ((1, bins, frames), (1, frames, bins)):
            yield (
                shape,
                {
                    "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
                    "input_features_mask": torch.ones(1, frames, dtype=torch.bool),
                    "audio_feature_lengths": torch.tensor([frames]),
                },
            )
