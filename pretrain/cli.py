"""The program `sambalm`. Commands import what they need when they run, so that help appears at once."""

import json
import os
import sys
import time
import warnings
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli_examples import example
from sambalm.pretrain.cli_slurm import slurm

app = typer.Typer(
    name="sambalm",
    help="Pretrain Samba language models (Mamba + sliding-window attention), from text to a Hugging Face model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data = typer.Typer(no_args_is_help=True, help="Text to tokenizer to indexed shards of tokens.")
convert = typer.Typer(no_args_is_help=True, help="Checkpoints to other formats.")
app.add_typer(data, name="data")
app.add_typer(convert, name="convert")
app.add_typer(slurm, name="slurm")


def main() -> None:
    """Runs the program. An error that carries an `exit_code` is the user's to mend: one sentence, no traceback."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")  # optional, as megatron-core says
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        _print_error(error)
        sys.exit(exit_code)


def _print_error(error: Exception) -> None:
    """Once for a whole run where every rank meets the same error, which is before their process group exists."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # torchrun's summary at its end shows the message of the rank that failed first
        Path(report).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    rank = os.environ.get("RANK")
    if rank is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            print(f"error on rank {rank}: {error}", file=sys.stderr)
            return
    if rank in (None, "0"):
        print(f"error: {error}", file=sys.stderr)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"sambalm {version('sambalm')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


TextKey = Annotated[str, typer.Option(help="Key of the text in each JSON line, or Parquet column.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="Text: .jsonl or .txt, also .gz or .zst, or .parquet; a path, a quoted glob, a URL such as s3://..., or "
        "@FILE with one of these a line; may be repeated.",
    ),
]
MoreInputs = Annotated[list[str] | None, typer.Argument(metavar="[MORE INPUTS]...", help="Further input files.")]


@data.command("python-corpus", epilog=example("sambalm data python-corpus corpus.jsonl"))
def python_corpus(
    output: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the documents' order.")] = 0,
) -> None:
    """Gather the documentation and sources of this Python installation as JSONL: real text that every machine has."""
    from sambalm.data_pipeline.corpus import write_python_corpus

    with _Progress("gathering") as progress:
        summary = write_python_corpus(output, seed=seed, progress=progress)
    print(f"{output}: {summary.documents:,} documents, {summary.text_bytes / 1e6:.1f} MB of text")


@data.command(
    "tokenizer",
    epilog=example("sambalm data tokenizer --input 'text/*.jsonl' --vocab-size 32000 --output tokenizer.model"),
)
def tokenizer(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(min=260, help="Pieces of the vocabulary, the 256 bytes included.")],
    output: Annotated[Path, typer.Option(help="The SentencePiece model file to write.")],
    more_inputs: MoreInputs = None,
    text_key: TextKey = "text",
) -> None:
    """Train a SentencePiece BPE tokenizer with byte fallback."""
    from sambalm.data_pipeline.tokenizer_training import train_tokenizer

    with _Progress("training the tokenizer") as progress:
        train_tokenizer(
            [*inputs, *(more_inputs or [])],
            vocab_size=vocab_size,
            output=output,
            text_key=text_key,
            progress=progress,
        )
    print(f"{output}: {vocab_size:,} pieces")


class OnError(StrEnum):
    """What a malformed record does."""

    stop = "stop"
    skip = "skip"


class TextDocuments(StrEnum):
    """What a document is in a .txt file."""

    file = "file"
    line = "line"


@data.command(
    "preprocess",
    epilog=example(
        "sambalm data preprocess --input 'text/*.jsonl.zst' --tokenizer tokenizer.model --output data/text --workers 8",
        "sambalm data preprocess --input @files.txt --tokenizer tokenizer.json --output data/text --part 3/16",
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
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens after which a new shard begins.")] = 2**30,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Of N machines' shares of the input, number I from 0.")
    ] = "0/1",
    on_error: Annotated[
        OnError, typer.Option(help="At a malformed record: stop, or skip and count it.")
    ] = OnError.stop,
    text_key: TextKey = "text",
    text_documents: Annotated[
        TextDocuments, typer.Option(help="In .txt files, a document is a whole file or a line.")
    ] = (TextDocuments.file),
    eos: Annotated[bool, typer.Option(help="End each document with the tokenizer's end-of-text token.")] = True,
    eos_token: Annotated[str | None, typer.Option(help="That token, where the tokenizer does not name it.")] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Let special tokens written out in the text become their ids.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the prefix holds.")] = False,
) -> None:
    """Tokenise documents into megatron-core's indexed shards, in input order, an end-of-text after each.

    Killed and run again, it goes on after the last complete shard.
    """
    from sambalm.data_pipeline.parts import Part
    from sambalm.data_pipeline.preprocess import preprocess as run

    with _Progress("tokenising") as progress:
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
        )
    print(summary.describe(output))


