"""What a run's model and layout ask of its kernels, known before the model is built. Needs no torch."""

from typing import Literal

from sambalm.model.config import ModelConfig
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.parallel.shard import Place, Position

ALONE = Position(1)


def kernel_requirements(
    config: ModelConfig,
    *,
    device: str,
    precision: Literal["bf16", "fp16", "fp32"],
    micro_batch_size: int,
    sequence_length: int,
    resets: bool,
    tensor: Place = ALONE,
    context: Place = ALONE,
) -> KernelRequirements:
    """Collects what one rank's kernels must be able to do in training.

    Args:
        device: the type of the run's device, cuda or cpu.
        precision: of activations.
        sequence_length: tokens of a whole training sequence, over all context-parallel ranks.
        resets: whether sequences are packed with documents that must not see each other.
        tensor, context: the rank's place among those that share layers, and among those that share sequences.
    """
    tokens = sequence_length // context.size
    calls = [
        call
        for kind in config.kinds
        for call in kind.attention_calls(
            config, sequences=micro_batch_size, tokens=tokens, tensor=tensor, context=context
        )
    ]
    return KernelRequirements(
        device,
        precision,
        d_state=config.d_state,
        d_conv=config.d_conv,
        initial_states=context.size > 1,
        resets=resets,
        attention_calls=tuple(calls),
    )
