"""Inputs to compare two models on: text, and images, sounds and videos where a model takes them.

Everything is made from the config: no processor, no files. A few recipes know the shapes that
models expect. The first is taken whose forward pass runs and whose media change the logits.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..utils import logger
from .forward import (
    evaluating,
    forward_options,
    input_device,
    keeping_state,
    position_limit,
    tensors_in,
)

TEXT_TOKENS = 16
BEFORE = 4  # text tokens in front of the media
SIDE = 4  # patches along a side of a small image
FRAMES = 2  # of a video
SHORT_AUDIO = 64  # time steps
MATTERS = 1e-4  # change of the logits, relative to the largest, that other media have to cause

# The arguments by which forward takes media, and where the config describes what reads them.
MEDIA: dict[str, tuple[str, ...]] = {
    "image": (
        "pixel_values",
        "pixel_values_images",
        "image_pixel_values",
        "image_patches",
        "flattened_patches",
    ),
    "audio": ("input_features", "input_values", "audio_input_features", "audio_values"),
    "video": ("pixel_values_videos",),
}
PARTS = {
    "image": ("vision_config", "vq_config"),
    "audio": ("audio_config", "encoder_config"),
    "video": ("vision_config",),
}
PLACEHOLDERS = {  # GLM shows the frames of a video as images
    "image": ("image_token",),
    "audio": ("audio_token",),
    "video": ("video_token", "image_token"),
}
KIND = {"image": 1, "video": 2, "audio": 3}  # in mm_token_type_ids
Inputs = dict[str, torch.Tensor]
Values = Iterator[tuple[torch.Tensor, ...]]


def probe_inputs(model: Any) -> dict[str, Inputs]:
    """Inputs that a pruned model and its original are compared on, by modality.

    Keyword arguments of `model.forward`: `text`, and `image`, `audio` and `video` where the model
    takes them. A modality that no recipe can make is missing, and a warning says so.
    """
    found = {"text": {"input_ids": _text_ids(model)}}
    accepted = inspect.signature(model.forward).parameters
    with evaluating(model), keeping_state(model):
        for modality, names in MEDIA.items():
            taken = [name for name in names if name in accepted]
            if not taken or _part(model.config, modality) is None:
                continue
            if (inputs := _media_inputs(model, modality)) is not None:
                found[modality] = inputs
            else:
                _warn(type(model).__name__, modality, ", ".join(taken))
    return found


@functools.cache
def _warn(name: str, modality: str, parameters: str) -> None:
    what = {"image": "an image", "audio": "audio", "video": "a video"}[modality]
    logger.warning(
        "%s takes %s, but no values for it could be made up: it is not compared with %s.",
        name,
        parameters,
        what,
    )


def _text_ids(model: Any) -> torch.Tensor:
    """Fixed tokens within the model's vocabulary and length, none of them special: (1, tokens)."""
    usual = torch.ones(model.config.get_text_config(decoder=True).vocab_size, dtype=torch.bool)
    usual[[token for token in _special_tokens(model.config) if 0 <= token < len(usual)]] = False
    ids = (usual if usual.any() else ~usual).nonzero().flatten()
    generator = torch.Generator().manual_seed(0)
    length = min(TEXT_TOKENS, position_limit(model))
    chosen = torch.randint(0, len(ids), (1, length), generator=generator)
    return ids[chosen].to(input_device(model))


