"""Which checkpoints stay: the newest that verify, and every n-th for ever; what is damaged never counts as one of them.

Nothing here communicates, so that the main rank may call it from a thread beside the training.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sambalm.pretrain.checkpointing.format import (
    STATE,
    checkpoint_folders,
    checkpoint_of_step,
    newest_checkpoint,
    open_checkpoint,
    remove_checkpoint,
    set_aside,
    stored_step,
)
from sambalm.pretrain.errors import CheckpointError, one_sentence, print_warning

Stamp = list[tuple[str, int, int]]  # of each file its name, size and time of change


@dataclass(frozen=True)
class CheckpointReport:
    """What is known of a checkpoint without trusting it."""

    path: Path
    step: int
    tokens: int | None  # None where it is damaged
    bytes: int
    saved_s: float  # since the epoch
    problem: str | None  # None where every file is as its manifest says


def examine_checkpoints(run_dir: Path, *, step: int | None = None) -> list[CheckpointReport]:
    """Verifies the checkpoints of a run, or those of a step, oldest first.

    Raises:
        CheckpointError: the folder that holds them cannot be read.
    """
    folders = [folder for folder in checkpoint_folders(run_dir) if step in (None, stored_step(folder))]
    return [_examine(folder) for folder in folders]


def _examine(folder: Path) -> CheckpointReport:
    """Verifies a checkpoint by reading all of it."""
    tokens, problem = None, None
    try:
        tokens = open_checkpoint(folder).state.get("tokens")
    except CheckpointError as error:
        problem = str(error)
    stamp = _stamp(folder)
    return CheckpointReport(
        path=folder,
        step=stored_step(folder),
        tokens=tokens,
        bytes=sum(size for _, size, _ in stamp),
        saved_s=_changed_s(folder),
        problem=problem,
    )


class Retention:
    """Removes old checkpoints of a run, in one thread at a time.

    A checkpoint goes once it is older than the newest `keep` that verify. Verifying reads it; one that this object has
    verified is not read again while its files have the same sizes and times. One that was saved while steps were being
    skipped does not count, since a run goes back to none such.

    Args:
        keep: how many checkpoints of different steps that verify stay.
        keep_every_steps: checkpoints of its multiples always stay; None: of no step.
        check_lease: raises RunInUseError when another process has taken the run's folder over; called before each
            removal.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        keep_every_steps: int | None = None,
        check_lease: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir, self.keep, self.keep_every_steps, self.check_lease = run_dir, keep, keep_every_steps, check_lease
        self._verified: dict[Path, Stamp] = {}

    def removable(self) -> list[Path]:
        """The checkpoints that may go, oldest first; none where fewer than `keep` verify.

        Raises:
            CheckpointError: the folder that holds them cannot be read.
        """
        good_steps: set[int] = set()
        folders = [(stored_step(folder), folder) for folder in checkpoint_folders(self.run_dir)]
        if len({step for step, _ in folders}) <= self.keep:
            return []
        for step, folder in reversed(folders):
            if self._counts(folder):
                good_steps.add(step)
            if len(good_steps) == self.keep:
                return [older for other, older in folders if other < step and not self._stays(other, older)]
        return []

    def prune(self) -> list[Path]:
        """Removes what may go and returns it. What cannot be removed is reported and stays.

        Raises:
            CheckpointError: the folder that holds the checkpoints cannot be read.
            RunInUseError: another process has taken the run's folder over.
        """
        removed = []
        for folder in self.removable():
            self.check_lease()
            try:
                remove_checkpoint(folder)
            except OSError as error:
                print_warning(f"{folder} cannot be removed: {one_sentence(error)}")
            else:
                removed.append(folder)
                self._verified.pop(folder, None)
        return removed

    def _counts(self, folder: Path) -> bool:
        """Whether a checkpoint is one of those to keep."""
        stamp = _stamp(folder)
        if self._verified.get(folder) == stamp:
            return True
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError:
            return False
        if checkpoint.saved_while_skipping:
            return False
        self._verified[folder] = stamp
        return True

    def _stays(self, step: int, folder: Path) -> bool:
        """Whether a checkpoint stays for ever, by what it says or by what it is called: one of the two may be wrong."""
        every = self.keep_every_steps
        return every is not None and not (step % every and int(folder.name.removeprefix("step_")) % every)


def set_newer_aside(run_dir: Path, step: int) -> list[Path]:
    """Sets a run's checkpoints after a step aside (`format.set_aside`), and returns them.

    Raises:
        CheckpointError: there is no good checkpoint of the step.
    """
    folders = checkpoint_folders(run_dir)
    checkpoint_of_step(folders, step)
    return set_aside([folder for folder in reversed(folders) if stored_step(folder) > step])


def newest_keep_every_steps(run_dir: Path) -> int | None:
    """The `checkpoint.keep_every_steps` that a run's newest good checkpoint was saved with.

    Raises:
        CheckpointError: there is no good checkpoint.
    """
    state = newest_checkpoint(run_dir, warn=lambda _: None).state
    return state["config"].get("checkpoint", {}).get("keep_every_steps")


def _stamp(folder: Path) -> Stamp:
    """What changes when a file of a checkpoint is written."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat()) for entry in entries]
    except OSError:  # it is not a folder, or somebody is removing it
        return []
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _changed_s(folder: Path) -> float:
    for path in (folder / STATE, folder):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
