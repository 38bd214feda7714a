"""Between a live run and its checkpoints: what every rank does together to save and to resume."""

import functools
import itertools
import operator
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from sambalm.model.durable_files import flush, write_json
from sambalm.model.ops.kernels import Kernels
from sambalm.parallel.checkpoint_tensors import CheckpointSlice
from sambalm.parallel.execution import Execution
from sambalm.parallel.sharding import CanonicalSlice, canonical_slices
from sambalm.parallel.state import World
from sambalm.parallel.zero import MOMENTS, Engine, set_moment, whole_moment, whole_parameter
from sambalm.pretrain import checkpoint as files
from sambalm.pretrain.checkpoint import Checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.data_record import data_change
from sambalm.pretrain.errors import CheckpointError, ConfigError, NotSavedError, RunInUseError


@dataclass(frozen=True)
class Training:
    """What this rank trains: its parts of the model, the engine that holds them, and the way to run them."""

    engine: Engine
    parts: Sequence[nn.Module]
    execution: Execution
    kernels: Kernels


PACKAGES = ("sambalm", "torch", "megatron-core", "deepspeed")


def find_resume_point(config: RunConfig, *, world: World) -> Checkpoint | None:
    """The newest good checkpoint of the run's folder; None for a new run. Collective.

    Raises:
        CheckpointsDamagedError: every checkpoint is damaged.
        ConfigError: the checkpoint holds another model.
    """
    found: list[Any] = [None]
    if world.is_main:
        found = [_newest_or_error(Path(config.run.dir))]
    dist.broadcast_object_list(found, src=0)  # one rank reads the checksums for all
    if isinstance(found[0], CheckpointError):
        raise found[0]
    checkpoint: Checkpoint | None = found[0]
    if checkpoint:
        saved, wanted = checkpoint.state["config"]["model"], config.model.model_dump()
        for key, value in wanted.items():
            if saved.get(key) != value:
                raise ConfigError(
                    f"model.{key} is {value!r} and {checkpoint.path} was saved with {saved.get(key)!r}: restore the "
                    "key or start a new run with another run.dir"
                )
    return checkpoint


def _newest_or_error(run_dir: Path) -> Checkpoint | CheckpointError | None:
    if not files.checkpoint_folders(run_dir):
        return None
    try:
        return files.newest_checkpoint(run_dir, warn=lambda message: warnings.warn(message, stacklevel=2))
    except CheckpointError as error:
        return error


def check_data(checkpoint: Checkpoint, record: dict[str, Any], *, config: RunConfig) -> None:
    """Compares what a checkpoint says of the data with what is there now.

    Raises:
        ConfigError: the samples to come would not be those that the run had before it; unless data.allow_changed.
    """
    changed = data_change(checkpoint.state.get("data"), record)
    if changed and not config.data.allow_changed:
        raise ConfigError(
            f"{changed} since {checkpoint.path} was saved: restore it, or set data.allow_changed=true to go on with it "
            "as it is now"
        )


