"""What the runs of a folder found, as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from sambalm.evaluation.settings import shown_tokens

from .experiments import (
    ARCHITECTURE_RUNS,
    DOCUMENTS,
    FAR,
    GRID,
    JOINED,
    LONG_GRID,
    LONG_RETRIEVAL,
    PATTERN_RUNS,
    PHONEBOOK,
    RETRIEVAL,
    RETRIEVED,
    TABLE,
    TUNED,
)
from .layout import Layout
from .models import ARCHITECTURES, PATTERNS
from .results import Run, mean_and_spread, turns

PERPLEXITY, ACCURACY = "perplexity", "accuracy"


def architectures_table(layout: Layout) -> str:
    """The sweep, and the table of models at their best learning rate: means over the seeds, +- half their range."""
    sweeps = {name: turns(layout.run(ARCHITECTURE_RUNS, name), "lr") for name in ARCHITECTURES}
    rates = sorted({_rate(run) for runs in sweeps.values() for run in runs})
    losses = {
        name: {_rate(run): f"{run.held_out[-1][1]:.4f}" for run in runs if run.is_complete and run.held_out}
        for name, runs in sweeps.items()
    }
    swept = [
        [ARCHITECTURES[name].title, *(found.get(rate, "") for rate in rates)] for name, found in losses.items() if found
    ]
    seeds = {name: _complete(turns(layout.run(ARCHITECTURE_RUNS, name), "seed")) for name in ARCHITECTURES}
    shown = {ARCHITECTURES[name].title: runs for name, runs in seeds.items() if runs}
    sweep_title = (
        f"Held-out loss, nats a token, after {_tokens(run for runs in sweeps.values() for run in runs)} tokens"
    )
    title = f"After {_tokens(run for runs in seeds.values() for run in runs)} tokens"
    return "\n\n".join(
        [
            _markdown(sweep_title, ["learning rate", *(f"{rate:g}" for rate in rates)], swept) if rates else "",
            _markdown(title, *_models(shown, learning_rate=True)),
        ]
    ).strip()


def patterns_table(layout: Layout) -> str:
    """Loss, perplexity, passkeys and speed of each pattern beside each other."""
    found = {}
    for name, variant in PATTERNS.items():
        runs = _complete(turns(layout.run(PATTERN_RUNS, name), "seed"))
        if runs:
            found[variant.title] = runs
    columns, rows = _models(found, learning_rate=False)
    tuned = {title: [tuned_from(layout, run).scores(GRID, ACCURACY) for run in runs] for title, runs in found.items()}
    lengths = sorted({length for grids in tuned.values() for grid in grids for length in grid})
    columns += [f"passkey {shown_tokens(length)}" for length in lengths]
    for row, grids in zip(rows, tuned.values(), strict=True):
        row += [_cell([grid[length] for grid in grids if length in grid], ".2f") for length in lengths]
    return _markdown(f"After {_tokens(run for runs in found.values() for run in runs)} tokens", columns, rows)


def extrapolation_table(layout: Layout) -> str:
    """Perplexity by length: of windows, of documents, of one long text."""
    return _tables_by_length(
        layout,
        {
            "Perplexity of windows of each length, read from nothing": lambda run: _scores(run, FAR),
            "Perplexity of the first tokens of long documents": lambda run: _scores(run, DOCUMENTS),
            "Perplexity of the first tokens of one text, joined of documents": lambda run: _scores(run, JOINED),
        },
    )


def reading_table(layout: Layout) -> str:
    """Memory and speed by length."""
    return _tables_by_length(
        layout,
        {
            "GiB at the most": lambda run: {r["length"]: f"{r['peak_bytes'] / 2**30:.2f}" for r in run.reading},
            "Tokens a second": lambda run: {r["length"]: f"{r['tokens_per_second']:,.0f}" for r in run.reading},
        },
    )


def passkey_table(layout: Layout) -> str:
    """Accuracy by length, the mean over depths and keys."""
    found = {}
    for name in ARCHITECTURES:
        run = tuned_from(layout, first_seed(layout, name))
        found[name] = _shares(run.scores(GRID, ACCURACY) | run.scores(LONG_GRID, ACCURACY))
    return _by_length("Passkeys found", found)


def phonebook_table(layout: Layout) -> str:
    """Accuracy by length."""
    tuned = {name: tuned_from(layout, first_seed(layout, name), PHONEBOOK) for name in ARCHITECTURES}
    return _by_length("Numbers found", {name: _shares(run.scores(PHONEBOOK, ACCURACY)) for name, run in tuned.items()})


def retrieval_table(layout: Layout) -> str:
    """Accuracy by length, a table for each kind of text."""
    tuned = {name: tuned_from(layout, first_seed(layout, name), RETRIEVAL) for name in ARCHITECTURES}
    return "\n\n".join(
        _by_length(f"{task}, {kind}", {name: _shares(retrieved(run, task, kind)) for name, run in tuned.items()})
        for task, kinds in RETRIEVED.items()
        for kind in kinds
    ).strip()


def retrieved(run: Run, task: str, kind: str) -> dict[int, float]:
    """Returns which part of a kind's answers was found, by length."""
    found = run.scores(f"{RETRIEVAL}-{task}", ACCURACY, kind=kind)
    return found | (run.scores(LONG_RETRIEVAL, ACCURACY, kind=kind) if task == "needles" else {})


