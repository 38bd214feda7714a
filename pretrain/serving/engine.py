"""Requests that are generated together: a thread steps the rows of all of them at once.

A prompt is read by itself, a piece between two steps of the others, and its rows then join the batch. Rows leave when
they end, so the batch is as large as there are texts under way. A row draws from a generator of its own: its text does
not depend on its neighbours, but for the rounding of products of other sizes.
"""

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sambalm.model.hf import Stream
from sambalm.model.hf.stream import PIECE_TOKENS
from sambalm.pretrain.generation.rows import Row, Settings
from sambalm.pretrain.generation.sampling import Sampler
from sambalm.pretrain.generation.source import Source
from sambalm.pretrain.serving.errors import RequestError, stopping

MAX_WAITING = 1024


class Piece(NamedTuple):
    """More text of a sample of a job; `reason` is that of its end, as Row's, None before it."""

    sample: int
    text: str
    tokens: int
    reason: str | None


@dataclass(eq=False)
class Job:
    """A prompt and the texts that are to follow it.

    Args:
        ids: the prompt's, at least one.
        samples: how many texts; each has the next seed.
        echo: whether a text begins with the prompt.
        deliver: is called in the engine's thread with every piece, and with the error that ends the job.
    """

    ids: Sequence[int]
    settings: Settings
    samples: int
    echo: bool
    deliver: Callable[[Piece | RequestError], None]
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """Ends the job: nobody waits for its texts any more."""
        self.cancelled = True


@dataclass(eq=False)
class _Active:
    """A text under way, and what draws its tokens."""

    job: Job
    row: Row
    sampler: Sampler

    def deliver(self, text: str) -> None:
        if text or self.row.reason:
            self.job.deliver(Piece(self.row.sample, text, self.row.tokens, self.row.reason))


@dataclass
class _Reading:
    """A job whose prompt is being read."""

    job: Job
    stream: Stream
    read: int = 0


class Engine:
    """A model that continues the prompts of many requests at once.

    Methods may be called from any thread.
    """

    def __init__(self, source: Source, *, max_rows: int) -> None:
        """Starts the thread. Args: max_rows: texts that are generated at once; further ones wait for their turn."""
        self._source, self.max_rows = source, max_rows
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._ends = False
        # Of the thread alone:
        self._reading: _Reading | None = None
        self._stream: Stream | None = None
        self._origin = Stream(source.model)  # streams that are made of one share what they step by
        self._active: list[_Active] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Takes a job of at most `max_rows` samples.

        Raises:
            RequestError: too many wait already, or the engine ends.
        """
        with self._changed:
            if self._ends:
                raise stopping()
            if len(self._waiting) >= MAX_WAITING:
                raise RequestError(
                    f"{MAX_WAITING} requests are waiting: send this one again later",
                    status=503,
                    kind="server_error",
                    code="overloaded",
                )
            self._waiting.append(job)
            self._changed.notify()

    def end(self) -> None:
        """Asks the engine to end. Jobs under way and waiting ones get an error."""
        # Also called in a signal handler, which must not wait for a lock that its own thread may hold.
        self._ends = True
        threading.Thread(target=self._wake, daemon=True).start()

    def join(self, timeout_s: float) -> None:
        """Waits for the end that was asked for."""
        self._thread.join(timeout_s)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._read_piece()
                self._step()
            except Exception as error:  # the model failed: those that it worked for are told, and it goes on
                self._fail(error)
        self._drop(stopping())

    def _wait_for_work(self) -> bool:
        """Returns whether there is work, False when the engine ends."""
        with self._changed:
            while not (self._ends or self._waiting or self._reading or self._active):
                self._changed.wait()
            return not self._ends

    def _read_piece(self) -> None:
        """Reads a piece of the next prompt; once it is read, its rows join the batch."""
        self._reading = self._reading or self._next_job()
        reading = self._reading
        if reading is None:
            return
        job = reading.job
        if job.cancelled:
            self._reading = None
            return
        ids = job.ids[reading.read : reading.read + PIECE_TOKENS]
        reading.stream.read(torch.tensor([ids]))
        reading.read += len(ids)
        if reading.read == len(job.ids):
            self._reading = None
            self._begin(job, reading.stream)

    def _next_job(self) -> _Reading | None:
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            if not self._waiting or len(self._active) + self._waiting[0].samples > self.max_rows:
                return None
            return _Reading(self._waiting.popleft(), self._origin.fork())

    def _begin(self, job: Job, stream: Stream) -> None:
        for sample in range(job.samples):
            row = Row(job.settings, self._source.new_text(), sample=sample)
            sampler = Sampler(job.settings.sampling, samples=[sample], device=self._source.model.device)
            sampler.note(0, job.ids)
            active = _Active(job, row, sampler)
            active.deliver(row.read(job.ids, shown=job.echo))
            self._active.append(active)
        rows = stream.fork([0] * job.samples) if job.samples > 1 else stream
        self._stream = rows if self._stream is None else Stream.join([self._stream, rows])

    def _step(self) -> None:
        """Draws a token of every row and delivers its text; rows that ended leave, the others read their tokens."""
        if self._stream is None:
            return
        assert self._stream.logits is not None
        logits, kept, ids = self._stream.logits, [], []
        drawn = [active.sampler(logits[number : number + 1]) for number, active in enumerate(self._active)]
        for number, (active, token) in enumerate(zip(self._active, torch.cat(drawn).tolist(), strict=True)):
            if active.job.cancelled:
                continue
            active.sampler.note(0, [token])
            active.deliver(active.row.take(token))
            if active.row.reason is None:
                kept.append(number)
                ids.append(token)
        if not kept:
            self._stream, self._active = None, []
            return
        if len(kept) < len(self._active):
            self._stream = self._stream.fork(kept)
            self._active = [self._active[number] for number in kept]
        self._stream.step(torch.tensor(ids))

    def _fail(self, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            sentence = "the server ran out of memory: send fewer or shorter requests at once"
        else:
            traceback.print_exc()
            sentence = "the server failed on this request: its log has the reason"
        self._drop(RequestError(sentence, status=500, kind="server_error"), waiting=False)

    def _drop(self, error: RequestError, *, waiting: bool = True) -> None:
        """Ends the jobs under way, and those that wait, with an error."""
        jobs = dict.fromkeys(active.job for active in self._active)
        if self._reading:
            jobs[self._reading.job] = None
        with self._changed:
            if waiting:
                jobs |= dict.fromkeys(self._waiting)
                self._waiting.clear()
        self._reading, self._stream, self._active = None, None, []
        for job in jobs:
            job.deliver(error)
