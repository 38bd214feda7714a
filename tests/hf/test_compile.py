"""torch.compile takes the whole model as one graph: a forward, its backward, and a step of decoding."""

import pytest
import torch
from transformers import StaticCache

from sambalm.model.hf.modeling_samba import new_cache
from tests.hf.test_modeling import largest_difference, model_of, padded
from tests.support.hf import random_tokens

# Tracing is what graph breaks show in; making kernels of the graph takes a minute more.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend=BACKEND)


@torch.no_grad()
def test_a_forward_with_and_without_padding_is_one_graph():
    model = model_of()
    rows = [random_tokens(1, length, seed=length)[0] for length in (20, 9)]
    tokens, mask = padded(rows, length=20, side="left")
    for options in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(20)[None] % 13}):
        expected = model(tokens, use_cache=False, **options).logits
        real = options.get("attention_mask", torch.ones_like(mask)).bool()
        given = compiled(model)(tokens, use_cache=False, **options).logits
        assert largest_difference(given[real], expected[real]) < 1e-5


def test_a_forward_and_its_backward_are_one_graph():
    model, tokens = model_of().train(), random_tokens(2, 20)
    gradients = []
    for run in (model, compiled(model)):
        model.zero_grad()
        run(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert max(map(largest_difference, *gradients)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_decode_step_is_one_graph(kind, with_mask):
    model, tokens = model_of(), random_tokens(2, 30)
    cache = new_cache(model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=30)
    expected = model(tokens, use_cache=False).logits
    model(tokens[:, :20], past_key_values=cache)
    step = compiled(model)
    for i in range(20, 30):
        mask = torch.ones(2, i + 1, dtype=torch.long) if with_mask else None
        logits = step(tokens[:, i : i + 1], past_key_values=cache, attention_mask=mask).logits
        assert largest_difference(logits[:, 0], expected[:, i]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
