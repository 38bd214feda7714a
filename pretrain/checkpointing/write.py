"""Saving a run together: every rank writes its share, and all commit or none."""

import functools
import operator
import shutil
from collections.abc import Callable, Sequence
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
from sambalm.pretrain.config_file import config_record
from sambalm.pretrain.errors import DivergedError, NotSavedError, RunInUseError, one_sentence

PACKAGES = ("sambalm", "torch", "megatron-core", "deepspeed")


def save_checkpoint(
    chunks: Sequence[nn.Module],
    *,
    config: RunConfig,
    world: World,
    step: int,
    samples: int,
    data: dict[str, Any],
    before_commit: Callable[[], None] = lambda: None,
    token: str = "",
) -> Path:
    """Writes the run's state after a step; collective. Either every rank's part is committed or none.

    Args:
        samples: training samples consumed so far.
        data: what `data_record` says of the run's data.
        before_commit: called on the main rank once all is written; an error of it commits nothing.
        token: of the lease, the same on every rank; see `format.partial_folder`.

    Raises:
        NotSavedError: on every rank, when any rank failed to write; nothing is left.
        RunInUseError: on every rank, when before_commit raised it.
        DivergedError: on every rank, when a tensor is not finite.
    """
    final = files.checkpoint_folder(Path(config.run.dir), step)
    partial = files.partial_folder(final, token)
    together = functools.partial(_together, world=world, step=step, partial=partial)
    together(lambda: _make_empty(partial), ranks=[0])
    together(lambda: _write_tensors(chunks, partial, step=step, world=world))
    found: dict[str, dict[str, int]] = {}
    names = _dealt_files(partial, world=world)
    together(lambda: found.update(files.checksums(partial, names)))
    gathered = world.all_gather_object(found)
    state = _state(config, step, samples=samples, data=data)
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
        except (RunInUseError, DivergedError) as error:
            failure = error
        except (OSError, CheckpointException) as error:
            failure = OSError(one_sentence(error))
    failures: list[Exception | None] = world.all_gather_object(failure)
    if any(failures) and world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    for rank, reason in enumerate(failures):
        if isinstance(reason, RunInUseError | DivergedError):
            raise reason
        if reason:
            raise NotSavedError(f"the checkpoint of step {step} was not saved: rank {rank}: {reason}")


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(chunks: Sequence[nn.Module], partial: Path, *, step: int, world: World) -> None:
    """Every rank's part. Collective."""
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    slices = slices_to_save(chunks, world)
    files.check_finite({name: piece.local for name, piece in slices.items()}, step=step)
    dcp.save(slices, storage_writer=writer, process_group=world.host_group)


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
        "config": config_record(config),
        "versions": {package: version(package) for package in PACKAGES},
    }
