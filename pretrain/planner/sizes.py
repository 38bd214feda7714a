"""How many parameters a rank of a layout holds, of which kinds, and how many tokens it works on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sambalm.model.chunks import chunk_layers
from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import FP32_BYTES, KernelNames, Recompute, Share
from sambalm.model.registry import mixer, mixers_of
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.shard import Position, equal_shard
from sambalm.pretrain.config import PRECISION_BYTES, RunConfig


@dataclass(frozen=True)
class LocalSizes:
    """The first tensor-parallel rank's share of a sublayer's parameters, which is the largest."""

    parameters: int
    matrix: int  # elements of the weights that matrix products take, in the activations' dtype
    matmul_only: int  # of them in weights that nothing else reads
    fp8: int  # of them in products that may be in FP8
    fp8_features: int  # of inputs and outputs of these products


@lru_cache(maxsize=256)
def local_sizes(model: ModelConfig, letter: str, tensor_ranks: int) -> LocalSizes:
    """Counts a mixer's parameters, and its norm's."""
    parameters = mixer(letter).parameters(model, tensor_ranks=tensor_ranks)
    sizes = [model.hidden_size, *(each.elements for each in parameters)]
    in_fp8 = [each for each in parameters if each.takes_fp8]
    return LocalSizes(
        parameters=sum(sizes),
        matrix=sum(each.elements for each in parameters if each.in_product),
        matmul_only=sum(each.elements for each in parameters if each.matmul_only),
        fp8=sum(each.elements for each in in_fp8),
        fp8_features=sum(sum(each.shape) for each in in_fp8),
    )


def embedding_rows(model: ModelConfig, tensor_ranks: int) -> int:
    """Returns the rows of embedding and head that a rank holds, and with them its logits of a token."""
    return equal_shard(model.vocab_size, Position(tensor_ranks)).held


def share_of(config: RunConfig, kernels: KernelNames, *, recompute: Recompute | None = None) -> Share:
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
        fp8=config.train.matmul_precision == "fp8",
    )


def activation_bytes(config: RunConfig) -> int:
    """Returns the bytes of one element of an activation."""
    return PRECISION_BYTES[config.train.precision]


@dataclass(frozen=True)
class Chunk:
    """A pipeline chunk, as far as counts depend on it."""

    letters: tuple[tuple[str, int], ...]  # kinds of sublayers, and how many of each
    is_first: bool  # whether it starts with the embedding
    is_last: bool  # whether it ends with the head


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage holds, as far as counts depend on it; many stages of a pipeline are alike."""

    chunks: tuple[Chunk, ...]
    letters: tuple[tuple[str, int], ...]  # those of all chunks
    parameters: int  # of the largest rank, before ZeRO partitions them; a shared embedding once
    matmul_only: int  # of them those that nothing but matrix products reads


def stage_chunks(config: RunConfig) -> list[list[range]]:
    """Returns the sublayers of each chunk on each pipeline stage."""
    layers = chunk_layers(config.model, config.parallel, sequence_length=config.data.sequence_length)
    return [layers[stage :: config.parallel.pipeline] for stage in range(config.parallel.pipeline)]


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """Returns what each pipeline stage holds."""
    return _pipeline(config)[0]


def _pipeline(config: RunConfig) -> tuple[tuple[Stage, ...], Mapping[int, Stage]]:
    """Returns all stages, and the first of each kind by its number."""
    parallel = config.parallel
    layers = tuple(parallel.pipeline_layers) if parallel.pipeline_layers else None
    return _cut_pipeline(
        config.model,
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline,
        layers,
        sequence_length=config.data.sequence_length,
    )


@lru_cache(maxsize=256)
def _cut_pipeline(
    model: ModelConfig, tensor: int, stages: int, chunks: int, layers: tuple[int, ...] | None, *, sequence_length: int
) -> tuple[tuple[Stage, ...], Mapping[int, Stage]]:
    ranges = _chunk_layers(model, stages, chunks, layers, sequence_length=sequence_length)
    held = tuple(_stage(model, tensor, ranges[stage::stages]) for stage in range(stages))
    return held, {held.index(stage): stage for stage in dict.fromkeys(held)}


@lru_cache(maxsize=256)
def _chunk_layers(
    model: ModelConfig, stages: int, chunks: int, layers: tuple[int, ...] | None, *, sequence_length: int
) -> list[range]:
    parallel = ParallelConfig(
        pipeline=stages, virtual_pipeline=chunks, pipeline_layers=None if layers is None else list(layers)
    )
    return chunk_layers(model, parallel, sequence_length=sequence_length)


def _stage(model: ModelConfig, tensor: int, ranges: Sequence[range]) -> Stage:
    chunks = tuple(
        Chunk(
            _counted(model.pattern[layers.start : layers.stop]),
            is_first=layers.start == 0,
            is_last=layers.stop == len(model.pattern),
        )
        for layers in ranges
    )
    letters = _counted("".join(model.pattern[layers.start : layers.stop] for layers in ranges))
    sizes = [(number, local_sizes(model, letter, tensor)) for letter, number in letters]
    first, last = any(chunk.is_first for chunk in chunks), any(chunk.is_last for chunk in chunks)
    embedding = embedding_rows(model, tensor) * model.hidden_size
    embeddings = 1 if first and last and model.tie_embeddings else first + last
    return Stage(
        chunks=chunks,
        letters=letters,
        parameters=sum(number * size.parameters for number, size in sizes)
        + embeddings * embedding
        + model.hidden_size * last,
        matmul_only=sum(number * size.matmul_only for number, size in sizes)
        + (embedding if last and not model.tie_embeddings else 0),
    )


def _counted(letters: str) -> tuple[tuple[str, int], ...]:
    """Counts each kind of sublayer, in the registry's order."""
    return tuple((one.letter, letters.count(one.letter)) for one in mixers_of(letters))


def distinct_stages(config: RunConfig) -> Mapping[int, Stage]:
    """Returns the first stage of each kind by its number.

    Stages that hold the same send and compute the same, and the first of them has the most forwards in flight.
    """
    return _pipeline(config)[1]


def stage_parameters(config: RunConfig, stage: int) -> int:
    """Returns the parameters of the largest rank of a stage before ZeRO partitions them; a shared embedding once."""
    return stages_of(config)[stage].parameters


def only_rounded_elements(config: RunConfig, stage: Stage, *, world_size: int) -> int:
    """Counts a stage's weights that are there in the activations' dtype alone, but for a share.

    See parallel/zero/weights.py.
    """
    if config.parallel.replicas(world_size) == 1 or activation_bytes(config) == FP32_BYTES:
        return 0
    return stage.matmul_only


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch on one rank; tensor-parallel ranks work on the same ones."""
    return config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
