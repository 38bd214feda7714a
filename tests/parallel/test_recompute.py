"""Recomputation keeps less for the backward. That gradients stay the same is in test_layouts."""

from types import SimpleNamespace

import pytest
import torch

from sambalm.model.build import build_chunks
from sambalm.model.config import ModelConfig
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import ContextParallel, Pipeline, TensorParallel
from sambalm.parallel.sharding import initialize_parameters
from tests.support.benchmark_files import load_benchmark

memory = load_benchmark("recompute")
CONFIG = ModelConfig(
    pattern="M-*-", hidden_size=64, num_query_heads=4, num_kv_heads=2, mlp_size=96, window=16, vocab_size=8
)


def kept(letter, mode):
    return memory.bytes_per_token(CONFIG, letter, mode, tokens=64, dtype=torch.float32)


@pytest.mark.parametrize("letter", "M-*")
def test_full_recomputation_keeps_a_sublayers_input_alone(letter):
    assert kept(letter, "full") == 4 * CONFIG.hidden_size


def test_selective_recomputation_keeps_the_inputs_of_scan_and_attention():
    assert kept("-", "selective") == kept("-", "none")
    assert kept("*", "selective") < kept("*", "none")
    assert kept("M", "selective") < 0.8 * kept("M", "none")


def test_an_mlp_keeps_what_its_formula_needs():
    """The norm's input, root mean square, their quotient and the output; gate, up, SiLU(gate) and the product."""
    norm = 3 * CONFIG.hidden_size + 1
    assert kept("-", "none") == 4 * (norm + 4 * CONFIG.mlp_size)


def kept_by_a_model(mode, *, evaluated=False):
    world = SimpleNamespace(
        device=torch.device("cpu"), pipeline=Pipeline(), tensor=TensorParallel(), context=ContextParallel()
    )
    parallel, settings = ParallelConfig(recompute=mode), {"dtype": torch.float32, "sequence_length": 64}
    (model,) = build_chunks(CONFIG, parallel, world=world, kernels=TORCH_KERNELS, **settings)
    initialize_parameters(model, seed=0)
    model.train(not evaluated)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    with memory.keeping() as kept:
        loss = model(tokens, tokens).mean()
    assert loss.requires_grad
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)


def test_a_model_keeps_what_its_configuration_says():
    none, selective, full = (kept_by_a_model(mode) for mode in ("none", "selective", "full"))
    assert full < 0.5 * selective < 0.5 * 0.9 * none
    layers = sum(64 * (kept(letter, "none") - kept(letter, "full")) for letter in CONFIG.pattern)
    assert none - full == pytest.approx(layers, rel=0.05)


def test_only_training_recomputes_whole_sublayers():
    assert kept_by_a_model("full", evaluated=True) > 2 * kept_by_a_model("full")
