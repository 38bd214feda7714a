"""When a run saves: every so many steps, after the last one, and when it is asked to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.write import remove_old_checkpoints, save_checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook, is_due
from sambalm.pretrain.lifecycle.phases import Phase
from sambalm.pretrain.training import Training


class Checkpointer(Hook):
    """Saves the run, tells the other hooks of it, and removes old checkpoints.

    Args:
        data: what `data_record` says of the run's data.
        check_lease: raises RunInUseError when another process has taken the run's folder over.
        hooks: those of the run, which hear of each save in their order.
    """

    phase = Phase.SAVE

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        data: dict[str, Any],
        check_lease: Callable[[], None],
        hooks: Sequence[Hook],
    ) -> None:
        self.config, self.world, self.data, self.check_lease, self.hooks = config, world, data, check_lease, hooks

    def on_start(self, training: Training) -> None:
        self.parts = training.chunks

    def acts_on(self, step: int) -> bool:
        return is_due(step, every_steps=self.config.checkpoint.every_steps, last_step=self.config.train.steps)

    def after_step(self, step: FinishedStep) -> None:
        """Saves where it is due or asked for.

        Raises:
            NotSavedError, RunInUseError: on every rank.
        """
        if not (step.request or self.acts_on(step.number)):
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
            before_commit=self.check_lease,
        )
        remove_old_checkpoints(Path(self.config.run.dir), keep=self.config.checkpoint.keep, world=self.world)
        for hook in self.hooks:
            hook.after_save(folder)
