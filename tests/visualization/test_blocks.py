"""Figures of blocks of layers, read back."""

import math

import numpy as np
import pytest
from drawn import cells, legend_texts, points
from samples import UNIT, block_scores

from llm_pruner.errors import InvalidDataError, InvalidPlanError
from llm_pruner.visualization.blocks import plot_block_distances, plot_similarity_matrix

BEST = "best of its length"


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
    assert points(figure.axes[0], BEST) == slow


def test_the_best_block_is_the_one_the_strategy_takes(llama, tokenizer):
    from llm_pruner import PruneMePruner

    pruner = PruneMePruner(llama, tokenizer)
    scores = pruner.compute_layer_scores(["the cat sat on the mat", "a dog ran"])
    protected = [layer for layer in range(pruner.num_layers) if layer not in pruner.candidates]
    figure = plot_block_distances(scores, protected=protected)
    starts = {n: at for at, n in points(figure.axes[0], BEST)}
    for length in range(1, len(pruner.candidates)):
        taken = pruner.select_layers(scores, ratio=length / pruner.num_layers)
        assert starts[len(taken)] == taken[0]


def test_removed_layers_are_framed_where_they_are_a_block():
    figure = plot_block_distances(block_scores(), removed=[2, 3, 4])
    assert points(figure.axes[0], "removed") == [(2, 3)]
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
