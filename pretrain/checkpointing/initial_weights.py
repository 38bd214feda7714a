"""The given weights that a new run starts from (`train.init_from`), instead of drawing its own.

They are found and checked before any work begins, by one process for all. Optimizer, schedule, step and data order are
those of any new run. A run that has a checkpoint goes on from that, and never from here again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.files import sha256_file
from sambalm.data_pipeline.shards import read_manifest
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.config import ModelConfig
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.format import Checkpoint, checkpoint_folders, newest_checkpoint
from sambalm.pretrain.checkpointing.saved_config import saved_model, saved_run
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import CheckpointError, ConfigError, print_warning

if TYPE_CHECKING:
    from sambalm.model.hf.lit_gpt import ReferenceSizes

STARTED_FROM = "started_from"  # of a checkpoint's state
_SHOWN_DIGITS = 12  # of a SHA-256
_NAMED_PIECES = ("sentencepiece", "huggingface")  # kinds of tokenizers that write an id's piece alike
_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class InitialWeights:
    """Weights that fit a run's model, and where they lie.

    Attributes:
        given: what `train.init_from` says.
        path: the checkpoint, the Hugging Face folder or the file that holds them.
        step: of a checkpoint; None for a model that no run of ours has saved.
        sha256: over a checkpoint's manifest, which has the checksums of all its files, or over the files with weights.
        vocab_size: theirs, which a model with a grown vocabulary exceeds.
        is_checkpoint: whether `path` is a checkpoint of ours.
    """

    given: str
    path: Path
    step: int | None
    sha256: str
    vocab_size: int
    is_checkpoint: bool

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {
            "init_from": self.given,
            "path": str(self.path),
            "step": self.step,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
        }


def described(record: Mapping[str, Any]) -> str:
    """What a run started from, in words, of `InitialWeights.record`."""
    step = "" if record["step"] is None else f"step {record['step']}, "
    return f"{record['path']} ({step}SHA-256 {record['sha256'][:_SHOWN_DIGITS]}...)"


def find_initial_weights(config: RunConfig) -> InitialWeights | None:
    """Finds what a new run starts from; None where it draws its weights, or has a checkpoint. For one process alone.

    Raises:
        ConfigError: the weights cannot be read or do not fit the run's model, or its data have another tokenizer.
    """
    if config.train.init_from is None or checkpoint_folders(Path(config.run.dir)):
        return None
    source = Path(config.train.init_from)
    if not source.exists():
        raise ConfigError(
            f"train.init_from is {source}, which does not exist: give a run folder, a checkpoint, a Hugging Face "
            "folder or a .pth file of microsoft/Samba"
        )
    is_other = source.is_file() or (source / "config.json").is_file()
    return _of_other_model(source, config) if is_other else _of_checkpoint(source, config)


def check_started_from(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Holds the checkpoint that a run goes on from against `train.init_from`.

    Raises:
        ConfigError: the run did not start from there.
    """
    record = checkpoint.state.get(STARTED_FROM)
    if config.train.init_from is None or (record and record["init_from"] == config.train.init_from):
        return
    started = f"started from {record['init_from']}" if record else "did not start from it"
    raise ConfigError(
        f"train.init_from is {config.train.init_from}, and the run in {config.run.dir}, which goes on from "
        f"{checkpoint.path}, {started}: leave the key out to go on, or start a new run with another run.dir"
    )


def reference_sizes(model: ModelConfig) -> "ReferenceSizes":
    """What a .pth file's model is taken for where no shape and no name in it tells."""
    from sambalm.model.hf.lit_gpt import ReferenceSizes

    return ReferenceSizes(model.num_query_heads, model.window)


def _of_checkpoint(source: Path, config: RunConfig) -> InitialWeights:
    try:
        checkpoint = newest_checkpoint(source, warn=print_warning)
        model, tokenizers = saved_model(checkpoint), tokenizers_of(checkpoint)
    except CheckpointError as error:
        raise ConfigError(
            f"train.init_from is {source}, which is no Hugging Face folder (it has no config.json) and no run or "
            f"checkpoint to read: {error}"
        ) from None
    _check_model(model, config)
    if not config.train.grow_vocabulary:
        _check_hashes(tokenizers, config)
    return InitialWeights(
        given=str(config.train.init_from),
        path=checkpoint.path,
        step=checkpoint.step,
        sha256=sha256_file(checkpoint.path / files.MANIFEST),
        vocab_size=model.vocab_size,
        is_checkpoint=True,
    )


