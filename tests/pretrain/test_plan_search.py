"""Which layouts a plan offers, in which order, and what it refuses."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sambalm.parallel.config import layout_name
from sambalm.pretrain.cli.app import app
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import DEVICES
from sambalm.pretrain.planner.kernels import KernelNames, planned_kernels
from sambalm.pretrain.planner.search import GIB, USABLE_SHARE, describe_run, find_plans
from tests.support.planned_runs import config_of

CONFIGS = Path(__file__).parents[2] / "configs"


def test_fp8_is_planned_where_it_runs():
    config = load_config(CONFIGS / "samba_1.3b.yaml", ["train.matmul_precision=fp8"])
    with pytest.raises(ConfigError, match="no a100 has"):
        find_plans(config, world_size=8, memory_gib=80, hardware=DEVICES["a100"])
    plans = find_plans(config, world_size=8, memory_gib=80, hardware=DEVICES["h100"])
    assert {plan.config.parallel.zero_stage for plan in plans} == {1, 2}


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
from sambalm.pretrain.cli.app import app
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
