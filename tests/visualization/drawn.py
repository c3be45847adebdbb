"""Read back what a figure shows."""

from __future__ import annotations

from matplotlib.colors import to_hex


def legends(figure):
    return [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]


def legend_texts(figure):
    return [text.get_text() for legend in legends(figure) for text in legend.get_texts()]


def visible_labels(axis):
    """Tick labels inside the view."""
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for location, label in pairs if low <= location <= high]


def texts(figure):
    """All texts that are drawn."""
    found = [figure._suptitle, *(t for legend in legends(figure) for t in legend.get_texts())]
    for axes in figure.axes:
        found += axes.texts
        if axes.axison:
            found += [axes.title, axes.xaxis.label, axes.yaxis.label]
            found += [*visible_labels(axes.xaxis), *visible_labels(axes.yaxis)]
    return [text for text in found if text.get_text().strip()]


def overlaps(labels):
    boxes = [label.get_window_extent().padded(-0.5) for label in labels]
    return [
        (labels[i].get_text(), labels[j].get_text())
        for i in range(len(boxes))
        for j in range(i)
        if boxes[i].overlaps(boxes[j])
    ]


def line_of(axes, colour, style=None):
    """The only line of that colour and style."""
    [line] = [
        line
        for line in axes.lines
        if to_hex(line.get_color()) == colour and style in (None, line.get_linestyle())
    ]
    return line


def points(axes, label):
    """The points of the line whose label begins so."""
    [line] = [line for line in axes.lines if line.get_label().startswith(label)]
    return list(zip(*map(list, line.get_data()), strict=True))


def cells(figure):
    """The matrix of a cell map: NaN where nothing is drawn."""
    [image] = figure.axes[0].images
    return image.get_array().filled(float("nan"))
