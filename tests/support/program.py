"""The program in a process of its own, which starts in milliseconds: a fork of the server that worlds are forked from.

What `python -m MODULE` would show of starting itself is not here: what its imports print, how long they take, and what
they make of their environment. Tests of that start the real thing.
"""

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.worlds import server_context

PROGRAM = "sambalm.pretrain.cli"
START_S, TIMEOUT_S = 60.0, 120.0
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
# What the imports do not read, so that a fork that is given it behaves as a process that was started with it.
READ_AFTER_IMPORTS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("COLUMNS", "SAMBALM_ATTEMPT", "TORCHELASTIC_ERROR_FILE", "SLURMD_NODENAME", "MIN_PAIR_GB_PER_S"),
}


class Program:
    """A running program, used as subprocess.Popen is. Leaving a `with` block kills it."""

    def __init__(self, process: Any, folder: tempfile.TemporaryDirectory, streams: Sequence[Path]) -> None:
        self._process, self._folder, self._streams = process, folder, streams
        self.pid: int = process.pid

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._folder.cleanup()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code, negative for a signal. A program that does not end in time is killed and fails the test."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            shown = "\n".join(path.read_text(errors="replace") for path in dict.fromkeys(self._streams))
            raise AssertionError(f"process {self.pid} did not end within {timeout_s:g} s and said:\n{shown}")
        return self._process.exitcode

    def communicate(self, timeout_s: float = TIMEOUT_S) -> tuple[str, str]:
        """What it wrote to stdout and to stderr until its end."""
        self.wait(timeout_s)
        output, errors = (path.read_text() for path in self._streams)
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *words: object,
    module: str = PROGRAM,
    variables: Mapping[str, str] | None = None,
    log: Path | None = None,
    new_session: bool = False,
    before: Callable[[], None] | None = None,
) -> Program:
    """Starts `python -m MODULE WORDS` and returns once it is about to run the module.

    Args:
        variables: over this process's environment; of READ_AFTER_IMPORTS alone.
        log: takes stdout and stderr, at its end; otherwise each is kept for `communicate`.
        new_session: makes it the first process of a session, and so of a process group.
        before: importable, to be called in the program before all else.
    """
    variables = dict(variables or {})
    assert not (early := variables.keys() - READ_AFTER_IMPORTS), f"imports may read {early}: start the real program"
    folder = tempfile.TemporaryDirectory()
    streams = [log, log] if log else [Path(folder.name, "stdout"), Path(folder.name, "stderr")]
    for path in streams:
        path.touch()
    context = server_context()
    ready, child = context.Pipe(duplex=False)
    environment = {**os.environ, **variables}
    arguments = (module, [str(word) for word in words], environment, streams, new_session, before, child)
    process = context.Process(target=_run, args=arguments)
    process.start()
    child.close()
    program = Program(process, folder, streams)
    try:
        assert ready.poll(START_S), "the program's process does not answer"
        ready.recv()
    except EOFError:
        program.wait()
        raise AssertionError(f"the program's process did not start: {program.communicate()}") from None
    finally:
        ready.close()
    return program


def run(*words: object, timeout_s: float = TIMEOUT_S, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE WORDS` to its end; options as in `start`."""
    with start(*words, **options) as program:
        output, errors = program.communicate(timeout_s)
        return subprocess.CompletedProcess(list(words), program.wait(), output, errors)


def start_ranks(*words: object, ranks: int, **options: Any) -> list[Program]:
    """Starts the program on every rank of a new world, with the variables that torchrun sets; options as in `start`."""
    variables = options.pop("variables", {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [
        start(*words, variables=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float, text: Callable[[], str] = lambda: "") -> None:
    """Fails with a text when a condition does not come true in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, text()
        time.sleep(0.02)


def _run(
    module: str,
    words: list[str],
    environment: dict[str, str],
    streams: Sequence[Path],
    new_session: bool,
    before: Callable[[], None] | None,
    ready: Connection,
) -> None:
    """Turns the forked process into the program: its session, streams, environment and arguments, and then its code."""
    if new_session:
        os.setsid()
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    # The server lives while a process holds this: it ends with the test process, and the program then with it.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    sys.stdout.flush()
    for number, path in (0, Path(os.devnull)), *enumerate(streams, start=1):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=False)  # as to a file
    sys.stderr.reconfigure(line_buffering=True)
    _take(environment)
    multiprocessing.set_start_method(None, force=True)  # the default instead of the server's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = words
    ready.send(None)
    ready.close()
    try:
        if before:
            before()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()


def _take(environment: dict[str, str]) -> None:
    """Replaces the environment that the server was started with, but for what its imports have set since."""
    pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    started_with = dict(os.fsdecode(pair).split("=", 1) for pair in pairs if pair)
    by_imports = {name: value for name, value in os.environ.items() if started_with.get(name) != value}
    os.environ.clear()
    os.environ.update(by_imports | environment)
