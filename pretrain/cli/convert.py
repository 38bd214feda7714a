"""The commands `sambalm convert ...`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.progress import ProgressBar

commands = typer.Typer()
convert = typer.Typer(no_args_is_help=True, help="Checkpoints to other formats.")
commands.add_typer(convert, name="convert")


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
    step: Annotated[
        int | None, typer.Option(min=0, help="The step of the checkpoint to take; default: the newest good one's.")
    ] = None,
    documents: Annotated[
        str | None, typer.Option(help="JSONL files to verify on, a glob; default: the run's held-out documents.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model; default: the run's.")] = None,
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
            overwrite=overwrite,
            progress=progress,
        )
    print(f"{output}: step {taken.step}, verified against the training model and the tokenizer")
