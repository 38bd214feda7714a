"""From a run's checkpoint to a Hugging Face folder."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from sambalm.data_pipeline.config import DataConfig, no_tokenizer
from sambalm.data_pipeline.documents import read_documents
from sambalm.data_pipeline.files import sync
from sambalm.data_pipeline.inputs import expand_inputs
from sambalm.data_pipeline.shards import check_tokenizer, read_manifest
from sambalm.data_pipeline.stored_text import stored_documents
from sambalm.data_pipeline.tokenizer import Tokenizer
from sambalm.data_pipeline.tokenizer_formats import TiktokenTokenizer, load_tokenizer
from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.export import check_convertible, export_hf
from sambalm.model.hf.model_card import TrainingFacts
from sambalm.model.hf.tiktoken import TiktokenFile
from sambalm.model.hf.tokenizer import TokenizerFile
from sambalm.pretrain.checkpointing.format import Checkpoint, newest_checkpoint
from sambalm.pretrain.checkpointing.initial_weights import STARTED_FROM, described
from sambalm.pretrain.checkpointing.saved_config import saved_model, saved_run
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import CheckpointError, one_sentence, print_warning
from sambalm.pretrain.precision import DTYPES
from sambalm.pretrain.reporting.metrics_file import read_metrics

VERIFIED_DOCUMENTS = 1000
EXPORT_DTYPES = DTYPES | {"fp16": torch.float16}
# What a Hugging Face folder consists of; all else in it is its owner's.
_MODEL_SUFFIXES = {".safetensors", ".json", ".py", ".model", ".jinja", ".tiktoken"}
_MODEL_FILES = {"__pycache__", "README.md", "merges.txt", "vocab.txt"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", re.IGNORECASE)


def checkpoint_to_hf(
    path: Path,
    output: Path,
    *,
    step: int | None,
    precision: str,
    documents: str | None,
    tokenizer: Path | None,
    shard_size: str,
    chat_template: Path | None,
    overwrite: bool,
    progress: Callable[[int, int | None], None],
) -> Checkpoint:
    """Exports and verifies a checkpoint, or the newest good one of a run folder; returns the one that it took.

    Args:
        step: takes the checkpoint of this step and no other.
        documents: a glob of JSONL files to verify on; None: the run's own data, held-out documents first.
        precision: a key of EXPORT_DTYPES.
        tokenizer: a file that training takes; None: the one that the run's data names.
        shard_size: of a file of weights at most, as "5GB" or "500MiB".
        chat_template: a file with a jinja template for conversations; None: that of the run's data, if they have one.

    Raises:
        CheckpointError, DataError, HFError: one sentence each, for the user.
    """
    disable_progress_bar()  # transformers' own, while the export is verified
    max_shard_bytes, given = size_bytes(shard_size), _read_template(chat_template)
    checkpoint = newest_checkpoint(path, step=step, warn=print_warning)
    run = saved_run(checkpoint)
    loaded = _load_tokenizer(tokenizer, run.data if run else None, name=str(checkpoint.path))
    if documents is None and run is None:
        raise CheckpointError(f"{checkpoint.path} has no data: give texts to verify the export on with --documents")
    texts = _documents(documents, run.data if run else None, loaded)
    with new_hf_folder(output, overwrite=overwrite) as folder:
        export_hf(
            checkpoint,
            saved_model(checkpoint),
            folder=folder,
            tokenizer_model=_tokenizer_file(loaded),
            token_ids=_token_ids(loaded, run.data if run else None),
            documents=texts,
            dtype=EXPORT_DTYPES[precision],
            max_shard_bytes=max_shard_bytes,
            chat_template=given or (run.data.chat_template() if run else None),
            card=_facts(checkpoint, run) if run else TrainingFacts(),
            progress=progress,
        )
    return checkpoint


def conversion_refusal(config: RunConfig) -> str | None:
    """Returns why `checkpoint_to_hf` would refuse a run's model or tokenizer; None where it would not.

    Weights, and the texts of the data, are not looked at.
    """
    data = config.data
    try:
        loaded = _load_tokenizer(None, data, name="the run")
        check_convertible(
            config.model,
            tokenizer_model=_tokenizer_file(loaded),
            token_ids=_token_ids(loaded, data),
            chat_template=data.chat_template(),
        )
    except Exception as error:  # the libraries raise bare ones, too, and the run can train after any
        return one_sentence(error)
    return None


def size_bytes(text: str) -> int:
    """Returns the bytes that a size says, such as "5GB" or "500MiB".

    Raises:
        HFError: it says none.
    """
    found = _SIZE.fullmatch(text.strip())
    number = float(found[1]) if found else 0.0
    unit = (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ") if found else 0
    if number * unit < 1:
        raise HFError(f"the shard size {text!r} is no size: give one as 5GB, 500MB or 2GiB")
    return int(number * unit)


def _read_template(path: Path | None) -> str | None:
    try:
        return path.read_text("utf-8") if path else None
    except (OSError, UnicodeDecodeError) as error:
        raise HFError(f"the chat template {path} cannot be read ({error}): give a text file with jinja") from error


def _load_tokenizer(path: Path | None, data: DataConfig | None, *, name: str) -> Tokenizer:
    """Loads a tokenizer, or the one that the data name, which must have made their tokens.

    Args:
        name: of what is converted.

    Raises:
        CheckpointError, DataError: one sentence each.
    """
    path = path or (data.tokenizer_path() if data else None)
    if path is None:
        raise CheckpointError(no_tokenizer(name, data))
    loaded = load_tokenizer(path)
    for prefix in data.prefixes if data else ():
        check_tokenizer(prefix, loaded)
    return loaded


def _tokenizer_file(tokenizer: Tokenizer) -> TokenizerFile:
    if isinstance(tokenizer, TiktokenTokenizer):
        return TiktokenFile(tokenizer.path, tokenizer.pattern, tokenizer.special_tokens)
    return tokenizer.path


def _token_ids(tokenizer: Tokenizer, data: DataConfig | None) -> dict[str, int | None]:
    """Returns the ids of bos and eos; eos is what ended the data's documents, where its manifest says it."""
    manifest = read_manifest(data.prefixes[0]) if data else None
    ids = {"bos": tokenizer.bos_id, "eos": manifest.tokenizer.eos_id if manifest else tokenizer.eos_id}
    return {name: index if index >= 0 else None for name, index in ids.items()}


