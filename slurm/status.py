"""`sambalm slurm status`: the status of a run, with what Slurm says of its job."""

import subprocess
from dataclasses import replace
from pathlib import Path

from sambalm.pretrain.lifecycle.attempts import read_attempts
from sambalm.pretrain.reporting.status import RunStatus, State, read_status


def slurm_status(run_dir: Path) -> RunStatus:
    """The status of a run, whose reason also tells the state of its job where Slurm knows it.

    Raises:
        NoRunError: a folder without an attempt.
        RunFolderError: the last attempt's config is damaged.
    """
    status = read_status(run_dir)
    job = read_attempts(run_dir)[-1].slurm_job
    if not job or status.state is State.FINISHED or not (queued := _queue_state(job)):
        return status
    return replace(status, reason="; ".join(filter(None, [status.reason, f"Slurm job {job} {queued}"])))


def _queue_state(job: str) -> str:
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
