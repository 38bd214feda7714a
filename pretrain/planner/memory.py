"""What a rank of a layout holds in memory: weights, gradients, optimizer states, activations and buffers.

Activations are what autograd saves, counted by formula for each kind of sublayer. T: tokens of a micro-batch on the
rank, D: Mamba's channels on the rank, N: states; `a` is the bytes of an activation (2 in bf16).
"""

import math
from collections import Counter
from dataclasses import dataclass

from sambalm.model.config import ATTENTION, MAMBA, MLP
from sambalm.model.ops.reference.selective_scan import CHUNK_ELEMENTS, MAX_CHUNK_TOKENS
from sambalm.model.ops.reference.window_attention import MAX_BLOCK_QUERIES, MIN_BLOCK_QUERIES
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner.kernels import KernelNames
from sambalm.pretrain.planner.sizes import (
    ACTIVATION_BYTES,
    FP32_BYTES,
    LocalSizes,
    is_first,
    is_last,
    local_sizes,
    micro_batch_tokens,
    only_rounded_elements,
    stage_parameters,
    stage_parts,
)

KINDS = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}

# DeepSpeed 0.19.8's defaults, in elements (runtime/zero/config.py). Stage 2 allocates the bucket while gradients are
# reduced, stage 3 keeps it, and stage 1 has none (parallel/zero/gradients.py). Stage 3 keeps gathered weights, up to
# max_live_parameters.
REDUCE_BUCKET_ELEMENTS = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
CUDA_SCAN_CHUNK_TOKENS = 16  # model/ops/cuda/scan.py keeps states before each, in 16 bits with 16-bit inputs
MAMBA_SSM_CHUNK_TOKENS = 2048  # mamba-ssm 2.3.2 (csrc/selective_scan) keeps a pair of fp32 states for each


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its fullest, by part."""

    weights_bytes: int
    rounded_bytes: int  # the weights' copies in the activations' dtype that stay (parallel/zero/compute_weights.py)
    gradients_bytes: int
    optimizer_bytes: int
    mamba_bytes: int
    attention_bytes: int
    mlp_bytes: int
    ends_bytes: int  # saved by embedding, final norm, head and loss, and what a pipeline keeps between parts
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
        return self.mamba_bytes + self.attention_bytes + self.mlp_bytes + self.ends_bytes


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
    saved = dict.fromkeys(("mamba", "attention", "mlp", "ends"), 0)
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
        **{f"{kind}_bytes": kept for kind, kept in saved.items()},
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
    saved = dict.fromkeys(("mamba", "attention", "mlp", "ends"), 0)
    for letter, count in Counter(model.pattern[part.start : part.stop]).items():
        saved[KINDS[letter]] = count * sublayers[letter].saved_bytes
    if is_last(part, model):
        saved["ends"] += head_saved_bytes(config, kernels=kernels)
    if is_first(part, model):
        saved["ends"] += micro_batch_tokens(config) * 8  # the tokens, int64
    if config.parallel.pipeline > 1:
        saved["ends"] += 2 * _residual_bytes(config)  # the part's input and output, which the schedule keeps
    # Rotary tables, once for all sublayers.
    saved["ends"] += FP32_BYTES * model.head_dim * config.data.sequence_length // config.parallel.context
    return saved


def rounded_weights_stay(config: RunConfig, *, world_size: int) -> bool:
    """Whether weights are rounded once a step, into copies that stay, and not at every use."""
    return not config.parallel.partitions(world_size) and config.parallel.recompute != "full"


def _part_rounded_bytes(config: RunConfig, part: range) -> Counter[str]:
    """Of a part's weights, by kind of sublayer."""
    model, tensor = config.model, config.parallel.tensor
    copies = Counter()
    for letter, count in Counter(model.pattern[part.start : part.stop]).items():
        copies[KINDS[letter]] = count * _rounded_bytes(config, local_sizes(model, letter, tensor).matrix)
    if is_last(part, model):
        copies["ends"] = _rounded_bytes(config, model.vocab_size // tensor * model.hidden_size)
    return copies


def _rounded_bytes(config: RunConfig, elements: int) -> int:
    """Of weights in the activations' dtype, where it is another one."""
    a = ACTIVATION_BYTES[config.train.precision]
    return elements * a if a < FP32_BYTES else 0


def sublayer_saved_bytes(config: RunConfig, letter: str, *, kernels: KernelNames, recompute: str) -> int:
    """What autograd keeps of one sublayer under a setting of parallel.recompute."""
    if recompute == "full":
        return _residual_bytes(config)
    inside = recompute == "none"
    size = local_sizes(config.model, letter, config.parallel.tensor)
    weights = _rounded_bytes(config, size.matrix)
    own = {MAMBA: _mamba_bytes, ATTENTION: _attention_bytes, MLP: _mlp_bytes}[letter]
    return _norm_bytes(config, kernels) + weights + own(config, size, kernels, inside)


def _residual_bytes(config: RunConfig) -> int:
    """The residual stream once."""
    tokens = micro_batch_tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)
    return tokens * config.model.hidden_size * ACTIVATION_BYTES[config.train.precision]


