"""The planner's formulas on round numbers, each against the same reckoned by hand."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sambalm.model.mixers.counts import KernelNames, Scan, Share, Traffic, halo_message
from sambalm.model.mixers.scan_counts import CUDA_SCAN_CHUNK_TOKENS, MAMBA_SSM_CHUNK_TOKENS
from sambalm.model.ops.reference.selective_scan import CHUNK_ELEMENTS
from sambalm.model.registry import mixer
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner import activations, search
from sambalm.pretrain.planner import time as step
from sambalm.pretrain.planner.buckets import ReducedGroup, layer_buckets
from sambalm.pretrain.planner.communication import Transfer, step_transfers
from sambalm.pretrain.planner.hardware import DEVICES, H100
from sambalm.pretrain.planner.hardware_file import find_hardware
from sambalm.pretrain.planner.kernels import ATTENTION_FLOP, KERNEL_ELEMENTS, TORCH_ON_CPU, planned_kernels
from sambalm.pretrain.planner.memory import RankMemory, stage_memories
from sambalm.pretrain.planner.search import _parallel_sections, find_plans, plan_of
from sambalm.pretrain.planner.sizes import distinct_stages, share_of, stages_of
from sambalm.pretrain.planner.table import _speed_table, describe_days, plans_as_json, print_plans
from tests.support.planned_runs import config_of

PASS_BYTES_PER_S = 3.0e12 * 0.84  # of fused kernels on an H100


def device_of(*, recompute: str = "none", hardware=H100, **kernels: str) -> step._Device:
    config = config_of()
    names = replace(planned_kernels(config), **kernels)
    return step._Device(config.model, share_of(config, names, recompute=recompute), hardware)


def test_a_step_takes_at_least_what_its_slowest_stage_computes_and_its_bubble():
    def least_s(**parallel) -> float:
        config = config_of(parallel=parallel, pattern="----")  # the last stage has two MLPs and the head either way
        stages = distinct_stages(config).values()
        return step.least_step_s(config, stages, world_size=2, hardware=H100, kernels=planned_kernels(config))

    once_s = least_s(pipeline=2, pipeline_layers=[2, 2])
    twice_s = least_s(pipeline=2, virtual_pipeline=2, pipeline_layers=[1, 1, 1, 1])
    assert once_s / twice_s == pytest.approx((1 + 1 / 2) / (1 + 1 / 4))  # 2 stages, 2 micro-batches


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", 4), ("bf16", 2)])
def test_stages_of_zero_hold_their_shares(precision, rounded):
    """Of layers half, and two buckets: of gradients in fp32, and under ZeRO-3 of weights as products take them."""
    for stage in (1, 2, 3):
        config = config_of(parallel={"zero_stage": stage}, train={"precision": precision}, tie_embeddings=False)
        (held,), layers = stages_of(config), layer_buckets(config)
        (memory,) = stage_memories(config, world_size=2, kernels=TORCH_ON_CPU)
        rest, part = held.parameters - sum(layers), sum(layers) / 2 + 2 * max(layers)
        assert len(layers) > 2
        assert memory.gradients_bytes == 4 * (rest + (part if stage > 1 else sum(layers)))
        assert memory.weights_bytes + memory.rounded_bytes == 4 * rest + rounded * (part if stage > 2 else sum(layers))
        assert memory.optimizer_bytes == 3 * 4 * held.parameters / 2


def test_what_comes_late_takes_the_place_of_activations_that_have_gone():
    standing = {"weights_bytes": 8, "rounded_bytes": 4, "gradients_bytes": 8, "optimizer_bytes": 16}
    memory = RankMemory(
        **standing, saved_by_kind={"mlp": 20, "ends": 5}, workspace_bytes=7, communication_bytes=3, late_bytes=0
    )
    assert (memory.state_bytes, memory.total_bytes) == (36, 36 + 3 + 25 + 7)
    assert replace(memory, late_bytes=10).total_bytes == 36 + 3 + 25 + 7 - 10
    assert replace(memory, late_bytes=40).total_bytes == 36 + 3  # in the end all of it stands


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("selective", 2), ("full", 2)])
def test_attention_and_scan_run_their_forward_again_where_they_keep_nothing(recompute, forwards):
    device = device_of(recompute=recompute, attention="flex", scan="mamba-ssm")
    # 0.869 and 2.426 ms of the measured operations; 3.741 and 6.593 ms of the measured elements.
    assert device._attention_s(ATTENTION_FLOP) == pytest.approx((forwards * 0.869 + 2.426) * 1e-3)
    scan = Scan(sequences=4, channels=5632, tokens=4096, states=16, scans=1)
    assert scan.sequences * scan.channels * scan.tokens == KERNEL_ELEMENTS
    assert device._scan_s(scan) == pytest.approx((forwards * 3.741 + 6.593) * 1e-3)
    assert device._scan_s(replace(scan, scans=2)) == pytest.approx(2 * (forwards * 3.741 + 6.593) * 1e-3)


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("selective", 1), ("full", 2)])
def test_other_kernels_run_again_with_their_layer_alone(recompute, forwards):
    device, again = device_of(recompute=recompute, conv="cuda"), recompute == "full"
    assert device._conv_s(KERNEL_ELEMENTS) == pytest.approx((forwards * 0.181 + 0.351) * 1e-3)
    elements = device.share.tokens * 1000
    assert device._matrix_s(1000, again=again) == pytest.approx(2 * (forwards + 2) * elements / (989e12 * 0.73))
    fused, single = Traffic(4, 6, fused=True), Traffic(4, 6)
    assert device._traffic_s(fused, 1e9, again=again) == pytest.approx((4 * forwards + 6) * 1e9 / PASS_BYTES_PER_S)
    assert device._traffic_s(single, 1e9, again=again) == pytest.approx((4 * forwards + 6) * 1e9 / 1.68e12)


def test_the_scan_in_plain_pytorch_launches_kernels_for_each_token():
    device = device_of(scan="torch")
    scan = Scan(sequences=2, channels=128, tokens=192, states=16, scans=1)
    moved_bytes = 20 * 4 * 2 * 128 * 192 * 16
    assert device._scan_s(scan) == pytest.approx(192 * 50e-6 + moved_bytes / 3.0e12)


def test_other_devices_scale_what_was_measured():
    a100 = DEVICES["a100"]
    assert DEVICES["h200"].vector_rate == 1
    assert a100.vector_rate == pytest.approx(108 * 1.41 / (132 * 1.98))
    assert a100.memory_bytes_per_s == pytest.approx(2.04e12 * 3.0 / 3.35)
    old, new = device_of(hardware=a100, attention="flex", conv="cuda"), device_of(attention="flex", conv="cuda")
    assert old._attention_s(1e12) / new._attention_s(1e12) == pytest.approx(989 / 312)
    assert old._conv_s(1e9) / new._conv_s(1e9) == pytest.approx(3.35 / 2.04)
    single = Traffic(4, 6)
    assert new._traffic_s(single, 1e9) / old._traffic_s(single, 1e9) == pytest.approx(a100.vector_rate)


@pytest.mark.parametrize(("micro_batches", "added"), [(1, 0), (3, 2)])
def test_zero_2_adds_up_its_share_of_all_micro_batches_but_the_first(micro_batches, added):
    config = config_of(parallel={"zero_stage": 2}, train={"global_batch_tokens": 4 * 192 * micro_batches})
    (stage,) = stages_of(config)
    moved_s, _ = step._deepspeed_s(config, stage, world_size=2, hardware=H100)
    assert moved_s == pytest.approx(stage.parameters * 12 * added / 2 / PASS_BYTES_PER_S)


@pytest.mark.parametrize(
    ("world_size", "parallel", "bytes_a_parameter"),
    [
        (1, {}, 2),  # written by AdamW
        (1, {"recompute": "full"}, 6 * 2 * 2),  # read and written at each use: in 2 micro-batches, in each backward too
    ],
    ids=str,
)
def test_weights_are_rounded_once_a_step_or_at_each_use(world_size, parallel, bytes_a_parameter):
    config = config_of(parallel=parallel, train={"global_batch_tokens": 4 * 192 * world_size})
    (stage,) = stages_of(config)
    seconds = step._rounding_s(config, stage, micro_batches=2, world_size=world_size, hardware=H100)
    assert seconds == pytest.approx(stage.parameters * bytes_a_parameter / PASS_BYTES_PER_S)


def test_the_host_launches_sublayers_and_messages_where_there_are_no_graphs():
    transfers = [Transfer("tensor", "all-reduce", 2, 1.0, 10), Transfer("data", "all-gather", 2, 1.0, 100)]

    def host_s(*, captured: bool, **parallel: Any) -> float:
        config = config_of(parallel=parallel)
        (stage,) = stages_of(config)
        return step._host_s(config, stage, transfers, micro_batches=2, captured=captured)

    launches_s = 2 * 4 * 2.6e-3 + 10 * 0.33e-3  # 2 micro-batches of 4 sublayers, and messages within layers
    assert host_s(captured=True) == host_s(captured=True, zero_stage=3) == 0
    assert host_s(captured=False) == pytest.approx(launches_s)
    assert host_s(captured=False, recompute="full") == pytest.approx(2 * 4 * 4 / 3 * 2.6e-3 + 10 * 0.33e-3)


def test_what_a_ring_sends_of_what_a_rank_hands_over():
    shares = {"all-reduce": 2 * 3 / 4, "reduce-scatter": 3 / 4, "all-gather": 3, "send": 1}
    for operation, share in shares.items():
        assert Transfer("data", operation, 4, 1000.0, messages=1).wire_bytes == pytest.approx(1000 * share)


def test_gathered_weights_of_layers_are_half_as_long_as_their_gradients(monkeypatch):
    groups = (ReducedGroup(60, True), ReducedGroup(40, False))  # of layers, and what the backward's end completes
    monkeypatch.setattr(step, "reduced_groups", lambda config: groups)
    sent_s = {("data", "reduce-scatter"): 10.0, ("data", "all-gather"): 7.0}
    exposed_s = step._exposed_data_s(config_of(), sent_s, micro_batches=2, backward_s=100.0, forward_s=50.0)
    assert exposed_s == pytest.approx(10.0 + 7.0)  # the layers' only group is complete at the end
    monkeypatch.setattr(
        step, "reduced_groups", lambda config: (ReducedGroup(30, True), ReducedGroup(30, True), groups[1])
    )
    exposed_s = step._exposed_data_s(config_of(), sent_s, micro_batches=2, backward_s=100.0, forward_s=50.0)
    # All but the first group: 4 bytes an element of gradients, 2 of layers' weights and 4 of others'.
    assert exposed_s == pytest.approx(10.0 * 70 / 100 + 7.0 * (60 + 160) / (60 + 60 + 160))


@pytest.mark.parametrize(
    ("ranks", "elementwise", "bytes_a_logit"), [(1, "torch", 8), (1, "compiled", 2), (2, "compiled", 4)]
)
def test_the_loss_has_gradients_of_logits(ranks, elementwise, bytes_a_logit):
    config = config_of(parallel={"tensor": ranks})
    share = share_of(config, KernelNames("torch", "torch", "torch", "torch", elementwise))
    expected = bytes_a_logit * 2 * 192 * 2048 // ranks  # 2 sequences, 2048 tokens of the vocabulary
    assert activations._loss_gradient_bytes(config.model, share) == expected


def test_a_plan_s_columns_and_stages_are_those_that_say_something(capsys):
    plan = plan_of(config_of(parallel={"pipeline": 2}), world_size=2, hardware=H100)
    print_plans([plan])
    assert "Memory of each stage of PP2" in capsys.readouterr().out
    assert plan.stages[0].workspace_bytes > 0  # of layers alone
    assert [column.header for column in _speed_table([plan]).columns][7:9] == ["days to 0.0M", "days to 3.2T"]
    long_run = replace(plan, config=config_of(train={"steps": 4_166_666_667}))
    assert [column.header for column in _speed_table([long_run]).columns][7:9] == [
        "days to 3,200B",
        "GB sent a rank and step",
    ]
    one = SimpleNamespace(layout="a")
    for other, lines in (("a", 1), ("b", 2)):
        days = describe_days(cast(Any, [(one, 1.0), (SimpleNamespace(layout=other), 2.0)]))
        assert days.count("\n") == lines - 1
        assert "1.0 + 2.0 = 3.0 days" in days
    found = json.loads(plans_as_json([[plan], [plan]], are_phases=True))
    assert [each["phase"] for each in found] == [1, 2]
    assert "phase" not in json.loads(plans_as_json([[plan]]))[0]


def test_what_is_searched_keeps_the_rest_of_the_config():
    config = config_of(parallel={"timeout_s": 77.0}, train={"micro_batch_size": 3, "global_batch_tokens": 12 * 192})
    found = list(search.candidates(config, world_size=1, node_gpus=8))
    assert {one.parallel.timeout_s for one in found} == {77.0}
    assert {one.train.micro_batch_size for one in found} == {1, 2, 3, 4}


def test_a_device_of_a_file_is_like_the_one_that_it_names(tmp_path):
    (tmp_path / "own.yaml").write_text("name: own\nlike: a100\nnode_gpus: 4\n")
    assert find_hardware(str(tmp_path / "own.yaml")) == replace(DEVICES["a100"], name="own", node_gpus=4)


def test_tensor_parallel_ranks_are_searched_up_to_a_whole_node():
    for node_gpus, tensors in ((2, {1, 2}), (8, {1, 2, 4, 8})):
        assert {section["tensor"] for section in _parallel_sections(8, node_gpus=node_gpus)} == tensors


def test_nine_tenths_of_the_memory_are_planned_with(monkeypatch):
    monkeypatch.setattr(search, "needed_bytes", lambda *_, **named: 900 * 2**20)
    settings = {"world_size": 1, "hardware": H100}
    assert find_plans(config_of(), memory_gib=1000 / 1024, **settings)
    with pytest.raises(ConfigError, match=r"takes 0\.9 GiB a rank"):
        find_plans(config_of(), memory_gib=999 / 1024, **settings)


def test_a_plan_is_shown_in_days_and_gigabytes():
    plan = plan_of(config_of(train={"steps": 1000}), world_size=2, hardware=H100)
    tokens_per_s = 4 * 192 / plan.time.total_s
    assert plan.tokens_per_s == pytest.approx(tokens_per_s)
    assert plan.days_to(3.2e12) == pytest.approx(3.2e12 / tokens_per_s / 86_400)
    assert plan.run_days == pytest.approx(1000 * plan.time.total_s / 86_400)
    table = _speed_table([replace(plan, wire_bytes=5e9)])
    assert [list(column.cells) for column in table.columns][-2:] == [[f"{plan.days_to(3.2e12):.1f}"], ["5.0"]]


@pytest.mark.parametrize(
    ("recompute", "tokens"), [("none", 16 + 8 + 16), ("selective", 40), ("full", 2 * (16 + 8) + 16)]
)
def test_the_busiest_of_ranks_passes_tokens_on_in_every_forward_and_gradients_back_once(recompute, tokens):
    """Parts of 16 tokens and a reach of 24: the second of four ranks has two after it, and one before it."""
    share = Share(1, False, 4, 2, 64, 2, recompute, TORCH_ON_CPU)
    message = halo_message(5, 24, share)
    assert (message.dimension, message.operation, message.ranks, message.times) == ("context", "send", 4, 1)
    assert message.handed_bytes == 2 * 2 * 5 * tokens  # bf16, sequences, width
    assert halo_message(5, 3, replace(share, context_ranks=2)).handed_bytes == 2 * 2 * 5 * 3 * share.forwards


@pytest.mark.parametrize("names", [TORCH_ON_CPU, KernelNames("cuda", "cuda", "flex", "compiled", "compiled")], ids=str)
@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("letter", "M*-")
def test_what_a_layer_takes_is_so_much_for_each_sequence(letter, context, names):
    """But for Mamba's decay rates, two of which a layer keeps in fp32."""
    model, one = config_of().model, mixer(letter)

    def counted(sequences: int) -> list[float]:
        share = Share(1, False, context, sequences, 192, 2, "selective", names)
        sent = [each.handed_bytes for each in one.messages(model, share) if each.dimension == "context"]
        kernels = [vars(each) for each in one.kernels(model, share)]
        kept = one.saved_bytes(model, share, inside=False) - rates
        return [kept, one.backward_bytes(model, share) - chunk_bytes(share), *sent, *map(work_of, kernels)]

    def work_of(kernel: dict) -> float:
        return math.prod(value for key, value in kernel.items() if key != "traffic")

    def chunk_bytes(share: Share) -> int:  # of the scan in plain PyTorch, however many sequences
        return 4 * 4 * CHUNK_ELEMENTS["cpu"] if letter == "M" and names.scan == "torch" else 0

    rates = 2 * model.inner_size * model.d_state * 4 if letter == "M" else 0
    assert all(counted(1)) or context == 1
    for sequences in (2, 4):
        assert counted(sequences) == pytest.approx([sequences * number for number in counted(1)])


