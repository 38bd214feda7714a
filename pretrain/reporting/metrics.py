"""What a run reports while it goes on: metrics.jsonl, its writers and the console."""

import os
import resource
import time
from dataclasses import asdict
from pathlib import Path

import torch

from sambalm.model.flops import flops_per_token, peak_flops
from sambalm.parallel.groups import World
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import dump_config
from sambalm.pretrain.errors import ExitCode, print_warning
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.reporting.appended_file import AppendedFile
from sambalm.pretrain.reporting.console import RunConsole
from sambalm.pretrain.reporting.metrics_file import METRICS, metrics_line, records
from sambalm.pretrain.reporting.writers import WriterTarget, check_writers, start_writers
from sambalm.pretrain.training import Training


class RunReport(Hook):
    """Everything that the main rank writes while a run goes on; silent on the other ranks.

    metrics.jsonl and the writers get one record a step; a terminal gets a progress bar, a log file a line every few
    seconds. What an earlier attempt logged after the step that this one starts from is dropped.

    Raises:
        ConfigError: a writer is not installed.
    """

    def __init__(self, config: RunConfig, *, world: World, done_steps: int) -> None:
        check_writers(config.reporting.writers)
        self._config, self._run_dir, self._main = config, Path(config.run.dir), world.is_main
        peak = peak_flops(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self._peak_flops, self._schedule = peak and world.size * peak, config.schedule
        self._done_steps, self._save_start_s = done_steps, 0.0

    def on_start(self, training: Training) -> None:
        if self._main:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _write_config(self._config, self._run_dir / "config.yaml")
            _drop_after(self._run_dir, self._done_steps)
            self._file = AppendedFile(self._run_dir / METRICS)
            target = WriterTarget(self._run_dir, self._config.model_dump(), self._done_steps)
            self._writers = start_writers(self._config.reporting.writers, target)
            self._console = RunConsole(self._run_dir, steps=self._config.train.steps, done_steps=self._done_steps)
            self._console.start()

    def on_end(self, exit_code: ExitCode | None) -> None:
        if self._main:
            for writer in self._writers:
                writer.close()
            self._file.close()
            self._console.end(exit_code)

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
        phase = self._schedule.at(self._schedule.samples(step.result.tokens - step.result.batch_tokens))
        if self._schedule.is_phased:
            record["phase"] = phase.number + 1
        if self._peak_flops:
            flops = flops_per_token(self._config.model, sequence_length=phase.length).total
            record["mfu"] = tokens_per_second * flops / self._peak_flops
        self._file.append(metrics_line(record).encode())
        values = {name: value for name, value in record.items() if name != "step"}
        for writer in self._writers:
            writer.write(values, step=step.number)
        self._console.step(record)

    def before_save(self, step: int) -> None:
        self._save_start_s = time.monotonic()

    def after_save(self, checkpoint: Path) -> None:
        if self._main:
            self._console.saved(checkpoint, seconds=time.monotonic() - self._save_start_s)


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
