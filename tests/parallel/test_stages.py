"""Which layers each pipeline stage gets, and how many micro-batches a schedule takes at a time."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from sambalm.model.chunks import chunk_layers
from sambalm.model.config import ModelConfig
from sambalm.model.flops import layer_flops
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.pipeline.schedule import PipelineSchedule
from sambalm.parallel.pipeline.stages import balanced_stages

SIZES = {"hidden_size": 64, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 128, "window": 16}


def dearest(counts, costs, *, first, last):
    """What the dearest chunk costs."""
    ends = list(itertools.accumulate(counts))
    chunks = [sum(costs[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    chunks[0] += first
    chunks[-1] += last
    return max(chunks)


def every_cut(layers, chunks):
    """All ways to give each chunk a layer at least."""
    for borders in itertools.combinations(range(1, layers), chunks - 1):
        yield [end - start for start, end in itertools.pairwise((0, *borders, layers))]


@pytest.mark.parametrize("seed", range(40))
def test_balanced_stages_are_as_good_as_the_best_of_all_cuts(seed):
    draw = random.Random(seed)
    layers = draw.randint(1, 9)
    chunks = draw.randint(1, layers)
    costs = [draw.choice([1.0, 3.0, draw.random() * 10]) for _ in range(layers)]
    ends = {"first": draw.choice([0.0, 2.0, 50.0]), "last": draw.choice([0.0, 5.0, 50.0])}
    counts = balanced_stages(costs, chunks=chunks, **ends)
    assert len(counts) == chunks
    assert sum(counts) == layers
    assert min(counts) > 0
    best = min(dearest(cut, costs, **ends) for cut in every_cut(layers, chunks))
    assert dearest(counts, costs, **ends) == pytest.approx(best, rel=1e-12)


def test_a_head_dearer_than_all_layers_still_leaves_each_part_one():
    """An empty chunk would be the model's last as well as the one before it, and both would compute the head."""
    assert balanced_stages([1.0] * 4, chunks=4, last=100.0) == [1, 1, 1, 1]
    assert balanced_stages([1.0] * 5, chunks=2, last=100.0) == [4, 1]
    assert balanced_stages([1.0] * 5, chunks=2, first=100.0) == [1, 4]


def parts_of(parallel, **model):
    config = ModelConfig(**SIZES | {"vocab_size": 64} | model)
    return chunk_layers(config, ParallelConfig(**parallel), sequence_length=32)


def test_parts_follow_pipeline_layers():
    parallel = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 3, 2, 2]}
    assert parts_of(parallel, pattern="M-*-M-*-") == [range(0, 1), range(1, 4), range(4, 6), range(6, 8)]


def test_one_part_holds_everything():
    assert parts_of({}, pattern="M-*-") == [range(4)]


def test_dear_layers_are_counted_by_their_operations():
    """The half of a pattern that has the dear layers holds fewer."""
    config = ModelConfig(pattern="M" * 4 + "-" * 8, **SIZES | {"vocab_size": 8, "mlp_size": 8})
    costs = layer_flops(config, sequence_length=32)
    assert costs[0] > 5 * costs[-1]
    dear, cheap = chunk_layers(config, ParallelConfig(pipeline=2), sequence_length=32)
    assert len(dear) < len(cheap)
    assert sum(costs[i] for i in dear) == pytest.approx(sum(costs) / 2, rel=0.4)


def test_the_part_with_the_head_holds_fewer_layers():
    small, large = (parts_of({"pipeline": 2}, pattern="- x 12", vocab_size=size)[-1] for size in (8, 1600))
    assert len(small) == 6
    assert len(large) == 4  # the head costs as much as 4.2 layers


@pytest.mark.parametrize(("count", "run"), [(1, 4), (3, 4), (4, 4), (5, 8)])
def test_losses_of_any_number_of_micro_batches_take_whole_rounds_of_the_stages(count, run, monkeypatch):
    rounds = []

    def losses_of(schedule, micro_batches, **settings):
        rounds.append(len(micro_batches))
        return [batch.tokens.float() for batch in micro_batches]

    monkeypatch.setattr(PipelineSchedule, "_run", losses_of)
    schedule = object.__new__(PipelineSchedule)
    schedule.world = SimpleNamespace(pipeline=SimpleNamespace(size=4), from_last_stage=lambda losses: losses)
    tokens = [torch.full((1, 2), number) for number in range(count)]
    found = schedule.losses([MicroBatch(each, each) for each in tokens])
    assert [loss.tolist() for loss in found] == [each.tolist() for each in tokens]
    assert rounds == [run]
