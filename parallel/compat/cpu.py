"""What megatron-core and DeepSpeed assume of CUDA, answered for a machine without it."""

import importlib
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules


class _TorchOnCPU:
    """The module torch, but for `zeros`, which the pipeline schedules call with a literal device "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*shape: Any, device: str, **arguments: Any) -> torch.Tensor:
        return torch.zeros(*shape, **arguments)


def prepare_cpu() -> None:
    """Lets megatron-core's communication and schedules allocate on the CPU, and spares DeepSpeed a compilation.

    megatron-core asks `torch.cuda.current_device()` where to put its buffers. DeepSpeed would build a shared-memory
    all-reduce with a C++ compiler at start; gloo serves.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    schedules.torch = _TorchOnCPU()
    # By its name, since the package's attribute `torch` is the package torch.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
