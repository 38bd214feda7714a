"""From prompts to texts: what `sambalm generate` does."""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sambalm.model.hf import Stream
from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.generation.chat import Conversation
from sambalm.pretrain.generation.errors import GenerationError
from sambalm.pretrain.generation.output import JsonWriter, Output, PlainWriter, interruptible
from sambalm.pretrain.generation.rows import Generation, Row, Settings
from sambalm.pretrain.generation.sampling import Sampler, Sampling
from sambalm.pretrain.generation.source import Source, load_source

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What to generate, and how to show it.

    Args:
        prompts: texts to go on from, or None: from `state_in` alone, and in a chat from the first line of stdin.
        samples: continuations of each prompt.
        ignore_eos: whether the tokens that end a text are generated as others are, and not shown.
        echo: whether a prompt is printed before its continuation.
        as_json: whether a line of JSON is printed for each text.
        state_in: a file with the state to start from; state_out: the file to leave the last one in.
    """

    prompts: Sequence[str] | None
    sampling: Sampling
    max_new_tokens: int = 100
    samples: int = 1
    stops: Sequence[str] = ()
    ignore_eos: bool = False
    echo: bool = True
    as_json: bool = False
    interactive: bool = False
    state_in: Path | None = None
    state_out: Path | None = None


def generate_text(
    path: Path,
    request: Request,
    *,
    device: str | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    step: int | None = None,
    progress: Progress | None = None,
) -> ExitCode:
    """Generates texts with a model and prints them; the arguments after the request are those of `load_source`.

    Args:
        progress: is told (tokens read, tokens in all) of each long prompt.

    Returns:
        INTERRUPTED after Ctrl-C, which ends the texts where they are, else FINISHED, also when stdout was closed.

    Raises:
        GenerationError, HFError, CheckpointError, DataError: one sentence each, for the user.
    """
    _refuse_contradictions(request)
    source = load_source(path, device=device, dtype=dtype, tokenizer=tokenizer, step=step)
    eos_ids = frozenset() if request.ignore_eos else source.eos_ids
    settings = Settings(request.sampling, request.max_new_tokens, request.stops, eos_ids)
    start = Stream.load(source.model, request.state_in) if request.state_in else Stream(source.model)
    if start.rows != 1:
        raise GenerationError(f"the state {request.state_in} holds {start.rows} texts; give one of a single text")
    if request.sampling.repetition_penalty != 1 and request.state_in and "known_ids" not in start.extras:
        raise GenerationError(
            f"the state {request.state_in} does not say which tokens it has read, which --repetition-penalty asks for; "
            "leave that out or give a state that `sambalm generate` saved"
        )
    if request.interactive:
        return _converse(source, start, settings, request, progress)
    return _continue(source, start, settings, request, progress)


def _refuse_contradictions(request: Request) -> None:
    several = request.samples > 1 or len(request.prompts or ()) > 1
    if several and (request.state_out or request.interactive):
        option = "--state-out" if request.state_out else "--interactive"
        raise GenerationError(f"{option} is for one text; give a single prompt and no --samples")
    if request.as_json and request.interactive:
        raise GenerationError("--json and --interactive exclude each other; leave one out")
    if request.state_out and not request.state_out.absolute().parent.is_dir():
        raise GenerationError(f"the folder of --state-out {request.state_out} does not exist; make it or give another")
    if request.prompts is None and not request.state_in and not request.interactive:
        raise GenerationError("there is no prompt: give --prompt, --prompt-file, --state-in, or text on stdin")


def _continue(
    source: Source, start: Stream, settings: Settings, request: Request, progress: Progress | None
) -> ExitCode:
    """Reads every prompt, and generates from all of them together."""
    prompts = [_prompt_ids(source, text, number, request) for number, text in enumerate(request.prompts or [""])]
    streams = []
    for ids in prompts:
        streams.append(start.fork() if len(prompts) > 1 else start)
        if ids:
            streams[-1].read(torch.tensor([ids]), progress=progress)
    places = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(request.samples)]
    stream = streams[0] if len(streams) == 1 else Stream.join(streams)
    if request.samples > 1:
        stream = stream.fork([prompt for prompt, _ in places])
    rows = [Row(settings, source.new_text(), prompt=prompt, sample=sample) for prompt, sample in places]
    sampler = Sampler(settings.sampling, samples=[sample for _, sample in places], device=source.model.device)
    output = Output()
    writer = JsonWriter(output, rows) if request.as_json else PlainWriter(output, rows)
    for number, row in enumerate(rows):
        prepare(row, start, sampler, number=number)
        ids = prompts[row.prompt]
        row.prompt_tokens = len(ids)
        sampler.note(number, ids)
        shown = row.read(ids, shown=request.echo and not request.as_json)
        if shown:
            writer.add(row, shown)
    generation = Generation(stream, rows, sampler)
    with interruptible() as interrupted:
        for row, text in generation.run(_either(interrupted, output)):
            writer.add(row, text)
        if request.state_out:
            generation.read_last()
            save_state(generation, request.state_out)
        return ExitCode.INTERRUPTED if interrupted() else ExitCode.FINISHED


def _prompt_ids(source: Source, text: str, number: int, request: Request) -> list[int]:
    ids = source.encode(text) if text else []
    if not ids and (request.prompts is not None or request.state_in is None):
        which = "the prompt" if len(request.prompts or ()) < 2 else f"prompt {number + 1}"
        raise GenerationError(f"{which} is empty: give at least one character to go on from")
    highest = max(ids, default=0)
    if highest >= source.model.config.vocab_size:
        raise GenerationError(
            f"the tokenizer gives the id {highest}, but the model's vocab_size is {source.model.config.vocab_size}: "
            "give the tokenizer that it was trained with"
        )
    return ids


def prepare(row: Row, start: Stream, sampler: Sampler, *, number: int) -> None:
    """Lets a row and the sampler know what was read before the state that a text starts from."""
    row.read(start.extras["tail"].tolist() if "tail" in start.extras else [], shown=False)
    sampler.note(number, start.extras["known_ids"].tolist() if "known_ids" in start.extras else [])


def save_state(generation: Generation, path: Path) -> None:
    """Saves the state of a generation of one row, with what the text after it depends on."""
    (row,) = generation.rows
    extras = {"tail": torch.tensor(list(row.tail)), "known_ids": torch.tensor(generation.sampler.known(0))}
    generation.stream.save(path, extras)


def _converse(
    source: Source, start: Stream, settings: Settings, request: Request, progress: Progress | None
) -> ExitCode:
    """Answers lines from stdin in turn, until it ends."""
    conversation = Conversation(source, start, settings, progress=progress)
    prepare(conversation.row, start, conversation.sampler, number=0)
    output, code = Output(), ExitCode.FINISHED
    for line in itertools.chain(request.prompts or (), _lines()):
        with interruptible() as interrupted:
            for text in conversation.answer(line, stopped=_either(interrupted, output)):
                output.write(text)
            output.write("\n")
        if interrupted() or output.closed:
            code = ExitCode.INTERRUPTED if interrupted() else code
            break
    if request.state_out and conversation.generation:
        save_state(conversation.generation, request.state_out)
    return code


def _either(interrupted: Callable[[], bool], output: Output) -> Callable[[], bool]:
    return lambda: interrupted() or output.closed


def _lines() -> Iterable[str]:
    """Yields the lines of stdin; asks for each on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
