"""The folder of a run while an attempt works in it."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from sambalm.data_pipeline.files import sync
from sambalm.parallel.environment import is_main_process, world_size
from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.format import (
    Checkpoint,
    checkpoint_folders,
    last_saved_step,
    newest_checkpoint,
    remove_leftovers,
)
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import dump_config
from sambalm.pretrain.errors import (
    CheckpointError,
    CheckpointsDamagedError,
    ExitCode,
    NotSavedError,
    RunFolderError,
    StoppedError,
    one_sentence,
    print_warning,
)
from sambalm.pretrain.lifecycle.attempts import (
    AttemptRecord,
    attempt_folder,
    check_progress,
    new_attempt_name,
    read_attempts,
    recorded_errors,
    write_outcome,
    write_snapshot,
)
from sambalm.pretrain.lifecycle.hooks import FinishedStep, Hook
from sambalm.pretrain.lifecycle.lease import held_lease
from sambalm.pretrain.lifecycle.ledger import LEDGER, Ledger
from sambalm.pretrain.lifecycle.lost_ranks import RankProcesses, naming_lost_ranks
from sambalm.pretrain.lifecycle.phases import Marks
from sambalm.pretrain.lifecycle.signals import KILL_SWITCH, ORPHANED, Request
from sambalm.pretrain.reporting.metrics_file import METRICS
from sambalm.pretrain.training import Training


class Ending(NamedTuple):
    """How an attempt ends that has saved."""

    exit_code: ExitCode
    reason: str


ENDINGS = {  # by what the run was asked for
    Request.NOTHING: Ending(ExitCode.FINISHED, "finished: train.steps is reached"),
    Request.LEAVE: Ending(ExitCode.REQUEUE, "asked to leave: saved, to go on from there"),
    Request.ORPHANED: Ending(ExitCode.REQUEUE, f"{ORPHANED}: saved, to go on from there"),
    Request.INTERRUPT: Ending(ExitCode.INTERRUPTED, "interrupted from the keyboard: saved"),
    Request.STOP: Ending(ExitCode.STOPPED, "asked to stop: saved"),
}
_FILES, _FOLDERS = ("config.yaml", METRICS, LEDGER), ("attempts", "tensorboard")  # what a start writes, by kind
# Of an error of the operating system: what trying again does not mend.
_MENDED_BY_HAND = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
_CHOOSE = "; choose a folder that can be written with run.dir"


@dataclass(frozen=True)
class RunFolder:
    """What an attempt holds of its run's folder."""

    attempt: Path
    check_lease: Callable[[], None]  # raises RunInUseError once another process has taken the run over
    ledger: Ledger  # of this process
    lease_is_lost: Callable[[], bool] = lambda: False  # whether that was so lately; costs nothing
    token: str = ""  # of the lease, in the names of what is not finished; of the main rank's once it is shared
    checkpoint: Checkpoint | None = None  # that the run goes on from, opened; known to the main rank alone
    processes: RankProcesses = field(default_factory=RankProcesses)  # of all ranks, once it is shared

    @contextlib.contextmanager
    def shared(self, world: World) -> Iterator["RunFolder"]:
        """Yields the folder with what every rank needs to know, and records every rank's errors. Collective."""
        attempt, token = world.broadcast_object((self.attempt, self.token))
        processes = RankProcesses.of(world)
        with recorded_errors(attempt), naming_lost_ranks(processes, attempt):
            yield replace(self, attempt=attempt, token=token, processes=processes)

    def end(self, ending: Ending, *, step: int, world: World) -> None:
        """Records how the attempt ended before any rank leaves. Collective."""
        if world.is_main:
            write_outcome(self.attempt, exit_code=ending.exit_code, step=step, reason=ending.reason)
        world.barrier()


class LeaseGuard(Hook):
    """Ends a run whose folder another process has taken over, before this one touches anything there.

    Each step takes what the lease's last beat found, as a vote; `on_start` looks, and so do saves (`write.py`).
    """

    def __init__(self, folder: RunFolder, *, world: World) -> None:
        self._folder, self._world = folder, world

    def on_start(self, training: Training) -> None:
        """
        Raises:
            RunInUseError: on every rank.
        """
        self._world.of_main(self._folder.check_lease)

    def vote(self) -> int:
        return self._folder.lease_is_lost()

    def after_step(self, step: FinishedStep) -> None:
        """
        Raises:
            RunInUseError: on every rank.
        """
        if step.votes[self]:
            self._world.of_main(self._folder.check_lease)


