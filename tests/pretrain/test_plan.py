"""The planner's formulas against tensors and messages counted in real runs on the CPU."""

import copy
import gc
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.registry import weight_copies
from sambalm.model.samba import Samba
from sambalm.parallel.config import layout_name
from sambalm.parallel.groups import TensorParallel
from sambalm.pretrain.cli import app
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import BUCKET_ELEMENTS
from sambalm.pretrain.planner import communication
from sambalm.pretrain.planner.communication import ReducedGroup, reduced_groups, step_transfers
from sambalm.pretrain.planner.hardware import (
    DEVICES,
    FUSED_SHARE,
    HOST_SUBLAYER_S,
    KERNEL_GAPS_S,
    LINK_SHARE,
)
from sambalm.pretrain.planner.kernels import TORCH_ON_CPU, KernelNames, planned_kernels
from sambalm.pretrain.planner.memory import chunks_in_flight, stage_memories
from sambalm.pretrain.planner.search import GIB, USABLE_SHARE, describe_run, find_plans, plan_of
from sambalm.pretrain.planner.sizes import stage_chunks, stage_parameters
from sambalm.pretrain.planner.time import bandwidth, exposed_s
from sambalm.pretrain.precision import DTYPES
from tests.support.marks import slow_except
from tests.support.plan_counters import HandedBytes, LiveBytes
from tests.support.worlds import run_world

CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(*, parallel: dict | None = None, train: dict | None = None, **model) -> RunConfig:
    values = {
        "format_version": 1,
        "run": {"dir": "unused"},
        "model": {
            "pattern": "M-*-",
            "hidden_size": 64,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "mlp_size": 96,
            "window": 16,
            "vocab_size": 2048,
        }
        | model,
        "data": {"train": "unused", "sequence_length": 192},
        "train": {"steps": 2, "global_batch_tokens": 4 * 192, "micro_batch_size": 2, "precision": "bf16"}
        | (train or {}),
        "optimizer": {"peak_lr": 1e-3},
        "parallel": parallel or {},
    }
    return parse_config(values, source="test")


def counted_activations(config: RunConfig) -> tuple[int, int]:
    """Bytes that a real forward leaves for its backward, and at most during both."""
    recompute = config.parallel.recompute
    model = Samba(
        config.model,
        kernels=TORCH_KERNELS.recomputing() if recompute == "selective" else TORCH_KERNELS,
        dtype=DTYPES[config.train.precision],
        recompute_layers=recompute == "full",
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_size, config.data.sequence_length))
    with LiveBytes() as live:
        live.leave_out([*model.parameters(), *(parameter.grad for parameter in model.parameters()), tokens])
        loss = model(tokens, tokens).mean()
        kept = live.now_bytes
        loss.backward()
    return kept, live.peak_bytes


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "model",
    [
        {"pattern": "M-*- x 2"},
        {"pattern": "M-", "d_state": 8},
        {"pattern": "*-", "num_kv_heads": 4, "window": 200},
        {"pattern": "M*", "num_kv_heads": 1, "mlp_size": 40},
    ],
    ids=lambda model: model["pattern"],
)
def test_activations_are_what_a_real_run_keeps(model, precision, recompute):
    config = config_of(parallel={"recompute": recompute}, train={"precision": precision}, **model)
    kept, peak = counted_activations(config)
    memory, *_ = stage_memories(config, world_size=1, kernels=TORCH_ON_CPU)
    saved = memory.rounded_bytes + memory.saved_bytes  # a model alone keeps no copies of its weights
    assert saved == pytest.approx(kept, rel=0.02)
    assert saved + memory.workspace_bytes == pytest.approx(peak, rel=0.1)


