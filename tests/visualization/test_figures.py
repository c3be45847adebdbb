"""What holds for every public plot function."""

from __future__ import annotations

import inspect
import math
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import tiny_llama, word_tokenizer
from drawn import overlaps, texts
from matplotlib.figure import Figure
from samples import block_scores, make_depth_curve

import llm_pruner
from llm_pruner.errors import InvalidDataError, NonFiniteError, OutputError
from llm_pruner.layer_scores import LayerScores
from llm_pruner.model.layer_stack import LayerStack
from llm_pruner.results import Comparison
from llm_pruner.visualization.style import file_bytes

LONG = "a_strategy_with a name that is long, costs $5 and $6^{, \u4f60 and\nmore"
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}
MODEL, TOKENIZER = tiny_llama(), word_tokenizer()
PRUNED = LayerStack(MODEL).remove([2, 3])


class Letters:
    """An embedder that counts letters."""

    def encode(self, sentences, *, show_progress_bar=False):
        return torch.tensor([[text.count(c) + 0.1 for c in "abcmost$x"] for text in sentences])


def broken():
    model = tiny_llama()
    model.model.layers[3].mlp.down_proj.weight.data.fill_(math.nan)
    return model


def bars(depth, name):
    scores = {i: 0.05 + abs(i - depth // 2) / 9 for i in range(1, depth)} | {0: 40.0}
    scores = LayerScores(scores, strategy=name, unit=name)
    return {"scores": scores, "removed": [depth // 2][: depth - 1], "num_layers": depth + 1}


def orders(count, depth, name):
    scores = [block_scores(depth, strategy=f"{i} {name}") for i in range(count)]
    return {"scores": scores, "removed": [[0]] * count}


def curves(count, depth, name):
    changes = [
        [math.expm1(-0.002 * (c + 1) * k**1.5) for k in range(1, depth + 1)] for c in range(count)
    ]
    made = [make_depth_curve(c, f"{i} {name}", model_id=f"{i} m") for i, c in enumerate(changes)]
    return {"curves": made}


def tasks(count, name):
    before = {f"{i} {name}": 0.5 for i in range(count)} | {"mean": 0.5}
    after = dict.fromkeys(before, 0.9)
    return {"before": before, "after": after, "n_samples": 100, "chance": {f"0 {name}": 0.25}}


def pairs(count, name):
    rows = [
        Comparison(f"{i} {name}", "tasks", "", 0.5, 0.6, True, 9, -0.1, 0.3) for i in range(count)
    ]
    return {"comparisons": [*rows, Comparison("x", "tasks", "", 0.5, 0.2, True, floor=0.1)]}


RESIDUAL = {"model": MODEL, "tokenizer": TOKENIZER, "prompt": f"the cat {LONG}"}
TWO = {"original": MODEL, "pruned": PRUNED, "tokenizer": TOKENIZER, "embedder": Letters()}
CASES = {
    "plot_layer_importance": [bars(n, LONG) for n in (1, 2, 12, 60, 126)],
    "plot_score_comparison": [orders(*n, LONG) for n in ((1, 1), (3, 12), (12, 96))],
    "plot_block_distances": [
        {"scores": block_scores(n, strategy=LONG)} for n in (1, 2, 12, 60, 96)
    ],
    "plot_similarity_matrix": [{"scores": block_scores(n, strategy=LONG)} for n in (1, 2, 12, 96)],
    "plot_depth_curve": [curves(*n, LONG) for n in ((1, 1), (1, 12), (3, 30), (6, 60))],
    "plot_holistic_benchmark": [tasks(n, LONG) for n in (1, 3, 20)],
    "plot_comparisons": [pairs(n, LONG) for n in (1, 12)],
    "plot_activation_comparison": [
        {**RESIDUAL, "pruned_layers": [2, 5]},
        {**RESIDUAL, "model": tiny_llama(80), "pruned_layers": range(50, 70)},
    ],
    "plot_semantic_comparison": [
        {**TWO, "prompt": ["the cat", LONG, "m" * 300], "max_new_tokens": 12},
        {**TWO, "prompt": "the cat", "max_new_tokens": 4},
    ],
}
NOT_FINITE = {
    "plot_layer_importance": {"scores": {0: 1.0, 1: math.nan}},
    "plot_score_comparison": {"scores": [LayerScores({0: 1.0, 1: 2.0})]},
    "plot_block_distances": {"scores": block_scores(3)},
    "plot_similarity_matrix": {"scores": block_scores(3)},
    "plot_depth_curve": {"curves": make_depth_curve([-0.1, -0.2])},
    "plot_holistic_benchmark": {"before": {"a": 0.5}, "after": {"a": math.nan}, "n_samples": 5},
    "plot_comparisons": {"comparisons": (Comparison("a", "tasks", "", v, v) for v in [math.nan])},
    "plot_activation_comparison": {**RESIDUAL, "model": broken(), "pruned_layers": [1]},
    "plot_semantic_comparison": {**TWO, "pruned": broken(), "prompt": "the cat"},
}
# What is checked when it is made is made infinite afterwards.
NOT_FINITE["plot_score_comparison"]["scores"][0][1] = math.inf
NOT_FINITE["plot_block_distances"]["scores"].blocks[0][1] = math.inf
NOT_FINITE["plot_similarity_matrix"]["scores"].blocks[0][1] = -math.inf
NOT_FINITE["plot_depth_curve"]["curves"].points[1]["change"] = math.nan

every_function = pytest.mark.parametrize("name", sorted(CASES))
every_case = pytest.mark.parametrize(
    ("name", "options"),
    [(name, case) for name, cases in CASES.items() for case in cases],
    ids=[f"{name}-{i}" for name, cases in CASES.items() for i in range(len(cases))],
)


def draw(name, options, **more):
    return getattr(llm_pruner, name)(**options, **more)


def test_every_public_plot_function_is_here():
    public = {name for name in llm_pruner.__all__ if name.startswith("plot_")}
    assert CASES.keys() == NOT_FINITE.keys() == public


@every_case
def test_everything_is_printed_inside_the_page_and_apart(name, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph would warn
        figure = draw(name, options)
        figure.draw_without_rendering()
    assert isinstance(figure, Figure)
    assert figure.get_figwidth() in (3.4, 7.0)
    shown = texts(figure)
    for text in shown:
        box = text.get_window_extent()
        assert text.get_fontsize() >= 6.5, text.get_text()
        assert min(box.x0, box.y0) >= -1, text.get_text()
        assert box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert box.y1 <= figure.bbox.y1 + 1, text.get_text()
    assert not overlaps(shown)
    for axes in figure.axes:
        assert len(axes.get_xticks()) <= 26


@every_function
def test_equal_input_gives_equal_files_of_every_kind(name, tmp_path):
    import matplotlib.pyplot as plt

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    for suffix, magic in MAGIC.items():
        first, second = tmp_path / "new" / f"a{suffix}", tmp_path / f"b{suffix}"
        draw(name, CASES[name][0], save_path=str(first))
        with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 50}):
            draw(name, CASES[name][0], save_path=second)
        data = first.read_bytes()
        assert data == second.read_bytes()
        assert data.startswith(magic)
        assert not any(word in data for word in (b"/Type3", b"CreationDate", b"<dc:date>"))
    assert dict(matplotlib.rcParams) == before
    assert (matplotlib.get_backend(), plt.get_fignums()) == (backend, [])


@every_function
def test_files_of_one_figure_do_not_depend_on_their_order(name):
    one, two = draw(name, CASES[name][0]), draw(name, CASES[name][0])
    vectors = file_bytes(one, ".svg")
    assert file_bytes(two, ".png") == file_bytes(one, ".png")
    assert file_bytes(two, ".svg") == vectors


@every_function
def test_a_title_is_taken_literally(name):
    assert draw(name, CASES[name][0], title="Mine at $5").get_suptitle() == "Mine at $5"


@every_function
def test_what_is_not_finite_is_never_drawn(name):
    before = dict(matplotlib.rcParams)
    with pytest.raises((NonFiniteError, InvalidDataError), match=r"(?i)nan|inf|finite"):
        draw(name, NOT_FINITE[name])
    assert dict(matplotlib.rcParams) == before


@every_function
def test_other_suffixes_are_refused_before_any_work(name, tmp_path):
    function = getattr(llm_pruner, name)
    parameters = inspect.signature(function).parameters.values()
    nothing = {p.name: None for p in parameters if p.default is p.empty}
    for file in ("a.jpg", "a", "a.png.txt"):
        with pytest.raises(OutputError, match=r"must end in \.png, \.svg, \.pdf"):
            function(**nothing, save_path=tmp_path / "new" / file)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write .*a\.png"):
        draw(name, CASES[name][0], save_path=tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@every_function
def test_show_opens_a_window_and_takes_the_figure_back(name, monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda block: shown.extend(map(plt.figure, plt.get_fignums())))
    draw(name, CASES[name][0])
    assert shown == []
    figure = draw(name, CASES[name][0], show=True)
    assert shown == [figure]
    assert plt.get_fignums() == []
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"


def test_images_are_fit_for_print(tmp_path):
    from PIL import Image

    llm_pruner.plot_layer_importance({0: np.float32(1)}, save_path=tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == round(3.4 * 300)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
