"""A mixer of another package: no product file knows it, and it does whatever ours do."""

import re

import pytest
import torch

from sambalm.model import registry
from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.mixers.base import Ability
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.parameters import count_parameters
from sambalm.model.samba import Samba, Sublayer
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.config_docs import mixer_section
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import DEVICES
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU
from sambalm.pretrain.planner.memory import stage_memories
from sambalm.pretrain.planner.search import find_plans, plan_of
from tests.support import toy_mixer
from tests.support.counted_ranks import counted_activations
from tests.support.layout_runs import LENGTH, assert_like_one_process, largest_difference, run_values, steps_call
from tests.support.mixers import assert_resumes_on
from tests.support.whole_runs import changed
from tests.support.worlds import SharedWorlds

LETTERS = re.escape(f"{', '.join([*registry.BUILT_IN][:-1])} and {[*registry.BUILT_IN][-1]}")
MODEL = {"pattern": "MT*-T", "mixers": {"token_shift": {"channels": 22}}}


@pytest.fixture(autouse=True)
def _installed():
    toy_mixer.install()
    yield
    toy_mixer.uninstall()


ALONE = {documents: steps_call(MODEL, {}, ranks=1, documents=documents) for documents in (False, True)}
LAYOUTS = {
    (name, documents): steps_call(MODEL, parallel, ranks=2, documents=documents)
    for name, parallel in {
        "TP2+SP": {"tensor": 2, "sequence": True},
        "CP2": {"context": 2},
        "PP2": {"pipeline": 2},
    }.items()
    for documents in (False, True)
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "documents"), LAYOUTS)
def test_it_trains_on_every_layout_like_one_process(name, documents):
    results = WORLDS[LAYOUTS[name, documents]]
    assert_like_one_process(results, WORLDS[ALONE[documents]][0], gradients=1e-4, norms=1e-4)
    assert any(".mix." in name for name, *_ in results[0].gradients)


def the_token_of_a_neighbour_is_dropped(monkeypatch):
    from toy_mixer.layer import Mix

    def token_before(self, value, context):
        return torch.cat((torch.zeros_like(value[:, :1]), value[:, :-1]), dim=1)

    monkeypatch.setattr(Mix, "_token_before", token_before)


WRONG = {
    documents: steps_call(
        MODEL, parallel, ranks=2, documents=documents, mistake=the_token_of_a_neighbour_is_dropped, steps=1
    )
    for parallel, documents in (({"context": 2}, False), ({"tensor": 2}, True))
}
WORLDS = SharedWorlds(*ALONE.values(), *LAYOUTS.values(), *WRONG.values())


@pytest.mark.slow
@pytest.mark.parametrize("documents", WRONG, ids=["CP", "resets"])
def test_a_mistake_in_it_is_seen(documents):
    assert largest_difference(WORLDS[WRONG[documents]], WORLDS[ALONE[documents]][0]) > 0.03


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_mixer_counts_the_parameters_that_its_layer_has(ranks):
    config = ModelConfig(**run_values(model=MODEL | {"num_kv_heads": 2})["model"])
    for one in config.kinds:
        copies = one.weight_copies(config, tensor_ranks=ranks)
        with torch.device("meta"):
            tp = TensorParallel(rank=0, size=ranks, copy_groups={copies: None})
            layer = Sublayer(one.letter, config, tp=tp, kernels=TORCH_KERNELS)
        counts = one.parameters(config, tensor_ranks=ranks)
        held = dict(layer.mixer.named_parameters())
        assert {each.name: each.shape for each in counts} == {name: tuple(value.shape) for name, value in held.items()}
        # Keys' and values' weights are in the product of the queries', which alone has the scales.
        in_fp8 = [each.name for each in counts if each.takes_fp8 and not each.name.endswith("key_value")]
        assert in_fp8 == [name for name, value in held.items() if info_of(value).takes_fp8]


def test_it_is_counted():
    config = ModelConfig(**run_values(model=MODEL)["model"])
    counts = count_parameters(config)
    assert counts["token_shift"] == 2 * (3 * 22 * 48 + 2 * 22)
    assert counts["total"] == sum(parameter.numel() for parameter in Samba(config).parameters())
    assert flops_per_token(config, sequence_length=32).mixing["token_shift"] == 2 * 3 * 4 * 22


def test_it_keeps_what_it_says():
    config = parse_config(run_values(model=MODEL), source="test")
    kept, _ = counted_activations(config)
    memory, *_ = stage_memories(config, world_size=1, kernels=TORCH_ON_CPU)
    assert memory.saved_bytes == pytest.approx(kept, rel=0.02)


