"""What `sambalm slurm submit` leaves in a run's folder, so that the run can be told of before its first attempt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUBMISSION = "submitted.json"


@dataclass(frozen=True)
class Submission:
    """The training jobs that were last submitted for a run, in their order, and the steps that it is to take."""

    jobs: Sequence[str]
    steps: int


def write_submission(run_dir: Path, submission: Submission) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".{SUBMISSION}"
    temporary.write_text(json.dumps({"jobs": [*submission.jobs], "steps": submission.steps}) + "\n")
    temporary.replace(run_dir / SUBMISSION)


def read_submission(run_dir: Path) -> Submission | None:
    """The last submission; None where there was none, and where its record is damaged."""
    try:
        values = json.loads((run_dir / SUBMISSION).read_text())
        return Submission(jobs=[str(job) for job in values["jobs"]], steps=int(values["steps"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