def _special_tokens(config: Any) -> set[int]:
    """The token ids that the root of a config names."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            values = value if isinstance(value, list | tuple) else [value]
            found.update(token for token in values if isinstance(token, int))
    return found


def _token(config: Any, *names: str) -> list[int]:
    """The token id that a config has under the first of some names, or nothing."""
    for name in names:
        for ending in ("_id", "_index"):
            if isinstance(token := getattr(config, name + ending, None), int):
                return [token]
    return []


def _around(side: str, modality: str) -> list[str]:
    """What a config may call the token at the `start` or the `end` of media."""
    names = [f"{modality}_{side}_token", f"{'b' if side == 'start' else 'e'}o{modality[0]}_token"]
    return names if modality == "audio" else [*names, f"vision_{side}_token"]


def _media_inputs(model: Any, modality: str) -> Inputs | None:
    """Inputs with media of one modality that change the logits; None if no recipe makes them."""
    accepted = inspect.signature(model.forward).parameters
    reason = "no known recipe fits its arguments"
    for recipe in RECIPES:
        if recipe.modality != modality or not accepted.keys() >= {*recipe.names}:
            continue
        for values in recipe.make(model.config, _part(model.config, modality)):
            media = dict(zip(recipe.names, values, strict=False))
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in media.items())
            try:
                inputs = _tried(model, modality, media)
            except Exception as error:  # a recipe for other models
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.debug("%s: not with %s: %s", type(model).__name__, shapes, reason)
                continue
            if inputs is not None:
                logger.debug("%s: compared with %s", type(model).__name__, shapes)
                return inputs
            reason = f"{shapes} do not matter"
            logger.debug("%s: %s", type(model).__name__, reason)
    logger.info("%s, %s: the last trial ended so: %s", type(model).__name__, modality, reason)
    return None


def _tried(model: Any, modality: str, media: Inputs) -> Inputs | None:
    """The inputs of a forward pass with `media`, if it runs and they matter; else it raises."""
    device = input_device(model)
    media = {
        name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in media.items()
    }
    rows = _feature_rows(model, modality, media)
    inputs, logits = _first_run(model, modality, media, rows)
    name = next(iter(media))
    other = {name: _noise(*media[name].shape, seed=1).to(media[name])}
    change = (_logits(model, inputs | other) - logits).abs().max()
    return inputs if change > MATTERS * logits.abs().max() else None  # NaN fails


def _first_run(
    model: Any, modality: str, media: Inputs, rows: int | None
) -> tuple[Inputs, torch.Tensor]:
    """The inputs, and logits, of the first placeholder that runs; else it raises.

    If `rows` is unknown, what the model says about two placeholders tells it.
    """
    names = PLACEHOLDERS[modality]
    failed: Exception | None = None
    for name in [name for name in names if _token(model.config, name)] or names[:1]:
        try:
            inputs = _with_tokens(model, modality, media, name, 2 if rows is None else rows)
            return inputs, _logits(model, inputs)
        except Exception as error:
            told = re.search(r"features:? *(\d+)", str(error)) if rows is None else None
            logger.debug("%s: %s of %s: %s", type(model).__name__, name, modality, error)
            if told is not None:
                return _first_run(model, modality, media, int(told[1]))
            failed = failed or error
    assert failed is not None
    raise failed


def _logits(model: Any, inputs: Inputs) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, **forward_options(model)).logits
    return logits.float()


def _feature_rows(model: Any, modality: str, media: Inputs) -> int | None:
    """How many tokens the model makes of `media`; None if it has no method that tells."""
    for owner in (model.base_model, model):
        method = getattr(owner, f"get_{modality}_features", None)
        if method is None:
            continue
        accepted = inspect.signature(method).parameters
        output = method(**{name: value for name, value in media.items() if name in accepted})
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = getattr(output, "last_hidden_state", output)
        return sum(rows.numel() // rows.shape[-1] for rows in tensors_in(pooled)) or None
    return None


def _with_tokens(model: Any, modality: str, media: Inputs, name: str, rows: int) -> Inputs:
    """`media` with token ids, among them `rows` placeholders, and all that goes with these.

    Returns:
        Tensors of shape (1, tokens), and those of `media`.
    """
    config, text = model.config, _text_ids(model)
    place = _token(config, name) * rows
    start, end = (
        _token(config, *_around("start", modality)),
        _token(config, *_around("end", modality)),
    )
    known = model.get_input_embeddings().num_embeddings
    if any(token >= known for token in (*place[:1], *start, *end)):
        raise ValueError(f"a placeholder is outside the vocabulary of {known} tokens")
    middle = torch.tensor([[*start, *place, *end]], dtype=text.dtype, device=text.device)
    ids = torch.cat([text[:, :BEFORE], middle, text[:, BEFORE:]], 1)
    kinds = torch.zeros_like(ids)
    first = min(BEFORE, text.shape[1]) + len(start)
    kinds[:, first : first + len(place)] = 1
    more = {
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds * KIND[modality],
        "moe_mm_token_type_ids": kinds,
        "token_type_ids": kinds,
    }
    if "aspect_ratio_mask" in media:
        more["cross_attention_mask"] = media["aspect_ratio_mask"][:, None].expand(
            -1, ids.shape[1], -1, -1
        )
    accepted = inspect.signature(model.forward).parameters
    more = {name: value for name, value in more.items() if name in accepted}
    return {"input_ids": ids, **more, **media}


# What recipes are made of. Each yields values of its arguments, from the likeliest, or of more
# than a model takes. The first is random.


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _part(config: Any, modality: str) -> Any:
    """The config of what reads a modality: the root's where it has none, None if it is absent."""
    named = [name for name in PARTS[modality] if hasattr(config, name)]
    return getattr(config, named[0]) if named else config