def _norm_bytes(config: RunConfig, kernels: KernelNames) -> int:
    """The input, which PyTorch's own norm keeps in fp32, and its statistics; and the output for what follows."""
    residual = _residual_bytes(config)
    elements = residual // ACTIVATION_BYTES[config.train.precision]
    kept = residual if kernels.norm != "torch" else elements * FP32_BYTES
    if kernels.device == "cpu":
        kept *= 2  # and the input times its statistics
    return kept + elements // config.model.hidden_size * FP32_BYTES + residual


def _mamba_bytes(config: RunConfig, size: LocalSizes, kernels: KernelNames, inside: bool) -> int:
    a, T, D = ACTIVATION_BYTES[config.train.precision], micro_batch_tokens(config), size.channels
    N, R = config.model.d_state, config.model.dt_rank_size
    narrow = a < FP32_BYTES
    halo = config.train.micro_batch_size * (config.model.d_conv - 1)
    total = 2 * D * N * FP32_BYTES  # A's exponential and its negative
    total += a * T * D * 2 + a * T * (R + 2 * N)  # the outputs of conv and scan, x_proj's output
    if kernels.conv == "torch":
        total += a * (2 * T + halo) * D  # the input with what precedes, and the sum
    states = FP32_BYTES * config.train.micro_batch_size * D * N
    if config.parallel.context > 1:  # all ranks' decays and reached states, and the state at the start
        total += (2 * config.parallel.context + 2) * states
    if config.parallel.context > 2:  # a rank between others: the step sizes and the decay that it passes on
        total += FP32_BYTES * T * D + 2 * states
        if inside:  # and a scan from zero, of which the output and so the gate are not kept
            in_torch = FP32_BYTES * T * (3 * D + 2 * N if narrow else 2 * D)
            total += in_torch if kernels.scan == "torch" else _scan_bytes(config, D, kernels)
            total += _state_bytes_of(config, D, kernels=kernels)
    # x and z are one tensor: it stays whole for a kernel that keeps either.
    keeps_z = kernels.scan == "cuda" or (kernels.scan == "torch" and not narrow) or not inside
    total += a * T * 2 * D if keeps_z or kernels.conv != "torch" else 0
    if not inside:
        return total + a * T * D  # dt
    return total + _state_bytes_of(config, D, kernels=kernels) + _scan_bytes(config, D, kernels)


def _scan_bytes(config: RunConfig, channels: int, kernels: KernelNames) -> int:
    """What a scan keeps for its backward besides states, u, z and its output."""
    a, T, N = ACTIVATION_BYTES[config.train.precision], micro_batch_tokens(config), config.model.d_state
    if kernels.scan == "mamba-ssm":  # u, dt, z, B and C time-innermost, and the output before the gate
        return a * T * (4 * channels + 2 * N)
    if kernels.scan == "cuda":  # dt, and B and C in fp32
        return T * (a * channels + FP32_BYTES * 2 * N)
    # u and z in fp32 where they were not; softplus's argument and result, the sum with the skip, the gate.
    return FP32_BYTES * T * ((6 * channels + 2 * N) if a < FP32_BYTES else 4 * channels)


def _state_bytes_of(config: RunConfig, channels: int, *, kernels: KernelNames) -> int:
    """The states that a scan keeps at the borders of its chunks."""
    batch, length = config.train.micro_batch_size, config.data.sequence_length // config.parallel.context
    one = batch * channels * config.model.d_state
    if kernels.scan == "mamba-ssm":
        return math.ceil(length / MAMBA_SSM_CHUNK_TOKENS) * 2 * one * FP32_BYTES
    if kernels.scan == "cuda":
        return math.ceil(length / CUDA_SCAN_CHUNK_TOKENS) * one * ACTIVATION_BYTES[config.train.precision]
    return math.ceil(length / _chunk_tokens(one, kernels)) * one * FP32_BYTES


