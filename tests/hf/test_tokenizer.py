"""The converted tokenizer gives SentencePiece's ids for every text, and no other way to load it is taken."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer as data_tokenizer
from sambalm.model.hf.errors import HFError
from sambalm.model.hf.tokenization_samba import SambaTokenizer
from sambalm.model.hf.tokenizer import (
    SENTENCEPIECE_FILE,
    compare_tokenizers,
    load_tokenizer,
    save_tokenizer,
    tokenizer_facts,
)
from tests.support.marks import slow_except

TEXTS = [
    "",
    " ",
    "   ",
    "a",
    " leading",
    "trailing ",
    "\n",
    "\n\n two\r\n lines\n",
    "tab\tand\x00zero",
    "runs    of     spaces      ",
    "</s>",
    "<s>text</s> <unk> and <0x0A>",
    "▁",
    "▁▁ a ▁b",
    "😀 é 漢字 한국어 עברית e\u0301 ﬁ Ⅷ ①",
    "\u200b\ufeff\u3000\u00a0",
    "=" * 100,
    "a" * 99,
    "1234567890 3.14 0x1F",
]
ALPHABETS = [" ab", "aA ", "  \n", "=-_ ", "▁ x", "é漢 a😀", "01 2", ["the", " ", "an", "in", "  "], [" ", "\t", "\n"]]


def random_texts(count: int) -> list[str]:
    choose = random.Random(0)
    return ["".join(choose.choices(choose.choice(ALPHABETS), k=choose.randint(1, 60))) for _ in range(count)]


VARIANTS = {
    "llama": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "no byte fallback": {"byte_fallback": False},
    "normalised": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "padding piece": {"pad_id": 3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_ids_and_texts_are_sentencepieces(train_sentencepiece, documents, tmp_path, changes):
    model = train_sentencepiece(**changes)
    save_tokenizer(model, tmp_path)
    compare_tokenizers(model, tmp_path, TEXTS + documents + random_texts(300))


def test_auto_tokenizer_loads_it(exported, documents, sentencepiece_model):
    folder = exported[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert (folder / SENTENCEPIECE_FILE).read_bytes() == sentencepiece_model.read_bytes()
    for text in TEXTS + documents:
        assert tokenizer.encode(text) == processor.encode(text)
        assert tokenizer(text).input_ids == processor.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_transformers_own_reading_of_the_model_differs(sentencepiece_model, documents):
    """The reason for a conversion of our own; and the comparison notices."""
    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_model.parent, vocab_file=str(sentencepiece_model))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert any(tokenizer.encode(text, add_special_tokens=False) != processor.encode(text) for text in TEXTS + documents)


def test_literal_special_tokens_stay_text_unless_asked_for(sentencepiece_model, tmp_path):
    save_tokenizer(sentencepiece_model, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert 2 not in tokenizer.encode("one</s>two")
    assert tokenizer.decode(tokenizer.encode("one</s>two")) == "one</s>two"
    tokenizer.split_special_tokens = False
    assert 2 in tokenizer.encode("one</s>two", split_special_tokens=False)


def test_decoding_drops_special_tokens_only(sentencepiece_model, tmp_path):
    save_tokenizer(sentencepiece_model, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(" two  spaces")
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == " two  spaces"


def test_batches_are_padded_on_the_left(sentencepiece_model, tmp_path):
    save_tokenizer(sentencepiece_model, tmp_path)
    batch = load_tokenizer(tmp_path)(["a longer text than the other", "x"], padding=True)
    assert batch.attention_mask[1][0] == 0
    assert batch.attention_mask[1][-1] == 1
    assert batch.input_ids[1][0] == 0


@pytest.mark.parametrize("text", ["the quick brown fox", "import os"])
def test_a_wrong_merge_is_noticed(sentencepiece_model, tmp_path, text):
    save_tokenizer(sentencepiece_model, tmp_path)
    compare_tokenizers(sentencepiece_model, tmp_path, [text])
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    used = load_tokenizer(tmp_path).convert_ids_to_tokens(load_tokenizer(tmp_path).encode(text))
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != max(used, key=len)]
    path.write_text(json.dumps(content))
    with pytest.raises(HFError, match=r"differs from .* in document 1 \(token "):
        compare_tokenizers(sentencepiece_model, tmp_path, ["", text])


BY_SENTENCEPIECE = {
    "unigram": {"model_type": "unigram", "vocab_size": 700},
    "unigram without bytes": {"model_type": "unigram", "vocab_size": 500, "byte_fallback": False},
    "characters": {"model_type": "char"},
    "user-defined pieces": {"user_defined_symbols": ["<extra>", "  "]},
    "spaces at the end": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("kind", slow_except(["unigram", "user-defined pieces"], BY_SENTENCEPIECE))
def test_models_without_an_exact_equivalent_are_read_by_sentencepiece(train_sentencepiece, documents, tmp_path, kind):
    model = train_sentencepiece(**BY_SENTENCEPIECE[kind])
    save_tokenizer(model, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    compare_tokenizers(model, tmp_path, [*TEXTS, "<extra> a<extra>", *documents, *random_texts(300)])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for tokenizer in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert isinstance(tokenizer, SambaTokenizer)
        assert tokenizer("</s> x").input_ids == processor.encode("</s> x")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        assert len(tokenizer) == processor.vocab_size()
        assert tokenizer.encode("a</s>", split_special_tokens=False) == [*processor.encode("a"), 2]
        ids = processor.encode("two words")
        assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == processor.decode(ids)
        batch = tokenizer(["a longer text than the other", "x"], padding=True)
        assert batch.attention_mask[1][0] == 0 < batch.attention_mask[1][-1]


ALONE = """
import json, sys
from transformers import AutoTokenizer
from tests.support.marks import slow_except
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer.save_pretrained(sys.argv[2])
again = AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)
texts = json.load(sys.stdin)
assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
assert "sambalm" not in sys.modules
print(json.dumps([tokenizer.encode(text) for text in texts]))
"""


@pytest.mark.slow
def test_sentencepiece_reads_a_folder_without_this_package(train_sentencepiece, tmp_path):
    model, folder = train_sentencepiece(model_type="unigram", vocab_size=700), tmp_path / "folder"
    folder.mkdir()
    save_tokenizer(model, folder)
    command = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "saved")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    texts = TEXTS + random_texts(100)
    output = subprocess.run(
        command, input=json.dumps(texts), env=environment, check=True, capture_output=True, text=True
    ).stdout
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert json.loads(output.splitlines()[-1]) == processor.encode(texts)


@pytest.mark.slow
def test_another_sentencepiece_model_in_a_folder_is_noticed(train_sentencepiece, documents, tmp_path):
    model, other = (train_sentencepiece(model_type="unigram", vocab_size=size) for size in (700, 650))
    save_tokenizer(model, tmp_path)
    (tmp_path / SENTENCEPIECE_FILE).write_bytes(other.read_bytes())
    with pytest.raises(HFError, match=r"differs from .*trained\.model in "):
        compare_tokenizers(model, tmp_path, documents)


@pytest.mark.parametrize(("content", "message"), [(b"no model", "not a Sentence"), (b"", "no pieces"), (None, "read")])
def test_files_that_are_no_models_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(HFError, match=message):
        save_tokenizer(tmp_path / "x.model", tmp_path)
    with pytest.raises(HFError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def trained_json(folder: Path, documents: list[str], *, model: str) -> Path:
    """A tokenizer.json that puts a BOS before every text, as Llama 3's does."""
    if model == "byte-level":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        inner.normalizer = None
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        inner = Tokenizer(models.Unigram())
        inner.normalizer = normalizers.NFKC()
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<bos>", "<eos>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    inner.train_from_iterator(documents[:5], trainer)
    bos = [("<bos>", inner.token_to_id("<bos>"))]
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("model", ["byte-level", "unigram"])
def test_a_tokenizer_json_gives_the_ids_of_training(model, documents, tmp_path):
    path, folder = trained_json(tmp_path / "trained", documents, model=model), tmp_path / "out"
    folder.mkdir()
    save_tokenizer(path, folder)
    compare_tokenizers(path, folder, TEXTS + documents + random_texts(100))
    training, tokenizer = data_tokenizer(path), AutoTokenizer.from_pretrained(folder)
    for text in ("<eos> is text", "<bos>"):
        assert not {training.bos_id, training.eos_id} & set(training.encode(text))
        # A Unigram model has special tokens among its pieces, and in a folder it finds them in a text.
        assert (tokenizer.encode(text) == training.encode(text)) == (model == "byte-level")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (training.bos_id, training.eos_id)
    assert tokenizer.pad_token_id == training.eos_id
    assert tokenizer_facts(path, given={"eos": 5}).ids["eos"] == 5
    assert tokenizer_facts(path).vocab_size == training.vocab_size


def test_a_tokenizer_json_that_differs_is_refused(documents, tmp_path):
    path, folder = trained_json(tmp_path / "trained", documents, model="byte-level"), tmp_path / "out"
    folder.mkdir()
    save_tokenizer(path, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(HFError, match=r"differs from .* in an odd text"):
        compare_tokenizers(path, folder, [])
    path.write_text("{}")
    with pytest.raises(HFError, match=r"tokenizer\.json cannot be read"):
        save_tokenizer(path, folder)
