"""The command `sambalm serve`."""

from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.model_options import DeviceOption, Dtype, DtypeOption, StepOption, TokenizerOption

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
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.auto,
    tokenizer: TokenizerOption = None,
    step: StepOption = None,
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
        dtype=dtype.given,
        tokenizer=tokenizer,
        step=step,
    )
