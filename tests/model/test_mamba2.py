"""Mamba-2: on layouts against one process, counted, planned, resumed, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.mixers.mamba2 import layer as layers
from sambalm.model.ops import external
from sambalm.model.ops.implementations import KernelRequirements
from sambalm.model.ops.reference.causal_conv import causal_conv_silu
from sambalm.model.ops.reference.ssd_scan import ssd_scan
from sambalm.model.ops.registry import why_unavailable
from sambalm.model.parameters import count_parameters
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices, initialize_parameters
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import DEVICES
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU, planned_kernels
from sambalm.pretrain.planner.memory import stage_memories
from sambalm.pretrain.planner.search import find_plans, plan_of
from tests.support.counted_ranks import counted_activations, handed_on_rank, kept_on_rank
from tests.support.layout_runs import assert_like_one_process, largest_difference, run_values, steps_call
from tests.support.marks import slow_except
from tests.support.mixers import (
    assert_counts_its_parameters,
    assert_keeps_what_it_says,
    assert_resumes_on,
    assert_sends_what_it_says,
)
from tests.support.planned_runs import config_of
from tests.support.whole_runs import changed
from tests.support.worlds import SharedWorlds, run_world

CONFIGS = Path(__file__).parents[2] / "configs" / "successors"
SIZES = {"d_state": 5, "head_dim": 4, "groups": 3}  # 24 heads in 3 groups: uneven over two ranks
MODEL = {"pattern": "S-*S", "mixers": {"mamba2": SIZES}}
SP2, CP2 = {"tensor": 2, "sequence": True}, {"context": 2}
HANDED = [(2, SP2), (2, CP2), (2, SP2 | {"recompute": "full"}), (2, CP2 | {"recompute": "full"}), (4, SP2 | CP2)]
KERNELS = replace(TORCH_ON_CPU, ssd="torch")
LAYOUTS = {
    "TP2+SP": (2, SP2),
    "CP2": (2, {"context": 2}),
    "PP2": (2, {"pipeline": 2}),
    "CP4, selective": (4, {"context": 4, "recompute": "selective"}),
    "TP3, full": (3, {"tensor": 3, "recompute": "full"}),
    "CP2xTP2+SP": (4, SP2 | {"context": 2}),
}


# Three ranks need three kv heads.
KV_HEADS = {name: 3 if ranks == 3 else 2 for name, (ranks, _) in LAYOUTS.items()}
QUICK = [("TP2+SP", True), ("CP2", True), ("CP2", False), ("PP2", False)]
CASES = {
    (name, documents): steps_call(MODEL | {"num_kv_heads": KV_HEADS[name]}, parallel, ranks=ranks, documents=documents)
    for name, (ranks, parallel) in LAYOUTS.items()
    for documents in (False, True)
}
ALONE = {
    (kv_heads, documents): steps_call(MODEL | {"num_kv_heads": kv_heads}, {}, ranks=1, documents=documents)
    for kv_heads in (2, 3)
    for documents in (False, True)
}


@pytest.mark.parametrize(
    ("name", "documents"), slow_except([], CASES, long=[case for case in CASES if case not in QUICK])
)
def test_a_layout_trains_like_one_process(name, documents):
    expected = WORLDS[ALONE[KV_HEADS[name], documents]][0]
    assert_like_one_process(WORLDS[CASES[name, documents]], expected, gradients=1e-5, norms=1e-5)


def states_between_ranks_are_dropped(monkeypatch):
    monkeypatch.setattr(layers, "scan_of_parts", lambda scan, **_: scan()[0])


def a_document_that_begins_in_a_part_lets_the_state_through(monkeypatch):
    decay = layers.decay_over
    monkeypatch.setattr(layers, "decay_over", lambda dt, A, bias, resets: decay(dt, A, bias, None))


def the_norm_spans_the_ranks_groups(monkeypatch):
    forward = layers.GatedNorm.forward

    def as_one_group(self, y, gate):
        self.groups = 1
        return forward(self, y, gate)

    monkeypatch.setattr(layers.GatedNorm, "forward", as_one_group)


MISTAKES = {
    mistake: (steps_call(MODEL, parallel, ranks=ranks, documents=documents, mistake=mistake, steps=1), documents)
    for mistake, parallel, ranks, documents in (
        (states_between_ranks_are_dropped, {"context": 2}, 2, False),
        (a_document_that_begins_in_a_part_lets_the_state_through, {"context": 4}, 4, True),
        (the_norm_spans_the_ranks_groups, {"tensor": 2}, 2, False),
    )
}
WORLDS = SharedWorlds(
    *(CASES[case] for case in QUICK),
    *(ALONE[2, documents] for documents in (False, True)),
    *(call for call, _ in MISTAKES.values()),
)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake):
    call, documents = MISTAKES[mistake]
    assert largest_difference(WORLDS[call], WORLDS[ALONE[2, documents]][0]) > 1e-3


def test_what_is_left_of_a_state_is_what_the_scan_leaves():
    """With and without a document that begins within the part: in the first row at its start, nowhere in the second."""
    generator = torch.Generator().manual_seed(0)
    x, dt, B, C, A, D, bias, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 9, 4, 3), (2, 9, 4), (2, 9, 2, 5), (2, 9, 2, 5), (4,), (4,), (4,), (2, 4, 3, 5))
    )
    A, bias = -A.exp() / 10, bias - 1  # so that much is left
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 0] = True
    for given in (None, resets, resets.roll(4, dims=1)):
        ends = [
            ssd_scan(x, dt, A, B, C, D=D, dt_bias=bias, initial_state=start, resets=given)[1]
            for start in (state, torch.zeros_like(state))
        ]
        left = layers.decay_over(dt, A, bias, given)
        torch.testing.assert_close(left * state, ends[0] - ends[1])
        assert left[1].max() > 0.1


@pytest.mark.parametrize(("channels", "features"), [(24, 27), (24, 32), (20, 41)])
def test_causal_conv1d_is_given_rows_that_it_takes(channels, features, monkeypatch):
    """An odd number of heads makes the projections' rows odd, which its kernel refuses."""

    def kernel(x, weight, bias, *, seq_idx, activation):
        assert x.shape[1] % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert x.stride(1) == 1
        return causal_conv_silu(x.transpose(1, 2), weight, bias).transpose(1, 2)

    monkeypatch.setattr(external, "_imported", lambda *_: kernel)
    x = torch.randn(2, 9, features)[..., 1 : 1 + channels]
    weight, bias = torch.randn(channels, 4), torch.randn(channels)
    torch.testing.assert_close(external.causal_conv1d_silu(x, weight, bias), causal_conv_silu(x, weight, bias))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_counts_the_parameters_that_its_layer_has(ranks):
    assert_counts_its_parameters("S", ModelConfig(**run_values(model=MODEL)["model"]), ranks=ranks)


