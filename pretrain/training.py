"""What a rank trains, built from the configuration: model, engine, optimizer and the way to run them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sambalm.model.build import build_chunks, tied_copy
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
    """What this rank trains: its chunks of the model, the engine that holds them, and the way to run them."""

    engine: Engine
    chunks: Sequence[nn.Module]
    executor: Executor
    kernels: Kernels


def build_training(
    config: RunConfig, *, world: World, checkpoint: Checkpoint | None, bucket_elements: int = BUCKET_ELEMENTS
) -> Training:
    """This rank's chunks of the model under ZeRO, freshly initialised or as a checkpoint left them. Collective.

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
        tp=world.tensor,
        cp=world.context,
    )
    kernels = build_kernels(config.kernels, requirements)
    chunks = build_chunks(
        config.model,
        parallel,
        world=world,
        kernels=kernels,
        dtype=dtype,
        sequence_length=config.data.sequence_length,
    )
    # The engine keeps the weights as they are when it is made, so they are set before; its optimizer's state after.
    if checkpoint:
        load_weights(chunks, checkpoint.path, world=world)
    else:
        for chunk in chunks:
            initialize_parameters(chunk, seed=config.run.seed)
    overlaps = parallel.overlaps_messages(world.size)
    buckets = gradient_buckets(chunks, max_elements=bucket_elements if overlaps else None)
    engine = zero_engine(
        chunks,
        config.optimizer.build(buckets, adamw=kernels.optimizer),
        world=world,
        zero_stage=parallel.zero_stage,
        micro_batch_size=config.train.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
        done_steps=checkpoint.step if checkpoint else 0,
    )
    if checkpoint:
        load_moments(chunks, checkpoint.path, world=world)
    tied_weight = tied_copy(chunks)
    executor = build_executor(
        engine,
        chunks,
        world=world,
        buckets=buckets,
        hidden_size=config.model.hidden_size,
        dtype=dtype,
        recompute_layers=config.parallel.recompute == "full",
        tied_weight=tied_weight,
        clip_norm=config.optimizer.clip_norm,
        cuda_graphs=config.train.cuda_graphs,
        captures_documents=kernels.captures_documents,
    )
    return Training(engine=engine, chunks=chunks, executor=executor, kernels=kernels)
