"""What a rank of a layout sends in a step, as the tensors that it hands to collectives and to other ranks.

`handed_bytes` counts those input tensors: the whole tensor of an all-reduce and a reduce-scatter, the own share of an
all-gather, what is sent to another rank. `wire_bytes` is what a ring then sends from each rank.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import FP32_BYTES, Share
from sambalm.model.registry import mixer, weight_copies
from sambalm.model.samba import Samba
from sambalm.parallel.groups import TensorParallel
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS, gradient_buckets
from sambalm.pretrain.planner.kernels import planned_kernels
from sambalm.pretrain.planner.memory import MAX_LIVE_PARAMETERS
from sambalm.pretrain.planner.sizes import (
    PERSISTENT_ELEMENTS,
    activation_bytes,
    is_first,
    is_last,
    local_sizes,
    micro_batch_tokens,
    only_rounded_elements,
    share_of,
    stage_letters,
    stage_parameters,
    stage_parts,
)

# What a ring sends from each of n ranks, over the bytes that the rank hands over.
_RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "send": lambda n: 1,
}


@dataclass(frozen=True)
class Transfer:
    """What a rank hands to one operation of one dimension of the layout, over a whole step."""

    dimension: str  # tensor, context, pipeline or data
    operation: str
    ranks: int
    handed_bytes: float
    messages: int

    @property
    def wire_bytes(self) -> float:
        return self.handed_bytes * _RING[self.operation](self.ranks)


class _Ledger:
    """Adds up bytes and messages by dimension, operation and group size."""

    def __init__(self) -> None:
        self.handed: Counter[tuple[str, str, int]] = Counter()
        self.messages: Counter[tuple[str, str, int]] = Counter()

    def add(self, dimension: str, operation: str, ranks: int, message_bytes: float, *, times: int) -> None:
        if ranks > 1 and message_bytes:
            self.handed[dimension, operation, ranks] += message_bytes * times
            self.messages[dimension, operation, ranks] += times

    def transfers(self) -> list[Transfer]:
        return [Transfer(*key, handed_bytes=handed, messages=self.messages[key]) for key, handed in self.handed.items()]


def step_transfers(config: RunConfig, *, stage: int, world_size: int) -> list[Transfer]:
    """All that the busiest rank of a pipeline stage hands over in one step, but for single numbers."""
    ledger, parallel = _Ledger(), config.parallel
    micro_batches = config.accumulation_steps(data_size=world_size // parallel.model_ranks)
    share = share_of(config, planned_kernels(config))
    for letter, count in stage_letters(config, stage):
        _sublayers(ledger, config, share, letter, passes=count * micro_batches)
    for part in stage_parts(config)[stage]:
        _tensor_ends(ledger, config, part, micro_batches)
        _pipeline(ledger, config, part, micro_batches)
    _replicas(ledger, config, stage, world_size=world_size, micro_batches=micro_batches)
    return ledger.transfers()


def _sublayers(ledger: _Ledger, config: RunConfig, share: Share, letter: str, *, passes: int) -> None:
    """Counts what `passes` sublayers of a kind send: as many as the stage has, times micro-batches."""
    ranks, model = config.parallel.tensor, config.model
    if config.parallel.sequence:  # the norm's weight
        ledger.add("tensor", "all-reduce", ranks, model.hidden_size * FP32_BYTES, times=passes)
    for sent in mixer(letter).messages(model, share):
        ledger.add(sent.dimension, sent.operation, sent.ranks, sent.handed_bytes, times=passes * sent.times)


def _hidden_bytes(config: RunConfig) -> int:
    """The residual stream of a micro-batch, whole."""
    return micro_batch_tokens(config) * config.model.hidden_size * activation_bytes(config)


def _tensor_ends(ledger: _Ledger, config: RunConfig, part: range, micro_batches: int) -> None:
    """The embedding's output, the head's input, and the loss's maximum, label and sum of each token in fp32."""
    ranks, sequence, whole = config.parallel.tensor, config.parallel.sequence, _hidden_bytes(config)
    if is_first(part, config.model):
        ledger.add("tensor", "reduce-scatter" if sequence else "all-reduce", ranks, whole, times=micro_batches)
        ledger.add("tensor", "all-gather", ranks, whole / ranks if sequence else 0, times=micro_batches)
    if is_last(part, config.model):
        ledger.add("tensor", "all-reduce", ranks, FP32_BYTES * micro_batch_tokens(config), times=3 * micro_batches)
        if sequence:
            ledger.add("tensor", "all-gather", ranks, whole / ranks, times=2 * micro_batches)
            ledger.add("tensor", "reduce-scatter", ranks, whole, times=micro_batches)
            ledger.add("tensor", "all-reduce", ranks, config.model.hidden_size * FP32_BYTES, times=micro_batches)
        else:
            ledger.add("tensor", "all-reduce", ranks, whole, times=micro_batches)