def _number(config: Any, *names: str, default: int = 0) -> int:
    """The first of several numbers that a config has; of a list, its first."""
    for name in names:
        value = getattr(config, name, None)
        while isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return default


def _channels(part: Any) -> int:
    return _number(part, "num_channels", "in_channels", "in_chans", default=3)


def _patch(part: Any) -> int:
    return _number(part, "patch_size", "spatial_patch_size", default=16)


def _merge(part: Any) -> int:
    return _number(part, "spatial_merge_size", "merge_kernel_size", "merge_size", default=2)


def _sides(part: Any) -> list[int]:
    """Sides of square images: a small one, and the one that fixed positions demand."""
    sides = (SIDE * _patch(part), _number(part, "image_size"))
    return [side for side in dict.fromkeys(sides) if side]


def _image(config: Any, part: Any) -> Values:
    """One image (1, channels, side, side), and its height and width: (1, 2)."""
    for side in _sides(part):
        yield _noise(1, _channels(part), side, side), torch.tensor([[side, side]])


def _video(config: Any, part: Any) -> Values:
    """One video: (1, frames, channels, side, side)."""
    for side in _sides(part):
        yield (_noise(1, FRAMES, _channels(part), side, side),)


def _tiled_by_pinpoint(config: Any, part: Any) -> Values:
    """One image as a whole and in tiles: (1, 1 + tiles, channels, side, side)."""
    side = _number(part, "image_size", default=1)
    for height, width in sorted(getattr(config, "image_grid_pinpoints", None) or [])[:1]:
        tiles = 1 + (height // side) * (width // side)
        yield _noise(1, tiles, _channels(part), side, side), torch.tensor([[height, width]])


def _grid(config: Any, part: Any, frames: int = 1) -> Values:
    """Flat patches, their number in time, height and width (1, 3), and the merged side: (1,)."""
    side, channels, patch = 2 * _merge(part), _channels(part), _patch(part)
    times = _number(part, "temporal_patch_size", "patch_temporal", default=1)
    grid = torch.tensor([[frames, side, side]])
    flat = channels * patch * patch
    shapes = ((flat * times,), (flat,), (channels, patch, patch))
    for shape in dict.fromkeys(shapes):
        yield _noise(frames * side * side, *shape), grid, torch.tensor([_merge(part)])


def _video_grid(config: Any, part: Any) -> Values:
    """The same for a video, of as many frames as are merged into one."""
    yield from _grid(config, part, _number(part, "temporal_merge_size", default=1))


def _timed_grid(config: Any, part: Any) -> Values:
    """The same, with the seconds that a step of time takes: (1,)."""
    for patches, grid, _ in _video_grid(config, part):
        yield patches, grid, torch.ones(1)


def _shaped_patches(config: Any, part: Any) -> Values:
    """Flat patches (1, patches, values), their rows and columns (1, 2), and a mask of ones."""
    size = _channels(part) * _patch(part) ** 2
    shape = torch.tensor([[SIDE, SIDE]])
    yield _noise(1, SIDE * SIDE, size), shape, torch.ones(1, SIDE * SIDE, dtype=torch.long)


def _placed_patches(config: Any, part: Any) -> Values:
    """Flat patches (1, patches, values) and where they are: (1, patches, 2)."""
    side = 2 * _number(part, "pooling_kernel_size", default=2)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)[None]
    yield _noise(1, side * side, _channels(part) * _patch(part) ** 2), places


