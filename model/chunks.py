"""How a model's sublayers are cut into pipeline chunks. Needs no torch, so that a plan can count with them."""

from sambalm.model.config import ModelConfig
from sambalm.model.flops import layer_flops
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.pipeline.stages import balanced_stages


def chunk_layers(config: ModelConfig, parallel: ParallelConfig, *, sequence_length: int) -> list[range]:
    """Returns the sublayers of each chunk, in the model's order; stage s of p holds chunks s, s + p, s + 2p, ..."""
    counts = parallel.pipeline_layers
    if counts is None:
        costs = layer_flops(config, sequence_length=sequence_length)
        head = 6.0 * config.hidden_size * config.vocab_size
        counts = balanced_stages(costs, chunks=parallel.model_chunks, last=head)
    ends = [sum(counts[: chunk + 1]) for chunk in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
