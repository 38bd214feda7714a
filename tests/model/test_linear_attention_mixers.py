"""Gated linear attention and retention on layouts against one process, and counted."""

import math
from dataclasses import replace

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.parameters import count_parameters
from sambalm.model.registry import mixer
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices, initialize_parameters
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from tests.support.counted_ranks import CountedRanks
from tests.support.layout_runs import assert_like_one_process, largest_difference, run_values, steps_call
from tests.support.marks import slow_except
from tests.support.mixers import assert_counts_its_parameters
from tests.support.worlds import SharedWorlds

# Neither number of heads is even: two ranks hold three and two, and two and one.
# A document's first token has an output in proportion to q k, by which the norm divides: near zero rounding grows.
MODEL = {
    "pattern": "AR-",
    "norm_eps": 1e-2,
    "mixers": {"gla": {"num_heads": 5, "head_dim": 8}, "retnet": {"num_heads": 3, "head_dim": 8, "rope_base": 100.0}},
}
TP2, CP4 = {"tensor": 2, "sequence": True}, {"context": 4}
ALONE = {documents: steps_call(MODEL, {}, ranks=1, documents=documents) for documents in (False, True)}
LAYOUTS = {
    "TP2+SP, documents": steps_call(MODEL, TP2, ranks=2, documents=True),
    "PP2": steps_call(MODEL, {"pipeline": 2}, ranks=2),
    "CP2": steps_call(MODEL, {"context": 2}, ranks=2),
    "CP4": steps_call(MODEL, CP4, ranks=4),
    "CP4, documents": steps_call(MODEL, CP4, ranks=4, documents=True),
}
QUICK = ["TP2+SP, documents", "CP4, documents"]


@pytest.mark.parametrize("name", slow_except([], LAYOUTS, long=[name for name in LAYOUTS if name not in QUICK]))
def test_every_layout_trains_like_one_process(name):
    expected = WORLDS[ALONE["documents" in name]][0]
    assert_like_one_process(WORLDS[LAYOUTS[name]], expected, gradients=1e-4, norms=1e-4)


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


MISTAKES = {
    mistake: steps_call(MODEL, parallel, ranks=ranks, mistake=mistake, steps=1)
    for mistake, parallel, ranks in (
        (a_state_keeps_all_over_a_part, CP4, 4),
        (every_rank_has_the_first_heads_decays, TP2, 2),
        (every_rank_adds_to_the_way_down_alone, TP2, 2),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake):
    assert largest_difference(WORLDS[MISTAKES[mistake]], WORLDS[ALONE[False]][0]) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_they_count_the_parameters_that_their_layers_have(ranks):
    for letter in "AR":
        assert_counts_its_parameters(letter, ModelConfig(**run_values(model=MODEL)["model"]), ranks=ranks)


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


COUNTED = CountedRanks(pattern="AR", mixers=MODEL["mixers"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_ranks_send_and_keep_is_what_is_counted(ranks):
    COUNTED.check(ranks, worlds=WORLDS)


def test_their_own_mistakes_are_refused_in_a_sentence():
    for sizes, parallel, words in (
        ({"num_heads": 0}, {}, r"model\.mixers\.retnet\.num_heads"),
        ({"head_dim": 3}, {}, r"model\.mixers\.retnet\.head_dim is 3"),
        ({"num_heads": 1}, {"tensor": 2}, r"num_heads is 1, less than parallel\.tensor 2"),
    ):
        values = run_values(model={"pattern": "R", "mixers": {"retnet": sizes}}, parallel=parallel)
        with pytest.raises(ConfigError, match=words):
            parse_config(values, source="test")


WORLDS = SharedWorlds(
    *ALONE.values(),
    *(LAYOUTS[name] for name in QUICK),
    *MISTAKES.values(),
    *COUNTED.calls,
)