@pytest.mark.parametrize(
    ("letter", "scan", "chunk_tokens"),
    [
        *((letter, "torch", 64) for letter in "ARGKS"),
        ("M", "cuda", CUDA_SCAN_CHUNK_TOKENS),
        ("M", "mamba-ssm", MAMBA_SSM_CHUNK_TOKENS),
    ],
)
def test_a_chunk_that_is_not_full_has_a_state_too(letter, scan, chunk_tokens):
    """A token that begins a chunk is kept with a state of each sequence, and other tokens without."""
    small = {"num_heads": 2, "head_dim": 4}
    sizes = {"gla": small, "retnet": small, "gated_deltanet": small, "kimi_delta": small, "mamba2": {"head_dim": 16}}
    model = config_of(pattern=letter, mixers={n: s for n, s in sizes.items() if mixer(letter).name == n}).model

    def kept_bytes(tokens: int) -> int:
        share = Share(1, False, 1, 2, tokens, 2, "none", replace(TORCH_ON_CPU, scan=scan))
        inside, outside = (mixer(letter).saved_bytes(model, share, inside=inside) for inside in (True, False))
        return inside - outside

    token = kept_bytes(3) - kept_bytes(2)
    states = [kept_bytes(1) - token]
    states += [kept_bytes(n * chunk_tokens + 1) - kept_bytes(n * chunk_tokens) - token for n in (1, 2)]
    assert states[0] > 0
    assert set(states) == {states[0]}
    assert kept_bytes(chunk_tokens) - kept_bytes(chunk_tokens - 1) == token


def test_a_plan_tells_what_its_busiest_rank_sends():
    config = config_of(parallel={"pipeline": 2, "pipeline_layers": [3, 1], "tensor": 2})
    sent = [sum(each.wire_bytes for each in step_transfers(config, stage=stage, world_size=4)) for stage in range(2)]
    assert min(sent) < max(sent)
    assert plan_of(config, world_size=4, hardware=H100).wire_bytes == max(sent)
