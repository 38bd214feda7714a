"""When gradients are reduced under ZeRO, and which of them together."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sambalm.model.config import ModelConfig
from sambalm.model.samba import Samba
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.zero.gradients import FlatGradients
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.parallel.zero.partitioned_gradients import PartitionedGradients
from sambalm.pretrain.gradient_buckets import gradient_buckets
from tests.support.layout_runs import MODEL, STEPS, batches, one_process, run_values, steps_on_rank
from tests.support.worlds import run_world


class Sent(TorchDispatchMode):
    """Adds to a list the elements of each buffer whose reduction starts."""

    def __init__(self, events: list) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "c10d::_reduce_scatter_base_":
            self.events.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def events_on_rank(values: dict, bucket_elements: int) -> tuple[list[str | int], list[int]]:
    """What a step does, in its order, and the elements of all buffers.

    It enters a forward, leaves a layer's backward and starts the reduction of a buffer, told by its elements.
    """
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config, events = parse_config(values, source="test"), []
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None, bucket_elements=bucket_elements)
        (model,) = training.chunks
        model.register_forward_pre_hook(lambda *_: events.append("forward"))
        for number, layer in model.layers.items():
            layer.norm.weight.register_post_accumulate_grad_hook(
                lambda _, number=number: events.append(f"layer {number}")
            )
        with Sent(events):
            training.executor.train_step(batches(0, config=config, world=world))
        buffers = [buffer.numel() for buffer in training.executor.gradients.buffers]
    return events, buffers


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_buckets_are_sent_as_the_last_backward_leaves_their_layers(recompute):
    values = run_values(model={"tie_embeddings": False}, parallel={"recompute": recompute})
    backward = [f"layer {number}" for number in (4, 3, 2, 1, 0)]
    for events, (head, *layers, embedding, undecayed) in run_world(events_on_rank, values, 1, ranks=2):
        assert events[:6] == ["forward", *backward]  # of two micro-batches
        in_turn = [event for sent, left in zip(layers, backward, strict=True) for event in (sent, left)]
        assert events[6:] == ["forward", head, *in_turn, embedding, undecayed]


def test_a_bucket_of_several_layers_is_sent_after_the_lowest():
    pattern = {"pattern": "M-*- x 3"}
    *lowest, _, _ = [completed_by for _, _, completed_by in groups_of(meta_model(**pattern), 10**9)]
    assert len(lowest) < 12
    for events, (*buckets, embedding, undecayed) in run_world(
        events_on_rank, run_values(model=pattern), 10**9, ranks=2
    ):
        sent = dict(zip(lowest, buckets, strict=True))
        layers, sending = [f"layer {number}" for number in range(11, -1, -1)], []
        for number, layer in zip(range(11, -1, -1), layers, strict=True):
            sending += [sent.get(f"layers.{number}.norm.weight"), layer]
        assert events == ["forward", *layers, "forward", *filter(None, sending), embedding, undecayed]


def poisoned(monkeypatch):
    """What products find gradients for holds no number before they have."""
    clear, take_slot = FlatGradients.clear, PartitionedGradients._take_slot

    def clear_and_poison(gradients, **options):
        clear(gradients, **options)
        poison(chain(*gradients.views_of))

    def poison(views):
        for parameter, view in views:
            if info_of(parameter).has_product:
                view.fill_(torch.nan)

    def take_slot_and_poison(gradients, number):
        take_slot(gradients, number)
        poison(gradients.views_of[number] if number < gradients.layers else ())

    monkeypatch.setattr(FlatGradients, "clear", clear_and_poison)
    monkeypatch.setattr(PartitionedGradients, "_take_slot", take_slot_and_poison)


def added_to_those_of_the_step_before(monkeypatch):
    monkeypatch.setattr(FlatGradients, "overwritten", lambda gradients: nullcontext())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (4, {"pipeline": 2, "virtual_pipeline": 2, "zero_stage": 1}),
        (4, {"tensor": 2, "sequence": True, "zero_stage": 1}),
    ],
    ids=str,
)
def test_gradients_that_products_find_are_not_read_before(ranks, parallel, tied):
    model = {"tie_embeddings": tied}
    expected, values = one_process(model), run_values(model=model, parallel=parallel)
    for result in run_world(steps_on_rank, values, STEPS, poisoned, ranks=ranks):
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)


def test_gradients_of_the_step_before_are_seen():
    expected, values = one_process(), run_values(parallel={"zero_stage": 1})
    for result in run_world(steps_on_rank, values, 2, added_to_those_of_the_step_before, ranks=2):
        assert result.norms[0] == pytest.approx(expected.norms[0], rel=1e-5)
        assert result.norms[1] != pytest.approx(expected.norms[1], rel=1e-2)


def groups_of(model: Samba, max_elements: int | None) -> Iterator[tuple[set[str], bool, str | None]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for bucket in gradient_buckets([model], max_elements=max_elements):
        yield {names[p] for p in bucket.parameters}, bucket.weight_decay, names.get(bucket.completed_by)


def meta_model(tp: TensorParallel = TensorParallel(), **changes) -> Samba:
    with torch.device("meta"):
        return Samba(ModelConfig(**MODEL | changes), tp=tp)


@pytest.mark.parametrize("tied", [True, False])
def test_groups_hold_each_parameter_once(tied):
    model = meta_model(pattern="M-*- x 6", tie_embeddings=tied)
    counts = []
    for bucket_elements in (None, 10**9, 30_000, 1):
        groups = list(groups_of(model, bucket_elements))
        assert sorted(name for group, _, _ in groups for name in group) == sorted(dict(model.named_parameters()))
        assert [decays for _, decays, _ in groups] == [True] * (len(groups) - 1) + [False]
        counts.append(len(groups))
    assert counts[0] == 3
    assert 8 + 2 <= counts[1] < counts[2] < counts[3] == 24 + (not tied) + 2


@pytest.mark.parametrize("bucket_elements", [30_000, 10**9])
def test_buckets_are_full_and_named_by_their_lowest_layer(bucket_elements):
    model = meta_model(pattern="M-*- x 6")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    numbers, elements = [], []
    for names, _, completed_by in list(groups_of(model, bucket_elements))[:-2]:
        layers = sorted({int(name.split(".")[1]) for name in names}, reverse=True)
        assert completed_by == f"layers.{layers[-1]}.norm.weight"
        numbers += layers
        elements.append(sum(sizes[name] for name in names))
    assert numbers == list(range(23, -1, -1))
    most = min(bucket_elements, math.ceil(sum(elements) / 8))
    assert max(elements) <= most < min(map(sum, pairwise(elements)))


@pytest.mark.parametrize("bucket_elements", [10_000, 20_000, 30_000])
def test_ranks_with_uneven_shares_have_the_same_groups(bucket_elements):
    """Ranks whose groups differed would wait for each other's messages in another order."""
    ranks = [TensorParallel(rank, 4, copy_groups={2: None}) for rank in range(4)]
    models = [meta_model(tp, pattern="M-*- x 3", mlp_size=90, hidden_size=60, num_query_heads=10) for tp in ranks]
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) > 1
    first, *others = [list(groups_of(model, bucket_elements)) for model in models]
    assert len(first) > 3
    assert all(groups == first for groups in others)
