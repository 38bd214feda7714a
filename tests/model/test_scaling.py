"""Learning rates and initial weights by width and depth (`model.scaling: mup`)."""

import math

import pytest
import torch
from pydantic import ValidationError

from sambalm.model.config import ModelConfig
from sambalm.model.samba import Samba
from sambalm.model.scaling import set_lr_scales
from sambalm.parallel.sharding import canonical_slices, initialize_parameters
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.gradient_buckets import gradient_buckets
from sambalm.pretrain.optimizer import OptimizerConfig, set_learning_rate
from tests.support.benchmark_files import load_benchmark

SIZES = dict(hidden_size=64, num_query_heads=4, num_kv_heads=2, mlp_size=128, pattern="M-*-", window=8, vocab_size=40)
# Four times as wide, with heads twice as wide and an MLP twice as wide as that of the base, and twice as deep.
WIDE = SIZES | dict(hidden_size=256, num_query_heads=8, num_kv_heads=4, mlp_size=256, pattern="M-*- x 2")
BASE = {key: SIZES[key] for key in ("hidden_size", "num_query_heads", "num_kv_heads", "mlp_size", "pattern")}


def scaled(values=WIDE, **more) -> ModelConfig:
    return ModelConfig(**values, scaling="mup", base=BASE, **more)


def lr_scales(config: ModelConfig) -> dict[str, float]:
    with torch.device("meta"):
        model = Samba(config)
    set_lr_scales(model)
    return {name: info_of(parameter).lr_scale for name, parameter in model.named_parameters()}


def test_each_kind_of_weight_has_its_learning_rate():
    found = lr_scales(scaled(tie_embeddings=False))
    depth = math.sqrt(1 / 2)
    expected = {
        "embedding.weight": 1,
        "head.weight": 1,
        "final_norm.weight": 1 / 4,  # the output's multiplier
        "layers.0.norm.weight": depth,
        "layers.0.mixer.A_log": depth,
        "layers.0.mixer.D": depth,
        "layers.0.mixer.dt_proj.bias": depth,
        "layers.0.mixer.conv.weight": depth,
        "layers.0.mixer.in_proj.weight": depth / 4,
        "layers.0.mixer.x_proj.weight": depth / 4,
        "layers.0.mixer.dt_proj.weight": depth / 4,
        "layers.0.mixer.out_proj.weight": depth * depth / 4,
        "layers.1.mixer.gate_up_proj.weight": depth / 4,
        "layers.1.mixer.down_proj.weight": depth * depth / 2,
        "layers.2.mixer.qkv_proj.query": depth / 4 * math.sqrt(1 / 2),  # scores over the head dim
        "layers.2.mixer.qkv_proj.key_value": depth / 4,
        "layers.2.mixer.o_proj.weight": depth * depth / 4,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-8)
    assert found["layers.6.mixer.qkv_proj.query"] == found["layers.2.mixer.qkv_proj.query"]
    assert set(lr_scales(ModelConfig(**WIDE)).values()) == {1}


@pytest.mark.parametrize("pattern", ["S-G-K-", "S-FU-X-", "Z-A-R-"])
def test_other_mixers_have_theirs_without_being_named(pattern):
    found = lr_scales(_other(pattern))
    matrices = {scale for name, scale in found.items() if "proj" in name and "bias" not in name}
    queries = {found[name] for name in found if "query" in name or "q_proj" in name}
    assert matrices - queries <= {1 / 4, 1 / 2, 1.0}  # by the stream's, the MLP's and the heads' widths
    assert sorted(queries) == pytest.approx([math.sqrt(1 / 2) / 4] if "F" in pattern else [], rel=1e-8)
    assert found["layers.0.mixer.in_proj.weight"] == 1 / 4


def _other(pattern: str) -> ModelConfig:
    mixers = {"mega": {"key_dim": 8, "chunk_tokens": 8}} if "Z" in pattern else {}
    values = WIDE | {"pattern": pattern, "mixers": mixers}
    return ModelConfig(**values, scaling="mup", base=BASE | {"pattern": pattern})


