"""Weights that are rounded once a step, against weights that are rounded at each use: the same bits."""

import numpy as np
import pytest
import torch
from layout_runs import run_values, steps_on_rank
from worlds import run_world

from sambalm.parallel.linear import linear, linear_parts
from sambalm.parallel.rounded_weights import RoundedWeights, joined


def rounded_at_each_use(monkeypatch):
    monkeypatch.setattr(RoundedWeights, "of", lambda copies, weights, dtype: joined(weights, dtype))


def rounded_in_the_first_step_alone(monkeypatch):
    monkeypatch.setattr(RoundedWeights, "update", lambda copies, weights=None: None)


def losses_and_gradients(parallel, mistake=None):
    values = run_values(parallel=parallel, precision="bf16")
    results = run_world(steps_on_rank, values, 3, mistake, ranks=2)
    return [result.losses for result in results], [piece for result in results for _, _, piece in result.gradients]


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_steps_have_the_same_bits(parallel):
    losses, gradients = losses_and_gradients(parallel)
    expected_losses, expected_gradients = losses_and_gradients(parallel, rounded_at_each_use)
    assert losses == expected_losses
    assert all(np.array_equal(a, e) for a, e in zip(gradients, expected_gradients, strict=True))
    assert losses_and_gradients(parallel, rounded_in_the_first_step_alone)[0] != expected_losses


def test_copies_are_one_for_all_uses_and_follow_the_weights():
    weights = [torch.nn.Parameter(torch.randn(rows, 11)) for rows in (5, 4)]
    x = torch.randn(3, 11).bfloat16()
    copies = RoundedWeights(weights)

    def products_are_right():
        first, second = linear_parts(x, *weights, sizes=[[5], [4]])
        assert torch.equal(torch.cat((first, second), dim=-1), x @ torch.cat(weights).bfloat16().t())
        assert torch.equal(linear(x, weights[0]), x @ weights[0].bfloat16().t())

    for _ in range(2):
        copies.update()
        with copies.kept():
            products_are_right()
            assert copies.of(tuple(weights), x.dtype) is copies.of(tuple(weights), x.dtype)
        with torch.no_grad():
            weights[1].add_(1)
        products_are_right()  # outside of steps, too


def test_what_the_optimizer_has_written_is_not_rounded_again():
    weights = [torch.nn.Parameter(torch.randn(rows, 11)) for rows in (5, 4, 3)]
    copies = RoundedWeights(weights)
    with copies.kept():
        pair, alone = copies.of(tuple(weights[:2]), torch.bfloat16), copies.of(tuple(weights[:1]), torch.bfloat16)
    assert copies.to_write(weights[0]) is None  # of which there are two
    assert copies.to_write(weights[2]) is None  # of which there is none
    copies.to_write(weights[1]).fill_(7)
    copies.update()
    with copies.kept():
        assert torch.equal(pair, torch.cat((weights[0].bfloat16(), torch.full_like(weights[1], 7).bfloat16())))
        assert torch.equal(alone, weights[0].bfloat16())
    copies.update()
    with copies.kept():  # and is, where the optimizer has not been there since
        assert torch.equal(pair, torch.cat(weights[:2]).bfloat16())
