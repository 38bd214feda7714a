"""Steps that the optimizer skips because their gradients are not finite (`parallel/zero/clipping.py`)."""

import math
import sys

from sambalm.pretrain.errors import DivergedError


class SkippedSteps:
    """Counts them, on each rank alike.

    Args:
        limit: how many may follow each other.
        speaks: whether this rank tells the user.
    """

    def __init__(self, limit: int, *, speaks: bool) -> None:
        self.limit, self.speaks, self.in_a_row = limit, speaks, 0

    def step(self, number: int, grad_norm: float) -> None:
        """
        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.speaks:
            print(f"step {number}: the gradient's norm is {grad_norm}, so the optimizer skipped it", file=sys.stderr)
        if self.in_a_row > self.limit:
            raise DivergedError(
                f"gradients were not finite from step {number - self.limit} to {number}, more than "
                f"train.max_skipped_steps {self.limit}: go on from an earlier checkpoint with a lower "
                "optimizer.peak_lr, or with other data"
            )
