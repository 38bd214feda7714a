"""The paper's baselines in `configs/paper/`: patterns, widths, counts by hand, and the commands that read them."""

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sambalm.model.config import ModelConfig
from sambalm.model.parameters import count_parameters
from sambalm.model.registry import mixer
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from tests.support import program
from tests.support.layout_runs import run_values as layout_values
from tests.support.whole_runs import changed, stopped_after, train

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
W438 = (1536, (12, 12), 4096, 32000)
W1_3 = (2304, (18, 18), 6144, 32000)
W1_7 = (2048, (32, 4), 8196, 50304)
TIED, UNTIED = True, False


def hybrid(*blocks: int) -> str:
    return "".join("F-" if block in blocks else "M-" for block in range(12))


# Pattern, (width, query and kv heads, MLP, vocabulary), window, tied, parameters. Sizes that no layer reads are None.
PAPER = {
    "llama2_438m": ("F-" * 12, W438, None, UNTIED, 438_081_024),
    "llama2_1.3b": ("F-" * 20, W1_3, None, TIED, 1_347_842_304),
    "llama3_1.6b": ("F-" * 24, W1_7, None, UNTIED, 1_641_187_328),
    "llama2_swa_438m": ("*-" * 12, W438, 2048, UNTIED, 438_081_024),
    "llama2_swa_1.3b": ("*-" * 20, W1_3, 2048, TIED, 1_347_842_304),
    "mistral_1.6b": ("*-" * 24, W1_7, 2048, UNTIED, 1_641_187_328),
    "mamba_432m": ("M" * 60, (1024, None, None, 32000), None, TIED, 432_804_864),
    "mamba_1.3b": ("M" * 48, (2048, None, None, 32000), None, TIED, 1_334_740_992),
    "mamba_1.8b": ("M" * 64, (2048, None, None, 50304), None, TIED, 1_795_295_232),
    "mamba_mlp_1.9b": ("M-" * 24, (2048, None, 8196, 50304), None, TIED, 1_946_224_640),
    "mamba_swa_mlp_395m": ("M*-" * 8, W438, 2048, TIED, 394_999_296),
    "mamba_swa_mlp_1.6b": ("M*-" * 18, W1_7, 2048, TIED, 1_655_330_816),
    "mlp2_swa_mlp_417m": ("=-*-" * 6, W438, 2048, TIED, 417_240_576),
    "mega_s6_422m": ("Z-" * 12, (1536, None, 4096, 32000), None, TIED, 422_484_480),
    "samba_nope_421m": ("M-*-" * 6, W438, 2048, TIED, 421_793_280),
    "sliding_gla_438m": ("A-*-" * 6, W438, 2048, UNTIED, 438_309_120),
    "sliding_gla_1.2b": ("A-*-" * 9, W1_3, 2048, TIED, 1_220_942_592),
    "sliding_retnet_446m": ("R-*-" * 6, W438, 2048, TIED, 445_555_200),
    "sliding_retnet_1.4b": ("R-*-" * 9, W1_3, 2048, TIED, 1_411_538_688),
    "mamba_mlp_full_0": (hybrid(0), W438, None, TIED, 449_180_160),
    "mamba_mlp_full_5": (hybrid(5), W438, None, TIED, 449_180_160),
    "mamba_mlp_full_11": (hybrid(11), W438, None, TIED, 449_180_160),
    "mamba_mlp_full_1_5": (hybrid(1, 5), W438, None, TIED, 443_702_784),
}
TRAINED_TOKENS = {32000: {1536: 20e9, 1024: 20e9, 2304: 100e9, 2048: 100e9}, 50304: {2048: 230e9}}


def test_each_config_is_a_row():
    assert {path.stem for path in FOLDER.glob("*")} == set(PAPER)


