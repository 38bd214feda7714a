"""This rank's parts of a model on a layout."""

from collections.abc import Sequence

import torch
from torch import nn

from sambalm.model.chunks import part_layers
from sambalm.model.config import ModelConfig
from sambalm.model.ops.registry import Kernels
from sambalm.model.samba import Samba
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import World


def build_parts(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    world: World,
    kernels: Kernels,
    dtype: torch.dtype,
    sequence_length: int,
) -> list[Samba]:
    """Uninitialised parts on this rank's device, in the model's order; one part where there is no pipeline."""
    layers = part_layers(config, parallel, sequence_length=sequence_length)
    with world.device:
        return [
            Samba(
                config,
                layers=layers[chunk * world.pipeline.size + world.pipeline.rank],
                tp=world.tensor,
                cp=world.context,
                kernels=kernels.recomputing() if parallel.recompute == "selective" else kernels,
                dtype=dtype,
                recompute_layers=parallel.recompute == "full",
            )
            for chunk in range(world.pipeline.chunks)
        ]


def tied_copy(parts: Sequence[Samba]) -> nn.Parameter | None:
    """This rank's copy of an embedding that the first and the last pipeline stage share, if it has one."""
    ends = (part for part in parts if part.config.tie_embeddings and part.is_first != part.is_last)
    return next((part.embedding.weight for part in ends), None)
