"""How many parameters a rank of a layout holds, of which kinds, and how many tokens it works on."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from sambalm.model.build import part_layers
from sambalm.model.config import ATTENTION, ModelConfig
from sambalm.model.heads import kv_copies, share_heads
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.samba import SUBLAYERS, Sublayer
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.shard import shard
from sambalm.pretrain.config import DTYPES, RunConfig

FP32_BYTES = 4
ACTIVATION_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
PERSISTENT_ELEMENTS = 100_000  # DeepSpeed 0.19.8's param_persistence_threshold, runtime/zero/config.py


@dataclass(frozen=True)
class LocalSizes:
    """The first tensor-parallel rank's share of a sublayer, which is the largest."""

    parameters: int
    small: int  # of them in tensors that ZeRO-3 never releases
    matrix: int  # elements of the weights that are cast to the activations' dtype for matrix products
    matmul_only: int  # of them in weights that nothing else reads
    channels: int
    query: int
    kv: int
    mlp: int


def first_tensor_rank(model: ModelConfig, tensor_ranks: int) -> TensorParallel:
    """For modules on the meta device, which communicate with nobody."""
    copies = kv_copies(model, tensor_ranks) if ATTENTION in model.pattern else 1
    return TensorParallel(rank=0, size=tensor_ranks, copy_groups={copies: None})


@lru_cache(maxsize=256)
def local_sizes(model: ModelConfig, letter: str, tensor_ranks: int) -> LocalSizes:
    """Counts the real module on the meta device."""
    tp = first_tensor_rank(model, tensor_ranks)
    with torch.device("meta"):
        module = Sublayer(letter, model, tp=tp, kernels=TORCH_KERNELS)
    parameters = dict(module.named_parameters())
    apart = ("A_log", "conv.weight")
    matrices = [p for name, p in parameters.items() if p.dim() == 2 and not name.endswith(apart)]
    share = share_heads(model, tp) if letter == ATTENTION else None
    return LocalSizes(
        parameters=sum(p.numel() for p in parameters.values()),
        small=sum(p.numel() for p in parameters.values() if p.numel() < PERSISTENT_ELEMENTS),
        matrix=sum(p.numel() for p in matrices),
        matmul_only=sum(p.numel() for p in matrices if p.matmul_only),
        channels=shard(model.inner_size, tp).length,
        query=share.query.length if share else 0,
        kv=share.kv.length if share else 0,
        mlp=shard(model.mlp_size, tp).length,
    )


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
    if not flat or ACTIVATION_BYTES[config.train.precision] == FP32_BYTES:
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
    return [(letter, letters.count(letter)) for letter in SUBLAYERS if letter in letters]


def is_first(part: range, model: ModelConfig) -> bool:
    return part.start == 0


def is_last(part: range, model: ModelConfig) -> bool:
    return part.stop == len(model.pattern)


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch on one rank; tensor-parallel ranks work on the same ones."""
    return config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