def by_hand(model: ModelConfig) -> int:
    """The parameters, by the paper's formulas."""
    d, inner, rank = model.hidden_size, 2 * model.hidden_size, math.ceil(model.hidden_size / 16)
    mamba = d * 2 * inner + inner * (4 + 1) + inner * (rank + 32) + (rank + 1) * inner + inner * (16 + 1) + inner * d
    attention = 2 * d * d * (1 + model.num_kv_heads / model.num_query_heads)
    of = {"M": mamba, "*": attention, "F": attention, "-": 3 * d * model.mlp_size, "=": 3 * d * 2 * d}
    # Queries, keys, values, gate and output; a head's norm; and the decays, which come through 16 channels.
    of["A"] = (0.5 + 0.5 + 1 + 1 + 1) * d * d + 384 + 16 * (d + d // 2) + d // 2
    of["R"] = (1 + 1 + 2 + 2 + 2) * d * d + 512
    # S6 as wide as the stream; v, three gates and h; the shared channels; and scales, positions and bias of q and k.
    s6 = d * (4 + 1) + d * (d / 32 + 32) + (d / 32 + 1) * d + d * (16 + 1)
    of["Z"] = s6 + 5 * d * (d + 1) + 128 * (d + 1) + 5 * 128
    tables = 1 if model.tie_embeddings else 2
    return sum(of[letter] + d for letter in model.pattern) + d + tables * model.vocab_size * d


@pytest.mark.parametrize("name", PAPER)
def test_a_model_is_the_papers(name):
    config = load_config(FOLDER / f"{name}.yaml")
    model, (pattern, (width, heads, mlp_size, vocabulary), window, tied, parameters) = config.model, PAPER[name]
    assert (model.pattern, model.hidden_size, model.vocab_size) == (pattern, width, vocabulary)
    assert (model.num_query_heads, model.num_kv_heads) == (heads or (1, 1))
    assert (model.mlp_size, model.window, model.tie_embeddings) == (mlp_size or 1, window or 1, tied)
    assert model.rope_base == (None if "nope" in name else 10_000)
    assert count_parameters(model)["total"] == parameters == by_hand(model)
    if "A" in pattern:  # d / 384 heads, keys of 0.5 d, values of d
        sizes = config.model.sizes_of(mixer("A"))
        assert (sizes.num_heads, sizes.num_heads * sizes.head_dim, sizes.expand_v) == (width // 384, width // 2, 2)
    if "R" in pattern:  # half as many heads as the attention, keys of d, values of 2 d
        sizes = config.model.sizes_of(mixer("R"))
        assert (sizes.num_heads, sizes.num_heads * sizes.head_dim, sizes.expand_v) == (heads[0] // 2, width, 2)
    steps, batch = config.train.steps, config.train.global_batch_tokens
    assert steps * batch == pytest.approx(TRAINED_TOKENS[vocabulary][width], rel=1e-4)
    assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", PAPER)
def test_the_commands_read_it(name, sambalm):
    path = FOLDER / f"{name}.yaml"
    code, out, err = sambalm("params", path)
    assert (code, err) == (0, "")
    assert f"{PAPER[name][-1]}" in out
    assert sambalm("train", path, "--dry-run", "--world-size", 8)[0] == 0
    code, out, err = sambalm("plan", path, "--gpus", 4, "--gpu-memory-gib", 80, "--top", 1)
    assert (code, err) == (0, "")
    assert "fastest layout first" in out


@pytest.mark.parametrize(
    ("pattern", "key"), [("*-", "window"), ("F-", "num_kv_heads"), ("M*", "num_query_heads"), ("M-", "mlp_size")]
)
def test_a_size_that_a_layer_reads_cannot_be_left_out(pattern, key):
    values = layout_values(model={"pattern": pattern})
    del values["model"][key]
    with pytest.raises(ConfigError, match=rf"model\.{key}"):
        parse_config(values, source="test")


def test_the_second_mlp_has_its_own_width():
    for mixers, words in (({}, r"model\.mixers\.mlp2\.size"), ({"mlp2": {"size": 1}}, r"mlp2\.size is 1, less than")):
        with pytest.raises(ConfigError, match=words):
            parse_config(layout_values(model={"pattern": "=", "mixers": mixers}, parallel={"tensor": 2}), source="test")


TINY = {
    "Llama": {"pattern": "F-F-", "tie_embeddings": False},
    "Samba-NoPE": {"pattern": "M-*-", "rope_base": None},
    "MLP2-SWA-MLP": {"pattern": "=-*-", "mixers": {"mlp2": {"size": 64}}},
    "hybrid": {"pattern": "M-F-"},
    "Sliding GLA": {"pattern": "A-*-", "mixers": {"gla": {"num_heads": 2, "head_dim": 8}}},
    "Sliding RetNet": {"pattern": "R-*-", "mixers": {"retnet": {"num_heads": 2, "head_dim": 8}}},
    "Mamba-SWA-MLP": {"pattern": "M*-M"},
    "Mega-S6": {"pattern": "Z-Z-", "mixers": {"mega": {"key_dim": 8, "chunk_tokens": 12}}},
}


@pytest.fixture(scope="module")
def data(tokens, tmp_path_factory):
    """The prefix of tokens of a real tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    text, model = tokens.with_name("text.jsonl"), folder / "tokenizer.model"
    for words in (
        ("data", "tokenizer", "--input", text, "--vocab-size", 384, "--output", model),
        ("data", "preprocess", "--input", text, "--tokenizer", model, "--output", folder / "text"),
    ):
        ended = program.run(*words)
        assert ended.returncode == 0, ended.stderr
    return folder / "text"


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_one_trains_resumes_on_another_layout_converts_and_speaks(name, data, run_values, sambalm, tmp_path):
    values = changed(run_values, data={"train": str(data)}, model=TINY[name])
    whole_run = train(values)
    stopped = stopped_after(values, 3, tmp_path / "stopped")
    resumed = train(changed(stopped, parallel={"pipeline": 2}), ranks=2)
    for before, after in zip(whole_run, resumed, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    run, hf, again = tmp_path / "stopped", tmp_path / "hf", tmp_path / "again"
    code, out, err = sambalm("convert", "to-hf", run, hf, "--precision", "fp32")
    assert (code, err) == (0, "")
    assert "step 6, verified" in out
    assert sambalm("convert", "from-hf", hf, again)[0] == 0
    tails = []
    for source in (run, hf):
        words = ("--prompt", "def main(", "--max-new-tokens", 8, "--temperature", 0, "--state-out", tmp_path / "state")
        assert sambalm("generate", source, *words)[0] == 0
        tails.append(load_file(tmp_path / "state")["extra.tail"].tolist())
    assert tails[0] == tails[1]
