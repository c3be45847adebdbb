"""Figures of blocks of layers and of several strategies, read back from the figure."""

import math

import numpy as np
import pytest
from samples import UNIT, block_scores
from test_visualization import assert_nothing_outside, legend_texts, overlaps

from llm_pruner.errors import InvalidDataError, InvalidPlanError
from llm_pruner.results import LayerScores
from llm_pruner.visualization.blocks import plot_block_distances, plot_similarity_matrix
from llm_pruner.visualization.scores import plot_score_comparison


def cells(figure):
    """The drawn matrix: NaN where nothing is drawn."""
    [image] = figure.axes[0].images
    return image.get_array().filled(math.nan)


def dots(axes, label="best of its length"):
    [line] = [line for line in axes.lines if line.get_label() == label]
    return list(zip(*map(list, line.get_data()), strict=True))


@pytest.mark.parametrize("removes", ["lowest", "highest"])
def test_every_block_has_its_cell_scaled_in_its_row(removes):
    scores = block_scores(removes=removes)
    figure = plot_block_distances(scores, protected=[0, 5])
    drawn = cells(figure)
    for length in range(1, 7):
        row = [scores.blocks[start][length - 1] for start in range(7 - length)]
        want = [(x - min(row)) / ((max(row) - min(row)) or 1) for x in row]
        assert drawn[length - 1][: len(row)] == pytest.approx(want)
        assert np.isnan(drawn[length - 1][len(row) :]).all()
    pick = min if removes == "lowest" else max
    slow = []  # blocks of layers 1 to 4 alone
    for length in range(1, 5):
        slow.append(
            (pick(range(1, 6 - length), key=lambda s: scores.blocks[s][length - 1]), length)
        )
    assert dots(figure.axes[0]) == slow


def test_the_best_block_is_the_one_the_strategy_takes(llama, tokenizer):
    from llm_pruner import PruneMePruner

    pruner = PruneMePruner(llama, tokenizer)
    scores = pruner.compute_layer_scores(["the cat sat on the mat", "a dog ran"])
    protected = [layer for layer in range(pruner.num_layers) if layer not in pruner.candidates]
    starts = {n: at for at, n in dots(plot_block_distances(scores, protected=protected).axes[0])}
    for length in range(1, len(pruner.candidates)):
        taken = pruner.select_layers(scores, ratio=length / pruner.num_layers)
        assert starts[len(taken)] == taken[0]


def test_removed_layers_are_framed_where_they_are_a_block():
    figure = plot_block_distances(block_scores(), removed=[2, 3, 4])
    assert dots(figure.axes[0], "removed") == [(2, 3)]
    assert "removed" not in legend_texts(plot_block_distances(block_scores(), removed=[1, 3]))


def test_the_matrix_holds_every_pair_of_states():
    scores = block_scores()
    figure = plot_similarity_matrix(scores)
    drawn = cells(figure)
    assert drawn.shape == (7, 7)
    for i in range(7):
        for j in range(7):
            low, high = sorted((i, j))
            assert drawn[i][j] == (0 if i == j else scores.blocks[low][high - low - 1])
    assert figure.axes[1].get_ylabel() == UNIT


@pytest.mark.parametrize(
    ("plot", "count"), [(plot_block_distances, 2), (plot_similarity_matrix, 4)]
)
def test_a_missing_value_is_hatched_and_no_colour(plot, count):
    figure = plot(block_scores(unknown=[(0, 1), (2, 3)]))
    [axes, _] = figure.axes
    assert np.isnan(cells(figure)).sum() == count + (15 if plot is plot_block_distances else 0)
    assert [patch.get_hatch() for patch in axes.patches] == ["//////"] * count
    assert f"no value ({count})" in legend_texts(figure)
    for patch in axes.patches:
        left, _, bottom, _ = axes.images[0].get_extent()
        column, row = round(patch.get_x() - left), round(patch.get_y() - bottom)
        assert np.isnan(cells(figure)[row][column])


