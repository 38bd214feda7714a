"""Full attention, attention without positions and the second MLP: on layouts against one process, and counted."""

from dataclasses import replace

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.mixers.counts import Attention, KernelNames, Share
from sambalm.model.ops.implementations import AttentionCall
from sambalm.model.registry import mixer
from sambalm.parallel.shard import Position
from tests.support.layout_runs import LENGTH, assert_like_one_process, largest_difference, run_values, steps_call
from tests.support.mixers import assert_resumes_on
from tests.support.whole_runs import changed
from tests.support.worlds import SharedWorlds

MIXED = {"pattern": "=F-M*F", "mixers": {"mlp2": {"size": 23}}}
NO_POSITIONS = {"pattern": "F-*", "rope_base": None}
TP2, PP2, CP2 = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}

TORCH = KernelNames(scan="torch", conv="torch", attention="torch", norm="torch", elementwise="torch", device="cpu")
SHARE = Share(
    tensor_ranks=1,
    sequence_parallel=False,
    context_ranks=1,
    sequences=1,
    sequence_tokens=LENGTH,
    activation_bytes=4,
    recompute="none",
    kernels=TORCH,
)


ALONE = {
    "mixed": steps_call(MIXED, {}, ranks=1),
    "documents": steps_call(MIXED, {}, ranks=1, documents=True),
    "no positions": steps_call(NO_POSITIONS, {}, ranks=1),
}
LAYOUTS = {
    "mixed": [steps_call(MIXED, parallel, ranks=2) for parallel in (TP2, PP2)],
    "documents": [
        steps_call(MIXED, parallel, ranks=ranks, documents=True) for ranks, parallel in ((2, CP2), (4, {"context": 4}))
    ],
    "no positions": [steps_call(NO_POSITIONS, parallel, ranks=2) for parallel in (TP2, CP2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_process(name):
    for call in LAYOUTS[name]:
        assert_like_one_process(WORLDS[call], WORLDS[ALONE[name]][0], gradients=1e-4, norms=1e-4)


def a_part_does_not_see_those_before(monkeypatch):
    from sambalm.parallel.layers.context_parallel import HaloExchange

    wait = HaloExchange.wait
    monkeypatch.setattr(HaloExchange, "wait", lambda exchange: wait(exchange) * 0)


WRONG = steps_call(NO_POSITIONS, CP2, ranks=2, mistake=a_part_does_not_see_those_before, steps=1)


@pytest.mark.slow
def test_keys_of_other_ranks_matter():
    assert largest_difference(WORLDS[WRONG], WORLDS[ALONE["no positions"]][0]) > 0.03


FULL, WINDOW, SHORTER = (
    steps_call(model, {}, ranks=1, documents=True)
    for model in (
        {"pattern": "MF-"},
        {"pattern": "M*-", "window": LENGTH},
        {"pattern": "M*-", "window": LENGTH - 1},
    )
)


@pytest.mark.slow
def test_full_attention_is_a_window_over_the_whole_sequence():
    full, window, shorter = (WORLDS[call][0].losses for call in (FULL, WINDOW, SHORTER))
    assert full == window != shorter


def test_operations_and_calls_of_kernels_are_those_of_all_keys():
    config = ModelConfig(**run_values(model=MIXED)["model"])
    flops = flops_per_token(config, sequence_length=LENGTH)
    seen = sum(range(1, LENGTH + 1)) / LENGTH
    assert flops.mixing["full_attention"] == pytest.approx(2 * 3 * 4 * 48 * seen)
    assert flops.mixing["mlp2"] == 0
    calls = mixer("F").kernel_needs(config, sequences=1, part_tokens=8, tp=Position(1), cp=Position(4, rank=2))
    assert calls == {"attention_calls": (AttentionCall(1, 12, 2, queries=8, keys=24, head_dim=4, window=32),)}
    share = replace(SHARE, context_ranks=4)
    (attention,) = (kernel for kernel in mixer("F").kernels(config, share) if isinstance(kernel, Attention))
    assert attention.flops == 3 * 4 * 48 * sum(range(25, 33)), "the last of four parts sees the most keys"
    (attention,) = (kernel for kernel in mixer("F").kernels(config, SHARE) if isinstance(kernel, Attention))
    assert attention.flops == LENGTH * flops.mixing["full_attention"] / 2, "of one layer of two"
    without = mixer("F").shared_inputs(config.model_copy(update={"rope_base": None}), torch.arange(3)[:, None])
    assert without is None


@pytest.mark.slow
def test_a_run_resumes_on_another_layout(request, tmp_path):
    values = changed(request.getfixturevalue("run_values"), model=MIXED)
    assert_resumes_on(TP2, values, tmp_path / "stopped")


WORLDS = SharedWorlds(
    *ALONE.values(), *(call for calls in LAYOUTS.values() for call in calls), WRONG, FULL, WINDOW, SHORTER
)
