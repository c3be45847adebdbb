"""Figures that need the model: its residual stream, and how it continues a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InvalidDataError, MissingDependencyError, NonFiniteError
from ..results import check_layers
from . import style
from .style import BLUE, GREEN, ORANGE, PAGE, drawing

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SMALLEST = 0.005  # probability of a token that has a bar
LINE = 10.0  # points from one line of running text to the next


def plot_activation_comparison(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    pruned_layers: Iterable[int],
    save_path: str | Path | None = None,
    *,
    title: str | None = None,
    show: bool = False,
) -> Figure:
    """The residual stream along the depth, with all layers and without `pruned_layers`.

    Left: the size (root mean square) of the state that enters each layer, and of the output of the
    last. Right: the cosine similarity of both streams where both exist. Lines are medians over the
    prompt's tokens, bands are quartiles; a mean would show the first token, whose state is often a
    thousand times larger. Removed layers are shaded. Takes two forward passes.

    Args:
        pruned_layers: `InvalidPlanError` if they do not fit the model, which stays as it was.
    """
    path = style.check_path(save_path)
    if not isinstance(prompt, str):
        raise InvalidDataError(f"prompt is {prompt!r:.60}: a list, not one text; pass one of it.")
    [text] = _check_prompts(prompt)
    full, pruned = _streams(model, tokenizer, text, pruned_layers)
    depth = max(full)
    removed = [index for index in range(depth) if index not in pruned]
    if title is None:
        title = f"Residual stream with {len(removed)} of {depth} layers removed"
    with drawing(title, path, show, PAGE, [2.6], (1.0, 1.0)) as (figure, [[left, right]]):
        _draw_sizes(left, full, pruned)
        _draw_similarity(right, full, pruned)
        _mark_depth(left, removed, depth)
        _mark_depth(right, removed, depth)
        style.legend_below(figure, left.get_legend_handles_labels()[0])
    return figure


def plot_semantic_comparison(
    original: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[str],
    save_path: str | Path | None = None,
    *,
    title: str = "Next token and greedy continuation, original and pruned model",
    embedder: Any = None,
    top_k: int = 5,
    max_new_tokens: int = 40,
    show: bool = False,
) -> Figure:
    """How two models continue the same prompt, or a few prompts below each other.

    Left: the probabilities of the next token for the `top_k` tokens of either model, without those
    below half a percent in both, and the share of probability that both give to the same tokens
    (1 minus the total variation distance). Right: the answers that `ModelEvaluator` generates, and
    the cosine similarity of their sentence vectors, which hardly see the order of words.

    Args:
        prompt: up to six, rendered by `utils.render_prompt` like all prompts of this package.
        embedder: as for `ModelEvaluator`; if none is installed, the figure says that the similarity
            was not computed.
    """
    path = style.check_path(save_path)
    options = ((original, pruned), tokenizer, embedder, top_k, max_new_tokens)
    rows = [_continue(text, *options) for text in _check_prompts(prompt)]
    heights = [
        0.5 + max(0.27 * len(row.tokens), sum(gap for _, _, gap in row.lines) / 72) for row in rows
    ]
    with drawing(title, path, show, PAGE, heights, (1.0, 1.3)) as (figure, panels):
        for (left, right), row in zip(panels, rows, strict=True):
            style.paired_bars(left, list(range(len(row.tokens))), row.tokens, row.probabilities)
            left.set_title(f"both give {row.overlap:.0%} of the probability to the same tokens")
            _draw_text(right, row.lines)
        panels[-1][0].set_xlabel("probability of the next token")
    return figure


def _streams(
    model: Any, tokenizer: Any, prompt: str, layers: Iterable[int]
) -> list[dict[int, torch.Tensor]]:
    """Of the full and of the pruned model: the state entering each layer, and the output."""
    from ..model.forward import evaluating
    from ..model.layer_stack import LayerStack

    stack = LayerStack(model)
    removed = check_layers(layers, len(stack))
    inputs = _encode(model, tokenizer, prompt)

    def stream(skipped: tuple[int, ...]) -> dict[int, torch.Tensor]:
        states: dict[int, torch.Tensor] = {}

        def observer(index: int, hidden_in: torch.Tensor, hidden_out: torch.Tensor) -> None:
            if index not in skipped:
                states[index] = _tokens(hidden_in, index)
                states[len(stack)] = _tokens(hidden_out, index)

        with evaluating(model), stack.bypass(skipped), stack.observe(observer):
            model(**inputs, use_cache=False)
        return states

    return [stream(()), stream(removed)]


def _tokens(hidden: torch.Tensor, layer: int) -> torch.Tensor:
    """(tokens, hidden) in float32 on the CPU."""
    states = hidden.detach().float().flatten(0, -2).cpu()
    if not states.isfinite().all():
        raise NonFiniteError(
            f"The hidden state at layer {layer} is NaN or infinite for this prompt: check the "
            "checkpoint, or load the model with dtype float32."
        )
    return states


def _draw_quartiles(
    axes: Any, values: Mapping[int, torch.Tensor], line: str, colour: str, label: str = ""
) -> list[float]:
    """The median over tokens at each depth, with a band from quartile to quartile."""
    import torch

    depths = sorted(values)
    levels = torch.tensor([0.25, 0.5, 0.75])
    bands = torch.stack([values[depth].quantile(levels) for depth in depths]).T.tolist()
    axes.fill_between(depths, bands[0], bands[2], color=colour, alpha=0.2, linewidth=0)
    size = 2.5 if len(depths) <= 40 else 1.2
    axes.plot(depths, bands[1], line, color=colour, markersize=size, label=label or "_")
    return list(bands[1])


def _draw_sizes(axes: Any, full: dict[int, Any], pruned: dict[int, Any]) -> None:
    seen: list[float] = []
    looks = (("o-", BLUE, "full model"), ("s--", ORANGE, "pruned model"))
    for states, look in zip((full, pruned), looks, strict=True):
        sizes = {depth: state.square().mean(-1).sqrt() for depth, state in states.items()}
        seen += _draw_quartiles(axes, sizes, *look)
    if max(seen) > 20 * min(seen) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("root mean square of the state")
    axes.set_title("median and quartiles over tokens")


def _draw_similarity(axes: Any, full: dict[int, Any], pruned: dict[int, Any]) -> None:
    from torch.nn.functional import cosine_similarity

    cosines = {}
    for depth, state in pruned.items():
        same = (full[depth] == state).all(-1)  # exactly 1, also for a state of zeros
        cosines[depth] = cosine_similarity(full[depth], state, dim=-1).masked_fill(same, 1.0)
    axes.axhline(1, color="0.6", linewidth=0.6)
    medians = _draw_quartiles(axes, cosines, "D-", GREEN)
    axes.set_ylabel("cosine similarity to full model")
    axes.set_title(f"at the output: {medians[-1]:.3f}")


def _mark_depth(axes: Any, removed: list[int], depth: int) -> None:
    """Shade removed layers, each from its input to its output; label the depth."""
    for index in removed:
        label = "removed layers" if index == removed[0] else "_"
        axes.axvspan(index, index + 1, color="0.88", linewidth=0, zorder=0, label=label)
    style.state_axis(axes.xaxis, depth)
    axes.set_xlim(-0.03 * depth, 1.03 * depth)


_TextLine = tuple[str, str, float]  # text, colour (black is not bold), points to the next


class _Continuation(NamedTuple):
    """How the original and the pruned model continue a prompt."""

    tokens: list[str]
    probabilities: list[list[float]]  # of the original model, of the pruned one
    overlap: float
    lines: list[_TextLine]  # the prompt and both answers


def _continue(
    prompt: str, models: Sequence[Any], tokenizer: Any, embedder: Any, top_k: int, max_new: int
) -> _Continuation:
    import torch

    from ..evaluation.generation import ModelEvaluator
    from ..model.forward import evaluating

    answers, seen = [], []
    for model in models:
        evaluator = ModelEvaluator(model, tokenizer, max_new_tokens=max_new)
        answers += evaluator.generate([prompt])
        inputs = _encode(model, tokenizer, prompt)
        with evaluating(model):
            logits = model(**inputs, use_cache=False).logits
        seen.append(logits[0, -1].float().cpu().softmax(-1))
    one, two = seen
    if one.shape != two.shape:
        raise InvalidDataError(
            f"The models have {len(one)} and {len(two)} tokens in their vocabularies: compare a "
            "model with its own pruned version."
        )
    best = {int(token) for p in seen for token in p.topk(min(top_k, len(p))).indices}
    ranked = sorted(best, key=lambda token: (-float(one[token]), token))
    seen_bars = [token for token in ranked if max(float(p[token]) for p in seen) >= SMALLEST]
    order = seen_bars or ranked
    last = int(inputs["input_ids"][0, -1])
    return _Continuation(
        [_token_text(tokenizer, last, token) for token in order],
        [p[order].tolist() for p in seen],
        float(torch.minimum(one, two).sum()),
        _text_lines(prompt, answers, embedder),
    )


def _token_text(tokenizer: Any, previous: int, token: int) -> str:
    """A token as it continues a text, with its spaces visible."""
    before, both = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in ([previous], [previous, token])
    )
    text = both.removeprefix(before) if both.startswith(before) else ""
    if not text or "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(token) or f"<{token}>"
    text = style.printable(text).replace(" ", "\u2423")
    return text if len(text) <= 18 else text[:17] + "\u2026"


def _text_lines(prompt: str, answers: list[str], embedder: Any) -> list[_TextLine]:
    parts = (
        ("prompt", "0.3", prompt, 3),
        ("original model", BLUE, answers[0], 6),
        ("pruned model", ORANGE, answers[1], 6),
    )
    lines: list[_TextLine] = []
    for name, colour, text, most in parts:
        *wrapped, end = style.wrap(style.printable(text) or "(empty)", 3.5, most).split("\n")
        lines += [(name, colour, LINE), *((line, "black", LINE) for line in wrapped)]
        lines.append((end, "black", 1.4 * LINE))
    said = f"semantic similarity: {_similarity(answers, embedder)}"
    return [*lines, (said, "0.3", LINE)]


def _similarity(texts: list[str], embedder: Any) -> str:
    from ..evaluation.similarity import embed, load_embedder

    if not all(texts):
        return "not defined (empty answer)"
    try:
        one, two = embed(texts, embedder or load_embedder())
    except MissingDependencyError:
        return "not computed (no sentence embedder)"
    if texts[0] == texts[1]:
        return "1 (the same answer)"
    return f"{float(one @ two):.3f} (hardly sees word order)"


def _draw_text(axes: Any, lines: list[_TextLine]) -> None:
    axes.axis("off")
    down = 0.0
    for line, colour, gap in lines:
        look = {"color": colour, "weight": "normal" if colour == "black" else "bold", "va": "top"}
        look |= {"xycoords": "axes fraction", "textcoords": "offset points"}
        text = axes.annotate(line, (0, 1), (0, -down), **look)
        text.set_in_layout(False)  # the row is high enough for it
        down += gap


def _encode(model: Any, tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    """Token ids and mask of the rendered prompt, on the model's device.

    A prompt that is too long for the model loses its beginning.
    """
    import torch

    from ..data.tokens import encode_prompt
    from ..model.forward import input_device, position_limit

    encoded = encode_prompt(tokenizer, prompt, position_limit(model))
    ids = torch.tensor([encoded], device=input_device(model))
    return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}


def _check_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    style.check_number(prompts, 6, "prompts")
    for text in prompts:
        if not isinstance(text, str) or not text.strip():
            raise InvalidDataError(f"The prompt {text!r:.60} is no text: give at least one word.")
    return prompts
