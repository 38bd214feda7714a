"""The loss over the labels that count: its gradient is that of their mean over all ranks and micro-batches.

The reference is the formula, by autograd, on a model of one process that knows of no micro-batches.
"""

import functools
import math

import numpy as np
import pytest
import torch

from sambalm.parallel.micro_batch import MicroBatch, weighted
from tests.support.layout_runs import LENGTH, MODEL, SAMPLES, differences, run_values
from tests.support.marks import slow_except
from tests.support.worlds import run_world

# Labels that count in each sample, a micro-batch each: none; some on both sides of borders of context-parallel parts,
# unlike from part to part; all; and the last alone.
COUNTED = [[], [5, 14, 15, 16, 17, 24], range(LENGTH), [LENGTH - 1]]


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [samples, length + 1], and which labels count [samples, length]."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, MODEL["vocab_size"], (SAMPLES, LENGTH + 1), generator=generator)
    weights = torch.zeros(SAMPLES, LENGTH)
    for row, counted in zip(weights, COUNTED, strict=True):
        row[list(counted)] = 1
    return ids, weights


def steps_on_rank(values: dict, mistake=None):
    from sambalm.pretrain.check_layout import take_steps
    from sambalm.pretrain.config_file import parse_config

    def batches(step, config, world):
        ids, weights = samples(step)
        rows = range(world.data_rank, SAMPLES, world.data_size)
        whole = [MicroBatch(ids[[n], :-1], ids[[n], 1:], loss_weights=weights[[n]]) for n in rows]
        return weighted([batch.on_rank(world) for batch in whole], world)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if mistake:
            mistake(monkeypatch)
        return take_steps(parse_config(values, source="test"), steps=1, batches=batches)


@functools.cache
def by_the_formula() -> tuple[float, dict[str, np.ndarray]]:
    """Loss of the first step, and its gradient by canonical name."""
    from sambalm.model.config import ModelConfig
    from sambalm.model.samba import Samba
    from sambalm.parallel.sharding import canonical_slices, initialize_parameters

    model = Samba(ModelConfig(**MODEL))
    initialize_parameters(model, seed=run_values()["run"]["seed"])
    ids, weights = samples(0)
    loss = model(ids[:, :-1], ids[:, 1:])[weights.bool()].mean()
    loss.backward()
    gradients = {name: piece.of_local(parameter.grad).numpy() for name, parameter, piece in canonical_slices(model)}
    return loss.item(), gradients


LAYOUTS = {
    "alone": (1, {}),
    "alone, full": (1, {"recompute": "full"}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP4": (4, {"context": 4}),
    "DP2, ZeRO-1": (2, {"zero_stage": 1}),
    "DP2, ZeRO-2": (2, {"zero_stage": 2}),
    "DP4, ZeRO-3": (4, {"zero_stage": 3}),
    "DP2xPP2": (4, {"pipeline": 2}),
    "PP2xCP2": (4, {"pipeline": 2, "context": 2}),
    "CP2xTP2+SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
}
CORE = ["alone", "TP2+SP", "PP2", "CP4", "DP2, ZeRO-1", "DP4, ZeRO-3"]


@pytest.mark.parametrize("name", slow_except(CORE, LAYOUTS))
def test_gradients_are_those_of_the_mean_over_counted_labels(name):
    ranks, parallel = LAYOUTS[name]
    loss, gradients = by_the_formula()
    results = run_world(steps_on_rank, run_values(parallel=parallel), ranks=ranks)
    for result in results:
        assert result.losses == pytest.approx([loss], rel=1e-5)
    worst = differences([result.gradients for result in results], gradients)
    assert {tensor: value for tensor, value in worst.items() if value > 1e-5} == {}


def a_mean_of_each_micro_batch(monkeypatch):
    def mean(self, losses):
        counts = self.loss_weights > 0
        return losses[counts].mean() if counts.any() else losses.sum() * 0

    monkeypatch.setattr(MicroBatch, "mean", mean)


def counts_of_a_rank_alone(monkeypatch):
    from sambalm.parallel.groups import World

    add = World.sum_over_replicas
    monkeypatch.setattr(
        World,
        "sum_over_replicas",
        lambda self, value: value * self.replica_size if value.dtype == torch.float64 else add(self, value),
    )


@pytest.mark.parametrize(
    ("mistake", "ranks", "parallel"),
    [(a_mean_of_each_micro_batch, 1, {}), (counts_of_a_rank_alone, 2, {"zero_stage": 1})],
)
def test_means_of_means_are_seen(mistake, ranks, parallel):
    _, gradients = by_the_formula()
    results = run_world(steps_on_rank, run_values(parallel=parallel), mistake, ranks=ranks)
    assert max(differences([result.gradients for result in results], gradients).values()) > 0.03


def nothing_counts_on_rank(values: dict) -> tuple[float, float, bool]:
    """Loss and verdict of a step in which no label counts, and whether any weight has changed."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import gradient_norm
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None)
        ids, weights = samples(0)
        batch = MicroBatch(ids[:, :-1], ids[:, 1:], loss_weights=weights * 0).on_rank(world)
        before = [parameter.detach().clone() for chunk in training.chunks for parameter in chunk.parameters()]
        loss = training.executor.train_step(weighted([batch], world))
        skips = training.executor.guard.skips(gradient_norm(training.engine))
        after = [parameter for chunk in training.chunks for parameter in chunk.parameters()]
        changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return float(loss), float(skips), changed


def test_a_step_in_which_nothing_counts_is_skipped():
    for loss, skips, changed in run_world(nothing_counts_on_rank, run_values(parallel={"zero_stage": 1}), ranks=2):
        assert math.isnan(loss)
        assert skips == 1
        assert not changed
