"""The commands `sambalm data ...`."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.numbers import LARGEST_SAMPLE, count
from sambalm.pretrain.cli.progress import ProgressBar

commands = typer.Typer()
data = typer.Typer(no_args_is_help=True, help="Text to tokenizer to indexed shards of tokens.")
commands.add_typer(data, name="data")

TextKey = Annotated[str, typer.Option(help="Key of the text in each JSON line, or Parquet column.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="Text: .jsonl or .txt, also .gz or .zst, or .parquet; a path, a quoted glob, a URL such as s3://..., or "
        "@FILE with one of these a line; may be repeated.",
    ),
]
ReplaceFile = Annotated[bool, typer.Option("--overwrite", help="Replace the file where it exists.")]
MoreInputs = Annotated[list[str] | None, typer.Argument(metavar="[MORE INPUTS]...", help="Further input files.")]


@data.command("python-corpus", epilog=example("sambalm data python-corpus corpus.jsonl"))
def python_corpus(
    output: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the documents' order.")] = 0,
    overwrite: ReplaceFile = False,
) -> None:
    """Gather the documentation and sources of this Python installation as JSONL: real text that every machine has."""
    from sambalm.data_pipeline.corpus import write_python_corpus

    with ProgressBar("gathering") as progress:
        summary = write_python_corpus(output, seed=seed, overwrite=overwrite, progress=progress)
    print(f"{output}: {summary.documents:,} documents, {summary.text_bytes / 1e6:.1f} MB of text")


@data.command(
    "tokenizer",
    epilog=example("sambalm data tokenizer --input 'text/*.jsonl' --vocab-size 32000 --output tokenizer.model"),
)
def tokenizer(
    inputs: Inputs,
    vocab_size: Annotated[
        int, typer.Option(parser=count(260), help="Pieces of the vocabulary, the 256 bytes included.")
    ],
    output: Annotated[Path, typer.Option(help="The SentencePiece model file to write.")],
    more_inputs: MoreInputs = None,
    text_key: TextKey = "text",
    overwrite: ReplaceFile = False,
) -> None:
    """Train a SentencePiece BPE tokenizer with byte fallback."""
    from sambalm.data_pipeline.tokenizer_training import train_tokenizer

    with ProgressBar("training the tokenizer") as progress:
        train_tokenizer(
            [*inputs, *(more_inputs or [])],
            vocab_size=vocab_size,
            output=output,
            text_key=text_key,
            overwrite=overwrite,
            progress=progress,
        )
    print(f"{output}: {vocab_size:,} pieces")


class OnError(StrEnum):
    """What a malformed record does."""

    stop = "stop"
    skip = "skip"


class Loss(StrEnum):
    """Which tokens of a conversation count in the loss."""

    assistant = "assistant"
    all = "all"


class AnswerLoss(StrEnum):
    """Which tokens of a made document count in the loss."""

    answer = "answer"
    all = "all"


class TextDocuments(StrEnum):
    """What a document is in a .txt file."""

    file = "file"
    line = "line"


@data.command(
    "preprocess",
    epilog=example(
        "sambalm data preprocess --input 'text/*.jsonl.zst' --tokenizer tokenizer.model --output data/text --workers 8",
        "sambalm data preprocess --input @files.txt --tokenizer tokenizer.json --output data/text --part 3/16",
        "sambalm data preprocess --input 'text/*.jsonl' --tokenizer tokenizer.model --output data/text --shuffle 0",
        "sambalm data preprocess --input chats.jsonl --tokenizer tokenizer.model --output data/chats "
        "--chat-template configs/finetune/chat_template.jinja",
    ),
)
def preprocess(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece .model, Hugging Face tokenizer.json or .tiktoken.")],
    output: Annotated[Path, typer.Option(help="Prefix of the shards: OUTPUT_00000.bin, OUTPUT_00000.idx, ...")],
    more_inputs: MoreInputs = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read and tokenise.", show_default="one a core")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(parser=count(), help="Tokens after which a new shard begins.")] = 2**30,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Take share I of the input, counted from 0, where N machines share it.")
    ] = "0/1",
    on_error: Annotated[
        OnError, typer.Option(help="At a malformed record: stop, or skip and count it.")
    ] = OnError.stop,
    text_key: TextKey = "text",
    text_documents: Annotated[
        TextDocuments, typer.Option(help="What a document of a .txt file is: the whole file, or a line.")
    ] = (TextDocuments.file),
    eos: Annotated[bool, typer.Option(help="End each document with the tokenizer's end-of-text token.")] = True,
    eos_token: Annotated[
        str | None, typer.Option(help="The end-of-text token, where the tokenizer does not name it.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Let special tokens written out in the text become their ids.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="A jinja template: the input is JSONL with a list of messages on each line.")
    ] = None,
    messages_key: Annotated[str, typer.Option(help="Key of the messages, each with role and content.")] = "messages",
    loss: Annotated[
        Loss, typer.Option(help="The tokens of conversations to learn from: what the assistant says, or all.")
    ] = Loss.assistant,
    shuffle: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Store the documents in an order drawn from this seed.",
            min=0,
            show_default="input order",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the prefix holds.")] = False,
) -> None:
    """Tokenise documents into megatron-core's indexed shards, an end-of-text after each.

    Killed and run again, it goes on after the last complete shard.
    """
    from sambalm.data_pipeline.output import check_prefix
    from sambalm.data_pipeline.parts import Part
    from sambalm.data_pipeline.preprocess import preprocess as run
    from sambalm.pretrain.errors import Interrupted

    check_prefix(output)
    try:
        with ProgressBar("tokenising") as progress:
            summary = run(
                [*inputs, *(more_inputs or [])],
                tokenizer=tokenizer,
                output_prefix=output,
                part=Part.parse(part),
                overwrite=overwrite,
                progress=progress,
                workers=workers or len(os.sched_getaffinity(0)),
                shard_tokens=shard_tokens,
                text_key=text_key,
                text_documents=text_documents.value,
                append_eos=eos,
                eos_token=eos_token,
                special_tokens=special_tokens,
                on_error=on_error.value,
                chat_template=chat_template,
                messages_key=messages_key,
                loss=loss.value,
                shuffle_seed=shuffle,
            )
    except KeyboardInterrupt:
        raise Interrupted("stopped; complete shards are kept, and the same command goes on after them") from None
    print(summary.describe(output))


MadeTokenizer = Annotated[Path, typer.Option("--tokenizer", help="That of the model to train.")]
MadeOutput = Annotated[Path, typer.Option("--output", help="Prefix of the shards.")]
Documents = Annotated[int, typer.Option("--documents", parser=count(), help="How many to make.")]
MadeTokens = Annotated[
    int,
    typer.Option("--tokens", parser=count(), help="Tokens of a document at most, its end-of-text included."),
]
MadeSeed = Annotated[int, typer.Option("--seed", help="What the documents follow from.")]
MadeLoss = Annotated[AnswerLoss, typer.Option("--loss", help="The tokens that count: of answers alone, or all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the prefix holds.")]


@data.command(
    "passkey",
    epilog=example("sambalm data passkey --tokenizer tokenizer.model --output data/passkey --documents 100000"),
)
def passkey(
    tokenizer: MadeTokenizer,
    output: MadeOutput,
    documents: Documents,
    tokens: MadeTokens = 4096,
    seed: MadeSeed = 0,
    loss: MadeLoss = AnswerLoss.answer,
    overwrite: Overwrite = False,
) -> None:
    """Make documents that hide a key of five digits and ask for it at their end, as shards to train on."""
    _make("Passkey", tokenizer, output, documents=documents, tokens=tokens, seed=seed, loss=loss, overwrite=overwrite)


@data.command(
    "phonebook",
    epilog=example("sambalm data phonebook --tokenizer tokenizer.model --output data/phonebook --documents 50000"),
)
def phonebook(
    tokenizer: MadeTokenizer,
    output: MadeOutput,
    documents: Documents,
    tokens: MadeTokens = 4096,
    seed: MadeSeed = 0,
    loss: MadeLoss = AnswerLoss.answer,
    overwrite: Overwrite = False,
) -> None:
    """Make phone books that end in three of their names with the numbers to look up, as shards to train on."""
    _make("Phonebook", tokenizer, output, documents=documents, tokens=tokens, seed=seed, loss=loss, overwrite=overwrite)


def _make(
    kind: Literal["Passkey", "Phonebook"],
    tokenizer: Path,
    output: Path,
    *,
    documents: int,
    tokens: int,
    seed: int,
    loss: AnswerLoss,
    overwrite: bool,
) -> None:
    from sambalm.data_pipeline import made_documents as made
    from sambalm.data_pipeline.output import check_prefix

    check_prefix(output)
    config = made.MadeConfig(tokenizer, documents=documents, tokens=tokens, seed=seed, loss=loss.value)
    maker = made.Passkey() if kind == "Passkey" else made.Phonebook()
    with ProgressBar("making documents") as progress:
        manifest = made.make_documents(maker, config, output, overwrite=overwrite, progress=progress)
    total = sum(shard.tokens for shard in manifest.shards)
    print(f"{output}: {documents:,} documents, {total:,} tokens")


PrefixOrNone = Annotated[
    Path | None, typer.Argument(metavar="[PREFIX]", help="What the data was preprocessed to; none with --config.")
]
Prefix = Annotated[Path, typer.Argument(metavar="PREFIX", help="What the data was preprocessed to.")]


@data.command("verify", epilog=example("sambalm data verify data/text"))
def verify(
    prefix: Prefix,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Ids of the vocabulary, for data without a manifest.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="one a core")] = None,
) -> None:
    """Read every byte of the shards and compare it with the manifest and the vocabulary; exit code 1 for damage."""
    from sambalm.data_pipeline.verify import verify as run

    with ProgressBar("verifying") as progress:
        cores = len(os.sched_getaffinity(0))
        found = run(prefix, vocab_size=vocab_size, workers=workers or cores, progress=progress)
    for problem in found.problems:
        print(problem)
    if found.problems:
        raise typer.Exit(1)
    print(f"{prefix}: sound; shards: {found.shards:,}, tokens: {found.tokens:,}")


@data.command(
    "inspect",
    epilog=example("sambalm data inspect data/text", "sambalm data inspect --config configs/demo.yaml --sample 0"),
)
def inspect(
    prefix: PrefixOrNone = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A run's YAML file: --sample is one of that run, by its sources, sequence length and seed."),
    ] = None,
    document: Annotated[int | None, typer.Option(min=0, help="Show this document, counted from 0.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_SAMPLE, help="Show this training sample of a run on PREFIX alone."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of that sample.")] = 4096,
    seed: Annotated[int, typer.Option(help="That run's seed.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Default: the one that the manifest names.")] = None,
) -> None:
    """Show statistics of a prefix, a document, or a training sample as text with the borders of its documents."""
    if (prefix is None) == (config is None):
        raise typer.BadParameter("give either PREFIX or --config")
    if prefix is None:
        if sample is None or document is not None:
            raise typer.BadParameter("--config goes with --sample; a PREFIX has documents and statistics")
        from sambalm.pretrain.config_file import load_config
        from sambalm.pretrain.reporting.data_index import describe_sample

        assert config is not None, "one of the two is given"
        print(describe_sample(load_config(config), sample, tokenizer=tokenizer))
        return
    from sambalm.data_pipeline.inspection import Inspector

    inspector = Inspector(prefix, tokenizer=tokenizer)
    if document is not None:
        print(inspector.document(document))
    if sample is not None:
        from sambalm.data_pipeline.config import DataConfig
        from sambalm.data_pipeline.dataset import build_train_dataset
        from sambalm.data_pipeline.sources import open_sources

        own = DataConfig(train=str(prefix), sequence_length=sequence_length, reset_at_document=True)
        taken = build_train_dataset(own, open_sources(own), seed=seed)[sample]
        assert taken.document_starts is not None, "reset_at_document asks for them"
        print(inspector.sample(taken.tokens.numpy(), taken.document_starts.numpy()))
    if document is None and sample is None:
        with ProgressBar("counting") as progress:
            found = inspector.statistics(progress=progress)
        print(inspector.describe(found))


@data.command(
    "blend",
    epilog=example(
        "sambalm data blend data/web=0.7 data/code=0.3 --tokens 20e9", "sambalm data blend --config configs/demo.yaml"
    ),
)
def blend(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PREFIX=WEIGHT...]", help="Without weights: by their tokens; none with --config."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(parser=count(), help="Training tokens of the run, as 20B.")] = None,
    validation_fraction: Annotated[float, typer.Option(min=0.001, max=0.99, help="Held-out fraction.")] = 0.01,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="A run's YAML file: its sources, weights and tokens, by its phases.")
    ] = None,
) -> None:
    """Show how many tokens and epochs a run will draw from each source, from the manifests alone."""
    from sambalm.data_pipeline.blend import blend_draws, describe_draws, parse_blend

    if config_file is not None:
        if sources or tokens is not None:
            raise typer.BadParameter("--config has the run's sources and tokens: give neither beside it")
        from sambalm.pretrain.config_file import load_config
        from sambalm.pretrain.reporting.phases import describe_blend

        print(describe_blend(load_config(config_file)))
        return
    if not sources or tokens is None:
        raise typer.BadParameter("give either PREFIX=WEIGHT... and --tokens, or --config")
    config = parse_blend(sources, validation_fraction=validation_fraction)
    print(describe_draws(blend_draws(config, tokens=tokens)))


@data.command("index", epilog=example("sambalm data index configs/samba_421m.yaml data.train=data/slimpajama"))
def index(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
) -> None:
    """Check a run's shards ahead of time, so that no GPU waits for it, and show what the run draws from each source."""
    from sambalm.pretrain.config_file import load_config
    from sambalm.pretrain.reporting.data_index import index_data

    checked = load_config(config, overrides or [])
    with ProgressBar("checking shards") as progress:
        index_data(checked, progress=progress)
