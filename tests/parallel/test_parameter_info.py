"""What is attached to parameters: one info, made with them, readable without anything heavier than torch."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sambalm.model.config import ModelConfig
from sambalm.model.registry import weight_copies
from sambalm.model.samba import Samba
from sambalm.parallel.groups import TensorParallel
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero import parameter_info
from sambalm.parallel.zero.parameter_info import ParameterInfo, attach_info, find_info, info_of
from sambalm.pretrain.gradient_buckets import gradient_buckets
from tests.support.layout_runs import MODEL, batches, run_values
from tests.support.worlds import run_world


def modules_of(source: str) -> set[str]:
    """Packages that a file imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or alias.name for node in nodes for alias in node.names]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names


def test_reading_an_info_takes_torch_alone():
    assert modules_of(Path(parameter_info.__file__).read_text(encoding="utf-8")) == {"torch"}
    assert modules_of("import os, deepspeed.comm\nfrom megatron.core import x") == {"deepspeed", "megatron"}


def test_a_parameter_of_others_has_no_info_and_is_refused():
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert find_info(parameter) is None
    with pytest.raises(TypeError, match=r"shape \(2, 3\) was not made by sharded_parameter"):
        info_of(parameter)
    info = ParameterInfo((), owned=True, matmul_only=False, weight_decay=True)
    attach_info(parameter, info)
    assert info_of(parameter) is find_info(parameter) is info


def test_matrices_decay_but_for_mambas_rates():
    with torch.device("meta"):
        model = Samba(ModelConfig(**MODEL))
    names = {parameter: name for name, parameter in model.named_parameters()}
    *decayed, rest = gradient_buckets([model])
    assert all(bucket.weight_decay for bucket in decayed)
    assert not rest.weight_decay
    assert {names[p] for p in rest.parameters if p.dim() > 1} == {"layers.0.mixer.A_log", "layers.4.mixer.A_log"}
    assert {p.dim() for bucket in decayed for p in bucket.parameters} == {2}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_tensor_parallel_rank_owns_each_number(ranks):
    """Of all that ranks hold, copies included: what two own counts twice in the norm and is saved twice."""
    sizes = {name: {"num_heads": 5} for name in ("gated_deltanet", "kimi_delta", "gla", "retnet")}
    sizes["mamba2"] = {"head_dim": 6, "groups": 4}
    config = ModelConfig(**MODEL | {"pattern": "M*-GKARSUFX", "mixers": sizes})
    copies = weight_copies(config, tensor_ranks=ranks)
    owned: dict[str, list[int]] = {}
    for rank in range(ranks):
        with torch.device("meta"):
            model = Samba(config, tp=TensorParallel(rank=rank, size=ranks, copy_groups={copies: None}))
        for name, parameter, piece in canonical_slices(model):
            numbers = math.prod(piece.sizes) if info_of(parameter).owned else 0
            owned.setdefault(name, [math.prod(piece.shape)]).append(numbers)
    assert {n: sum(held) for n, (_, *held) in owned.items()} == {n: whole for n, (whole, *_) in owned.items()}


def attributes_on_rank(values: dict) -> set[str]:
    """What parameters have besides torch's own after a step."""
    from sambalm.parallel.groups import start_world
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    with start_world(config.parallel) as world:
        training = build_training(config, world=world, checkpoint=None)
        training.executor.train_step(batches(0, config=config, world=world))
        return {name for parameter in training.chunks[0].parameters() for name in vars(parameter)}


def test_the_product_attaches_nothing_else():
    (attributes,) = run_world(attributes_on_rank, run_values(precision="bf16"), ranks=1)
    assert attributes == {"sambalm_info"}