Prefix = Annotated[Path, typer.Argument(metavar="PREFIX", help="What the data was preprocessed to.")]


@data.command("verify", epilog=example("sambalm data verify data/text"))
def verify(
    prefix: Prefix,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Of data without a manifest.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="one a core")] = None,
) -> None:
    """Read every byte of the shards and compare it with the manifest and the vocabulary; exit code 1 for damage."""
    from sambalm.data_pipeline.verify import verify as run

    with _Progress("verifying") as progress:
        cores = len(os.sched_getaffinity(0))
        found = run(prefix, vocab_size=vocab_size, workers=workers or cores, progress=progress)
    for problem in found.problems:
        print(problem)
    if found.problems:
        raise typer.Exit(1)
    print(f"{prefix}: sound; shards: {found.shards:,}, tokens: {found.tokens:,}")


@data.command("inspect", epilog=example("sambalm data inspect data/text", "sambalm data inspect data/text --sample 0"))
def inspect(
    prefix: Prefix,
    document: Annotated[int | None, typer.Option(min=0, help="Show this document, counted from 0.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Show this training sample of a run on PREFIX alone.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of that sample.")] = 4096,
    seed: Annotated[int, typer.Option(help="That run's seed.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Default: the one that the manifest names.")] = None,
) -> None:
    """Show statistics of a prefix, a document, or a training sample as text with the borders of its documents."""
    from sambalm.data_pipeline.inspection import Inspector

    inspector = Inspector(prefix, tokenizer=tokenizer)
    if document is not None:
        print(inspector.document(document))
    if sample is not None:
        from sambalm.data_pipeline.config import DataConfig
        from sambalm.data_pipeline.dataset import build_train_dataset
        from sambalm.data_pipeline.sources import open_sources

        config = DataConfig(train=str(prefix), sequence_length=sequence_length, reset_at_document=True)
        tokens, _, starts = build_train_dataset(config, open_sources(config), seed=seed)[sample]
        print(inspector.sample(tokens.numpy(), starts.numpy()))
    if document is None and sample is None:
        with _Progress("counting") as progress:
            found = inspector.statistics(progress=progress)
        print(inspector.describe(found))


@data.command("blend", epilog=example("sambalm data blend data/web=0.7 data/code=0.3 --tokens 20e9"))
def blend(
    sources: Annotated[list[str], typer.Argument(metavar="PREFIX=WEIGHT...", help="Without weights: by their tokens.")],
    tokens: Annotated[float, typer.Option(min=1, help="Training tokens of the run.")],
    validation_fraction: Annotated[float, typer.Option(min=0.001, max=0.99, help="Held-out fraction.")] = 0.01,
) -> None:
    """Show how many tokens and epochs a run will draw from each source, from the manifests alone."""
    from sambalm.data_pipeline.blend import blend_draws, describe_draws, parse_blend

    config = parse_blend(sources, validation_fraction=validation_fraction)
    print(describe_draws(blend_draws(config, tokens=round(tokens))))


@data.command("index", epilog=example("sambalm data index configs/samba_421m.yaml data.train=data/slimpajama"))
def index(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
) -> None:
    """Check a run's shards ahead of time, so that no GPU waits for it, and show what the run draws from each source."""
    from sambalm.pretrain.config import load_config
    from sambalm.pretrain.data_index import index_data

    checked = load_config(config, overrides or [])
    with _Progress("checking shards") as progress:
        index_data(checked, progress=progress)


