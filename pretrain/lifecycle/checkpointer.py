"""When a run saves: every so many steps, after the last one, and when it is asked to; and what becomes of each save.

A save goes on while the run trains (`checkpointing/write.py`). Its outcome is taken at a step's end, the same on every
rank: each rank says with every step whether its thread is through, and the slowest one counts.
"""

import time
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.write import CheckpointWriter, SavedCheckpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ExitCode, NotSavedError, RunInUseError, SaveBrokenError, print_warning
from sambalm.pretrain.lifecycle.guards import Guards
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook, is_due
from sambalm.pretrain.lifecycle.phases import Marks, Phase
from sambalm.pretrain.lifecycle.run_folder import RunFolder
from sambalm.pretrain.lifecycle.signals import Request
from sambalm.pretrain.training import Training

DRAIN_AFTER_ERROR_S = 60.0
# Of a record in metrics.jsonl, of the step at whose end a save's outcome was taken.
SAVED_STEP, SAVED_BYTES = "checkpoint_step", "checkpoint_bytes"
SAVE_S, SAVE_STALL_S = "checkpoint_s", "checkpoint_stall_s"  # to the commit; what of it training waited for
FAILED_SAVES, SKIPPED_SAVES = "checkpoint_failures", "checkpoint_skips"  # of this attempt so far


class SaveState(IntEnum):
    """What a rank says of its save under way; the highest of all ranks counts."""

    DONE = 0  # or none has begun
    UNDER_WAY = 1
    BROKEN = 2  # ranks lost each other, so they cannot agree on an outcome


class Checkpointer(Hook):
    """Saves the run, tells the other hooks of it, and ends a run whose saves fail again and again.

    Args:
        data: what `data_record` says of the run's data.
        folder: the run's, as every rank knows it.
        guards: say whether a state may be saved.
        marks: those of this rank; the thread that writes is in the phase of a save, too.
        hooks: those of the run, which hear of each save in their order.
        started_from: what `InitialWeights.record` says; None for a run that drew its weights.
    """

    phase = Phase.SAVE

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        data: dict[str, Any],
        folder: RunFolder,
        guards: Guards,
        marks: Marks,
        hooks: Sequence[Hook],
        started_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.guards, self.hooks, self.is_main = config, guards, hooks, world.is_main
        self.writer = CheckpointWriter(
            config,
            world=world,
            data=data,
            started_from=started_from,
            token=folder.token,
            check_lease=folder.check_lease,
            marked=lambda: marks.during_beside(Phase.SAVE),
        )
        self.failed = self.failed_in_a_row = self.skipped = 0
        self.stall_s = 0.0
        self.is_owed = False  # whether a save was due and the state was not fit
        self.metrics: dict[str, float] = {}  # of the next record

    def on_start(self, training: Training) -> None:
        self.parts = training.chunks
        if self.config.checkpoint.every_steps < self.config.train.steps:
            self.writer.reserve(self.parts)

    def vote(self) -> int:
        if self.writer.is_broken:
            return SaveState.BROKEN
        return SaveState.DONE if self.writer.is_done else SaveState.UNDER_WAY

    def acts_on(self, step: int) -> bool:
        return self.is_owed or is_due(
            step, every_steps=self.config.checkpoint.every_steps, last_step=self.config.train.steps
        )

    def settle(self, step: FinishedStep) -> None:
        """Takes the outcome of a save that is over on all ranks, and adds it to the step's metrics.

        Raises:
            NotSavedError: on every rank, after too many saves that failed.
            SaveBrokenError, RunInUseError: on every rank.
        """
        if self.writer.under_way and step.votes[self] == SaveState.BROKEN:
            if self.writer.is_broken:
                self.writer.result()  # raises with the reason, which this rank knows
            raise SaveBrokenError("ranks lost each other while they wrote a checkpoint, so none was committed")
        if self.writer.under_way and step.votes[self] == SaveState.DONE:
            self._take_outcome()
        step.metrics.update(self.metrics)
        self.metrics = {}

    def after_step(self, step: FinishedStep) -> None:
        """Begins a save where it is due or asked for, or was and the state was not fit; waits where the run leaves.

        Raises:
            NotSavedError: on every rank, when the run leaves and could not be saved, or after too many failed saves.
            RunInUseError: on every rank.
            RollBack, DivergedError: see `Guards.unfit_to_save`.
        """
        if not (step.request or self.acts_on(step.number)):
            return
        leaves = step.number == self.config.train.steps or step.request > Request.SAVE
        if self.writer.under_way and not leaves and not step.request and self.config.checkpoint.when_busy == "skip":
            self.is_owed = False
            self.skipped += 1
            self.metrics[SKIPPED_SAVES] = self.skipped
            self._warn(f"no save after step {step.number}: the one before is still being written")
            return
        reason = self.guards.unfit_to_save(ends=leaves)
        self.is_owed = reason is not None
        if reason:
            self._warn(f"step {step.number} is not saved, since {reason}: the next one may be")
            return
        started_s = time.perf_counter()
        if self.writer.under_way:
            self._take_outcome(ends_run=not leaves)
        for hook in self.hooks:
            hook.before_save(step.number)
        samples = self.config.schedule.samples(step.result.tokens)
        states = {hook.name: hook.state() for hook in self.hooks if hook.name}
        self.writer.start(self.parts, step=step.number, samples=samples, hooks=states)
        self.stall_s = time.perf_counter() - started_s
        if leaves:
            self._tell(self.writer.result())

    def on_end(self, exit_code: ExitCode | None) -> None:
        """Lets a save under way end, also after an error: the state that it writes is good."""
        if self.writer.under_way:
            timeout_s = DRAIN_AFTER_ERROR_S if exit_code is None else None
            try:
                self.writer.result(timeout_s=timeout_s)
            except TimeoutError:
                self._warn(f"a save was still under way {timeout_s} s after the error that ends the run")
            except (NotSavedError, RunInUseError) as error:
                self._warn(str(error))
        self.writer.close()

    def _take_outcome(self, *, ends_run: bool = True) -> None:
        """Waits for the save under way and takes its outcome.

        Args:
            ends_run: whether one failure too many is an error; not where another save follows that may go well.
        """
        try:
            self._tell(self.writer.result())
        except SaveBrokenError:
            raise
        except NotSavedError as error:
            self.failed += 1
            self.failed_in_a_row += 1
            self.metrics[FAILED_SAVES] = self.failed
            limit = self.config.checkpoint.max_failed_saves
            if ends_run and self.failed_in_a_row >= limit:
                raise NotSavedError(f"{self.failed_in_a_row} saves in a row failed; the last one: {error}") from error
            self._warn(f"{error}; the run goes on to its next save")

    def _tell(self, saved: SavedCheckpoint) -> None:
        self.failed_in_a_row = 0
        self.metrics |= {
            SAVED_STEP: saved.step,
            SAVED_BYTES: saved.bytes,
            SAVE_S: saved.seconds,
            SAVE_STALL_S: self.stall_s,
        }
        for hook in self.hooks:
            hook.after_save(saved.folder)

    def _warn(self, sentence: str) -> None:
        if self.is_main:
            print_warning(sentence)


class SaveOutcomes(Hook):
    """Takes the outcomes of saves, before the report of the step at whose end they are known.

    Args:
        checkpointer: begins the saves, after the report.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def after_step(self, step: FinishedStep) -> None:
        self.checkpointer.settle(step)
