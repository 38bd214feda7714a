"""Saving a run together: every rank writes its share, and all commit or none."""

import functools
import operator
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from sambalm.data_pipeline.files import sync
from sambalm.parallel.groups import World
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.snapshot import fp8_scales, slices_to_save
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import NotSavedError, RunInUseError

PACKAGES = ("sambalm", "torch", "megatron-core", "deepspeed")


def save_checkpoint(
    chunks: Sequence[nn.Module],
    *,
    config: RunConfig,
    world: World,
    step: int,
    samples: int,
    data: dict[str, Any],
    hooks: Mapping[str, Any] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the run's state after a step; collective. Either every rank's part is committed or none.

    Args:
        samples: training samples consumed so far.
        data: what `data_record` says of the run's data.
        hooks: states of the run's hooks by their names.
        before_commit: called on the main rank once all is written; an error of it commits nothing.

    Raises:
        NotSavedError: on every rank, when any rank failed to write; nothing is left.
        RunInUseError: on every rank, when before_commit raised it.
    """
    final = files.checkpoint_folder(Path(config.run.dir), step)
    partial = final.with_name(f".{final.name}.partial")
    together = functools.partial(_together, world=world, step=step, partial=partial)
    together(lambda: _make_empty(partial), ranks=[0])
    together(lambda: _write_tensors(chunks, partial, world=world))
    found: dict[str, dict[str, int]] = {}
    names = _dealt_files(partial, world=world)
    together(lambda: found.update(files.checksums(partial, names)))
    gathered = world.all_gather_object(found)
    state = _state(config, step, samples=samples, data=data) | {"hooks": dict(hooks or {})}
    if scales := functools.reduce(operator.or_, world.all_gather_object(fp8_scales(chunks))):
        state["fp8_scales"] = scales
    together(lambda: _complete(partial, state, gathered), ranks=[0])
    together(before_commit, ranks=[0])
    together(lambda: files.commit(partial, final), ranks=[0])
    return final


def _together(
    action: Callable[[], None], *, world: World, step: int, partial: Path, ranks: Sequence[int] | None = None
) -> None:
    """Runs a part of a save on some ranks (None: all), and fails on all where it fails on one. Collective."""
    failure: Exception | None = None
    if ranks is None or world.rank in ranks:
        try:
            action()
        except (OSError, CheckpointException, RunInUseError) as error:
            failure = error if isinstance(error, RunInUseError) else OSError(f"{type(error).__name__}: {error}")
    failures: list[Exception | None] = world.all_gather_object(failure)
    if any(failures) and world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    for rank, reason in enumerate(failures):
        if isinstance(reason, RunInUseError):
            raise reason
        if reason:
            raise NotSavedError(f"the checkpoint of step {step} was not saved: rank {rank}: {reason}")


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(chunks: Sequence[nn.Module], partial: Path, *, world: World) -> None:
    """Every rank's part. Collective."""
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    dcp.save(slices_to_save(chunks, world), storage_writer=writer, process_group=world.host_group)


def _dealt_files(partial: Path, *, world: World) -> list[str]:
    """This rank's share of the files, to compute checksums of. Collective: one rank lists them for all."""
    listed = sorted(path.name for path in partial.iterdir()) if world.is_main else None
    names: list[str] = world.broadcast_object(listed)
    return names[world.rank :: world.size]


def _complete(partial: Path, state: dict[str, Any], gathered: Sequence[dict[str, dict[str, int]]]) -> None:
    """What only the folder as a whole has."""
    files.write_json(partial / files.STATE, state)
    checksums = functools.reduce(operator.or_, gathered, files.checksums(partial, [files.STATE]))
    files.write_manifest(partial, checksums)
    sync(partial)


def _state(config: RunConfig, step: int, *, samples: int, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run besides its tensors."""
    return {
        "step": step,
        "samples": samples,
        "tokens": samples * config.data.sequence_length,
        "data": data,
        "config": config.model_dump(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def remove_old_checkpoints(run_dir: Path, *, keep: int, world: World) -> None:
    """Removes all but the newest; by renaming first, so that a half-removed one is never taken for a checkpoint."""
    for folder in files.checkpoint_folders(run_dir)[:-keep] if world.is_main else ():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