def test_it_is_counted():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    counts, inner, states, heads = count_parameters(config), 96, 15, 24
    projections = 48 * (2 * inner + 2 * states + heads) + 48 * inner
    assert counts["mamba2"] == 2 * (projections + 5 * (inner + 2 * states) + 3 * heads + inner)
    assert counts["total"] == sum(parameter.numel() for parameter in Samba(config).parameters())
    assert flops_per_token(config, sequence_length=32).mixing["mamba2"] == 2 * 3 * 5 * inner * 5


def test_samba_421m_with_it():
    config = load_config(CONFIGS / "samba_mamba2_421m.yaml").model
    width, inner, states, heads = 1536, 3072, 2 * 128, 48
    mamba2 = width * (2 * inner + 2 * states + heads) + inner * width + 5 * (inner + 2 * states) + 3 * heads + inner
    attention, mlp, norms = 4 * width**2, 3 * width * 4096, 25 * width
    parameters = 6 * (mamba2 + attention) + 12 * mlp + norms + 32000 * width
    assert (config.pattern, count_parameters(config)["total"]) == ("S-*-" * 6, parameters)
    assert parameters == 422_528_352


def test_its_initial_weights():
    model = Samba(ModelConfig(**run_values(model=MODEL)["model"]))
    initialize_parameters(model, seed=0)
    held = {name: piece.of_local(value).detach() for name, value, piece in canonical_slices(model)}
    rates = held["layers.0.mixer.A_log"].exp()
    assert 1 <= rates.min() < 4 < 12 < rates.max() <= 16
    step = torch.nn.functional.softplus(held["layers.0.mixer.dt_bias"])
    assert 1e-3 * 0.999 <= step.min() < 4e-3 < 3e-2 < step.max() <= 0.1 * 1.001
    assert set(held) >= {f"layers.0.mixer.{kind}.weight" for kind in ("in_proj.dt", "conv.B", "norm", "out_proj")}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_keeps_what_it_says(precision, recompute):
    config = kept_config({"recompute": recompute}, precision)
    kept, peak = counted_activations(config)
    memory, *_ = stage_memories(config, world_size=1, kernels=KERNELS)
    saved = memory.rounded_bytes + memory.saved_bytes
    assert saved == pytest.approx(kept, rel=0.01)
    assert saved + memory.workspace_bytes == pytest.approx(peak, rel=0.1)


