"""A finished run at a glance: its losses beside models that only count, its speed, and where its files are."""

from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from sambalm.data_pipeline.baselines import Baselines, baseline_losses
from sambalm.pretrain.checkpointing.format import checkpoint_folders
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.errors import CheckpointError
from sambalm.pretrain.reporting.metrics_file import LOSS_AT, SOURCE_LOSS_AT, read_metrics
from sambalm.pretrain.reporting.plot import plot_losses

HF_FOLDER = "hf"


def print_report(run_dir: Path) -> None:
    """Prints the summary and writes loss.png.

    Raises:
        CheckpointError: the folder is not a run that has validated.
    """
    records = read_metrics(run_dir)
    validated = [record for record in records if any(name.startswith(LOSS_AT) for name in record)]
    if not validated:
        raise CheckpointError(f"{run_dir} is not a run with a validation: its metrics.jsonl holds none")
    config = load_config(run_dir / "config.yaml")
    baselines = _baselines(config)
    plot = run_dir / "loss.png"
    plot_losses(run_dir, plot, baselines={"unigram": baselines.unigram_entropy, "bigram": baselines.bigram})

    console = Console()
    console.print(_losses(validated[-1], config, baselines))
    console.print(_facts(records, run_dir, plot))


def _baselines(config: RunConfig) -> Baselines:
    """On the tokens that the run validates on at its training length."""
    return baseline_losses(
        config.data,
        validation_samples=max(1, config.validation.tokens // config.data.sequence_length),
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
    )


def _losses(record: dict[str, Any], config: RunConfig, baselines: Baselines) -> Table:
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
    for name, value in (
        ("unigram entropy of these tokens", baselines.unigram_entropy),
        ("bigram, Kneser-Ney, of the training tokens", baselines.bigram),
    ):
        table.add_row(name, f"{value:.4f}")
    return table


def _facts(records: list[dict[str, Any]], run_dir: Path, plot: Path) -> Table:
    last = records[-1]
    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{last['step']:,} ({last['tokens']:,} tokens)")
    table.add_row("speed", f"{median(record['tokens_per_second'] for record in records):,.0f} tokens/s (median step)")
    for name, path in (
        ("TensorBoard logs", run_dir / "tensorboard"),
        ("loss plot", plot),
        *(("checkpoint", folder) for folder in checkpoint_folders(run_dir)[-1:]),
        ("Hugging Face folder", run_dir / HF_FOLDER),
    ):
        if path.exists():
            table.add_row(name, str(path))
    return table
