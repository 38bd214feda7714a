"""The fast path against the reference, and formats of tokenizers besides SentencePiece."""

import base64
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers

from sambalm.data_pipeline import encoding
from sambalm.data_pipeline.documents import ReadOptions
from sambalm.data_pipeline.encoding import Encoder, EncoderConfig, FastPath, NotProven
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.shards import check_shard, read_manifest
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from tests.support.data import listing, make_texts, write_jsonl

LITERALS = ["</s>", "a </s>b", "<s>", "x<unk>", "</s></s>", "<0x0A>", "&lt;/s>"]


def _fuzz(seed: int, texts: int) -> list[str]:
    draw = random.Random(seed)
    alphabet = ["stone", " river", " ", "  ", "\n", "\t", "\u2581", "é", "漢", "😀", "\u0301", "\x00", "\u200b"]
    alphabet += ["\u00a0", "\r\n", "<", "42", "ﬁ", "\ufeff", "İ"]
    return ["".join(draw.choices(alphabet, k=draw.randint(0, 50))) for _ in range(texts)]


def _split(fast: FastPath, texts: list[str]) -> list[list[int]]:
    ids, counts = fast.encode(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def test_the_fast_path_gives_the_references_ids(tokenizer):
    texts = [*make_texts(50, seed=9), *_fuzz(0, 3000), *LITERALS, ""]
    random.Random(1).shuffle(texts)
    fast = FastPath.proven(tokenizer, texts)
    assert _split(fast, texts) == tokenizer.encode_batch(texts)
    for text in LITERALS:
        assert _split(fast, [text]) == [tokenizer.encode(text)]


def test_the_fast_path_is_not_taken_unproven(tokenizer, monkeypatch):
    for texts in ([], ["", ""]):
        with pytest.raises(NotProven, match="there was no text to prove"):
            FastPath.proven(tokenizer, texts)
    exact = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [ids[::-1] for ids in exact(texts)])  # another version
    with pytest.raises(NotProven, match="gives other ids for the text that begins with 'a stone'"):
        FastPath.proven(tokenizer, ["", "a stone"])


def test_gigatoken_alone_would_inject_special_ids(tokenizer):
    """Why documents with literal special pieces go another way."""
    alone = tokenizer.fast().encode("a </s>b").tolist()
    assert tokenizer.eos_id in alone
    assert tokenizer.eos_id not in _split(FastPath(tokenizer), ["a </s>b"])[0]


def test_a_literal_that_normalisation_brings_about_stays_text(tmp_path, corpus):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "nfkc"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="nfkc",
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "nfkc.model")
    wide = "stone ＜/s＞ river"  # noqa: RUF001
    assert "</s>" in tokenizer.decode(tokenizer.encode(wide))
    for texts in ([wide], ["stone", wide, "river"], [wide, "</s>"]):
        assert _split(FastPath(tokenizer), texts) == tokenizer.encode_batch(texts)


class _Lies(FastPath):
    def _encode(self, texts):
        ids, counts = super()._encode(texts)
        return np.where(ids == 300, 301, ids), counts


def test_a_fast_path_that_differs_is_not_taken(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr("sambalm.data_pipeline.preprocess.FastPath", _Lies)
    summary = preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "d")
    assert summary.slow_because.startswith("gigatoken gives other ids for the text that begins with")
    assert "this was the slow way" in summary.describe(tmp_path / "d")
    monkeypatch.undo()
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "good")
    assert (tmp_path / "d_00000.bin").read_bytes() == (tmp_path / "good_00000.bin").read_bytes()


def test_a_model_that_the_fast_path_does_not_know_is_taken_slowly(tmp_path, corpus):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "uni"),
        vocab_size=80,
        model_type="unigram",
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "uni.model")
    with pytest.raises(NotProven, match="gigatoken cannot load"):
        FastPath.proven(tokenizer, texts)
    for workers in (1, 2):
        prefix = tmp_path / f"w{workers}" / "d"
        summary = preprocess([corpus], tokenizer=tokenizer.path, output_prefix=prefix, workers=workers)
        assert "gigatoken cannot load" in summary.slow_because
        index = check_shard(f"{prefix}_00000")
        ids = np.fromfile(f"{prefix}_00000.bin", dtype=index.dtype)
        assert ids.tolist() == [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory, corpus):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    # What a tokenizer.json may also ask for, and training data must not get.
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model.enable_truncation(5)
    model.enable_padding()
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


