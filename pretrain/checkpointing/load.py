"""Finding the checkpoint that a run goes on from, and reading it on any layout."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from sambalm.model.config import ModelConfig
from sambalm.parallel.checkpoint_tensors import CheckpointSlice
from sambalm.parallel.groups import World
from sambalm.parallel.zero.engine import MOMENTS, set_moment, whole_shape
from sambalm.parallel.zero.parameter_info import CanonicalSlice, info_of
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.data_record import data_change
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.snapshot import all_slices
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import CheckpointError, ConfigError


def find_resume_point(config: RunConfig, *, world: World, opened: Checkpoint | None = None) -> Checkpoint | None:
    """The newest good checkpoint of the run's folder; None for a new run. Collective.

    Args:
        opened: the one that the main rank has found already; nothing is then read again.

    Raises:
        CheckpointsDamagedError: every checkpoint is damaged.
        ConfigError: the checkpoint holds another model.
    """
    # One rank reads the checksums for all.
    found = world.broadcast_object((opened or _newest_or_error(Path(config.run.dir))) if world.is_main else None)
    if isinstance(found, CheckpointError):
        raise found
    checkpoint: Checkpoint | None = found
    if checkpoint:
        # A checkpoint of an older version lacks the keys that came since, which had no other value than the default.
        saved = _saved_model(checkpoint)
        for key, value in config.model.model_dump().items():
            if saved[key] != value:
                raise ConfigError(
                    f"model.{key} is {value!r} and {checkpoint.path} was saved with {saved[key]!r}: restore the "
                    "key or start a new run with another run.dir"
                )
    return checkpoint


def _saved_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Raises:
        ConfigError: the checkpoint's model has keys or values that this version does not know.
    """
    try:
        return ModelConfig.model_validate(checkpoint.state["config"].get("model")).model_dump()
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(
            f"{checkpoint.path} was saved with a model that this version does not know (model.{key}): use the version "
            "that wrote it"
        ) from None


def _newest_or_error(run_dir: Path) -> Checkpoint | CheckpointError | None:
    try:
        if not files.checkpoint_folders(run_dir):
            return None
        return files.newest_checkpoint(run_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
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


def load_weights(chunks: Sequence[nn.Module], path: Path, *, world: World) -> None:
    """Fills parameters, on any layout, before the engine takes them over. Collective."""
    wanted = {f"model.{name}": (piece, piece.of_local(p.data)) for name, p, piece in all_slices(chunks)}
    _load(path, wanted, world=world)


def load_moments(chunks: Sequence[nn.Module], path: Path, *, world: World) -> None:
    """Fills the optimizer's moments, on any layout, once the engine has taken the parameters over. Collective."""
    for key in MOMENTS:
        wholes: dict[nn.Parameter, Tensor] = {}
        wanted = {}
        for name, parameter, piece in all_slices(chunks):
            whole = wholes.setdefault(parameter, torch.zeros(whole_shape(parameter)))
            wanted[f"{key}.{name}"] = (piece, piece.of_local(whole))
        _load(path, wanted, world=world)
        for parameter, whole in wholes.items():
            set_moment(parameter, key, whole.to(parameter.device))


def load_fp8_scales(chunks: Sequence[nn.Module], scales: Mapping[str, list[float]]) -> None:
    """Sets the scales of products in FP8, as `snapshot.fp8_scales` gave them; none where a run had none."""
    for name, parameter, _ in all_slices(chunks):
        product = info_of(parameter).fp8
        if product and name in scales:
            product.load(scales[name])


def _load(path: Path, wanted: dict[str, tuple[CanonicalSlice, Tensor]], *, world: World) -> None:
    """Reads slices into their targets. Collective."""
    buffers = {name: torch.empty(piece.sizes) for name, (piece, _) in wanted.items()}
    slices = {name: CheckpointSlice(buffers[name], piece) for name, (piece, _) in wanted.items()}
    dcp.load(slices, storage_reader=HuggingFaceStorageReader(str(path)), process_group=world.host_group)
    for name, (_, target) in wanted.items():
        target.copy_(buffers[name])
