"""From a run's checkpoint to a Hugging Face folder."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.documents import read_documents
from sambalm.data_pipeline.inputs import expand_inputs
from sambalm.data_pipeline.stored_text import stored_documents
from sambalm.data_pipeline.tokenizer import Tokenizer
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.model_card import TrainingFacts
from sambalm.pretrain.checkpointing.format import Checkpoint, newest_checkpoint
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import CheckpointError
from sambalm.pretrain.precision import DTYPES
from sambalm.pretrain.reporting.metrics_file import read_metrics

VERIFIED_DOCUMENTS = 1000


def checkpoint_to_hf(
    path: Path,
    output: Path,
    *,
    precision: str,
    documents: str | None,
    tokenizer: Path | None,
    overwrite: bool,
    progress: Callable[[int, int | None], None],
) -> Checkpoint:
    """Exports and verifies a checkpoint, or the newest good one of a run folder; returns the one that it took.

    Args:
        documents: a glob of JSONL files to verify on; None: the run's own data, held-out documents first.
        tokenizer: a SentencePiece model; None: the one that the run's data names.

    Raises:
        CheckpointError, DataError, HFError: one sentence each, for the user.
    """
    disable_progress_bar()  # transformers' own, while the export is verified
    checkpoint = newest_checkpoint(path, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    config = parse_config(checkpoint.state["config"], source=str(checkpoint.path))
    tokenizer_path = tokenizer or config.data.tokenizer_path()
    if tokenizer_path is None:
        raise CheckpointError(f"{checkpoint.path} and its data name no tokenizer: give one with --tokenizer")
    export_hf(
        checkpoint,
        config.model,
        output=output,
        tokenizer_model=tokenizer_path,
        documents=_documents(documents, config.data, load_tokenizer(tokenizer_path)),
        dtype=DTYPES[precision],
        card=_facts(checkpoint, config),
        overwrite=overwrite,
        progress=progress,
    )
    return checkpoint


def _documents(pattern: str | None, data: DataConfig, tokenizer: Tokenizer) -> list[str]:
    texts = (
        stored_documents(data, tokenizer)
        if pattern is None
        else (document.text for file in expand_inputs([pattern]) for document in read_documents(file))
    )
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
