"""Going back to an earlier checkpoint within a run, and leaving out the samples that led astray."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.format import checkpoint_folders, open_checkpoint, set_aside
from sambalm.pretrain.errors import CheckpointError, one_sentence
from sambalm.pretrain.lifecycle.hooks import Hook
from sambalm.pretrain.lifecycle.run_folder import RunFolder


class RollBack(Exception):
    """Ends the training loop so that it begins anew from an earlier checkpoint; raised on every rank alike.

    Attributes:
        failure: what the run ends with where no checkpoint will do.
        newest_step: the newest checkpoint that will do.
        record: the state of `Rollbacks` from here on, which no checkpoint has yet.
    """

    def __init__(self, failure: Exception, *, newest_step: int, record: Mapping[str, Any]) -> None:
        super().__init__(str(failure))
        self.failure, self.newest_step, self.record = failure, newest_step, record


class Rollbacks(Hook):
    """How often a run has gone back, and which samples it leaves out since.

    Args:
        limit: how often a run may.
    """

    name = "rollbacks"

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.left_out: list[range] = []  # numbers of samples

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "left_out": [[samples.start, samples.stop] for samples in self.left_out]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count, self.left_out = state["count"], [range(*ends) for ends in state["left_out"]]

    def leaves_out(self, samples: range) -> bool:
        """Whether a step's samples are passed over: all of them where any of them is left out."""
        return any(samples.start < other.stop and other.start < samples.stop for other in self.left_out)

    def roll_back(self, failure: Exception, *, newest_step: int, left_out: Sequence[range] = ()) -> NoReturn:
        """Ends the training loop, on every rank alike.

        Raises:
            RollBack: the run may go back.
            Exception: `failure`, where it has done so as often as it may.
        """
        if self.count >= self.limit:
            raise failure
        self.count += 1
        self.left_out += left_out
        raise RollBack(failure, newest_step=newest_step, record=self.state())


def set_newer_checkpoints_aside(run_dir: Path, rollback: RollBack, *, folder: RunFolder, world: World) -> None:
    """Leaves the checkpoint that a run goes back to as the newest one. Collective.

    Raises:
        RunInUseError: another process has taken the run's folder over.
        CheckpointError: the newer ones cannot be renamed.
        Exception: `rollback.failure`, where none will do.
    """

    def go_back() -> bool:
        folder.check_lease()
        try:
            return _set_aside(run_dir, rollback.newest_step)
        except OSError as error:
            raise CheckpointError(f"{run_dir} cannot go back to a checkpoint: {one_sentence(error)}") from None

    if not world.of_main(go_back):
        raise rollback.failure


def _set_aside(run_dir: Path, newest_step: int) -> bool:
    newer: list[Path] = []
    for folder in reversed(checkpoint_folders(run_dir)):
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError:
            newer.append(folder)
            continue
        if checkpoint.step <= newest_step and not checkpoint.saved_while_skipping:
            set_aside(newer)
            return True
        newer.append(folder)
    return False
