"""Gated DeltaNet and Kimi Delta Attention on layouts against one process, counted, saved and resumed."""

import math
from pathlib import Path

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.parameters import count_parameters
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices, initialize_parameters
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.kernels import planned_kernels
from tests.support.counted_ranks import CountedRanks
from tests.support.layout_runs import assert_like_one_process, largest_difference, run_values, steps_call
from tests.support.marks import slow_except
from tests.support.mixers import (
    assert_counts_its_parameters,
    assert_resumes_on,
)
from tests.support.whole_runs import changed
from tests.support.worlds import SharedWorlds

# Neither number of heads is even: two ranks hold three and two, and two and one.
MODEL = {
    "pattern": "GK-",
    "mixers": {
        "gated_deltanet": {"num_heads": 5, "head_dim": 4, "expand_v": 2},
        "kimi_delta": {"num_heads": 3, "head_dim": 8},
    },
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
QUICK = [name for name in LAYOUTS if name != "CP4"]


@pytest.mark.parametrize("name", slow_except([], LAYOUTS, long=["CP4"]))
def test_every_layout_trains_like_one_process(name):
    expected = WORLDS[ALONE["documents" in name]][0]
    assert_like_one_process(WORLDS[LAYOUTS[name]], expected, gradients=1e-4, norms=1e-4)


def a_part_begins_with_the_state_that_one_rank_reached_from_zero(monkeypatch):
    from sambalm.model.mixers.delta import layer

    passed = layer.incoming_matrix_state
    monkeypatch.setattr(layer, "incoming_matrix_state", lambda decay, state, cp: passed(decay * 0, state, cp=cp))


def every_rank_adds_to_the_norms_weights_alone(monkeypatch):
    from sambalm.model import norm

    monkeypatch.setattr(norm, "copy_to_region", lambda tensor, tp: tensor)


MISTAKES = {
    mistake: steps_call(MODEL, parallel, ranks=ranks, mistake=mistake, steps=1)
    for mistake, parallel, ranks in (
        (a_part_begins_with_the_state_that_one_rank_reached_from_zero, CP4, 4),
        (every_rank_adds_to_the_norms_weights_alone, TP2, 2),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake):
    assert largest_difference(WORLDS[MISTAKES[mistake]], WORLDS[ALONE[False]][0]) > 0.03


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_they_count_the_parameters_that_their_layers_have(ranks):
    for letter in "GK":
        assert_counts_its_parameters(letter, ModelConfig(**run_values(model=MODEL)["model"]), ranks=ranks)


def test_their_initial_decays():
    heads = {"num_heads": 64, "head_dim": 2}
    config = ModelConfig(
        **run_values(model=MODEL | {"mixers": {"gated_deltanet": heads, "kimi_delta": heads}})["model"]
    )
    model = Samba(config)
    initialize_parameters(model, seed=0)
    held = dict(model.named_parameters())
    for number, lowest in ((0, 1e-4), (1, 1.0)):  # Gated DeltaNet's, Kimi's
        rates, steps = held[f"layers.{number}.mixer.A_log"].exp(), held[f"layers.{number}.mixer.dt_bias"]
        assert lowest <= rates.min() < lowest + 1
        assert 15 < rates.max() <= 16
        steps = torch.nn.functional.softplus(steps)
        assert 0.99e-3 <= steps.min() < 2e-3
        assert 0.08 < steps.max() <= 0.101


def test_they_are_counted():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    counts = count_parameters(config)
    keys, values, width = 20, 40, 48
    gated = width * (2 * keys + 3 * values + 2 * 5) + 4 * (2 * keys + values) + 2 * 5 + 8
    assert counts["gated_deltanet"] == gated
    keys = values = 24
    kimi = width * (2 * keys + 2 * values + 3 + 2 * 8) + 8 * (keys + values) + 4 * 3 * keys + 3 + keys + 8
    assert counts["kimi_delta"] == kimi
    canonical = {name: piece.shape for name, _, piece in canonical_slices(Samba(config))}
    assert counts["total"] == sum(math.prod(shape) for shape in canonical.values())
    mixing = flops_per_token(config, sequence_length=32).mixing
    assert mixing["gated_deltanet"] == 3 * 7 * 5 * 4 * 8
    assert mixing["kimi_delta"] == 3 * 7 * 3 * 8 * 8


COUNTED = CountedRanks(pattern="GK", mixers=MODEL["mixers"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_ranks_send_and_keep_is_what_is_counted(ranks):
    COUNTED.check(ranks, worlds=WORLDS)


def test_their_own_mistakes_are_refused_in_a_sentence():
    for sizes, parallel, words in (
        ({"num_heads": 0}, {}, r"model\.mixers\.gated_deltanet\.num_heads"),
        ({"dt_min": 1.0}, {}, "dt_min is 1.0, above dt_max 0.1"),
        ({"num_heads": 1}, {"tensor": 2}, r"num_heads is 1, less than parallel\.tensor 2"),
    ):
        values = run_values(model={"pattern": "G", "mixers": {"gated_deltanet": sizes}}, parallel=parallel)
        with pytest.raises(ConfigError, match=words):
            parse_config(values, source="test")


@pytest.mark.slow
def test_a_run_resumes_on_another_layout(request, tmp_path):
    values = changed(request.getfixturevalue("run_values"), model=MODEL)
    assert_resumes_on(TP2, values, tmp_path / "stopped")


SUCCESSORS = Path(__file__).parents[2] / "configs" / "successors"


@pytest.mark.parametrize(
    ("name", "parameters"), [("gated_deltanet_421m", 421_057_644), ("kimi_delta_421m", 421_715_820)]
)
def test_configs_have_as_many_parameters_as_samba(name, parameters):
    config = load_config(SUCCESSORS / f"{name}.yaml")
    assert count_parameters(config.model)["total"] == parameters == pytest.approx(421_793_280, rel=2e-3)
    samba = load_config(SUCCESSORS.parent / "samba_421m.yaml")
    assert (config.train, config.data, config.optimizer) == (samba.train, samba.data, samba.optimizer)
    assert config.run.dir == f"runs/{name}"
    assert planned_kernels(config).delta_rule == "torch", "the others have to be installed"
    assert planned_kernels(samba).delta_rule is None


WORLDS = SharedWorlds(
    *ALONE.values(),
    *(LAYOUTS[name] for name in QUICK),
    *MISTAKES.values(),
    *COUNTED.calls,
)
