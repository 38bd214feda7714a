"""This rank's chunks of a model on a layout."""

from collections.abc import Sequence

import torch
from torch import nn

from sambalm.model.chunks import chunk_layers
from sambalm.model.config import ModelConfig
from sambalm.model.ops.registry import Kernels
from sambalm.model.samba import Samba
from sambalm.model.scaling import set_lr_scales
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import World


def build_chunks(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    world: World,
    kernels: Kernels,
    dtype: torch.dtype,
    sequence_length: int,
) -> list[Samba]:
    """Uninitialised chunks on this rank's device, in the model's order; one chunk where there is no pipeline."""
    layers = chunk_layers(config, parallel, sequence_length=sequence_length)
    with world.device:
        chunks = [
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
    for each in chunks:
        set_lr_scales(each)
    return chunks


def tied_copy(chunks: Sequence[Samba]) -> nn.Parameter | None:
    """This rank's copy of an embedding that the first and the last pipeline stage share, if it has one."""
    ends = (chunk for chunk in chunks if chunk.config.tie_embeddings and chunk.is_first != chunk.is_last)
    return next((chunk.embedding.weight for chunk in ends), None)
