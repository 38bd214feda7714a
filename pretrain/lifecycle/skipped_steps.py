"""Steps that the optimizer skips because their gradients are not finite (`parallel/zero/clipping.py`)."""

import math
import sys

from sambalm.pretrain.errors import DivergedError
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.ledger import Ledger


class SkippedSteps(Hook):
    """Counts skipped steps, on each rank alike, and ends a run that skips too many.

    Args:
        limit: how many may follow each other.
        speaks: whether this rank tells the user.
        ledger: counts the time of such a step as skipped.
    """

    def __init__(self, limit: int, *, speaks: bool, ledger: Ledger) -> None:
        self.limit, self.speaks, self.ledger, self.in_a_row = limit, speaks, ledger, 0

    def after_step(self, step: FinishedStep) -> None:
        """
        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        norm = step.result.grad_norm
        if math.isfinite(norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.ledger.skip()
        if self.speaks:
            print(f"step {step.number}: the gradient's norm is {norm}, so the optimizer skipped it", file=sys.stderr)
        if self.in_a_row > self.limit:
            raise DivergedError(
                f"gradients were not finite from step {step.number - self.limit} to {step.number}, more than "
                f"train.max_skipped_steps {self.limit}: go on from an earlier checkpoint with a lower "
                "optimizer.peak_lr, or with other data"
            )
