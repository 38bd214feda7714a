"""The command `sambalm generate`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sambalm.pretrain.cli.examples import example
from sambalm.pretrain.cli.numbers import LARGEST_SEED, count
from sambalm.pretrain.cli.progress import ProgressBar

commands = typer.Typer()


class Dtype(StrEnum):
    """Dtype of the weights while they generate."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class _ReadingBar:
    """A progress bar while a prompt of several pieces is read, gone before text appears."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def __enter__(self) -> "_ReadingBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.__exit__()
            self._bar = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and done < total:
            self._bar = ProgressBar("reading the prompt").__enter__()
        if self._bar:
            self._bar(done, total)
        if done == total:
            self.__exit__()


@commands.command(
    epilog=example(
        "sambalm generate runs/demo/hf --prompt 'def main('",
        "sambalm generate runs/demo --prompt-file questions.txt --lines --json --temperature 0",
        "sambalm generate runs/demo --interactive",
    )
)
def generate(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a checkpoint, or a run folder: its newest good checkpoint.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A text to go on from; several are a batch.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A file with the prompt, less its final newline; - is stdin, the default.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Every line of the prompt file is a prompt.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Chat, by the tokenizer's template if it has one.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(parser=count(0), help="Tokens to generate at most; 0: without end.")
    ] = 100,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Continuations of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens to sample from; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Probability mass to sample from.")] = 0.95,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample no token less likely than this part of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, help="Above 1, tokens that were there before become less likely.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the first sample; the next has the next.")
    ] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of a text.")] = False,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each text.")] = False,
    state_in: Annotated[Path | None, typer.Option(help="Start from this state instead of from nothing.")] = None,
    state_out: Annotated[Path | None, typer.Option(help="Save the state after the text, to go on from.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the weights; auto: as stored, or on a GPU as the run trained.")
    ] = Dtype.auto,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer's file; default: the source's.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="The step of a run's checkpoint; default: the newest good one's.")
    ] = None,
) -> None:
    """Continue prompts with a model, or chat with it.

    Text appears as it is generated. Ctrl-C ends it and keeps what is there.
    """
    from sambalm.pretrain.generation.command import Request, generate_text
    from sambalm.pretrain.generation.prompts import read_prompts
    from sambalm.pretrain.generation.sampling import Sampling

    uses_stdin = not sys.stdin.isatty() and not interactive and not state_in
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = Request(
        prompts=read_prompts(prompt, prompt_file or ("-" if uses_stdin and not prompt else None), lines=lines),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        samples=samples,
        stops=tuple(stop or ()),
        ignore_eos=ignore_eos,
        echo=echo,
        as_json=as_json,
        interactive=interactive,
        state_in=state_in,
        state_out=state_out,
    )
    with _ReadingBar() as progress:
        code = generate_text(
            source,
            request,
            device=device,
            dtype=None if dtype is Dtype.auto else dtype.value,
            tokenizer=tokenizer,
            step=step,
            progress=progress,
        )
    raise typer.Exit(int(code))
