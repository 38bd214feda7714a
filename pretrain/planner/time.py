"""How long a step of a layout takes, estimated: the sum of what the device computes, moves and sends, as if nothing but
what ZeRO-1 sends overlapped.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import (
    FP32_BYTES,
    Attention,
    Convolution,
    Kernel,
    KernelNames,
    MemoryPass,
    Scan,
    Share,
    Traffic,
)
from sambalm.model.registry import mixer
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner import hardware as assumed
from sambalm.pretrain.planner import kernels as costs
from sambalm.pretrain.planner.buckets import ReducedGroup, reduced_groups
from sambalm.pretrain.planner.communication import Transfer
from sambalm.pretrain.planner.hardware import Hardware
from sambalm.pretrain.planner.kernels import Seconds
from sambalm.pretrain.planner.memory import rounded_weights_stay
from sambalm.pretrain.planner.scan import cuda_scan_s
from sambalm.pretrain.planner.sizes import (
    Chunk,
    LocalSizes,
    Stage,
    activation_bytes,
    embedding_rows,
    local_sizes,
    only_rounded_elements,
    share_of,
)


@dataclass(frozen=True)
class StepTime:
    """Where the slowest stage's step goes, in seconds."""

    compute_s: float
    layout_s: float  # communication of tensor, context and pipeline parallelism
    bubble_s: float
    zero_s: float  # gradients and weights between replicas, but for what backward and forward hide
    optimizer_s: float
    idle_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.layout_s + self.bubble_s + self.zero_s + self.optimizer_s + self.idle_s


def step_time(
    config: RunConfig,
    stages: Iterable[Stage],
    transfers: Iterable[Sequence[Transfer]],
    *,
    world_size: int,
    hardware: Hardware,
    kernels: KernelNames,
) -> StepTime:
    """The step of the slowest pipeline stage, which all others wait for.

    Args:
        stages: all pipeline stages, or one of each kind.
        transfers: `step_transfers` of each.
    """
    device, times = _device(config.model, share_of(config, kernels), hardware), []
    captured = costs.are_captured(config, kernels)
    timed = partial(_stage_time, world_size=world_size, hardware=hardware, captured=captured)
    for stage, sent in zip(stages, transfers, strict=True):
        times.append(timed(config, stage, sent, device.stage_s(stage)))
    return max(times, key=lambda time: time.total_s)


def least_step_s(
    config: RunConfig, stages: Iterable[Stage], *, world_size: int, hardware: Hardware, kernels: KernelNames
) -> float:
    """Returns what the step takes at least: the time in which the slowest stage computes, and its bubble."""
    parallel = config.parallel
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    device = _device(config.model, share_of(config, kernels), hardware)
    computed_s = micro_batches * max(device.stage_s(stage) for stage in stages)
    return computed_s + computed_s * (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline)


@lru_cache(maxsize=1024)
def _device(model: ModelConfig, share: Share, hardware: Hardware) -> "_Device":
    """Returns one object for all layouts whose ranks compute the same."""
    return _Device(model, share, hardware)


def _stage_time(
    config: RunConfig,
    stage: Stage,
    transfers: Sequence[Transfer],
    compute_s: float,
    *,
    world_size: int,
    hardware: Hardware,
    captured: bool,
) -> StepTime:
    """The step of a stage that computes compute_s for each micro-batch, which may be captured as a CUDA graph."""
    parallel = config.parallel
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    sent_s: defaultdict[tuple[str, str], float] = defaultdict(int)
    for transfer in transfers:
        rate = bandwidth(config, transfer, world_size=world_size, hardware=hardware) * assumed.LINK_SHARE
        wait_s = assumed.CONTEXT_WAIT_S if transfer.dimension == "context" else 0.0
        seconds = transfer.wire_bytes / rate + transfer.messages * (assumed.MESSAGE_S + wait_s)
        sent_s[transfer.dimension, transfer.operation] += seconds
    data_s: float = sum(seconds for (dimension, _), seconds in sent_s.items() if dimension == "data")
    layout_s = sum(sent_s.values()) - data_s
    rounding_s = _rounding_s(config, stage, micro_batches=micro_batches, world_size=world_size, hardware=hardware)
    computed_s = micro_batches * compute_s + rounding_s
    busy_s = computed_s + layout_s
    sublayers = _launched_sublayers(config, stage, micro_batches=micro_batches)
    host_s = _host_s(config, stage, transfers, micro_batches=micro_batches, captured=captured)
    launched_s = max(busy_s + sublayers * assumed.KERNEL_GAPS_S, host_s)
    moved_s, update_s = _deepspeed_s(config, stage, world_size=world_size, hardware=hardware)
    if parallel.overlaps_messages(world_size):
        micro_batch_s = launched_s / micro_batches
        backward_s = micro_batch_s * assumed.BACKWARD_SHARE[parallel.recompute]
        computed = {"backward_s": backward_s, "forward_s": micro_batch_s - backward_s}
        data_s = _exposed_data_s(config, sent_s, micro_batches=micro_batches, **computed)
    return StepTime(
        compute_s=computed_s,
        layout_s=layout_s,
        bubble_s=launched_s * (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline),
        zero_s=data_s + moved_s,
        optimizer_s=update_s,
        idle_s=launched_s - busy_s,
    )


