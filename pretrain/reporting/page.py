"""The report as one HTML page that needs nothing else: no network, no script, light and dark, wide and narrow."""

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sambalm.pretrain.lifecycle.ledger import Account
from sambalm.pretrain.reporting.charts import Chart, Series, draw
from sambalm.pretrain.reporting.durations import date, duration
from sambalm.pretrain.reporting.metrics_file import EVALUATION, LOSS_AT, NAMED_LOSS_AT, SOURCE_LOSS_AT, last_scores
from sambalm.pretrain.reporting.run_data import RunData

_STYLE = Path(__file__).with_name("page.css")
_GIB = 2**30
_SHOWN_EVENTS = 200
_SPREAD_KEYS = ("train.global_batch_tokens", "data.sequence_length")  # runs that differ here share tokens, not steps


def render_page(runs: Sequence[RunData], *, baselines: Mapping[str, float]) -> str:
    """The page of one run, or of several beside each other.

    Args:
        baselines: losses of models that only count, by name; of the one run.
    """
    title = "Report: " + ", ".join(run.name for run in runs)
    sections = {
        "Summary": _summary(runs),
        "Phases": _phases(runs),
        "Charts": _charts(runs, baselines),
        "Where the time went": _goodput(runs),
        "Events": _events(runs),
        "Configuration": _config(runs),
        "Environment": _table_of_facts([run.environment for run in runs], runs),
        "Data": _data(runs),
    }
    anchors = [(name.lower().replace(" ", "-"), name) for name, content in sections.items() if content]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in anchors)
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{sections[name]}</section>' for anchor, name in anchors)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f'<h1>{_text(title)}</h1><p class="soft">written {date(time.time())}</p><nav>{links}</nav>{body}'
        "</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """Cells are HTML; a row may be one that differs. The columns after the first hold a run each."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = ""
    for cells, differs in rows:
        values = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        body += f'<tr class="{"differs" if differs else ""}"><th>{cells[0]}</th>{values}</tr>'
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _table_of_facts(facts: Sequence[Mapping[str, Any]], runs: Sequence[RunData], *, marks: bool = True) -> str:
    """A row for each key that any run has, marked where the runs differ."""
    keys = list(dict.fromkeys(key for each in facts for key in each))
    if not keys:
        return ""
    rows = []
    for key in keys:
        values = [_text(each[key]) if key in each else "" for each in facts]
        rows.append(([_text(key), *values], marks and len(set(values)) > 1))
    return _table(["", *(_text(run.name) for run in runs)], rows)


def _summary(runs: Sequence[RunData]) -> str:
    return _table_of_facts([_facts(run) for run in runs], runs, marks=False)


def _facts(run: RunData) -> dict[str, str]:
    facts: dict[str, str] = {}
    if run.status:
        facts["state"] = run.status.shown_state()
        facts["attempts"] = f"{len(run.status.attempts):,}"
    if run.records:
        last = run.records[-1]
        steps = run.config.get("train.steps")  # None where the config is damaged
        facts["step"] = f"{last['step']:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")
        facts["tokens"] = f"{last['tokens']:,}"
        if run.phases and "phase" in last:
            facts["phase"] = f"{last['phase']} of {len(run.phases)}"
        facts["loss"] = f"{last['loss']:.4f}"
        facts["speed"] = f"{median(record['tokens_per_second'] for record in run.records):,.0f} tokens/s (median step)"
    for name, value in sorted(_last_held_out(run).items(), key=lambda item: _length(item[0])):
        facts[f"held-out loss at {_length(name):,} tokens"] = f"{value:.4f}"
    for name, value in _last_held_out(run, NAMED_LOSS_AT).items():
        length, _, source = name.removeprefix(NAMED_LOSS_AT).partition("/")
        facts[f"loss on {source} at {int(length):,} tokens"] = f"{value:.4f}"
    for name, value in last_scores(run.records)[1].items():
        facts[name.replace("/", " ")] = f"{value:.4g}"
    if run.status and run.status.left_s and run.status.state == "training":
        facts["left"] = duration(run.status.left_s)
    if run.status and run.status.training_share is not None:
        facts["time in training"] = f"{run.status.training_share:.1%}"
    if run.started_from:
        facts["started from"] = run.started_from
    facts["folder"] = str(run.path)
    return facts


def _phases(runs: Sequence[RunData]) -> str:
    """A table of the phases of each run that has some."""
    shown = []
    for run in runs:
        if not run.phases:
            continue
        head = [_text(name) for name in run.phases[0]]
        rows = [([_text(value) for value in phase.values()], False) for phase in run.phases]
        heading = f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""
        shown.append(heading + _table(head, rows))
    return "".join(shown)


def _length(name: str) -> int:
    return int(name.removeprefix(LOSS_AT))


def _last_held_out(run: RunData, prefix: str = LOSS_AT) -> dict[str, float]:
    for record in reversed(run.records):
        if found := {name: value for name, value in record.items() if name.startswith(prefix)}:
            return found
    return {}


