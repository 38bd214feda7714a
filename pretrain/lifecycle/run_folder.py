"""The folder of a run while an attempt works in it."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sambalm.parallel.environment import is_main_process, world_size
from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing.format import newest_step, remove_leftovers
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import dump_config
from sambalm.pretrain.errors import ExitCode, StoppedError
from sambalm.pretrain.lifecycle.attempts import (
    attempt_folder,
    check_progress,
    new_attempt_name,
    read_attempts,
    recorded_errors,
    write_outcome,
    write_snapshot,
)
from sambalm.pretrain.lifecycle.lease import Lease
from sambalm.pretrain.lifecycle.ledger import Ledger
from sambalm.pretrain.lifecycle.phases import Marks
from sambalm.pretrain.lifecycle.signals import KILL_SWITCH

ENDINGS = {
    ExitCode.FINISHED: "finished: train.steps is reached",
    ExitCode.REQUEUE: "asked to leave: saved, to be started again",
    ExitCode.STOPPED: "asked to stop: saved",
    ExitCode.INTERRUPTED: "interrupted from the keyboard: saved",
}


@dataclass(frozen=True)
class RunFolder:
    """What an attempt holds of its run's folder."""

    attempt: Path
    check_lease: Callable[[], None]  # raises RunInUseError once another process has taken the run over
    ledger: Ledger  # of this process

    @contextlib.contextmanager
    def shared(self, world: World) -> Iterator[Path]:
        """Records every rank's errors where the main rank's are: in the folder that it yields. Collective."""
        attempt: Path = world.broadcast_object(self.attempt)
        with recorded_errors(attempt):
            yield attempt

    def end(self, exit_code: ExitCode, *, step: int, world: World) -> None:
        """Records how the attempt ended before any rank leaves. Collective."""
        if world.is_main:
            write_outcome(self.attempt, exit_code=exit_code, step=step, reason=ENDINGS[exit_code])
        world.barrier()


@contextlib.contextmanager
def open_run_folder(config: RunConfig, marks: Marks) -> Iterator[RunFolder]:
    """Takes the run's folder for this attempt and writes what the attempt starts from; the main process alone does so.

    Args:
        marks: the phases of this process, whose time the ledger counts.

    Raises:
        RunInUseError: another process works in it.
        StoppedError: its kill switch is set.
        NoProgressError: attempt after attempt began at the same step.
    """
    run_dir = Path(config.run.dir)
    folder = attempt_folder(run_dir, new_attempt_name(run_dir))
    if not is_main_process():
        yield RunFolder(folder, check_lease=lambda: None, ledger=Ledger(marks))
        return
    lease = Lease(run_dir)
    lease.acquire()
    try:
        earlier, step = read_attempts(run_dir), newest_step(run_dir)
        write_snapshot(folder, config_yaml=dump_config(config), world_size=world_size(), start_step=step)
        with closing(Ledger(marks, run_dir, attempt=folder.name)) as ledger, recorded_errors(folder):
            if (run_dir / KILL_SWITCH).exists():
                raise StoppedError(f"{run_dir / KILL_SWITCH} is there, which stops this run: remove it to go on")
            check_progress(earlier, step=step, limit=config.run.max_attempts_without_progress)
            remove_leftovers(run_dir)
            yield RunFolder(folder, check_lease=lease.check, ledger=ledger)
    finally:
        lease.release()