def _of_other_model(source: Path, config: RunConfig) -> InitialWeights:
    from sambalm.model.hf.folder import weight_files
    from sambalm.pretrain.checkpointing.other_models import open_other_model

    model = open_other_model(source, assumed=reference_sizes(config.model)).config
    _check_model(model, config)
    if source.is_dir():
        _check_pieces(source, config)
    read = [source] if source.is_file() else [source / "config.json", *weight_files(source)]
    digest = hashlib.sha256()
    for path in read:
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return InitialWeights(
        given=str(config.train.init_from),
        path=source,
        step=None,
        sha256=digest.hexdigest(),
        vocab_size=model.vocab_size,
        is_checkpoint=False,
    )


def _check_model(given: ModelConfig, config: RunConfig) -> None:
    """
    Raises:
        ConfigError: the run's model is another one than the weights'.
    """
    path, wanted, grows = config.train.init_from, config.model, config.train.grow_vocabulary
    for key in wanted.keys_of_weights():
        ours, theirs = getattr(wanted, key), getattr(given, key)
        if ours != theirs:
            name = "dt_rank" if key == "dt_rank_size" else key
            raise ConfigError(
                f"model.{name} is {ours!r} and the weights of train.init_from {path} have {theirs!r}: make them the "
                "same, or take other weights"
            )
    if wanted.vocab_size < given.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {wanted.vocab_size}, fewer than the {given.vocab_size} of the weights of "
            f"train.init_from {path}, and no token can be left out: raise it to that, or to more with "
            "train.grow_vocabulary=true"
        )
    if wanted.vocab_size > given.vocab_size and not grows:
        raise ConfigError(
            f"model.vocab_size is {wanted.vocab_size} and the weights of train.init_from {path} have "
            f"{given.vocab_size}: set it to that, or train.grow_vocabulary=true to draw new rows for the tokens that "
            "they lack"
        )
    for key in wanted.keys_beside_weights():
        ours, theirs = getattr(wanted, key), getattr(given, key)
        if ours != theirs:
            print_warning(
                f"model.{key} is {ours!r} and the weights of train.init_from {path} come from a model with {theirs!r}: "
                "they fit, and begin as another model than they were"
            )


def tokenizers_of(checkpoint: Checkpoint) -> set[str]:
    """Returns the SHA-256 of the tokenizer that made a checkpoint's data; empty where nothing tells it any more."""
    sources = checkpoint.state.get("data", {}).get("sources", ())
    found = {source["tokenizer"] for source in sources if source.get("tokenizer")}
    run = None if found else saved_run(checkpoint)
    for prefix in run.data.prefixes if run else ():  # of a checkpoint that does not hold it itself
        try:
            manifest = read_manifest(prefix)
        except DataError:
            continue
        found |= {manifest.tokenizer.sha256} if manifest else set()
    return found


def _check_hashes(given: set[str], config: RunConfig) -> None:
    """
    Raises:
        ConfigError: the run's data were made by another tokenizer than those that the weights were trained on.
    """
    for prefix in config.data.prefixes:
        manifest = read_manifest(prefix)
        if given and manifest and manifest.tokenizer.sha256 not in given:
            raise ConfigError(
                f"the tokenizer of {prefix} has SHA-256 {manifest.tokenizer.sha256[:_SHOWN_DIGITS]}... and the weights "
                f"of train.init_from {config.train.init_from} were trained on that of "
                f"{min(given)[:_SHOWN_DIGITS]}..., so that ids mean other text: preprocess the data with theirs, or "
                "set train.grow_vocabulary=true for a tokenizer that adds tokens to theirs"
            )


def _check_pieces(folder: Path, config: RunConfig) -> None:
    """Compares the tokenizers of a Hugging Face folder and of the run's data, id by id, where both can be read.

    Raises:
        ConfigError: an id stands for another piece of text; or the data have more ids, and may not.
    """
    theirs = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    ours = config.data.tokenizer_path()
    if theirs is None or ours is None or not ours.is_file():
        return
    given, wanted = load_tokenizer(theirs), load_tokenizer(ours)
    if not {given.kind, wanted.kind} <= set(_NAMED_PIECES):
        return
    for token_id in range(min(given.vocab_size, wanted.vocab_size)):
        if given.piece(token_id) != wanted.piece(token_id):
            raise ConfigError(
                f"token {token_id} is {given.piece(token_id)!r} in {theirs} and {wanted.piece(token_id)!r} in {ours}, "
                "the tokenizer of the data, so that ids mean other text: preprocess the data with the tokenizer of "
                "train.init_from"
            )
