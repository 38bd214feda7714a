"""The attention calls that a run is built for, against those that its layers make."""

from dataclasses import replace

import pytest
import torch

from sambalm.model.config import ModelConfig
from sambalm.model.kernel_requirements import kernel_requirements
from sambalm.model.ops.implementations import AttentionCall
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.samba import Samba
from sambalm.parallel.config import ParallelConfig
from tests.support.worlds import run_world

BATCH = 2


def calls_on_rank(parallel, window, length):
    """The calls that are foreseen, and those that a model makes."""
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.sharding import initialize_parameters

    config = ModelConfig(
        pattern="M-*", hidden_size=24, num_query_heads=6, num_kv_heads=2, mlp_size=16, window=window, vocab_size=32
    )
    made = []

    def attention(q, k, v, *, window, documents):
        (batch, heads, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
        made.append(AttentionCall(batch, heads, kv_heads, queries, keys, head_dim, window))
        return TORCH_KERNELS.attention(q, k, v, window=window, documents=documents)

    parallel = ParallelConfig(**parallel)
    with start_world(parallel, copies=weight_copies(config, tensor_ranks=parallel.tensor)) as world:
        kernels = replace(TORCH_KERNELS, attention=attention)
        model = Samba(config, tp=world.tensor, cp=world.context, kernels=kernels)
        initialize_parameters(model, seed=0)
        tokens = world.context.part(torch.zeros(BATCH, length, dtype=torch.int64))
        model(tokens, tokens).mean().backward()
        requirements = kernel_requirements(
            config,
            device="cpu",
            precision="fp32",
            micro_batch_size=BATCH,
            sequence_length=length,
            resets=False,
            tensor=world.tensor,
            context=world.context,
        )
    return list(requirements.attention_calls), made


@pytest.mark.parametrize("window", [1, 2, 8, 100])
@pytest.mark.parametrize(
    "parallel", [{}, {"context": 2}, {"context": 3}, {"tensor": 2}, {"tensor": 2, "context": 2}], ids=str
)
def test_the_layers_make_the_calls_that_are_foreseen(parallel, window):
    ranks = parallel.get("tensor", 1) * parallel.get("context", 1)
    for foreseen, made in run_world(calls_on_rank, parallel, window, 48, ranks=ranks):
        assert made == foreseen
        assert made


def test_a_model_without_attention_makes_no_calls():
    config = ModelConfig(
        pattern="M-", hidden_size=24, num_query_heads=6, num_kv_heads=2, mlp_size=16, window=8, vocab_size=32
    )
    sizes = {"micro_batch_size": 1, "sequence_length": 8, "resets": True}
    assert kernel_requirements(config, device="cpu", precision="fp32", **sizes).attention_calls == ()