def _exposed_data_s(
    config: RunConfig,
    sent_s: defaultdict[tuple[str, str], float],
    *,
    micro_batches: int,
    backward_s: float,
    forward_s: float,
) -> float:
    """What backwards do not hide of the gradients that ZeRO sends, nor forwards of the weights.

    Under ZeRO-1 the last backward and the first forward of a step do, else all (of the weights under ZeRO-3, which the
    backwards gather once more).
    """
    groups, stage = reduced_groups(config), config.parallel.zero_stage
    layers = sum(group.within_backward for group in groups)
    gathers, reductions = (2 * micro_batches if stage == 3 else 1), (micro_batches if stage > 1 else 1)
    a = activation_bytes(config)
    gathered_s = _messages_s(groups, sent_s["data", "all-gather"], layers_bytes=a, times=gathers)
    reduced_s = _messages_s(groups, sent_s["data", "reduce-scatter"], layers_bytes=FP32_BYTES, times=reductions)
    if stage == 3:
        reduced_s[:layers] = [one + other for one, other in zip(gathered_s[:layers], reduced_s, strict=False)]
    exposed = exposed_s(groups, sent_s=gathered_s, computed_s=forward_s)
    exposed += exposed_s(groups, sent_s=reduced_s, computed_s=backward_s)
    return exposed + (reductions - 1) * exposed_s(groups[:layers], sent_s=reduced_s[:layers], computed_s=backward_s)


def _messages_s(groups: Sequence[ReducedGroup], sent_s: float, *, layers_bytes: int, times: int) -> list[float]:
    """Shares out the seconds of a step's messages: what each group's takes once.

    Args:
        layers_bytes: of an element of a layer's group; of others in fp32.
        times: that a layer's group is sent; others once.
    """
    each = [group.elements * (layers_bytes if group.within_backward else FP32_BYTES) for group in groups]
    total = sum(size * (times if group.within_backward else 1) for group, size in zip(groups, each, strict=True))
    return [sent_s * size / total for size in each]


def exposed_s(groups: Sequence[ReducedGroup], *, sent_s: Sequence[float], computed_s: float) -> float:
    """What is left of a step's reduction of gradients when its last backward ends.

    Groups are reduced one after the other, those of layers once the backward, which takes equally long for every
    parameter, has gone through them. What a forward waits for weights, which are gathered in the opposite order, is
    that backwards in time.

    Args:
        sent_s: that each group's message takes.
        computed_s: that the backward or the forward takes.
    """
    layers = sum(group.elements for group in groups if group.within_backward)
    completed_s = reduced_s = 0.0
    for group, message_s in zip(groups, sent_s, strict=True):
        completed_s = completed_s + computed_s * group.elements / layers if group.within_backward else computed_s
        reduced_s = max(reduced_s, completed_s) + message_s
    return reduced_s - computed_s


def _launched_sublayers(config: RunConfig, stage: Stage, *, micro_batches: int) -> float:
    """How often a step runs a sublayer forward and backward; a forward alone counts as a third of that."""
    passes = micro_batches * (assumed.RECOMPUTED_PASSES if config.parallel.recompute == "full" else 1.0)
    return passes * sum(count for _, count in stage.letters)


