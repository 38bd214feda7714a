"""Gradients and weights of which a rank keeps a share alone: ZeRO-2 and ZeRO-3."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sambalm.parallel.zero import gradients as flat_gradients
from sambalm.parallel.zero import partitioned_weights
from sambalm.parallel.zero.partitioned_gradients import PartitionedGradients
from sambalm.parallel.zero.partitioned_weights import PartitionedWeights
from tests.support.layout_runs import STEPS, batches, one_process, run_values, steps_on_rank
from tests.support.worlds import run_world

PATTERN = {"pattern": "M-*- x 2"}  # more buckets than there are slots


class Message:
    """A collective that happens when it is sent, or when it is waited for: whatever a device does lies between."""

    def __init__(self, collective, *arguments, at_once, group) -> None:
        self.happen = lambda: collective(*arguments, group=group)
        if at_once:
            self.happen()
            self.happen = lambda: None

    def wait(self) -> None:
        self.happen()


def messages(monkeypatch, *, at_once: bool) -> None:
    def sent(collective):
        return lambda *arguments, group, async_op: Message(collective, *arguments, at_once=at_once, group=group)

    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    monkeypatch.setattr(partitioned_weights, "dist", SimpleNamespace(all_gather_into_tensor=sent(gather)))
    monkeypatch.setattr(flat_gradients, "dist", SimpleNamespace(reduce_scatter_tensor=sent(scatter)))


def at_once(monkeypatch):
    messages(monkeypatch, at_once=True)


def when_waited_for(monkeypatch):
    messages(monkeypatch, at_once=False)


@pytest.mark.parametrize("changed", [at_once, when_waited_for])
@pytest.mark.parametrize(
    "parallel", [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 3, "recompute": "full"}], ids=str
)
def test_slots_change_hands_when_nothing_uses_them(parallel, changed):
    expected = one_process(PATTERN)
    for result in run_world(steps_on_rank, run_values(model=PATTERN, parallel=parallel), STEPS, changed, ranks=2):
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)


def gradients_are_not_settled_before_their_slot_is_taken(monkeypatch):
    settle = PartitionedGradients._settle
    monkeypatch.setattr(PartitionedGradients, "_settle", lambda gradients: None)
    complete = PartitionedGradients._complete

    def late(gradients, count):
        complete(gradients, count)
        if gradients.completed == gradients.layers:
            settle(gradients)

    monkeypatch.setattr(PartitionedGradients, "_complete", late)


def later_micro_batches_replace_the_first(monkeypatch):
    settle = PartitionedGradients._settle

    def settled(gradients):
        gradients.is_first = True
        settle(gradients)

    monkeypatch.setattr(PartitionedGradients, "_settle", settled)


def backwards_use_what_the_slots_hold(monkeypatch):
    of = PartitionedWeights.of

    def found(weights, some, dtype):
        if torch._C._current_graph_task_id() != -1:  # within a backward
            return partitioned_weights.below_each_other([weights.views[weight] for weight in some])
        return of(weights, some, dtype)

    monkeypatch.setattr(PartitionedWeights, "of", found)


def weights_of_the_step_before_stay_in_their_slots(monkeypatch):
    forget = PartitionedWeights.forget
    monkeypatch.setattr(
        PartitionedWeights, "forget", lambda weights: None if weights.slots[0].any() else forget(weights)
    )


@pytest.mark.parametrize(
    ("mistake", "stage"),
    [
        (gradients_are_not_settled_before_their_slot_is_taken, 2),
        (later_micro_batches_replace_the_first, 2),
        (backwards_use_what_the_slots_hold, 3),
        (weights_of_the_step_before_stay_in_their_slots, 3),
    ],
)
def test_known_mistakes_are_seen(mistake, stage):
    expected, values = one_process(PATTERN), run_values(model=PATTERN, parallel={"zero_stage": stage})
    for result in run_world(steps_on_rank, values, STEPS, mistake, ranks=2):
        assert [*result.losses, *result.norms] != pytest.approx([*expected.losses, *expected.norms], rel=1e-4)


def held_on_rank(values: dict) -> tuple[dict[str, int], bool, list[int]]:
    """The elements that a rank has memory for, whether a partitioned parameter has numbers, and buckets that came late.

    Of the last are those that a product asked for before they had been sent.
    """
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.parameter_info import info_of
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    of, late = PartitionedWeights.of, []

    def watched(weights, some, dtype):
        place = weights.place_of[some[0]]
        late.extend([place] if weights.held[place % partitioned_weights.SLOTS] != place else [])
        return of(weights, some, dtype)

    config = parse_config(values, source="test")
    with start_world(config.parallel) as world, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(PartitionedWeights, "of", watched)
        training = build_training(config, world=world, checkpoint=None)
        training.executor.train_step(batches(0, config=config, world=world))
        gradients, weights = training.executor.gradients, training.executor.weights
        storages = {
            name: {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // 4 for tensor in tensors}
            for name, tensors in (
                ("gradients", [*gradients.buffers, *gradients.shares]),
                ("weights", [*weights.buffers, *(weights.partitioned.tensors if weights.partitioned else ())]),
            )
        }
        parts = [p for p in training.chunks[0].parameters() if info_of(p).is_partitioned]
        held = {name: sum(sizes.values()) for name, sizes in storages.items()}
        held["parameters"] = sum(parameter.numel() for parameter in training.chunks[0].parameters())
        return held, any(bool(parameter.isfinite().any()) for parameter in parts), late


def test_ranks_keep_shares():
    """Eight layers, a bucket each, and two slots of the largest: less than three quarters of the model."""
    held = {}
    for stage in (1, 2, 3):
        values = run_values(model=PATTERN | {"vocab_size": 32}, parallel={"zero_stage": stage})
        held[stage], numbers, late = run_world(held_on_rank, values, ranks=4)[0]
        assert not numbers
        assert late == []  # the next one, forward or backward, is sent while products compute with one
    everything = held[1]["parameters"]
    assert held[1]["gradients"] >= everything
    assert held[1]["weights"] >= everything
    assert held[2]["gradients"] < 0.75 * everything
    assert held[2]["weights"] >= everything
    assert held[3]["gradients"] == held[2]["gradients"]
    assert held[3]["weights"] < 0.75 * everything
