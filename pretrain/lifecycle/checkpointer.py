"""When a run saves: every so many steps, after the last one, and when it is asked to."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.retention import Retention
from sambalm.pretrain.checkpointing.write import save_checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import CheckpointError, RunInUseError
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook, is_due
from sambalm.pretrain.lifecycle.run_folder import RunFolder
from sambalm.pretrain.training import Training


class Checkpointer(Hook):
    """Saves the run, tells the other hooks of it, and removes old checkpoints.

    A save that is due after a step that the optimizer skipped waits for the next that it does not skip, so that steps
    without progress push out no good checkpoint. The last step and one with a request are saved all the same.

    Args:
        data: what `data_record` says of the run's data.
        folder: the run's, as every rank knows it.
        hooks: those of the run, which hear of each save in their order.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        data: dict[str, Any],
        folder: RunFolder,
        hooks: Sequence[Hook],
    ) -> None:
        self.config, self.world, self.data, self.folder, self.hooks = config, world, data, folder, hooks
        section = config.checkpoint
        self.retention = Retention(
            Path(config.run.dir),
            keep=section.keep,
            keep_every_steps=section.keep_every_steps,
            check_lease=folder.check_lease,
        )
        self.is_owed = False

    def on_start(self, training: Training) -> None:
        self.parts = training.chunks

    def acts_on(self, step: int) -> bool:
        every_steps, last_step = self.config.checkpoint.every_steps, self.config.train.steps
        return self.is_owed or is_due(step, every_steps=every_steps, last_step=last_step)

    def after_step(self, step: FinishedStep) -> None:
        """Saves where it is due or asked for.

        Raises:
            NotSavedError, RunInUseError: on every rank.
            DivergedError: on every rank, when a tensor is not finite.
        """
        if not (step.request or self.acts_on(step.number)):
            return
        may_wait = not step.request and step.number < self.config.train.steps
        self.is_owed = may_wait and not math.isfinite(step.result.grad_norm)
        if self.is_owed:
            return
        for hook in self.hooks:
            hook.before_save(step.number)
        folder = save_checkpoint(
            self.parts,
            config=self.config,
            world=self.world,
            step=step.number,
            samples=step.result.tokens // self.config.data.sequence_length,
            data=self.data,
            before_commit=self.folder.check_lease,
            token=self.folder.token,
        )
        if self.world.is_main:
            with suppress(CheckpointError, RunInUseError):  # which the next save will meet on every rank
                self.retention.prune()
        for hook in self.hooks:
            hook.after_save(folder)
