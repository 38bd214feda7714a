"""Documents that are packed into rows give what each gives alone, whatever runs the attention."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from sambalm.model.hf.layers import SambaLayer
from sambalm.model.hf.modeling_samba import new_cache
from tests.hf.test_modeling import PATTERNS, largest_difference, model_of
from tests.support.hf import random_tokens

LENGTHS = [20, 1, 7, 13]  # longer and shorter than the window, and one that the convolution reaches across


def documents() -> list[torch.Tensor]:
    return [random_tokens(1, length, seed=length)[0] for length in LENGTHS]


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])


def alone(model) -> torch.Tensor:
    return torch.cat([model(one[None], use_cache=False).logits[0] for one in documents()])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_are_as_if_alone(pattern):
    model = model_of(pattern).double()
    row = torch.cat(documents())[None]
    with torch.no_grad():
        packed = model(row, position_ids=positions()[None])
        assert largest_difference(packed.logits[0], alone(model)) < 1e-12
        if set(pattern) & {"M", "*"}:
            assert packed.past_key_values is None
            assert largest_difference(model(row).logits[0], packed.logits[0]) > 1e-3


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()
def test_other_attention_keeps_them_apart_too(implementation):
    model = model_of()
    expected = alone(model)
    model.set_attn_implementation(implementation)
    rows = torch.cat(documents()).expand(2, -1)
    for ids in (positions()[None], positions().expand(2, -1)):
        logits = model(rows, position_ids=ids, output_attentions=implementation == "eager").logits
        assert largest_difference(logits, expected.expand(2, -1, -1)) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_may_be_padded(side):
    model = model_of().double()
    row, pad = torch.cat(documents()), torch.zeros(6, dtype=torch.long)
    order = (pad, row) if side == "left" else (row, pad)
    mask = torch.cat([torch.ones_like(t) if t is row else t for t in order])
    ids = torch.cat([positions() if t is row else pad for t in order])
    with torch.no_grad():
        logits = model(torch.cat(order)[None], attention_mask=mask[None], position_ids=ids[None]).logits[0]
        assert largest_difference(logits[mask.bool()], alone(model)) < 1e-12


def test_the_gradients_are_those_of_the_documents_alone():
    """The collator's labels leave out each document's first token, which none before it predicts."""
    batch = DataCollatorWithFlattening()([{"input_ids": one.tolist()} for one in documents()])
    gradients = []
    for packed in (True, False):
        model = model_of().double().train()
        if packed:
            loss = model(**batch).loss * (batch["labels"] != -100).sum()
        else:
            losses = [model(one[None], labels=one[None]).loss * (len(one) - 1) for one in documents() if len(one) > 1]
            loss = sum(losses)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, gradients[1][name], rtol=0, atol=1e-11), name


def test_a_cache_and_packed_documents_are_refused_together():
    model = model_of()
    with pytest.raises(ValueError, match="read without a cache"):
        model(torch.cat(documents())[None], position_ids=positions()[None], past_key_values=new_cache(model.config))


def test_positions_that_go_on_are_no_documents():
    model = model_of()
    tokens = random_tokens(2, 30)
    cache = new_cache(model.config)
    for piece in (slice(0, 11), slice(11, 30)):
        ids = torch.arange(piece.start, piece.stop)[None]
        logits = model(tokens[:, piece], position_ids=ids, past_key_values=cache).logits
    assert largest_difference(logits, model(tokens).logits[:, 11:]) < 1e-5


def test_a_layer_that_cannot_tell_documents_apart_is_named(monkeypatch):
    model = model_of("M-")
    monkeypatch.setattr(type(model.backbone.layers[0].mixer), "isolates_documents", SambaLayer.isolates_documents)
    with pytest.raises(ValueError, match="SambaMamba cannot keep packed documents apart"):
        model(torch.cat(documents())[None], position_ids=positions()[None])
