"""Pictures of results: lines and heat maps, as PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sambalm.evaluation.settings import shown_tokens


@dataclass(frozen=True)
class Line:
    """A line and its points; `errors` of as many are drawn as bars."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] = ()


@dataclass(frozen=True)
class Lines:
    """Lines over numbers of tokens, on a logarithmic scale.

    Args:
        limits: of y, None for those of the points.
        log_y: whether y has a logarithmic scale too.
    """

    title: str
    lines: Sequence[Line]
    y_name: str
    x_name: str = "tokens"
    limits: tuple[float, float] | None = None
    log_y: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values between 0 and 1 by row and column; None where there is none."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    row_name: str
    column_name: str


@dataclass(frozen=True)
class Bar:
    """A value between 0 and 1 with its error and with what chance gives, where these are known."""

    name: str
    value: float
    error: float | None
    chance: float | None


@dataclass(frozen=True)
class Bars:
    """Values by name."""

    title: str
    bars: Sequence[Bar]
    x_name: str


Plot = Lines | HeatMap | Bars


def draw(plot: Plot, path: Path) -> None:
    """Draws a plot as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if isinstance(plot, Lines):
        _draw_lines(plot, axes)
    elif isinstance(plot, Bars):
        _draw_bars(plot, axes)
    else:
        image = axes.imshow(
            [[math.nan if value is None else value for value in row] for row in plot.values],
            vmin=0,
            vmax=1,
            cmap="RdYlGn",
            aspect="auto",
        )
        axes.set_xticks(range(len(plot.columns)), plot.columns)
        axes.set_yticks(range(len(plot.rows)), plot.rows)
        axes.set(xlabel=plot.column_name, ylabel=plot.row_name)
        figure.colorbar(image, ax=axes)
    axes.set_title(plot.title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_bars(plot: Bars, axes: Any) -> None:
    names = [bar.name for bar in plot.bars]
    axes.barh(names, [bar.value for bar in plot.bars], xerr=[bar.error or 0.0 for bar in plot.bars], color="C0")
    named = False
    for place, bar in enumerate(plot.bars):
        if bar.chance is not None:
            axes.plot([bar.chance] * 2, [place - 0.4, place + 0.4], color="C3", label=None if named else "chance")
            named = True
    axes.set(xlabel=plot.x_name, xlim=(0, 1))
    axes.invert_yaxis()
    if any(bar.chance is not None for bar in plot.bars):
        axes.legend()


def _draw_lines(plot: Lines, axes: Any) -> None:
    for line in plot.lines:
        x, y = [point[0] for point in line.points], [point[1] for point in line.points]
        errors = [error or 0.0 for error in line.errors] or None
        axes.errorbar(x, y, yerr=errors, fmt="o-", markersize=4, linewidth=1, capsize=2, label=line.name)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for line in plot.lines for x, _ in line.points})
    ticks = ticks[:: math.ceil(len(ticks) / 12)] if ticks else []
    axes.set_xticks(ticks, [shown_tokens(int(tick)) for tick in ticks])
    if plot.log_y:
        axes.set_yscale("log")
    axes.set(xlabel=plot.x_name, ylabel=plot.y_name)
    if plot.limits:
        axes.set_ylim(*plot.limits)
    axes.legend()
