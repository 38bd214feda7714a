"""What a rank of a layout holds in memory: weights, gradients, optimizer states, activations and buffers.

Activations are what autograd saves; a mixer counts what its own layer does. T: tokens of a micro-batch on the rank; `a`
is the bytes of an activation (2 in bf16).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sambalm.model.mixers.counts import FP32_BYTES, KernelNames
from sambalm.model.registry import mixer
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner.sizes import (
    activation_bytes,
    is_first,
    is_last,
    local_sizes,
    micro_batch_tokens,
    only_rounded_elements,
    share_of,
    stage_parameters,
    stage_parts,
)

ENDS = "ends"  # embedding, final norm, head and loss, and what a pipeline keeps between parts

# DeepSpeed 0.19.8's defaults, in elements (runtime/zero/config.py). Stage 2 allocates the bucket while gradients are
# reduced, stage 3 keeps it, and stage 1 has none (parallel/zero/gradients.py). Stage 3 keeps gathered weights, up to
# max_live_parameters.
REDUCE_BUCKET_ELEMENTS = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000


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


@dataclass(frozen=True)
class SublayerMemory:
    """Bytes of one kind of sublayer."""

    saved_bytes: int  # what autograd keeps
    backward_bytes: int  # what its backward needs besides


def sublayer_memory(config: RunConfig, kernels: KernelNames) -> dict[str, SublayerMemory]:
    """Of each kind, which all stages share."""
    found, recompute = {}, config.parallel.recompute
    for letter in set(config.model.pattern):
        saved, whole = (
            sublayer_saved_bytes(config, letter, kernels=kernels, recompute=mode) for mode in (recompute, "none")
        )
        again = {"none": 0, "selective": max(0, whole - saved), "full": whole}[recompute]
        found[letter] = SublayerMemory(saved, again + _gradient_bytes(config, letter, kernels=kernels))
    return found


def stage_memories(config: RunConfig, *, world_size: int, kernels: KernelNames) -> tuple[RankMemory, ...]:
    """The fullest rank of each pipeline stage, estimated."""
    sublayers = sublayer_memory(config, kernels)
    return tuple(
        _rank_memory(config, sublayers, stage=stage, world_size=world_size, kernels=kernels)
        for stage in range(config.parallel.pipeline)
    )


def _rank_memory(
    config: RunConfig, sublayers: dict[str, SublayerMemory], *, stage: int, world_size: int, kernels: KernelNames
) -> RankMemory:
    parallel = config.parallel
    weights, gradients, optimizer = _state_bytes(config, stage=stage, world_size=world_size)
    saved = dict.fromkeys([*(one.name for one in config.model.kinds), ENDS], 0)
    parts = stage_parts(config)[stage]
    stay = rounded_weights_stay(config, world_size=world_size)
    rounded = [_part_rounded_bytes(config, part) if stay else Counter() for part in parts]
    alone = only_rounded_elements(config, stage, world_size=world_size)
    in_flight = Counter(chunks_in_flight(config, stage=stage, world_size=world_size))
    for number, forwards in in_flight.items():
        for kind, kept in _part_saved_bytes(config, parts[number], sublayers, kernels=kernels).items():
            saved[kind] += forwards * (kept - rounded[number][kind])
    moments = [_workspace_moments(config, part, sublayers, kernels=kernels) for part in parts]
    shared = parallel.replicas(world_size) > 1
    flat = shared and parallel.zero_stage == 1  # gradients, which are always there
    bucket = REDUCE_BUCKET_ELEMENTS * FP32_BYTES if shared and not flat else 0
    late = 0
    if config.accumulation_steps(data_size=world_size // parallel.model_ranks) == 1 and not flat:
        # Without gradients of an earlier micro-batch: they come, and the bucket with the first, after the loss's.
        late = gradients + max(0, min(bucket, *(at_loss - in_layers for at_loss, in_layers in moments)))
    return RankMemory(
        weights_bytes=weights - alone * FP32_BYTES,
        rounded_bytes=max(sum(copies.total() for copies in rounded), _rounded_bytes(config, alone)),
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        saved_by_kind=saved,
        workspace_bytes=max(max(moment) for moment in moments),
        communication_bytes=bucket + (_gather_buffer_bytes(config) if parallel.sequence else 0),
        late_bytes=late,
    )


def _state_bytes(config: RunConfig, *, stage: int, world_size: int) -> tuple[int, int, int]:
    """Weights, gradients and optimizer states. ZeRO's partition of the weights counts as the optimizer's."""
    parallel, parameters = config.parallel, stage_parameters(config, stage)
    whole = parameters * FP32_BYTES
    replicas = parallel.replicas(world_size)
    if replicas == 1:  # no ZeRO
        return whole, whole, 2 * whole
    share = math.ceil(whole / replicas)
    optimizer = 3 * share  # the partition that the optimizer steps, and two moments
    if parallel.zero_stage == 1:
        return whole, whole, optimizer
    if parallel.zero_stage == 2:
        return whole, share, optimizer
    return share + min(whole, MAX_LIVE_PARAMETERS * FP32_BYTES), share, optimizer


def chunks_in_flight(config: RunConfig, *, stage: int, world_size: int) -> list[int]:
    """The parts (by number on the stage) of all forwards that wait for their backward when a stage is fullest."""
    parallel = config.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    if chunks == 1:
        return [0] * min(stages - stage, micro_batches)
    # megatron-core's interleaved schedule: warm-up forwards, and the one before the first backward; it takes the chunks
    # in rounds of one micro-batch a stage.
    forwards = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, micro_batches * chunks)
    return [number // stages % chunks for number in range(forwards)]


def _part_saved_bytes(
    config: RunConfig, part: range, sublayers: dict[str, SublayerMemory], *, kernels: KernelNames
) -> dict[str, int]:
    """What autograd keeps of one forward through a part, by kind of sublayer."""
    model = config.model
    saved = {ENDS: 0}
    share = share_of(config, kernels)
    for letter, count in Counter(model.pattern[part.start : part.stop]).items():
        saved[mixer(letter).name] = count * sublayers[letter].saved_bytes
        saved[ENDS] += mixer(letter).shared_inputs_bytes(model, share)  # once for all layers of the kind
    if is_last(part, model):
        saved[ENDS] += head_saved_bytes(config, kernels=kernels)
    if is_first(part, model):
        saved[ENDS] += micro_batch_tokens(config) * 8  # the tokens, int64
    if config.parallel.pipeline > 1:
        saved[ENDS] += 2 * _residual_bytes(config)  # the part's input and output, which the schedule keeps
    return saved


def rounded_weights_stay(config: RunConfig, *, world_size: int) -> bool:
    """Whether weights are rounded once a step, into copies that stay, and not at every use."""
    return not config.parallel.partitions(world_size) and config.parallel.recompute != "full"


def _part_rounded_bytes(config: RunConfig, part: range) -> Counter[str]:
    """Of a part's weights, by kind of sublayer."""
    model, tensor = config.model, config.parallel.tensor
    copies = Counter()
    for letter, count in Counter(model.pattern[part.start : part.stop]).items():
        copies[mixer(letter).name] = count * _rounded_bytes(config, local_sizes(model, letter, tensor).matrix)
    if is_last(part, model):
        copies[ENDS] = _rounded_bytes(config, model.vocab_size // tensor * model.hidden_size)
    return copies


def _rounded_bytes(config: RunConfig, elements: int) -> int:
    """Of weights in the activations' dtype, where it is another one."""
    a = activation_bytes(config)
    return elements * a if a < FP32_BYTES else 0


def sublayer_saved_bytes(config: RunConfig, letter: str, *, kernels: KernelNames, recompute: str) -> int:
    """What autograd keeps of one sublayer under a setting of parallel.recompute."""
    if recompute == "full":
        return _residual_bytes(config)
    weights = _rounded_bytes(config, local_sizes(config.model, letter, config.parallel.tensor).matrix)
    own = mixer(letter).saved_bytes(config.model, share_of(config, kernels), inside=recompute == "none")
    return _norm_bytes(config, kernels) + weights + own


def _residual_bytes(config: RunConfig) -> int:
    """The residual stream once."""
    tokens = micro_batch_tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)
    return tokens * config.model.hidden_size * activation_bytes(config)


