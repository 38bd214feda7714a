"""The Hugging Face model: against the paper's formulas, the training model, and itself in pieces and with padding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sambalm.model.hf import modeling_samba
from sambalm.model.hf.layers import carried_states
from sambalm.model.hf.modeling_samba import SambaForCausalLM, new_cache
from sambalm.model.hf.names import hf_config
from sambalm.model.hf.operations import Operations
from sambalm.model.ops.reference.window_attention import window_attention
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import initialize_parameters
from tests.support.hf import RandomState, hf_model, random_tokens, tiny_config, training_model
from tests.support.hf_reference import reference_logits

PATTERNS = ["M-*-M-*-", "M", "M-", "*-M", "--M*", "MM*--", "-*", "-"]
WITH_ATTENTION = [pattern for pattern in PATTERNS if "*" in pattern]
SHAPES = {
    "paper": {"pattern": "M-*-M-*-"},
    "11 query heads, 1 kv head": {"hidden_size": 44, "num_query_heads": 11, "num_kv_heads": 1},
    "18 heads": {"hidden_size": 72, "num_query_heads": 18, "num_kv_heads": 18},
    "window beyond the sequence": {"window": 64},
    "window of one": {"window": 1},
    "untied": {"tie_embeddings": False},
    "other Mamba sizes": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7},
    "other rotary base": {"rope_base": 50.0},
    "no positions": {"rope_base": None},
    "full attention": {"pattern": "F-*M", "window": 5},
    "full attention without positions": {"pattern": "F-", "rope_base": None},
    "second MLP": {"pattern": "=-*=", "mixers": {"mlp2": {"size": 20}}},
    **{f"pattern {pattern}": {"pattern": pattern} for pattern in PATTERNS},
}


def model_of(pattern: str = "M-*-M-*-", **changes) -> SambaForCausalLM:
    config = tiny_config(pattern, **changes)
    return hf_model(config, RandomState(config))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_those_of_the_papers_formulas_and_of_the_training_model(changes):
    config = tiny_config(**changes)
    state = RandomState(config)
    tokens = random_tokens(2, 21)
    expected = torch.stack([reference_logits(config, state.tensors, row.tolist()) for row in tokens])
    with torch.no_grad():
        logits = hf_model(config, state)(tokens, use_cache=False).logits
        trained = training_model(config, state)(tokens)
    assert largest_difference(logits, expected) < 2e-5
    assert largest_difference(logits, trained) < 1e-5


@pytest.mark.parametrize("first", [10**6, 16_777_217, 10**9 - 30])
def test_logits_depend_on_no_absolute_position(first):
    model = model_of("*-*-")
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        far = model(tokens, position_ids=torch.arange(first, first + 30)[None]).logits
        assert largest_difference(far, model(tokens).logits) < 2e-5


@pytest.mark.parametrize("change", [{"window": 9}, {"rope_base": 9000.0}, {"norm_eps": 1e-3}])
def test_the_reference_tells_small_changes_of_the_model(change):
    config = tiny_config()
    state = RandomState(config)
    tokens = random_tokens(1, 21)
    with torch.no_grad():
        logits = hf_model(config, state)(tokens).logits[0]
    changed = tiny_config(**change)
    assert largest_difference(logits, reference_logits(changed, state.tensors, tokens[0].tolist())) > 1e-4


@pytest.mark.parametrize("splits", [[1] * 30, [7, 1, 1, 21], [15, 15], [2, 3, 25]])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sequence_in_pieces_gives_the_logits_of_the_whole(pattern, splits):
    model = model_of(pattern).double()  # in which rounding hides nothing
    tokens = random_tokens(2, 30)
    caches = [new_cache(model.config)]
    if "*" in pattern:
        caches.append(StaticCache(config=model.config, max_cache_len=30))
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        for cache in caches:
            pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split(splits, dim=1)]
            assert largest_difference(torch.cat(pieces, dim=1), whole) < 1e-12


@pytest.mark.parametrize("forgotten", [0, 1], ids=["convolution", "scan"])
def test_both_of_mambas_states_are_carried(forgotten):
    model = model_of("M")
    tokens = random_tokens(1, 20)
    cache = new_cache(model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        model(tokens[:, :10], past_key_values=cache)
        carried_states(cache, 0)[forgotten].zero_()
        rest = model(tokens[:, 10:], past_key_values=cache).logits
    assert largest_difference(rest[:, 0], whole[:, 10]) > 1e-3


def test_the_cache_keeps_no_more_than_the_window():
    model = model_of(window=8)
    cache = new_cache(model.config)
    model(random_tokens(1, 30), past_key_values=cache)
    assert cache.layers[1].keys.shape[2] == 7
    conv_inputs, scan_state = carried_states(cache, 0)
    assert conv_inputs.shape == (1, 64, 3)
    assert scan_state.shape == (1, 64, 16)
    assert scan_state.dtype == torch.float32


def padded(rows: list[torch.Tensor], *, length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, implementation):
    model = model_of()
    rows = [random_tokens(1, length, seed=length)[0] for length in (24, 13, 3)]
    tokens, mask = padded(rows, length=24, side=side)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(row[None], use_cache=False).logits[0]
            assert largest_difference(logits[i][mask[i].bool()], alone) < 1e-5


def difference_in_padded_turns(model: SambaForCausalLM) -> float:
    """Returns how far the last logits of two rows, in two turns padded on the left, are from the rows alone."""
    turns = [[random_tokens(1, n, seed=n)[0] for n in lengths] for lengths in ((9, 4), (5, 11))]
    cache, masks = new_cache(model.config), []
    with torch.no_grad():
        for turn in turns:
            tokens, mask = padded(turn, length=max(map(len, turn)), side="left")
            masks.append(mask)
            logits = model(tokens, attention_mask=torch.cat(masks, dim=1), past_key_values=cache).logits
        alone = [model(torch.cat([turn[i] for turn in turns])[None]).logits[0] for i in range(2)]
        return max(largest_difference(logits[i][-1], alone[i][-1]) for i in range(2))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_in_a_later_turn_changes_nothing(pattern):
    assert difference_in_padded_turns(model_of(pattern, window=64)) < 1e-5


@pytest.mark.parametrize(("window", "is_told"), [(64, False), (16, True)])
def test_padding_that_takes_up_places_of_the_window_is_told(window, is_told, monkeypatch):
    told = []
    monkeypatch.setattr(modeling_samba.logger, "warning_once", told.append)
    difference = difference_in_padded_turns(model_of("*-", window=window))
    assert (difference > 1e-5, len(told) > 0) == (is_told, is_told)


def test_padding_at_the_sides_takes_up_no_places(monkeypatch):
    told = []
    monkeypatch.setattr(modeling_samba.logger, "warning_once", told.append)
    rows = [random_tokens(1, length, seed=length)[0] for length in (40, 13)]
    for side in ("left", "right"):
        tokens, mask = padded(rows, length=40, side=side)
        model_of("*-", window=8)(tokens, attention_mask=mask)
    assert told == []


def test_without_padding_no_mask_is_built(monkeypatch):
    model = model_of()
    masked = []

    def noted(*args, real_keys=None, **options):
        masked.append(real_keys is not None)
        return window_attention(*args, real_keys=real_keys, **options)

    monkeypatch.setattr(modeling_samba, "operations_for", lambda *_: Operations(window_attention=noted))
    tokens = random_tokens(1, 40)
    cache = new_cache(model.config)
    for piece in tokens.split([20, 1, 19], dim=1):
        model(piece, attention_mask=torch.ones(1, cache.get_seq_length() + piece.shape[1]), past_key_values=cache)
    long_gone = torch.ones(1, 41)
    long_gone[0, :30] = 0
    model(tokens[:, :1], attention_mask=long_gone, past_key_values=cache)  # the padding is out of the window's reach
    assert masked == [False] * 8
    model(tokens[:, :2], attention_mask=torch.tensor([[0, 1]]))
    assert masked[8:] == [True] * 2


def test_padding_costs_no_square_of_the_length(monkeypatch):
    def refuse(**_):
        raise AssertionError("a mask over all pairs was built")

    monkeypatch.setattr(modeling_samba, "create_sliding_window_causal_mask", refuse)
    tokens, mask = padded([random_tokens(1, 300)[0], random_tokens(1, 100)[0]], length=300, side="left")
    model = model_of()
    logits = model(tokens, attention_mask=mask).logits
    assert largest_difference(logits[1, 200:], model(tokens[1:, 200:]).logits[0]) < 1e-5
    with pytest.raises(AssertionError, match="over all pairs"):
        model(tokens, attention_mask=mask, output_attentions=True)


def test_a_ready_4d_mask_is_taken_as_it_is():
    model = model_of("*-", window=64)
    tokens = random_tokens(1, 6)
    own_token_only = torch.eye(6).bool()[None, None]
    with torch.no_grad():
        logits = model(tokens, attention_mask=own_token_only).logits
        alone = torch.cat([model(tokens[:, i : i + 1]).logits for i in range(6)], dim=1)
        assert largest_difference(logits, alone) < 1e-5
        assert largest_difference(logits, model(tokens).logits) > 1e-3


def test_hidden_states_and_attentions():
    model = model_of()
    model.set_attn_implementation("eager")
    outputs = model(random_tokens(2, 12), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 12, 32)] * 5
    assert len(outputs.attentions) == 2
    weights = outputs.attentions[0]
    assert weights.shape == (2, 4, 12, 12)
    visible = torch.ones(12, 12).tril().triu(-7)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 12), atol=1e-5)
    assert (weights[..., visible == 0] == 0).all()
    assert (weights[..., visible == 1] > 0).all()


def test_logits_to_keep_and_loss():
    model = model_of()
    tokens = random_tokens(2, 12)
    labels = tokens.clone()
    labels[0, 5] = -100
    with torch.no_grad():
        outputs = model(tokens, labels=labels)
        kept = model(tokens, logits_to_keep=3).logits
        chosen = model(tokens, logits_to_keep=torch.tensor([0, 7])).logits
    assert largest_difference(kept, outputs.logits[:, -3:]) < 1e-6
    assert largest_difference(chosen, outputs.logits[:, [0, 7]]) < 1e-6
    losses = -outputs.logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    assert outputs.loss.item() == pytest.approx(losses[counted].mean().item(), abs=1e-5)


@pytest.mark.parametrize("cache", ["none", "asked for", "given"])
def test_gradient_checkpointing_gives_the_same_gradients(cache):
    tokens = random_tokens(2, 12)
    gradients = []
    for checkpointing in (False, True):
        model = model_of().train()
        options = {"use_cache": False}
        if checkpointing:
            model.gradient_checkpointing_enable()
            given = {"use_cache": True, "past_key_values": new_cache(model.config)}
            options = {"none": options, "asked for": {"use_cache": True}, "given": given}[cache]
        outputs = model(tokens, labels=tokens, **options)
        assert outputs.past_key_values is None
        outputs.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_and_step_bias_stay_fp32(tmp_path, dtype):
    model_of().save_pretrained(tmp_path)
    model = SambaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    fp32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    expected = {f"backbone.layers.{i}.mixer.{leaf}" for i in (0, 2) for leaf in ("A_log", "D", "dt_proj.bias")}
    assert fp32 == expected
    assert {p.dtype for name, p in model.named_parameters() if name not in expected} == {dtype}
    assert model(random_tokens(1, 12)).logits.dtype == dtype


def test_embeddings_are_tied_or_not():
    tied, untied = model_of(), model_of(tie_embeddings=False)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_new_models_have_the_papers_initial_weights():
    model = SambaForCausalLM(hf_config(tiny_config("M-*-", hidden_size=128, mlp_size=256)))
    weights = dict(model.named_parameters())
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(mixer.A_log, torch.arange(1.0, 17).log().expand(256, 16))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.0009 < steps.min() < 0.002
    assert 0.05 < steps.max() < 0.101
    bounds = {"layers.0.mixer.in_proj": 128**-0.5, "layers.0.mixer.out_proj": 256**-0.5 / 2}
    bounds |= {"layers.1.mixer.o_proj": 128**-0.5 / 2, "layers.1.mlp.down_proj": 256**-0.5 / 2}
    for name, bound in bounds.items():
        assert weights[f"backbone.{name}.weight"].abs().max().item() == pytest.approx(bound, rel=0.02), name
    assert weights["backbone.embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_no_initial_step_is_below_its_floor():
    """Of every mixer that draws steps, in both models; a floor beyond dt_min is met by many."""
    floor, heads = {"dt_floor": 0.05}, {"num_heads": 4, "head_dim": 8}
    sizes = {"mamba2": floor | {"head_dim": 4}, "gated_deltanet": floor | heads, "kimi_delta": floor | heads}
    sizes["mega"] = floor | {"key_dim": 4}
    config = tiny_config("MSGKZ", mixers=sizes, **floor)
    training = Samba(config)
    initialize_parameters(training, seed=0)
    for model in training, SambaForCausalLM(hf_config(config)):
        biases = [p.detach() for name, p in model.named_parameters() if name.endswith(("dt_bias", "dt_proj.bias"))]
        assert len(biases) == 5
        for bias in biases:
            assert torch.nn.functional.softplus(bias).min().item() == pytest.approx(0.05, rel=1e-3)


def test_exactly_one_input_is_needed():
    with pytest.raises(ValueError, match="exactly one"):
        model_of()(attention_mask=torch.ones(1, 2), past_key_values=DynamicCache())
