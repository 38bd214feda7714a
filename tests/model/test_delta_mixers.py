"""Gated DeltaNet and Kimi Delta Attention on layouts against one process, counted, saved and resumed."""

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.parameters import count_parameters
from sambalm.model.samba import Samba, Sublayer
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.check_layout import whole
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from tests.support.layout_runs import STEPS, differences, run_values, steps_on_rank
from tests.support.whole_runs import changed, stopped_after, train
from tests.support.worlds import run_world

# Neither number of heads is even: two ranks hold three and two, and two and one.
MODEL = {
    "pattern": "GK-",
    "mixers": {
        "gated_deltanet": {"num_heads": 5, "head_dim": 4, "expand_v": 2},
        "kimi_delta": {"num_heads": 3, "head_dim": 8},
    },
}
TP2, PP2, CP2, CP4 = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}, {"context": 4}


def steps(parallel: dict, *, ranks: int, documents: bool, mistake=None):
    values = run_values(model=MODEL, parallel=parallel, documents=documents)
    return run_world(steps_on_rank, values, STEPS, mistake, ranks=ranks)


@pytest.fixture(scope="module")
def one_process():
    return {documents: steps({}, ranks=1, documents=documents)[0] for documents in (False, True)}


@pytest.mark.parametrize(
    ("parallel", "ranks", "documents"),
    [(TP2, 2, True), (PP2, 2, False), (CP2, 2, False), (CP4, 4, False), (CP4, 4, True)],
    ids=["TP2+SP, documents", "PP2", "CP2", "CP4", "CP4, documents"],
)
def test_every_layout_trains_like_one_process(parallel, ranks, documents, one_process):
    expected = one_process[documents]
    results = steps(parallel, ranks=ranks, documents=documents)
    worst = differences([result.gradients for result in results], whole(expected.gradients))
    assert max(worst.values()) < 1e-4
    for result in results:
        assert result.losses == pytest.approx(expected.losses, rel=1e-5)
        assert result.norms == pytest.approx(expected.norms, rel=1e-4)
