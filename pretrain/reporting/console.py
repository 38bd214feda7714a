"""What a run says of itself on the console: what starts, how it goes on, and where things are at its end."""

import math
import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from sambalm.model.parameters import count_parameters
from sambalm.parallel.config import layout_name
from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.initial_weights import described
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.optimizer import OptimizerConfig
from sambalm.pretrain.reporting.durations import duration
from sambalm.pretrain.reporting.metrics_file import LOSS_AT, NAMED_LOSS_AT, last_scores
from sambalm.pretrain.run_phases import phase_line
from sambalm.pretrain.training import Training

PLAIN_LINE_EVERY_S = 10.0
_GIB = 2**30
# What shapes the learning rate's curve, besides train.steps.
_CURVE = ("peak_lr", "final_lr_ratio", "schedule", "warmup_fraction", "decay_fraction")


def start_lines(
    config: RunConfig,
    *,
    world: World,
    training: Training,
    checkpoint: Checkpoint | None,
    started_from: Mapping[str, Any] | None = None,
) -> list[str]:
    """What starts: layout and kernels, then precision, size, memory and the checkpoint, phase, a changed learning rate.

    Args:
        started_from: the given weights that the run began with, as `InitialWeights.record` has them.
    """
    step = checkpoint.step if checkpoint else 0
    layout = layout_name(config.parallel, world_size=world.size)
    products = f", products in {config.train.matmul_precision}" if config.train.matmul_precision else ""
    origin = f"goes on from {checkpoint.path}" if checkpoint else "a new run"
    begin = "started" if checkpoint else "starts"
    origin += f", which {begin} from {described(started_from)}" if started_from else ""
    lines = [
        f"{world.size} x {world.device.type}, {layout}, from step {step}; {' '.join(training.kernels.names)}",
        f"{config.train.precision}{products}, {_millions(count_parameters(config.model)['total'])} parameters, "
        f"{_memory(world.device)}; {origin}",
    ]
    if (schedule := config.schedule).is_phased:
        lines.append(phase_line(schedule, schedule.at(checkpoint.state["samples"] if checkpoint else 0)))
    changed = changed_learning_rate(checkpoint.state["config"], config, done_steps=step) if checkpoint else None
    return [*lines, changed] if changed else lines


def changed_learning_rate(saved: Mapping[str, Any], config: RunConfig, *, done_steps: int) -> str | None:
    """A sentence where the steps to come have other learning rates than they would have had, and why.

    Phases have their own line where they begin, and their curves are not compared.

    Args:
        saved: a checkpoint's configuration.
    """
    try:
        if config.data.phases is not None or saved["data"].get("phases") is not None:
            return None
        before, steps_before = OptimizerConfig.model_validate(saved["optimizer"]), int(saved["train"]["steps"])
    except (KeyError, TypeError, ValueError):  # of a version that this one does not know
        return None
    after, steps = config.optimizer, config.train.steps
    causes = [
        f"optimizer.{key} {getattr(before, key)} -> {getattr(after, key)}"
        for key in _CURVE
        if getattr(before, key) != getattr(after, key)
    ]
    causes += [f"train.steps {steps_before} -> {steps}"] if steps != steps_before else []
    for step in range(done_steps + 1, steps + 1) if causes else ():
        was = before.learning_rate(min(step, steps_before), steps=steps_before)  # at its end it would have stayed
        now = after.learning_rate(step, steps=steps)
        if not math.isclose(was, now, rel_tol=1e-9):
            why = ", ".join(causes)
            return f"the learning rate takes another curve: {now:.3g} at step {step}, not {was:.3g} ({why})"
    return None


class RunConsole:
    """A progress bar on a terminal and a line every few seconds elsewhere; a line for validations, scores and saves."""

    def __init__(self, run_dir: Path, *, steps: int, done_steps: int) -> None:
        self._run_dir, self._steps, self._step = run_dir, steps, done_steps
        self._console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(),
            # In 80 columns rich would cut the step and the time to come, which matter more than the bar.
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1, no_wrap=True)),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(table_column=Column(min_width=7, no_wrap=True)),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=done_steps, shown="")
        self._start_s, self._last_line_s = time.monotonic(), float("-inf")
        self._first: tuple[int, float] | None = None  # step of this attempt, and when it ended
        self._newest: Path | None = None
        self.start = self._progress.start

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows a step's record."""
        now_s, self._step = time.monotonic(), record["step"]
        shown = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.3g}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=self._step, shown=shown)
        is_due = now_s - self._last_line_s > PLAIN_LINE_EVERY_S or self._step == self._steps
        if is_due and not self._console.is_terminal:
            self._last_line_s = now_s
            self._say(f"step {self._step}/{self._steps}  {shown}{self._left(now_s)}")
        if losses := {name.removeprefix(LOSS_AT): v for name, v in record.items() if name.startswith(LOSS_AT)}:
            held_out = ", ".join(f"{loss:.4f} at {length} tokens" for length, loss in losses.items())
            self._say(f"step {self._step}: held-out loss {held_out}")
        named: dict[str, list[str]] = {}
        for name, value in record.items():
            if name.startswith(NAMED_LOSS_AT):
                length, _, source = name.removeprefix(NAMED_LOSS_AT).partition("/")
                named.setdefault(source, []).append(f"{value:.4f} at {length} tokens")
        for source, shown_losses in named.items():
            self._say(f"step {self._step}: loss on {source} {', '.join(shown_losses)}")
        scored: dict[str, list[str]] = {}
        for name, value in last_scores([record])[1].items():
            task, _, score = name.partition("/")
            scored.setdefault(task, []).append(f"{score} {value:.4g}")
        for task, shown_scores in scored.items():
            self._say(f"step {self._step}: {task} {', '.join(shown_scores)}")

    def saved(self, checkpoint: Path, *, seconds: float) -> None:
        """Tells of a checkpoint."""
        self._newest = checkpoint
        self._say(f"saved {checkpoint} in {seconds:.1f} s")

    def end(self, exit_code: ExitCode | None) -> None:
        """Says how the run ends and where things are."""
        self._progress.stop()
        took = duration(time.monotonic() - self._start_s)
        newest = f"newest checkpoint {self._newest}" if self._newest else "no new checkpoint"
        where = f"{newest}, metrics {self._run_dir / 'metrics.jsonl'}"
        if exit_code == ExitCode.FINISHED:
            how = f"finished at step {self._step} after {took}"
            where += f"; `sambalm report {self._run_dir}` shows the run"
            if not self._newest:  # it had finished before
                where += ", and more train.steps go on with it"
        elif exit_code is None:
            how = f"stopped after step {self._step} of {self._steps}"
        else:
            how = f"left after step {self._step} of {self._steps}"
            where += f"; `sambalm status {self._run_dir}` shows the run, and the same command goes on with it"
        self._say(f"{how}: {where}")

    def _left(self, now_s: float) -> str:
        """The time to the last step at the pace of this attempt so far, validations and saves included."""
        if self._first is None:
            self._first = self._step, now_s
        first_step, first_s = self._first
        if self._step == first_step or self._step == self._steps:
            return ""
        return f"  {duration((self._steps - self._step) * (now_s - first_s) / (self._step - first_step))} left"

    def _say(self, line: str) -> None:
        with suppress(OSError):  # a log on a full disk
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _memory(device: torch.device) -> str:
    """What is in use once all is loaded."""
    if device.type == "cuda":
        used, whole = torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        return f"{used / _GIB:.1f} of {whole / _GIB:.1f} GiB on each GPU"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{used / _GIB:.1f} of the host's {whole / _GIB:.1f} GiB in each process"