def _attention_bytes(config: RunConfig, size: LocalSizes, kernels: KernelNames, inside: bool) -> int:
    a, T = ACTIVATION_BYTES[config.train.precision], micro_batch_tokens(config)
    context = config.parallel.context
    total = a * T * 2 * size.query  # the rotated queries, and o_proj's input
    if context > 1:  # keys and values in one tensor, and once more those that are joined to the neighbours'
        keys = sum(queries + before for queries, before in _attention_calls(config))
        total += a * config.train.micro_batch_size * keys * 2 * size.kv
    else:
        total += a * T * (size.query + 3 * size.kv)  # the projections, for the values, and the rotated keys
    if not inside:
        return total
    total += a * T * size.query + FP32_BYTES * T * size.query // config.model.head_dim  # output, log-sum-exp
    if kernels.attention != "torch":
        return total
    return total + sum(_joined_blocks_bytes(config, size, *call) for call in _attention_calls(config))


def _attention_calls(config: RunConfig) -> list[tuple[int, int]]:
    """Queries, and keys before the first of them, of each call of the attention kernel on a sequence's last rank."""
    length, window, context = config.data.sequence_length, config.model.window, config.parallel.context
    part = length // context
    if context == 1:
        return [(length, 0)]
    near = min(window - 1, part)
    calls = [(near, min(window - 1, (context - 1) * part)), (part - near, near)]
    return [(queries, before) for queries, before in calls if queries]


def _joined_blocks_bytes(config: RunConfig, size: LocalSizes, length: int, before: int) -> int:
    """Of one call of the attention in plain PyTorch: the masks, and the keys and values that each block joins."""
    a, window = ACTIVATION_BYTES[config.train.precision], config.model.window
    before = min(before, window - 1)
    if before == 0 and length <= window:
        return 0
    block = max(MIN_BLOCK_QUERIES, min(window, MAX_BLOCK_QUERIES))
    total = 0
    starts = [0, *range(before + block, before + length, block), before + length]
    for number in range(len(starts) - 1):
        first_query = starts[number] if number else before
        first_key = max(start for start in starts if start <= max(0, first_query - window + 1))
        keys, queries = starts[number + 1] - first_key, starts[number + 1] - first_query
        total += queries * keys * a
        if first_key != starts[number]:
            total += config.train.micro_batch_size * keys * 2 * size.kv * a
    return total


def _mlp_bytes(config: RunConfig, size: LocalSizes, kernels: KernelNames, inside: bool) -> int:
    """Gate and up, SiLU of the gate where it is an operation of its own, and their product."""
    widths = 3 if kernels.elementwise == "compiled" else 4
    return ACTIVATION_BYTES[config.train.precision] * micro_batch_tokens(config) * widths * size.mlp


def head_saved_bytes(config: RunConfig, *, kernels: KernelNames) -> int:
    a, vocabulary = ACTIVATION_BYTES[config.train.precision], config.model.vocab_size // config.parallel.tensor
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
    a, T = ACTIVATION_BYTES[config.train.precision], micro_batch_tokens(config)
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
    """The widest gradients that are alive together in a sublayer's backward, and that of its residual stream."""
    a, T = ACTIVATION_BYTES[config.train.precision], micro_batch_tokens(config)
    size = local_sizes(config.model, letter, config.parallel.tensor)
    widths = {
        MAMBA: FP32_BYTES * 4 * size.channels,
        ATTENTION: a * 2 * (size.query + 2 * size.kv),
        MLP: a * 4 * size.mlp,
    }[letter]
    chunk = 0
    if letter == MAMBA and kernels.scan == "torch":  # decays, states, gradients and a product of theirs
        token = config.train.micro_batch_size * size.channels * config.model.d_state
        chunk = 4 * FP32_BYTES * token * _chunk_tokens(token, kernels)
    return T * widths + 2 * _residual_bytes(config) + chunk


def _chunk_tokens(token_elements: int, kernels: KernelNames) -> int:
    """Tokens that the scan in plain PyTorch takes at a time."""
    elements = CHUNK_ELEMENTS[kernels.device]
    return max(1, min(MAX_CHUNK_TOKENS, elements // token_elements))


def _gather_buffer_bytes(config: RunConfig) -> int:
    """megatron-core's buffer that sequence parallelism gathers a layer's input into."""
    return micro_batch_tokens(config) * config.model.hidden_size * ACTIVATION_BYTES[config.train.precision]
