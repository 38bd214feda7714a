import io
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from sambalm.model.config import ModelConfig
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.model_card import TrainingFacts
from tests.support.hf import RandomState, tiny_config

LLAMA_SETTINGS = {
    "vocab_size": 1200,
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Python's own sources: prose, code, numbers, runs of spaces, some Unicode."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    return [path.read_text("utf-8", errors="replace")[:8000] for path in paths]


@pytest.fixture(scope="session")
def train_sentencepiece(documents, tmp_path_factory):
    """Trains a SentencePiece model on the documents, with Llama's settings but for those given."""

    def train(**changes) -> Path:
        model = io.BytesIO()
        lines = (line for text in documents for line in text.split("\n"))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, **LLAMA_SETTINGS | changes
        )
        path = tmp_path_factory.mktemp("sentencepiece") / "trained.model"
        path.write_bytes(model.getvalue())
        return path

    return train


@pytest.fixture(scope="session")
def sentencepiece_model(train_sentencepiece) -> Path:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def exported(sentencepiece_model, documents, tmp_path_factory):
    """(folder, state, config) of an export in fp32 with several shards."""
    config = tiny_config("M-*-", vocab_size=1200, mlp_size=256)
    state = RandomState(config)
    folder = tmp_path_factory.mktemp("export") / "model"
    folder.mkdir()
    export_hf(
        state,
        config,
        folder=folder,
        tokenizer_model=sentencepiece_model,
        documents=documents[:5],
        max_shard_bytes=120_000,
        card=TrainingFacts(tokens_seen=123_456, step=10, loss=3.25, sequence_tokens=64, settings=["peak lr: 4e-4"]),
    )
    return folder, state, config


@pytest.fixture(scope="session")
def export(sentencepiece_model, documents, tmp_path_factory):
    """Exports a model of random weights, whose logits in pieces are compared on the way; returns (folder, state)."""

    def export(config: ModelConfig) -> tuple[Path, RandomState]:
        folder, state = tmp_path_factory.mktemp("export") / "model", RandomState(config)
        folder.mkdir()
        export_hf(state, config, folder=folder, tokenizer_model=sentencepiece_model, documents=documents[:3])
        return folder, state

    return export