def kept_on_rank(values: dict) -> int:
    """Bytes that the rank's real forward leaves for its backward, without the weights."""
    from sambalm.model.build import build_chunks
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world

    config = RunConfig.model_validate(values)
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        (model,) = build_chunks(
            config.model,
            config.parallel,
            world=world,
            kernels=TORCH_KERNELS,
            dtype=DTYPES[config.train.precision],
            sequence_length=config.data.sequence_length,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        shape = config.train.micro_batch_size, config.data.sequence_length // world.context.size
        tokens = torch.randint(0, 64, shape)
        with LiveBytes() as live:
            live.leave_out([*model.parameters(), tokens])
            loss = model(tokens, tokens).mean()
            kept = live.now_bytes
        loss.backward()  # no rank leaves while another still communicates
    return kept


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("precision", slow_except(["bf16"], ["bf16", "fp32"]))
@pytest.mark.parametrize(
    "parallel",
    slow_except(
        [{"tensor": 2, "sequence": True}, {"context": 4}],
        [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"context": 2}, {"context": 4}],
    ),
    ids=str,
)
def test_activations_of_layouts_are_what_a_real_rank_keeps(parallel, precision, recompute):
    config = config_of(parallel=parallel | {"recompute": recompute}, train={"precision": precision})
    ranks = config.parallel.model_ranks
    kept = max(run_world(kept_on_rank, config.model_dump(), ranks=ranks))
    memory, *_ = stage_memories(config, world_size=ranks, kernels=TORCH_ON_CPU)
    # The buffer for gathered sequences is alive as well.
    gathered = memory.communication_bytes % (4 * 500_000_000)
    assert memory.rounded_bytes + memory.saved_bytes + gathered == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor": 2}, {"tensor": 4}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}],
    ids=str,
)
def test_parameters_are_those_of_the_real_parts(parallel, tied):
    config = config_of(parallel=parallel, tie_embeddings=tied, mlp_size=100)
    tensor = TensorParallel(rank=0, size=config.parallel.tensor, copy_groups={2: None})
    for stage, parts in enumerate(stage_chunks(config)):
        with torch.device("meta"):
            modules = [Samba(config.model, layers=part, tp=tensor) for part in parts]
        count = sum(p.numel() for module in modules for p in module.parameters())
        assert stage_parameters(config, stage) == count


def states_on_rank(values: dict) -> tuple[int, int, int]:
    """Live bytes before a step, between a step's micro-batches and after it, without DeepSpeed's bucket."""
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.micro_batch import MicroBatch
    from sambalm.pretrain.training import build_training

    config, counts = RunConfig.model_validate(values), []

    def count(*_) -> None:
        gc.collect()
        counts.append(live.now_bytes % (4 * 500_000_000))

    with start_world(config.parallel) as world, LiveBytes() as live:
        training = build_training(config, world=world, checkpoint=None)
        training.chunks[0].register_forward_pre_hook(count)
        tokens = torch.randint(0, 64, (config.train.micro_batch_size, config.data.sequence_length))
        micro_batches = config.accumulation_steps(data_size=world.data_size)
        training.executor.train_step([MicroBatch(tokens, tokens)] * micro_batches)
        count()
    return counts[0], counts[1], counts[2]


STATES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2)]


@pytest.mark.parametrize(("stage", "ranks"), slow_except([], STATES, long=[(1, 1), (2, 1), (2, 2), (3, 1)]))
def test_states_are_what_deepspeed_holds(stage, ranks):
    # Large enough that ZeRO-3 does not keep most tensors for being small.
    train = {"global_batch_tokens": 2 * 2 * ranks * 192}
    config = config_of(
        parallel={"zero_stage": stage}, train=train, pattern="M-*- x 2", hidden_size=256, mlp_size=512, vocab_size=4096
    )
    memory, *_ = stage_memories(config, world_size=ranks, kernels=TORCH_ON_CPU)
    for before, between, after in run_world(states_on_rank, config.model_dump(), ranks=ranks):
        shares = memory.optimizer_bytes // 3
        gathered = memory.weights_bytes - shares if stage == 3 else 0
        # Before the first gradient: stage 1 has room for all, and rounded weights; a rank alone and stage 2 have none,
        # stage 3 has its partition of them and nothing gathered.
        flat = memory.gradients_bytes + memory.rounded_bytes if ranks > 1 else 0
        persistent = {1: memory.weights_bytes + flat, 2: memory.weights_bytes, 3: 2 * shares}[stage]
        assert before == pytest.approx(persistent + memory.optimizer_bytes, rel=0.1)
        assert between <= memory.state_bytes * 1.1
        assert after <= memory.state_bytes * 1.1
        if stage < 3:
            assert between == pytest.approx(memory.state_bytes, rel=0.1)
        else:
            assert memory.state_bytes - gathered <= between * 1.1


