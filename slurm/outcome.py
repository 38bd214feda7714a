"""What a job does after an attempt: `python -m sambalm.slurm.outcome ATTEMPT_DIR` prints it for slurm/common.sh.

The line is `finish`, `requeue`, `retry` or `end`, then the attempt's exit code and its reason. An attempt that recorded
no outcome crashed or was killed: `retry` stands alone.
"""

import sys
from pathlib import Path

from sambalm.pretrain.errors import EXIT_CODES, ExitCode, Launchers
from sambalm.pretrain.lifecycle.attempts import newest_restart, read_outcome


def describe_outcome(attempt: Path) -> str:
    """The line for an attempt's folder. A code that the table of exit codes lacks ends the job."""
    outcome = read_outcome(newest_restart(attempt))
    if not outcome:
        return Launchers.RETRY.name.lower()
    code = outcome["exit_code"]
    known = code in set(ExitCode)
    launchers = EXIT_CODES[ExitCode(code)].launchers if known else Launchers.END
    return f"{launchers.name.lower()} {code} {' '.join(outcome['reason'].split())}"


if __name__ == "__main__":
    print(describe_outcome(Path(sys.argv[1])))
