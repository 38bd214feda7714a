"""The Hugging Face configuration, its agreement with flash-linear-attention's, and the tensor names."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

import sambalm.model.hf
from sambalm.model.config import ModelConfig
from sambalm.model.hf import HFError, SambaConfig, SambaForCausalLM, SambaModel
from sambalm.model.hf.configuration_samba import fla_hidden_ratio, pattern_blocks
from sambalm.model.hf.names import hf_config, hf_shape, hf_tensors, model_config
from tests.hf.test_modeling import PATTERNS
from tests.support.hf import RandomState, tiny_config

PAPER = {  # name: (pattern, hidden_size, query heads, kv heads, MLP width, hidden_ratio)
    "421M": ("M-*- x 6", 1536, 12, 12, 4096, 4),
    "1.3B": ("M-*- x 9", 2304, 18, 18, 6144, 4),
    "1.7B": ("M-*- x 12", 2048, 32, 4, 8196, None),
    "3.8B": ("M-*- x 16", 2816, 11, 1, 9984, 5.25),
}


def paper_config(name: str) -> SambaConfig:
    pattern, hidden_size, heads, kv_heads, mlp_size, _ = PAPER[name]
    sizes = {"hidden_size": hidden_size, "num_query_heads": heads, "num_kv_heads": kv_heads, "mlp_size": mlp_size}
    return hf_config(ModelConfig(pattern=pattern, window=2048, vocab_size=32000, **sizes))


@pytest.mark.parametrize("name", PAPER)
def test_which_of_the_papers_models_flash_linear_attention_can_load(name):
    config = paper_config(name)
    assert config.hidden_ratio == PAPER[name][-1]
    assert config.fla_compatible == (name != "1.7B")
    expected = None if config.fla_compatible else "The MLP width 8196 is not a multiple of 256."
    assert config.fla_obstacle == expected
    if config.fla_compatible:
        width = int(config.hidden_size * config.hidden_ratio * 2 / 3)  # as flash-linear-attention calculates it
        assert 256 * ((width + 256 - 1) // 256) == config.mlp_size
        assert config.num_hidden_layers == len(config.pattern) / 2


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("M-*", "Block 1 of the pattern M-* is a mixer without an MLP."),
        ("--M-", "Block 0 of the pattern --M- is an MLP without a mixer."),
    ],
)
def test_patterns_that_flash_linear_attention_cannot_load(pattern, reason):
    assert hf_config(tiny_config(pattern, mlp_size=256)).fla_obstacle == reason


def test_every_multiple_of_256_has_a_ratio():
    sizes = [(width, 256 * n) for width in (64, 100, 1536, 2048, 4096) for n in range(1, 60)]
    assert all(fla_hidden_ratio(*size) is not None for size in sizes)


def test_a_configuration_of_flash_linear_attention_is_understood():
    attn = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 16, "rope_theta": 10.0}
    config = SambaConfig(hidden_size=64, num_hidden_layers=3, attn=attn, hidden_ratio=4, hidden_act="swish")
    assert config.pattern == "M-*-M-"
    assert config.mlp_size == 256
    assert config.layer_types == ["linear_attention", "sliding_attention", "linear_attention"]
    assert config.sliding_window == 16
    assert (config.intermediate_size, config.time_step_rank) == (128, 4)
    assert SambaConfig().pattern == "M-*-" * 9  # without any key, its 1.3B model
    assert SambaConfig().mlp_size == 6144


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types is"),
        ({"attn": {"layers": [0]}}, r"attn\['layers'\] is \[0\]"),
        ({"hidden_ratio": 90}, "hidden_ratio is 90"),
        ({"pattern": "M-X"}, "'M-X'"),
        ({"use_bias": True}, "use_bias is True"),
        ({"attn": {"qkv_bias": True}}, "qkv_bias is True"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attn": {"num_heads": 5}}, "num_heads 5"),
    ],
)
def test_contradictions_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SambaConfig(**{"pattern": "M-*-", "hidden_size": 36, "mlp_size": 256} | keys)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_configurations_are_made_of_each_other(pattern, tmp_path):
    config = tiny_config(pattern, tie_embeddings=False, dt_rank=3, rope_base=55.0, dt_min=0.002, embedding_std=0.5)
    hf_config(config).save_pretrained(tmp_path)
    assert model_config(SambaConfig.from_pretrained(tmp_path)) == config


OTHER_VALUES = {
    "pattern": "*-M-",
    "hidden_size": 64,
    "vocab_size": 77,
    "tie_embeddings": False,
    "norm_eps": 1e-3,
    "embedding_std": 0.5,
    "num_query_heads": 2,
    "num_kv_heads": 1,
    "window": 9,
    "rope_base": None,
    "mlp_size": 56,
    "d_state": 5,
    "d_conv": 3,
    "expand": 3,
    "dt_rank": 7,
    "dt_min": 0.002,
    "dt_max": 0.2,
    "dt_floor": 0.001,
}


@pytest.mark.parametrize("key", [key for key in ModelConfig.model_fields if key not in {"mixers", "scaling", "base"}])
def test_no_key_of_the_model_is_lost_on_the_way_to_a_folder_and_back(key, tmp_path):
    config = tiny_config(**({"dt_rank": 3} | {key: OTHER_VALUES[key]}))
    assert config != tiny_config(dt_rank=3)
    hf_config(config).save_pretrained(tmp_path)
    assert model_config(SambaConfig.from_pretrained(tmp_path)) == config


def test_a_model_that_training_does_not_know_is_refused():
    odd_head = SambaConfig(pattern="*", hidden_size=15, attn={"num_heads": 3, "num_kv_heads": 3})
    with pytest.raises(HFError, match="odd"):
        model_config(odd_head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_table_covers_every_tensor_of_both_models_once(pattern, tied):
    config = tiny_config(pattern, tie_embeddings=tied)
    state = RandomState(config)
    tensors = hf_tensors(pattern, tie_embeddings=tied)
    parts = [part for tensor in tensors.values() for part in tensor.parts]
    assert sorted(parts) == sorted(state.shapes())
    model = SambaForCausalLM(hf_config(config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {name: hf_shape(tensor, state.shapes()) for name, tensor in tensors.items()}


def test_names_are_those_of_flash_linear_attention():
    names = set(hf_tensors("M-*-", tie_embeddings=False))
    mamba = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight"]
    mamba += ["dt_proj.bias", "out_proj.weight"]
    expected = {f"backbone.layers.0.mixer.{name}" for name in mamba}
    expected |= {f"backbone.layers.1.mixer.{name}_proj.weight" for name in "qkvo"}
    for i in (0, 1):
        expected |= {f"backbone.layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        expected |= {f"backbone.layers.{i}.{name}_norm.weight" for name in ("mixer", "mlp")}
    assert names == expected | {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"}
    assert hf_tensors("M", tie_embeddings=True)["backbone.layers.0.mixer.in_proj.weight"].parts == (
        "layers.0.mixer.in_proj.x.weight",
        "layers.0.mixer.in_proj.z.weight",
    )


def test_blocks_of_a_pattern():
    blocks = [tuple(block) for block in pattern_blocks("--M*-M")]
    alone = [(None, None, "-", 0), (None, None, "-", 1), ("M", 2, None, None)]
    assert blocks == [*alone, ("*", 3, "-", 4), ("M", 5, None, None)]
    assert [tuple(block) for block in pattern_blocks("Gg-G", mlps="-g")] == [
        ("G", 0, "g", 1),
        (None, None, "-", 2),
        ("G", 3, None, None),
    ]


def test_the_auto_classes_know_samba(tmp_path):
    config = hf_config(tiny_config())
    config.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SambaConfig)
    assert isinstance(AutoModel.from_config(config), SambaModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), SambaForCausalLM)


def test_another_samba_may_register_before_or_after(tmp_path):
    class OtherConfig(PreTrainedConfig):
        model_type = "samba"

    class OtherModel(torch.nn.Module):
        config_class = OtherConfig

    hf_config(tiny_config()).save_pretrained(tmp_path)
    try:  # as flash-linear-attention does, after this package
        AutoConfig.register("samba", OtherConfig, exist_ok=True)
        AutoModelForCausalLM.register(OtherConfig, OtherModel, exist_ok=True)
        assert isinstance(AutoConfig.from_pretrained(tmp_path), OtherConfig)
    finally:  # and this package after it
        sambalm.model.hf.register()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SambaConfig)
    assert isinstance(AutoModelForCausalLM.from_config(SambaConfig.from_pretrained(tmp_path)), SambaForCausalLM)


def saved_again(config: SambaConfig, folder) -> SambaConfig:
    config.save_pretrained(folder)
    return SambaConfig.from_pretrained(folder)


@pytest.mark.parametrize("key", ["sliding_window", "attn"])
def test_the_window_is_one_number_under_both_keys(key, tmp_path):
    """What sets the one sets the other: after construction, in a folder, and in the model that is built."""
    config = hf_config(tiny_config("*-"))
    setattr(config, key, 2 if key == "sliding_window" else config.attn | {"window_size": 2})
    for one in (config, saved_again(config, tmp_path)):
        assert (one.sliding_window, one.attn["window_size"]) == (2, 2)
        assert one.attn["num_heads"] == 4
        assert model_config(one).window == 2
    assert SambaForCausalLM(config).backbone.layers[0].mixer.window == 2
    both = SambaConfig(pattern="*-", mlp_size=256, sliding_window=3, attn={"window_size": 9})
    assert (both.sliding_window, both.attn["window_size"]) == (3, 3)


def test_no_length_limits_the_model(tmp_path):
    """Programs cut their input by max_position_embeddings, under which other folders have the training's length."""
    assert SambaConfig(pattern="M").max_position_embeddings == 2**20
    former = SambaConfig(pattern="M", mlp_size=256, max_position_embeddings=4096)
    for config in (former, saved_again(former, tmp_path)):
        assert (config.max_position_embeddings, config.training_sequence_tokens) == (2**20, 4096)
    older = SambaConfig(pattern="M", max_position_embeddings=10**9)
    assert (older.max_position_embeddings, older.training_sequence_tokens) == (2**20, None)


def test_keys_that_are_ignored_at_inference_are_a_list():
    """Trainer.evaluate adds to them."""
    assert isinstance(SambaConfig.keys_to_ignore_at_inference, list)


def test_a_folder_with_code_of_its_own_loads_as_this_packages_class(exported):
    """Without trust_remote_code, once the package is imported."""
    folder = exported[0]
    assert type(AutoConfig.from_pretrained(folder)) is SambaConfig
    assert type(AutoModel.from_pretrained(folder)) is SambaModel
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is SambaForCausalLM


def test_a_folder_does_not_tell_how_learning_rates_were_scaled():
    """The multipliers lie in weights, so the same weights are the same model."""
    plain = tiny_config("M-*-")
    scaled = ModelConfig(**plain.model_dump() | {"scaling": "mup", "base": {"hidden_size": plain.hidden_size // 2}})
    assert hf_config(scaled).to_dict() == hf_config(plain).to_dict()
    assert model_config(hf_config(scaled)) == model_config(hf_config(plain))
    assert "scaling" not in scaled.keys_of_weights()
