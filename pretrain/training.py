"""What a rank trains, built from the configuration: model, engine, optimizer and the way to run them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sambalm.model.build import build_parts, tied_copy
from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.ops.registry import Kernels, build_kernels
from sambalm.parallel.execution import Executor, build_executor
from sambalm.parallel.groups import World
from sambalm.parallel.sharding import initialize_parameters
from sambalm.parallel.zero.deepspeed_adapter import Engine
from sambalm.parallel.zero.engine import zero_engine
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.load import load_moments, load_weights
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS
from sambalm.pretrain.precision import DTYPES


@dataclass(frozen=True)
class Training:
    """What this rank trains: its parts of the model, the engine that holds them, and the way to run them."""

    engine: Engine
    parts: Sequence[nn.Module]
    execution: Executor
    kernels: Kernels


def build_training(
    config: RunConfig, *, world: World, checkpoint: Checkpoint | None, bucket_elements: int = BUCKET_ELEMENTS
) -> Training:
    """This rank's parts of the model under ZeRO, freshly initialised or as a checkpoint left them. Collective.

    Args:
        bucket_elements: of gradients that are reduced together while a backward runs; see `gradient_buckets`.
    """
    parallel, dtype = config.parallel, DTYPES[config.train.precision]
    requirements = kernel_requirements(
        config.model,
        device=world.device.type,
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        resets=config.data.reset_at_document,
        tensor=world.tensor,
        context=world.context,
    )
    kernels = build_kernels(config.kernels, requirements)
    parts = build_parts(
        config.model,
        parallel,
        world=world,
        kernels=kernels,
        dtype=dtype,
        sequence_length=config.data.sequence_length,
    )
    # The engine keeps the weights as they are when it is made, so they are set before; its optimizer's state after.
    if checkpoint:
        load_weights(parts, checkpoint.path, world=world)
    else:
        for part in parts:
            initialize_parameters(part, seed=config.run.seed)
    overlaps = parallel.overlaps_messages(world.size)
    buckets = gradient_buckets(parts, max_elements=bucket_elements if overlaps else None)
    engine = zero_engine(
        parts,
        config.optimizer.build(buckets, adamw=kernels.optimizer),
        world=world,
        zero_stage=parallel.zero_stage,
        micro_batch_size=config.train.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
        done_steps=checkpoint.step if checkpoint else 0,
    )
    if checkpoint:
        load_moments(parts, checkpoint.path, world=world)
    tied_weight = tied_copy(parts)
    executor = build_executor(
        engine,
        parts,
        world=world,
        buckets=buckets,
        hidden_size=config.model.hidden_size,
        dtype=dtype,
        recompute_layers=config.parallel.recompute == "full",
        tied_weight=tied_weight,
        clip_norm=config.optimizer.clip_norm,
        cuda_graphs=config.train.cuda_graphs,
    )
    return Training(engine=engine, parts=parts, execution=executor, kernels=kernels)
