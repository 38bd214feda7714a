"""Steps that are not finite or beyond a limit: every rank skips that step, and no other, whoever found them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sambalm.parallel.zero.clipping import Clipping
from sambalm.parallel.zero.step_guard import StepGuard
from tests.support.layout_runs import batches, run_values
from tests.support.worlds import run_world

STEPS = 7
BAD = {2: torch.nan, 3: torch.inf}  # what a gradient is filled with, by step
BEYOND = {1: {"norm": 1e-6}, 5: {"loss": 1e-6}}  # the limits of a step that has more
SKIPPED = [*BEYOND, *BAD]


def on_rank(values: dict, bad_rank: int) -> tuple[list[float], list[bool], list[bool], list[float]]:
    """Each step's norm, the guard's verdict, whether weights changed, and the steps that the optimizer has counted."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import gradient_norm, whole_parameter
    from sambalm.parallel.zero.parameter_info import info_of
    from sambalm.parallel.zero.step_guard import NO_LIMIT
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        training = build_training(config, world=world, checkpoint=None)
        norms, skipped, changed, weights = [], [], [], None
        for step in range(STEPS):
            parameter = next(p for p in training.chunks[0].parameters() if info_of(p).owned and p.dim() == 1)
            if bad := step in BAD and world.rank == bad_rank:
                hook = parameter.register_hook(lambda gradient, step=step: torch.full_like(gradient, BAD[step]))
            training.executor.guard.set_limits(**{"loss": NO_LIMIT, "norm": NO_LIMIT} | BEYOND.get(step, {}))
            training.executor.train_step(batches(step, config=config, world=world))
            if bad:
                hook.remove()
            norm = gradient_norm(training.engine)
            norms.append(float(norm))
            skipped.append(bool(training.executor.guard.skips(norm)))
            before = weights
            weights = torch.cat([whole_parameter(p).flatten() for part in training.chunks for p in part.parameters()])
            assert weights.isfinite().all()
            changed.append(before is None or not torch.equal(weights, before))
        optimizer = getattr(training.engine.optimizer, "optimizer", training.engine.optimizer)
        counted = {state["step"].item() for state in optimizer.state.values()}
    return norms, skipped, changed, sorted(counted)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (4, {"tensor": 2, "zero_stage": 1}),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_or_beyond_a_limit_is_skipped(ranks, parallel):
    for norms, skipped, changed, counted in run_world(on_rank, run_values(parallel=parallel), ranks - 1, ranks=ranks):
        assert [math.isfinite(norm) for norm in norms] == [step not in BAD for step in range(STEPS)]
        assert skipped == [step in SKIPPED for step in range(STEPS)]
        assert changed == [step not in SKIPPED for step in range(STEPS)]
        assert [norm for norm in norms if not math.isfinite(norm)] == pytest.approx([*BAD.values()], nan_ok=True)
        assert counted == [STEPS]


@pytest.mark.parametrize(("gradients", "norm", "divisor"), [([0.6, 0.8], 1.0, 1.0), ([3.0, 4.0], 5.0, 2.5)])
def test_gradients_are_shortened_and_never_made_longer(gradients, norm, divisor):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer: Any = torch.optim.AdamW([weight])
    guard: Any = SimpleNamespace(skips=lambda norm: norm * 0)
    clipping = Clipping(optimizer, max_norm=2.0, groups=[], guard=guard)
    parts = [torch.tensor([number]) for number in gradients]
    assert clipping.prepare(parts).item() == pytest.approx(norm)
    assert optimizer.grad_scale.item() == pytest.approx(divisor, rel=1e-5)
    assert optimizer.found_inf.item() == 0


def test_a_guard_judges_the_mean_over_the_ranks():
    """Of their losses; what is called before the update sees it, in the order in which it was added."""
    world: Any = SimpleNamespace(device=torch.device("cpu"), replica_size=2, sum_over_replicas=lambda loss: loss + 3.0)
    guard, seen = StepGuard(world), []
    guard.before_update += [
        lambda: seen.append(("a", guard.loss.item())),
        lambda: seen.append(("b", guard.loss.item())),
    ]
    guard.after_backward(torch.tensor(1.0))
    assert seen == [("a", 2.0), ("b", 2.0)]
    for limits, skips in (
        ({"loss": 2.0, "norm": 1.0}, 0),
        ({"loss": 1.9, "norm": 9.0}, 1),
        ({"loss": 9.0, "norm": 0.9}, 1),
    ):
        guard.set_limits(**limits)
        assert guard.skips(torch.tensor(1.0)).item() == skips