def test_hugging_face_tokenizers(tmp_path, hf_path, corpus):
    tokenizer = load_tokenizer(hf_path)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == ("huggingface", 400, 0, -1)
    text = "stone river, harbour </s> <|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert len(ids) > 5
    assert tokenizer.encode_batch([text, "a"])[1] == tokenizer.encode("a")
    asked = load_tokenizer(hf_path, special_tokens=True)
    assert asked.encode("a<|endoftext|>")[-1] == 0

    paths = [corpus, write_jsonl(tmp_path / "more.jsonl", [text, "🦔 é\n\n  x"])]
    summary = preprocess(paths, tokenizer=hf_path, output_prefix=tmp_path / "d")
    assert summary.slow_because is None
    texts = [json.loads(line)["text"] for path in paths for line in path.read_text().splitlines()]
    ids = np.fromfile(tmp_path / "d_00000.bin", dtype=np.uint16)
    assert ids.tolist() == [i for text in texts for i in [*tokenizer.encode(text), 0]]
    assert read_manifest(tmp_path / "d").tokenizer.kind == "huggingface"


def test_the_end_of_text_of_a_hugging_face_tokenizer(tmp_path, hf_path):
    content = json.loads(hf_path.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|pad|>"}}')
    assert load_tokenizer(path).eos_id == 1
    assert load_tokenizer(path, eos_token="<|endoftext|>").eos_id == 0
    with pytest.raises(DataError, match="has no token 'END'"):
        load_tokenizer(path, eos_token="END")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        load_tokenizer(path)


def test_a_vocabulary_with_gaps_reaches_up_to_its_highest_id(tmp_path, hf_path):
    content = json.loads(hf_path.read_bytes())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 450
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).vocab_size == 451


def test_without_an_end_of_text_a_run_does_not_start(tmp_path, hf_path, corpus):
    content = json.loads(hf_path.read_bytes())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"]]
    content["post_processor"] = None
    content["model"]["vocab"] = {
        ("END" if k == "<|endoftext|>" else k): v for k, v in content["model"]["vocab"].items()
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json names no EOS"):
        preprocess([corpus], tokenizer=path, output_prefix=tmp_path / "d")
    preprocess([corpus], tokenizer=path, output_prefix=tmp_path / "d", append_eos=False)
    assert "d_00000.bin" in listing(tmp_path)


@pytest.fixture
def ranks(tmp_path):
    pieces = [bytes([byte]) for byte in range(256)] + [b"st", b"on", b"ston", b"stone", b" r", b"iv", b"riv", b"-n"]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    return path


def test_tiktoken_files(tmp_path, ranks, corpus):
    with pytest.raises(DataError, match=r"own\.tiktoken does not say how text is split: name it .*own\.tiktoken\.json"):
        load_tokenizer(ranks)
    beside = tmp_path / "own.tiktoken.json"
    beside.write_text('{"pattern": " ?\\\\w+|\\\\s+|\\\\W", "special_tokens": {"<|endoftext|>": 300}}')
    tokenizer = load_tokenizer(ranks)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("tiktoken", 301, 300)
    text = "stone river <|endoftext|> é"
    assert tokenizer.encode("stone")[0] == 259
    assert 300 not in tokenizer.encode(text)
    assert tokenizer.decode([*tokenizer.encode(text), 300]) == text
    assert 300 in load_tokenizer(ranks, special_tokens=True).encode(text)
    summary = preprocess([corpus], tokenizer=ranks, output_prefix=tmp_path / "d")
    assert "its split pattern is not one of OpenAI's" in summary.slow_because
    for content, message in (("{}", "must hold"), ('{"pattern": "(", "special_tokens": {}}', "is not a tiktoken rank")):
        beside.write_text(content)
        with pytest.raises(DataError, match=message):
            load_tokenizer(ranks)


def test_openais_names_stand_for_their_patterns(tmp_path, ranks, corpus):
    for name, eos_id, vocab_size in (("r50k_base", 50256, 50257), ("cl100k_base", 100257, 100277)):
        path = ranks.rename(tmp_path / f"{name}.tiktoken")
        tokenizer = load_tokenizer(path)
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (eos_id, vocab_size)
        # U+323B0 became a letter in Unicode 17, which gigatoken knows and tiktoken does not.
        new = "stone \U000323b0-n river"
        if name == "cl100k_base":
            assert tokenizer.fast().encode(new).tolist() != tokenizer.encode(new)
        texts = [*make_texts(20, seed=4), *_fuzz(3, 500), "<|endoftext|>", new]
        assert _split(FastPath.proven(tokenizer, texts), texts) == tokenizer.encode_batch(texts)
        preprocess([corpus], tokenizer=path, output_prefix=tmp_path / name)
        assert check_shard(f"{tmp_path / name}_00000").dtype == (np.int32 if vocab_size > 65500 else np.uint16)
        ranks = path


def test_damaged_tokenizers_are_named(tmp_path):
    for name, message in (
        ("t.json", r"t\.json is not a Hugging Face tokenizer"),
        ("cl100k_base.tiktoken", r"base\.tiktoken is not a tiktoken rank"),
    ):
        (tmp_path / name).write_text("{nonsense nonsense nonsense}")
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)
    (tmp_path / "t.model").write_text("x")
    with pytest.raises(DataError, match="SentencePiece never reads special tokens out of a text"):
        load_tokenizer(tmp_path / "t.model", special_tokens=True)


