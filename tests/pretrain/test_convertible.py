"""A run whose model `sambalm convert to-hf` would refuse: it says so before it trains, in the words of that command."""

import json
import shutil

import pytest
import sentencepiece
import yaml

from sambalm.data_pipeline.preprocess import preprocess
from sambalm.model.registry import mixer
from sambalm.pretrain.checkpointing.to_hf import conversion_refusal
from sambalm.pretrain.config_file import parse_config
from tests.conftest import VOCAB_SIZE
from tests.support import program, toy_mixer
from tests.support.data import make_texts, write_jsonl
from tests.support.whole_runs import changed

WARNING = "warning: `sambalm convert to-hf` would refuse this run's model: "


@pytest.fixture
def toy():
    """The mixer of another package, which has no side in the Hugging Face format as long as the test runs."""
    toy_mixer.install()
    one = mixer("T")
    whole, one.hf = one.hf, None
    yield
    one.hf = whole
    toy_mixer.uninstall()


@pytest.fixture
def moved(tokens, tmp_path):
    """The session's tokens and tokenizer in a folder of their own."""
    shutil.copytree(tokens.parent, tmp_path / "moved", ignore=shutil.ignore_patterns(".*"))
    return tmp_path / "moved" / tokens.name


def refusal(values):
    return conversion_refusal(parse_config(values, source="test"))


def test_a_refusal_is_told_once_and_by_both_commands(moved, run_values, tmp_path):
    moved.with_name("tokenizer.model").unlink()
    values = changed(run_values, data={"train": str(moved)}, train={"steps": 1})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))

    first = program.run("train", config)
    (warning,) = (line for line in first.stderr.splitlines() if line.startswith(WARNING))
    converted = program.run("convert", "to-hf", values["run"]["dir"], tmp_path / "hf")
    assert (converted.returncode, converted.stderr) == (2, f"error: {warning.removeprefix(WARNING)}\n")
    assert str(moved.with_name("tokenizer.model")) in warning
    again = program.run("train", config, "train.steps=2")
    assert (first.returncode, again.returncode, WARNING in again.stderr) == (0, 0, False)


def test_a_unigram_model_is_not_refused(run_values, tmp_path):
    texts = make_texts(200, seed=1)
    with open(tmp_path / "unigram.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=VOCAB_SIZE, hard_vocab_limit=False
        )
    path = write_jsonl(tmp_path / "text.jsonl", texts)
    preprocess([path], tokenizer=tmp_path / "unigram.model", output_prefix=tmp_path / "tokens", workers=1)
    assert refusal(changed(run_values, data={"train": str(tmp_path / "tokens")})) is None


def test_what_can_be_converted_has_no_refusal(run_values):
    assert refusal(run_values) is None


def test_a_mixer_without_a_layer_for_transformers(toy, run_values):
    values = changed(run_values, model={"pattern": "T-*-", "mixers": {"token_shift": {"channels": 22}}})
    assert "the mixer token_shift (T in model.pattern) cannot be written in the Hugging Face format" in refusal(values)


def test_a_tokenizer_that_is_gone_or_another_or_larger_than_the_model(moved, run_values):
    values = changed(run_values, data={"train": str(moved)}, model={"vocab_size": VOCAB_SIZE - 1})
    assert f"pieces but the model's vocab_size is {VOCAB_SIZE - 1}" in refusal(values)
    values = changed(values, model={"vocab_size": VOCAB_SIZE})
    assert refusal(values) is None
    tokenizer = moved.with_name("tokenizer.model")
    manifest = json.loads(moved.with_name(f"{moved.name}.json").read_text())
    assert manifest["tokenizer"]["path"] == tokenizer.name
    tokenizer.write_bytes(tokenizer.read_bytes() + bytes([0x18, 0]))  # a field that no reader knows: another file
    assert "is not the one that made the tokens" in refusal(values)
    tokenizer.unlink()
    assert str(tokenizer) in refusal(values)