def test_it_is_planned():
    values = run_values(model=MODEL) | {"data": {"train": "unused", "sequence_length": 32}}
    config = parse_config(values, source="test")
    with_more = parse_config(changed(values, model={"mixers": {"token_shift": {"channels": 2200}}}), source="test")
    small, large = (stage_memories(one, world_size=1, kernels=TORCH_ON_CPU)[0] for one in (config, with_more))
    added = 2 * LENGTH * (2200 - 22) * 6 * 4  # in two layers, six tensors of fp32
    assert large.saved_by_kind["token_shift"] - small.saved_by_kind["token_shift"] == added
    assert large.saved_by_kind["mamba"] == small.saved_by_kind["mamba"]
    plans = find_plans(config, world_size=4, memory_gib=1, hardware=DEVICES["h100"])
    assert {plan.config.parallel.tensor for plan in plans} >= {1, 2}
    slow, fast = (plan_of(one, world_size=1, hardware=DEVICES["h100"]).time.compute_s for one in (with_more, config))
    assert slow > fast


@pytest.mark.slow
def test_it_is_saved_and_resumed_on_another_layout(request, tmp_path):
    values = changed(request.getfixturevalue("run_values"), model=MODEL)
    assert_resumes_on({"tensor": 2, "sequence": True}, values, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("lacking", "sections", "words"),
    [
        (Ability.CONTEXT_PARALLEL, {"parallel": {"context": 2}}, "parallel.context is 2"),
        (Ability.TENSOR_PARALLEL, {"parallel": {"tensor": 2}}, "parallel.tensor is 2"),
        (Ability.SEQUENCE_PARALLEL, {"parallel": {"tensor": 2, "sequence": True}}, "parallel.sequence is true"),
        (Ability.PACKED_DOCUMENTS, {"data": {"reset_at_document": True}}, "data.reset_at_document is true"),
    ],
    ids=str,
)
def test_what_it_lacks_is_refused_in_a_sentence(lacking, sections, words, monkeypatch):
    one = registry.mixer("T")
    values = changed(run_values(model=MODEL), **sections)
    parse_config(values, source="test")
    monkeypatch.setattr(type(one), "abilities", frozenset(Ability) - {lacking})
    with pytest.raises(ConfigError, match=f"{words}, and the mixer token_shift .T in model.pattern. has no {lacking}"):
        parse_config(values, source="test")


def test_its_own_mistakes_are_refused_in_a_sentence():
    for mixers, words in (
        ({"token_shift": {"channels": 0}}, "model.mixers.token_shift.channels"),
        ({"token_shift": {"chanels": 2}}, "model.mixers.token_shift.chanels"),  # codespell:ignore chanels
        (
            {"token_shirt": {}},
            r"'token_shirt', which is none for model.pattern \S+ \(those of its mixers are token_shift\)",
        ),
        ({"mamba": {"d_state": 32}}, "'mamba', whose sizes are keys of model itself"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config(run_values(model=MODEL | {"mixers": mixers}), source="test")
    narrow = run_values(model=MODEL | {"mixers": {"token_shift": {"channels": 1}}}, parallel={"tensor": 2})
    with pytest.raises(ConfigError, match=r"channels is 1, less than parallel\.tensor 2"):
        parse_config(narrow, source="test")


@pytest.mark.parametrize(("letter", "words"), [("*", "another mixer has"), ("xx", "take one"), ("3", "take one")])
def test_a_letter_that_cannot_be_is_refused(letter, words, monkeypatch):
    monkeypatch.setattr(type(registry.external_mixers()["T"]), "letter", letter)
    registry.external_mixers.cache_clear()
    with pytest.raises(registry.MixerError, match=words):
        registry.external_mixers()


def test_without_the_package_its_letter_is_unknown():
    toy_mixer.uninstall()
    try:
        with pytest.raises(ConfigError, match=LETTERS):
            parse_config(run_values(model=MODEL | {"mixers": {}}), source="test")
    finally:
        toy_mixer.install()


def test_its_sizes_can_be_documented():
    page = "\n".join(mixer_section(registry.mixer("T")))
    assert "| `model.mixers.token_shift.channels` | int > 0 | `32` | Channels that are shifted |" in page


def test_a_mixer_that_does_not_say_what_it_can_do_is_refused(monkeypatch):
    monkeypatch.delattr(type(registry.external_mixers()["T"]), "abilities")
    registry.external_mixers.cache_clear()
    with pytest.raises(registry.MixerError, match="token_shift does not say what it can do"):
        registry.external_mixers()