LAYOUTS = [
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 2}),
    (2, {"zero_stage": 3}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (4, {"tensor": 4}),
    (4, {"tensor": 2, "zero_stage": 2}),
    (2, {"context": 2}),
    (2, {"context": 2, "recompute": "full"}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
]


def handed_on_rank(values: dict) -> tuple[int, Counter]:
    """The rank's pipeline stage, and what it hands over in its second step."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.micro_batch import MicroBatch
    from sambalm.pretrain.training import build_training

    config = RunConfig.model_validate(values)
    with start_world(config.parallel, copies=weight_copies(config.model, tensor_ranks=config.parallel.tensor)) as world:
        training = build_training(config, world=world, checkpoint=None)
        shape = config.train.micro_batch_size, config.data.sequence_length // world.context.size
        tokens = torch.randint(0, 64, shape)
        micro_batches = [MicroBatch(tokens, tokens)] * config.accumulation_steps(data_size=world.data_size)
        training.executor.train_step(micro_batches)
        with HandedBytes() as handed:
            training.executor.train_step(micro_batches)
    return world.pipeline.rank, handed.by_operation


# In `make test` TP2 + SP and PP2.
@pytest.mark.parametrize(("ranks", "parallel"), slow_except([LAYOUTS[4], LAYOUTS[10]], LAYOUTS), ids=str)
def test_communication_is_what_a_real_step_hands_over(ranks, parallel):
    config = config_of(parallel=parallel, hidden_size=128, mlp_size=256, vocab_size=1024)
    found: dict[int, Counter] = {}
    for stage, handed in run_world(handed_on_rank, config.model_dump(), ranks=ranks):
        found[stage] = found.get(stage, Counter()) | handed  # of the rank that hands over most
    for stage, counted in found.items():
        expected: Counter = Counter()
        for transfer in step_transfers(config, stage=stage, world_size=ranks):
            expected[transfer.operation] += transfer.handed_bytes
        assert expected == pytest.approx(+counted, rel=0.01)


def test_weights_that_zero_3_may_not_keep_are_gathered_again(monkeypatch):
    """For the backward of each micro-batch: what is beyond DeepSpeed's limit of live parameters."""
    config = config_of(parallel={"zero_stage": 3}, train={"global_batch_tokens": 12 * 192})  # 3 micro-batches
    whole = stage_parameters(config, 0)

    def gathered_bytes(max_live):
        monkeypatch.setattr(communication, "MAX_LIVE_PARAMETERS", max_live)
        (sent,) = [each for each in step_transfers(config, stage=0, world_size=2) if each.operation == "all-gather"]
        return sent.handed_bytes

    assert gathered_bytes(whole - 1000) - gathered_bytes(whole) == 3 * 1000 * 4 / 2  # half from this rank
    assert gathered_bytes(whole) == gathered_bytes(10**9)


OLD = KernelNames("mamba-ssm", "torch", "torch-flash", "torch", "torch")
NEW = KernelNames("cuda", "causal-conv1d", "cudnn", "compiled", "compiled")
EAGER, TP2_SP = "train.cuda_graphs=false", ("parallel.tensor=2", "parallel.sequence=true")


@dataclass(frozen=True)
class Measured:
    """A run of docs/planning.md."""

    tokens_per_s: float
    peak_gib: float | None  # where today's code has the same
    kernels: KernelNames = OLD
    device: str = "h200"
    ranks: int = 2
    batch_tokens: int = 65_536
    micro_batch: int = 4
    settings: tuple[str, ...] = ()
    config: str = "samba_421m"


MEASURED = {
    "DP2, ZeRO-1": Measured(160_100, None),
    "DP2, ZeRO-3": Measured(131_700, 30.2, settings=("parallel.zero_stage=3",)),
    "CP2": Measured(11_000, None, replace(OLD, scan="torch"), settings=("parallel.context=2", EAGER)),
    "4 x 4096": Measured(167_216, 19.5, NEW, "h100", 1, 16_384),
    "8 x 4096": Measured(170_927, 33.4, replace(NEW, conv="cuda"), "h100", 1, 32_768, 8),
    "recompute full": Measured(
        124_759, 9.6, replace(NEW, conv="cuda"), "h100", 1, settings=("parallel.recompute=full",)
    ),
    "1.3B, 4 x 4096": Measured(58_298, 46.2, NEW, "h100", 1, 16_384, config="samba_1.3b"),
    "1.3B, 4 times 4 x 4096": Measured(60_119, 51.2, NEW, "h100", 1, config="samba_1.3b"),
    "3.8B, recompute full": Measured(
        15_814, 61.8, NEW, "h100", 1, 16_384, 2, settings=("parallel.recompute=full",), config="samba_3.8b"
    ),
    "DP2, ZeRO-1, H100": Measured(324_540, 18.9, NEW, "h100"),
    "DP2, ZeRO-1, H100, one micro-batch": Measured(317_138, 18.9, NEW, "h100", batch_tokens=32_768),
    "1.3B, DP2, ZeRO-1, H100": Measured(115_614, 44.0, NEW, "h100", config="samba_1.3b"),
    "1.3B, DP2, ZeRO-1, H100, 8 x 4096": Measured(117_324, 72.7, NEW, "h100", micro_batch=8, config="samba_1.3b"),
    "DP4, ZeRO-1, H100": Measured(648_655, 17.8, NEW, "h100", ranks=4, batch_tokens=131_072),
    "DP2, ZeRO-3, H100": Measured(116_130, 22.2, NEW, "h100", settings=("parallel.zero_stage=3",)),
    "PP2, H100": Measured(259_806, 19.0, NEW, "h100", settings=("parallel.pipeline=2",)),
    "TP2 + SP, H100": Measured(239_369, 11.2, NEW, "h100", settings=TP2_SP),
    "TP2 + SP, H100, kernel by kernel": Measured(124_925, 11.1, NEW, "h100", settings=(*TP2_SP, EAGER)),
    "CP2, H100": Measured(248_302, 11.9, NEW, "h100", settings=("parallel.context=2",)),
    "CP2, H100, packed, kernel by kernel": Measured(
        139_843, None, NEW, "h100", settings=("parallel.context=2", "data.reset_at_document=true", EAGER)
    ),
    "1 x 4096": Measured(134_986, 9.1, NEW, "h100", 1, 4_096, 1),
    "1 x 4096, kernel by kernel": Measured(57_902, 9.1, NEW, "h100", 1, 4_096, 1, (EAGER,)),
    "4 times 4 x 4096, H200": Measured(178_654, 21.1, NEW, ranks=1),
    "1.3B, 4 times 4 x 4096, H200": Measured(62_398, 51.2, NEW, ranks=1, config="samba_1.3b"),
    "3.8B, 4 x 4096, H200": Measured(22_339, 114.2, NEW, ranks=1, batch_tokens=16_384, config="samba_3.8b"),
    **{
        f"{name}, H200, {precision}": Measured(
            tokens_per_s,
            gib,
            NEW,
            ranks=1,
            batch_tokens=16_384,
            settings=(f"train.matmul_precision={precision}",),
            config=name,
        )
        for name, gib, *speeds in (
            ("samba_421m", 19.5, 174_126, 200_686),
            ("samba_1.3b", 46.2, 61_723, 79_408),
            ("samba_1.7b", 62.0, 47_391, 59_675),
            ("samba_3.8b", 114.2, 22_045, 29_655),
        )
        for precision, tokens_per_s in zip(("null", "fp8"), speeds, strict=True)
    },
    "DP4, ZeRO-1, H200": Measured(663_787, None, NEW, ranks=4, batch_tokens=131_072),
    "DP2 x TP2 + SP, H200": Measured(485_739, None, NEW, ranks=4, batch_tokens=131_072, settings=TP2_SP),
}


@pytest.mark.parametrize("name", MEASURED)
def test_an_estimate_is_near_the_measured_step(name):
    run = MEASURED[name]
    batch = [f"train.global_batch_tokens={run.batch_tokens}", f"train.micro_batch_size={run.micro_batch}"]
    config = load_config(CONFIGS / f"{run.config}.yaml", [*batch, "parallel.tensor=1", *run.settings])
    plan = plan_of(config, world_size=run.ranks, hardware=DEVICES[run.device], kernels=run.kernels)
    assert plan.tokens_per_s == pytest.approx(run.tokens_per_s, rel=0.25)
    if run.peak_gib:
        assert plan.memory.total_bytes / GIB == pytest.approx(run.peak_gib, rel=0.06)


@pytest.mark.parametrize("name", ["samba_421m", "samba_1.3b", "samba_1.7b", "samba_3.8b"])
def test_fp8_is_expected_to_save_what_it_saved(name):
    estimated, measured = [], []
    for precision in ("null", "fp8"):
        run = MEASURED[f"{name}, H200, {precision}"]
        settings = ("train.global_batch_tokens=16384", "train.micro_batch_size=4", *run.settings)
        config = load_config(CONFIGS / f"{name}.yaml", settings)
        estimated.append(plan_of(config, world_size=1, hardware=DEVICES["h200"], kernels=NEW).tokens_per_s)
        measured.append(run.tokens_per_s)
    assert estimated[1] / estimated[0] == pytest.approx(measured[1] / measured[0], rel=0.03)


def test_fp8_is_planned_where_it_runs():
    config = load_config(CONFIGS / "samba_1.3b.yaml", ["train.matmul_precision=fp8"])
    with pytest.raises(ConfigError, match="no a100 has"):
        find_plans(config, world_size=8, memory_gib=80, hardware=DEVICES["a100"])
    plans = find_plans(config, world_size=8, memory_gib=80, hardware=DEVICES["h100"])
    assert {plan.config.parallel.zero_stage for plan in plans} == {1}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", ["M-*-", "M-*- x 6"])
def test_gradients_are_reduced_in_the_buckets_of_a_run(pattern, tied, tensor):
    config = config_of(parallel={"tensor": tensor}, tie_embeddings=tied, mlp_size=100, pattern=pattern)
    groups = reduced_groups(config)
    assert sum(group.elements for group in groups) == stage_parameters(config, 0)
    copies = weight_copies(config.model, tensor_ranks=tensor)  # four ranks hold each of two kv heads twice
    with torch.device("meta"):
        model = Samba(config.model, tp=TensorParallel(rank=0, size=tensor, copy_groups={copies: None}))
    buckets = gradient_buckets([model], max_elements=BUCKET_ELEMENTS)
    assert groups == tuple(
        ReducedGroup(sum(each.numel() for each in bucket.parameters), bucket.completed_by is not None)
        for bucket in buckets
    )


def test_the_last_backward_hides_all_of_the_reduction_but_its_end():
    groups = [ReducedGroup(40, True), ReducedGroup(40, True), ReducedGroup(20, False)]
    exposed = partial(exposed_s, groups)
    # What the backward's end completes.
    assert exposed(sent_s=[0.3, 0.4, 0.2], computed_s=100.0) == pytest.approx(0.4 + 0.2)
    assert exposed(sent_s=[30, 40, 20], computed_s=1.0) == pytest.approx(90 - 0.5)  # it starts half-way


@pytest.mark.parametrize(
    ("parallel", "overlaps"),
    [({}, True), ({"tensor": 2}, True), ({"context": 2}, True), ({"zero_stage": 2}, False), ({"pipeline": 2}, False)],
    ids=str,
)
def test_a_plan_hides_messages_where_a_run_does(parallel, overlaps):
    settings = [f"parallel.{key}={value}" for key, value in parallel.items()]
    config = load_config(CONFIGS / "samba_1.3b.yaml", ["train.global_batch_tokens=131072", *settings])
    # So slow that what is moved in memory adds less than the backward hides.
    rate = 40e9
    plan = plan_of(config, world_size=4, hardware=replace(DEVICES["h100"], node_bytes_per_s=rate / LINK_SHARE))
    sent = [
        transfer.wire_bytes
        for transfer in step_transfers(config, stage=0, world_size=4)
        if transfer.dimension == "data"
    ]
    if overlaps:  # less than gradients or weights alone
        assert plan.time.zero_s < min(sent) / rate
    else:
        assert plan.time.zero_s >= sum(sent) / rate


def test_a_plan_counts_with_what_a_model_falls_back_to():
    usual = KernelNames("cuda", "cuda", "flex", "compiled", "compiled")
    assert planned_kernels(config_of()) == usual
    large = planned_kernels(config_of(d_state=65, d_conv=12))
    assert large == replace(usual, scan="torch", conv="torch")
    assert planned_kernels(config_of(train={"precision": "fp32"})) == replace(usual, attention="torch")


def test_plans_fit_and_are_sorted_and_allowed():
    config = load_config(CONFIGS / "samba_1.3b.yaml")
    plans = find_plans(config, world_size=8, memory_gib=80, hardware=DEVICES["h100"])
    assert len(plans) > 10
    steps = [plan.time.total_s for plan in plans]
    assert steps == sorted(steps)
    for plan in plans:
        plan.config.check_world(8)
        parse_config(copy.deepcopy(plan.config.model_dump()), source="plan")
        assert plan.memory.total_bytes <= 80 * GIB * USABLE_SHARE
    assert len({plan.config.parallel for plan in plans}) == len(plans)
    for top in (1, 7):
        assert find_plans(config, world_size=8, memory_gib=80, hardware=DEVICES["h100"], top=top) == plans[:top]


def test_a_layout_names_zero_only_where_ranks_share_their_weights():
    names = {
        ("ZeRO-3", 2): {"zero_stage": 3},
        ("no ZeRO", 1): {"zero_stage": 3},
        ("TP2 no ZeRO", 2): {"tensor": 2},
        ("TP2 PP2 no ZeRO", 4): {"tensor": 2, "pipeline": 2},
        ("CP2 ZeRO-1", 2): {"context": 2},
    }
    for (name, ranks), parallel in names.items():
        assert layout_name(config_of(parallel=parallel).parallel, world_size=ranks) == name


def test_one_rank_has_one_layout_whatever_the_stage():
    (plan,) = find_plans(config_of(), world_size=1, memory_gib=80, hardware=DEVICES["h100"])
    assert plan.layout == "no ZeRO"


def test_too_small_a_cluster_is_one_sentence():
    config = load_config(CONFIGS / "samba_3.8b.yaml")
    with pytest.raises(ConfigError, match=r"no layout of 8 GPUs fits 8 GiB.*the smallest, TP8"):
        find_plans(config, world_size=8, memory_gib=8, hardware=DEVICES["h100"])
    with pytest.raises(ConfigError, match="no layout of 7 GPUs can take"):
        find_plans(config, world_size=7, memory_gib=80, hardware=DEVICES["h100"])


def test_the_slowest_stage_decides():
    even = config_of(parallel={"pipeline": 2, "pipeline_layers": [2, 2]})
    uneven = config_of(parallel={"pipeline": 2, "pipeline_layers": [3, 1]})
    times = [plan_of(config, world_size=2, hardware=DEVICES["h100"]).time for config in (even, uneven)]
    assert times[1].compute_s > times[0].compute_s
    launched_s = times[0].compute_s + times[0].layout_s + times[0].idle_s
    assert times[0].bubble_s == pytest.approx(launched_s / 2)  # 2 stages, 2 micro-batches


def test_a_stage_has_no_more_forwards_in_flight_than_micro_batches():
    config = config_of(parallel={"pipeline": 4})  # 2 micro-batches
    assert [len(chunks_in_flight(config, stage=stage, world_size=4)) for stage in range(4)] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("parallel", "world_size", "rates"),
    [
        # 4 ranks of a node; 4 that are 4 apart, of which a node has two; 2 that are 16 apart.
        ({"tensor": 4, "pipeline": 2}, 32, {"tensor": 450e9, "data": 2 * 50e9, "pipeline": 50e9}),
        # 4 stages that are 4 apart: a node has two, each of which sends by its own adapter.
        ({"pipeline": 4}, 16, {"pipeline": 50e9, "data": 450e9}),
        ({"tensor": 2, "context": 4}, 8, {"tensor": 450e9, "context": 450e9, "data": 450e9}),
    ],
    ids=str,
)
def test_groups_beyond_a_node_send_through_the_adapters_of_their_members_there(parallel, world_size, rates):
    config = config_of(parallel=parallel, train={"global_batch_tokens": 64 * 192}, tie_embeddings=False)
    for transfer in (sent := step_transfers(config, stage=0, world_size=world_size)):
        rate = bandwidth(config, transfer, world_size=world_size, hardware=DEVICES["h100"])
        assert rate == rates[transfer.dimension], transfer
    assert {transfer.dimension for transfer in sent} == rates.keys()


