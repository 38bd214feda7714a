"""Mega-S6: its formula token by token, layouts against one process, counts, plans, resuming, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.mixers.counts import Attention, Share
from sambalm.model.mixers.mega import layer as layers
from sambalm.model.mixers.mega.sizes import Piece, pieces_of
from sambalm.model.ops.documents import Documents
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.parameters import count_parameters
from sambalm.model.registry import mixer
from sambalm.model.samba import Samba
from sambalm.parallel.groups import ContextParallel, TensorParallel
from sambalm.parallel.shard import Position
from sambalm.parallel.sharding import canonical_slices, initialize_parameters
from sambalm.pretrain.check_layout import document_starts
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import DEVICES
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU
from sambalm.pretrain.planner.memory import stage_memories
from sambalm.pretrain.planner.search import find_plans, plan_of
from tests.pretrain.test_plan import counted_activations, handed_on_rank, kept_on_rank
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

SIZES = {"key_dim": 4, "chunk_tokens": 8, "d_state": 5}
MODEL = {"pattern": "Z-*Z", "mixers": {"mega": SIZES}}
ACROSS = MODEL | {"mixers": {"mega": SIZES | {"chunk_tokens": 6}}}  # chunks that lie across ranks' parts
WIDTH, KEY, CHUNK, STATES, LENGTH = 48, 4, 8, 5, 21


def rotated(vector: torch.Tensor, place: int) -> torch.Tensor:
    """Pairs of channels as complex numbers, each turned by its angle at a place."""
    turns = 10_000.0 ** (-torch.arange(KEY // 2, dtype=torch.float64) / (KEY // 2))
    return torch.complex(vector[: KEY // 2], vector[KEY // 2 :]) * torch.polar(torch.ones_like(turns), turns * place)


def token_by_token(w: dict[str, torch.Tensor], x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """What a layer adds to the stream [S, width] of one document, by the formulas of the reference code."""
    state, taps, outputs, keys, values = x.new_zeros(WIDTH, STATES), w["s6.conv.weight"], [], [], []
    padded = torch.cat((x.new_zeros(3, WIDTH), x))
    for t in range(len(x)):
        u = F.silu((taps * padded[t : t + 4].T).sum(1) + w["s6.conv.bias"])
        dt, B, C = (w["s6.x_proj.weight"] @ u).split([2, STATES, STATES])
        step = F.softplus(w["s6.dt_proj.weight"] @ dt + w["s6.dt_proj.bias"])
        state = torch.exp(-step[:, None] * w["s6.A_log"].exp()) * state + (step * u)[:, None] * B
        mixed = F.silu(state @ C + w["s6.D"] * u)
        update, reset, hidden, shared = (w["in_proj.weight"] @ mixed + w["in_proj.bias"]).split([WIDTH] * 3 + [KEY])
        z = F.silu(shared)
        q, k = (z * scale for scale in w["scale"].chunk(2))
        q = q + w["bias"]
        if t % CHUNK == 0:
            keys, values = [], []
        keys.append(k)
        values.append(F.silu(w["v_proj.weight"] @ x[t] + w["v_proj.bias"]))
        a, b = w["position"].chunk(2)
        first = t - t % CHUNK
        biases = [(rotated(a, t) * rotated(b, first + j).conj()).sum().real for j in range(len(keys))]
        scores = torch.stack([q @ key / math.sqrt(KEY) + bias for key, bias in zip(keys, biases, strict=True)])
        y = scores.softmax(0) @ torch.stack(values)
        candidate = F.silu(hidden + w["h_proj.weight"] @ (F.silu(reset) * y) + w["h_proj.bias"])
        gate = update.sigmoid()
        outputs.append(gate * candidate + (1 - gate) * stream[t] - stream[t])
    return torch.stack(outputs)


@pytest.mark.parametrize("begins", [[], [3, 4, 13]], ids=["one stream", "documents"])
def test_outputs_and_gradients_are_those_of_the_formula(begins):
    config, generator = ModelConfig(**run_values(model=MODEL)["model"]), torch.Generator().manual_seed(0)
    layer = mixer("Z").layer(config, tp=TensorParallel(), kernels=TORCH_KERNELS).double()
    weights = dict(layer.named_parameters())
    for weight in weights.values():
        torch.nn.init.normal_(
            weight, std=0.7 / math.sqrt(weight.shape[-1]) if weight.dim() > 1 else 0.5, generator=generator
        )
    x, stream, weight = (torch.randn(LENGTH, 1, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3))
    inputs = [t.requires_grad_() for t in (x, stream)] + list(weights.values())
    documents = None
    if begins:
        starts = torch.tensor([document_starts(begins, length=LENGTH)])
        documents = Documents(starts, first=0, device=torch.device("cpu"))
    positions = documents.positions.t() if documents else torch.arange(LENGTH)[:, None]
    shared = {"Z": mixer("Z").shared_inputs(config, positions)}
    shared["Z"] = tuple(t.double() for t in shared["Z"])
    found = layer(x, SequenceContext(ContextParallel(), documents, shared), stream)
    spans = zip([0, *begins], [*begins, LENGTH], strict=True)
    expected = torch.cat([token_by_token(weights, x[a:b, 0], stream[a:b, 0]) for a, b in spans])[:, None]
    assert (found - expected).norm() < 1e-6 * expected.norm()  # the tables of angles are fp32
    gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for name, ours, theirs in zip(["x", "stream", *weights], *gradients, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm(), name


@pytest.mark.parametrize(
    ("tokens", "first", "pieces"),
    [
        (16, 16, [Piece(2, 8)]),
        (5, 0, [Piece(1, 5)]),
        (21, 21, [Piece(1, 3, 5), Piece(2, 8), Piece(1, 2)]),
        (3, 10, [Piece(1, 3, 2)]),
        (6, 10, [Piece(1, 6, 2)]),
    ],
)
def test_a_part_of_a_sequence_lies_in_pieces(tokens, first, pieces):
    assert pieces_of(tokens, first=first, chunk_tokens=8) == pieces


CP2 = {"context": 2}
LAYOUTS = {
    "CP2": (MODEL, CP2),
    "CP2 across": (ACROSS, CP2),
    "PP2": (MODEL, {"pipeline": 2}),
    "CP4 across, selective": (ACROSS, {"context": 4, "recompute": "selective"}),
    "CP2xPP2, full": (MODEL, {"context": 2, "pipeline": 2, "recompute": "full"}),
    "CP4": (MODEL, {"context": 4}),
}
QUICK = [("CP2", False), ("CP2", True), ("CP2 across", False), ("PP2", True)]
CASES = {
    (name, documents): steps_call(
        model,
        parallel,
        ranks=math.prod(v for v in parallel.values() if v != "full" and v != "selective"),
        documents=documents,
    )
    for name, (model, parallel) in LAYOUTS.items()
    for documents in (False, True)
}
ALONE = {
    (across, documents): steps_call(ACROSS if across else MODEL, {}, ranks=1, documents=documents)
    for across in (False, True)
    for documents in (False, True)
}


@pytest.mark.parametrize(
    ("name", "documents"), slow_except([], CASES, long=[case for case in CASES if case not in QUICK])
)
def test_a_layout_trains_like_one_process(name, documents):
    expected = WORLDS[ALONE["across" in name, documents]][0]
    assert_like_one_process(WORLDS[CASES[name, documents]], expected, gradients=1e-4, norms=1e-5)


def states_between_ranks_are_dropped(monkeypatch):
    monkeypatch.setattr(layers, "context_parallel_scan", lambda scan, **_: scan()[0])


def keys_of_a_chunk_on_the_rank_before_are_dropped(monkeypatch):
    wait = layers.HaloExchange.wait
    monkeypatch.setattr(layers.HaloExchange, "wait", lambda self: wait(self) * 0)


def the_stream_is_the_normed_one(monkeypatch):
    forward = layers.MegaLayer.forward
    monkeypatch.setattr(layers.MegaLayer, "forward", lambda self, x, context, stream: forward(self, x, context, x))


MISTAKES = {
    (mistake, across, documents): steps_call(
        ACROSS if across else MODEL, parallel, ranks=2, documents=documents, mistake=mistake, steps=1
    )
    for mistake, parallel, across, documents in (
        (states_between_ranks_are_dropped, CP2, False, False),
        (keys_of_a_chunk_on_the_rank_before_are_dropped, CP2, True, False),
        (keys_of_a_chunk_on_the_rank_before_are_dropped, CP2, False, True),
        (the_stream_is_the_normed_one, {"pipeline": 2}, False, True),
    )
}
WORLDS = SharedWorlds(*(CASES[case] for case in QUICK), *ALONE.values(), *MISTAKES.values())


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "across", "documents"), MISTAKES)
def test_mistakes_are_seen(mistake, across, documents):
    found = WORLDS[MISTAKES[mistake, across, documents]]
    assert largest_difference(found, WORLDS[ALONE[across, documents]][0]) > 1e-3


def test_it_is_counted():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    assert_counts_its_parameters("Z", config, ranks=1)
    counts, d, rank = count_parameters(config), WIDTH, 2
    s6 = 5 * d + d * (rank + 2 * STATES) + rank * d + d + d * STATES + d
    assert counts["mega"] == 2 * (s6 + 5 * d * d + KEY * d + 5 * d + KEY + 5 * KEY)
    assert counts["total"] == sum(parameter.numel() for parameter in Samba(config).parameters())
    keys = (3 * 8 * 4.5 + 4 * 2.5) / 28
    expected = 2 * 3 * (7 * d * STATES + 4 * d * keys)
    assert flops_per_token(config, sequence_length=28).mixing["mega"] == pytest.approx(expected)


def test_its_initial_weights():
    model = Samba(ModelConfig(**run_values(model=MODEL)["model"]))
    initialize_parameters(model, seed=0)
    held = {name: piece.of_local(value).detach() for name, value, piece in canonical_slices(model)}
    for name in ("query_scale", "key_scale", "query_position", "key_position"):
        assert 0 < held[f"layers.0.mixer.{name}"].abs().max() < 0.1
    for name in ("query_bias", "in_proj.update.bias", "v_proj.bias", "h_proj.bias"):
        assert not held[f"layers.0.mixer.{name}"].any()
    assert 0.9 / math.sqrt(WIDTH) < held["layers.0.mixer.h_proj.weight"].max() <= 1 / math.sqrt(WIDTH)


def planned(parallel: dict, *, precision: str = "bf16", **sizes):
    mixers = {"mega": {"key_dim": 8, "chunk_tokens": 48} | sizes}
    return config_of(parallel=parallel, train={"precision": precision}, pattern="ZZ", vocab_size=64, mixers=mixers)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_keeps_what_it_says(precision, recompute):
    config = planned({"recompute": recompute}, precision=precision)
    kept, peak = counted_activations(config)
    memory, *_ = stage_memories(config, world_size=1, kernels=TORCH_ON_CPU)
    saved = memory.rounded_bytes + memory.saved_bytes
    assert saved == pytest.approx(kept, rel=0.02)
    assert saved + memory.workspace_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "chunk"), slow_except([(2, 48)], [(2, 48), (4, 48), (2, 36)], long=[(4, 48), (2, 36)])
)
def test_a_rank_keeps_and_sends_what_it_says(ranks, chunk):
    config = planned({"context": ranks}, chunk_tokens=chunk)
    kept = run_world(kept_on_rank, config.model_dump(), ranks=ranks)
    assert_keeps_what_it_says(config, kept, kernels=TORCH_ON_CPU, tolerance=0.05)
    assert_sends_what_it_says(config, run_world(handed_on_rank, config.model_dump(), ranks=ranks))


def test_it_is_planned():
    values = changed(run_values(model=MODEL), data={"sequence_length": 64}, train={"global_batch_tokens": 256})
    config = parse_config(values, source="test")
    more = changed(values, model={"mixers": {"mega": SIZES | {"chunk_tokens": 64}}})
    times = [
        plan_of(one, world_size=1, hardware=DEVICES["h100"]).time.compute_s
        for one in (config, parse_config(more, source="test"))
    ]
    assert times[0] < times[1]
    plans = find_plans(config, world_size=4, memory_gib=1, hardware=DEVICES["h100"])
    assert {plan.config.parallel.tensor for plan in plans} == {1}
    assert {plan.config.parallel.context for plan in plans} >= {1, 2}


def test_it_asks_kernels_for_heads_as_wide_as_queries_with_their_bias():
    config = ModelConfig(**run_values(model=ACROSS)["model"])
    needs = mixer("Z").kernel_needs(config, sequences=3, part_tokens=16, tp=Position(1), cp=Position(2, rank=1))
    calls = [
        (call.batch, call.query_heads, call.queries, call.keys, call.head_dim) for call in needs["attention_calls"]
    ]
    assert calls == [(3, 6, 2, 6, 8), (6, 6, 6, 6, 8), (3, 6, 2, 2, 8)]


def test_its_counts_by_hand():
    config = planned({}).model  # of width 64

    def share(tokens: int, ranks: int) -> Share:
        return Share(1, False, ranks, 3, tokens, 2, "none", TORCH_ON_CPU)

    tokens, Z, D = 96, 8, 64
    assert mixer("Z").shared_inputs_bytes(config, share(tokens, 2)) == 4 * Z * tokens / 2
    keys = (48 + 1) / 2  # of whole chunks
    (attention,) = (one for one in mixer("Z").kernels(config, share(tokens, 1)) if isinstance(one, Attention))
    assert attention.flops == 3 * 4 * D * keys * 3 * tokens
    *_, halo = mixer("Z").messages(config, share(120, 2))  # 60 tokens a rank: chunks lie across both
    assert halo.handed_bytes == 2 * 3 * (2 * Z + D) * 47
    kept = [
        mixer("Z").saved_bytes(planned({}, chunk_tokens=chunk).model, share(120, 2), inside=False) for chunk in (48, 60)
    ]
    assert kept[0] - kept[1] == 2 * 3 * (60 - 48) * 2 * D  # keys and values of a chunk that began on the rank before


def test_a_small_model_has_heads_and_chunks_that_fit():
    config = planned({}, key_dim=16).model
    for width, shared, sizes in (
        (32, 0.5, {"chunk_tokens": 24, "key_dim": 8}),
        (32, 1e-3, {"chunk_tokens": 2, "key_dim": 8}),
    ):
        assert mixer("Z").shrunk(config, hidden_size=width, sequence_share=shared) == sizes


@pytest.mark.slow
def test_it_is_saved_and_resumed_on_another_layout(request, tmp_path):
    values = changed(request.getfixturevalue("run_values"), model=MODEL)
    assert_resumes_on({"context": 2, "zero_stage": 2}, values, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("sizes", "parallel", "words"),
    [
        ({"key_dim": 10}, {}, r"model\.hidden_size is 48, which is no multiple of 2 x model\.mixers\.mega\.key_dim 10"),
        ({"key_dim": 3}, {}, r"model\.mixers\.mega\.key_dim is 3"),
        ({"chunk": 4}, {}, r"unknown key model\.mixers\.mega\.chunk"),
        (
            {},
            {"tensor": 2},
            r"parallel\.tensor is 2, and the mixer mega \(Z in model\.pattern\) has no tensor parallelism",
        ),
    ],
)
def test_its_mistakes_are_refused_in_a_sentence(sizes, parallel, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(run_values(model=MODEL | {"mixers": {"mega": SIZES | sizes}}, parallel=parallel), source="test")
