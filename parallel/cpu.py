"""What megatron-core and DeepSpeed assume of CUDA, answered for a machine without it."""

import deepspeed.ops
import torch


def prepare_cpu() -> None:
    """Lets megatron-core's communication allocate on the CPU, and spares DeepSpeed a compilation at start.

    megatron-core asks `torch.cuda.current_device()` where to put its buffers. DeepSpeed would build a shared-memory
    all-reduce with a C++ compiler at start; gloo serves.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
