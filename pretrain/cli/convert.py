"""The commands `sambalm convert ...`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.progress import ProgressBar

commands = typer.Typer()
convert = typer.Typer(no_args_is_help=True, help="Checkpoints to other formats, and back.")
commands.add_typer(convert, name="convert")


class Precision(StrEnum):
    """Dtype of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@convert.command("to-hf", epilog=example("sambalm convert to-hf runs/demo runs/demo/hf"))
def to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder: its newest good one.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    precision: Annotated[
        Precision, typer.Option(help="Precision of the weights; A_log, D and dt biases stay fp32.")
    ] = (Precision.fp32),
    step: Annotated[
        int | None, typer.Option(min=0, help="The step of the checkpoint to take; default: the newest good one's.")
    ] = None,
    documents: Annotated[
        str | None, typer.Option(help="JSONL files to verify on, a glob; default: the run's held-out documents.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model; default: the run's.")] = None,
    shard_size: Annotated[str, typer.Option(help="Size of a file of weights at most, as 500MB or 2GiB.")] = "5GB",
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="A jinja file for conversations, whose control tokens are recognised; default: the data's, if any."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Convert a checkpoint to the Hugging Face format, and verify logits and tokenizer before it appears."""
    from sambalm.pretrain.checkpointing.to_hf import checkpoint_to_hf

    with ProgressBar("converting") as progress:
        taken = checkpoint_to_hf(
            checkpoint,
            output,
            step=step,
            precision=precision.value,
            documents=documents,
            tokenizer=tokenizer,
            shard_size=shard_size,
            chat_template=chat_template,
            overwrite=overwrite,
            progress=progress,
        )
    print(f"{output}: step {taken.step}, verified against the training model and the tokenizer")


@convert.command("from-hf", epilog=example("sambalm convert from-hf runs/demo/hf runs/again"))
def from_hf(
    source: Annotated[
        Path, typer.Argument(help="A Samba folder in the Hugging Face format, or a .pth file of microsoft/Samba.")
    ],
    output: Annotated[Path, typer.Argument(help="The run folder to make.")],
    query_heads: Annotated[
        int | None, typer.Option(min=1, help="Query heads, for a .pth file that names no model of the reference.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Attention window, for a .pth file that names no model of the reference.")
    ] = None,
) -> None:
    """Make a run folder of a model, to train it on: a checkpoint of step 0, verified, and the config's section model.

    A .pth file is read without executing any code of it.
    """
    from sambalm.pretrain.checkpointing.from_hf import MODEL_FILE, checkpoint_from_hf

    with ProgressBar("converting") as progress:
        checkpoint_from_hf(source, output, query_heads=query_heads, window=window, progress=progress)
    print(f"{output}: step 0, verified against {source}; {output / MODEL_FILE} is the section model of its config")