def _norm_bytes(config: RunConfig, kernels: KernelNames) -> int:
    """The input, which PyTorch's own norm keeps in fp32, and its statistics; and the output for what follows."""
    residual = _residual_bytes(config)
    elements = residual // activation_bytes(config)
    kept = residual if kernels.norm != "torch" else elements * FP32_BYTES
    if kernels.device == "cpu":
        kept *= 2  # and the input times its statistics
    return kept + elements // config.model.hidden_size * FP32_BYTES + residual


def head_saved_bytes(config: RunConfig, *, kernels: KernelNames) -> int:
    a, vocabulary = activation_bytes(config), config.model.vocab_size // config.parallel.tensor
    # The log-probabilities in fp32, or of a fused loss the logits.
    logit_bytes = a if _loss_is_fused(config, kernels) else FP32_BYTES
    log_probabilities = logit_bytes * micro_batch_tokens(config) * vocabulary
    labels = 8 * micro_batch_tokens(config)
    cast = _rounded_bytes(config, vocabulary * config.model.hidden_size)
    return _norm_bytes(config, kernels) + log_probabilities + labels + cast


def _loss_is_fused(config: RunConfig, kernels: KernelNames) -> bool:
    return kernels.elementwise == "compiled" and config.parallel.tensor == 1


def _workspace_moments(
    config: RunConfig, part: range, sublayers: dict[str, SublayerMemory], *, kernels: KernelNames
) -> tuple[int, int]:
    """What a part's backward needs beside all that its forward kept: at the loss, and at its dearest sublayer."""
    model = config.model
    a, T = activation_bytes(config), micro_batch_tokens(config)
    at_loss, in_layers, freed = 0, 0, 0
    if is_last(part, model):
        # Gradients of the log-probabilities and of the logits; over several ranks the first is written in place. Fused,
        # there are the logits' alone.
        widths = 2 * FP32_BYTES if config.parallel.tensor == 1 else 2 * a
        widths = a if _loss_is_fused(config, kernels) else widths
        at_loss = widths * T * model.vocab_size // config.parallel.tensor
        freed = head_saved_bytes(config, kernels=kernels)  # before any sublayer's backward
    for letter in set(model.pattern[part.start : part.stop]):
        in_layers = max(in_layers, sublayers[letter].backward_bytes - freed)
    return at_loss, in_layers


def _gradient_bytes(config: RunConfig, letter: str, *, kernels: KernelNames) -> int:
    """Counts the widest gradients that are alive together in a sublayer's backward, and that of its residual stream."""
    return mixer(letter).backward_bytes(config.model, share_of(config, kernels)) + 2 * _residual_bytes(config)


def _gather_buffer_bytes(config: RunConfig) -> int:
    """megatron-core's buffer that sequence parallelism gathers a layer's input into."""
    return micro_batch_tokens(config) * config.model.hidden_size * activation_bytes(config)
