"""Finding the checkpoint that a run goes on from, and reading it on any layout."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from sambalm.model.config import ModelConfig
from sambalm.parallel.groups import World
from sambalm.parallel.sharding import initialize_parameters
from sambalm.parallel.zero.engine import WEIGHT, held_tensors
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.data_record import data_change
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.initial_weights import InitialWeights, reference_sizes
from sambalm.pretrain.checkpointing.read import (
    WantedSlice,
    read_slices,
    read_together,
    readers,
    send_to_replicas,
    stored_slices,
)
from sambalm.pretrain.checkpointing.snapshot import all_slices, held_slices
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ConfigError, print_warning

Read = Callable[[Sequence[WantedSlice]], None]
VOCABULARY_TENSORS = {"embedding.weight", "head.weight"}  # with a row for each token


def find_resume_point(config: RunConfig, *, world: World, opened: Checkpoint | None = None) -> Checkpoint | None:
    """The newest good checkpoint of the run's folder; None for a new run. Collective.

    Args:
        opened: the one that the main rank has found already; nothing is then read again.

    Raises:
        CheckpointsDamagedError: every checkpoint is damaged.
        ConfigError: the checkpoint holds another model.
    """
    # One rank reads the checksums for all.
    checkpoint = world.of_main(lambda: opened or _newest(Path(config.run.dir)))
    if checkpoint:
        # A checkpoint of an older version lacks the keys that came since, which had no other value than the default.
        saved = _saved_model(checkpoint)
        for key, value in config.model.model_dump().items():
            if saved[key] != value:
                raise ConfigError(
                    f"model.{key} is {value!r} and {checkpoint.path} was saved with {saved[key]!r}: restore the "
                    "key or start a new run with another run.dir"
                )
        kind = checkpoint.state["config"].get("optimizer", {}).get("kind", config.optimizer.kind)
        if kind != config.optimizer.kind:
            raise ConfigError(
                f"optimizer.kind is {config.optimizer.kind} and {checkpoint.path} was saved with {kind}, whose state "
                "it cannot go on from: restore the key, or start a new run with train.init_from"
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


def _newest(run_dir: Path) -> Checkpoint | None:
    return files.newest_checkpoint(run_dir, warn=print_warning) if files.checkpoint_folders(run_dir) else None


def check_data(checkpoint: Checkpoint, record: dict[str, Any], *, config: RunConfig) -> None:
    """Compares what a checkpoint says of the data with what is there now.

    Raises:
        ConfigError: the samples to come would not be those that the run had before it; unless data.allow_changed.
    """
    changed = data_change(checkpoint.state.get("data"), record, samples=checkpoint.state.get("samples", 0))
    if changed and not config.data.allow_changed:
        raise ConfigError(
            f"{changed} since {checkpoint.path} was saved: restore it, or set data.allow_changed=true to go on with it "
            "as it is now"
        )


def load_weights(chunks: Sequence[nn.Module], path: Path, *, world: World) -> None:
    """Fills parameters, on any layout, before the engine takes them over. Collective."""
    _fill(chunks, _from_checkpoint(path, world=world), world=world)


def load_initial_weights(
    chunks: Sequence[nn.Module], weights: InitialWeights, config: RunConfig, *, world: World
) -> None:
    """Fills parameters, on any layout, with the weights that a new run starts from. Collective.

    Rows of a grown vocabulary are drawn as those of a new model of the run's seed are.

    Raises:
        CheckpointError: on every rank, when one of them cannot read what it needs.
    """
    rows = None
    if weights.vocab_size < config.model.vocab_size:
        rows = weights.vocab_size
        for chunk in chunks:
            initialize_parameters(chunk, seed=config.run.seed)
    if weights.is_checkpoint:
        read = _from_checkpoint(weights.path, world=world)
    else:
        read = partial(_read_other_model, weights.path, config.model, world=world)
    _fill(chunks, read, world=world, vocabulary_rows=rows)


def _from_checkpoint(path: Path, *, world: World) -> Read:
    return partial(read_slices, stored_slices(path, world=world), world=world)


def _read_other_model(path: Path, model: ModelConfig, wanted: Sequence[WantedSlice], *, world: World) -> None:
    """Fills this rank's targets from a Hugging Face folder or a .pth file, one tensor in memory at a time."""
    from sambalm.pretrain.checkpointing.other_models import open_other_model  # which imports transformers

    def read() -> None:
        state = open_other_model(path, assumed=reference_sizes(model)).state
        for name, slices in itertools.groupby(sorted(wanted, key=_name), key=_name):
            whole = state.read(name.removeprefix(f"{WEIGHT}."))
            for one in slices:
                region = (slice(o, o + n) for o, n in zip(one.offsets, one.target.shape, strict=True))
                one.target.copy_(whole[tuple(region)])

    read_together(read, world=world, source=f"train.init_from {path}")


def _name(wanted: WantedSlice) -> str:
    return wanted.name


def _fill(chunks: Sequence[nn.Module], read: Read, *, world: World, vocabulary_rows: int | None = None) -> None:
    """Fills parameters by what reads rectangles of canonical tensors; of replicas one reads each parameter. Collective.

    Args:
        vocabulary_rows: of embedding and head that are read; None for all.
    """
    parameters = list(dict.fromkeys(parameter for chunk in chunks for parameter in chunk.parameters()))
    dealt = readers(parameters, ranks=world.replica_size)
    mine = {parameter for parameter, rank in zip(parameters, dealt, strict=True) if rank == world.replica_rank}
    wanted = []
    for name, parameter, piece in all_slices(chunks):
        target = piece.of_local(parameter.data)
        if vocabulary_rows is not None and name in VOCABULARY_TENSORS:
            target = target[: max(0, vocabulary_rows - piece.offsets[0])]
        if parameter in mine and target.numel():
            wanted.append(WantedSlice(f"{WEIGHT}.{name}", piece.offsets, target))
    read(wanted)
    send_to_replicas([parameter.data for parameter in parameters], dealt, world=world)


def load_moments(chunks: Sequence[nn.Module], path: Path, *, world: World) -> None:
    """Fills what this rank steps of the optimizer's moments, once the engine has taken the parameters over. Collective.

    Zeros that align a parameter stay as the engine has made them.
    """
    wanted = []
    for name, parameter, piece in all_slices(chunks):
        held = held_tensors(parameter)
        for offsets, part in held_slices(parameter, piece):
            wanted += [WantedSlice(f"{key}.{name}", offsets, part(held[key])) for key in info_of(parameter).moments]
    read_slices(stored_slices(path, world=world), wanted, world=world)


def load_fp8_scales(chunks: Sequence[nn.Module], scales: Mapping[str, list[float]]) -> None:
    """Sets the scales of products in FP8, as `snapshot.fp8_scales` gave them; none where a run had none."""
    for name, parameter, _ in all_slices(chunks):
        product = info_of(parameter).fp8
        if product and name in scales:
            product.load(scales[name])
