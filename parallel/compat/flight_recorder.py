"""What NCCL was doing: torch's flight recorder, whose name differs between its versions."""

import torch
import torch.distributed as dist


def nccl_trace() -> bytes | None:
    """Returns this rank's latest collectives as `torchfrtrace` reads them; None without NCCL."""
    if not (torch.cuda.is_available() and dist.is_nccl_available() and dist.is_initialized()):
        return None
    module = torch._C._distributed_c10d
    dump = getattr(module, "_dump_fr_trace", None) or getattr(module, "_dump_nccl_trace", None)
    return dump() if dump else None
