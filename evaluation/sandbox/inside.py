"""Runs one Python program that nobody has read, in a process of its own; `run.py` starts this file as a script.

Its words are the seconds of a core and the bytes of addresses that the program may take. Standard input holds it after
a first line with a password, which is written to standard output once the program has ended without an error.

Between the two stands a filter of system calls (seccomp), which the process can never take off again. The kernel then
carries out only calls that take and give back memory, tell the time, give random bytes, and read and write what is open
already: standard input, output and error, the last of which goes nowhere. Every other call fails with EPERM and does
nothing, among them all that open, name or change a file, make a socket, start, signal or look at a process, or sleep.
"""

import builtins
import ctypes
import os
import resource
import sys

NO_SANDBOX = 3  # exit code of a process that could not lock itself in
_WRITTEN_BYTES = 4096

# Modules that programs import; nothing can be loaded once files cannot be opened.
_MODULES = """
abc array bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime decimal enum fractions
functools hashlib heapq inspect io itertools json math numbers operator os pprint queue random re statistics string
struct sys textwrap time types typing unicodedata warnings
"""

# Numbers of the calls that are carried out, on x86-64.
_ALLOWED = {
    "read": 0,
    "write": 1,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigreturn": 15,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "exit": 60,
    "gettimeofday": 96,
    "time": 201,
    "futex": 202,
    "clock_gettime": 228,
    "exit_group": 231,
    "getrandom": 318,
}
_X86_64 = 0xC000003E
_SET_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES = 22, 2, 38  # of prctl
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of the filter
_AT_NUMBER, _AT_ARCHITECTURE = 0, 4  # bytes in what the filter looks at
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def lock_in() -> bool:
    """Puts the filter on this process for ever; returns whether it is there."""
    numbers = list(_ALLOWED.values())
    code = [(_LOAD, 0, 0, _AT_ARCHITECTURE), (_IF_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL)]
    code += [(_LOAD, 0, 0, _AT_NUMBER)]
    code += [(_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    instructions = (_Instruction * len(code))(*(_Instruction(*part) for part in code))
    program = _Program(len(code), instructions)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return (
        prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        and prctl(_SET_SECCOMP, _FILTER, ctypes.addressof(program), 0, 0) == 0
    )


def limit(*, core_s: int, memory_bytes: int) -> None:
    """Bounds what this process may take from now on; more of a core ends it, and more memory is not given."""
    limits = {
        resource.RLIMIT_CPU: core_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: _WRITTEN_BYTES,  # standard output is a file
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def main() -> None:
    for name in _MODULES.split():
        __import__(name)
    sys.modules["hashlib"].md5(b"").hexdigest()  # which loads what it needs at its first use
    given = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    password, _, program = given.partition("\n")
    sys.stdin, sys.stdout = open(os.devnull), open(os.devnull, "w")  # noqa: SIM115 - for ever
    limit(core_s=int(sys.argv[1]), memory_bytes=int(sys.argv[2]))
    if sys.platform != "linux" or os.uname().machine != "x86_64" or not lock_in():
        os._exit(NO_SANDBOX)
    try:
        builtins.exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit too: a program that leaves has not passed its tests
        os._exit(1)
    os.write(1, password.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
