"""Tokens to text as they come: the pieces are the whole that the tokenizer decodes, for every kind of tokenizer."""

import base64
import io
import json
import random
import string

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.hf.tokenizer import load_tokenizer as load_hf_tokenizer
from sambalm.model.hf.tokenizer import save_tokenizer
from sambalm.pretrain.generation.text import StopStrings, huggingface_text, training_text

TEXTS = [
    "  two spaces first, a tab\tand\n\n  two spaces after a newline \n",
    "naïve café: 漢字 and 日本語, 한국어, עברית, हिन्दी",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, é as two, \u200b and \ufeff and \x00 and \ufffd.",
    "\u2581 is SentencePiece's own sign for a space, </s> is no token, <0x41> no byte",
    "don't stop . now , please ! it 's do n't",
]


def sentencepiece_file(folder, **changes):
    model = io.BytesIO()
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    lines = (
        word * 3 for word in (*TEXTS[0].split(), *TEXTS[4].split(), string.ascii_letters, string.punctuation, "  ")
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines] * 5), model_writer=model, hard_vocab_limit=False, **settings | changes
    )
    path = folder / "trained.model"
    path.write_bytes(model.getvalue())
    return path


def huggingface_file(folder, name):
    """A tokenizer.json of some family, trained on the texts."""
    special = {"special_tokens": ["<s>", "</s>"]}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if name == "byte level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, **special)
    elif name == "byte level and more":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, **special)
    elif name == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", show_progress=False, **special)
    elif name == "word pieces":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, show_progress=False, **special)
    elif name == "word ends":
        tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>", show_progress=False, **special)
    else:
        tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="<s>"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=200, show_progress=False, **special)
    tokenizer.train_from_iterator([*TEXTS] * 4, trainer)
    tokenizer.add_tokens(["added one", "\u0120odd"])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def tiktoken_file(folder):
    ranks = [bytes([byte]) for byte in range(256)] + [b" th", b"\xf0\x9f", b"\x91\xa9", b"e ", b"\xe6\xbc"]
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks))
    path = folder / "own.tiktoken"
    path.write_bytes(b"\n".join(lines))
    scheme = {"pattern": r"\S+|\s+", "special_tokens": {"<|endoftext|>": len(ranks)}}
    path.with_name("own.tiktoken.json").write_text(json.dumps(scheme))
    return path


SENTENCEPIECE = {
    "as trained here": {},
    "without a first space": {"add_dummy_prefix": False},
    "with fewer spaces": {"remove_extra_whitespaces": True},
    "without bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram", "vocab_size": 350},
    "spaces after words": {"treat_whitespace_as_suffix": True},
}
HUGGINGFACE = ["byte level", "byte level and more", "unigram", "word pieces", "word ends", "words"]


def streamed(new_text, ids):
    text = new_text()
    pieces = [text.push(number) for number in ids]
    return pieces, "".join(pieces) + text.flush()


def check(decode, new_text, encode, size):
    """Compares pieces with the whole, for texts and for random ids, of which most runs are no UTF-8."""
    draw = random.Random(0)
    lists = [encode(text) for text in (*TEXTS, "".join(TEXTS), "")]
    lists += [[draw.randrange(size) for _ in range(draw.randint(1, 40))] for _ in range(600)]
    few = [encode(text)[:6] for text in TEXTS]  # short runs of odd tokens in every order
    lists += [
        [number for _ in range(draw.randint(1, 6)) for number in draw.choice(few)[: draw.randint(1, 6)]]
        for _ in range(300)
    ]
    for ids in lists:
        pieces, whole = streamed(new_text, ids)
        assert whole == decode(ids), ids
        if len(whole) > 200:
            assert sum(map(bool, pieces)) > 10, "the text came all at once"


@pytest.mark.parametrize("changes", SENTENCEPIECE.values(), ids=SENTENCEPIECE.keys())
def test_sentencepiece(changes, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path, **changes))
    check(tokenizer.decode, training_text(tokenizer), tokenizer.encode, tokenizer.vocab_size)


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_tokenizer_json(name, tmp_path):
    tokenizer = load_tokenizer(huggingface_file(tmp_path, name))
    check(tokenizer.decode, training_text(tokenizer), tokenizer.encode, tokenizer.vocab_size + 5)


