"""What a rank of a layout holds in memory: weights, gradients, optimizer states, activations and buffers.

Activations are what autograd saves (activations.py).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sambalm.model.mixers.counts import FP32_BYTES, KernelNames
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner.activations import ChunkMemory, activation_counts, rounded_bytes
from sambalm.pretrain.planner.buckets import SLOTS, layer_buckets
from sambalm.pretrain.planner.sizes import (
    Stage,
    activation_bytes,
    distinct_stages,
    micro_batch_tokens,
    only_rounded_elements,
    share_of,
    stages_of,
)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its fullest, by part."""

    weights_bytes: int
    rounded_bytes: int  # the weights' copies in the activations' dtype that stay (parallel/zero/compute_weights.py)
    gradients_bytes: int
    optimizer_bytes: int
    saved_by_kind: Mapping[str, int]  # activations that wait for their backward, by mixer, and those of ENDS
    workspace_bytes: int  # what the backward needs beside what was saved
    communication_bytes: int
    late_bytes: int  # of these, what comes only once as many activations have gone

    @property
    def total_bytes(self) -> int:
        standing = self.state_bytes + self.communication_bytes
        return max(standing, standing + self.saved_bytes + self.workspace_bytes - self.late_bytes)

    @property
    def state_bytes(self) -> int:
        return self.weights_bytes + self.rounded_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def saved_bytes(self) -> int:
        """Activations that wait for their backward."""
        return sum(self.saved_by_kind.values())


def stage_memories(config: RunConfig, *, world_size: int, kernels: KernelNames) -> tuple[RankMemory, ...]:
    """Estimates the fullest rank of each pipeline stage."""
    stages = dict(enumerate(stages_of(config)))
    return tuple(_rank_memories(config, stages, world_size=world_size, kernels=kernels))


def needed_bytes(config: RunConfig, *, world_size: int, kernels: KernelNames) -> int:
    """Estimates the memory of the fullest rank of all."""
    ranks = _rank_memories(config, distinct_stages(config), world_size=world_size, kernels=kernels)
    return max(each.total_bytes for each in ranks)


def _rank_memories(
    config: RunConfig, stages: Mapping[int, Stage], *, world_size: int, kernels: KernelNames
) -> Iterator[RankMemory]:
    counts = activation_counts(config.model, share_of(config, kernels), is_pipelined=config.parallel.pipeline > 1)
    for number, stage in stages.items():
        chunks = [counts.of(chunk) for chunk in stage.chunks]
        in_flight = Counter(chunks_in_flight(config, stage=number, world_size=world_size))
        yield _rank_memory(config, stage, chunks, in_flight=in_flight, world_size=world_size)


def _rank_memory(
    config: RunConfig, stage: Stage, chunks: Sequence[ChunkMemory], *, in_flight: Mapping[int, int], world_size: int
) -> RankMemory:
    parallel = config.parallel
    weights, gradients, optimizer = _state_bytes(config, stage, world_size=world_size)
    saved = dict.fromkeys(chunks[0].saved_by_kind, 0)
    stay = rounded_weights_stay(config)
    alone = only_rounded_elements(config, stage, world_size=world_size)
    for number, forwards in in_flight.items():
        elsewhere = chunks[number].rounded_by_kind if stay else {}
        for kind, kept in chunks[number].saved_by_kind.items():
            saved[kind] += forwards * (kept - elsewhere.get(kind, 0))
    late = 0
    if (
        config.accumulation_steps(data_size=world_size // parallel.model_ranks) == 1
        and parallel.replicas(world_size) == 1
    ):
        late = gradients  # those of an earlier micro-batch are not there: they come while activations go
    copies = sum(sum(chunk.rounded_by_kind.values()) for chunk in chunks) if stay else 0
    rounded = max(copies, rounded_bytes(activation_bytes(config), alone))
    if parallel.partitions_weights(world_size):
        layers = layer_buckets(config)
        parts = math.ceil(sum(layers) / parallel.replicas(world_size)) + _in_slots(layers)
        weights -= (sum(layers) - alone) * FP32_BYTES
        rounded += parts * activation_bytes(config) - rounded_bytes(activation_bytes(config), alone)
    return RankMemory(
        weights_bytes=weights - alone * FP32_BYTES,
        rounded_bytes=rounded,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        saved_by_kind=saved,
        workspace_bytes=max(max(chunk.at_loss_bytes, chunk.in_layers_bytes) for chunk in chunks),
        communication_bytes=_gather_buffer_bytes(config) if parallel.sequence else 0,
        late_bytes=late,
    )


def _state_bytes(config: RunConfig, stage: Stage, *, world_size: int) -> tuple[int, int, int]:
    """Weights, gradients and optimizer states. ZeRO's partition of the weights counts as the optimizer's."""
    parallel, whole = config.parallel, stage.parameters * FP32_BYTES
    replicas = parallel.replicas(world_size)
    if replicas == 1:  # no ZeRO
        return whole, whole, 2 * whole
    share = math.ceil(whole / replicas)
    gradients = whole
    if parallel.partitions_gradients(world_size):
        layers = layer_buckets(config)
        gradients += (math.ceil(sum(layers) / replicas) + _in_slots(layers) - sum(layers)) * FP32_BYTES
    return whole, gradients, 3 * share  # the partition that the optimizer steps, and two moments


def _in_slots(layers: Sequence[int]) -> int:
    return min(SLOTS, len(layers)) * max(layers)


def chunks_in_flight(config: RunConfig, *, stage: int, world_size: int) -> list[int]:
    """Returns the chunks, by number on the stage, of all forwards that wait for their backward at the fullest."""
    parallel = config.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    if chunks == 1:
        return [0] * min(stages - stage, micro_batches)
    # megatron-core's interleaved schedule: warm-up forwards, and the one before the first backward; it takes the chunks
    # in rounds of one micro-batch a stage.
    forwards = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, micro_batches * chunks)
    return [number // stages % chunks for number in range(forwards)]


def rounded_weights_stay(config: RunConfig) -> bool:
    """Whether weights are rounded once a step, into copies that stay, and not at every use."""
    return config.parallel.recompute != "full"


def _gather_buffer_bytes(config: RunConfig) -> int:
    """megatron-core's buffer that sequence parallelism gathers a layer's input into."""
    return micro_batch_tokens(config) * config.model.hidden_size * activation_bytes(config)
