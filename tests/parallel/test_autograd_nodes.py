"""What capturing a step as a CUDA graph asks of autograd, as far as a CPU shows it (tests/gpu captures)."""

import gc

import pytest

from tests.support.layout_runs import batches, run_values
from tests.support.worlds import run_world


def kept_nodes_on_rank(values: dict, keep: bool) -> list[str]:
    """Parameters whose autograd node outlives a step: it belongs to the stream on which it was made.

    Args:
        keep: whether to make such a node.
    """
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    def node(parameter):
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]

    config = parse_config(values, source="test")
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None, bucket_elements=1)  # with a hook for each layer
        training.executor.train_step(batches(0, config=config, world=world))
        parameters = dict(training.chunks[0].named_parameters())
        kept = [parameter.flatten() for parameter in parameters.values()] if keep else []
        for parameter in parameters.values():
            node(parameter).metadata["seen"] = True
        gc.collect()
        found = [name for name, parameter in parameters.items() if "seen" in node(parameter).metadata]
        del kept
    return found


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (2, {"zero_stage": 1}), (2, {"tensor": 2, "sequence": True}), (2, {"context": 2})]
)
def test_no_autograd_node_outlives_a_step(ranks, parallel):
    for found in run_world(kept_nodes_on_rank, run_values(parallel=parallel), False, ranks=ranks):
        assert found == []


def test_a_kept_node_is_seen():
    (found,) = run_world(kept_nodes_on_rank, run_values(), True, ranks=1)
    assert found
