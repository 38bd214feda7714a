"""Starts programs that a model wrote, each in a process that can do nothing but compute."""

import math
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.sandbox.inside import NO_SANDBOX

_INSIDE = Path(__file__).with_name("inside.py")
_START_S = 60.0  # that a process may take to lock itself in, on a machine that is busy
# Ends well where a process can neither reach files, nor the network, nor other processes.
_PROBE = """
import ctypes, os
for action in (lambda: open("/dev/null"), lambda: os.listdir("/"), lambda: os.stat("/"), os.fork, os.pipe):
    try:
        action()
    except OSError:
        continue
    raise SystemExit
libc = ctypes.CDLL(None)
assert libc.socket(2, 2, 0) == libc.kill(1, 0) == libc.execve(b"/bin/true", None, None) == -1
"""
_NO_SANDBOX = (
    "humaneval runs programs that the model wrote, and this machine cannot lock them in: it takes Linux on x86-64 and "
    "a kernel that filters system calls (seccomp); leave the task out here"
)


def check_sandbox() -> None:
    """Finds out whether programs are locked in on this machine, by one that tries what it must not.

    Raises:
        EvaluationError: they are not.
    """
    if not ends_well(_PROBE, timeout_s=_START_S, memory_bytes=2**30):
        raise EvaluationError(_NO_SANDBOX)


def ends_well(program: str, *, timeout_s: float, memory_bytes: int) -> bool:
    """Runs a Python program; returns whether it ends by itself and without an error, in time and within its memory.

    It has no files, no network, no other processes and nothing of this one's environment: `inside.py` says how. What it
    prints goes nowhere. A program that looks for the password in its own process could claim to have ended well, and
    could do no more than that.

    Args:
        timeout_s: of a core and, beside the start of the process, of a clock.
        memory_bytes: of addresses.

    Raises:
        EvaluationError: the machine cannot lock a process in.
    """
    password, core_s = secrets.token_hex(16), math.ceil(timeout_s)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(f"{password}\n{program}".encode("utf-8", "surrogatepass"))
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_INSIDE), str(core_s), str(memory_bytes)],
            stdin=given,
            stdout=said,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            code = process.wait(_START_S + timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill()
            process.wait()
        if code == NO_SANDBOX:
            raise EvaluationError(_NO_SANDBOX)
        said.seek(0)
        return said.read() == password.encode()
