"""What a rank of a layout sends in a step, as the tensors that it hands to collectives and to other ranks.

`handed_bytes` counts those input tensors: the whole tensor of an all-reduce and a reduce-scatter, the own share of an
all-gather, what is sent to another rank. `wire_bytes` is what a ring then sends from each rank.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.counts import FP32_BYTES, Message, Share
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.planner.buckets import SLOTS, layer_buckets, reduced_groups
from sambalm.pretrain.planner.kernels import planned_kernels
from sambalm.pretrain.planner.sizes import (
    Chunk,
    Stage,
    activation_bytes,
    embedding_rows,
    micro_batch_tokens,
    only_rounded_elements,
    share_of,
    stages_of,
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
        self.handed: defaultdict[tuple[str, str, int], float] = defaultdict(int)
        self.messages: Counter[tuple[str, str, int]] = Counter()

    def add(self, dimension: str, operation: str, ranks: int, message_bytes: float, *, times: int) -> None:
        if ranks > 1 and message_bytes:
            self.handed[dimension, operation, ranks] += message_bytes * times
            self.messages[dimension, operation, ranks] += times

    def transfers(self) -> list[Transfer]:
        return [Transfer(*key, handed_bytes=handed, messages=self.messages[key]) for key, handed in self.handed.items()]


def step_transfers(config: RunConfig, *, stage: int, world_size: int) -> list[Transfer]:
    """Returns all that the busiest rank of a stage hands over in one step, but for single numbers."""
    (sent,) = transfers_of_stages(config, [stages_of(config)[stage]], world_size=world_size)
    return sent


def transfers_of_stages(config: RunConfig, stages: Iterable[Stage], *, world_size: int) -> list[list[Transfer]]:
    """Returns `step_transfers` of several pipeline stages."""
    micro_batches = config.accumulation_steps(data_size=world_size // config.parallel.model_ranks)
    share = share_of(config, planned_kernels(config))
    messages = _messages(config.model, share)
    found = []
    for stage in stages:
        ledger = _Ledger()
        for letter, count in stage.letters:
            _sublayers(ledger, config, messages[letter], passes=count * micro_batches)
        for chunk in stage.chunks:
            _tensor_ends(ledger, config, chunk, micro_batches)
            _pipeline(ledger, config, chunk, micro_batches)
        _replicas(ledger, config, stage, world_size=world_size, micro_batches=micro_batches)
        found.append(ledger.transfers())
    return found


@lru_cache(maxsize=1024)
def _messages(model: ModelConfig, share: Share) -> dict[str, list[Message]]:
    """Lists what each kind of sublayer sends in a micro-batch, beside its norm's weight."""
    return {one.letter: list(one.messages(model, share)) for one in model.kinds}


def _sublayers(ledger: _Ledger, config: RunConfig, messages: Sequence[Message], *, passes: int) -> None:
    """Counts what `passes` sublayers of a kind send: as many as the stage has, times micro-batches."""
    if config.parallel.sequence:  # the norm's weight
        norm_bytes = config.model.hidden_size * FP32_BYTES
        ledger.add("tensor", "all-reduce", config.parallel.tensor, norm_bytes, times=passes)
    for sent in messages:
        ledger.add(sent.dimension, sent.operation, sent.ranks, sent.handed_bytes, times=passes * sent.times)


def _hidden_bytes(config: RunConfig) -> int:
    """The residual stream of a micro-batch, whole."""
    return micro_batch_tokens(config) * config.model.hidden_size * activation_bytes(config)


def _tensor_ends(ledger: _Ledger, config: RunConfig, chunk: Chunk, micro_batches: int) -> None:
    """The embedding's output, the head's input, and the loss's maximum, label and sum of each token in fp32."""
    ranks, sequence, whole = config.parallel.tensor, config.parallel.sequence, _hidden_bytes(config)
    if chunk.is_first:
        ledger.add("tensor", "reduce-scatter" if sequence else "all-reduce", ranks, whole, times=micro_batches)
        ledger.add("tensor", "all-gather", ranks, whole / ranks if sequence else 0, times=micro_batches)
    if chunk.is_last:
        ledger.add("tensor", "all-reduce", ranks, FP32_BYTES * micro_batch_tokens(config), times=3 * micro_batches)
        if sequence:
            ledger.add("tensor", "all-gather", ranks, whole / ranks, times=2 * micro_batches)
            ledger.add("tensor", "reduce-scatter", ranks, whole, times=micro_batches)
            ledger.add("tensor", "all-reduce", ranks, config.model.hidden_size * FP32_BYTES, times=micro_batches)
        else:
            ledger.add("tensor", "all-reduce", ranks, whole, times=micro_batches)


def _pipeline(ledger: _Ledger, config: RunConfig, chunk: Chunk, micro_batches: int) -> None:
    """Counts outputs to the next chunk and gradients to the chunk before."""
    hidden = _hidden_bytes(config) // (config.parallel.tensor if config.parallel.sequence else 1)
    neighbours = (not chunk.is_first) + (not chunk.is_last)
    ledger.add("pipeline", "send", config.parallel.pipeline, hidden, times=micro_batches * neighbours)


def _replicas(ledger: _Ledger, config: RunConfig, stage: Stage, *, world_size: int, micro_batches: int) -> None:
    """ZeRO's gradients and weights, over the ranks of the data and the context dimension."""
    parallel, model = config.parallel, config.model
    ranks = parallel.replicas(world_size)
    weights = stage.parameters * FP32_BYTES
    rounded = only_rounded_elements(config, stage, world_size=world_size)
    gathered = weights - rounded * (FP32_BYTES - activation_bytes(config))
    if not parallel.overlaps_messages(world_size):
        ledger.add("data", "reduce-scatter", ranks, weights, times=1)
        ledger.add("data", "all-gather", ranks, gathered / ranks, times=1)
    else:
        _bucket_messages(ledger, config, ranks=ranks, gathered=gathered, micro_batches=micro_batches)
    ends = any(chunk.is_first != chunk.is_last for chunk in stage.chunks)
    if model.tie_embeddings and parallel.pipeline > 1 and ends:
        rows = embedding_rows(model, parallel.tensor)
        ledger.add("pipeline", "all-reduce", 2, rows * model.hidden_size * FP32_BYTES, times=1)


def _bucket_messages(ledger: _Ledger, config: RunConfig, *, ranks: int, gathered: float, micro_batches: int) -> None:
    """The buckets' gradients, and `gathered` bytes of weights where a step gathers each once."""
    stage, groups, layers = config.parallel.zero_stage, reduced_groups(config), layer_buckets(config)
    for group in groups:
        times = micro_batches if group.within_backward and stage > 1 else 1
        ledger.add("data", "reduce-scatter", ranks, group.elements * FP32_BYTES, times=times)
    if stage < 3:
        ledger.add("data", "all-gather", ranks, gathered / len(groups) / ranks, times=len(groups))
        return
    for group in groups:
        if not group.within_backward:
            ledger.add("data", "all-gather", ranks, group.elements * FP32_BYTES / ranks, times=1)
    for number, elements in enumerate(layers):
        # A backward begins with what the forward used last, the first buckets; the next forward with the others.
        forwards = micro_batches if number < len(layers) - SLOTS else 1
        backwards = micro_batches if number >= SLOTS else 0
        sent = elements * activation_bytes(config) / ranks
        ledger.add("data", "all-gather", ranks, sent, times=forwards + backwards)