def kept_config(parallel: dict, precision: str):
    mixers = {"mamba2": {"d_state": 16, "head_dim": 16, "groups": 2}}
    return config_of(parallel=parallel, train={"precision": precision}, pattern="SS", vocab_size=64, mixers=mixers)


@pytest.mark.parametrize("recompute", slow_except(["none"], ["none", "selective"], long=["selective"]))
@pytest.mark.parametrize("parallel", [SP2, {"context": 4}], ids=str)
def test_a_rank_keeps_what_it_says(parallel, recompute):
    config, ranks = kept_config(parallel | {"recompute": recompute}, "bf16"), max(parallel.values())
    kept = run_world(kept_on_rank, config.model_dump(), ranks=ranks)
    assert_keeps_what_it_says(config, kept, kernels=KERNELS, tolerance=0.03)


@pytest.mark.parametrize(("ranks", "parallel"), slow_except(HANDED[:2], HANDED, long=HANDED[2:]), ids=str)
def test_it_sends_what_it_says(ranks, parallel):
    config = config_of(parallel=parallel, pattern="S", mixers={"mamba2": {"d_state": 16, "head_dim": 16, "groups": 2}})
    assert_sends_what_it_says(config, run_world(handed_on_rank, config.model_dump(), ranks=ranks))


def test_it_is_planned():
    values = changed(run_values(model=MODEL), data={"sequence_length": 64}, train={"global_batch_tokens": 256})
    config = parse_config(values, source="test")
    more = changed(values, model={"mixers": {"mamba2": SIZES | {"expand": 4}}})
    times = [
        plan_of(one, world_size=1, hardware=DEVICES["h100"]).time.compute_s
        for one in (config, parse_config(more, source="test"))
    ]
    assert times[0] < times[1]
    plans = find_plans(config, world_size=4, memory_gib=1, hardware=DEVICES["h100"])
    assert {1, 2} <= {plan.config.parallel.tensor for plan in plans}
    assert 4 not in {plan.config.parallel.tensor for plan in plans}  # of three groups


@pytest.mark.long
def test_it_is_saved_and_resumed_on_another_layout(request, tmp_path):
    model = MODEL | {"mixers": {"mamba2": SIZES | {"groups": 2}}}
    assert_resumes_on(SP2, changed(request.getfixturevalue("run_values"), model=model), tmp_path / "stopped")


@pytest.mark.parametrize(
    ("sizes", "parallel", "words"),
    [
        ({"groups": 5}, {}, r"model\.hidden_size is 96, which is no multiple of head_dim 4 x groups 5"),
        ({}, {"tensor": 4}, r"model\.mixers\.mamba2\.groups is 3, less than parallel\.tensor 4"),
        ({"dt_min": 1.0}, {}, r"dt_min is 1\.0, above dt_max 0\.1"),
        ({"state": 4}, {}, r"unknown key model\.mixers\.mamba2\.state"),
    ],
)
def test_its_mistakes_are_refused_in_a_sentence(sizes, parallel, words):
    model = MODEL | {"mixers": {"mamba2": SIZES | sizes}, "num_kv_heads": 4}
    with pytest.raises(ConfigError, match=words):
        parse_config(run_values(model=model, parallel=parallel), source="test")


def test_a_run_names_its_scan_only_where_a_layer_has_it():
    with_it = parse_config(run_values(model=MODEL), source="test")
    without = parse_config(run_values(), source="test")
    assert planned_kernels(with_it).ssd == "torch"
    assert str(planned_kernels(with_it)).endswith("ssd=torch")
    assert planned_kernels(without).ssd is None
    assert "ssd" not in str(planned_kernels(without))
    for operations, words in (((), "no layer of model.pattern computes it"), (("ssd",), "it needs a CUDA device")):
        requirements = KernelRequirements("cpu", "bf16", operations=operations)
        assert words in why_unavailable("ssd", "mamba-ssm", requirements)
        assert why_unavailable("ssd", "torch", requirements) is None