@contextlib.contextmanager
def open_run_folder(config: RunConfig, marks: Marks) -> Iterator[RunFolder]:
    """Takes the run's folder for this attempt, and the newest good checkpoint; the main process alone does so.

    Args:
        marks: the phases of this process, whose time the ledger counts.

    Raises:
        RunInUseError: another process works in it.
        RunFolderError, NotSavedError: it cannot be read or written, for good or for now.
        StoppedError: its kill switch is set.
        CheckpointsDamagedError: no checkpoint is good, or those that the run had saved are gone.
        NoProgressError: attempt after attempt began at the same step.
    """
    run_dir = Path(config.run.dir)
    folder = attempt_folder(run_dir, new_attempt_name(run_dir))
    if not is_main_process():
        yield RunFolder(folder, check_lease=lambda: None, ledger=Ledger(marks))
        return
    with contextlib.ExitStack() as stack:
        with _errors_in_a_sentence(run_dir):
            lease = stack.enter_context(held_lease(run_dir))
            sync(run_dir.parent)
            _set_aside_what_is_of_another_kind(run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            ledger = stack.enter_context(closing(Ledger(marks, run_dir, attempt=folder.name)))
            stack.enter_context(recorded_errors(folder))
            checkpoint = _start(config, folder)
        yield RunFolder(
            folder,
            check_lease=lease.check,
            ledger=ledger,
            lease_is_lost=lambda: lease.is_lost,
            token=lease.token,
            checkpoint=checkpoint,
        )


def _start(config: RunConfig, folder: Path) -> Checkpoint | None:
    """Records the attempt, and refuses it or returns the checkpoint that it goes on from."""
    run_dir = Path(config.run.dir)
    earlier = read_attempts(run_dir, warn=print_warning)
    checkpoint, refusal = None, None
    try:
        if (run_dir / KILL_SWITCH).exists():
            raise StoppedError(f"{run_dir / KILL_SWITCH} is there, which stops this run: remove it to go on")
        checkpoint = _resume_point(run_dir, earlier, start_over=config.run.start_over)
    except (StoppedError, CheckpointError) as error:
        refusal = error
    step = None if refusal else checkpoint.step if checkpoint else 0
    write_snapshot(folder, config_yaml=dump_config(config), world_size=world_size(), start_step=step)
    if refusal:
        raise refusal
    check_progress(earlier, step=step or 0, limit=config.run.max_attempts_without_progress)
    remove_leftovers(run_dir)
    return checkpoint


def _resume_point(run_dir: Path, earlier: Sequence[AttemptRecord], *, start_over: bool) -> Checkpoint | None:
    """The newest good checkpoint; None for a run that has saved none yet, or that may start over."""
    if checkpoint_folders(run_dir):
        return newest_checkpoint(run_dir, warn=print_warning)
    saved = last_saved_step(run_dir)
    steps = [*(record.start_step for record in earlier), saved]  # an older version's run has no record but its attempts
    steps += [
        record.step for record in earlier if record.exit_code in {ending.exit_code for ending in ENDINGS.values()}
    ]
    if (progress := max(filter(None, steps), default=0)) and not start_over:
        raise CheckpointsDamagedError(
            f"{run_dir} had saved step {progress} and holds no checkpoint any more: restore one from a copy, or set "
            "run.start_over=true to begin at step 0"
        )
    return None


def _set_aside_what_is_of_another_kind(run_dir: Path) -> None:
    """Renames what has a name that a start writes to and is a folder instead of a file, or the reverse."""
    wrong = [path for name in _FILES if (path := run_dir / name).is_dir()]
    wrong += [path for name in _FOLDERS if (path := run_dir / name).exists() and not path.is_dir()]
    for path in wrong:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        os.rename(path, aside)
        print_warning(f"{path} was {'a folder' if aside.is_dir() else 'no folder'}, so it is now called {aside.name}")


@contextlib.contextmanager
def _errors_in_a_sentence(run_dir: Path) -> Iterator[None]:
    """Turns the operating system's errors into one of this package's."""
    try:
        yield
    except OSError as error:
        by_hand = error.errno in _MENDED_BY_HAND
        reason = f"{error.filename}: {error.strerror}" if error.filename else one_sentence(error)
        text = f"the run's folder {run_dir} cannot be used: {reason}{_CHOOSE if by_hand else ''}"
        raise (RunFolderError if by_hand else NotSavedError)(text) from None
