"""SambaY: layers that read what a layer before has written, on layouts against one process, counted and refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sambalm.model.chunks import chunk_layers
from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.mixers.context import SequenceContext
from sambalm.model.parameters import count_parameters
from sambalm.model.registry import memory_writers, mixer
from sambalm.model.samba import Samba
from sambalm.parallel.config import ParallelConfig
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU
from sambalm.pretrain.planner.memory import stage_memories
from tests.support.counted_ranks import counted_activations, handed_on_rank
from tests.support.layout_runs import (
    LENGTH,
    assert_like_one_process,
    largest_difference,
    run_values,
    steps_call,
    steps_on_rank,
)
from tests.support.marks import slow_except
from tests.support.mixers import assert_counts_its_parameters, assert_resumes_on, assert_sends_what_it_says
from tests.support.planned_runs import config_of
from tests.support.whole_runs import changed
from tests.support.worlds import SharedWorlds, run_world

CONFIGS = Path(__file__).parents[2] / "configs" / "successors"
SIZES = {"mamba2": {"d_state": 5, "head_dim": 4, "groups": 2}}
# The second U reads the second S; both X read the one F.
MODEL = {"pattern": "SFUXSUX", "mixers": SIZES}
SP2, CP2 = {"tensor": 2, "sequence": True}, {"context": 2}
LAYOUTS = {
    "TP2+SP": (2, SP2, {}),
    "CP2": (2, CP2, {}),
    "PP2": (2, {"pipeline": 2, "pipeline_layers": [1, 7]}, {"pattern": "*SFUXSUX"}),
    "alone, full": (1, {"recompute": "full"}, {}),
    "CP4, selective": (4, {"context": 4, "recompute": "selective"}, {}),
    "CP2xTP2+SP, full": (4, SP2 | CP2 | {"recompute": "full"}, {}),
    "TP2, one kv head": (2, {"tensor": 2}, {"num_kv_heads": 1}),
    "DP2, ZeRO-3, full": (2, {"zero_stage": 3, "recompute": "full"}, {}),
}
READ = {16: 12, 18: 14, 20: 12, 22: 14}  # of the config, each reader's writer
QUICK = [("TP2+SP", False), ("CP2", True), ("PP2", False), ("alone, full", True)]


CASES = {
    (name, documents): (
        steps_call(MODEL | model, parallel, ranks=ranks, documents=documents),
        steps_call(MODEL | model, {}, ranks=1, documents=documents),
    )
    for name, (ranks, parallel, model) in LAYOUTS.items()
    for documents in (False, True)
}


@pytest.mark.parametrize(
    ("name", "documents"), slow_except([], CASES, long=[case for case in CASES if case not in QUICK])
)
def test_a_layout_trains_like_one_process(name, documents):
    call, alone = CASES[name, documents]
    assert_like_one_process(WORLDS[call], WORLDS[alone][0], gradients=1e-5, norms=1e-5)


def test_products_in_fp8_are_close_and_alike_on_ranks():
    sizes = {"mamba2": {"d_state": 16, "head_dim": 4, "groups": 2}}  # every product's sizes are multiples of 16
    model = {"pattern": "SFUX", "hidden_size": 64, "num_query_heads": 4, "mixers": sizes}
    exact = run_values(model=MODEL | model)
    fp8 = exact | {"train": exact["train"] | {"matmul_precision": "fp8"}}
    losses = {
        name: run_world(steps_on_rank, values | {"parallel": parallel}, 4, ranks=ranks)[0].losses
        for name, values, parallel, ranks in (("exact", exact, {}, 1), ("alone", fp8, {}, 1), ("TP2", fp8, SP2, 2))
    }
    assert losses["TP2"] == pytest.approx(losses["alone"], rel=2e-3)
    distance = max(abs(a - b) for a, b in zip(losses["exact"], losses["alone"], strict=True))
    assert 1e-4 < distance < 0.05


def a_memory_carries_no_gradient(monkeypatch):
    with_memory = SequenceContext.with_memory

    def detached(self, name, memory):
        memory = memory.detach() if isinstance(memory, torch.Tensor) else tuple(each.detach() for each in memory)
        return with_memory(self, name, memory)

    monkeypatch.setattr(SequenceContext, "with_memory", detached)


def the_first_memory_stays(monkeypatch):
    with_memory = SequenceContext.with_memory

    def first(self, name, memory):
        return self if name in self.memories else with_memory(self, name, memory)

    monkeypatch.setattr(SequenceContext, "with_memory", first)


RIGHT = steps_call(MODEL, {}, ranks=1, steps=1)
MISTAKES = {
    mistake: steps_call(MODEL, {}, ranks=1, mistake=mistake, steps=1)
    for mistake in (a_memory_carries_no_gradient, the_first_memory_stays)
}
WORLDS = SharedWorlds(*(call for case in QUICK for call in CASES[case]), RIGHT, *MISTAKES.values())


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake):
    assert largest_difference(WORLDS[MISTAKES[mistake]], WORLDS[RIGHT][0]) > 0.03


def test_a_cross_attention_with_the_queries_of_its_writer_is_the_writer():
    """The same weights for queries and output give the same output, as long as the streams are the same."""
    config = ModelConfig(**run_values(model={"pattern": "FX"})["model"])
    model = Samba(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    full, cross = model.layers["0"].mixer, model.layers["1"].mixer
    cross.q_proj.weight.data.copy_(full.qkv_proj.query)
    cross.o_proj.weight.data.copy_(full.o_proj.weight)
    positions = torch.arange(9).unsqueeze(1)
    shared = {letter: mixer(letter).shared_inputs(config, positions) for letter in "FX"}
    context, x = SequenceContext(cp=model.cp, shared=shared), torch.randn(9, 2, 48, dtype=torch.float64)
    output, memory = full(x, context)
    torch.testing.assert_close(cross(x, context.with_memory(mixer("X").reads, memory)), output)


def test_a_model_of_samba_421ms_sizes():
    config = load_config(CONFIGS / "sambay_mamba2_402m.yaml")
    width, inner = 1536, 3072
    samba = count_parameters(load_config(CONFIGS / "samba_mamba2_421m.yaml").model)
    attention, mamba2 = 4 * width**2, samba["mamba2"] // 6
    of = {"S": mamba2, "*": attention, "F": attention, "X": attention // 2, "U": 2 * width * inner + inner}
    mixers = sum(of[letter] for letter in "S*S*S*SFUXUX")
    counts = count_parameters(config.model)
    assert counts["total"] == mixers + samba["mlp"] + samba["norms"] + samba["embedding"] == 401_897_536
    assert memory_writers(config.model.pattern) == READ


def test_balanced_parts_keep_readers_with_their_writers():
    config = load_config(CONFIGS / "sambay_mamba2_402m.yaml")
    for chunks in (2, 3, 8):
        parts = chunk_layers(config.model, ParallelConfig(pipeline=chunks), sequence_length=4096)
        assert len(parts) == chunks
        assert all(any({reader, writer} <= set(part) for part in parts) for reader, writer in READ.items())


def test_who_reads_whom():
    assert memory_writers("SF-UXS-UX") == {3: 0, 4: 1, 7: 5, 8: 1}
    assert memory_writers("M-*-") == {}


@pytest.mark.parametrize("letter", ["U", "X"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_counts_the_parameters_that_its_layer_has(letter, ranks):
    assert_counts_its_parameters(letter, ModelConfig(**run_values(model=MODEL)["model"]), ranks=ranks)


def test_it_is_counted():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    counts = count_parameters(config)
    assert (counts["gmu"], counts["cross_attention"]) == (2 * (2 * 48 * 96 + 96), 2 * 2 * 48 * 48)
    assert counts["total"] == sum(parameter.numel() for parameter in Samba(config).parameters())
    mixing = flops_per_token(config, sequence_length=LENGTH).mixing
    assert mixing["gmu"] == 0
    assert mixing["cross_attention"] == 2 * mixing["full_attention"]


WIDER = {"mamba2": {"d_state": 16, "head_dim": 16, "groups": 2}}
KERNELS = replace(TORCH_ON_CPU, ssd="torch")


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_keeps_what_it_says(precision, recompute):
    config = config_of(
        parallel={"recompute": recompute},
        train={"precision": precision},
        pattern="SUFUXS",
        vocab_size=64,
        mixers=WIDER,
    )
    kept, peak = counted_activations(config)
    memory, *_ = stage_memories(config, world_size=1, kernels=KERNELS)
    saved = memory.rounded_bytes + memory.saved_bytes
    # The kernel of a CPU gives its output as the next product takes it; others' is copied, and so counted twice.
    assert kept * 0.99 < saved < kept * (1.01 if recompute == "selective" else 1.04)
    assert saved + memory.workspace_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("parallel", slow_except([CP2], [CP2, SP2], long=[SP2]), ids=str)
def test_it_sends_what_it_says(parallel):
    config = config_of(parallel=parallel, pattern="SFUX", mixers=WIDER)
    assert_sends_what_it_says(config, run_world(handed_on_rank, config.model_dump(), ranks=2))


@pytest.mark.long
def test_it_is_saved_and_resumed_on_another_layout(request, tmp_path):
    assert_resumes_on(SP2, changed(request.getfixturevalue("run_values"), model=MODEL), tmp_path / "stopped")


@pytest.mark.parametrize(
    ("pattern", "parallel", "words"),
    [
        ("M-U", {}, r"sublayer 3 of model\.pattern, U \(gmu\), reads the scan's output of a layer before it.* put S"),
        ("XF", {}, r"sublayer 1 of model\.pattern, X \(cross_attention\), reads the keys and values.* put F before"),
        (
            "SUU-",
            {"pipeline": 2, "pipeline_layers": [2, 2]},
            r"puts sublayer 3 .* than sublayer 1, whose scan's output",
        ),
        ("SFUX", {"pipeline": 2}, r"puts sublayer 3 of model\.pattern on another part than sublayer 1"),
        ("F-X-", {"pipeline": 2, "pipeline_layers": [1, 3]}, r"give parallel\.pipeline_layers that keep them together"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(pattern, parallel, words):
    mixers = SIZES if "S" in pattern else {}
    with pytest.raises(ConfigError, match=words):
        parse_config(run_values(model={"pattern": pattern, "mixers": mixers}, parallel=parallel), source="test")
