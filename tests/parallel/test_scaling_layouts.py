"""Learning rates by width and depth on layouts: buckets of the optimizer that have different learning rates."""

import functools

import pytest

from sambalm.pretrain.check_layout import Steps
from tests.support.layout_runs import STEPS, run_values, steps_on_rank
from tests.support.marks import slow_except
from tests.support.worlds import run_world

# Half as wide, heads twice as wide, and shallower: query, output and other matrices have a learning rate each.
SCALED = {
    "pattern": "M-*- x 2",  # more buckets than there are slots
    "scaling": "mup",
    "base": {"pattern": "M-*", "hidden_size": 24, "num_query_heads": 3, "num_kv_heads": 1, "mlp_size": 41},
}
LAYOUTS = {
    "ZeRO-1": (2, {"zero_stage": 1}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "ZeRO-3, full": (2, {"zero_stage": 3, "recompute": "full"}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2xTP2, ZeRO-3": (4, {"tensor": 2, "zero_stage": 3}),
    "DP2xPP2": (4, {"pipeline": 2}),
}


@functools.cache
def alone() -> Steps:
    (result,) = run_world(steps_on_rank, run_values(model=SCALED), ranks=1)
    return result


IN_CI = ["ZeRO-2", "ZeRO-3"]


@pytest.mark.parametrize("name", slow_except(IN_CI, LAYOUTS, long=[name for name in LAYOUTS if name not in IN_CI]))
def test_a_layout_trains_like_one_process(name):
    ranks, parallel = LAYOUTS[name]
    expected = alone()
    for result in run_world(steps_on_rank, run_values(model=SCALED, parallel=parallel), STEPS, ranks=ranks):
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)
