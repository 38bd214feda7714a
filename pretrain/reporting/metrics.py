"""What a run reports: metrics.jsonl, TensorBoard, the loss plot and the progress bar."""

import os
import resource
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sambalm.model.flops import flops_per_token, peak_flops
from sambalm.parallel.groups import World
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import dump_config
from sambalm.pretrain.errors import ExitCode, print_warning
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.reporting.appended_file import AppendedFile
from sambalm.pretrain.reporting.metrics_file import METRICS, metrics_line, read_metrics, records
from sambalm.pretrain.reporting.tensorboard import TensorBoardFile
from sambalm.pretrain.training import Training
from sambalm.pretrain.validation import LOSS_AT

PLAIN_LINE_EVERY_S = 10.0


class RunReport(Hook):
    """Everything that the main rank writes while a run goes on; silent on the other ranks.

    metrics.jsonl and TensorBoard get one record a step; a terminal gets a progress bar, a log file a line every few
    seconds. What an earlier attempt logged after the step that this one starts from is dropped.
    """

    def __init__(self, config: RunConfig, *, world: World, done_steps: int) -> None:
        self._config, self._run_dir, self._main = config, Path(config.run.dir), world.is_main
        flops = flops_per_token(config.model, sequence_length=config.data.sequence_length).total
        peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self._peak_tokens_per_second = peak and world.size * peak / flops
        self._done_steps = done_steps

    def on_start(self, training: Training) -> None:
        if self._main:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _write_config(self._config, self._run_dir / "config.yaml")
            _drop_after(self._run_dir, self._done_steps)
            self._file = AppendedFile(self._run_dir / METRICS)
            self._board = TensorBoardFile(self._run_dir / "tensorboard", first_step=self._done_steps + 1)
            self._progress = StepProgress(steps=self._config.train.steps, done_steps=self._done_steps)
            self._progress.start()

    def on_end(self, exit_code: ExitCode | None) -> None:
        if self._main:
            self._progress.stop()
            self._board.close()
            self._file.close()

    def after_step(self, step: FinishedStep) -> None:
        """Records a step and the metrics that the hooks before this one have added to it."""
        if not self._main:
            return
        tokens_per_second = step.result.batch_tokens / step.result.step_time_s
        record = {
            "step": step.number,
            **asdict(step.result),
            "tokens_per_second": tokens_per_second,
            **step.metrics,
            "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this process
        }
        if torch.cuda.is_available():
            record["memory_bytes"] = torch.cuda.memory_allocated()  # of this rank, after the step
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()  # of this rank, since the start
        if self._peak_tokens_per_second:
            record["mfu"] = tokens_per_second / self._peak_tokens_per_second
        self._file.append(metrics_line(record).encode())
        self._board.add_scalars({name: value for name, value in record.items() if name != "step"}, step=step.number)
        self._progress.step(record)


def _write_config(config: RunConfig, path: Path) -> None:
    """Writes the configuration for whoever reads the folder; a disk that takes nothing does not end the run."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text(dump_config(config))
        os.replace(draft, path)
    except OSError as error:
        print_warning(f"{path} cannot be written, and the run goes on: {error.strerror}")


def _drop_after(run_dir: Path, step: int) -> None:
    """Cuts metrics.jsonl off behind the last step that stays. It takes no room on the disk."""
    path = run_dir / METRICS
    end = max((end for end, record in records(path, warn=print_warning) if record["step"] <= step), default=0)
    if path.exists() and end < path.stat().st_size:
        os.truncate(path, end)


class StepProgress:
    """A progress bar on a terminal, and a line every few seconds elsewhere."""

    def __init__(self, *, steps: int, done_steps: int) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[tokens_per_second]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=steps, completed=done_steps, loss=float("nan"), tokens_per_second=0.0
        )
        self._steps, self._last_line_s = steps, float("-inf")
        self.start, self.stop = self._progress.start, self._progress.stop

    def step(self, record: dict[str, Any]) -> None:
        shown = {name: record[name] for name in ("loss", "tokens_per_second")}
        self._progress.update(self._task, completed=record["step"], **shown)
        now_s = time.monotonic()
        overdue = now_s - self._last_line_s > PLAIN_LINE_EVERY_S or record["step"] == self._steps
        if overdue and not self._console.is_terminal:
            self._last_line_s = now_s
            with suppress(OSError):  # a log on a full disk
                self._console.print(
                    f"step {record['step']}/{self._steps}  loss {record['loss']:.4f}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s",
                    highlight=False,
                )


def plot_losses(run_dir: Path, path: Path, *, baselines: dict[str, float]) -> None:
    """Draws the training and validation losses of a run, with horizontal lines for baselines, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(run_dir)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training", linewidth=1)
    names = sorted({name for r in records for name in r if name.startswith(LOSS_AT)}, key=_length)
    for name in names:
        points = [(r["step"], r[name]) for r in records if name in r]
        axes.plot(*zip(*points, strict=True), "o-", label=f"validation, {_length(name)} tokens", markersize=4)
    for label, value in baselines.items():
        axes.axhline(value, linestyle="--", color="grey", linewidth=0.8)
        axes.annotate(label, (records[-1]["step"], value), ha="right", va="bottom", color="grey", fontsize=8)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _length(name: str) -> int:
    return int(name.removeprefix(LOSS_AT))