def test_virtual_stages_divide_the_bubble():
    once, twice = (
        plan_of(
            config_of(parallel={"pipeline": 2, "virtual_pipeline": chunks}), world_size=2, hardware=DEVICES["h100"]
        ).time
        for chunks in (1, 2)
    )
    for time, chunks in ((once, 1), (twice, 2)):
        launched_s = time.compute_s + time.layout_s + time.idle_s
        assert time.bubble_s == pytest.approx(launched_s / 2 / chunks)  # 2 stages, 2 micro-batches


@pytest.mark.parametrize("parallel", [{}, {"zero_stage": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_a_step_is_all_of_its_parts(parallel):
    time = plan_of(config_of(parallel=parallel), world_size=2, hardware=DEVICES["h100"]).time
    parts = asdict(time)
    assert parts.keys() == {"compute_s", "layout_s", "bubble_s", "zero_s", "optimizer_s", "idle_s"}
    assert time.total_s == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize(
    ("ranks", "parallel", "bytes_a_parameter"),
    [
        # In fp32: the gradient for its norm; gradient, weight and moments read, all but the gradient written.
        (1, {}, 4 + 4 * 4 + 3 * 4),
        (2, {"tensor": 2}, 4 + 4 * 4 + 3 * 4),
        # Of half of them: also what is divided by the ranks, and the new weights, read and rounded.
        (2, {}, (8 + 4 + 4 * 4 + 3 * 4 + 6) / 2),
    ],
    ids=str,
)
def test_the_optimizer_takes_what_it_moves(ranks, parallel, bytes_a_parameter):
    config = config_of(parallel=parallel)
    plan = plan_of(config, world_size=ranks, hardware=DEVICES["h100"])
    (stage,) = stage_chunks(config)
    tensor = TensorParallel(rank=0, size=config.parallel.tensor, copy_groups={2: None})
    with torch.device("meta"):
        parameters = sum(p.numel() for part in stage for p in Samba(config.model, layers=part, tp=tensor).parameters())
    assert plan.time.optimizer_s == pytest.approx(parameters * bytes_a_parameter / (3.0e12 * FUSED_SHARE))


def test_what_sequence_parallelism_gathers_has_a_buffer():
    cut, whole = (
        stage_memories(config_of(parallel={"tensor": 2, "sequence": cut}), world_size=2, kernels=TORCH_ON_CPU)[0]
        for cut in (True, False)
    )
    assert cut.communication_bytes == 2 * 192 * 64 * 2  # 2 sequences of 192 tokens, 64 wide, in bf16
    assert whole.communication_bytes == 0
    for memory in (cut, whole):
        assert replace(memory, communication_bytes=memory.communication_bytes + 8).total_bytes == memory.total_bytes + 8


def test_a_device_waits_between_kernels_or_for_the_host():
    plans = [
        plan_of(config_of(train={"cuda_graphs": graphs}), world_size=1, hardware=DEVICES["h100"])
        for graphs in (True, False)
    ]
    captured, launched = [plan.time for plan in plans]
    assert captured.idle_s == pytest.approx(2 * 4 * KERNEL_GAPS_S)  # 2 micro-batches of 4 sublayers
    assert launched.compute_s + launched.idle_s == pytest.approx(2 * 4 * HOST_SUBLAYER_S)


def test_layouts_that_a_named_kernel_refuses_are_not_offered():
    config = load_config(CONFIGS / "samba_421m.yaml", ["kernels={scan: mamba-ssm}"])
    settings = {"world_size": 2, "memory_gib": 80, "hardware": DEVICES["h100"]}
    assert {plan.config.parallel.context for plan in find_plans(config, **settings)} == {1}
    config = config.model_copy(update={"kernels": config.kernels.model_copy(update={"scan": "auto"})})
    assert {plan.config.parallel.context for plan in find_plans(config, **settings)} == {1, 2}


def test_dry_run_checks_thousands_of_ranks_without_data():
    config = str(CONFIGS / "samba_3.8b.yaml")
    options = ["--dry-run", "--world-size", "8192", "parallel.tensor=4", "parallel.pipeline=4"]
    result = CliRunner().invoke(app, ["train", config, *options])
    assert result.exit_code == 0
    assert result.output.startswith("8,192 ranks: DP512 TP4 PP4 ZeRO-1, recompute none; 2 micro-batches of 2 a step; ")
    assert result.output.strip().endswith(
        "on GPUs scan=cuda conv=cuda attention=flex norm=compiled elementwise=compiled"
    )
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "samba_3.8b.yaml", "--dry-run", "--world-size", "64"],
        ["plan", "samba_421m.yaml", "--gpus", "2", "--gpu-memory-gib", "80"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_estimates_do_not_wait_for_what_only_training_needs(arguments):
    """megatron-core and DeepSpeed take seconds to import."""
    command, config, *options = arguments
    code = f"""
import sys
from sambalm.pretrain.cli import app
app({[command, str(CONFIGS / config), *options]!r}, standalone_mode=False)
assert not {{"megatron", "deepspeed", "transformers"}} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_dry_run_refuses_what_a_run_would():
    config = load_config(CONFIGS / "samba_3.8b.yaml")
    with pytest.raises(ConfigError, match="is not a multiple of"):
        describe_run(config, world_size=8192)
    result = CliRunner().invoke(app, ["train", str(CONFIGS / "demo.yaml"), "--world-size", "2"])
    assert result.exit_code == 2
