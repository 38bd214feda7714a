"""What a run's model and layout ask of its kernels, known before the model is built."""

from typing import Any, Literal

from sambalm.model.config import ModelConfig
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.parallel.shard import Place, Position


def kernel_requirements(
    config: ModelConfig,
    *,
    device: str,
    precision: Literal["bf16", "fp16", "fp32"],
    micro_batch_size: int,
    sequence_length: int,
    resets: bool,
    tp: Place = Position(1),
    cp: Place = Position(1),
) -> KernelRequirements:
    """Gathers what the mixers of a model ask of kernels on one rank.

    Args:
        device: the type of the run's device, cuda or cpu.
        precision: of activations.
        sequence_length: tokens of a whole training sequence, over all context-parallel ranks.
        resets: whether sequences are packed with documents that must not see each other.
        tp, cp: the rank's places among tensor- and context-parallel ranks.
    """
    needs: dict[str, Any] = {"initial_states": cp.size > 1, "resets": resets}
    for one in config.kinds:
        own = one.kernel_needs(config, sequences=micro_batch_size, part_tokens=sequence_length // cp.size, tp=tp, cp=cp)
        for name, value in own.items():  # a kernel has to take the calls, and the largest sizes, of every mixer
            listed = isinstance(value, tuple)
            needs[name] = (*needs.get(name, ()), *value) if listed else max(value, needs.get(name, value))
    return KernelRequirements(device, precision, **needs)
