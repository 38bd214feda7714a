"""What the runs of a folder found, as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

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
    READING_LABEL,
    RETRIEVAL,
    RETRIEVED,
    TABLE,
    TUNED,
)
from .layout import ERROR, Layout, last_line
from .models import ARCHITECTURES, PATTERNS
from .results import Run, mean_and_spread, turns

PERPLEXITY, ACCURACY = "perplexity", "accuracy"
_NOTHING = "There is nothing to show yet: no model of this experiment is measured."
_SHARED = "Speeds are left out where other jobs ran on the same device meanwhile (`--per-gpu`)."
_Measure = tuple[str, Callable[[Run], Mapping[int, str]]]


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
    tables = [_markdown(sweep_title, ["learning rate", *(f"{rate:g}" for rate in rates)], swept)] if swept else []
    tables += [_markdown(title, *_models(shown, learning_rate=True)), _by_seed(shown), _shared(shown)] if shown else []
    return "\n\n".join(table for table in tables if table) or _NOTHING


def patterns_table(layout: Layout) -> str:
    """Loss, perplexity, passkeys and speed of each pattern beside each other."""
    found = {}
    for name, variant in PATTERNS.items():
        runs = _complete(turns(layout.run(PATTERN_RUNS, name), "seed"))
        if runs:
            found[variant.title] = runs
    if not found:
        return _NOTHING
    columns, rows = _models(found, learning_rate=False)
    tuned = {title: [tuned_from(layout, run).scores(GRID, ACCURACY) for run in runs] for title, runs in found.items()}
    lengths = sorted({length for grids in tuned.values() for grid in grids for length in grid})
    columns += [f"passkey {shown_tokens(length)}" for length in lengths]
    for row, grids in zip(rows, tuned.values(), strict=True):
        row += [_cell([grid[length] for grid in grids if length in grid], ".2f") for length in lengths]
    table = _markdown(f"After {_tokens(run for runs in found.values() for run in runs)} tokens", columns, rows)
    return "\n\n".join(part for part in (table, _shared(found)) if part)


def extrapolation_table(layout: Layout) -> str:
    """Perplexity by length: of windows, of documents, of one long text; a sentence where there is none."""
    return _tables_by_length(
        layout,
        {
            "Perplexity of windows of each length, read from nothing": (FAR, lambda run: _scores(run, FAR)),
            "Perplexity of the first tokens of long documents": (DOCUMENTS, lambda run: _scores(run, DOCUMENTS)),
            "Perplexity of the first tokens of one text, joined of documents": (
                JOINED,
                lambda run: _scores(run, JOINED),
            ),
        },
    )


def reading_table(layout: Layout) -> str:
    """Memory and speed by length."""
    tables = _tables_by_length(
        layout,
        {
            "GiB at the most": (
                READING_LABEL,
                lambda run: {r["length"]: f"{r['peak_bytes'] / 2**30:.2f}" for r in run.reading},
            ),
            "Tokens a second": (
                READING_LABEL,
                lambda run: {r["length"]: f"{r['tokens_per_second']:,.0f}" for r in _alone(run)},
            ),
        },
    )
    shared = any(run.reading_was_shared for run in (first_seed(layout, name) for name in ARCHITECTURES))
    return f"{tables}\n\n{_SHARED}" if shared else tables


def passkey_table(layout: Layout) -> str:
    """Accuracy by length, the mean over depths and keys."""
    found = {}
    for name in ARCHITECTURES:
        run = tuned_from(layout, first_seed(layout, name))
        found[name] = _shares(run.scores(GRID, ACCURACY) | run.scores(LONG_GRID, ACCURACY))
    return _by_length("Passkeys found", found) or _NOTHING


def phonebook_table(layout: Layout) -> str:
    """Accuracy by length."""
    tuned = {name: tuned_from(layout, first_seed(layout, name), PHONEBOOK) for name in ARCHITECTURES}
    found = {name: _shares(run.scores(PHONEBOOK, ACCURACY)) for name, run in tuned.items()}
    return _by_length("Numbers found", found) or _NOTHING


def retrieval_table(layout: Layout) -> str:
    """Accuracy by length, a table for each kind of text."""
    tuned = {name: tuned_from(layout, first_seed(layout, name), RETRIEVAL) for name in ARCHITECTURES}
    tables = [
        _by_length(f"{task}, {kind}", {name: _shares(retrieved(run, task, kind)) for name, run in tuned.items()})
        for task, kinds in RETRIEVED.items()
        for kind in kinds
    ]
    return "\n\n".join(table for table in tables if table) or _NOTHING


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
        rows.append([*row, _cell([speed for run in runs if (speed := run.tokens_per_second)], ",.0f")])
    return columns, rows


def _by_seed(found: Mapping[str, Sequence[Run]]) -> str:
    """Returns losses over the first model's of the same seed; empty where there are not two of each to compare."""
    losses = {
        title: {run.config["run"]["seed"]: run.held_out[-1][1] for run in runs if run.held_out}
        for title, runs in found.items()
    }
    (first, reference), *others = losses.items()
    seeds = sorted(reference)
    if len(seeds) < 2 or not others:
        return ""
    rows = [
        [title, *(f"{own[seed] - reference[seed]:+.4f}" if seed in own else "" for seed in seeds)]
        for title, own in others
    ]
    title = f"Held-out loss over that of {first} with the same seed, whose data come in the same order"
    return _markdown(title, ["model", *(f"seed {seed}" for seed in seeds)], rows)


def _shared(found: Mapping[str, Sequence[Run]]) -> str:
    """Returns the sentence on speeds that are missing; empty where none is."""
    return _SHARED if any(run.tokens_per_second is None for runs in found.values() for run in runs) else ""


def _alone(run: Run) -> list[dict[str, Any]]:
    return [] if run.reading_was_shared else run.reading


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


def _tables_by_length(layout: Layout, measures: Mapping[str, _Measure]) -> str:
    """Returns a table for each measure by its title, and a sentence in place of one without values."""
    runs = {name: first_seed(layout, name) for name in ARCHITECTURES}
    tables = []
    for title, (label, read) in measures.items():
        table = _by_length(title, {name: read(run) for name, run in runs.items()})
        tables.append(table or f"{title}: nothing to show{_reason(layout, list(runs.values()), label)}.")
    return "\n\n".join(tables)


def _reason(layout: Layout, runs: Sequence[Run], label: str) -> str:
    """Returns why a measure of all models is missing, as the log of the first job that failed has it."""
    lines = [last_line(layout.log("/".join((*run.folder.parts[-3:], label)))) for run in runs]
    found = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return f", since {found[0]}" if found else ""


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
