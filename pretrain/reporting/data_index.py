"""Checking the data of a run ahead of its start, and showing what the run will draw from it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sambalm.data_pipeline.dataset import TrainDataset
from sambalm.data_pipeline.inspection import Inspector
from sambalm.data_pipeline.phases import DataPart, build_train_datasets
from sambalm.data_pipeline.sources import Source, check_separate, check_vocabulary, open_sources
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.data_parts import open_data, sources_of
from sambalm.pretrain.run_phases import phase_line
from sambalm.pretrain.validation import held_out_datasets


def describe_sample(config: RunConfig, number: int, *, tokenizer: Path | None) -> str:
    """A training sample of a run as text, with the borders of its documents and the source that it comes from.

    Args:
        number: from 0, in the order in which the run reads them.
        tokenizer: None: the one that the config or the manifest of its source names.

    Raises:
        DataError: the data are missing or damaged, or no tokenizer is known.
    """
    data = config.data.model_copy(update={"reset_at_document": True})  # which asks for the borders
    config = config.model_copy(update={"data": data})
    _, parts = open_data(config, open_sources)
    dataset = build_train_datasets(parts, seed=config.run.seed)[config.schedule.at(number).number]
    sample = dataset[number]
    assert sample.document_starts is not None, "reset_at_document asks for them"
    inspector = Inspector(config.data.prefixes[0], tokenizer=tokenizer or config.data.tokenizer_path())
    shard, position = dataset.token_place(number, 0)
    text = inspector.sample(sample.tokens.numpy(), sample.document_starts.numpy())
    return f"sample {number} of {config.run.dir}: from byte {position:,} of {shard}\n{text}"


def index_data(config: RunConfig, *, progress: Callable[[int, int | None], None]) -> None:
    """Makes the index of every source that lacks one, and prints sources and draws.

    Raises:
        DataError: a shard is missing or damaged, or holds an id outside the vocabulary, or the held-out parts are too
            short to validate on, after what was found of them is printed.
    """
    sources, parts = open_data(config, partial(open_sources, progress=progress))
    separate = config.data.separate_validation
    validation = open_sources(separate, progress=progress) if separate else []
    trained = sources_of(sources, parts)
    check_vocabulary(config.data, [*trained, *validation], vocab_size=config.model.vocab_size)
    check_separate(trained, validation)
    datasets = build_train_datasets(parts, seed=config.run.seed)
    for phase, part, dataset in zip(config.schedule.phases, parts, datasets, strict=True):
        title = f"Training data of {config.run.dir}: {phase.tokens:,} tokens"
        if config.schedule.is_phased:
            title = f"Training data of {config.run.dir}, {phase_line(config.schedule, phase)}"
        Console().print(_table(title, part, dataset, validation if phase.number == 0 else ()))
        _print_packing(part, dataset)
    held_out_datasets(config, sources)


def _table(title: str, part: DataPart, dataset: TrainDataset, validation: Sequence[Source]) -> Table:
    """What a run or a phase of it draws from each source."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(("source", "shards", "training tokens", "held-out tokens", "share", "epochs")):
        table.add_column(column, justify="right" if number else "left")
    total = sum(source.weight for source in part.sources)
    for source, epochs in zip(part.sources, dataset.epochs(part.samples), strict=True):
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
    return table


def _print_packing(part: DataPart, dataset: TrainDataset) -> None:
    for source, packing in zip(part.sources, dataset.packings, strict=True):
        if packing:
            share = packing.tokens / (len(packing) * (dataset.sequence_length + 1))
            cut = f"; {packing.cut_documents:,} documents are longer, and cut off" if packing.cut_documents else ""
            print(f"{source.prefix}: {len(packing):,} samples of whole documents, which fill {share:.1%} of them{cut}")