def initial(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = Samba(config)
    initialize_parameters(model, seed=1)
    return {name: piece.of_local(parameter.detach()) for name, parameter, piece in canonical_slices(model)}


def test_initial_weights_differ_where_sums_would_grow():
    wide, plain = (
        initial(config) for config in (scaled(tie_embeddings=False), ModelConfig(**WIDE, tie_embeddings=False))
    )
    factors = {name: (wide[name].norm() / plain[name].norm()).item() for name in wide}
    query = dict.fromkeys([f"layers.{layer}.mixer.qkv_proj.q.weight" for layer in (2, 6)], math.sqrt(1 / 2))
    expected = query | {"head.weight": 2.0, "final_norm.weight": 1 / 4}
    assert factors == pytest.approx(dict.fromkeys(factors, 1.0) | expected, rel=1e-5)


def test_a_model_of_its_bases_sizes_is_as_without_scaling():
    config = scaled(SIZES)
    assert set(lr_scales(config).values()) == {1}
    plain = initial(ModelConfig(**SIZES))
    assert all(torch.equal(weight, plain[name]) for name, weight in initial(config).items())


def test_weights_decay_as_fast_whatever_their_learning_rate():
    model = Samba(scaled())
    set_lr_scales(model)
    buckets = gradient_buckets([model])
    optimizer = OptimizerConfig(peak_lr=1e-3, weight_decay=0.2).build(buckets, adamw=torch.optim.AdamW)
    set_learning_rate(optimizer, 5e-4)
    for bucket, group in zip(buckets, optimizer.param_groups, strict=True):
        assert {info_of(parameter).lr_scale for parameter in bucket.parameters} == {bucket.lr_scale}
        assert group["lr"] == 5e-4 * bucket.lr_scale
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-4 if bucket.weight_decay else 0)
    assert len({bucket.lr_scale for bucket in buckets}) > 4


@pytest.mark.slow
def test_steps_change_activations_alike_at_every_width_and_depth():
    benchmark = load_benchmark("scaling")
    given = benchmark.batches(benchmark.corpus(50_000), 3)

    def grown(scaling, **sizes):
        """By how much more the last of the models' streams and logits change than the first's."""
        models = [{"width": 32} | dict(zip(sizes, values, strict=True)) for values in zip(*sizes.values(), strict=True)]
        found = [
            benchmark.changes(benchmark.model_config(**model, scaling=scaling, base_width=32), given)
            for model in models
        ]
        return [max(each[name] / found[0][name] for each in found) for name in ("stream", "logits")]

    assert max(grown("mup", width=(32, 64, 128))) < 1.3
    assert min(grown(None, width=(32, 128))) > 2.5
    assert max(grown("mup", blocks=(1, 4))) < 1.3
    assert grown(None, blocks=(1, 4))[0] > 2.0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"base": {}}, "model.scaling is set and model.base is not: set both, or none"),
        ({"scaling": None}, "model.base is set and model.scaling is not: set both, or none"),
        ({"base": {"vocab_size": 9}}, "model.base has the key 'vocab_size', in which the two models cannot differ"),
        ({"base": {"width": 9}}, "model.base.width is 9: extra inputs are not permitted"),
        ({"base": {"hidden_size": 60, "num_query_heads": 7}}, "which does not divide model.hidden_size 60"),
        ({"base": {"pattern": "M-"}}, "model.base.pattern is 'M-', which lacks the letter * of model.pattern"),
        ({"base": {"mixers": {"mamba2": 3}}}, "model.base.mixers is {'mamba2': 3}: it is a mapping of sections"),
    ],
)
def test_a_base_that_is_no_model_is_refused(values, sentence):
    with pytest.raises(ValidationError) as error:
        ModelConfig(**(WIDE | {"scaling": "mup", "base": BASE} | values))
    assert sentence in str(error.value)