def test_tiktoken(tmp_path):
    tokenizer = load_tokenizer(tiktoken_file(tmp_path))
    check(tokenizer.decode, training_text(tokenizer), tokenizer.encode, tokenizer.vocab_size)


@pytest.mark.parametrize("prefix", [True, False])
def test_the_tokenizer_of_an_exported_folder(prefix, tmp_path):
    model = sentencepiece_file(tmp_path, add_dummy_prefix=prefix)
    save_tokenizer(model, tmp_path)
    tokenizer = load_hf_tokenizer(tmp_path)
    new_text = huggingface_text(tokenizer.backend_tokenizer)

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    check(decode, new_text, tokenizer.encode, len(tokenizer))


def test_characters_of_several_bytes_come_when_they_are_whole(tmp_path):
    """SentencePiece decides character by character; a Hugging Face decoder decides on a whole run of bytes."""
    model = sentencepiece_file(tmp_path)
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("a漢字b")
    assert streamed(training_text(tokenizer), ids)[0] == ["", "a", "", "", "漢", "", "", "字", "b"]
    save_tokenizer(model, tmp_path)
    new_text = huggingface_text(load_hf_tokenizer(tmp_path).backend_tokenizer)
    assert streamed(new_text, ids)[0] == ["", "a", "", "", "", "", "", "", "漢字b"]


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_text_goes_on_after_text_that_was_flushed(kind, tmp_path):
    """What was shown is neither shown again nor lost: bytes after it begin anew, words after it keep their spaces."""
    model = sentencepiece_file(tmp_path)
    save_tokenizer(model, tmp_path)
    tokenizer = load_tokenizer(model if kind == "sentencepiece" else tmp_path / "tokenizer.json")
    for before, after, expected in (("one\n", "漢", ("one\n", "漢")), ("one", "x stop", ("one", "x stop"))):
        text = training_text(tokenizer)()
        first = "".join(map(text.push, tokenizer.encode(before))) + text.flush()
        second = "".join(map(text.push, tokenizer.encode(after)[1:])) + text.flush()
        assert (first, second) == expected
    text = training_text(tokenizer)()
    ids = tokenizer.encode("a漢 b")
    for number in ids[:4]:
        text.push(number)
    assert text.flush() == "\ufffd\ufffd"
    assert "".join(map(text.push, ids[4:])) + text.flush() == "\ufffd b"


def test_ids_beyond_the_tokenizer_are_no_text(tmp_path):
    for file in (sentencepiece_file(tmp_path), tiktoken_file(tmp_path), huggingface_file(tmp_path, "byte level")):
        tokenizer = load_tokenizer(file)
        ids = tokenizer.encode("one")
        assert streamed(training_text(tokenizer), [*ids, tokenizer.vocab_size + 7])[1] == "one"


def test_a_text_costs_the_same_per_token_at_any_length(tmp_path):
    """What is decoded again for a token does not grow, with or without newlines."""
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path))
    text = training_text(tokenizer)()
    decoded = []
    inner = text._decode
    text._decode = lambda ids: (decoded.append(len(ids)), inner(ids))[1]
    for _ in range(300):
        for number in tokenizer.encode("   spaces and words "):
            text.push(number)
    assert max(decoded) <= 4


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_ends_a_text_before_it_however_it_comes(size):
    text = "one two\n\nthree aab aaab four"
    for strings, expected in (
        (["\n\n"], "one two"),
        (["aaab"], "one two\n\nthree aab "),
        (["four!", "three", "two\n\nthree"], "one "),
        (["", "x"], text),
        (["fourth"], text),
    ):
        stops = StopStrings(strings)
        shown = []
        for start in range(0, len(text), size):
            shown.append(stops.push(text[start : start + size]))
            if stops.found:
                break
        shown.append(stops.finish())
        assert "".join(shown) == expected
        assert stops.found == (expected != text)


def test_text_that_begins_no_stop_string_is_not_held_back():
    stops = StopStrings(["</end>"])
    assert [stops.push(text) for text in ("a", "<", "b</", "end", " >")] == ["a", "", "<b", "", "</end >"]
