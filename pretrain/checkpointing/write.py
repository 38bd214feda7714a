"""Saving a run together: every rank writes its share in a thread, and all commit or none.

Training waits only while each rank copies its share to host memory (`snapshot.py`). Tensors, checksums, manifest and
the rename that commits are the thread's, which agrees with those of other ranks over `World.save_group` and uses no
other group. One save at a time is under way.
"""

import errno
import functools
import operator
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sambalm.data_pipeline.files import sync
from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.initial_weights import STARTED_FROM
from sambalm.pretrain.checkpointing.retention import Retention
from sambalm.pretrain.checkpointing.shard_file import write_shards
from sambalm.pretrain.checkpointing.snapshot import SavedSlice, Snapshot, fp8_scales
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import config_record
from sambalm.pretrain.errors import NotSavedError, RunInUseError, SaveBrokenError, one_sentence, print_warning
from sambalm.pretrain.packages import installed_versions

PACKAGES = ("sambalm", "torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete and committed.

    Attributes:
        step: after which the state was copied.
        bytes: of all its files.
        seconds: from the beginning of the copy to the commit.
    """

    folder: Path
    step: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Copied:
    """What a rank has copied for a save, or why it could not."""

    step: int
    samples: int
    hooks: Mapping[str, Any]
    slices: Sequence[SavedSlice]
    fp8_scales: dict[str, list[float]]
    failure: Exception | None
    started_s: float


class CheckpointWriter:
    """Saves a run's state: copies it while training waits, and writes the copy in a thread.

    Args:
        data: what `data_record` says of the run's data.
        started_from: what `InitialWeights.record` says; None for a run that drew its weights.
        token: of the run's lease, the same on every rank; see `format.partial_folder`.
        check_lease: raises RunInUseError when another process has taken the run's folder over; called on the main rank
            before anything is written, committed or removed.
        marked: goes around what the thread does.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        world: World,
        data: dict[str, Any],
        started_from: Mapping[str, Any] | None = None,
        token: str = "",
        check_lease: Callable[[], None] = lambda: None,
        marked: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._config, self._data, self._token = config, data, token
        self._started_from = started_from
        self._check_lease, self._marked = check_lease, marked
        self._world = world.of_save_thread
        self._run_dir, kept = Path(config.run.dir), config.checkpoint
        self._retention = Retention(
            self._run_dir, keep=kept.keep, keep_every_steps=kept.keep_every_steps, check_lease=check_lease
        )
        self._snapshot = Snapshot()
        self._save: Future[SavedCheckpoint] | None = None

    def reserve(self, chunks: Sequence[nn.Module]) -> None:
        """Takes the memory for copies before the first save needs it.

        Raises:
            RuntimeError: there is not enough memory.
        """
        self._snapshot.reserve(chunks)

    def start(
        self, chunks: Sequence[nn.Module], *, step: int, samples: int, hooks: Mapping[str, Any] | None = None
    ) -> None:
        """Begins a save of the state after a step; returns once the state is copied. No other may be under way.

        Every rank calls this after the same step. What goes wrong on any of them is in `result` on all.

        Args:
            samples: training samples consumed so far.
            hooks: states of the run's hooks by their names.
        """
        if self._save:
            raise RuntimeError("a save is under way: take its result first")
        started_s, failure = time.perf_counter(), None
        slices: list[SavedSlice] = []
        scales: dict[str, list[float]] = {}
        try:
            slices, scales = self._snapshot.take(chunks), fp8_scales(chunks)
        except (RuntimeError, MemoryError) as error:
            failure = error  # which the other ranks hear of when they begin to write
        copied = _Copied(step, samples, dict(hooks or {}), slices, scales, failure, started_s)
        self._save = Future()
        threading.Thread(target=self._run, args=(self._save, copied), name="save", daemon=True).start()

    @property
    def under_way(self) -> bool:
        """Whether a save has begun whose result has not been taken."""
        return self._save is not None

    @property
    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return self._save is None or self._save.done()

    @property
    def is_broken(self) -> bool:
        """Whether the save under way ended in something that ranks could not agree on, such as a lost rank."""
        if self._save is None or not self._save.done():
            return False
        return not isinstance(self._save.exception(), (NotSavedError, RunInUseError, type(None)))

    def result(self, *, timeout_s: float | None = None) -> SavedCheckpoint:
        """Waits for the end of the save under way and returns what it saved.

        Raises:
            NotSavedError: on every rank, when any rank failed to write; nothing is left of the save.
            RunInUseError: on every rank, when check_lease raised it.
            SaveBrokenError: ranks could not agree; maybe on this rank alone.
            TimeoutError: the save goes on.
        """
        if self._save is None:
            raise RuntimeError("no save is under way")
        error = self._save.exception(timeout_s)
        save, self._save = self._save, None
        if error is None or isinstance(error, (NotSavedError, RunInUseError)):
            return save.result()
        raise SaveBrokenError(f"ranks lost each other while they wrote a checkpoint: {_sentence(error)}") from error

    def close(self) -> None:
        """Gives the memory of copies back, unless a save still reads it."""
        if self.is_done:
            self._snapshot.release()

    def _run(self, save: "Future[SavedCheckpoint]", copied: _Copied) -> None:
        """The thread."""
        try:
            with self._marked():
                saved = self._write(copied)
            save.set_result(saved)
        except BaseException as error:
            save.set_exception(error)

    def _write(self, copied: _Copied) -> SavedCheckpoint:
        """Writes a copy; collective over the threads of all ranks."""
        final = files.checkpoint_folder(self._run_dir, copied.step)
        partial = files.partial_folder(final, self._token)
        together = functools.partial(self._together, step=copied.step, partial=partial)
        together(self._check_lease, ranks=[0])
        together(lambda: _make_empty(partial), ranks=[0])

        def write() -> tuple[dict[str, dict[str, int]], dict[str, list[float]]]:
            if copied.failure:
                raise copied.failure
            return write_shards(partial, copied.slices, rank=self._world.rank), copied.fp8_scales

        written, scales = zip(*together(write), strict=True)
        checksums = functools.reduce(operator.or_, written)
        state = self._state(copied, fp8_scales=functools.reduce(operator.or_, scales))
        size, *_ = together(lambda: _complete(partial, state, checksums), ranks=[0])
        together(self._check_lease, ranks=[0])
        together(lambda: _commit(partial, final), ranks=[0])
        saved = SavedCheckpoint(final, copied.step, bytes=size, seconds=time.perf_counter() - copied.started_s)
        if self._world.is_main:
            self._remove_old()
        return saved

    def _state(self, copied: _Copied, *, fp8_scales: dict[str, list[float]]) -> dict[str, Any]:
        """What a checkpoint says of the run besides its tensors."""
        state = {
            "step": copied.step,
            "samples": copied.samples,
            "tokens": self._config.schedule.tokens(copied.samples),
            "data": self._data,
            "config": config_record(self._config),
            "versions": installed_versions(PACKAGES),
            "hooks": copied.hooks,
        }
        state |= {STARTED_FROM: self._started_from} if self._started_from else {}
        return state | ({"fp8_scales": fp8_scales} if fp8_scales else {})

    def _remove_old(self) -> None:
        """Removes what a new checkpoint has made superfluous. The save stands, whatever comes of it."""
        try:
            self._retention.prune()
        except Exception as error:
            print_warning(f"old checkpoints could not be removed: {one_sentence(error)}")

    def _together(
        self, action: Callable[[], Any], *, step: int, partial: Path, ranks: Sequence[int] | None = None
    ) -> list[Any]:
        """Runs a part of a save on some ranks (None: all), and fails on all where it fails on one. Collective.

        Returns:
            What the action returned, by rank.
        """
        value: Any = None
        failure: RunInUseError | str | None = None
        if ranks is None or self._world.rank in ranks:
            try:
                value = action()
            except RunInUseError as error:
                failure = error
            except Exception as error:  # whatever it is: the other ranks would wait for this one
                failure = _sentence(error)
        answers = self._world.all_gather_object((value, failure))
        failures = {rank: reason for rank, (_, reason) in enumerate(answers) if reason is not None}
        if failures and self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        for rank, reason in failures.items():
            if isinstance(reason, RunInUseError):
                raise reason
            raise NotSavedError(f"the checkpoint of step {step} was not saved: rank {rank}: {reason}")
        return [value for value, _ in answers]


def save_checkpoint(
    chunks: Sequence[nn.Module],
    *,
    config: RunConfig,
    world: World,
    step: int,
    samples: int,
    data: dict[str, Any],
    hooks: Mapping[str, Any] | None = None,
) -> Path:
    """Saves the run's state after a step, and waits until it is committed. Collective.

    Args:
        samples: training samples consumed so far.
        data: what `data_record` says of the run's data.
        hooks: states of the run's hooks by their names.

    Raises:
        NotSavedError: on every rank, when any rank failed to write; nothing is left.
    """
    writer = CheckpointWriter(config, world=world, data=data)
    writer.start(chunks, step=step, samples=samples, hooks=hooks)
    try:
        return writer.result().folder
    finally:
        writer.close()


def _sentence(error: BaseException) -> str:
    """An error as a part of a sentence, on one line."""
    text = one_sentence(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}: make room there, or give the run fewer checkpoint.keep"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _complete(partial: Path, state: dict[str, Any], checksums: dict[str, dict[str, int]]) -> int:
    """Writes what only the folder as a whole has; returns the bytes of all its files."""
    files.write_json(partial / files.STATE, state)
    checksums = checksums | files.checksums(partial, [files.STATE])
    files.write_manifest(partial, checksums)
    sync(partial)
    return sum(entry["bytes"] for entry in checksums.values())


def _commit(partial: Path, final: Path) -> None:
    try:
        files.commit(partial, final)
    except OSError as error:
        if partial.exists():
            raise
        print_warning(f"{final} is complete, but a power loss may undo it: {error}")
