"""Steps that the host hands over without reading what a device computes: it would wait, and then the device for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.layout_runs import batches, run_values
from tests.support.worlds import run_world

STEPS = 2


class HostReads(TorchDispatchMode):
    """Counts numbers that the host takes out of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def reads_on_rank(values: dict) -> int:
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import gradient_norm
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        training = build_training(config, world=world, checkpoint=None)
        with HostReads() as reads:
            for step in range(STEPS):
                training.executor.train_step(batches(step, config=config, world=world))
                gradient_norm(training.engine)
    return reads.count


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"context": 2}),
        (2, {"pipeline": 2}),
    ],
    ids=str,
)
def test_a_step_reads_nothing_on_the_host(ranks, parallel):
    assert run_world(reads_on_rank, run_values(parallel=parallel), ranks=ranks) == [0] * ranks


def test_reads_are_counted():
    with HostReads() as reads:
        float(torch.ones(2).sum())
    assert reads.count == 1