@app.command(
    epilog=example(
        "sambalm train configs/demo.yaml train.steps=50",
        "torchrun --nproc-per-node 8 -m sambalm.pretrain.cli train configs/samba_421m.yaml data.train=data/slimpajama",
    )
)
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; docs/config.md lists its keys.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config for its world and exit.")] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to check for with --dry-run; default: torchrun's.")
    ] = None,
) -> None:
    """Train a model, alone or under torchrun; goes on from the run folder's newest checkpoint."""
    from sambalm.pretrain.signals import Signals

    signals = Signals()
    if not dry_run:
        signals.listen()  # before the slow imports, so that a signal meets them too
    from sambalm.pretrain.config import load_config

    checked = load_config(config, overrides or [])
    if dry_run:
        from sambalm.pretrain.plan import describe_run

        print(describe_run(checked, world_size=world_size or int(os.environ.get("WORLD_SIZE", 1))))
        return
    if world_size is not None:
        raise typer.BadParameter("--world-size goes with --dry-run; torchrun says how many ranks train")
    from sambalm.pretrain.trainer import train as run

    raise typer.Exit(run(checked, signals=signals))


class Device(StrEnum):
    """What a cluster is made of."""

    h100 = "h100"
    h200 = "h200"
    a100 = "a100"


@app.command(epilog=example("sambalm plan configs/samba_3.8b.yaml --gpus 512 --gpu-memory-gib 80"))
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; its layout and micro-batch size are searched.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the cluster.")],
    gpu_memory_gib: Annotated[float, typer.Option(min=1.0, help="Memory of each GPU in GiB.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
    device: Annotated[Device, typer.Option(help="The kind of GPU.")] = Device.h100,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
) -> None:
    """Estimate memory, speed and traffic of the layouts that fit a cluster, fastest first."""
    from sambalm.pretrain.config import load_config
    from sambalm.pretrain.plan import find_plans
    from sambalm.pretrain.plan_hardware import DEVICES
    from sambalm.pretrain.plan_table import print_plans

    hardware = DEVICES[device.value]
    plans = find_plans(
        load_config(config, overrides or []), world_size=gpus, memory_gib=gpu_memory_gib, hardware=hardware
    )
    print_plans(plans[:top])


class Precision(StrEnum):
    """Dtype of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"


@convert.command("to-hf", epilog=example("sambalm convert to-hf runs/demo runs/demo/hf"))
def to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder: its newest good one.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    precision: Annotated[Precision, typer.Option(help="Of the weights; A_log, D and dt biases stay fp32.")] = (
        Precision.fp32
    ),
    documents: Annotated[
        str | None, typer.Option(help="JSONL files to verify on, a glob; default: the run's held-out documents.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model; default: the run's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Convert a checkpoint to the Hugging Face format, and verify logits and tokenizer before it appears."""
    from sambalm.pretrain.convert import checkpoint_to_hf

    with _Progress("converting") as progress:
        taken = checkpoint_to_hf(
            checkpoint,
            output,
            precision=precision.value,
            documents=documents,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    print(f"{output}: step {taken.step}, verified against the training model and the tokenizer")


@app.command(epilog=example("sambalm generate runs/demo/hf --prompt 'def main('"))
def generate(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A folder that `sambalm convert to-hf` wrote.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass to sample from.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt with a converted model."""
    from sambalm.pretrain.generation import generate_text

    generate_text(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        write=lambda text: print(text, end="", flush=True),
    )
    print()


@app.command(epilog=example("sambalm params configs/samba_3.8b.yaml"))
def params(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file's.")] = None,
) -> None:
    """Count a model's parameters by part and in total."""
    from sambalm.model.parameters import count_parameters
    from sambalm.pretrain.config import load_config

    counts = count_parameters(load_config(config, overrides or []).model)
    for part, count in counts.items():
        print(f"{part:<16}{count:>14}")


@app.command(epilog=example("sambalm report runs/demo"))
def report(run_dir: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Summarise a run beside simple baselines, and draw its losses to RUN_DIR/loss.png."""
    from sambalm.pretrain.report import print_report

    print_report(run_dir)


class _Progress:
    """A progress bar that library functions drive by calling it with (done, total)."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> "_Progress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int | None) -> None:
        self._progress.update(self._task, completed=done, total=total)


if __name__ == "__main__":
    main()