def _placed_video(config: Any, part: Any) -> Values:
    """The same for every frame of a video (frames, patches, values), and how many: (1,)."""
    for patches, places in _placed_patches(config, part):
        frames = _noise(FRAMES, *patches.shape[1:])
        yield frames, places.repeat(FRAMES, 1, 1), torch.tensor([FRAMES])


def _masked_images(config: Any, part: Any) -> Values:
    """One image (1, 1, channels, side, side), and a mask of ones (1, 1, side, side)."""
    for image, _ in _image(config, part):
        yield image[None], torch.ones(1, 1, *image.shape[-2:], dtype=torch.long)


def _masked_tiles(config: Any, part: Any) -> Values:
    """One image (1, 1, channels, side, side), and which tiles are used: (1, 1)."""
    for image, _ in _image(config, part):
        yield image[None], torch.ones(1, 1, dtype=torch.bool)


def _strip(config: Any, part: Any) -> Values:
    """Patches in one row (1, channels, patch, patches * patch), and their grid: (1, 2)."""
    patch = _patch(part)
    strip = _noise(1, _channels(part), patch, SIDE * SIDE * patch)
    yield strip, torch.tensor([[SIDE, SIDE]])


def _tiles(config: Any, part: Any) -> Values:
    """Tiles (1, 1, tiles, channels, side, side), aspect ratio (1, 1), and which are used."""
    count = _number(part, "max_num_tiles", default=1)
    used = (torch.arange(count) < 1).long()[None, None]
    for image, _ in _image(config, part):
        yield image.expand(1, 1, count, *image.shape[1:]).clone(), torch.ones(1, 1).long(), used


def _mels(config: Any, part: Any) -> Values:
    """Sound (1, mels, time), and a mask of ones: (1, time)."""
    mels = _number(part, "num_mel_bins", "feature_size", default=128)
    for time in (SHORT_AUDIO, 2 * _number(part, "max_source_positions")):
        if time:
            yield _noise(1, mels, time), torch.ones(1, time, dtype=torch.long)


def _frames(config: Any, part: Any) -> Values:
    """Sound (1, time, features), and a mask of ones: (1, time)."""
    names = ("input_feat_size", "input_dim", "feature_size", "num_mel_bins")
    size = _number(part, *names, default=128)
    yield _noise(1, SHORT_AUDIO, size), torch.ones(1, SHORT_AUDIO, dtype=torch.bool)


class _Recipe(NamedTuple):
    """A way to make media: the arguments of forward it fills, and their values."""

    modality: str
    names: tuple[str, ...]
    make: Callable[[Any, Any], Values]


RECIPES = tuple(
    _Recipe(modality, tuple(names.split()), make)
    for modality, names, make in (
        ("image", "pixel_values image_grid_thw image_merge_sizes", _grid),
        ("image", "pixel_values image_grid_thw", _grid),
        ("image", "pixel_values spatial_shapes pixel_attention_mask", _shaped_patches),
        ("image", "pixel_values image_position_ids", _placed_patches),
        ("image", "pixel_values aspect_ratio_ids aspect_ratio_mask", _tiles),
        ("image", "pixel_values pixel_attention_mask", _masked_images),
        ("image", "pixel_values pixel_attention_mask", _masked_tiles),
        ("image", "pixel_values target_sizes", _strip),
        ("image", "pixel_values", _image),
        ("image", "pixel_values image_sizes", _image),
        ("image", "pixel_values image_sizes", _tiled_by_pinpoint),
        ("video", "pixel_values_videos video_grid_thw video_merge_sizes", _video_grid),
        ("video", "pixel_values_videos video_grid_thw", _video_grid),
        ("video", "pixel_values_videos video_grid_thw video_second_per_grid", _timed_grid),
        ("video", "pixel_values_videos video_position_ids num_frames_per_video", _placed_video),
        ("video", "pixel_values_videos target_sizes_videos", _strip),
        ("video", "pixel_values_videos", _video),
        ("audio", "input_features feature_attention_mask", _mels),
        ("audio", "input_features input_features_mask", _frames),
        ("audio", "input_features", _mels),
        ("audio", "input_features", _frames),
    )
)
