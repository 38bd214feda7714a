"""What a rank of a layout sends in a step, as the tensors that it hands to collectives and to other ranks.

`handed_bytes` counts those input tensors: the whole tensor of an all-reduce and a reduce-scatter, the own share of an
all-gather, what is sent to another rank. `wire_bytes` is what a ring then sends from each rank.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch

from sambalm.model.config import ATTENTION, MAMBA, ModelConfig
from sambalm.model.heads import kv_copies
from sambalm.model.samba import Samba
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS, OptimizerConfig
from sambalm.pretrain.planner.memory import MAX_LIVE_PARAMETERS
from sambalm.pretrain.planner.sizes import (
    ACTIVATION_BYTES,
    FP32_BYTES,
    PERSISTENT_ELEMENTS,
    first_tensor_rank,
    is_first,
    is_last,
    local_sizes,
    micro_batch_tokens,
    only_rounded_elements,
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
    for letter, count in stage_letters(config, stage):
        _tensor_sublayer(ledger, config, letter, count * micro_batches)
        _context_sublayer(ledger, config, letter, count * micro_batches)
    for part in stage_parts(config)[stage]:
        _tensor_ends(ledger, config, part, micro_batches)
        _pipeline(ledger, config, part, micro_batches)
    _replicas(ledger, config, stage, world_size=world_size, micro_batches=micro_batches)
    return ledger.transfers()


def _tensor_sublayer(ledger: _Ledger, config: RunConfig, letter: str, passes: int) -> None:
    """Of `passes` sublayers of a kind: as many as the stage has, times micro-batches."""
    parallel, model = config.parallel, config.model
    ranks, sequence = parallel.tensor, parallel.sequence
    a, tokens = ACTIVATION_BYTES[config.train.precision], micro_batch_tokens(config)
    # A checkpointed sublayer runs again up to its last saved tensor, so all but its output's reduction.
    forwards = 2 if parallel.recompute == "full" else 1
    _linear_pair(ledger, config, forwards=forwards, passes=passes)
    if sequence:  # the norm's weight
        ledger.add("tensor", "all-reduce", ranks, model.hidden_size * FP32_BYTES, times=passes)
    if letter == MAMBA:
        projected = a * tokens * (model.dt_rank_size + 2 * model.d_state)
        ledger.add("tensor", "all-reduce", ranks, projected, times=passes * (forwards + 1))
    if letter == ATTENTION and ranks > 1:
        copies, kv = kv_copies(model, ranks), local_sizes(model, letter, ranks).kv
        ledger.add("tensor", "all-reduce", copies, FP32_BYTES * 2 * kv * model.hidden_size, times=passes)


def _linear_pair(ledger: _Ledger, config: RunConfig, *, forwards: int, passes: int) -> None:
    """The column-parallel input and the row-parallel output of every sublayer."""
    ranks = config.parallel.tensor
    whole = _hidden_bytes(config)
    if config.parallel.sequence:
        # Input: gathered forward and again backward, its gradient scattered. Output: scattered, its gradient gathered.
        ledger.add("tensor", "all-gather", ranks, whole / ranks, times=passes * (forwards + 2))
        ledger.add("tensor", "reduce-scatter", ranks, whole, times=passes * 2)
    else:
        ledger.add("tensor", "all-reduce", ranks, whole, times=passes * 2)


def _hidden_bytes(config: RunConfig) -> int:
    """The residual stream of a micro-batch, whole."""
    return micro_batch_tokens(config) * config.model.hidden_size * ACTIVATION_BYTES[config.train.precision]


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


def _context_sublayer(ledger: _Ledger, config: RunConfig, letter: str, passes: int) -> None:
    parallel, model = config.parallel, config.model
    ranks, size = parallel.context, local_sizes(model, letter, parallel.tensor)
    if ranks == 1:
        return
    a, batch = ACTIVATION_BYTES[config.train.precision], config.train.micro_batch_size
    forwards = 2 if parallel.recompute == "full" else 1
    if letter == MAMBA:
        states = 2 * batch * size.channels * model.d_state * FP32_BYTES
        ledger.add("context", "all-gather", ranks, states, times=passes * forwards)
        ledger.add("context", "reduce-scatter", ranks, ranks * states, times=passes)
    halo, width = {MAMBA: (model.d_conv - 1, size.channels), ATTENTION: (model.window - 1, 2 * size.kv)}.get(
        letter, (0, 0)
    )
    tokens = _halo_tokens(halo, config=config, forwards=forwards)
    ledger.add("context", "send", ranks, a * batch * width * tokens, times=passes)


def _halo_tokens(halo: int, *, config: RunConfig, forwards: int) -> int:
    """Tokens that the busiest rank sends: forward to the ranks after it, backward their gradients to those before."""
    ranks, part_tokens = config.parallel.context, config.data.sequence_length // config.parallel.context
    hops = min(math.ceil(halo / part_tokens), ranks - 1)
    sent = [min(part_tokens, halo - (hop - 1) * part_tokens) for hop in range(1, hops + 1)]
    return max(forwards * sum(sent[: ranks - 1 - rank]) + sum(sent[:rank]) for rank in range(ranks))


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
        gathered = weights - rounded * (FP32_BYTES - ACTIVATION_BYTES[config.train.precision])
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
    return _reduced_groups(config.optimizer, config.model, config.parallel.tensor)


@lru_cache(maxsize=64)
def _reduced_groups(optimizer: OptimizerConfig, model: ModelConfig, tensor_ranks: int) -> tuple[ReducedGroup, ...]:
    """Those of a model on the meta device."""
    with torch.device("meta"):
        samba = Samba(model, tp=first_tensor_rank(model, tensor_ranks))
    groups = optimizer.parameter_groups(samba, bucket_elements=BUCKET_ELEMENTS)
    return tuple(ReducedGroup(sum(p.numel() for p in group["params"]), "completed_by" in group) for group in groups)


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
