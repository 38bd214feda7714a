"""CUDA C++ compiled at first use by NVRTC, which PyTorch's CUDA build brings along: no toolkit needed."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "source"


class CompileError(Exception):
    """A kernel's source that NVRTC refuses, with its log."""


@dataclass(frozen=True)
class Kernel:
    """A compiled function of a device, launched on PyTorch's current stream."""

    function: Any
    shared_bytes: int

    def __call__(self, grid: tuple[int, int, int], threads: int, *arguments: Tensor | float | None) -> None:
        """Tensors pass their address, None a null pointer, float an fp64, int an int32, and Stride an int64."""
        from cuda.bindings import driver

        values, types = zip(*map(_argument, arguments), strict=True)
        stream = torch.cuda.current_stream().cuda_stream
        _check(
            driver.cuLaunchKernel(self.function, *grid, threads, 1, 1, self.shared_bytes, stream, (values, types), 0)
        )


class Stride(int):
    """An argument of 64 bits."""


def _argument(value: Tensor | float | None) -> tuple[float, type]:
    if value is None or isinstance(value, Tensor):
        return (0 if value is None else value.data_ptr()), ctypes.c_void_p
    if isinstance(value, float):
        return value, ctypes.c_double
    return int(value), ctypes.c_longlong if isinstance(value, Stride) else ctypes.c_int


def kernel(name: str, *files: str, defines: Mapping[str, int], shared_bytes: int = 0) -> Kernel:
    """The function `name` of some files of source/, joined in order, for the current device.

    Args:
        shared_bytes: of dynamic shared memory.

    Raises:
        CompileError: NVRTC refuses the source.
        ImportError: cuda.bindings is not installed.
    """
    device = torch.cuda.current_device()
    return _kernel(name, files, tuple(sorted(defines.items())), shared_bytes, device)


@cache
def _kernel(
    name: str, files: tuple[str, ...], defines: tuple[tuple[str, int], ...], shared_bytes: int, device: int
) -> Kernel:
    from cuda.bindings import driver

    # The thread of autograd may not have the device's context, into which the module is loaded.
    torch.cuda.init()
    _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(device))))
    source = "".join((SOURCES / file).read_text(encoding="utf-8") for file in files)
    module = _check(driver.cuModuleLoadData(_compile(source, defines, torch.cuda.get_device_capability(device))))
    function = _check(driver.cuModuleGetFunction(module, name.encode()))
    if shared_bytes:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return Kernel(function, shared_bytes)


def _compile(source: str, defines: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    texts = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
    options = [text.encode() for text in (*texts, *(f"-D{name}={value}" for name, value in defines))]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise CompileError(log.decode().strip("\0 \n"))
    binary = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


def _check(result: tuple) -> Any:
    """What a call of cuda.bindings returns behind its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if values else None
