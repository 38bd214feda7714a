"""What megatron-core assumes of CUDA, answered for a machine without it (`deepspeed_adapter` answers DeepSpeed)."""

from typing import Any

import torch

from sambalm.parallel.compat.megatron_core import schedules


class _TorchOnCPU:
    """The module torch, but for `zeros`, which the pipeline schedules call with a literal device "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*shape: Any, device: str, **arguments: Any) -> torch.Tensor:
        return torch.zeros(*shape, **arguments)


def prepare_cpu() -> None:
    """Lets megatron-core's communication and schedules allocate on the CPU.

    megatron-core asks `torch.cuda.current_device()` where to put its buffers.
    """
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    schedules.torch = _TorchOnCPU()
