"""Gated linear attention and retention on layouts against one process, and counted."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.parameters import count_parameters
from sambalm.model.registry import mixer
from sambalm.model.samba import Samba, Sublayer
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.sharding import canonical_slices, initialize_parameters
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.check_layout import whole
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.communication import step_transfers
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU
from sambalm.pretrain.planner.memory import stage_memories
from tests.pretrain.test_plan import handed_on_rank, kept_on_rank
from tests.support.layout_runs import STEPS, differences, run_values, steps_on_rank
from tests.support.planned_runs import config_of
from tests.support.worlds import run_world

# Neither number of heads is even: two ranks hold three and two, and two and one.
# A document's first token has an output in proportion to q k, by which the norm divides: near zero rounding grows.
MODEL = {
    "pattern": "AR-",
    "norm_eps": 1e-2,
    "mixers": {"gla": {"num_heads": 5, "head_dim": 8}, "retnet": {"num_heads": 3, "head_dim": 8, "rope_base": 100.0}},
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
    [
        (TP2, 2, True),
        pytest.param(PP2, 2, False, marks=pytest.mark.long),
        pytest.param(CP2, 2, False, marks=pytest.mark.long),
        pytest.param(CP4, 4, False, marks=pytest.mark.long),
        (CP4, 4, True),
    ],
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


def a_state_keeps_all_over_a_part(monkeypatch):
    from sambalm.model.mixers.linear_attention import layer

    monkeypatch.setattr(layer, "decay_over", lambda left, resets: left.exp().unsqueeze(-1) * 0 + 1)


def every_rank_has_the_first_heads_decays(monkeypatch):
    from sambalm.model.mixers.linear_attention import layer

    def forward(self, x, context):
        cos, sin, log_decays = context.shared[self.letter]
        shared = {**context.shared, self.letter: (cos, sin, log_decays.roll(self.share.heads.start))}
        return right(self, x, replace(context, shared=shared))

    right = layer.RetentionLayer.forward
    monkeypatch.setattr(layer.RetentionLayer, "forward", forward)


def every_rank_adds_to_the_way_down_alone(monkeypatch):
    from sambalm.model.mixers.linear_attention import layer

    monkeypatch.setattr(layer, "copy_to_region", lambda tensor, tp: tensor)


@pytest.mark.parametrize(
    ("mistake", "parallel", "ranks"),
    [
        (a_state_keeps_all_over_a_part, CP4, 4),
        (every_rank_has_the_first_heads_decays, TP2, 2),
        (every_rank_adds_to_the_way_down_alone, TP2, 2),
    ],
)
def test_mistakes_are_seen(mistake, parallel, ranks, one_process):
    results = steps(parallel, ranks=ranks, documents=False, mistake=mistake)
    worst = differences([result.gradients for result in results], whole(one_process[False].gradients))
    assert max(worst.values()) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_they_count_the_parameters_that_their_layers_have(ranks):
    config = ModelConfig(**run_values(model=MODEL)["model"])
    for one in (mixer("A"), mixer("R")):
        with torch.device("meta"):
            layer = Sublayer(one.letter, config, tp=TensorParallel(rank=0, size=ranks), kernels=TORCH_KERNELS)
        counts, held = one.parameters(config, tensor_ranks=ranks), dict(layer.mixer.named_parameters())
        assert {each.name: each.shape for each in counts} == {name: tuple(t.shape) for name, t in held.items()}
        for each in counts:
            info = info_of(held[each.name])
            found = (info.matmul_only, info.takes_fp8, info.weight_decay)
            assert found == (each.matmul_only, each.takes_fp8, each.decays), each.name


def test_they_are_counted():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    counts = count_parameters(config)
    keys, values, width = 40, 80, 48
    assert counts["gla"] == width * (2 * keys + 3 * values) + 16 * (width + keys) + keys + 16
    keys, values = 24, 48
    assert counts["retnet"] == width * (2 * keys + 3 * values) + 16
    canonical = {name: piece.shape for name, _, piece in canonical_slices(Samba(config))}
    assert counts["total"] == sum(math.prod(shape) for shape in canonical.values())
    mixing = flops_per_token(config, sequence_length=32).mixing
    assert mixing["gla"] == 3 * 5 * 5 * 8 * 16
    assert mixing["retnet"] == 3 * 5 * 3 * 8 * 16


def test_decays_begin_as_in_the_papers():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    model = Samba(config)
    initialize_parameters(model, seed=0)
    assert not model.layers["0"].mixer.in_proj.bias.any()
    *_, log_decays = mixer("R").shared_inputs(config, torch.arange(3).unsqueeze(1))
    torch.testing.assert_close(log_decays.exp(), torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]))


@pytest.mark.parametrize(("parallel", "ranks"), [(TP2, 2), ({"context": 4, "recompute": "full"}, 4)], ids=str)
def test_what_ranks_send_and_keep_is_what_is_counted(parallel, ranks):
    config = config_of(parallel=parallel, pattern="AR", mixers=MODEL["mixers"], hidden_size=48)
    counted = Counter()
    for _, handed in run_world(handed_on_rank, config.model_dump(), ranks=ranks):
        counted |= handed
    expected = Counter()
    for transfer in step_transfers(config, stage=0, world_size=ranks):
        expected[transfer.operation] += transfer.handed_bytes
    assert expected == pytest.approx(counted, rel=0.01)
    config = config_of(
        parallel=parallel | {"recompute": "none"}, pattern="AR", mixers=MODEL["mixers"], hidden_size=48, vocab_size=64
    )
    kept = max(run_world(kept_on_rank, config.model_dump(), ranks=ranks))
    memory, *_ = stage_memories(config, world_size=ranks, kernels=TORCH_ON_CPU)
    gathered = memory.communication_bytes % (4 * 500_000_000)
    assert memory.rounded_bytes + memory.saved_bytes + gathered == pytest.approx(kept, rel=0.05)


def test_their_own_mistakes_are_refused_in_a_sentence():
    for sizes, parallel, words in (
        ({"num_heads": 0}, {}, r"model\.mixers\.retnet\.num_heads"),
        ({"head_dim": 3}, {}, r"model\.mixers\.retnet\.head_dim is 3"),
        ({"num_heads": 1}, {"tensor": 2}, r"num_heads is 1, less than parallel\.tensor 2"),
    ):
        values = run_values(model={"pattern": "R", "mixers": {"retnet": sizes}}, parallel=parallel)
        with pytest.raises(ConfigError, match=words):
            parse_config(values, source="test")
