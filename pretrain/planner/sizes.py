"""How many parameters a rank of a layout holds, of which kinds, and how many tokens it works on."""

from dataclasses import dataclass
from functools import lru_cache

from sambalm.model.build import part_layers
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import FP32_BYTES, KernelNames, Share
from sambalm.model.registry import mixer, mixers_of
from sambalm.parallel.config import ParallelConfig
from sambalm.pretrain.config import PRECISION_BYTES, RunConfig

PERSISTENT_ELEMENTS = 100_000  # DeepSpeed 0.19.8's param_persistence_threshold, runtime/zero/config.py


@dataclass(frozen=True)
class LocalSizes:
    """The first tensor-parallel rank's share of a sublayer's parameters, which is the largest."""

    parameters: int
    small: int  # of them in tensors that ZeRO-3 never releases
    matrix: int  # elements of the weights that matrix products take, in the activations' dtype
    matmul_only: int  # of them in weights that nothing else reads


@lru_cache(maxsize=256)
def local_sizes(model: ModelConfig, letter: str, tensor_ranks: int) -> LocalSizes:
    """Counts a mixer's parameters, and its norm's."""
    parameters = mixer(letter).parameters(model, tensor_ranks=tensor_ranks)
    sizes = [model.hidden_size, *(each.elements for each in parameters)]
    return LocalSizes(
        parameters=sum(sizes),
        small=sum(size for size in sizes if size < PERSISTENT_ELEMENTS),
        matrix=sum(each.elements for each in parameters if each.in_product),
        matmul_only=sum(each.elements for each in parameters if each.matmul_only),
    )


def share_of(config: RunConfig, kernels: KernelNames, *, recompute: str | None = None) -> Share:
    """Returns what a rank of a run computes on, with the run's own recomputation or another."""
    parallel = config.parallel
    return Share(
        tensor_ranks=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_ranks=parallel.context,
        sequences=config.train.micro_batch_size,
        sequence_tokens=config.data.sequence_length,
        activation_bytes=activation_bytes(config),
        recompute=recompute or parallel.recompute,
        kernels=kernels,
    )


def activation_bytes(config: RunConfig) -> int:
    """Returns the bytes of one element of an activation."""
    return PRECISION_BYTES[config.train.precision]


def stage_parts(config: RunConfig) -> list[list[range]]:
    """The sublayers of each part on each pipeline stage."""
    parallel = config.parallel
    layers = tuple(parallel.pipeline_layers) if parallel.pipeline_layers else None
    return _stage_parts(
        config.model, parallel.pipeline, parallel.virtual_pipeline, layers, sequence_length=config.data.sequence_length
    )


@lru_cache(maxsize=256)
def _stage_parts(
    model: ModelConfig, stages: int, chunks: int, layers: tuple[int, ...] | None, *, sequence_length: int
) -> list[list[range]]:
    parallel = ParallelConfig(
        pipeline=stages, virtual_pipeline=chunks, pipeline_layers=None if layers is None else list(layers)
    )
    parts = part_layers(model, parallel, sequence_length=sequence_length)
    return [parts[stage::stages] for stage in range(stages)]


def stage_parameters(config: RunConfig, stage: int) -> int:
    """Parameters of the largest rank of a pipeline stage, before ZeRO partitions them; a shared embedding once."""
    model, tensor = config.model, config.parallel.tensor
    parts = stage_parts(config)[stage]
    count = sum(
        number * local_sizes(model, letter, tensor).parameters for letter, number in stage_letters(config, stage)
    )
    first, last = (any(end(part, model) for part in parts) for end in (is_first, is_last))
    embedding = model.vocab_size // tensor * model.hidden_size
    if first and last and not (model.tie_embeddings and len(parts) > 1):
        count += embedding * (1 if model.tie_embeddings else 2)
    else:
        count += embedding * (first + last)
    return count + model.hidden_size * last


def only_rounded_elements(config: RunConfig, stage: int, *, world_size: int) -> int:
    """Weights of a stage that are there in the activations' dtype alone, but for a share (parallel/zero/weights.py)."""
    parallel, model = config.parallel, config.model
    flat = parallel.zero_stage == 1 and parallel.replicas(world_size) > 1
    if not flat or activation_bytes(config) == FP32_BYTES:
        return 0
    letters = stage_letters(config, stage)
    count = sum(number * local_sizes(model, letter, parallel.tensor).matmul_only for letter, number in letters)
    if not model.tie_embeddings and any(is_last(part, model) for part in stage_parts(config)[stage]):
        count += model.vocab_size // parallel.tensor * model.hidden_size
    return count


def stage_letters(config: RunConfig, stage: int) -> list[tuple[str, int]]:
    """Kinds of sublayers on a stage, and how many of each."""
    parts = stage_parts(config)[stage]
    letters = "".join(config.model.pattern[part.start : part.stop] for part in parts)
    return [(one.letter, letters.count(one.letter)) for one in mixers_of(letters)]


def is_first(part: range, model: ModelConfig) -> bool:
    return part.start == 0


def is_last(part: range, model: ModelConfig) -> bool:
    return part.stop == len(model.pattern)


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch on one rank; tensor-parallel ranks work on the same ones."""
    return config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