def _pipeline(ledger: _Ledger, config: RunConfig, part: range, micro_batches: int) -> None:
    """Outputs to the next part and gradients to the part before."""
    hidden = _hidden_bytes(config) // (config.parallel.tensor if config.parallel.sequence else 1)
    neighbours = (not is_first(part, config.model)) + (not is_last(part, config.model))
    ledger.add("pipeline", "send", config.parallel.pipeline, hidden, times=micro_batches * neighbours)


def _replicas(ledger: _Ledger, config: RunConfig, stage: int, *, world_size: int, micro_batches: int) -> None:
    """ZeRO's gradients and weights, over the ranks of the data and the context dimension."""
    parallel, model = config.parallel, config.model
    ranks = parallel.replicas(world_size)
    weights = stage_parameters(config, stage) * FP32_BYTES
    if parallel.zero_stage == 3:
        gathered = _gathered_bytes(config, stage, micro_batches=micro_batches)
        ledger.add("data", "all-gather", ranks, gathered / ranks, times=1)  # a module's start is counted apart
        ledger.add("data", "reduce-scatter", ranks, weights, times=micro_batches)
    else:
        groups = len(reduced_groups(config)) if parallel.overlaps_messages(world_size) else 1
        if parallel.zero_stage == 1:
            ledger.add("data", "reduce-scatter", ranks, weights / groups, times=groups)
        else:
            ledger.add("data", "all-reduce", ranks, weights, times=micro_batches)
        rounded = only_rounded_elements(config, stage, world_size=world_size)
        gathered = weights - rounded * (FP32_BYTES - activation_bytes(config))
        ledger.add("data", "all-gather", ranks, gathered / groups / ranks, times=groups)
    ends = any(is_first(part, model) != is_last(part, model) for part in stage_parts(config)[stage])
    at_end = stage in (0, parallel.pipeline - 1)
    if model.tie_embeddings and parallel.pipeline > 1 and ends and at_end:
        rows = model.vocab_size // parallel.tensor
        ledger.add("pipeline", "all-reduce", 2, rows * model.hidden_size * FP32_BYTES, times=1)


@dataclass(frozen=True)
class ReducedGroup:
    """Gradients that are reduced together."""

    elements: int
    within_backward: bool  # or at its end


def reduced_groups(config: RunConfig) -> tuple[ReducedGroup, ...]:
    """Of the first tensor-parallel rank, in their order, where the reduction overlaps with the backward."""
    return _reduced_groups(config.model, config.parallel.tensor)


@lru_cache(maxsize=64)
def _reduced_groups(model: ModelConfig, tensor_ranks: int) -> tuple[ReducedGroup, ...]:
    """Those of a model on the meta device."""
    with torch.device("meta"):
        samba = Samba(model, tp=_first_tensor_rank(model, tensor_ranks))
    buckets = gradient_buckets([samba], max_elements=BUCKET_ELEMENTS)
    return tuple(ReducedGroup(sum(p.numel() for p in b.parameters), b.completed_by is not None) for b in buckets)


def _first_tensor_rank(model: ModelConfig, tensor_ranks: int) -> TensorParallel:
    """Returns a place for modules on the meta device, which communicate with nobody."""
    copies = weight_copies(model, tensor_ranks=tensor_ranks)
    return TensorParallel(rank=0, size=tensor_ranks, copy_groups={copies: None})


def _gathered_bytes(config: RunConfig, stage: int, *, micro_batches: int) -> float:
    """Weights that ZeRO-3 gathers: for each micro-batch's forward, what it may not keep alive again for the backward.

    Tensors below its persistence threshold are gathered once a step.
    """
    model, whole = config.model, stage_parameters(config, stage)
    tensor = config.parallel.tensor
    small = sum(number * local_sizes(model, letter, tensor).small for letter, number in stage_letters(config, stage))
    embedding = model.vocab_size // tensor * model.hidden_size
    small += model.hidden_size + (embedding if embedding < PERSISTENT_ELEMENTS else 0)
    again = max(0, whole - MAX_LIVE_PARAMETERS)
    return FP32_BYTES * (micro_batches * (whole - small + again) + small)
