import json

import pytest

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.stored_text import stored_documents
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.data_pipeline.tokenizer_training import train_tokenizer

TEXTS = ["def f(x):\n    return x\n", "  two  spaces ", "naïve ✓", "a literal </s> here", "the held-out one\n"] * 4


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([tmp_path / "text.jsonl"], vocab_size=300, output=tmp_path / "tokenizer.model")
    preprocess([tmp_path / "text.jsonl"], tokenizer=tmp_path / "tokenizer.model", output_prefix=tmp_path / "tokens")
    return DataConfig(train=str(tmp_path / "tokens"), sequence_length=8, validation_fraction=0.1)


def test_the_held_out_documents_come_first_and_all_come_back(data, tmp_path):
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert list(stored_documents(data, tokenizer)) == TEXTS[-2:] + TEXTS[:-2]


def test_another_tokenizer_is_refused(data, tmp_path):
    smaller = train_tokenizer([tmp_path / "text.jsonl"], vocab_size=290, output=tmp_path / "smaller.model")
    with pytest.raises(DataError, match="beyond the 290 pieces"):
        list(stored_documents(data, smaller))


def test_the_highest_id_of_the_data_is_one_that_the_tokenizer_has(data, tmp_path):
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    highest = max(max(tokenizer.encode(text), default=0) for text in TEXTS)
    tokenizer.vocab_size = highest + 1
    assert len(list(stored_documents(data, tokenizer))) == len(TEXTS)
    tokenizer.vocab_size = highest
    with pytest.raises(DataError, match=f"holds token id {highest}, beyond the {highest} pieces"):
        list(stored_documents(data, tokenizer))
