"""When weights are gathered under ZeRO-1, and who waits for them."""

from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sambalm.parallel.zero import weights as flat_weights
from sambalm.parallel.zero.weights import FlatWeights
from tests.support.layout_runs import STEPS, batches, one_process, run_values, steps_on_rank
from tests.support.marks import slow_except
from tests.support.worlds import run_world


class Work:
    """A message that adds to a list when it is waited for."""

    def __init__(self, work: dist.Work, arrived: list, elements: int) -> None:
        self.work, self.arrived, self.elements = work, arrived, elements

    def wait(self) -> None:
        self.work.wait()
        self.arrived.append(self.elements)


def events_on_rank(values: dict) -> tuple[list[str | int], list[int]]:
    """What a step does, and the elements of all buffers in the optimizer's order.

    It sends a buffer, told by its elements below zero, waits for one, told by its elements, and goes through a layer.
    """
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config, events = parse_config(values, source="test"), []
    gather = dist.all_gather_into_tensor

    def send(buffer, share, **settings):
        events.append(-buffer.numel())
        return Work(gather(buffer, share, **settings), events, buffer.numel())

    with start_world(config.parallel) as world, pytest.MonkeyPatch.context() as monkeypatch:
        training = build_training(config, world=world, checkpoint=None, bucket_elements=1)
        (model,) = training.chunks
        model.register_forward_hook(lambda *_: events.append("end"))
        for number, layer in model.layers.items():
            layer.register_forward_hook(lambda *_, number=number: events.append(f"layer {number}"))
        training.executor.train_step(batches(0, config=config, world=world))
        events.clear()
        monkeypatch.setattr(dist, "all_gather_into_tensor", send)
        training.executor.train_step(batches(1, config=config, world=world))
    return events, [buffer.numel() for buffer in training.executor.weights.buffers]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_wait_for_no_weights_but_their_own(recompute):
    values = run_values(model={"tie_embeddings": False}, parallel={"recompute": recompute})
    for events, (head, *layers, embedding, undecayed) in run_world(events_on_rank, values, ranks=2):
        first, *others = layers[::-1]
        expected = [-embedding, embedding, -undecayed, undecayed, -first]
        for number, (needed, following) in enumerate(pairwise([first, *others, head])):
            expected += [needed, -following, f"layer {number}"]
        expected += [head, "end"]
        assert events[: len(expected)] == expected
        assert not any(isinstance(event, int) for event in events[len(expected) :])  # of the second micro-batch


def weights_arrive_when_they_are_waited_for(monkeypatch):
    gather = dist.all_gather_into_tensor

    class Late:
        def __init__(self, buffer, share, *, group, async_op):
            self.buffer, self.share, self.group = buffer, share, group

        def wait(self):
            gather(self.buffer, self.share, group=self.group)

    monkeypatch.setattr(flat_weights, "dist", SimpleNamespace(all_gather_into_tensor=Late))


@pytest.mark.parametrize(
    ("ranks", "parallel", "model"),
    [
        (2, {"zero_stage": 1}, {}),
        (2, {"zero_stage": 1, "recompute": "full"}, {}),
        (2, {"context": 2}, {}),
        # A module's queries and keys are in two buffers.
        pytest.param(4, {"tensor": 2}, {"num_kv_heads": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_weight_is_used_before_it_is_waited_for(ranks, parallel, model):
    expected, values = one_process(model), run_values(model=model, parallel=parallel)
    for result in run_world(steps_on_rank, values, STEPS, weights_arrive_when_they_are_waited_for, ranks=ranks):
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)


def held_out_on_rank(values: dict, gathers: bool) -> list[float]:
    """Losses without training after each of a few steps."""
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config, found = parse_config(values, source="test"), []
    with start_world(config.parallel) as world, pytest.MonkeyPatch.context() as monkeypatch:
        if not gathers:
            monkeypatch.setattr(FlatWeights, "gather", lambda weights: setattr(weights, "stale", False))
        training = build_training(config, world=world, checkpoint=None, bucket_elements=1)
        for step in range(3):
            training.executor.train_step(batches(step, config=config, world=world))
            losses = training.executor.losses(batches(0, config=config, world=world))
            found.append(world.sum_over_replicas(torch.stack(losses).mean()).item() / world.replica_size)
    return found


@pytest.mark.parametrize(("precision", "tolerance"), slow_except([("fp32", 1e-5)], [("fp32", 1e-5), ("bf16", 1e-3)]))
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except([], [(2, {"zero_stage": 1}), (2, {"context": 2}), (4, {"pipeline": 2, "zero_stage": 1})]),
    ids=str,
)
def test_losses_between_steps_are_of_the_new_weights(ranks, parallel, precision, tolerance):
    (expected,) = run_world(held_out_on_rank, run_values(precision=precision), True, ranks=1)
    values = run_values(parallel=parallel, precision=precision)
    for found in run_world(held_out_on_rank, values, True, ranks=ranks):
        assert found == pytest.approx(expected, rel=tolerance)
    for found in run_world(held_out_on_rank, values, False, ranks=ranks):
        assert found != pytest.approx(expected, rel=tolerance)


def no_weights_are_sent(monkeypatch):
    @contextmanager
    def arriving(weights):
        weights.stale = False
        yield

    monkeypatch.setattr(FlatWeights, "arriving", arriving)


def test_weights_of_a_step_before_are_seen():
    expected = one_process()
    for result in run_world(steps_on_rank, run_values(parallel={"zero_stage": 1}), STEPS, no_weights_are_sent, ranks=2):
        assert result.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)
        assert result.losses[-1] != pytest.approx(expected.losses[-1], rel=1e-4)


def forward_on_rank(values: dict) -> None:
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None)
        micro_batches = batches(0, config=config, world=world)
        training.executor.train_step(micro_batches)
        with pytest.raises(RuntimeError, match="gather them first"):
            training.chunks[0](micro_batches[0].tokens)
        training.executor.weights.gather()
        training.chunks[0](micro_batches[0].tokens)


def test_a_forward_that_would_use_old_weights_is_refused():
    run_world(forward_on_rank, run_values(parallel={"zero_stage": 1}), ranks=2)
