"""What a Samba is: sizes, initial weights, causality and the reach of its window."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from sambalm.model.config import ModelConfig
from sambalm.model.flops import flops_per_token
from sambalm.model.ops.reference.selective_scan import gated_selective_scan
from sambalm.model.ops.registry import TORCH_KERNELS
from sambalm.model.parameters import count_parameters
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices, initialize_parameters

SMALL = dict(pattern="M-*-", hidden_size=64, num_query_heads=4, num_kv_heads=2, mlp_size=96, window=8, vocab_size=50)
TWO_HEADS = {"num_heads": 2, "head_dim": 8}

# arXiv 2406.07522, table 12; the counts follow from the sizes.
PAPER = {
    "421M": (("M-*- x 6", 1536, 12, 12, 4096, 32000), 421_793_280, 470_945_280, 372_641_280),
    "1.3B": (("M-*- x 9", 2304, 18, 18, 6144, 32000), 1_330_207_488, 1_403_935_488, 1_256_479_488),
    "1.7B": (("M-*- x 12", 2048, 32, 4, 8196, 50304), 1_742_194_688, 1_845_217_280, 1_639_172_096),
    "3.8B": (("M-*- x 16", 2816, 11, 1, 9984, 32064), 3_864_275_712, 3_954_567_936, 3_773_983_488),
}


def paper_config(name, **more):
    keys = ("pattern", "hidden_size", "num_query_heads", "num_kv_heads", "mlp_size", "vocab_size")
    return ModelConfig(**dict(zip(keys, PAPER[name][0], strict=True)), window=2048, **more)


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_of_the_paper(name):
    _, tied, untied, body = PAPER[name]
    assert count_parameters(paper_config(name))["total"] == tied
    counts = count_parameters(paper_config(name, tie_embeddings=False))
    assert (counts["total"], counts["non-embedding"]) == (untied, body)


def build(seed=0, **more):
    model = Samba(ModelConfig(**(SMALL | more)))
    initialize_parameters(model, seed=seed)
    return model, {name: piece.of_local(p.detach()) for name, p, piece in canonical_slices(model)}


BESIDE_WEIGHTS = {"norm_eps": 0.1, "window": 9, "rope_base": 55.0, "embedding_std": 0.5, "dt_min": 0.01, "dt_max": 0.2}


@pytest.mark.parametrize("pattern", ["M-", "M-*-", "F-", "S-*-S-F-U-X-", "A-*-", "G-"])
@pytest.mark.parametrize("key", BESIDE_WEIGHTS)
def test_keys_beside_the_weights_are_those_that_change_what_a_model_computes(key, pattern):
    """A run that begins from the weights of another model is told of them (train.init_from)."""
    sizes = SMALL | {"pattern": pattern, "mixers": {"gla": TWO_HEADS} if "A" in pattern else {}}
    if "G" in pattern:
        sizes["mixers"] = {"gated_deltanet": TWO_HEADS}
    config = ModelConfig(**sizes)
    models = [Samba(config), Samba(ModelConfig(**(sizes | {key: BESIDE_WEIGHTS[key]})))]
    initialize_parameters(models[0], seed=0)
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(0))
    outputs, other = (model(tokens) for model in models)
    assert (key in config.keys_beside_weights()) == (not torch.equal(outputs, other))
    assert key not in config.keys_of_weights()


def test_initial_weights_follow_the_paper():
    _, weights = build(hidden_size=256, mlp_size=512, vocab_size=400)
    assert weights["embedding.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(weights["layers.0.mixer.A_log"][3], torch.arange(1, 17).log())
    assert torch.equal(weights["layers.0.mixer.D"], torch.ones(512))
    dt = torch.nn.functional.softplus(weights["layers.0.mixer.dt_proj.bias"])
    assert 1e-3 * 0.999 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1 * 1.001
    assert dt.log().mean() == pytest.approx(math.log(1e-2), abs=0.2)  # half-way between their logarithms
    uniform = {
        "layers.0.mixer.in_proj.x.weight": 1 / math.sqrt(256),
        "layers.0.mixer.conv.weight": 0.5,
        "layers.0.mixer.dt_proj.weight": 16**-0.5,
        "layers.0.mixer.out_proj.weight": 1 / math.sqrt(512 * 4),
        "layers.1.mixer.down_proj.weight": 1 / math.sqrt(512 * 4),
        "layers.2.mixer.o_proj.weight": 1 / math.sqrt(256 * 4),
    }
    for name, bound in uniform.items():
        assert weights[name].abs().max() == pytest.approx(bound, rel=0.02), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scan_gets_mambas_rates_in_fp32(dtype):
    """Whatever the precision of the activations: A from values that bf16 cannot hold, D and the bias as they are."""
    given = {}

    def scan(u, dt, A, B, C, **others):
        given.update(others, u=u, A=A)
        return gated_selective_scan(u, dt, A, B, C, **others)

    model = Samba(ModelConfig(**(SMALL | {"pattern": "M"})), kernels=replace(TORCH_KERNELS, scan=scan), dtype=dtype)
    initialize_parameters(model, seed=0)
    weights = {name: piece.of_local(p.detach()) for name, p, piece in canonical_slices(model)}
    for name in ("A_log", "D", "dt_proj.bias"):
        weights[f"layers.0.mixer.{name}"] += 1e-3  # 1 + 1/1000 is 1 in bf16
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert given["u"].dtype == dtype
    assert torch.equal(given["A"], -torch.exp(weights["layers.0.mixer.A_log"]))
    assert torch.equal(given["D"], weights["layers.0.mixer.D"])
    assert torch.equal(given["dt_bias"], weights["layers.0.mixer.dt_proj.bias"])


def test_no_two_layers_start_alike():
    _, weights = build(pattern="M-M-")
    assert not torch.equal(weights["layers.0.mixer.in_proj.x.weight"], weights["layers.2.mixer.in_proj.x.weight"])
    _, other = build(pattern="M-M-", seed=1)
    assert not torch.equal(weights["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("pattern", ["M", "*", "-", "M-*-", "MM**--", "*-M"])
def test_any_pattern_is_causal(pattern):
    model, _ = build(pattern=pattern)
    tokens = torch.randint(0, 50, (1, 30))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


def test_attention_reaches_exactly_its_window():
    model, _ = build(pattern="*")
    tokens = torch.randint(0, 50, (1, 30))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    with torch.no_grad():
        differs = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-7
    assert differs.nonzero().flatten().tolist() == list(range(10, 10 + 8))


def test_losses_are_those_of_the_logits():
    model, _ = build()
    tokens = torch.randint(0, 50, (2, 17))
    logits, losses = model(tokens[:, :-1]), model(tokens[:, :-1], tokens[:, 1:])
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(losses, expected)


def test_bf16_changes_little_and_keeps_weights_fp32():
    model, _ = build()
    half = Samba(ModelConfig(**SMALL), dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (2, 17))
    loss, half_loss = (m(tokens[:, :-1], tokens[:, 1:]).mean() for m in (model, half))
    assert half_loss.dtype == torch.float32
    assert 0 < abs(half_loss - loss) < 0.01
    half_loss.backward()
    assert {p.grad.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(window=0), "window"),
        (dict(pattern="M-x"), "pattern"),
        (dict(pattern=""), "pattern"),
        (dict(pattern="M- x 0"), "pattern"),
        (dict(num_query_heads=5), "num_query_heads"),
        (dict(num_kv_heads=3), "num_kv_heads"),
        (dict(num_query_heads=64, num_kv_heads=64), "head dim"),
        (dict(vocabulary=3), "vocabulary"),
    ],
)
def test_impossible_shapes_are_refused(change, named):
    with pytest.raises(ValidationError, match=named):
        ModelConfig(**(SMALL | change))


def test_flops_of_the_1_3b_model():
    """Six operations a weight and token (the tied embedding counts once, as the head), plus window and scan."""
    flops = flops_per_token(paper_config("1.3B"), sequence_length=4096)
    assert flops.matrix == pytest.approx(6 * 1_330_207_488, rel=0.003)
    mean_keys = (sum(range(1, 2049)) + 2048 * 2048) / 4096
    assert flops.mixing["attention"] == pytest.approx(3 * 9 * 4 * 2304 * mean_keys)
    assert flops.total * 16384 == pytest.approx(137e12, rel=0.03)