def _host_s(
    config: RunConfig,
    stage: Stage,
    transfers: Sequence[Transfer],
    *,
    micro_batches: int,
    captured: bool,
) -> float:
    """What the host needs to launch a step's micro-batches; nothing where they are CUDA graphs."""
    if captured:
        return 0.0
    launches_s = _launched_sublayers(config, stage, micro_batches=micro_batches) * assumed.HOST_SUBLAYER_S
    messages_s = sum(assumed.HOST_MESSAGE_S.get(each.dimension, 0.0) * each.messages for each in transfers)
    return launches_s + messages_s


def _rounding_s(config: RunConfig, stage: Stage, *, micro_batches: int, world_size: int, hardware: Hardware) -> float:
    """Weights to the activations' dtype, once a step or wherever they are used."""
    rounded = stage.parameters - only_rounded_elements(config, stage, world_size=world_size)
    if not rounded_weights_stay(config):
        moved_bytes = costs.ROUNDING_BYTES * micro_batches * (2 if config.parallel.recompute == "full" else 1)
    elif config.parallel.replicas(world_size) > 1:
        moved_bytes = costs.ROUNDING_BYTES
    else:
        moved_bytes = costs.ROUNDED_BYTES  # with AdamW's kernel
    rounding_s = rounded * moved_bytes / (hardware.memory_bytes_per_s * assumed.FUSED_SHARE)
    if config.train.matmul_precision is None:
        return rounding_s
    sizes = [(count, local_sizes(config.model, letter, config.parallel.tensor)) for letter, count in stage.letters]
    to_fp8 = sum(count * size.fp8 for count, size in sizes)
    return rounding_s + to_fp8 * costs.FP8_WEIGHT_ROUNDING_S / hardware.vector_rate


def _deepspeed_s(config: RunConfig, stage: Stage, *, world_size: int, hardware: Hardware) -> tuple[float, float]:
    """What DeepSpeed does on the device with a step's gradients before and in the optimizer's step."""
    parallel = config.parallel
    replicas = parallel.replicas(world_size)
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    parameters = stage.parameters
    share = parameters / replicas
    rate = hardware.memory_bytes_per_s * assumed.FUSED_SHARE
    if replicas == 1:
        return 0.0, parameters * assumed.SINGLE_REPLICA_BYTES / rate
    # Products write gradients where they are reduced. ZeRO-2 and 3 add up this rank's share of each micro-batch's.
    added = micro_batches - 1 if parallel.partitions_gradients(world_size) else 0
    return added * costs.ACCUMULATION_BYTES * share / rate, share * assumed.SHARE_BYTES / rate