def _documents(pattern: str | None, data: DataConfig | None, tokenizer: Tokenizer) -> list[str]:
    """Returns texts of the files of a pattern; without one those of the data."""
    texts: Iterable[str] = ()
    if pattern is not None:
        texts = (document.text for file in expand_inputs([pattern]) for document in read_documents(file))
    elif data:
        texts = stored_documents(data, tokenizer)
    return list(itertools.islice(texts, VERIFIED_DOCUMENTS))


def _facts(checkpoint: Checkpoint, config: RunConfig) -> TrainingFacts:
    """What the run's own files say of the training."""
    records = {record["step"]: record for record in read_metrics(Path(config.run.dir))}
    record = records.get(checkpoint.step, {})
    optimizer, begun = config.optimizer, checkpoint.state.get(STARTED_FROM)
    name = {"adamw": "AdamW", "muon": "Muon and AdamW"}[optimizer.kind]
    return TrainingFacts(
        tokens_seen=checkpoint.state["tokens"],
        step=checkpoint.step,
        loss=record.get("loss"),
        sequence_tokens=max(phase.length for phase in config.schedule.phases),
        settings=(
            f"tokens a step: {config.train.global_batch_tokens}",
            f"precision: {config.train.precision} with fp32 weights and optimizer",
            f"{name}, peak learning rate {optimizer.peak_lr}, {optimizer.schedule} schedule, "
            f"weight decay {optimizer.weight_decay}",
            *([f"started from the weights of {described(begun)}"] if begun else []),
        ),
    )


@contextmanager
def new_hf_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder that becomes `output` when the block ends, and vanishes when it raises.

    Args:
        overwrite: whether an existing Samba folder is replaced.

    Raises:
        HFError: `output` holds something else or cannot be written.
    """
    output = output.absolute()
    exists = output.is_dir() and any(output.iterdir())
    if exists and not overwrite:
        raise HFError(f"the output folder {output} is not empty; choose another, or replace it with --overwrite")
    if (exists and not _is_samba_folder(output)) or (output.exists() and not output.is_dir()):
        raise HFError(f"the output {output} is something else than a Samba folder; choose another")
    if own := _own_files(output) if exists else []:
        raise HFError(
            f"the output folder {output} also holds {own[0].name}, which is no file of a model and would be lost: move "
            "it away, or choose another output"
        )
    with appearing_folder(output) as folder:
        yield folder


@contextmanager
def appearing_folder(output: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `output` when the block ends, and vanishes when it raises.

    Raises:
        HFError: `output`, an absolute path, cannot be written.
    """
    folder = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process that had the same number
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in (*folder.iterdir(), folder):  # a rename alone may reach the disk before what it names
            sync(path)
        _put_into_place(folder, output)
    except OSError as error:
        if error.filename and not str(error.filename).startswith(str(output.parent)):
            raise  # of what is read, not of the output
        raise HFError(f"cannot write {output}: {error.strerror or error}; choose another output") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own_files(folder: Path) -> list[Path]:
    """What a folder holds besides the files of a model, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name not in _MODEL_FILES and (path.is_dir() or path.suffix not in _MODEL_SUFFIXES)
    )


def _is_samba_folder(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))["model_type"] == SambaConfig.model_type
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _put_into_place(folder: Path, output: Path) -> None:
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    if output.is_dir():
        os.rename(output, old)
    try:
        os.rename(folder, output)
    except OSError:
        if old.is_dir():
            os.rename(old, output)
        raise
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
