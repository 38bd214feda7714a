"""Processes that read and tokenise pieces of the input, whose batches come in the order of the input."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from .documents import PIECE_BYTES, Piece
from .encoding import EncoderConfig, TokenBatch, encode_in_worker, start_in_worker
from .errors import DataError
from .interrupts import deaf_children

_PIECES_IN_FLIGHT_PER_WORKER = 3


@contextmanager
def tokenising_pool(workers: int, encoder: EncoderConfig) -> Iterator[ProcessPoolExecutor]:
    """Processes that tokenise, and end with this one.

    Raises DataError where one of them is killed.
    """
    # spawn: the caller may have threads, such as a progress display's, and their locks would be forked while held.
    context = multiprocessing.get_context("spawn")
    with deaf_children():  # its semaphores start a process, too
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for _ in range(workers):
            with deaf_children():
                pool.submit(start_in_worker, encoder)
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process was killed, perhaps for memory; use fewer workers, and the same command goes on "
            "after the last complete shard"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    work: Iterator[tuple[int, Piece]], pool: ProcessPoolExecutor, encoder: EncoderConfig, *, workers: int
) -> Iterator[tuple[int, Piece, TokenBatch]]:
    """Batches of pieces in the order of the work, each with its file's number. A bounded number is under way."""
    most, most_bytes = workers * _PIECES_IN_FLIGHT_PER_WORKER, 2 * workers * _PIECES_IN_FLIGHT_PER_WORKER * PIECE_BYTES
    pending: deque[tuple[int, Piece, Future[TokenBatch]]] = deque()
    held_bytes = 0

    def oldest() -> tuple[int, Piece, TokenBatch]:
        source, piece, future = pending.popleft()
        return source, piece, future.result()

    for source, piece in work:
        with deaf_children():  # a pool starts a process when it is first needed
            future = pool.submit(encode_in_worker, encoder, piece)
        pending.append((source, piece, future))
        held_bytes += piece.size_bytes
        while len(pending) >= most or (held_bytes >= most_bytes and len(pending) > workers):
            held_bytes -= pending[0][1].size_bytes
            yield oldest()
    while pending:
        yield oldest()


def _start_worker() -> None:
    # One whose parent was killed would wait for work for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)
