"""Guards against steps that would harm a run: losses or gradients that are not finite, or far beyond the usual.

The device decides whether the optimizer skips a step (`parallel/zero/step_guard.py`). This hook sets the limits that it
compares with, counts what was skipped, and ends or rolls back a run that skips too many.
"""

import math
import statistics
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from sambalm.parallel.groups import World
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.engine import optimizer_is_finite, whole_moment, whole_parameter
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.step_guard import NO_LIMIT
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import DivergedError, print_line
from sambalm.pretrain.launched_step import StepResult
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.ledger import Ledger
from sambalm.pretrain.lifecycle.rollback import Rollbacks
from sambalm.pretrain.training import Training

# A limit counts steps up to this many before the one that it is for: results are read a step late where the device
# works beside its host, and a limit must not depend on that.
LAG = 2
LOSS_DEVIATIONS = 10  # a loss must also be so many robust standard deviations beyond the median
DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class GoodStep(NamedTuple):
    """What the statistics keep of a step that was taken."""

    number: int
    loss: float
    norm: float


class Limits(NamedTuple):
    """What a step may have at most."""

    loss: float = NO_LIMIT
    norm: float = NO_LIMIT


class Guards(Hook):
    """Sets limits of loss and gradient norm for each step, and counts skipped steps, on each rank alike.

    Limits come from a window over the last steps that were taken, so that no skipped step moves them; there are none
    before the window is full. It begins anew with each phase of the data, whose losses and norms are others.

    Args:
        rollbacks: takes the run back where too many steps were skipped.
        ledger: counts the time of such a step as skipped.
    """

    name = "guards"

    def __init__(self, config: RunConfig, *, world: World, rollbacks: Rollbacks, ledger: Ledger) -> None:
        self.config, self.world, self.rollbacks, self.ledger = config, world, rollbacks, ledger
        self.schedule = config.schedule
        self.window: list[GoodStep] = []
        self.in_a_row = self.skipped = 0
        self.recent: dict[int, range] = {}  # the last skipped steps, as many as a budget counts, and their samples
        self.before: range | None = None  # the samples of the last step that was taken
        self.limits: dict[int, Limits] = {}  # by step; of those whose results are not known yet

    def on_start(self, training: Training) -> None:
        self.training = training

    def state(self) -> dict[str, Any]:
        return {
            "window": [list(step) for step in self.window],
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "recent": [[step, samples.start, samples.stop] for step, samples in self.recent.items()],
            "before": [self.before.start, self.before.stop] if self.before else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.window = [GoodStep(*step) for step in state["window"]]
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]
        self.recent = {step: range(start, stop) for step, start, stop in state["recent"]}
        self.before = range(*state["before"]) if state["before"] else None

    def before_step(self, number: int) -> None:
        limits = self.limits[number] = self._limits(number)
        self.training.executor.guard.set_limits(loss=limits.loss, norm=limits.norm)

    def after_step(self, step: FinishedStep) -> None:
        """
        Raises:
            RollBack, DivergedError: too many steps were skipped.
        """
        samples, limits = self._samples(step.result), self.limits.pop(step.number)
        if self.before and self.before.start < self.schedule.at(samples.start).first_sample:
            self.window.clear()  # after samples that were left out, up to the phase's end
        counted = max(self.config.checks.window_steps, self.config.train.max_skipped_steps + 1)
        self.recent = {number: other for number, other in self.recent.items() if number > step.number - counted}
        if not step.result.skipped:
            self.in_a_row, self.before = 0, samples
            self.window.append(GoodStep(step.number, step.result.loss, step.result.grad_norm))
            del self.window[: -self.config.checks.window_steps - LAG + 1]
            if self.schedule.at(samples.stop) is not self.schedule.at(samples.start):  # before a limit of the next one
                self.window.clear()
            return
        self.in_a_row += 1
        self.skipped += 1
        self.ledger.skip()
        self.recent[step.number] = samples
        if self.world.is_main:
            print_line(
                f"step {step.number}: {_reason(step.result, limits)}, so the optimizer skipped it "
                f"(samples {samples.start} to {samples.stop - 1}; {self.in_a_row} in a row, {self.skipped} in all)"
            )
        self._check_budget(step.number)

    def unfit_to_save(self, *, ends: bool) -> str | None:
        """Says why the state after the step at hand is not to be saved; None where it is. Collective; waits.

        While steps are being skipped nothing is saved, since the weights may be why; but when the attempt ends, what
        the last step that was taken left is saved all the same, and marked (`Checkpoint.saved_while_skipping`).

        Args:
            ends: whether the attempt ends with the step.

        Raises:
            RollBack, DivergedError: weights or moments are not finite, which no later step mends.
        """
        if self.in_a_row and not ends:
            return f"the last {self.in_a_row} steps were skipped" if self.in_a_row > 1 else "the last step was skipped"
        if not int(self.world.largest([not optimizer_is_finite(self.training.engine)])[0]):
            return None
        first, *others = self._not_finite()
        more = f", nor {'are' if others[1:] else 'is'} {len(others)} of the others" if others else ""
        failure = DivergedError(
            f"{first} is not finite{more}, so the state was not saved: go on from an earlier checkpoint, and with a "
            "lower optimizer.peak_lr if it happens again"
        )
        self.rollbacks.roll_back(failure, newest_step=sys.maxsize)

    def _samples(self, result: StepResult) -> range:
        """The numbers of a step's samples."""
        ends = (result.tokens - result.batch_tokens, result.tokens)
        return range(*(self.schedule.samples(tokens) for tokens in ends))

    def _limits(self, number: int) -> Limits:
        checks = self.config.checks
        known = [step for step in self.window if step.number <= number - LAG][-checks.window_steps :]
        if len(known) < checks.window_steps:
            return Limits()
        losses, norms = [step.loss for step in known], [step.norm for step in known]
        median = statistics.median(losses)
        deviation = DEVIATION * statistics.median(abs(loss - median) for loss in losses)
        loss = norm = NO_LIMIT
        if checks.loss_spike_nats is not None:
            loss = median + max(checks.loss_spike_nats, LOSS_DEVIATIONS * deviation)
        if checks.norm_spike_factor is not None:
            norm = max(checks.norm_spike_factor * statistics.median(norms), self.config.optimizer.clip_norm)
        return Limits(loss=loss, norm=norm)

    def _check_budget(self, number: int) -> None:
        """
        Raises:
            RollBack, DivergedError: with the step, too many were skipped.
        """
        train, checks = self.config.train, self.config.checks
        skipped = {step: samples for step, samples in self.recent.items() if step > number - checks.window_steps}
        if self.in_a_row > train.max_skipped_steps:
            first = number - self.in_a_row + 1
            text = f"steps {first} to {number} were skipped, more than train.max_skipped_steps "
            text += f"{train.max_skipped_steps} in a row"
            skipped = {step: samples for step, samples in self.recent.items() if step >= first}
        elif len(skipped) > train.max_skipped_in_window:
            text = f"{len(skipped)} of the {checks.window_steps} steps up to {number} were skipped, more than "
            text += f"train.max_skipped_in_window {train.max_skipped_in_window}"
        else:
            return
        failure = DivergedError(
            f"{text}: go on from an earlier checkpoint with a lower optimizer.peak_lr, or with other data"
        )
        # The step before the first of them was taken, and may have led to them.
        suspects = [self.before] if self.before and self.in_a_row == len(skipped) else []
        left_out = [*suspects, *skipped.values()]
        self.rollbacks.roll_back(failure, newest_step=min(skipped) - 2, left_out=left_out)

    def _not_finite(self) -> list[str]:
        """Returns canonical names of weights and moments, the same on every rank. Collective."""
        found: list[str] = []
        for chunk in self.training.chunks:
            for name, parameter, piece in canonical_slices(chunk):
                wholes = {name: whole_parameter(parameter)}
                wholes |= {f"{key} of {name}": whole_moment(parameter, key) for key in info_of(parameter).moments}
                found += [key for key, whole in wholes.items() if not bool(piece.of_local(whole).isfinite().all())]
        return sorted({name for of_rank in self.world.all_gather_object(found) for name in of_rank})


def _reason(result: StepResult, limits: Limits) -> str:
    """Says what of a step's results made the device skip it."""
    if not math.isfinite(result.grad_norm):
        return f"the gradient's norm is {result.grad_norm}"
    if not math.isfinite(result.loss):
        return f"the loss is {result.loss}"
    if result.grad_norm / limits.norm >= result.loss / limits.loss:
        return f"the gradient's norm is {result.grad_norm:.4g}, beyond the limit of {limits.norm:.4g}"
    return f"the loss is {result.loss:.4g}, beyond the limit of {limits.loss:.4g}"
