"""A function on every rank of a world on this machine: over gloo on CPUs, over NCCL where each rank has a GPU."""

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sambalm.data_pipeline.interrupts import deaf_children
from sambalm.pretrain.errors import ExitCode

PRELOAD = ["sambalm.pretrain.trainer", "sambalm.parallel.compat.cpu", "torch._dynamo"]
MORE_FAILURES_S = 2.0  # in which further ranks may report, as the first report need not be the first failure
END_S = 10.0  # in which a rank that has reported may end by itself


class RanksFailedError(Exception):
    """Ranks failed, died or did not finish; the message is one sentence.

    Attributes:
        exit_code: of the program.
        details: the traceback of the rank that failed first, or an empty text.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True)
class Failure:
    """What a rank tells of an exception."""

    rank: int
    time_s: float  # of the machine's monotonic clock
    message: str
    details: str
    is_users: bool  # whether the exception carries an exit code, so that its message is a sentence for the user


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int,
    timeout_s: float,
    on_gpus: bool = False,
    output: Path | None = None,
) -> list[Any]:
    """Runs function(*args) on every rank of a new world and returns the ranks' results, rank 0 first.

    Every rank has ended when this returns or raises.

    Args:
        function: importable (at a module's top level); arguments and results can be pickled.
        timeout_s: for all ranks together.
        on_gpus: whether rank r computes on GPU r; otherwise no rank sees a GPU.
        output: a folder for what ranks print, in rank_N.log; without one they print where this process does.

    Raises:
        RanksFailedError: a rank raised an exception, died, or did not finish in time.
    """
    context = _context(on_gpus=on_gpus)
    workers: list[tuple[BaseProcess, Connection]] = []
    with tempfile.TemporaryDirectory() as folder, _environment(on_gpus=on_gpus):
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                place = _Place(rank, ranks, f"file://{folder}/store", timeout_s, on_gpus, output)
                process: BaseProcess = context.Process(
                    target=_run_rank, args=(function, args, place, theirs), daemon=True
                )
                with deaf_children():
                    process.start()
                theirs.close()  # so that the pipe ends with the rank
                workers.append((process, ours))
            return _results(workers, timeout_s=timeout_s, output=output)
        except BaseException:  # an interruption, too
            for process, _ in workers:
                process.kill()
            raise
        finally:
            _end(workers)


@dataclass(frozen=True)
class _Place:
    rank: int
    ranks: int
    store: str
    timeout_s: float
    on_gpus: bool
    output: Path | None


def _context(*, on_gpus: bool) -> SpawnContext | ForkServerContext:
    if on_gpus:  # which processes cannot share with the one that they were forked from
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")  # it imports the slow packages once for all ranks
    context.set_forkserver_preload(PRELOAD)
    return context


@contextlib.contextmanager
def _environment(*, on_gpus: bool) -> Iterator[None]:
    """What new processes inherit: no warnings of what they import, and without GPUs nothing that an import may find."""
    changes = {"PYTHONWARNINGS": "ignore"} | ({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""})
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _run_rank(function: Callable[..., Any], args: tuple, place: _Place, connection: Connection) -> None:
    if place.output:
        log = os.open(_log(place.output, place.rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    try:
        import torch
        import torch.distributed as dist

        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.ranks), LOCAL_RANK=str(place.rank))
        if place.on_gpus:
            torch.cuda.set_device(place.rank)
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.ranks))
        dist.init_process_group(
            "nccl" if place.on_gpus else "gloo",
            init_method=place.store,
            rank=place.rank,
            world_size=place.ranks,
            timeout=timedelta(seconds=place.timeout_s),
        )
        report = function(*args)
    except BaseException as error:
        report = Failure(
            rank=place.rank,
            time_s=time.monotonic(),
            message=_message(error),
            details=f"rank {place.rank} of {place.ranks}:\n{traceback.format_exc()}",
            is_users=hasattr(error, "exit_code"),
        )
    connection.send(report)


def _message(error: BaseException) -> str:
    """A user's mistake says what to change; of any other exception its first line and where it was raised."""
    if hasattr(error, "exit_code"):
        return str(error)
    lines = str(error).splitlines() or [""]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[0]} ({Path(place.filename).name}:{place.lineno})"


Workers = Sequence[tuple[BaseProcess, Connection]]


def _results(workers: Workers, *, timeout_s: float, output: Path | None) -> list[Any]:
    deadline_s = time.monotonic() + timeout_s
    waiting = {connection: rank for rank, (_, connection) in enumerate(workers)}
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    dead: list[int] = []
    while waiting:
        broken = bool(dead or failures)
        ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            break
        for connection in (found for found in ready if isinstance(found, Connection)):
            rank = waiting.pop(connection)
            try:
                report = connection.recv()
            except EOFError:
                dead.append(rank)
                continue
            if isinstance(report, Failure):
                failures.append(report)
            else:
                results[rank] = report
        if (dead or failures) and not broken:
            deadline_s = min(deadline_s, time.monotonic() + MORE_FAILURES_S)
    if dead:
        raise RanksFailedError(_of_a_death(dead[0], workers, output=output))
    if failures:
        first = min(failures, key=lambda failure: (not failure.is_users, failure.time_s))
        prefix = "" if first.is_users else f"rank {first.rank} of {len(workers)} failed: "
        raise RanksFailedError(prefix + first.message, details=first.details)
    if waiting:
        raise RanksFailedError(
            f"{_named(sorted(waiting.values()))} of {len(workers)} did not finish within {timeout_s:g} s: either they "
            "wait for each other, or they need more time"
        )
    return [results[rank] for rank in range(len(workers))]


def _of_a_death(rank: int, workers: Workers, *, output: Path | None) -> str:
    process, _ = workers[rank]
    process.join(END_S)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    lines = _log(output, rank).read_text(errors="replace").split("\n") if output else []
    said = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
    return f"rank {rank} of {len(workers)} {how}{said}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def _end(workers: Workers) -> None:
    """Waits for ranks that have reported or were killed, and kills those that do not end."""
    for process, connection in workers:
        connection.close()
        process.join(END_S)
        if process.is_alive():
            process.kill()
            process.join()
