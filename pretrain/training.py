"""What a rank trains, built from the configuration: model, engine, optimizer and the way to run them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sambalm.model.build import build_parts, tied_copy
from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.ops.registry import Kernels, build_kernels
from sambalm.parallel.execution import Execution, execution
from sambalm.parallel.groups import World
from sambalm.parallel.sharding import initialize_parameters
from sambalm.parallel.zero.engine import Engine, zero_engine
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.load import load_moments, load_weights
from sambalm.pretrain.config import DTYPES, RunConfig
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS


@dataclass(frozen=True)
class Training:
    """What this rank trains: its parts of the model, the engine that holds them, and the way to run them."""

    engine: Engine
    parts: Sequence[nn.Module]
    execution: Execution
    kernels: Kernels


def build_training(
    config: RunConfig, *, world: World, checkpoint: Checkpoint | None, bucket_elements: int = BUCKET_ELEMENTS
) -> Training:
    """This rank's parts of the model under ZeRO, freshly initialised or as a checkpoint left them. Collective.

    Args:
        bucket_elements: of gradients that are reduced together while a backward runs; see `parameter_groups`.
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
        load_weights(parts, checkpoint.path)
    else:
        for part in parts:
            initialize_parameters(part, seed=config.run.seed)
    overlaps = parallel.overlaps_messages(world.size)
    engine = zero_engine(
        parts,
        functools.partial(
            config.optimizer.build,
            adamw=kernels.optimizer,
            bucket_elements=bucket_elements if overlaps else None,
        ),
        world=world,
        zero_stage=parallel.zero_stage,
        micro_batch_size=config.train.micro_batch_size,
        clip_norm=config.optimizer.clip_norm,
        done_steps=checkpoint.step if checkpoint else 0,
    )
    if checkpoint:
        load_moments(parts, checkpoint.path)
    tied_weight = tied_copy(parts)
    run = execution(
        engine,
        parts,
        world=world,
        hidden_size=config.model.hidden_size,
        dtype=dtype,
        recompute_layers=config.parallel.recompute == "full",
        tied_weight=tied_weight,
        clip_norm=config.optimizer.clip_norm,
        cuda_graphs=config.train.cuda_graphs,
    )
    return Training(engine=engine, parts=parts, execution=run, kernels=kernels)
