"""Texts and a tokenizer trained on them."""

from pathlib import Path

import pytest

from sambalm.data_pipeline.tokenizer import Tokenizer
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from tests.support.data import VOCAB_SIZE, make_texts, write_jsonl


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts(200, seed=0))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, corpus) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([corpus], vocab_size=VOCAB_SIZE, output=path)