@pytest.mark.parametrize("plot", [plot_block_distances, plot_similarity_matrix])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: None, "hold no blocks of layers: take the LayerScores"),
        (lambda b: b[:-1], r"rows of \[6, 5, 4, 3, 2\] lengths"),
        (lambda b: [], r"rows of \[\] lengths"),
        (lambda b: [[math.inf], *b[1:]], "rows of"),
        (lambda b: [*b[:-1], [math.inf]], "blocks holds inf: give finite"),
        (lambda b: [*b[:-1], ["x"]], "blocks holds 'x'"),
        (lambda b: [[math.nan for _ in row] for row in b], "nothing but NaN"),
    ],
)
def test_blocks_that_cannot_be_drawn(plot, change, message):
    scores = block_scores()
    scores.blocks = change(scores.blocks)
    with pytest.raises(InvalidDataError, match=message):
        plot(scores)


def test_block_layers_are_checked():
    with pytest.raises(InvalidPlanError, match="Layer 6 is out of range"):
        plot_block_distances(block_scores(), removed=[6])
    with pytest.raises(InvalidPlanError, match="Layer 9 is out of range"):
        plot_block_distances(block_scores(), protected=[9])
    with pytest.raises(InvalidDataError, match="hold no blocks"):
        plot_block_distances({0: 1.0})


def test_strategies_are_compared_by_their_order():
    one = LayerScores({0: 3.0, 1: 1.0, 2: 2.0}, strategy="one")
    two = LayerScores({1: 5.0, 2: 9.0, 3: 7.0}, strategy="two", removes="highest")
    figure = plot_score_comparison([one, two], removed=[[1], [2, 3]])
    axes = figure.axes[0]
    np.testing.assert_equal(cells(figure), [[3, 1, 2, math.nan], [math.nan, 3, 1, 2]])
    assert dots(axes, "removed") == [(1, 0), (2, 1), (3, 1)]
    assert dots(axes, "no score (2)") == [(3, 0), (0, 1)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


@pytest.mark.parametrize(
    ("scores", "removed", "error", "message"),
    [
        ([], None, InvalidDataError, "0 strategies given: one figure shows 1 to 12"),
        ([{0: 1.0}], None, InvalidDataError, "is a dict, not LayerScores"),
        (["same", "same"], None, InvalidDataError, "have one name"),
        (["one", "two"], [[0]], InvalidDataError, "1 lists for 2 strategies"),
        (["one"], [[7]], InvalidPlanError, r"\[7\] have no score"),
    ],
)
def test_comparisons_that_cannot_be_drawn(scores, removed, error, message):
    made = [LayerScores({0: 1, 1: 2}, strategy=s) if isinstance(s, str) else s for s in scores]
    with pytest.raises(error, match=message):
        plot_score_comparison(made, removed=removed)


@pytest.mark.parametrize("depth", [1, 2, 12, 60, 96])
def test_no_text_touches_another_and_equal_input_gives_equal_bytes(depth, tmp_path):
    scores = [block_scores(depth, strategy=f"strategy {i} of a long name") for i in range(3)]
    draw = {
        "blocks": lambda path: plot_block_distances(
            scores[0], removed=[0][: depth - 1], save_path=path
        ),
        "matrix": lambda path: plot_similarity_matrix(scores[0], save_path=path),
        "order": lambda path: plot_score_comparison(scores, removed=[[0]] * 3, save_path=path),
    }
    for name, plot in draw.items():
        paths = [tmp_path / f"{name}{i}.svg" for i in range(2)]
        figure = [plot(path) for path in paths][-1]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert_nothing_outside(figure)
        assert not overlaps(figure.axes[0].get_xticklabels())
        assert not overlaps(figure.axes[0].get_yticklabels())
        assert figure.get_figwidth() in (3.4, 7.0)
