"""What the main rank of an attempt is at, as its folder tells other processes. Needs no torch.

The lease says that a process lives; `mark.json` says when its main loop last came from one phase to another.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sambalm.pretrain.lifecycle.phases import Mark, Phase

MARK = "mark.json"
PATIENCE_S, PATIENCE_STEPS = 60.0, 10  # in a step or a fetch that takes longer, a run no longer seems to train
_NAMES = {
    Phase.START_UP: "starting",
    Phase.VALIDATION: "validating",
    Phase.SAVE: "saving",
    Phase.LEAVE: "leaving",
}


@dataclass(frozen=True)
class Activity:
    """What the main rank was at when it last wrote."""

    phase: Phase
    step: int
    since_s: float  # since the epoch
    limit_s: float | None  # of the watchdog
    written_s: float

    def hangs(self, *, step_s: float | None, now_s: float | None = None) -> bool:
        """Whether it has been there for so long that it no longer seems to train.

        Args:
            step_s: what a step usually takes.
        """
        longest_s = float("inf") if self.limit_s is None else self.limit_s
        if self.phase in (Phase.STEP, Phase.FETCH):
            longest_s = min(longest_s, max(PATIENCE_S, PATIENCE_STEPS * (step_s or 0)))
        return (time.time() if now_s is None else now_s) - self.since_s > longest_s

    def describe(self, *, step_s: float | None) -> str:
        """What `sambalm slurm status` says of it: "training", or "hanging since" when and in what."""
        if self.hangs(step_s=step_s):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
            return f"hanging since {since} (phase {self.phase}, step {self.step})"
        return _NAMES.get(self.phase, "training")


def write_activity(attempt: Path, mark: Mark, *, limit_s: float | None) -> None:
    """Writes what the main rank is at."""
    values = {"phase": mark.phase, "step": mark.step, "since_s": mark.since_s, "limit_s": limit_s}
    draft = attempt / f".{MARK}"
    draft.write_text(json.dumps(values | {"written_s": time.time()}))
    os.replace(draft, attempt / MARK)


def read_activity(attempt: Path) -> Activity | None:
    """What the main rank was at; None before it has said so, and where the file is damaged."""
    try:
        values = json.loads((attempt / MARK).read_text())
        return Activity(**values | {"phase": Phase(values["phase"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
