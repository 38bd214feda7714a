"""`sambalm slurm status`: the status of a run, with what Slurm says of its jobs."""

import subprocess
from dataclasses import replace
from pathlib import Path

from sambalm.pretrain.errors import NoRunError
from sambalm.pretrain.lifecycle.attempts import OUTCOME, read_attempts, read_outcome
from sambalm.pretrain.reporting.status import RunStatus, State, read_status
from sambalm.slurm.submission import Submission, read_submission


def slurm_status(run_dir: Path) -> RunStatus:
    """The status of a run, whose reason also tells the states of its jobs where Slurm knows them.

    Raises:
        NoRunError: a folder without an attempt, for which `sambalm slurm submit` has submitted nothing either.
        RunFolderError: the last attempt's config is damaged.
    """
    submission = read_submission(run_dir)
    try:
        status = read_status(run_dir)
    except NoRunError:
        if not submission:
            raise
        status = _not_started(run_dir, submission)
    last = [attempt.slurm_job for attempt in read_attempts(run_dir)[-1:]]
    jobs = dict.fromkeys(job for job in [*last, *(submission.jobs if submission else [])] if job)
    if not jobs or status.state is State.FINISHED or not (states := _job_states([*jobs])):
        return status
    return replace(status, reason="; ".join(filter(None, [status.reason, states])))


def _not_started(run_dir: Path, submission: Submission) -> RunStatus:
    return RunStatus(
        run_dir=str(run_dir),
        state=State.SUBMITTED,
        reason=None,
        step=0,
        steps=submission.steps,
        tokens=0,
        tokens_per_s=None,
        left_s=None,
        loss=None,
        grad_norm=None,
        lr=None,
        held_out_losses={},
        training_share=None,
        wall_s=None,
        seconds=None,
        attempts=[],
        last_error=_refusal(run_dir),
    )


def _refusal(run_dir: Path) -> str | None:
    """What ended the newest attempt that a rank refused before it was recorded, and where its logs are."""
    outcomes = sorted((run_dir / "attempts").glob(f"*/{OUTCOME}"), key=lambda path: path.stat().st_mtime)
    outcome = read_outcome(outcomes[-1].parent) if outcomes else None
    return f"{outcome['reason']}: see {outcomes[-1].parent}" if outcome else None


def _job_states(jobs: list[str]) -> str:
    """What Slurm says of jobs, those that ended minutes ago too, with its reason where one does not run."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--sort=i", "--format=%i %T %r"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    states = []
    for job, state, reason in (line.split(maxsplit=2) for line in lines):
        states.append(f"Slurm job {job} {state}" + (f", {reason}" if reason != "None" else ""))
    return "; ".join(states)
