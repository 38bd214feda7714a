"""How a model's sublayers are cut into pipeline chunks. Needs no torch, so that a plan can count with them."""

import itertools

from sambalm.model.config import ModelConfig
from sambalm.model.flops import layer_flops
from sambalm.model.registry import without_cuts_through_memories
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.pipeline.stages import balanced_stages


def chunk_layers(config: ModelConfig, parallel: ParallelConfig, *, sequence_length: int) -> list[range]:
    """Returns the sublayers of each chunk, in the model's order; stage s of p holds chunks s, s + p, s + 2p, ..."""
    if parallel.pipeline_layers is not None:
        ends = list(itertools.accumulate(parallel.pipeline_layers))
    else:
        ends = _balanced_ends(config, parallel.model_chunks, sequence_length=sequence_length)
    return [range(start, end) for start, end in itertools.pairwise((0, *ends))]


def _balanced_ends(config: ModelConfig, chunks: int, *, sequence_length: int) -> list[int]:
    """Returns where each chunk ends, with as few operations as possible in the one that has most.

    A layer stays with those that read what it writes, where that leaves a piece for each chunk.
    """
    costs = layer_flops(config, sequence_length=sequence_length)
    everywhere = list(range(1, len(costs) + 1))
    ends = without_cuts_through_memories(config.pattern, everywhere)
    if len(ends) < chunks:
        ends = everywhere
    pieces = [sum(costs[start:end]) for start, end in itertools.pairwise((0, *ends))]
    counts = balanced_stages(pieces, chunks=chunks, last=6.0 * config.hidden_size * config.vocab_size)
    return [ends[count - 1] for count in itertools.accumulate(counts)]
