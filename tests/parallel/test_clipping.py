"""Gradients that are not finite: every rank skips that step, and no other, whoever found them."""

import math

import pytest
import torch

from tests.support.layout_runs import batches, run_values
from tests.support.worlds import run_world

STEPS = 5
BAD = {2: torch.nan, 3: torch.inf}  # what a gradient is filled with, by step


def on_rank(values: dict, bad_rank: int) -> tuple[list[float], list[bool], list[float]]:
    """Each step's norm, whether it changed the weights, and the steps that the optimizer has counted."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import gradient_norm, whole_parameter
    from sambalm.parallel.zero.parameter_info import info_of
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        training = build_training(config, world=world, checkpoint=None)
        norms, changed, weights = [], [], None
        for step in range(STEPS):
            parameter = next(p for p in training.chunks[0].parameters() if info_of(p).owned and p.dim() == 1)
            if bad := step in BAD and world.rank == bad_rank:
                hook = parameter.register_hook(lambda gradient, step=step: torch.full_like(gradient, BAD[step]))
            training.executor.train_step(batches(step, config=config, world=world))
            if bad:
                hook.remove()
            norms.append(float(gradient_norm(training.engine)))
            before = weights
            weights = torch.cat([whole_parameter(p).flatten() for part in training.chunks for p in part.parameters()])
            assert weights.isfinite().all()
            changed.append(before is None or not torch.equal(weights, before))
        optimizer = getattr(training.engine.optimizer, "optimizer", training.engine.optimizer)
        counted = {state["step"].item() for state in optimizer.state.values()}
    return norms, changed, sorted(counted)


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
def test_a_step_with_gradients_that_are_not_finite_is_skipped(ranks, parallel):
    for norms, changed, counted in run_world(on_rank, run_values(parallel=parallel), ranks - 1, ranks=ranks):
        assert [math.isfinite(norm) for norm in norms] == [step not in BAD for step in range(STEPS)]
        assert changed == [step not in BAD for step in range(STEPS)]
        if parallel.get("zero_stage", 1) == 1:  # the others leave it to DeepSpeed, whose norm is inf for both
            assert [norm for norm in norms if not math.isfinite(norm)] == pytest.approx([*BAD.values()], nan_ok=True)
            assert counted == [STEPS]
