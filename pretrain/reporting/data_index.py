"""Checking the data of a run ahead of its start, and showing what the run will draw from it."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.inspection import Inspector
from sambalm.data_pipeline.sources import check_separate, check_vocabulary, open_sources
from sambalm.pretrain.config import RunConfig


def describe_sample(config: RunConfig, number: int, *, tokenizer: Path | None) -> str:
    """A training sample of a run as text, with the borders of its documents and the source that it comes from.

    Args:
        number: from 0, in the order in which the run reads them.
        tokenizer: None: the one that the config or the manifest of its source names.

    Raises:
        DataError: the data are missing or damaged, or no tokenizer is known.
    """
    data = config.data.model_copy(update={"reset_at_document": True})  # which asks for the borders
    sources = open_sources(data)
    dataset = build_train_dataset(data, sources, seed=config.run.seed)
    sample = dataset[number]
    assert sample.document_starts is not None, "reset_at_document asks for them"
    inspector = Inspector(config.data.prefixes[0], tokenizer=tokenizer or config.data.tokenizer_path())
    shard, position = dataset.token_place(number, 0)
    text = inspector.sample(sample.tokens.numpy(), sample.document_starts.numpy())
    return f"sample {number} of {config.run.dir}: from byte {position:,} of {shard}\n{text}"


def index_data(config: RunConfig, *, progress: Callable[[int, int | None], None]) -> None:
    """Makes the index of every source that lacks one, and prints sources and draws.

    Raises:
        DataError: a shard is missing or damaged, or holds an id outside the vocabulary.
    """
    sources = open_sources(config.data, progress=progress)
    separate = config.data.separate_validation
    validation = open_sources(separate, progress=progress) if separate else []
    check_vocabulary(config.data, [*sources, *validation], vocab_size=config.model.vocab_size)
    check_separate(sources, validation)
    dataset = build_train_dataset(config.data, sources, seed=config.run.seed)
    samples = config.run_tokens // config.data.sequence_length
    table = Table(title=f"Training data of {config.run.dir}: {config.run_tokens:,} tokens", title_justify="left")
    for number, column in enumerate(("source", "shards", "training tokens", "held-out tokens", "share", "epochs")):
        table.add_column(column, justify="right" if number else "left")
    total = sum(source.weight for source in sources)
    for source, epochs in zip(sources, dataset.epochs(samples), strict=True):
        table.add_row(
            source.prefix,
            f"{len(source.shards):,}",
            f"{source.tokens(held_out=False):,}",
            f"{source.tokens(held_out=True):,}",
            f"{source.weight / total:.2%}",
            f"{epochs:.2f}",
        )
    for source in validation:
        tokens = f"{source.tokens(held_out=False):,}"
        table.add_row(source.prefix, f"{len(source.shards):,}", "0", tokens, "validation", "")
    Console().print(table)
    for source, packing in zip(sources, dataset.packings, strict=True):
        if packing:
            share = packing.tokens / (len(packing) * (config.data.sequence_length + 1))
            cut = f"; {packing.cut_documents:,} documents are longer, and cut off" if packing.cut_documents else ""
            print(f"{source.prefix}: {len(packing):,} samples of whole documents, which fill {share:.1%} of them{cut}")
