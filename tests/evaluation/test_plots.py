"""Pictures: what stands where in them, and under which name."""

import math

import numpy as np
import pytest
from matplotlib import pyplot

from sambalm.evaluation.plots import Bar, Bars, HeatMap, Line, Lines, draw


@pytest.fixture
def axes_of(monkeypatch, tmp_path):
    """Draws a plot, and returns the axes of the figure that draw has closed."""
    closed, close, path = [], pyplot.close, tmp_path / "plot.png"

    def drawn(plot):
        draw(plot, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return closed[-1].axes

    monkeypatch.setattr(pyplot, "close", closed.append)
    yield drawn
    for figure in closed:
        close(figure)


def written(labels) -> list[str]:
    return [label.get_text() for label in labels]


def ends_of_errors(container) -> list[list[float]]:
    """The two ends of each error bar, along the axis that they lie on."""
    (collection,) = container.lines[2]
    return [sorted({*ends[:, 0]} if len({*ends[:, 0]}) > 1 else {*ends[:, 1]}) for ends in collection.get_segments()]


def test_lines_go_through_their_points(axes_of):
    lines = [
        Line("first", [(1024.0, 0.5), (2048.0, 0.25)], [0.125, None]),
        Line("second", [(1536.0, 1.0), (2048.0, 0.75)]),
    ]
    (axes,) = axes_of(Lines("Accuracy", lines, y_name="accuracy", x_name="length", limits=(-0.03, 1.03)))
    drawn = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert drawn == [[list(point) for point in line.points] for line in lines]
    assert ends_of_errors(axes.containers[0])[0] == [0.375, 0.625]
    assert [container.has_yerr for container in axes.containers] == [True, False]
    assert written(axes.get_legend().get_texts()) == ["first", "second"]
    assert written(axes.get_xticklabels()) == ["1K", "1536", "2K"]
    assert len(axes.xaxis.get_minorticklocs()) == 0
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Accuracy", "length", "accuracy")
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylim()) == ("log", "linear", (-0.03, 1.03))


def test_a_dozen_numbers_of_tokens_are_named_at_most(axes_of):
    points = [(float(2**power), 1.0) for power in range(6, 31)]
    (axes,) = axes_of(Lines("Speed", [Line("a", points)], y_name="tokens", log_y=True))
    assert written(axes.get_xticklabels()) == ["64", "512", "4K", "32K", "256K", "2M", "16M", "128M", "1024M"]
    assert (axes.get_xlabel(), axes.get_yscale()) == ("tokens", "log")
    (axes,) = axes_of(Lines("Nothing", [Line("a", [])], y_name="tokens"))
    assert written(axes.get_xticklabels()) == []


def test_bars_begin_at_the_top_and_show_chance(axes_of):
    bars = [Bar("a", 0.5, 0.125, 0.25), Bar("b", 0.75, None, None), Bar("c", 1.0, None, 0.5)]
    (axes,) = axes_of(Bars("Tasks", bars, x_name="accuracy"))
    assert [patch.get_width() for patch in axes.patches] == [0.5, 0.75, 1.0]
    assert written(axes.get_yticklabels()) == ["a", "b", "c"]
    assert ends_of_errors(axes.containers[0])[0] == [0.375, 0.625]
    chances = [[line.get_xdata().tolist(), line.get_ydata().tolist()] for line in axes.lines]
    assert chances == [[[0.25] * 2, [-0.4, 0.4]], [[0.5] * 2, [1.6, 2.4]]]
    assert written(axes.get_legend().get_texts()) == ["chance"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_xlim()) == ("Tasks", "accuracy", (0, 1))
    assert axes.yaxis_inverted()
    (axes,) = axes_of(Bars("Tasks", bars[1:2], x_name="accuracy"))
    assert axes.get_legend() is None


def test_a_heat_map_has_a_colour_of_each_value(axes_of):
    values = [[0.25, 0.5, None], [0.75, 0.25, 0.5]]
    plot = HeatMap("Keys", ["top", "bottom"], ["1K", "2K", "4K"], values, row_name="depth", column_name="length")
    axes, _ = axes_of(plot)
    (image,) = axes.images
    shown = np.ma.filled(image.get_array().astype(float), math.nan)
    np.testing.assert_array_equal(shown, [[0.25, 0.5, math.nan], [0.75, 0.25, 0.5]])
    assert image.get_clim() == (0, 1)
    assert (written(axes.get_xticklabels()), written(axes.get_yticklabels())) == (["1K", "2K", "4K"], ["top", "bottom"])
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Keys", "length", "depth")