def save_checkpoint(
    training: Training,
    *,
    config: RunConfig,
    world: World,
    step: int,
    samples: int,
    data: dict[str, Any],
    before_commit: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the run's state after a step; collective. Either every rank's part is committed or none.

    Args:
        samples: training samples consumed so far.
        data: what `data_record` says of the run's data.
        before_commit: called on the main rank once all is written; an error of it commits nothing.

    Raises:
        NotSavedError: on every rank, when any rank failed to write; nothing is left.
        RunInUseError: on every rank, when before_commit raised it.
    """
    final = files.checkpoint_folder(Path(config.run.dir), step)
    partial = final.with_name(f".{final.name}.partial")
    together = functools.partial(_together, world=world, step=step, partial=partial)
    together(lambda: _make_empty(partial), ranks=[0])
    together(lambda: _write_tensors(training, partial, world=world))
    found: dict[str, dict[str, int]] = {}
    names = _dealt_files(partial, world=world)
    together(lambda: found.update(files.checksums(partial, names)))
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, found)
    together(lambda: _complete(partial, _state(config, step, samples=samples, data=data), gathered), ranks=[0])
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
    failures: list[Exception | None] = [None] * world.size
    dist.all_gather_object(failures, failure)
    if any(failures) and world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    for rank, error in enumerate(failures):
        if isinstance(error, RunInUseError):
            raise error
        if error:
            raise NotSavedError(f"the checkpoint of step {step} was not saved: rank {rank}: {error}")


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(training: Training, partial: Path, *, world: World) -> None:
    """Every rank's part. Collective."""
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    dcp.save(_slices_to_save(training.parts, world), storage_writer=writer)


def _dealt_files(partial: Path, *, world: World) -> list[str]:
    """This rank's share of the files, to compute checksums of. Collective: one rank lists them for all."""
    listed = [sorted(path.name for path in partial.iterdir()) if world.is_main else None]
    dist.broadcast_object_list(listed, src=0)
    return listed[0][world.rank :: world.size]


def _complete(partial: Path, state: dict[str, Any], gathered: Sequence[dict[str, dict[str, int]]]) -> None:
    """What only the folder as a whole has."""
    write_json(partial / files.STATE, state)
    checksums = functools.reduce(operator.or_, gathered, files.checksums(partial, [files.STATE]))
    files.write_manifest(partial, checksums)
    flush(partial)


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


def load_weights(parts: Sequence[nn.Module], path: Path) -> None:
    """Fills parameters, on any layout, before the engine takes them over. Collective."""
    _load(path, {f"model.{name}": (piece, piece.of_local(p.data)) for name, p, piece in _slices(parts)})


def load_moments(parts: Sequence[nn.Module], path: Path) -> None:
    """Fills the optimizer's moments, on any layout, once the engine has taken the parameters over. Collective."""
    for key in MOMENTS:
        wholes: dict[nn.Parameter, Tensor] = {}
        wanted = {}
        for name, parameter, piece in _slices(parts):
            whole = wholes.setdefault(parameter, torch.zeros(_local_shape(parameter)))
            wanted[f"{key}.{name}"] = (piece, piece.of_local(whole))
        _load(path, wanted)
        for parameter, whole in wholes.items():
            set_moment(parameter, key, whole.to(parameter.device))


def _slices(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter, CanonicalSlice]]:
    return itertools.chain.from_iterable(canonical_slices(part) for part in parts)


def _load(path: Path, wanted: dict[str, tuple[CanonicalSlice, Tensor]]) -> None:
    """Reads slices into their targets."""
    buffers = {name: torch.empty(piece.sizes) for name, (piece, _) in wanted.items()}
    slices = {name: CheckpointSlice(buffers[name], piece) for name, (piece, _) in wanted.items()}
    dcp.load(slices, storage_reader=HuggingFaceStorageReader(str(path)))
    for name, (_, target) in wanted.items():
        target.copy_(buffers[name])


def _slices_to_save(parts: Sequence[nn.Module], world: World) -> dict[str, CheckpointSlice]:
    """This rank's share of the state, on the CPU. Ranks with the same weights take turns to save a parameter."""
    saved: dict[str, CheckpointSlice] = {}
    names_of: dict[nn.Parameter, list[tuple[str, CanonicalSlice]]] = {}
    for name, parameter, piece in _slices(parts):
        names_of.setdefault(parameter, []).append((name, piece))
    for turn, (parameter, names) in enumerate(names_of.items()):
        mine = parameter.counted and turn % world.replica_size == world.replica_rank
        for kind, whole in _wholes(parameter):
            for name, piece in names if mine else ():
                local = piece.of_local(whole).to("cpu", copy=True).contiguous()
                saved[f"{kind}.{name}"] = CheckpointSlice(local, piece)
    return saved


def _wholes(parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """A parameter's tensors, gathered over data-parallel ranks one at a time. Collective."""
    yield "model", whole_parameter(parameter)
    for key in MOMENTS:
        yield key, whole_moment(parameter, key)


def _local_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
