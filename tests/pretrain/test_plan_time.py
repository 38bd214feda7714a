"""The seconds of a plan: near those of measured runs, and the sum of what each part takes by itself."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sambalm.model.samba import Samba
from sambalm.parallel.groups import TensorParallel
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.planner.buckets import ReducedGroup
from sambalm.pretrain.planner.communication import step_transfers
from sambalm.pretrain.planner.hardware import DEVICES, FUSED_SHARE, HOST_SUBLAYER_S, KERNEL_GAPS_S, LINK_SHARE
from sambalm.pretrain.planner.kernels import KernelNames
from sambalm.pretrain.planner.search import GIB, plan_of
from sambalm.pretrain.planner.sizes import stage_chunks
from sambalm.pretrain.planner.time import bandwidth, exposed_s
from tests.support.planned_runs import config_of

CONFIGS = Path(__file__).parents[2] / "configs"
OLD = KernelNames("mamba-ssm", "torch", "torch-flash", "torch", "torch")
NEW = KernelNames("cuda", "causal-conv1d", "cudnn", "compiled", "compiled")
CUDA = replace(NEW, conv="cuda")
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
    "PP2, H100": Measured(259_806, 19.0, NEW, "h100", settings=("parallel.pipeline=2",)),
    "TP2 + SP, H100": Measured(239_369, 11.2, NEW, "h100", settings=TP2_SP),
    "TP2 + SP, H100, kernel by kernel": Measured(124_925, 11.1, NEW, "h100", settings=(*TP2_SP, EAGER)),
    "CP2, H100": Measured(248_302, 11.9, NEW, "h100", settings=("parallel.context=2",)),
    "CP2, H100, packed, kernel by kernel": Measured(
        139_843, None, NEW, "h100", settings=("parallel.context=2", "data.reset_at_document=true", EAGER)
    ),
    "DP2, ZeRO-1, H200": Measured(347_667, 18.9, CUDA),
    "DP2, ZeRO-2, H200": Measured(338_869, 18.5, CUDA, settings=("parallel.zero_stage=2",)),
    "DP2, ZeRO-2, H200, fp8": Measured(
        399_997, 18.5, CUDA, settings=("parallel.zero_stage=2", "train.matmul_precision=fp8")
    ),
    "DP2, ZeRO-3, H200": Measured(336_723, 18.3, CUDA, settings=("parallel.zero_stage=3",)),
    "PP2, H200": Measured(288_931, 19.1, CUDA, settings=("parallel.pipeline=2",)),
    "PP2 x VPP2, H200": Measured(312_511, 20.8, CUDA, settings=("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "PP2, H200, 32 micro-batches": Measured(
        316_920, 19.1, CUDA, batch_tokens=524_288, settings=("parallel.pipeline=2",)
    ),
    "TP2 + SP, H200": Measured(252_050, None, CUDA, settings=TP2_SP),
    "CP2, H200": Measured(260_085, None, CUDA, settings=("parallel.context=2",)),
    "CP2, H200, packed": Measured(
        264_009,
        None,
        replace(CUDA, attention="flex"),
        settings=("parallel.context=2", "data.reset_at_document=true"),
    ),
    "DP2, ZeRO-1, H200, fp8": Measured(391_358, None, CUDA, settings=("train.matmul_precision=fp8",)),
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
    assert plan.tokens_per_s == pytest.approx(run.tokens_per_s, rel=0.16)
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


def test_the_last_backward_hides_all_of_the_reduction_but_its_end():
    groups = [ReducedGroup(40, True), ReducedGroup(40, True), ReducedGroup(20, False)]
    exposed = partial(exposed_s, groups)
    # What the backward's end completes.
    assert exposed(sent_s=[0.3, 0.4, 0.2], computed_s=100.0) == pytest.approx(0.4 + 0.2)
    assert exposed(sent_s=[30, 40, 20], computed_s=1.0) == pytest.approx(90 - 0.5)  # it starts half-way


@pytest.mark.parametrize(
    ("parallel", "overlaps"),
    [
        ({}, True),
        ({"tensor": 2}, True),
        ({"context": 2}, True),
        ({"zero_stage": 2}, True),
        ({"zero_stage": 3}, True),
        ({"pipeline": 2}, False),
    ],
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


def test_the_slowest_stage_decides():
    even = config_of(parallel={"pipeline": 2, "pipeline_layers": [2, 2]})
    uneven = config_of(parallel={"pipeline": 2, "pipeline_layers": [3, 1]})
    times = [plan_of(config, world_size=2, hardware=DEVICES["h100"]).time for config in (even, uneven)]
    assert times[1].compute_s > times[0].compute_s
    launched_s = times[0].compute_s + times[0].layout_s + times[0].idle_s
    assert times[0].bubble_s == pytest.approx(launched_s / 2)  # 2 stages, 2 micro-batches


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


def test_a_device_waits_between_kernels_or_for_the_host():
    plans = [
        plan_of(config_of(train={"cuda_graphs": graphs}), world_size=1, hardware=DEVICES["h100"])
        for graphs in (True, False)
    ]
    captured, launched = [plan.time for plan in plans]
    assert captured.idle_s == pytest.approx(2 * 4 * KERNEL_GAPS_S)  # 2 micro-batches of 4 sublayers
    assert launched.compute_s + launched.idle_s == pytest.approx(2 * 4 * HOST_SUBLAYER_S)