def test_batches_are_cut_without_a_trace(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["", *make_texts(30, seed=2), "", "stone"])
    config = EncoderConfig(tokenizer.path, ReadOptions())
    from sambalm.data_pipeline.documents import pieces
    from sambalm.data_pipeline.inputs import input_file

    (piece,) = pieces(input_file(path), ReadOptions())
    whole = Encoder(config, tokenizer, fast_path=None).encode_piece(piece)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 50)
    encoder, batches = Encoder(config, tokenizer, fast_path=FastPath(tokenizer)), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: batches.append(sum(map(len, texts))) or encode(texts))
    cut = encoder.encode_piece(piece)
    assert len(batches) > 5
    assert all(characters >= 50 for characters in batches[:-1])  # each is filled anew
    assert max(batches) < 50 + max(map(len, make_texts(30, seed=2)))
    for name in ("tokens", "lengths", "positions", "text_bytes"):
        assert np.array_equal(getattr(whole, name), getattr(cut, name))
    assert whole.lengths[0] == whole.lengths[-2] == 0


def unigram():
    pieces = [
        ("<unk>", 0.0),
        ("</s>", -1.0),
        ("\u2581the", -2.0),
        ("\u2581of", -2.5),
        *((letter, -5.0) for letter in "</s>\u2581x"),
    ]
    return {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}


def word_level():
    words = ["<unk>", "</s>", "\u2581the", "\u2581of", "\u2581x"]
    return {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"}


@pytest.mark.parametrize("model", [unigram, word_level])
def test_special_tokens_among_the_pieces_of_a_model_stay_text(model, tmp_path):
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": content, **special} for number, content in enumerate(["<unk>", "</s>"])]
    added.append({"id": len(model()["vocab"]), "content": "<pad>", **special})
    record = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": space}
    record |= {"post_processor": None, "decoder": space, "padding": None, "model": model()}
    record["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(record))
    plain, asked = load_tokenizer(path), load_tokenizer(path, special_tokens=True)
    for text in ("the</s> of", "</s>", "x </s> the", "the <pad>"):
        assert not {1, len(model()["vocab"])} & set(plain.encode(text)), text
    assert 1 in asked.encode("the</s> of")
    assert plain.encode("the of x") == asked.encode("the of x") != []
    assert (plain.eos_id, plain.vocab_size) == (1, len(model()["vocab"]) + 1)
    if model is unigram:
        assert plain.decode(plain.encode("the</s> of")) == "the</s> of"
