"""Compute weights, which are converted once a step, against weights that are converted at each use: the same bits."""

import numpy as np
import pytest
import torch

from sambalm.parallel.layers.linear import linear, linear_parts
from sambalm.parallel.zero.compute_weights import ComputeWeights, joined
from sambalm.parallel.zero.weights import FlatWeights
from sambalm.pretrain.check_layout import Steps
from tests.support.layout_runs import run_values, steps_on_rank
from tests.support.marks import slow_except
from tests.support.parameters import described
from tests.support.worlds import Call, SharedWorlds


def converted_at_each_use(monkeypatch):
    monkeypatch.setattr(ComputeWeights, "of", lambda copies, weights, dtype: joined(weights, dtype))
    make = FlatWeights.__init__
    monkeypatch.setattr(
        FlatWeights, "__init__", lambda self, *args, **kwargs: make(self, *args, **kwargs | {"dtype": torch.float32})
    )


def converted_in_the_first_step_alone(monkeypatch):
    monkeypatch.setattr(ComputeWeights, "update", lambda copies, weights=None: None)


def call(name: str, mistake=None) -> Call:
    ranks, parallel = LAYOUTS[name]
    return Call(steps_on_rank, (run_values(parallel=parallel, precision="bf16"), 3, mistake), ranks=ranks)


def losses(results: list[Steps]) -> list[list[float]]:
    return [result.losses for result in results]


LAYOUTS = {
    "ZeRO-1": (2, {"zero_stage": 1}),
    "ZeRO-1, full": (2, {"zero_stage": 1, "recompute": "full"}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2, ZeRO-1": (4, {"pipeline": 2, "zero_stage": 1}),
    "TP4, ZeRO-1": (8, {"tensor": 4, "zero_stage": 1}),  # with two copies of each kv head
}
QUICK = ["ZeRO-1, full", "TP2+SP", "PP2"]
KEPT = {name: call(name) for name in LAYOUTS}
CONVERTED = {name: call(name, converted_at_each_use) for name in LAYOUTS}
WRONG = {name: call(name, converted_in_the_first_step_alone) for name in ("ZeRO-1", "TP2+SP", "PP2")}
WORLDS = SharedWorlds(
    *(KEPT[name] for name in [*QUICK, "ZeRO-1"]), *(CONVERTED[name] for name in QUICK), *WRONG.values()
)


@pytest.mark.parametrize("name", slow_except(QUICK, LAYOUTS))
def test_steps_have_the_same_bits(name):
    results, expected = WORLDS[KEPT[name]], WORLDS[CONVERTED[name]]
    assert losses(results) == losses(expected)
    for result, other in zip(results, expected, strict=True):
        pairs = zip(result.gradients, other.gradients, strict=True)
        assert all(np.array_equal(found, wanted) for (_, _, found), (_, _, wanted) in pairs)


@pytest.mark.parametrize("name", WRONG)
def test_copies_of_the_step_before_are_seen(name):
    assert losses(WORLDS[WRONG[name]]) != losses(WORLDS[KEPT[name]])


def test_copies_are_one_for_all_uses_and_follow_the_weights():
    weights = [described(torch.nn.Parameter(torch.randn(rows, 11))) for rows in (5, 4)]
    x = torch.randn(3, 11).bfloat16()
    copies = ComputeWeights(weights)

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


def test_what_the_optimizer_has_written_is_not_converted_again():
    weights = [described(torch.nn.Parameter(torch.randn(rows, 11))) for rows in (5, 4, 3)]
    copies = ComputeWeights(weights)
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


@pytest.mark.parametrize(("gap", "apart"), [(0, False), (3, False), (0, True)])
def test_what_others_keep_is_taken_where_it_lies(gap, apart):
    """In one memory, with a gap or without, and in two, where one starts at the place at which the other ends."""
    weights = [described(torch.nn.Parameter(torch.full((), torch.nan).expand(rows, 11))) for rows in (5, 4)]
    flat = torch.randn(9 * 11 + gap).bfloat16()
    second = torch.randn_like(flat) if apart else flat
    kept = flat[:55].view(5, 11), second[55 + gap :].view(4, 11)
    copies = ComputeWeights([])
    for weight, copy in zip(weights, kept, strict=True):
        copies.adopt(weight, copy)
    x = torch.randn(3, 11).bfloat16()
    for _ in range(2):
        first, second = linear_parts(x, *weights, sizes=[[5], [4]])
        assert torch.equal(torch.cat((first, second), dim=-1), x @ torch.cat(kept).t())
        assert torch.equal(linear(x, weights[1]), x @ kept[1].t())
        for copy in kept:
            copy.add_(1)
    both = copies.of(tuple(weights), torch.bfloat16)
    assert (both.data_ptr() == flat.data_ptr()) == (gap == 0 and not apart)
