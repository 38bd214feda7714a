"""What a run's model and layout ask of its kernels, known before the model is built."""

from typing import Literal

from sambalm.model.config import ATTENTION, ModelConfig
from sambalm.model.heads import share_heads
from sambalm.model.ops.implementations import AttentionCall, KernelRequirements
from sambalm.parallel.groups import ContextParallel, TensorParallel

ALONE, WHOLE = TensorParallel(), ContextParallel()


def kernel_requirements(
    config: ModelConfig,
    *,
    device: str,
    precision: Literal["bf16", "fp16", "fp32"],
    micro_batch_size: int,
    sequence_length: int,
    resets: bool,
    tp: TensorParallel = ALONE,
    cp: ContextParallel = WHOLE,
) -> KernelRequirements:
    """
    Args:
        device: the type of the run's device, cuda or cpu.
        precision: of activations.
        sequence_length: tokens of a whole training sequence, over all context-parallel ranks.
        resets: whether sequences are packed with documents that must not see each other.
    """
    calls: tuple[AttentionCall, ...] = ()
    if ATTENTION in config.pattern:
        calls = _attention_calls(config, batch=micro_batch_size, length=sequence_length // cp.size, tp=tp, cp=cp)
    return KernelRequirements(
        device,
        precision,
        d_state=config.d_state,
        d_conv=config.d_conv,
        initial_states=cp.size > 1,
        resets=resets,
        attention_calls=calls,
    )


def _attention_calls(
    config: ModelConfig, *, batch: int, length: int, tp: TensorParallel, cp: ContextParallel
) -> tuple[AttentionCall, ...]:
    """The calls of `layers.WindowAttention` on this rank, which holds `length` tokens of each sequence."""
    share, reach = share_heads(config, tp), config.window - 1
    sizes = [(length, length)]  # queries and keys
    if cp.size > 1:
        near = reach if length >= 2 * reach else length
        halo = min(reach, cp.rank * length)
        sizes = [(length - near, length), (near, halo + near)]
    return tuple(
        AttentionCall(
            batch=batch,
            query_heads=share.query.length // config.head_dim,
            kv_heads=share.kv_heads,
            queries=queries,
            keys=keys,
            head_dim=config.head_dim,
            window=config.window,
        )
        for queries, keys in sizes
        if queries
    )