def _charts(runs: Sequence[RunData], baselines: Mapping[str, float]) -> str:
    by_tokens = any(len({run.config.get(key) for run in runs}) > 1 for key in _SPREAD_KEYS)
    x_key, x_name = ("tokens", "tokens") if by_tokens else ("step", "step")

    def lines(key: str, *, scale: float = 1.0) -> list[Series]:
        return [
            Series(run.name, [(r[x_key], r[key] / scale) for r in run.records if key in r], number)
            for number, run in enumerate(runs)
        ]

    held_out = _held_out_series(runs, x_key, LOSS_AT)
    of_sources = _held_out_series(runs, x_key, SOURCE_LOSS_AT)
    named = _held_out_series(runs, x_key, NAMED_LOSS_AT)
    memory = "peak_memory_bytes" if any("peak_memory_bytes" in r for run in runs for r in run.records[-1:]) else ""
    charts = [
        Chart("Training loss", lines("loss"), x_name, "nats per token", baselines=list(baselines.items())),
        *([Chart("Held-out loss by length", held_out, x_name, "nats per token")] if held_out else []),
        *([Chart("Held-out loss by source", of_sources, x_name, "nats per token")] if of_sources else []),
        *([Chart("Loss on validation data by name", named, x_name, "nats per token")] if named else []),
        *_evaluation_charts(runs, x_key, x_name),
        Chart("Throughput", lines("tokens_per_second"), x_name, "tokens/s", from_zero=True),
        Chart(
            "Peak memory of the first GPU" if memory else "Peak memory of the first process",
            lines(memory or "peak_host_memory_bytes", scale=_GIB),
            x_name,
            "GiB",
            from_zero=True,
        ),
        Chart("Gradient norm", lines("grad_norm"), x_name, "before clipping", is_log=True),
        Chart("Learning rate", lines("lr"), x_name, "learning rate", from_zero=True),
    ]
    return f'<div class="charts">{"".join(map(draw, charts))}</div>'


def _held_out_series(runs: Sequence[RunData], x_key: str, prefix: str) -> list[Series]:
    """A line for each run and length: of one run in a colour each, of several in the run's colour."""
    found = []
    for number, run in enumerate(runs):
        names = {name: None for record in run.records for name in record if name.startswith(prefix)}
        ordered = sorted(names, key=lambda name: (int(name.removeprefix(prefix).partition("/")[0]), name))
        for place, name in enumerate(ordered):
            length, _, source = name.removeprefix(prefix).partition("/")
            label = " ".join(filter(None, [source, f"{int(length):,} tokens"]))
            if len(runs) > 1:
                label = f"{run.name}, {label}"
            points = [(record[x_key], record[name]) for record in run.records if name in record]
            found.append(Series(label, points, *((place, 0) if len(runs) == 1 else (number, place))))
    return found


def _evaluation_charts(runs: Sequence[RunData], x_key: str, x_name: str) -> list[Chart]:
    """A chart for each score of each task, with a line for each run and for all that it was measured at."""
    charts: dict[tuple[str, str], list[Series]] = {}
    for number, run in enumerate(runs):
        names = dict.fromkeys(name for record in run.records for name in record if name.startswith(EVALUATION))
        for name in names:
            task, score, *places = name.removeprefix(EVALUATION).split("/")
            series = charts.setdefault((task, score), [])
            place = sum(one.colour == number for one in series) if len(runs) > 1 else len(series)
            label = ", ".join([*([run.name] if len(runs) > 1 else []), " ".join(places) or score])
            points = [(record[x_key], record[name]) for record in run.records if name in record]
            series.append(Series(label, points, *((place, 0) if len(runs) == 1 else (number, place))))
    return [Chart(f"{task}: {score}", series, x_name, score) for (task, score), series in charts.items()]


def _goodput(runs: Sequence[RunData]) -> str:
    known = [run for run in runs if run.status and run.status.seconds and run.status.wall_s]
    if not known:
        return ""
    shown, columns = [], []
    for run in known:
        assert run.status
        seconds, wall_s = run.status.seconds or {}, run.status.wall_s or 1.0
        parts = "".join(
            f'<span style="width:{100 * value / wall_s:.3f}%;background:var(--{account})" '
            f'title="{_text(_words(account))}: {value / wall_s:.1%}, {duration(value)}"></span>'
            for account, value in seconds.items()
            if value > 0
        )
        shown.append(f'<h3>{_text(run.name)}: {duration(wall_s)}</h3><div class="bar" role="img">{parts}</div>')
        columns.append({name: f"{value / wall_s:.1%}, {duration(value)}" for name, value in seconds.items()})
    rows = []
    for account in Account:
        name = f'<span class="swatch" style="background:var(--{account})"></span>{_words(account)}'
        rows.append(([name, *(column.get(account, "") for column in columns)], False))
    return "".join(shown) + _table(["", *(_text(run.name) for run in known)], rows)


def _words(account: str) -> str:
    return account.replace("_", " ")


def _events(runs: Sequence[RunData]) -> str:
    shown = []
    for run in runs:
        if not run.events:
            continue
        left_out = len(run.events) - _SHOWN_EVENTS
        rows = "".join(
            f'<tr><td class="soft">{date(event.at_s)}</td>'
            f'<td class="{"bad" if event.is_bad else ""}">{_text(event.what)}</td></tr>'
            for event in run.events[-_SHOWN_EVENTS:]
        )
        note = f'<p class="soft">{left_out:,} earlier ones are left out.</p>' if left_out > 0 else ""
        heading = f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""
        shown.append(f'{heading}{note}<div class="scroll"><table><tbody>{rows}</tbody></table></div>')
    return "".join(shown)


def _config(runs: Sequence[RunData]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1]
    whole = _table_of_facts([run.config for run in runs], runs)
    if len(runs) == 1:
        return f"<details><summary>{len(keys)} keys</summary>{whole}</details>"
    differences = _table_of_facts([{key: run.config.get(key, "") for key in differing} for run in runs], runs)
    return f"{differences}<details><summary>all {len(keys)} keys</summary>{whole}</details>"


def _data(runs: Sequence[RunData]) -> str:
    facts = []
    for run in runs:
        total = sum(source["weight"] for source in run.data) or 1.0
        sources = {source["prefix"]: f"{source['weight'] / total:.2%} of the samples" for source in run.data}
        facts.append(sources or {str(run.config.get("data.train")): "not yet recorded by a checkpoint"})
    return _table_of_facts(facts, runs)
