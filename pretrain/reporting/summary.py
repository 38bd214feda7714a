"""Runs at a glance: their losses beside models that only count, their speed, where their files are, and a page."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sambalm.data_pipeline.baselines import Baselines, baseline_losses
from sambalm.data_pipeline.errors import DataError
from sambalm.pretrain.checkpointing.format import checkpoint_folders
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import CheckpointError, not_a_run
from sambalm.pretrain.reporting.metrics_file import (
    LOSS_AT,
    METRICS,
    NAMED_LOSS_AT,
    SOURCE_LOSS_AT,
    last_scores,
    plain,
    read_steps,
)
from sambalm.pretrain.reporting.page import render_page
from sambalm.pretrain.reporting.plot import plot_losses
from sambalm.pretrain.reporting.run_data import read_runs

_VALIDATION = (LOSS_AT, SOURCE_LOSS_AT, NAMED_LOSS_AT)
HF_FOLDER, PAGE = "hf", "report.html"


def write_report(run_dirs: Sequence[Path], *, output: Path | None = None, as_json: bool = False) -> None:
    """Prints the summary of each run, draws its loss.png, and writes a page on all of them together.

    Args:
        output: the page; None: report.html in the first run's folder.
        as_json: prints JSON instead of tables.

    Raises:
        CheckpointError: a folder is not a run that has validated.
    """
    validated = [_last_validation(run_dir) for run_dir in run_dirs]
    runs = read_runs(run_dirs)
    page = output or run_dirs[0] / PAGE
    found, console = [], Console()
    for run, record in zip(runs, validated, strict=True):
        config = load_config(run.path / "config.yaml")
        baselines = _baselines(config)
        plot = run.path / "loss.png"
        plot_losses(run.path, plot, baselines=_named(baselines))
        evaluated, scores = last_scores(run.records)
        if not as_json:
            console.print(_losses(record, config, baselines))
            if scores:
                console.print(_scores(evaluated, scores))
            if run.phases:
                console.print(_phases(run.phases))
            console.print(_facts(list(run.records), run.path, plot, started_from=run.started_from))
        found.append(
            {
                "run_dir": str(run.path),
                "started_from": run.started_from,
                "last_record": run.records[-1],
                "held_out": {name: v for name, v in record.items() if name.startswith(_VALIDATION)},
                "held_out_step": record["step"],
                "evaluation": scores,
                "evaluation_step": evaluated or None,
                "baselines": _named(baselines),
                "tokens_per_s": median(record["tokens_per_second"] for record in run.records),
                "status": asdict(run.status) if run.status else None,
                "page": str(page),
            }
        )
    page.write_text(render_page(runs, baselines=found[0]["baselines"] if len(runs) == 1 else {}), encoding="utf-8")
    if as_json:
        print(json.dumps(plain(found), indent=2))
    else:
        console.print(f"the page: {page}", highlight=False, markup=False, soft_wrap=True)


def _last_validation(run_dir: Path) -> dict[str, Any]:
    for record in reversed(read_steps(run_dir)):
        if any(name.startswith((LOSS_AT, NAMED_LOSS_AT)) for name in record):
            return record
    if not (run_dir / METRICS).is_file():
        raise CheckpointError(not_a_run(run_dir, kind="a run", lacks=METRICS))
    raise CheckpointError(
        f"{run_dir} has not validated yet, so there is nothing to compare: let it reach validation.every_steps"
    )


def _baselines(config: RunConfig) -> Baselines | None:
    """On the held-out tokens of the training length; None where there are none, or the data is not there any more."""
    if not any(config.data.validation_fractions):
        return None
    try:
        return baseline_losses(
            config.data,
            validation_samples=max(1, config.validation.tokens // config.data.sequence_length),
            vocab_size=config.model.vocab_size,
        )
    except DataError as error:
        print(f"without unigram and bigram, since the data cannot be read: {error}", file=sys.stderr)
        return None


def _named(baselines: Baselines | None) -> dict[str, float]:
    found = {"unigram": baselines.unigram_entropy, "bigram": baselines.bigram} if baselines else {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _losses(record: dict[str, Any], config: RunConfig, baselines: Baselines | None) -> Table:
    table = Table("model", "nats per token", title=f"Held-out loss after step {record['step']}")
    for name, value in record.items():
        if name.startswith(LOSS_AT):
            length = int(name.removeprefix(LOSS_AT))
            multiple = length // config.data.sequence_length
            table.add_row(f"Samba, {length} tokens ({multiple}x the training length)", f"{value:.4f}")
    of_source = f"{SOURCE_LOSS_AT}{config.data.sequence_length}/"
    for name, value in record.items():
        if name.startswith(of_source):
            table.add_row(f"Samba, {name.removeprefix(of_source)} alone", f"{value:.4f}")
    for name, value in record.items():
        if name.startswith(NAMED_LOSS_AT):
            tokens, _, source = name.removeprefix(NAMED_LOSS_AT).partition("/")
            table.add_row(escape(f"Samba, {tokens} tokens of {source} (data.validation)"), f"{value:.4f}")
    if baselines:
        table.add_row("unigram entropy of these tokens", f"{baselines.unigram_entropy:.4f}")
        table.add_row("bigram, Kneser-Ney, of the training tokens", f"{baselines.bigram:.4f}")
    return table


def _scores(step: int, scores: Mapping[str, float]) -> Table:
    table = Table("task", "score", "value", title=f"Evaluation after step {step}")
    for name, value in scores.items():
        task, _, score = name.partition("/")
        table.add_row(escape(task), escape(score.replace("/", ", ")), f"{value:.4g}")
    return table


def _phases(phases: Sequence[Mapping[str, str]]) -> Table:
    table = Table(*phases[0], title="Phases")
    for phase in phases:
        table.add_row(*map(escape, phase.values()))
    return table


def _facts(records: list[dict[str, Any]], run_dir: Path, plot: Path, *, started_from: str | None = None) -> Table:
    last = records[-1]
    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{last['step']:,} ({last['tokens']:,} tokens)")
    table.add_row("speed", f"{median(record['tokens_per_second'] for record in records):,.0f} tokens/s (median step)")
    if started_from:
        table.add_row("started from", escape(started_from))
    for name, path in (
        ("TensorBoard logs", run_dir / "tensorboard"),
        ("loss plot", plot),
        *(("checkpoint", folder) for folder in checkpoint_folders(run_dir)[-1:]),
        ("Hugging Face folder", run_dir / HF_FOLDER),
    ):
        if path.exists():
            table.add_row(name, str(path))
    return table