TABLES: Mapping[str, Callable[[Layout], str]] = {
    "architectures": architectures_table,
    "extrapolation": extrapolation_table,
    "reading": reading_table,
    "passkey": passkey_table,
    "phonebook": phonebook_table,
    "retrieval": retrieval_table,
    "patterns": patterns_table,
}


def first_seed(layout: Layout, name: str) -> Run:
    """Returns the run of which an architecture is measured: that of the first seed by name."""
    found = turns(layout.run(ARCHITECTURE_RUNS, name), "seed")
    return found[0] if found else Run(layout.run(ARCHITECTURE_RUNS, name, "seed"))


def tuned_from(layout: Layout, run: Run, experiment: str = TUNED) -> Run:
    """Returns the run that began with another's weights."""
    return Run(layout.run(layout.tuned(experiment), *run.folder.parts[-3:]))


def _complete(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.is_complete]


def _rate(run: Run) -> float:
    return run.config["optimizer"]["peak_lr"]


def _tokens(runs: Iterable[Run]) -> str:
    return " or ".join(f"{count:,}" for count in sorted({run.steps[-1]["tokens"] for run in runs}))


def _models(found: Mapping[str, Sequence[Run]], *, learning_rate: bool) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of models with what was measured of all their seeds."""
    lengths = sorted({length for runs in found.values() for run in runs for length in run.scores(TABLE, PERPLEXITY)})
    columns = ["model", "pattern", "parameters", *(["learning rate"] if learning_rate else []), "seeds"]
    columns += ["held-out loss", *(f"perplexity {shown_tokens(length)}" for length in lengths), "tokens/s"]
    rows = []
    for title, runs in found.items():
        row = [title, f"`{_short(runs[0].config['model']['pattern'])}`", f"{runs[0].parameters:,}"]
        row += [" or ".join(f"{rate:g}" for rate in sorted({_rate(run) for run in runs}))] if learning_rate else []
        row += [str(len(runs)), _cell([run.held_out[-1][1] for run in runs if run.held_out], ".4f")]
        for length in lengths:
            scores = [run.scores(TABLE, PERPLEXITY) for run in runs]
            row.append(_cell([score[length] for score in scores if length in score], ".2f"))
        rows.append([*row, _cell([run.tokens_per_second for run in runs], ",.0f")])
    return columns, rows


def _short(pattern: str) -> str:
    """Writes a repeated pattern as configs do."""
    sizes = (size for size in range(1, len(pattern) + 1) if len(pattern) % size == 0)
    block = next(pattern[:size] for size in sizes if pattern[:size] * (len(pattern) // size) == pattern)
    return pattern if block == pattern else f"{block} x {len(pattern) // len(block)}"


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:{form}} ± {spread:{form}}" if len(values) > 1 else f"{mean:{form}}"


def _shares(scores: Mapping[int, float]) -> dict[int, str]:
    return {length: f"{value:.3f}" for length, value in scores.items()}


def _scores(run: Run, label: str) -> dict[int, str]:
    return {length: f"{value:.2f}" for length, value in run.scores(label, PERPLEXITY).items()}


def _tables_by_length(layout: Layout, measures: Mapping[str, Callable[[Run], Mapping[int, str]]]) -> str:
    """Returns a table for each measure of which anything is there, by its title."""
    runs = {name: first_seed(layout, name) for name in ARCHITECTURES}
    tables = [_by_length(title, {name: read(run) for name, run in runs.items()}) for title, read in measures.items()]
    return "\n\n".join(table for table in tables if table)


def _by_length(title: str, found: Mapping[str, Mapping[int, str]]) -> str:
    """Returns a table of architectures by length; empty where nothing is there."""
    lengths = sorted({length for values in found.values() for length in values})
    rows = [
        [ARCHITECTURES[name].title, *(values.get(length, "") for length in lengths)]
        for name, values in found.items()
        if values
    ]
    return _markdown(title, ["model", *map(shown_tokens, lengths)], rows) if rows else ""


def _markdown(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"{title}:", "", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
