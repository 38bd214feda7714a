"""Turns of a user and a model, in one stream that never reads a turn twice."""

from collections.abc import Callable, Iterator

import torch

from sambalm.model.hf import Stream
from sambalm.pretrain.generation.errors import GenerationError
from sambalm.pretrain.generation.rows import Generation, Row, Settings
from sambalm.pretrain.generation.sampling import Sampler
from sambalm.pretrain.generation.source import Source


class Conversation:
    """What was said so far, and the state of the model after it.

    With a chat template a line is a user's message and what the model generates is the answer. Without one a line is
    text with its newline, and the model goes on from it. `generation` is that of the last answer, None before it.
    """

    def __init__(
        self, source: Source, start: Stream, settings: Settings, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._source, self._start, self._settings, self._progress = source, start, settings, progress
        self._stream = start.fork()
        self._messages: list[dict[str, str]] = []
        self._read = ""  # of what the template makes of the messages, the text that the stream has read
        self.sampler = Sampler(settings.sampling, samples=[0], device=source.model.device)
        self.row = Row(settings, source.new_text())
        self.generation: Generation | None = None

    def answer(self, line: str, *, stopped: Callable[[], bool]) -> Iterator[str]:
        """Yields the text of the answer as it comes.

        Args:
            stopped: is asked after every token whether to end it.
        """
        ids = self._template_ids(line) if self._source.chat else self._source.encode(line + "\n")
        if not ids:
            raise GenerationError(f"the line {line!r} has no token: write at least one character")
        self._stream.read(torch.tensor([ids]), progress=self._progress)
        self.sampler.note(0, ids)
        before = list(self.row.tail)
        self.row = Row(self._settings, self._source.new_text())
        self.row.read([*before, *ids], shown=False)
        self.generation = Generation(self._stream, [self.row], self.sampler)
        shown = []
        for _, text in self.generation.run(stopped):
            shown.append(text)
            yield text
        if self._source.chat:
            self._messages.append({"role": "assistant", "content": "".join(shown)})
            self._read += "".join(shown)
        # The template writes the token that ends an answer before the next message.
        if not self._source.chat or self.row.reason != "eos":
            self.generation.read_last()

    def _template_ids(self, line: str) -> list[int]:
        """Returns the ids of what the template adds for a user's message."""
        assert self._source.chat is not None
        self._messages.append({"role": "user", "content": line})
        text = self._source.chat.render(self._messages)
        new = text.removeprefix(self._read)
        if self._read and new == text:  # the template writes earlier turns differently now: read everything again
            self._stream = self._start.fork()
        self._read = text
        return self._source.chat.encode(new)
