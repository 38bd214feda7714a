"""The command `sambalm serve`."""

from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.generate import Dtype

commands = typer.Typer()


@commands.command(epilog=example("sambalm serve runs/demo/hf --port 8000"))
def serve(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a checkpoint, or a run folder: its newest good checkpoint.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: the source.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts to generate at once; others wait.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a text at most.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the weights; auto: as stored, or on a GPU as the run trained.")
    ] = Dtype.auto,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer's file; default: the source's.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="The step of a run's checkpoint; default: the newest good one's.")
    ] = None,
) -> None:
    """Serve a model to clients of OpenAI's interface: completions and chats, as they come or whole.

    There is no access control: who reaches the address can use the model.
    """
    from sambalm.pretrain.serving.command import serve_model

    serve_model(
        source,
        host=host,
        port=port,
        name=name,
        max_batch=max_batch,
        max_tokens=max_tokens,
        device=device,
        dtype=None if dtype is Dtype.auto else dtype.value,
        tokenizer=tokenizer,
        step=step,
    )
