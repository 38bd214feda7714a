"""Muon for the matrices of layers: torch's steps, the same on every layout, and what stays AdamW's."""

import functools
from typing import Any

import pytest
import torch
from torch import nn

from sambalm.model.config import ModelConfig
from sambalm.model.samba import Samba
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter
from sambalm.parallel.zero.buckets import GradientBucket
from sambalm.parallel.zero.muon import orthogonal
from sambalm.pretrain.check_layout import Steps
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import OptimizerConfig
from tests.support.layout_runs import MODEL, STEPS, run_values, steps_on_rank
from tests.support.marks import slow_except
from tests.support.worlds import run_world

PATTERN = {"pattern": "M-*- x 2", "tie_embeddings": False}
SETTINGS = {"kind": "muon", "peak_lr": 0.02, "weight_decay": 0.3, "momentum": 0.9}


def matrix(rows: int, columns: int, *names: str) -> nn.Parameter:
    """Several matrices that one parameter joins."""
    parameter = sharded_parameter(
        (0, columns), {name: Shard(rows, 0, rows) for name in names}, init=nn.init.zeros_, matmul_only=True
    )
    return nn.init.normal_(parameter)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_singular_values_become_one_and_vectors_stay(shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    found = u.t() @ orthogonal(given) @ v.t()
    assert (found - found.diag().diag()).abs().max() < 1e-4
    assert 0.6 < found.diag().min() <= found.diag().max() < 1.3


@pytest.mark.parametrize(("rows", "columns"), [(12, 8), (8, 12)])
def test_steps_are_torchs_of_each_joined_matrix(rows, columns):
    torch.manual_seed(0)
    joined, vector = matrix(rows, columns, "a.weight", "b.weight"), nn.Parameter(torch.randn(5))
    alone = [nn.Parameter(part.detach().clone()) for part in joined.split(rows)]
    plain = nn.Parameter(vector.detach().clone())
    buckets = [
        GradientBucket((joined,), weight_decay=True, muon=True),
        GradientBucket((vector,), weight_decay=False),
    ]
    ours = OptimizerConfig(**SETTINGS).build(buckets, adamw=torch.optim.AdamW)
    ours.state[joined] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(joined)}
    theirs = torch.optim.Muon(alone, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([plain], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    before = joined.detach().clone()
    for scale in (1.0, 2.0, 4.0):  # AdamW divides by it, and Muon's momentum must
        joined.grad, vector.grad = torch.randn_like(joined), torch.randn_like(vector)
        for part, gradient in zip(alone, joined.grad.split(rows), strict=True):
            part.grad = gradient / scale
        plain.grad = vector.grad / scale
        ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.zeros(())
        for optimizer in (ours, theirs, adamw):
            optimizer.step()
    moved = (joined - before).norm()
    assert (joined - torch.cat(alone)).norm() < 0.02 * moved  # whose products are in bf16
    assert torch.allclose(vector, plain, atol=1e-6)
    assert ours.state[joined].keys() == {"step", "exp_avg"}
    assert ours.state[joined]["step"] == 3


def test_a_skipped_step_leaves_weights_and_momentum():
    weight = matrix(4, 6, "weight")
    optimizer = OptimizerConfig(**SETTINGS).build(
        [GradientBucket((weight,), weight_decay=True, muon=True)], adamw=torch.optim.AdamW
    )
    momentum = torch.randn(4, 6)
    optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg": momentum.clone()}
    before, weight.grad = weight.detach().clone(), torch.full((4, 6), torch.nan)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(torch.nan), torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], momentum)
    assert optimizer.state[weight]["step"] == 0


def test_a_matrix_without_a_gradient_takes_no_step():
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_only_matrices_of_layers_are_muons():
    with torch.device("meta"):
        model = Samba(ModelConfig(**MODEL | PATTERN))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for max_elements in (None, 10_000):
        buckets = gradient_buckets([model], max_elements=max_elements, muon=True)
        found = {names[p] for bucket in buckets if bucket.muon for p in bucket.parameters}
        layer = {"in_proj", "x_proj", "dt_proj", "out_proj"}
        assert {name for name in found if name.startswith("layers.0.")} == {f"layers.0.mixer.{n}.weight" for n in layer}
        assert found == {n for n, p in model.named_parameters() if "_proj" in n and p.dim() == 2}
    assert not any(bucket.muon for bucket in gradient_buckets([model]))


def values(parallel: dict[str, Any] | None = None) -> dict[str, Any]:
    found = run_values(model=PATTERN, parallel=parallel)
    return found | {"optimizer": found["optimizer"] | {"kind": "muon"}}


@functools.cache
def alone() -> Steps:
    (result,) = run_world(steps_on_rank, values(), ranks=1)
    return result


LAYOUTS = {
    "ZeRO-1": (2, {"zero_stage": 1}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
    "PP2": (2, {"pipeline": 2}),
    "DP2xPP2": (4, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
}


@pytest.mark.parametrize("name", slow_except(["ZeRO-1"], LAYOUTS, long=[name for name in LAYOUTS if name != "ZeRO-1"]))
def test_a_layout_trains_like_one_process(name):
    ranks, parallel = LAYOUTS[name]
    for result in run_world(steps_on_rank, values(parallel), STEPS, ranks=ranks):
        assert result.losses == pytest.approx(alone().losses, rel=1e-5)
        assert result.norms == pytest.approx(alone().norms, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parallel": {"tensor": 2}}, "optimizer.kind is muon, which steps whole matrices, and parallel.tensor 2 cuts"),
        (
            {"model": MODEL | {"scaling": "mup", "base": {"mlp_size": 41}}},
            "optimizer.kind is muon and model.scaling is mup",
        ),
    ],
)
def test_what_muon_cannot_do_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_config(values() | changes, source="test")
