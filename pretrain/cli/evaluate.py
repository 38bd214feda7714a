"""The command `sambalm evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.generate import Dtype
from sambalm.pretrain.cli.progress import ProgressBar

commands = typer.Typer()


def _list_tasks(wanted: bool) -> None:
    if wanted:
        from sambalm.evaluation.command import print_tasks

        print_tasks()
        raise typer.Exit


@commands.command(
    epilog=example(
        "sambalm evaluate runs/demo --task perplexity perplexity.lengths=[256,1K]",
        "sambalm evaluate runs/demo/hf --task sliding --data 'books/*.txt' sliding.length=64K",
        "sambalm evaluate runs/demo --task passkey --task needles passkey.lengths=[1K,4K] needles.seed=1",
    )
)
def evaluate(
    source: Annotated[
        Path, typer.Argument(help="A run, a checkpoint, or a Hugging Face folder of any causal language model.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="task.key=value, as in passkey.lengths=[4K,8K].")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="What to measure; may be repeated.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A prefix of token shards, or text files, for tasks that read; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for results; default: `evaluation` in the run, or one beside a Hugging Face folder."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read together, at most.")] = 16384,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the weights; auto: as stored, or on a GPU as the run trained.")
    ] = Dtype.auto,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer's file; default: the source's.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="The step of a run's checkpoint; default: the newest good one's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", callback=_list_tasks, is_eager=True, help="Show all tasks and their keys.")
    ] = False,
) -> None:
    """Measure a model: perplexity by length, and what it finds in long texts.

    Finished items are kept: the same command goes on after a kill. Each result is a folder with results.json and
    plot.png under --output.
    """
    from sambalm.evaluation.command import evaluate_model

    evaluate_model(
        source,
        tasks=task or [],
        overrides=overrides or [],
        data=data or [],
        output=output,
        batch_tokens=batch_tokens,
        device=device,
        dtype=None if dtype is Dtype.auto else dtype.value,
        tokenizer=tokenizer,
        step=step,
        as_json=as_json,
        bar=ProgressBar,
    )
