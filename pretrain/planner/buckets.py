"""The buckets in which replicas reduce gradients and gather weights, from what mixers say of their parameters."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.base import Mixer
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS, bucket_ranges
from sambalm.pretrain.planner.sizes import embedding_rows

SLOTS = 2  # buckets of layers whose gradients, or weights, ZeRO-2 and 3 hold at a time (parallel/zero/partitioned_*.py)


@dataclass(frozen=True)
class ReducedGroup:
    """Gradients that are reduced together."""

    elements: int
    within_backward: bool  # or at its end


def reduced_groups(config: RunConfig) -> tuple[ReducedGroup, ...]:
    """Lists those of the first tensor-parallel rank in their order, where the reduction overlaps with the backward."""
    return _reduced_groups(config.model, config.parallel.tensor)


def layer_buckets(config: RunConfig) -> list[int]:
    """Returns the elements of the buckets that hold layers, from the last layer to the first."""
    return [group.elements for group in reduced_groups(config) if group.within_backward]


@lru_cache(maxsize=64)
def _reduced_groups(model: ModelConfig, tensor_ranks: int) -> tuple[ReducedGroup, ...]:
    """Counts what `gradient_buckets` puts into each bucket, from what mixers say of their parameters."""
    rows, width = embedding_rows(model, tensor_ranks), model.hidden_size
    kinds = {one.letter: _bucketed_elements(one, model, tensor_ranks) for one in model.kinds}
    layers = [kinds[letter] for letter in reversed(model.pattern)]
    if not model.tie_embeddings:
        layers.insert(0, (model.vocab_size * width // tensor_ranks, rows * width))
    buckets = bucket_ranges([size for size, _ in layers], max_elements=BUCKET_ELEMENTS)
    elements = [sum(held for _, held in layers[bucket.start : bucket.stop]) for bucket in buckets]
    # The others come at the backward's end: those that decay, the embedding among them, and those that do not.
    others = Counter({True: rows * width, False: (len(model.pattern) + 1) * width})  # the norms
    for one in model.kinds:
        for each in one.parameters(model, tensor_ranks=tensor_ranks):
            if not each.matmul_only:
                others[each.decays] += model.pattern.count(one.letter) * each.elements
    return (*(ReducedGroup(held, True) for held in elements), *(ReducedGroup(others[key], False) for key in others))


def _bucketed_elements(one: Mixer, model: ModelConfig, tensor_ranks: int) -> tuple[int, int]:
    """Counts a layer's weights that only products read: an even share of the whole ones, and the first rank's share."""
    held = {each.name: each.elements for each in one.parameters(model, tensor_ranks=tensor_ranks) if each.matmul_only}
    whole = sum(each.counted for each in one.parameters(model, tensor_ranks=1) if each.name in held)
    return whole // tensor_ranks, sum(held.values())
