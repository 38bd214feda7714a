"""How long a step of a layout takes, estimated: the sum of what the device computes, moves and sends, as if nothing
overlapped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sambalm.model.config import ATTENTION, MAMBA, ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.plan_communication import Transfer
from sambalm.pretrain.plan_hardware import (
    ACTIVATION_PASSES,
    ADAM_BYTES_PER_PARAMETER,
    CAST_BYTES_PER_PARAMETER,
    RECOMPUTED_SHARE,
    TORCH_SCAN_PASSES,
    TORCH_SCAN_TOKEN_S,
    Hardware,
)
from sambalm.pretrain.plan_memory import (
    CUDA,
    FP32_BYTES,
    head_saved_bytes,
    is_last,
    local_sizes,
    micro_batch_tokens,
    stage_parameters,
    stage_parts,
    sublayer_saved_bytes,
)


@dataclass(frozen=True)
class StepTime:
    """Where the slowest stage's step goes, in seconds."""

    compute_s: float
    layout_s: float  # communication of tensor, context and pipeline parallelism
    bubble_s: float
    zero_s: float  # gradients and weights between replicas
    optimizer_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.layout_s + self.bubble_s + self.zero_s + self.optimizer_s


def step_time(
    config: RunConfig, transfers: Sequence[Sequence[Transfer]], *, world_size: int, hardware: Hardware
) -> StepTime:
    """Of the slowest pipeline stage, which all others wait for.

    Args:
        transfers: `step_transfers` of each stage.
    """
    seconds = {letter: _sublayer_s(config, letter, hardware) for letter in set(config.model.pattern)}
    times = []
    for stage, sent in enumerate(transfers):
        compute_s = sum(_part_s(config, part, seconds, hardware) for part in stage_parts(config)[stage])
        times.append(_stage_time(config, stage, sent, compute_s, world_size=world_size, hardware=hardware))
    return max(times, key=lambda time: time.total_s)


def _stage_time(
    config: RunConfig,
    stage: int,
    transfers: Sequence[Transfer],
    compute_s: float,
    *,
    world_size: int,
    hardware: Hardware,
) -> StepTime:
    """Of a stage that computes compute_s for each micro-batch."""
    parallel = config.parallel
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    sent_s = {dimension: 0.0 for dimension in ("tensor", "context", "pipeline", "data")}
    for transfer in transfers:
        rate = bandwidth(config, transfer, world_size=world_size, hardware=hardware)
        sent_s[transfer.dimension] += transfer.wire_bytes / rate
    layout_s = sent_s["tensor"] + sent_s["context"] + sent_s["pipeline"]
    busy_s = micro_batches * compute_s + layout_s
    share = stage_parameters(config, stage) / (world_size // (parallel.tensor * parallel.pipeline))
    return StepTime(
        compute_s=micro_batches * compute_s,
        layout_s=layout_s,
        bubble_s=busy_s * (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline),
        zero_s=sent_s["data"],
        optimizer_s=share * ADAM_BYTES_PER_PARAMETER / hardware.memory_bytes_per_s,
    )


def _part_s(config: RunConfig, part: range, seconds: dict[str, float], hardware: Hardware) -> float:
    """Forward and backward of one micro-batch through a part of the model, on the rank with the largest shares.

    Args:
        seconds: of each kind of sublayer.
    """
    model = config.model
    total = sum(seconds[letter] for letter in model.pattern[part.start : part.stop])
    if is_last(part, model):
        weights = model.vocab_size // config.parallel.tensor * model.hidden_size
        total += _matrix_s(config, weights, hardware, passes=3)
        total += _memory_s(head_saved_bytes(config, kernels=CUDA), hardware)
    return total


def _sublayer_s(config: RunConfig, letter: str, hardware: Hardware) -> float:
    recompute = config.parallel.recompute
    size = local_sizes(config.model, letter, config.parallel.tensor)
    total = _matrix_s(config, size.matrix, hardware, passes=4 if recompute == "full" else 3)
    saved = sublayer_saved_bytes(config, letter, kernels=CUDA, recompute="none")
    total += _memory_s(saved, hardware) * (1 + (RECOMPUTED_SHARE["elementwise"] if recompute == "full" else 0))
    inside = {MAMBA: _scan_s, ATTENTION: _attention_s}.get(letter)
    return total + (inside(config, hardware) if inside else 0.0)


def _matrix_s(config: RunConfig, weights: int, hardware: Hardware, *, passes: int) -> float:
    """Matrix products of a micro-batch with some weights, and the casts of those and of their gradients."""
    flops = passes * 2.0 * weights * micro_batch_tokens(config)
    cast_s = weights * CAST_BYTES_PER_PARAMETER / hardware.memory_bytes_per_s
    return flops / (hardware.matrix_flops * hardware.matrix_efficiency) + cast_s


def _memory_s(saved_bytes: int, hardware: Hardware) -> float:
    return saved_bytes * ACTIVATION_PASSES / hardware.memory_bytes_per_s


def _scan_s(config: RunConfig, hardware: Hardware) -> float:
    parallel, model = config.parallel, config.model
    elements = local_sizes(model, MAMBA, parallel.tensor).channels * micro_batch_tokens(config)
    conv_s = elements * hardware.conv_element_s
    again = 0.0 if parallel.recompute == "none" else RECOMPUTED_SHARE["scan"]
    if CUDA.scan_is_cuda(config):
        return conv_s + elements * hardware.scan_element_s * (1 + again)
    length = config.data.sequence_length // parallel.context
    moved_bytes = elements * model.d_state * FP32_BYTES * TORCH_SCAN_PASSES
    once_s = length * TORCH_SCAN_TOKEN_S + moved_bytes / hardware.memory_bytes_per_s
    # Once for the state that the rank reaches from zero, once from the state that it starts at.
    return conv_s + once_s * (2 + again)


def _attention_s(config: RunConfig, hardware: Hardware) -> float:
    size = local_sizes(config.model, ATTENTION, config.parallel.tensor)
    share = size.query / config.model.hidden_size
    flops = _window_flops(config.model, config.data.sequence_length) * share
    again = 0.0 if config.parallel.recompute == "none" else RECOMPUTED_SHARE["attention"]
    return flops * micro_batch_tokens(config) / hardware.attention_flops * (1 + again)


@lru_cache(maxsize=8)
def _window_flops(model: ModelConfig, sequence_length: int) -> float:
    """Of one attention sublayer, a token."""
    return flops_per_token(model, sequence_length=sequence_length).window / model.pattern.count(ATTENTION)


def bandwidth(config: RunConfig, transfer: Transfer, *, world_size: int, hardware: Hardware) -> float:
    """Bytes a second that each rank of an operation sends.

    Ranks are numbered over tensor, context, data and pipeline, the first changing fastest. A group that reaches beyond
    a node uses the adapters of all its members there.
    """
    parallel = config.parallel
    stride = {
        "tensor": 1,
        "context": parallel.tensor,
        "data": parallel.tensor,  # ranks with the same weights: those of the context and the data dimension
        "pipeline": world_size // parallel.pipeline,
    }[transfer.dimension]
    if stride * transfer.ranks <= hardware.node_gpus:
        return hardware.node_bytes_per_s
    members = max(1, hardware.node_gpus // stride)
    if transfer.operation == "send":
        members = 1
    return min(hardware.node_bytes_per_s, members * hardware.network_bytes_per_s)
