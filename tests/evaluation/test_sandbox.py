"""Programs of a model: what they may compute, and all that they cannot reach, take or claim."""

import os
import socket
import subprocess
import sys
import time

import pytest

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.sandbox import run as sandbox
from sambalm.evaluation.sandbox.run import check_sandbox, ends_well

CALLS = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def passes(program: str, *, timeout_s: float = 10, memory_bytes: int = 2**29) -> bool:
    return ends_well(program, timeout_s=timeout_s, memory_bytes=memory_bytes)


MODULES = """
abc array bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions
functools hashlib heapq inspect io itertools json math numbers operator os pprint queue random re statistics string
struct sys textwrap time types typing unicodedata warnings
"""


@pytest.mark.parametrize(
    "program",
    [
        f"import {', '.join(MODULES.split())}",
        "assert sorted([3, 1, 2]) == [1, 2, 3]\nprint('well')",
        "import math, re, heapq, hashlib\nfrom typing import List\nassert hashlib.md5(b'a').hexdigest()[0] == '0'",
        "import random, time\nx = bytearray(2**26)\nassert random.SystemRandom().random() < 1 and time.time() > 0",
        "assert '\\u6f22' == '漢'",
        "if __name__ != '__main__':\n    raise SystemExit",
    ],
)
def test_what_computes_passes(program):
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "import sys\nsys.exit(0)",
        "quit()",
        "import os\nos._exit(0)",
        "raise KeyboardInterrupt",
        "import sys\nprint('well', file=sys.stderr, flush=True)\nassert False",
        "assert '\ud800'",  # half of a surrogate pair, as JSON may hold
    ],
)
def test_what_fails_or_leaves_does_not_and_says_nothing(program, capfd):
    assert not passes(program)
    assert capfd.readouterr() == ("", "")


def test_it_reaches_no_file_and_no_process(tmp_path):
    """An attempt that was carried out would end without an error."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for attempt in (
        f"open({str(secret)!r}).read()",
        f"import os\nos.listdir({str(tmp_path)!r})",
        f"import os\nos.unlink({str(secret)!r})",
        f"import os\nos.stat({str(secret)!r})",
        f"{CALLS}assert libc.open({str(secret)!r}.encode(), 0) >= 0",
        f"{CALLS}assert libc.syscall(257, -100, {str(secret)!r}.encode(), 0) >= 0",  # openat
        f"{CALLS}assert libc.syscall(0x40000002, {str(secret)!r}.encode(), 0) >= 0",  # open by the numbers of x32
        f"{CALLS}assert libc.syscall(425, 8, None) >= 0",  # io_uring_setup
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import threading\nthreading.Thread(target=print).start()",
        f"import os, signal\nos.kill({os.getpid()}, 0)",
        f"{CALLS}assert libc.ptrace(16, {os.getpid()}, 0, 0) == 0",
        f"{CALLS}assert libc.prctl(21, 0, 0, 0, 0) >= 0",
    ):
        assert not passes(attempt), attempt
    assert secret.read_text() == "secret"


def test_it_makes_no_call_but_those_that_compute():
    """Every other number is refused with EPERM, before the kernel looks at what it is given.

    Those from 335 to 423 are no calls, but for two by which the kernel's own probes return.
    """
    allowed = [0, 1, 9, 10, 11, 12, 15, 24, 25, 28, 60, 96, 201, 202, 228, 231, 318]
    assert passes(f"""{CALLS}
for number in {{*range(335), *range(424, 470)}} - {{{", ".join(map(str, allowed))}}}:
    assert (libc.syscall(number, *[-1] * 6), ctypes.get_errno()) == (-1, 1), number
""")


def test_it_makes_no_calls_of_32_bits_either(tmp_path):
    """Whose numbers mean others: 10 is unlink there, and mprotect, which is allowed, in 64 bits."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    code = b"\x53\x48\x89\xfb\xb8\x0a\x00\x00\x00\xcd\x80\x5b\xc3"  # push rbx; rbx = rdi; eax = 10; int 0x80; pop; ret
    attempt = f"""{CALLS}
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 8192, 7, 0x62, -1, 0)  # in the lowest 32 bits
ctypes.memmove(page, {code!r}, {len(code)})
ctypes.memmove(page + 4096, {os.fsencode(secret) + bytes(1)!r}, {len(os.fsencode(secret)) + 1})
assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(page)(page + 4096) == 0
"""
    assert not passes(attempt)
    assert secret.read_text() == "secret"


def test_it_reaches_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not passes(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        for family, kind in ((2, 1), (2, 2), (10, 1), (1, 1), (16, 3)):
            assert not passes(f"{CALLS}assert libc.socket({family}, {kind}, 0) >= 0")


def test_it_sees_no_environment(monkeypatch):
    monkeypatch.setenv("TOKEN_OF_A_USER", "secret")
    assert passes("import os\nassert 'TOKEN_OF_A_USER' not in os.environ")


def test_time_and_memory_are_bounded():
    began_s = time.monotonic()
    assert not passes("while True:\n    pass", timeout_s=1)
    assert time.monotonic() - began_s < 30
    assert not passes("x = bytearray(2**28)", memory_bytes=2**28)
    assert not passes("x = []\nwhile True:\n    x.append(bytes(2**20))", memory_bytes=2**28)
    assert not passes("def f(n):\n    return f(n + 1)\nf(0)")
    assert not passes("import time\ntime.sleep(1000)")


def test_what_waits_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "_START_S", 0.5)
    assert not passes("import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()", timeout_s=0.5)


def test_what_it_may_take_can_only_become_less():
    """Of a core, memory, files and what is left of a crash; asked of a process that is not locked in."""
    kinds = "RLIMIT_CPU RLIMIT_AS RLIMIT_FSIZE RLIMIT_CORE"
    program = "import inside, resource\ninside.limit(core_s=7, memory_bytes=2**30)\n"
    program += f"print([resource.getrlimit(getattr(resource, kind)) for kind in {kinds.split()}])"
    folder = sandbox._INSIDE.parent
    words = [sys.executable, "-B", "-c", program]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert said == "[(7, 7), (1073741824, 1073741824), (4096, 4096), (0, 0)]\n"


def test_what_it_writes_is_bounded_and_claims_nothing():
    assert not passes("import os\nos.write(1, b'well')")
    assert not passes("import os\nwhile True:\n    os.write(1, b'x' * 1000)")
    assert passes("for _ in range(10**4):\n    print('x' * 1000)")


def test_a_machine_that_cannot_lock_in_is_refused(monkeypatch, tmp_path):
    check_sandbox()
    for broken in ("lock_in() -> bool:\n    return False", "lock_in() -> bool:\n    return True"):
        script = tmp_path / "inside.py"
        script.write_text(sandbox._INSIDE.read_text().replace("lock_in() -> bool:", broken + "\n\n\ndef unused():", 1))
        with monkeypatch.context() as patched:
            patched.setattr(sandbox, "_INSIDE", script)
            with pytest.raises(EvaluationError, match="this machine cannot lock them in"):
                check_sandbox()
            if "False" in broken:
                with pytest.raises(EvaluationError, match="this machine cannot lock them in"):
                    passes("x = 1")
