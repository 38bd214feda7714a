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
from sambalm.pretrain.check_layout import whole
from tests.support.layout_runs import LENGTH, STEPS, differences, run_values, steps_on_rank
from tests.support.whole_runs import changed, stopped_after, train
from tests.support.worlds import run_world

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


def steps(model: dict, parallel: dict, *, ranks: int, documents: bool, mistake=None):
    values = run_values(model=model, parallel=parallel, documents=documents)
    return run_world(steps_on_rank, values, STEPS, mistake, ranks=ranks)


@pytest.mark.parametrize(
    ("model", "documents", "layouts"),
    [
        (MIXED, False, {2: [TP2, PP2]}),
        (MIXED, True, {2: [CP2], 4: [{"context": 4}]}),
        (NO_POSITIONS, False, {2: [TP2, CP2]}),
    ],
    ids=["mixed", "documents", "no positions"],
)
def test_every_layout_trains_like_one_process(model, documents, layouts):
    (alone,) = steps(model, {}, ranks=1, documents=documents)
    for ranks, parallel in ((ranks, parallel) for ranks, listed in layouts.items() for parallel in listed):
        results = steps(model, parallel, ranks=ranks, documents=documents)
        worst = differences([result.gradients for result in results], whole(alone.gradients))
        assert max(worst.values()) < 1e-4, parallel
        for result in results:
            assert result.losses == pytest.approx(alone.losses, rel=1e-5)
            assert result.norms == pytest.approx(alone.norms, rel=1e-4)


def a_part_does_not_see_those_before(monkeypatch):
    from sambalm.parallel.layers.context_parallel import HaloExchange

    wait = HaloExchange.wait
    monkeypatch.setattr(HaloExchange, "wait", lambda exchange: wait(exchange) * 0)


def test_keys_of_other_ranks_matter():
    (alone,) = steps(NO_POSITIONS, {}, ranks=1, documents=False)
    wrong = steps(NO_POSITIONS, CP2, ranks=2, documents=False, mistake=a_part_does_not_see_those_before)
    assert max(differences([one.gradients for one in wrong], whole(alone.gradients)).values()) > 0.03


def test_full_attention_is_a_window_over_the_whole_sequence():
    (full,) = steps({"pattern": "MF-"}, {}, ranks=1, documents=True)
    (window,) = steps({"pattern": "M*-", "window": LENGTH}, {}, ranks=1, documents=True)
    (shorter,) = steps({"pattern": "M*-", "window": LENGTH - 1}, {}, ranks=1, documents=True)
    assert full.losses == window.losses != shorter.losses


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


def test_a_run_resumes_on_another_layout(request, tmp_path):
    values = changed(request.getfixturevalue("run_values"), model=MIXED, train={"micro_batch_size": 1})
    whole_run = train(values)
    stopped = stopped_after(values, 3, tmp_path / "stopped")
    resumed = train(changed(stopped, parallel=TP2), ranks=2)
    for before, after in zip(whole_run, resumed, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
