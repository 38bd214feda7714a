"""From a run's checkpoint to a Hugging Face folder."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.documents import read_documents
from sambalm.data_pipeline.files import sync
from sambalm.data_pipeline.inputs import expand_inputs
from sambalm.data_pipeline.stored_text import stored_documents
from sambalm.data_pipeline.tokenizer import Tokenizer
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.hf.configuration_samba import SambaConfig
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.model_card import TrainingFacts
from sambalm.pretrain.checkpointing.format import Checkpoint, newest_checkpoint
from sambalm.pretrain.checkpointing.saved_config import saved_model, saved_run
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import CheckpointError, print_warning
from sambalm.pretrain.precision import DTYPES
from sambalm.pretrain.reporting.metrics_file import read_metrics

VERIFIED_DOCUMENTS = 1000


def checkpoint_to_hf(
    path: Path,
    output: Path,
    *,
    step: int | None,
    precision: str,
    documents: str | None,
    tokenizer: Path | None,
    overwrite: bool,
    progress: Callable[[int, int | None], None],
) -> Checkpoint:
    """Exports and verifies a checkpoint, or the newest good one of a run folder; returns the one that it took.

    Args:
        step: takes the checkpoint of this step and no other.
        documents: a glob of JSONL files to verify on; None: the run's own data, held-out documents first.
        tokenizer: a SentencePiece model; None: the one that the run's data names.

    Raises:
        CheckpointError, DataError, HFError: one sentence each, for the user.
    """
    disable_progress_bar()  # transformers' own, while the export is verified
    checkpoint = newest_checkpoint(path, step=step, warn=print_warning)
    run = saved_run(checkpoint)
    tokenizer_path = tokenizer or (run.data.tokenizer_path() if run else None)
    if tokenizer_path is None:
        raise CheckpointError(f"{checkpoint.path} and its data name no tokenizer: give one with --tokenizer")
    if documents is None and run is None:
        raise CheckpointError(f"{checkpoint.path} has no data: give texts to verify the export on with --documents")
    texts = _documents(documents, run.data if run else None, load_tokenizer(tokenizer_path))
    with new_hf_folder(output, overwrite=overwrite) as folder:
        export_hf(
            checkpoint,
            saved_model(checkpoint),
            folder=folder,
            tokenizer_model=tokenizer_path,
            documents=texts,
            dtype=DTYPES[precision],
            card=_facts(checkpoint, run) if run else TrainingFacts(),
            progress=progress,
        )
    return checkpoint


def _documents(pattern: str | None, data: DataConfig | None, tokenizer: Tokenizer) -> list[str]:
    """Returns texts of the files of a pattern; without one those of the data."""
    if pattern is not None:
        texts = (document.text for file in expand_inputs([pattern]) for document in read_documents(file))
    else:
        texts = stored_documents(data, tokenizer) if data else iter(())
    return list(itertools.islice(texts, VERIFIED_DOCUMENTS))


def _facts(checkpoint: Checkpoint, config: RunConfig) -> TrainingFacts:
    """What the run's own files say of the training."""
    records = {record["step"]: record for record in read_metrics(Path(config.run.dir))}
    record = records.get(checkpoint.step, {})
    optimizer = config.optimizer
    return TrainingFacts(
        tokens_seen=checkpoint.state["tokens"],
        step=checkpoint.step,
        loss=record.get("loss"),
        sequence_tokens=config.data.sequence_length,
        settings=(
            f"tokens a step: {config.train.global_batch_tokens}",
            f"precision: {config.train.precision} with fp32 weights and optimizer",
            f"AdamW, peak learning rate {optimizer.peak_lr}, {optimizer.schedule} schedule, "
            f"weight decay {optimizer.weight_decay}",
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
        raise HFError(f"the output folder {output} is not empty; choose another or allow it to be overwritten")
    if (exists and not _is_samba_folder(output)) or (output.exists() and not output.is_dir()):
        raise HFError(f"the output {output} is something else than a Samba folder; choose another")
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
            raise  # the checkpoint's, not the output's
        raise HFError(f"cannot write {output}: {error.strerror or error}; choose another output") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
