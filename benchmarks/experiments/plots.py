"""What the runs of a folder found, as PNG."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sambalm.evaluation.settings import shown_tokens

from .experiments import (
    ARCHITECTURE_RUNS,
    DOCUMENTS,
    FAR,
    GRID,
    JOINED,
    LONG_GRID,
    PATTERN_RUNS,
    PHONEBOOK,
    RETRIEVAL,
    RETRIEVED,
    TABLE,
)
from .layout import Layout
from .models import ARCHITECTURES, PATTERNS
from .results import Run, mean_and_spread, turns
from .tables import ACCURACY, PERPLEXITY, first_seed, retrieved, tuned_from

_MARKERS = "os^vDPX*phd<>"  # twelve beside ten colours: sixty models look different


def draw(name: str, layout: Layout, path: Path) -> None:
    """Draws an experiment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 4.2), layout="constrained")
    _PLOTS[name](layout, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _architectures(layout: Layout, figure: Any) -> None:
    losses, perplexities = figure.subplots(1, 2)
    for number, (name, variant) in enumerate(ARCHITECTURES.items()):
        runs = [run for run in turns(layout.run(ARCHITECTURE_RUNS, name), "seed") if run.held_out]
        if not runs:
            continue
        style = {"color": f"C{number}", "label": variant.title}
        losses.plot(*zip(*runs[0].held_out, strict=True), _style(number), markersize=4, linewidth=1, **style)
        scores = [run.scores(TABLE, PERPLEXITY) for run in runs]
        points = [(length, mean_and_spread([s[length] for s in scores if length in s])) for length in scores[0]]
        if not points:
            continue
        x, y, spread = [p[0] for p in points], [p[1][0] for p in points], [p[1][1] for p in points]
        perplexities.errorbar(x, y, yerr=spread, fmt=_style(number), markersize=4, linewidth=1, capsize=2, **style)
    losses.set(xlabel="training tokens", ylabel="held-out loss, nats a token (first seed)")
    _over_lengths(perplexities, "perplexity, mean over seeds")
    losses.legend(fontsize=8)


def _extrapolation(layout: Layout, figure: Any) -> None:
    windows, documents, text = figure.subplots(1, 3)
    for number, (name, variant) in enumerate(ARCHITECTURES.items()):
        run = first_seed(layout, name)
        _line(windows, run.scores(FAR, PERPLEXITY).items(), number, variant.title)
        _line(documents, run.scores(DOCUMENTS, PERPLEXITY).items(), number, variant.title)
        _line(text, run.scores(JOINED, PERPLEXITY).items(), number, variant.title)
    _over_lengths(windows, "perplexity of windows")
    _over_lengths(documents, "perplexity of the first tokens of documents")
    _over_lengths(text, "perplexity of the first tokens of one text")


def _reading(layout: Layout, figure: Any) -> None:
    memory, speed = figure.subplots(1, 2)
    for number, (name, variant) in enumerate(ARCHITECTURES.items()):
        run = first_seed(layout, name)
        _line(memory, [(r["length"], r["peak_bytes"] / 2**30) for r in run.reading], number, variant.title)
        if not run.reading_was_shared:
            _line(speed, [(r["length"], r["tokens_per_second"]) for r in run.reading], number, variant.title)
    _over_lengths(memory, "GiB at the most")
    _over_lengths(speed, "tokens a second")


def _passkey(layout: Layout, figure: Any) -> None:
    found = {}
    for name, variant in ARCHITECTURES.items():
        run = tuned_from(layout, first_seed(layout, name))
        if cells := run.cells(GRID) | run.cells(LONG_GRID):
            found[variant.title] = cells
    for axes, (title, cells) in zip(
        figure.subplots(1, max(1, len(found)), squeeze=False)[0], found.items(), strict=False
    ):
        depths, lengths = (sorted({place[at] for place in cells}) for at in (0, 1))
        values = [[cells.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [shown_tokens(int(length)) for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axes.set(title=title, xlabel="tokens of the text", ylabel="depth of the key")


def _phonebook(layout: Layout, figure: Any) -> None:
    axes = figure.subplots()
    for number, (name, variant) in enumerate(ARCHITECTURES.items()):
        run = tuned_from(layout, first_seed(layout, name), PHONEBOOK)
        _line(axes, run.scores(PHONEBOOK, ACCURACY).items(), number, variant.title)
    _over_lengths(axes, "numbers found", is_share=True)


def _retrieval(layout: Layout, figure: Any) -> None:
    kinds = [(task, kind) for task, kinds in RETRIEVED.items() for kind in kinds]
    for axes, (task, kind) in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        for number, (name, variant) in enumerate(ARCHITECTURES.items()):
            run = tuned_from(layout, first_seed(layout, name), RETRIEVAL)
            _line(axes, retrieved(run, task, kind).items(), number, variant.title)
        _over_lengths(axes, "", is_share=True)
        axes.set(title=f"{task}, {kind}")
        axes.tick_params(axis="x", labelrotation=90)


def _patterns(layout: Layout, figure: Any) -> None:
    axes = figure.subplots()
    found = {variant.title: _complete_runs(layout, name) for name, variant in PATTERNS.items()}
    found = {title: runs for title, runs in found.items() if runs}
    speeds = {title: [speed for run in runs if (speed := run.tokens_per_second)] for title, runs in found.items()}
    for title, runs in found.items():
        loss, spread = mean_and_spread([run.held_out[-1][1] for run in runs])
        if all(speeds.values()):
            place = mean_and_spread(speeds[title])[0], loss
            axes.errorbar(*place, yerr=spread, fmt="o", markersize=4, capsize=2)
            axes.annotate(title, place, fontsize=7, xytext=(4, 2), textcoords="offset points")
        else:  # other jobs ran on the device: losses beside names
            axes.errorbar(loss, title, xerr=spread, fmt="o", markersize=4, capsize=2)
    if all(speeds.values()):
        axes.set(xlabel="tokens a second in training", ylabel="held-out loss, nats a token")
        axes.margins(x=0.15)
    else:
        axes.set(xlabel="held-out loss, nats a token")
        axes.invert_yaxis()


def _complete_runs(layout: Layout, name: str) -> list[Run]:
    return [run for run in turns(layout.run(PATTERN_RUNS, name), "seed") if run.is_complete and run.held_out]


_PLOTS: Mapping[str, Callable[[Layout, Any], None]] = {
    "architectures": _architectures,
    "extrapolation": _extrapolation,
    "reading": _reading,
    "passkey": _passkey,
    "phonebook": _phonebook,
    "retrieval": _retrieval,
    "patterns": _patterns,
}


def _style(number: int) -> str:
    return f"{_MARKERS[number % len(_MARKERS)]}-"


def _line(axes: Any, points: Iterable[tuple[float, float]], number: int, title: str) -> None:
    found = sorted(points)
    if found:
        style = {"color": f"C{number}", "label": title, "markersize": 4, "linewidth": 1}
        axes.plot(*zip(*found, strict=True), _style(number), **style)


def _over_lengths(axes: Any, name: str, *, is_share: bool = False) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    ticks = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xticks(ticks, [shown_tokens(tick) for tick in ticks], fontsize=7)
    axes.set(xlabel="tokens", ylabel=name)
    axes.xaxis.set_minor_locator(NullLocator())
    if is_share:
        axes.set_ylim(-0.03, 1.03)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    if axes.lines:
        axes.legend(fontsize=8)
