"""Texts that are generated together."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sambalm.model.hf import Stream
from sambalm.pretrain.generation.sampling import Sampler, Sampling
from sambalm.pretrain.generation.text import StopStrings, TextStream

TAIL_TOKENS = 64  # what text goes on from, in a state that was saved


@dataclass(frozen=True)
class Settings:
    """How texts are continued, and where they end.

    Args:
        max_new_tokens: of each text; 0 for no limit.
        stops: strings before which a text ends.
        eos_ids: the tokens that end a text.
    """

    sampling: Sampling
    max_new_tokens: int
    stops: Sequence[str] = ()
    eos_ids: Collection[int] = ()


class Row:
    """One text while it is generated.

    `reason` tells why it ended: "eos", "stop", "length" or "interrupted"; None while it goes on.
    """

    def __init__(self, settings: Settings, text: TextStream, *, prompt: int = 0, sample: int = 0) -> None:
        self.prompt, self.sample = prompt, sample
        self.prompt_tokens = self.tokens = 0
        self.reason: str | None = None
        self.seconds = 0.0
        self.tail: deque[int] = deque(maxlen=TAIL_TOKENS)
        self._settings, self._text = settings, text
        self._stops = StopStrings(settings.stops)

    def read(self, ids: Iterable[int], *, shown: bool) -> str:
        """Takes tokens that come before the generated ones.

        Args:
            shown: whether their text is shown too; otherwise generated text begins where they end.

        Returns:
            their text, as far as it is settled, or nothing.
        """
        pieces = []
        for number in ids:
            self.tail.append(number)
            piece = self._text.push(number)
            if shown:
                pieces.append(piece)
        if not shown:
            self._text.flush()
        return "".join(pieces)

    def take(self, token_id: int) -> str:
        """Takes a generated token; returns the text that it settles."""
        self.tail.append(token_id)
        self.tokens += 1
        if token_id in self._settings.eos_ids:
            return self.finish("eos")
        shown = self._stops.push(self._text.push(token_id))
        if self._stops.found:
            self.reason = "stop"
        elif self.tokens == self._settings.max_new_tokens:
            shown += self.finish("length")
        return shown

    def finish(self, reason: str) -> str:
        """Ends the text; returns what was held back of it."""
        shown = self._stops.push(self._text.flush())
        self.reason = "stop" if self._stops.found else reason
        return shown + self._stops.finish()


class Generation:
    """Rows that a stream has read the prompts of, and their continuation."""

    def __init__(self, stream: Stream, rows: Sequence[Row], sampler: Sampler) -> None:
        self.stream, self.rows, self.sampler = stream, rows, sampler
        self._unread: Tensor | None = None

    def run(self, stopped: Callable[[], bool]) -> Iterator[tuple[Row, str]]:
        """Yields rows and their texts as they come, until every row has ended.

        Args:
            stopped: is asked after every token whether to end all rows.
        """
        began_s = time.perf_counter()
        while True:
            if self.stream.logits is None:
                raise RuntimeError("the stream has read nothing: read a prompt first")
            ids = self.sampler(self.stream.logits)
            self._unread = ids
            for number, (row, token_id) in enumerate(zip(self.rows, ids.tolist(), strict=True)):
                if row.reason is None:
                    self.sampler.note(number, [token_id])
                    shown = row.take(token_id)
                    row.seconds = time.perf_counter() - began_s
                    yield row, shown
            if stopped():
                for row in self.rows:
                    if row.reason is None:
                        yield row, row.finish("interrupted")
            if all(row.reason for row in self.rows):
                return
            self.stream.step(ids)

    def read_last(self) -> None:
        """Lets the stream read the last generated token of each row, so that it has read all of them."""
        if self._unread is not None:
            self.stream.step(self._unread)
            self._unread = None
