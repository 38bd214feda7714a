"""Which kernels a plan counts with, and what each takes: seconds of a kernel, bytes of what is bound by memory.

Bytes are those that move between a device and its memory for each element of an activation in bf16, forward and
backward, by the list of kernels that PyTorch launches: a cast from bf16 to fp32, say, reads 2 and writes 4.
"""

from dataclasses import dataclass
from typing import Any

from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.mixers.counts import KernelNames, Traffic
from sambalm.model.ops.config import KernelConfig
from sambalm.model.ops.implementations import (
    BY_MIXERS,
    IMPLEMENTATIONS,
    KernelRequirements,
    choose,
    reads_documents,
    why_unasked,
)
from sambalm.parallel.shard import Position
from sambalm.pretrain.config import RunConfig

KERNEL_ELEMENTS = 4 * 5632 * 4096  # sequences x channels x tokens of the scan's and the convolution's measurements


TORCH_ON_CPU = KernelNames(
    "torch", "torch", "torch", "torch", "torch", delta_rule="torch", linear_attention="torch", device="cpu"
)


def planned_kernels(config: RunConfig) -> KernelNames:
    """What a run on GPUs computes with; auto stands for the best that needs no package besides PyTorch's CUDA build.

    Raises:
        KernelError: the run would refuse a kernel that its configuration names, on any GPU.
    """
    requirements = kernel_requirements(
        config.model,
        device="cuda",
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        resets=config.data.reset_at_document,
        tp=Position(config.parallel.tensor),
        cp=Position(config.parallel.context),
    )
    asked = config.kernels.model_dump()
    planned: dict[str, Any] = {name: _planned(name, wanted, requirements) for name, wanted in asked.items()}
    return KernelNames(**planned | dict.fromkeys(BY_MIXERS.difference(requirements.operations)))


def are_captured(config: RunConfig, kernels: KernelNames) -> bool:
    """Whether a run's micro-batches are CUDA graphs on a GPU.

    The host may not have to read the documents of each, nor may a pipeline be in FP8 (parallel/execution.py).
    """
    chosen = {operation: name for operation in KernelConfig.model_fields if (name := getattr(kernels, operation))}
    if not config.train.cuda_graphs or (config.data.reset_at_document and reads_documents(chosen)):
        return False
    return config.parallel.pipeline == 1 or config.train.matmul_precision is None


def _planned(operation: str, asked: str, requirements: KernelRequirements) -> str:
    def declines(name: str) -> str | None:
        implementation = IMPLEMENTATIONS[operation][name]
        if asked == "auto" and implementation.is_extra:
            return "it has to be installed besides"
        return why_unasked(operation, name, requirements) or implementation.declines(requirements)

    return choose(operation, asked, declines=declines)


@dataclass(frozen=True)
class Seconds:
    """Seconds of a kernel for each channel and token, on an H100."""

    forward: float
    backward: float


def _measured(forward_ms: float, backward_ms: float) -> Seconds:
    return Seconds(forward_ms * 1e-3 / KERNEL_ELEMENTS, backward_ms * 1e-3 / KERNEL_ELEMENTS)


# One H100 80GB, torch 2.11, B4 D5632 L4096 N16, bf16, medians (benchmarks/kernels.py). Our own scan: scan.py.
MAMBA_SSM_SCAN = _measured(3.741, 6.593)  # mamba-ssm 2.3.2, with the copies to its layout, time innermost, and back
CONV = {
    "cuda": _measured(0.181, 0.351),
    "causal-conv1d": _measured(0.147, 0.296),  # causal-conv1d 1.7.0
    "torch": _measured(1.741, 4.921),
}
# By flops.py's count, of B8 H12 d128 L4096 W2048 forward and backward.
ATTENTION_FLOP = 3 * 4.0 * 12 * 128 * (2048 * 2049 / 2 + 2048 * 2048) * 8
# Milliseconds at B8 H12 d128 L4096 W2048 on the same. flash-attn is taken for PyTorch's copy of it, and its blocks with
# masks are assumed to take twice as long.
ATTENTION = {
    "cudnn": (0.568, 1.775),
    "flex": (0.869, 2.426),
    "torch-flash": (1.137, 3.134),
    "flash-attn": (1.137, 3.134),
    "torch": (2 * 1.137, 2 * 3.134),
}

# Casts to fp32 and back around the norm, and in its backward two readings for the weight's gradient.
NORM = {"torch": Traffic(20, 32), "compiled": Traffic(4, 6, fused=True), "apex": Traffic(4, 6, fused=True)}
# A sum forward and one backward; the compiled norm takes them in and passes the stream through.
RESIDUAL = {
    "torch": Traffic(6, 6, fused=True),
    "compiled": Traffic(4, 2, fused=True),
    "apex": Traffic(6, 6, fused=True),
}
# Of a logit: the cast, the softmax's two readings; backward the filling of the gradient, the softmax's and the cast.
LOSS = {"torch": Traffic(18, 26), "compiled": Traffic(4, 4, fused=True)}
EMBEDDING = Traffic(14, 30)  # of a token's width: the lookup in fp32 and its cast; the gradient's and its scattering

# Products in FP8 over those in bf16, and the rounding of an element of an input or a gradient, and of a weight, whose
# largest number is sought before: from the profile of a step of 1.3B on one H200 (benchmarks/step.py --profile).
FP8_SPEED = 1.94
FP8_ROUNDING_S, FP8_WEIGHT_ROUNDING_S = 2.02e-12, 3.16e-12

# Of a weight: the writing of its rounded copy, with reading it before, and a gradient's addition to one that is there.
ROUNDED_BYTES, ROUNDING_BYTES, ACCUMULATION_BYTES = 2, 6, 12
