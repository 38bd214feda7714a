"""Which layouts of a cluster fit a run, and how fast each is expected to be."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sambalm.model.mixers.counts import Recompute
from sambalm.model.ops.errors import KernelError
from sambalm.parallel.config import ParallelConfig, layout_name
from sambalm.parallel.errors import ParallelError
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.communication import transfers_of_stages
from sambalm.pretrain.planner.hardware import Hardware
from sambalm.pretrain.planner.kernels import KernelNames, planned_kernels
from sambalm.pretrain.planner.memory import RankMemory, needed_bytes, stage_memories
from sambalm.pretrain.planner.sizes import distinct_stages, stage_parameters
from sambalm.pretrain.planner.time import StepTime, least_step_s, step_time

GIB = 2**30
DAY_S = 86_400
LONG_RUN_TOKENS = 3.2e12  # what Samba 3.8B was trained on
# Of the device's memory: the rest is for the CUDA context, NCCL's buffers and the allocator's gaps. Assumed.
USABLE_SHARE = 0.9

CONTEXTS, PIPELINES, CHUNKS = (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4)
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """A layout and what is estimated of it."""

    config: RunConfig
    world_size: int
    kernels: KernelNames
    stages: tuple[RankMemory, ...]  # the fullest rank of each pipeline stage
    time: StepTime
    wire_bytes: float  # that the busiest rank sends in a step

    @property
    def layout(self) -> str:
        return layout_name(self.config.parallel, world_size=self.world_size)

    @property
    def memory(self) -> RankMemory:
        """The memory of the fullest rank."""
        return max(self.stages, key=lambda memory: memory.total_bytes)

    @property
    def tokens_per_s(self) -> float:
        return self.config.train.global_batch_tokens / self.time.total_s

    @property
    def run_days(self) -> float:
        return self.days_to(self.config.run_tokens)

    def days_to(self, tokens: float) -> float:
        return tokens / self.tokens_per_s / DAY_S

    @property
    def micro_batches(self) -> int:
        """How many micro-batches one rank runs in a step."""
        return self.config.accumulation_steps(data_size=self.world_size // self.config.parallel.model_ranks)


def find_plans(
    config: RunConfig,
    *,
    world_size: int,
    memory_gib: float,
    hardware: Hardware,
    top: int | None = None,
    zero_stage: int | None = None,
) -> list[Plan]:
    """Returns the layouts that fit, fastest first; of each, the fastest setting of recompute and micro-batch size.

    Args:
        config: the run, or one phase of it; its parallel section and micro-batch size are searched over.
        memory_gib: memory of each device.
        top: how many to return; None for all. Few are found sooner, since most others are surely slower.
        zero_stage: of layouts with replicas; None for all.

    Raises:
        ConfigError: no layout is allowed, or none fits; the message says by how much.
    """
    limit_bytes = memory_gib * GIB * USABLE_SHARE
    if config.train.matmul_precision == "fp8" and not hardware.has_fp8:
        raise ConfigError(
            f"train.matmul_precision is 'fp8', which no {hardware.name} has: set it to null, or plan for another"
            " --device"
        )
    planned_kernels(
        config.model_copy(update={"parallel": ParallelConfig()})
    )  # one that no layout runs is the user's mistake
    best: dict[ParallelConfig, _Step] = {}
    smallest: tuple[int, RunConfig] | None = None
    full: ParallelConfig | None = None  # micro-batches grow last, and memory with them
    slowest_s = math.inf  # of the `top` fastest so far
    for candidate, kernels in _runnable(candidates(config, world_size=world_size, node_gpus=hardware.node_gpus)):
        if candidate.parallel == full or not _has_stage(candidate.parallel, zero_stage, world_size=world_size):
            continue
        key = candidate.parallel.model_copy(update={"recompute": "none"})
        limit_s = best[key].time.total_s if key in best else math.inf
        stages = distinct_stages(candidate).values()
        least_s = least_step_s(candidate, stages, world_size=world_size, hardware=hardware, kernels=kernels)
        if least_s >= limit_s or least_s > slowest_s:
            continue
        needed = needed_bytes(candidate, world_size=world_size, kernels=kernels)
        if smallest is None or needed < smallest[0]:
            smallest = needed, candidate
        if needed > limit_bytes:
            full = candidate.parallel
            continue
        step = _step(candidate, world_size=world_size, hardware=hardware, kernels=kernels)
        if step.time.total_s < limit_s:
            best[key] = step
            if top is not None and len(best) >= top:
                slowest_s = sorted(step.time.total_s for step in best.values())[top - 1]
    if smallest is None:
        raise ConfigError(
            f"no layout of {world_size} GPUs can take train.global_batch_tokens {config.train.global_batch_tokens} in "
            f"sequences of {config.data.sequence_length}: change --gpus or train.global_batch_tokens"
        )
    if not best:
        needed, candidate = smallest
        layout = layout_name(candidate.parallel, world_size=world_size)
        raise ConfigError(
            f"no layout of {world_size} GPUs fits {memory_gib:g} GiB, of which {USABLE_SHARE:.0%} are planned with: "
            f"the smallest, {layout}, takes {needed / GIB:.1f} GiB a rank; use more or larger GPUs"
        )
    plans = [_plan(step, world_size=world_size) for step in best.values()]
    return sorted(plans, key=lambda plan: (plan.time.total_s, plan.memory.total_bytes))[:top]


def plan_of(config: RunConfig, *, world_size: int, hardware: Hardware, kernels: KernelNames | None = None) -> Plan:
    """The estimates of a config's own layout, with given kernels or those that it would run with."""
    kernels = kernels or planned_kernels(config)
    step = _step(config, world_size=world_size, hardware=hardware, kernels=kernels)
    return _plan(step, world_size=world_size)


