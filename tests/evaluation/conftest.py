import importlib.util
from pathlib import Path

import pytest
import torch

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.hf.tokenizer import save_tokenizer
from tests.conftest import VOCAB_SIZE, small_run
from tests.pretrain.conftest import sambalm  # noqa: F401  (a fixture)
from tests.support.hf import RandomState, hf_model, tiny_config
from tests.support.whole_runs import train


@pytest.fixture(scope="session")
def tokenizer(tokens):
    return load_tokenizer(tokens.parent / "tokenizer.model")


@pytest.fixture(scope="session")
def run_dir(tokens, tmp_path_factory) -> Path:
    """A finished run with held-out losses."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(small_run(tokens, folder))
    return folder


@pytest.fixture(scope="session")
def hf_folders(tokens, tmp_path_factory) -> dict[str, Path]:
    """Hugging Face folders with random weights and the tokenizer of `tokens`, by the kind of model."""
    import transformers as hf

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    heads = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tiny_config("M-*-", vocab_size=VOCAB_SIZE)
    torch.manual_seed(0)
    models = {
        "samba": hf_model(config, RandomState(config)),
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads)),
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, num_attention_heads=4, n_positions=64)),
        "mamba": hf.MambaForCausalLM(hf.MambaConfig(**sizes)),
    }
    models["samba"].config.eos_token_id = models["samba"].generation_config.eos_token_id = 2
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folders[name])
        save_tokenizer(tokens.parent / "tokenizer.model", folders[name])
    return folders


@pytest.fixture
def pretend_package(monkeypatch):
    """Says of one package that it is there, or with None that it is not; all others are looked for as ever."""
    find_spec = importlib.util.find_spec

    def pretend(package: str, spec: object) -> None:
        found = {package: spec}
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *given: found[name] if name in found else find_spec(name, *given)
        )

    return pretend
