"""The CUDA C++ kernels compiled for the CPU, on memory between guard pages: an access outside a tensor raises."""

import ctypes
import hashlib
import math
import mmap
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sambalm.model.ops.cuda import nvrtc

COMPILER = shutil.which("g++") if sys.platform == "linux" else None
HEADER = Path(__file__).with_name("host_cuda.h")
OPTIONS = (
    *("-std=c++17", "-w", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"),
    "-O0",  # no access is left out, and compiling takes longer than running
    "-fno-strict-aliasing",  # as in CUDA
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),  # a misaligned access fails, as on a GPU
    "-U_FORTIFY_SOURCE",  # it takes a jump to another thread's stack for a mistake
)
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
GUARD_BYTES = 1 << 28  # on each side, none of it ever backed by memory
NAN_BYTE = 0xFF


class KernelFault(Exception):
    """An access outside of the arguments, a misaligned one, or threads that do not meet at a barrier."""


class _Report(ctypes.Structure):
    """host_cuda.h has it too."""

    _fields_ = (
        ("problem", ctypes.c_int),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint),
        ("address", ctypes.c_uint64),
    )


ARGUMENTS, DIVERGED = -1, -2  # problems that are no signals


def guarded(like: Tensor, *, at_end: bool) -> Tensor:
    """A copy with the same strides; where it ends, or else starts, memory ends that may be accessed.

    At the start it is aligned to 16 bytes only if `like` is; at the end if its size is a multiple of them.
    """
    elements = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    size = elements * like.element_size()
    memory = guarded_bytes(size, at_end=at_end, offset=0 if at_end else like.data_ptr() % 16)
    ctypes.memmove(memory.data_ptr(), like.data_ptr(), size)
    return memory.view(like.dtype).as_strided(like.shape, like.stride())


def guarded_bytes(size: int, *, at_end: bool, offset: int = 0) -> Tensor:
    """uint8 [size], of NaNs, so many bytes after the guard page."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *4 * [ctypes.c_long]]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    inside = math.ceil((offset + size) / mmap.PAGESIZE) * mmap.PAGESIZE
    total = inside + 2 * GUARD_BYTES
    start = libc.mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if start == ctypes.c_void_p(-1).value or libc.mprotect(
        start + GUARD_BYTES, inside, mmap.PROT_READ | mmap.PROT_WRITE
    ):
        raise OSError(ctypes.get_errno(), f"no memory for {size} bytes between guard pages")
    memory = (ctypes.c_uint8 * size).from_address(start + GUARD_BYTES + (inside - size if at_end else offset))
    weakref.finalize(memory, libc.munmap, start, total)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(NAN_BYTE)


@dataclass(frozen=True)
class HostCuda:
    """Compiles kernels as `nvrtc.kernel` does, and for the CPU.

    Args:
        folder: of the compiled files, each of which is made once.
        at_end: whether arguments end, or else start, next to a guard page; warps and their threads run in order, or
            else backwards.
        edit: changes the sources.
    """

    folder: Path
    at_end: bool = True
    edit: Callable[[str], str] = str

    def kernel(self, name: str, *files: str, defines: Mapping[str, int], shared_bytes: int = 0) -> "HostKernel":
        text = self.edit("".join((nvrtc.SOURCES / file).read_text(encoding="utf-8") for file in files))
        lines = [f'#include "{HEADER}"', *(f"#define {key} {value}" for key, value in sorted(defines.items()))]
        lines += [host_source(text), *(f"HOST_KERNEL({kernel})" for kernel in KERNEL.findall(text)), ""]
        return HostKernel(name, self._library("\n".join(lines))[f"launch_{name}"], shared_bytes, self.at_end)

    def _library(self, source: str) -> ctypes.CDLL:
        library = self.folder / f"{hashlib.sha256(source.encode()).hexdigest()}.so"
        if not library.exists():
            file = library.with_suffix(".cpp")
            file.write_text(source, encoding="utf-8")
            subprocess.run([COMPILER, *OPTIONS, "-o", library, file], check=True)
        return ctypes.CDLL(str(library))


def host_source(text: str) -> str:
    """What a C++ compiler takes for what it does not: PTX, memory of a size not known, words of a struct of floats."""
    text = re.sub(r'asm\("([\w.]+) %0, %1(?:, %2)?;" : "=\w"\((\w+)\) : ([^;]*)\);', _called, text)
    text = re.sub(r"extern __shared__ __align__\(16\) char (\w+)\[\];", r"char* const \1 = host::dynamic_memory;", text)
    # In registers they need no alignment.
    return text.replace("struct States {", "struct __align__(16) States {")


def _called(asm: re.Match) -> str:
    """An instruction as a call of the function that host_cuda.h has for it."""
    instruction, result, operands = asm.groups()
    function, operands = instruction.replace(".", "_"), re.findall(r"[(](\w+)[)]", operands)
    return f"{result} = {function}({', '.join(operands)});"


@dataclass(frozen=True)
class HostKernel:
    """In place of `nvrtc.Kernel`: the same call, with tensors on the CPU.

    Raises:
        KernelFault: with the access.
    """

    name: str
    launch: Callable
    shared_bytes: int
    at_end: bool

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: Tensor | float | None) -> None:
        copies = {k: guarded(t, at_end=self.at_end) for k, t in enumerate(arguments) if isinstance(t, Tensor)}
        passed = [nvrtc._argument(copies.get(k, argument)) for k, argument in enumerate(arguments)]
        values = [kind(value) for value, kind in passed]
        memory = guarded_bytes(max(1, self.shared_bytes), at_end=self.at_end)
        report = _Report()
        self.launch(
            (ctypes.c_int * 3)(*grid),
            threads,
            (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)),
            (ctypes.c_int * len(values))(*map(ctypes.sizeof, values)),
            len(values),
            ctypes.c_void_p(memory.data_ptr()),
            self.shared_bytes,
            int(not self.at_end),
            ctypes.byref(report),
        )
        if report.problem:
            raise KernelFault(f"{self.name}{grid}: {_described(report, {**copies, 'shared memory': memory})}")
        for k, copy in copies.items():
            ctypes.memmove(arguments[k].data_ptr(), copy.data_ptr(), _extent_bytes(copy))


def _extent_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _described(report: _Report, memories: Mapping[int | str, Tensor]) -> str:
    if report.problem == ARGUMENTS:
        return "the number of arguments or their sizes are not the kernel's"
    where = f"block {tuple(report.block)}, thread {report.thread}"
    if report.problem == DIVERGED:
        return f"{where}: threads of a warp wait at different barriers"
    if report.problem in (signal.SIGILL, signal.SIGTRAP):
        return f"{where}: a misaligned access"
    distances = []
    for name, tensor in memories.items():
        before, after = tensor.data_ptr() - report.address, report.address - tensor.data_ptr() - _extent_bytes(tensor)
        side = f"{before} bytes before the start" if before > 0 else f"{after} bytes after the end"
        distances.append((max(before, after), f"{side} of argument {name}, {tensor.dtype} {list(tensor.shape)}"))
    return f"{where}: an access {min(distances)[1]}"