@dataclass(frozen=True)
class _Step:
    """A layout's step, before its memory is counted stage by stage."""

    config: RunConfig
    kernels: KernelNames
    time: StepTime
    wire_bytes: float


def _step(config: RunConfig, *, world_size: int, hardware: Hardware, kernels: KernelNames) -> _Step:
    stages = distinct_stages(config).values()
    transfers = transfers_of_stages(config, stages, world_size=world_size)
    return _Step(
        config,
        kernels,
        time=step_time(config, stages, transfers, world_size=world_size, hardware=hardware, kernels=kernels),
        wire_bytes=max(sum(transfer.wire_bytes for transfer in sent) for sent in transfers),
    )


def _plan(step: _Step, *, world_size: int) -> Plan:
    stages = stage_memories(step.config, world_size=world_size, kernels=step.kernels)
    return Plan(step.config, world_size, step.kernels, stages, step.time, step.wire_bytes)


def _runnable(candidates: Iterable[RunConfig]) -> Iterator[tuple[RunConfig, KernelNames]]:
    """Those that a kernel named in the config does not refuse, such as context parallelism by mamba-ssm."""
    by_layout: dict[tuple[int, int], KernelNames | None] = {}
    for candidate in candidates:
        layout = candidate.parallel.tensor, candidate.parallel.context
        if layout not in by_layout:
            try:
                by_layout[layout] = planned_kernels(candidate)
            except KernelError:
                by_layout[layout] = None
        if kernels := by_layout[layout]:
            yield candidate, kernels


def candidates(config: RunConfig, *, world_size: int, node_gpus: int) -> Iterator[RunConfig]:
    """The run under every layout that the config's own checks allow on a world."""
    sizes = sorted({*MICRO_BATCHES, config.train.micro_batch_size})
    trains = [config.train.model_copy(update={"micro_batch_size": size}) for size in sizes]
    given = config.model_dump()
    for parallel in _parallel_sections(world_size, node_gpus=node_gpus):
        values = given | {"parallel": parallel | {"timeout_s": config.parallel.timeout_s}}
        try:
            checked = parse_config(values, source="plan")
        except ConfigError:
            continue  # such as more tensor-parallel ranks than heads
        settings = [checked.parallel.model_copy(update={"recompute": recompute}) for recompute in RECOMPUTE]
        for setting, train in itertools.product(settings, trains):
            # The model is one object, which caches then know at once.
            update = {"model": config.model, "parallel": setting, "train": train}
            candidate = checked.model_copy(update=update)
            try:
                candidate.check_world(world_size)
            except (ConfigError, ParallelError):
                continue  # such as a batch that the data-parallel ranks do not divide
            yield candidate


def _has_stage(parallel: ParallelConfig, zero_stage: int | None, *, world_size: int) -> bool:
    return zero_stage in (None, parallel.zero_stage) or parallel.replicas(world_size) == 1


def _parallel_sections(world_size: int, *, node_gpus: int) -> Iterator[dict]:
    tensors = [ranks for ranks in (1, 2, 4, 8, 16) if ranks <= node_gpus]
    for tensor, context, pipeline in itertools.product(tensors, CONTEXTS, PIPELINES):
        if world_size % (tensor * context * pipeline):
            continue
        for chunks in CHUNKS if pipeline > 1 else (1,):
            stages = (1,) if pipeline > 1 or world_size == tensor else (1, 2, 3)  # the same without replicas
            for stage in stages:
                for sequence in (False, True) if tensor > 1 else (False,):
                    yield {
                        "tensor": tensor,
                        "sequence": sequence,
                        "context": context,
                        "pipeline": pipeline,
                        "virtual_pipeline": chunks,
                        "zero_stage": stage,
                    }


def describe_run(config: RunConfig, *, world_size: int) -> str:
    """One line on a config in a world, checked without data or devices.

    Raises:
        ConfigError, ParallelError: the run does not fit the world.
        KernelError: no GPU can run a kernel that the config names.
    """
    config.check_world(world_size)
    parallel = config.parallel
    data_size, layout = world_size // parallel.model_ranks, layout_name(parallel, world_size=world_size)
    largest = max(stage_parameters(config, stage) for stage in range(parallel.pipeline))
    steps = [
        f"{phase.config.accumulation_steps(data_size=data_size):,} micro-batches of "
        f"{phase.config.train.micro_batch_size} a step"
        for phase in config.schedule.fitting(world_size)
    ]
    return (
        f"{world_size:,} ranks: DP{data_size} {layout}, recompute {parallel.recompute}; "
        f"{', then '.join(steps)}; "
        f"{largest:,} parameters on the largest rank; on GPUs {planned_kernels(config)}"
    )
