"""Compares, every so many steps, the weights that several ranks hold (`parallel/replicas.py`)."""

from collections.abc import Mapping
from typing import Any

from sambalm.parallel.groups import World
from sambalm.parallel.replicas import Comparison, Replicas
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ReplicasDifferError, print_line
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook, is_due
from sambalm.pretrain.lifecycle.rollback import Rollbacks
from sambalm.pretrain.training import Training

SHOWN = 3  # tensors that a message names; the log has them all


class ReplicaCheck(Hook):
    """Ends a run, or takes it back, once ranks hold different bits of the same weights.

    The weights are compared as a step's forwards and backwards have read them, before the optimizer changes them: under
    ZeRO-1 and ZeRO-2 each step then brings all copies anew from one rank's. The answer comes with the step's results,
    so that the host waits only once there is a difference. Checked are steps that are due for a checkpoint, so
    that what differs is not saved; the step after every n-th, which vouches for a checkpoint of the n-th; the first.

    Args:
        rollbacks: takes the run back where `checks.on_difference` says so.
    """

    name = "replicas"

    def __init__(self, config: RunConfig, *, world: World, rollbacks: Rollbacks) -> None:
        self.config, self.world, self.rollbacks = config, world, rollbacks
        self.every_steps = config.checks.replicas_every_steps
        self.equal_after = 0  # the newest step whose weights were found equal
        self.replicas: Replicas | None = None
        self.is_first, self.due = True, 0  # whether the attempt has no step yet, and the step to check or 0
        self.comparisons: dict[int, Comparison] = {}  # by step

    def on_start(self, training: Training) -> None:
        if self.every_steps is None or self.world.size == 1:
            return
        replicas = Replicas(training.chunks, world=self.world)
        if replicas.any:
            self.replicas = replicas
            training.executor.guard.before_update.append(self._compare)

    def state(self) -> dict[str, Any]:
        return {"equal_after": self.equal_after}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.equal_after = state["equal_after"]

    def before_step(self, number: int) -> None:
        if self.every_steps is None:
            return
        is_saved = is_due(number, every_steps=self.config.checkpoint.every_steps, last_step=self.config.train.steps)
        checks = self.is_first or is_saved or (number - 1) % self.every_steps == 0
        self.is_first, self.due = False, number if checks else 0

    def after_step(self, step: FinishedStep) -> None:
        """
        Raises:
            RollBack, ReplicasDifferError: ranks differ.
        """
        comparison = self.comparisons.pop(step.number, None)
        if comparison is None or self.replicas is None:
            return
        if not int(comparison.differs):
            self.equal_after = step.number - 1
            return
        differences = [str(difference) for difference in self.replicas.differences(comparison)]
        if self.world.is_main:
            print_line("\n".join(f"step {step.number}: {text}" for text in differences))
        more = f" (and {len(differences) - SHOWN} other tensors)" if len(differences) > SHOWN else ""
        failure = ReplicasDifferError(
            f"at step {step.number} {'; '.join(differences[:SHOWN])}{more}; they were last found "
            f"equal after step {self.equal_after}: look at the memory and links of those ranks' devices"
        )
        if self.config.checks.on_difference == "stop":
            raise failure
        self.rollbacks.roll_back(failure, newest_step=self.equal_after)

    def _compare(self) -> None:
        if self.due and self.replicas is not None:
            self.comparisons[self.due] = self.replicas.compare()
