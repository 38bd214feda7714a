"""tiktoken's rank files become tokenizers with tiktoken's own ids for every text."""

import base64
import json
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from sambalm.data_pipeline.tokenizer_formats import TiktokenTokenizer
from sambalm.model.hf import load_for_generation
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.export import export_hf
from sambalm.model.hf.tiktoken import TiktokenFile, byte_letters, oniguruma_pattern
from sambalm.model.hf.tokenizer import compare_tokenizers, load_tokenizer, save_tokenizer, tokenizer_facts
from tests.hf.test_tokenizer import TEXTS, random_texts
from tests.support.hf import RandomState, tiny_config

OPENAI = ["r50k_base", "cl100k_base", "o200k_base"]


def trained_ranks(folder: Path, documents: list[str], name: str) -> Path:
    """A rank file that a byte-level BPE of some hundred tokens makes, trained on pieces that run over lines."""
    inner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\s+|\w+|[^\s\w]+"), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    runs = [" " * n + "=" * n + "a" * n + "1" * n for n in range(1, 40)]
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([*documents, *TEXTS, *runs * 20], trainer)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ids = sorted(inner.get_vocab().items(), key=lambda entry: entry[1])
    lines = [base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d" % rank for token, rank in ids]
    path = folder / f"{name}.tiktoken"
    path.write_bytes(b"\n".join(lines))
    return path


def file_of(path: Path) -> TiktokenFile:
    loaded = TiktokenTokenizer(path)
    return TiktokenFile(path, loaded.pattern, loaded.special_tokens)


@pytest.mark.parametrize("name", OPENAI)
def test_ids_and_texts_are_tiktokens(documents, tmp_path, name):
    file, folder = file_of(trained_ranks(tmp_path, documents, name)), tmp_path / "out"
    folder.mkdir()
    save_tokenizer(file, folder, given={"bos": None, "eos": file.special_tokens["<|endoftext|>"]})
    choose = random.Random(1)
    mixed = ["".join(choose.choices(" \n\r\t1a=é漢😀'sLL.\u00a0\u2028", k=40)) for _ in range(500)]
    compare_tokenizers(file, folder, [*TEXTS, *documents, *random_texts(300), *mixed])
    tokenizer, training = AutoTokenizer.from_pretrained(folder), TiktokenTokenizer(file.path)
    assert tokenizer.eos_token_id == training.eos_id
    assert tokenizer.encode("one<|endoftext|>two") == training.encode("one<|endoftext|>two")
    assert (
        tokenizer.decode([*training.encode(" two  spaces"), training.eos_id], skip_special_tokens=True)
        == " two  spaces"
    )
    assert tokenizer_facts(file).vocab_size == training.vocab_size


def test_a_file_of_ones_own(documents, tmp_path):
    path, folder = trained_ranks(tmp_path, documents, "own"), tmp_path / "out"
    folder.mkdir()
    scheme = {
        "pattern": r"^#|[^\s\d]{2,5}+|\S{2}+|\s+$|\d{1,3}+|\s|\S",
        "special_tokens": {"<end>": 2000, "<more>": 1999},
    }
    path.with_name("own.tiktoken.json").write_text(json.dumps(scheme))
    file = file_of(path)
    save_tokenizer(file, folder, given={"eos": 2000})
    compare_tokenizers(file, folder, [*TEXTS, *documents, *random_texts(300), "# one\n# two \n", "1234567 abcdefghi"])
    assert load_tokenizer(folder).eos_token_id == 2000


def test_a_model_is_exported_with_it(documents, tmp_path):
    path, folder = trained_ranks(tmp_path, documents, "r50k_base"), tmp_path / "out"
    folder.mkdir()
    file = TiktokenFile(path, TiktokenTokenizer(path).pattern, {"<|endoftext|>": 1300})
    config = tiny_config("M-", vocab_size=1301)
    texts = [text + "<|endoftext|>" for text in documents[:5]]
    export_hf(
        RandomState(config), config, folder=folder, tokenizer_model=file, documents=texts, token_ids={"eos": 1300}
    )
    model, tokenizer = load_for_generation(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1300
    config = tiny_config("M-", vocab_size=1300)
    with pytest.raises(HFError, match=r"r50k_base\.tiktoken has 1301 pieces but the model's vocab_size is 1300"):
        export_hf(RandomState(config), config, folder=folder, tokenizer_model=file, documents=texts)


def test_patterns_keep_their_meaning():
    assert oniguruma_pattern(r"\p{N}{1,3}+| ?\s++$|[$^]\$") == r"(?>\p{N}{1,3})| ?\s++\z|[$^]\$"
    assert oniguruma_pattern(r"^[^\]a]{2}+(?i:x)") == r"\A(?>[^\]a]{2})(?i:x)"


def test_what_differs_is_refused(documents, tmp_path):
    path, folder = trained_ranks(tmp_path, documents, "r50k_base"), tmp_path / "out"
    folder.mkdir()
    file = file_of(path)
    save_tokenizer(file, folder)
    other = TiktokenFile(path, r"\S+|\s+", file.special_tokens)
    with pytest.raises(HFError, match=r"differs from .*r50k_base\.tiktoken in "):
        compare_tokenizers(other, folder, documents)
    # Of tokens that no pair makes, pieces are looked up, and so is one that is the name of a control token.
    path.write_bytes(path.read_bytes() + b"\n" + base64.b64encode(b"qzqzq") + b" 1200")
    whole = TiktokenFile(path, r"\S+|\s+", {"<|x|>": 5000})
    save_tokenizer(whole, folder)
    assert load_tokenizer(folder).encode("qzqzq") == whole.encoding().encode("qzqzq") == [1200]
    with pytest.raises(HFError, match=r"differs from .*r50k_base\.tiktoken in an odd text .*<\|x\|>"):
        compare_tokenizers(whole, folder, [])
    with pytest.raises(HFError, match=r"has the control token 'a' as a token, too"):
        save_tokenizer(TiktokenFile(path, r"\S", {"a": 5000}), folder)
    path.write_bytes(b"no ranks")
    with pytest.raises(HFError, match=r"cannot be read .* give a tiktoken rank file"):
        save_tokenizer(TiktokenFile(path, r"\S", {}), folder)
