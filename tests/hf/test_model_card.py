"""What a folder's README says of each mixer, with sizes of which no two are equal."""

import pytest

from sambalm.model.config import ModelConfig
from sambalm.model.hf.model_card import TrainingFacts, model_card
from sambalm.model.hf.names import hf_config

SIZES = {"hidden_size": 48, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 40, "window": 9, "vocab_size": 100}
SIZES |= {"d_state": 5, "d_conv": 3, "dt_rank": 2, "rope_base": 500.0}
MIXERS = {
    "A": ("gla", {"num_heads": 2, "head_dim": 8, "expand_v": 3}),
    "R": ("retnet", {"num_heads": 3, "head_dim": 4, "expand_v": 5}),
    "G": ("gated_deltanet", {"num_heads": 2, "head_dim": 6, "expand_v": 3, "d_conv": 3}),
    "S": ("mamba2", {"d_state": 24, "head_dim": 16, "groups": 2, "expand": 3, "d_conv": 5}),
    "=": ("mlp2", {"size": 77}),
    "Z": ("mega", {"key_dim": 10, "chunk_tokens": 6, "d_state": 7, "d_conv": 5}),
}


DESCRIPTIONS = {
    "M": "Mamba-1: 5 states, inner width 96, convolution over 3 tokens, step rank 2",
    "*": "sliding-window attention: 4 query heads, 2 key/value heads, window 9, rotary base 500",
    "-": "SwiGLU MLP of width 40",
    "F": "full causal attention: 4 query heads, 2 key/value heads, rotary base 500",
    "A": "gated linear attention: 2 heads, keys of 8 and values of 24 channels",
    "R": "retention: 3 heads, keys of 4 and values of 20 channels",
    "G": "Gated DeltaNet: 2 heads, keys of 6 and values of 18 channels, convolution over 3 tokens",
    "S": "Mamba-2: 24 states, heads of 16 channels in 2 groups, inner width 144, convolution over 5 tokens",
    "U": "gated memory unit over the scan's output of the last `S` before",
    "X": "cross attention: 4 query heads, 2 key/value heads, over the keys and values of the last `F` before",
    "=": "SwiGLU MLP of width 77, in the place of a mixer",
    "Z": ("Mega-S6: queries and keys of 10 channels in chunks of 6 tokens, S6 of 7 states, convolution over 5 tokens"),
}
IN_FP32 = {"M": "mamba's A_log, mamba's D, mamba's dt_proj.bias", "F": ""}


@pytest.mark.parametrize("pattern", ["M*-", "F-", "A-", "R-", "G-", "S-F-U-X-", "=-", "Z-"])
def test_each_mixer_is_described_with_its_own_sizes(pattern):
    mixers = dict(MIXERS[letter] for letter in pattern if letter in MIXERS)
    config = hf_config(ModelConfig(pattern=pattern, mixers=mixers, **SIZES))
    card = model_card(config, TrainingFacts(), parameters=1_234_567, dtype="bfloat16").splitlines()
    described = [line for line in card if line.startswith("- `")]
    assert sorted(described) == sorted(f"- `{letter}`: {DESCRIPTIONS[letter]}" for letter in set(pattern))
    (stored,) = (line for line in card if line.startswith("- parameters"))
    if pattern[0] in IN_FP32:
        exceptions = IN_FP32[pattern[0]]
        assert stored == f"- parameters: 1,234,567, stored in bfloat16{exceptions and f' ({exceptions} in float32)'}"
    assert card[card.index("## Training") + 2] == "Not recorded."


def test_what_is_not_known_of_the_training_is_left_out():
    config = hf_config(ModelConfig(pattern="M-", tie_embeddings=False, **SIZES))
    facts = TrainingFacts(step=1200, loss=2.5, settings=["peak learning rate: 4e-4"])
    card = model_card(config, facts, parameters=7, dtype="float32").splitlines()
    start = card.index("## Training") + 2
    assert card[start : start + 4] == [
        "- optimizer steps: 1,200",
        "- training loss at that step: 2.5000",
        "- peak learning rate: 4e-4",
        "",
    ]
    assert "- hidden size 48, vocabulary 100 (untied embeddings)" in card
