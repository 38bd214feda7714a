"""`sambalm slurm status`: how a run is doing, from its folder and, where there is one, from Slurm."""

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import ATTEMPT, AttemptRecord, read_attempts
from sambalm.pretrain.lifecycle.lease import LEASE
from sambalm.pretrain.reporting.metrics_file import read_metrics
from sambalm.slurm.errors import SlurmError

RECENT_STEPS = 100
ALIVE_S = 60.0  # a lease whose holder lives is younger
_NEEDED = {"tokens", "step_time_s", "tokens_per_second"}  # a record without them is damaged
_ERROR_LINE = re.compile(r"error|exception|killed|SIG[A-Z]+|fault", re.IGNORECASE)
_LOG_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    state: str
    attempts: int
    step: int
    steps: int
    tokens: int
    tokens_per_s: float | None
    left_s: float | None  # of training, at the speed of the recent steps
    training_share: float | None  # of the time since the first attempt, spent in steps that count
    last_error: str | None


def run_status(run_dir: Path) -> Status:
    """Raises SlurmError for a folder without an attempt."""
    attempts = read_attempts(run_dir)
    if not attempts:
        raise SlurmError(f"{run_dir} is not a run that has started: it holds no attempts/*/{ATTEMPT}")
    records = [record for record in read_metrics(run_dir) if record.keys() >= _NEEDED]
    last = records[-1] if records else {"step": 0, "tokens": 0}
    steps = _steps(attempts[-1])
    recent_s = median(record["step_time_s"] for record in records[-RECENT_STEPS:]) if records else None
    now_s = _end_s(attempts[-1])
    trained_s = sum(record["step_time_s"] for record in records)
    return Status(
        state=_state(attempts[-1], run_dir),
        attempts=len(attempts),
        step=last["step"],
        steps=steps,
        tokens=last["tokens"],
        tokens_per_s=median(record["tokens_per_second"] for record in records[-RECENT_STEPS:]) if records else None,
        left_s=(steps - last["step"]) * recent_s if recent_s else None,
        training_share=trained_s / (now_s - attempts[0].started_s) if records else None,
        last_error=next(filter(None, map(_error, reversed(attempts))), None),
    )


def show_status(run_dir: Path) -> str:
    status = run_status(run_dir)
    lines = {
        "state": status.state,
        "attempts": f"{status.attempts:,}",
        "step": f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.1%})",
        "tokens": f"{status.tokens:,}",
        "speed": f"{status.tokens_per_s:,.0f} tokens/s" if status.tokens_per_s else "no step yet",
        "left": _duration(status.left_s) if status.left_s is not None else "no step yet",
        "time in training": f"{status.training_share:.1%}" if status.training_share is not None else "no step yet",
        "last error": status.last_error or "none",
    }
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


def _state(attempt: AttemptRecord, run_dir: Path) -> str:
    job = attempt.slurm_job
    queued = _queue_state(job) if job else ""
    in_slurm = f", Slurm job {job} {queued}" if queued else ""
    if attempt.exit_code == ExitCode.FINISHED:
        return "finished"
    if attempt.exit_code is None:
        return ("training" if _lease_age_s(run_dir) < ALIVE_S else "gone without a word") + in_slurm
    known = attempt.exit_code in set(ExitCode)
    name = ExitCode(attempt.exit_code).name if known else f"exit code {attempt.exit_code}"
    return f"{name.lower().replace('_', ' ')} ({attempt.reason}){in_slurm}"


def _steps(attempt: AttemptRecord) -> int:
    """
    Raises:
        SlurmError: the attempt's config is damaged.
    """
    path = attempt.path / "config.yaml"
    try:
        steps = yaml.safe_load(path.read_text())["train"]["steps"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        steps = None
    if not isinstance(steps, int) or steps <= 0:
        raise SlurmError(f"{path} does not say how many steps the run takes: it is damaged")
    return steps


def _end_s(attempt: AttemptRecord) -> float:
    """Until when the run's time counts: now while it is to go on."""
    if attempt.ended_s is None or attempt.exit_code == ExitCode.REQUEUE:
        return time.time()
    return attempt.ended_s


def _lease_age_s(run_dir: Path) -> float:
    lease = run_dir / LEASE
    return time.time() - lease.stat().st_mtime if lease.exists() else float("inf")


def _queue_state(job: str) -> str:
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _error(attempt: AttemptRecord) -> str | None:
    """What went wrong in an attempt, by its outcome or the last telling line of its logs."""
    if attempt.exit_code in (ExitCode.FINISHED, ExitCode.REQUEUE, ExitCode.STOPPED):
        return None
    if attempt.exit_code is not None:
        return f"{attempt.path.name}: {attempt.reason}"
    for log in sorted(attempt.path.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if _ERROR_LINE.search(line)]
        if telling:
            return f"{attempt.path.name}, {log.name}: {telling[-1].strip()}"
    return None


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    days, hours = divmod(minutes // 60, 24)
    shown: list[Any] = [f"{days} d"] if days else []
    return " ".join([*shown, f"{hours} h", f"{minutes % 60} min"])
