"""What a rank trains, built from the configuration: model, engine, optimizer and the way to run them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sambalm.model.build import build_chunks, tied_copy
from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.registry import Kernels, build_kernels
from sambalm.parallel.errors import ParallelError
from sambalm.parallel.execution import Executor, build_executor
from sambalm.parallel.groups import World
from sambalm.parallel.layers.fp8 import Fp8Store
from sambalm.parallel.sharding import initialize_parameters
from sambalm.parallel.zero.deepspeed_adapter import Engine
from sambalm.parallel.zero.engine import create_moments, zero_engine
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.initial_weights import InitialWeights
from sambalm.pretrain.checkpointing.load import load_fp8_scales, load_initial_weights, load_moments, load_weights
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS
from sambalm.pretrain.precision import DTYPES
from sambalm.pretrain.run_phases import RunPhase

FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Training:
    """What this rank trains: its chunks of the model, the engine that holds them, and the way to run them."""

    engine: Engine
    chunks: Sequence[nn.Module]
    executor: Executor
    kernels: Kernels


def build_training(
    config: RunConfig,
    *,
    world: World,
    checkpoint: Checkpoint | None,
    initial: InitialWeights | None = None,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Training:
    """This rank's chunks of the model under ZeRO, freshly initialised or as a checkpoint left them. Collective.

    Args:
        initial: what a new run starts from; None: it draws its weights.
        bucket_elements: of gradients that are reduced together while a backward runs; see `gradient_buckets`.
    """
    parallel, dtype = config.parallel, DTYPES[config.train.precision]
    phases = config.schedule.stretch(checkpoint.state.get("samples", 0) if checkpoint else 0)
    kernels = build_kernels(config.kernels, _requirements(phases, world=world))
    chunks = build_chunks(
        config.model,
        parallel,
        world=world,
        kernels=kernels,
        dtype=dtype,
        sequence_length=config.data.sequence_length,
    )
    # The engine keeps the weights as they are when it is made, so they are set before.
    if checkpoint:
        load_weights(chunks, checkpoint.path, world=world)
    elif initial:
        load_initial_weights(chunks, initial, config, world=world)
    else:
        for chunk in chunks:
            initialize_parameters(chunk, seed=config.run.seed)
    overlaps = parallel.overlaps_messages(world.size)
    muon = config.optimizer.kind == "muon"
    buckets = gradient_buckets(chunks, max_elements=bucket_elements if overlaps else None, muon=muon)
    engine = zero_engine(
        chunks,
        config.optimizer.build(buckets, adamw=kernels.optimizer),
        world=world,
        micro_batch_size=config.train.micro_batch_size,
    )
    tied_weight = tied_copy(chunks)
    fp8 = _fp8_store(chunks, world=world, checkpoint=checkpoint) if config.train.matmul_precision == "fp8" else None
    executor = build_executor(
        engine,
        chunks,
        world=world,
        zero_stage=parallel.zero_stage,
        buckets=buckets,
        hidden_size=config.model.hidden_size,
        dtype=dtype,
        recompute_layers=config.parallel.recompute == "full",
        tied_weight=tied_weight,
        clip_norm=config.optimizer.clip_norm,
        cuda_graphs=config.train.cuda_graphs,
        captures_documents=kernels.captures_documents,
        fp8=fp8,
    )
    create_moments(engine, done_steps=checkpoint.step if checkpoint else 0)
    if checkpoint:
        load_moments(chunks, checkpoint.path, world=world)
    return Training(engine=engine, chunks=chunks, executor=executor, kernels=kernels)


def _requirements(phases: Sequence[RunPhase], *, world: World) -> KernelRequirements:
    """Returns what phases ask of the run's kernels, which have to take the micro-batches of all of them."""
    first, *others = (
        kernel_requirements(
            phase.config.model,
            device=world.device.type,
            precision=phase.config.train.precision,
            micro_batch_size=phase.config.train.micro_batch_size,
            sequence_length=phase.config.data.sequence_length,
            resets=phase.config.data.reset_at_document,
            tp=world.tensor,
            cp=world.context,
        )
        for phase in phases
    )
    calls = dict.fromkeys(call for needs in (first, *others) for call in needs.attention_calls)
    return replace(first, attention_calls=tuple(calls))


def _fp8_store(chunks: Sequence[nn.Module], *, world: World, checkpoint: Checkpoint | None) -> Fp8Store:
    """Returns the scales of products in FP8, as a checkpoint left them where it has some.

    Raises:
        ParallelError: the device has no FP8 products.
    """
    if world.device.type == "cuda" and (has := torch.cuda.get_device_capability(world.device)) < FP8_CAPABILITY:
        raise ParallelError(
            f"train.matmul_precision is 'fp8', which takes a GPU of compute capability 8.9 or later, and this one has "
            f"{has[0]}.{has[1]}: set train.matmul_precision=null"
        )
    dimensions = ((world.replica_group, world.replica_size), (world.tensor.group, world.tensor.size))
    groups = [group for group, size in dimensions if group and size > 1]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    store = Fp8Store(parameters, groups=groups, device=world.device)
    load_fp8_scales(chunks, checkpoint.state.get("fp8_scales", {}) if checkpoint else {})
    return store