@dataclass(frozen=True)
class _Device:
    """One rank's forward and backward of a micro-batch: the rank with the largest shares."""

    model: ModelConfig
    share: Share
    hardware: Hardware
    chunks_s: dict[Chunk, float] = field(default_factory=dict)  # that were asked for

    def stage_s(self, stage: Stage) -> float:
        """Returns the seconds of a pipeline stage."""
        for chunk in stage.chunks:
            if chunk not in self.chunks_s:
                self.chunks_s[chunk] = self._chunk_s(chunk)
        return sum([self.chunks_s[chunk] for chunk in stage.chunks])

    @cached_property
    def _sublayers_s(self) -> dict[str, float]:
        return {one.letter: self.sublayer_s(one.letter) for one in self.model.kinds}

    def _chunk_s(self, chunk: Chunk) -> float:
        model, share = self.model, self.share
        total = sum(count * self._sublayers_s[letter] for letter, count in chunk.letters)
        vocabulary, tokens = embedding_rows(model, share.tensor_ranks), share.tokens
        if chunk.is_first:
            total += self._traffic_s(costs.EMBEDDING, tokens * model.hidden_size)
        if chunk.is_last:
            # Over several ranks the loss is megatron-core's, in single operations.
            fused = share.kernels.elementwise if share.tensor_ranks == 1 else "torch"
            total += self._matrix_s(vocabulary * model.hidden_size)
            total += self._traffic_s(costs.LOSS[fused], tokens * vocabulary)
            total += self._norm_s()
        return total

    def sublayer_s(self, letter: str) -> float:
        """Returns the seconds of a sublayer: its products, its own kernels, the norm and the residual sum."""
        size = local_sizes(self.model, letter, self.share.tensor_ranks)
        again = self.share.recompute == "full"
        inside = sum(self._kernel_s(kernel) for kernel in mixer(letter).kernels(self.model, self.share))
        residual_s = self._traffic_s(costs.RESIDUAL[self.share.kernels.norm], self._residual_elements, again=again)
        products_s = self._matrix_s(size.matrix, again=again) - self._saved_by_fp8_s(size)
        return products_s + inside + self._norm_s(again=again) + residual_s

    def _kernel_s(self, kernel: Kernel) -> float:
        match kernel:
            case MemoryPass(traffic, elements):
                return self._traffic_s(traffic, elements, again=self.share.recompute == "full")
            case Convolution(elements):
                return self._conv_s(elements)
            case Scan():
                return self._scan_s(kernel)
            case Attention(flops):
                return self._attention_s(flops)

    @property
    def _residual_elements(self) -> int:
        tokens = self.share.tokens // (self.share.tensor_ranks if self.share.sequence_parallel else 1)
        return tokens * self.model.hidden_size

    def _norm_s(self, *, again: bool = False) -> float:
        return self._traffic_s(costs.NORM[self.share.kernels.norm], self._residual_elements, again=again)

    def _matrix_s(self, weights: int, *, again: bool = False) -> float:
        """Products with some weights."""
        passes = 4 if again else 3
        flops = passes * 2.0 * weights * self.share.tokens
        return flops / (self.hardware.matrix_flops * self.hardware.matrix_efficiency)

    def _saved_by_fp8_s(self, size: LocalSizes) -> float:
        """Returns what products in FP8 take less, the rounding of their inputs and gradients included."""
        share = self.share
        if not share.fp8:
            return 0.0
        again = share.recompute == "full"
        rounded = share.tokens * size.fp8_features * (1.5 if again or share.sequence_parallel else 1.0)
        rounding_s = rounded * costs.FP8_ROUNDING_S / self.hardware.vector_rate
        return self._matrix_s(size.fp8, again=again) * (1 - 1 / costs.FP8_SPEED) - rounding_s

    def _traffic_s(self, traffic: Traffic, elements: float, *, again: bool = False) -> float:
        moved = traffic.forward * (2 if again else 1) + traffic.backward
        fused_rate = self.hardware.memory_bytes_per_s * assumed.FUSED_SHARE
        single_rate = assumed.SINGLE_BYTES_PER_S * self.hardware.vector_rate
        return elements * moved / (fused_rate if traffic.fused else single_rate)

    def _conv_s(self, elements: float) -> float:
        again = self.share.recompute == "full"
        bound = assumed.H100.memory_bytes_per_s / self.hardware.memory_bytes_per_s
        return _measured_s(costs.CONV[self.share.kernels.conv], elements, again=again) * bound

    def _scan_s(self, scan: Scan) -> float:
        again = self.share.recompute != "none"
        if self.share.kernels.scan == "cuda":
            return scan.scans * cuda_scan_s(
                sequences=scan.sequences,
                channels=scan.channels,
                tokens=scan.tokens,
                hardware=self.hardware,
                again=again,
            )
        elements = scan.sequences * scan.tokens * scan.channels
        if self.share.kernels.scan == "mamba-ssm":
            once_s = _measured_s(costs.MAMBA_SSM_SCAN, elements, again=again) / self.hardware.vector_rate
            return scan.scans * once_s
        moved_bytes = elements * scan.states * FP32_BYTES * assumed.TORCH_SCAN_PASSES
        once_s = scan.tokens * assumed.TORCH_SCAN_TOKEN_S + moved_bytes / self.hardware.memory_bytes_per_s
        return once_s * (scan.scans + (TORCH_FORWARD_SHARE if again else 0))

    def _attention_s(self, flops: float) -> float:
        forward_ms, backward_ms = costs.ATTENTION[self.share.kernels.attention]
        passes_ms = forward_ms * (1 if self.share.recompute == "none" else 2) + backward_ms
        measured_s = flops / (costs.ATTENTION_FLOP / (passes_ms * 1e-3))
        return measured_s / (self.hardware.matrix_flops / assumed.H100.matrix_flops)


TORCH_FORWARD_SHARE = 1 / 3  # of the scan's launches in plain PyTorch


def _measured_s(kernel: Seconds, elements: float, *, again: bool) -> float:
    return elements * (kernel.forward * (2 if again else 1) + kernel.backward)


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
