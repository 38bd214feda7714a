import pytest

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.inputs import expand_inputs
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.data_pipeline.tokenizer_training import _LINE_CHARACTERS, _sample, train_tokenizer
from tests.support.data import VOCAB_SIZE, listing, write_jsonl


@pytest.mark.parametrize(
    "text", ["", " ", "stone river", "  two  leading", "a\tb\r\n\n\n c ", "漢字 été 😀", "</s><s><unk>", "nul \x00 end"]
)
def test_round_trip_through_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(ids)
    assert tokenizer.encode_batch([text, "stone"]) == [ids, tokenizer.encode("stone")]


def test_special_ids_and_settings(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, VOCAB_SIZE)
    # "stone" occurs often enough to be one piece, which byte fallback alone would not give.
    assert len(tokenizer.encode("stone")) == 1
    assert tokenizer.literals == {"<s>", "</s>", "<unk>"}
    assert [tokenizer.id_of(token) for token in ("</s>", "no such piece")] == [2, -1]


def test_digits_are_never_merged(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["stone 2024"] * 50)
    tokenizer = train_tokenizer([path], vocab_size=273, output=tmp_path / "t.model")
    assert len(tokenizer.encode("2024")) == 5  # the space before, and each digit
    assert len(tokenizer.encode("stone")) == 1


def test_training_is_deterministic_and_quiet(tokenizer, corpus, tmp_path, capfd):
    again = train_tokenizer([corpus], vocab_size=VOCAB_SIZE, output=tmp_path / "again.model")
    assert again.sha256 == tokenizer.sha256
    assert capfd.readouterr() == ("", "")


def test_a_sample_never_has_more_characters_than_asked_for(tmp_path):
    """Each document is drawn with a probability of half, or nearly, so that half of the seeds draw too many."""
    files = expand_inputs([write_jsonl(tmp_path / "a.jsonl", ["x" * 200] * 50)])
    characters = files[0].size_bytes // 2
    drawn = [
        sum(
            len(document.text)
            for document in _sample(files, text_key="text", seed=seed, characters=characters, progress=None)
        )
        for seed in range(20)
    ]
    assert max(drawn) <= characters
    assert len(set(drawn)) > 3
    assert max(drawn) > characters - 200


def test_sample_is_bounded_and_depends_on_the_seed(corpus, tmp_path):
    def train(name, **options):
        return train_tokenizer([corpus], vocab_size=300, output=tmp_path / name, **options).sha256

    whole, first = train("a"), train("b", sample_characters=6000, seed=1)
    assert first == train("c", sample_characters=6000, seed=1)
    assert len({whole, first, train("d", sample_characters=6000, seed=2)}) == 3


@pytest.mark.parametrize("words", ["stone harbour", "камень гавань", "𓀀𓀁 𓀂𓀃𓀄"])  # of 1, 2 and 4 bytes a character
def test_long_lines_are_learnt_from(words, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", [(f"{words} " * 3000)[: 4 * _LINE_CHARACTERS]])  # no shorter line
    tokenizer = train_tokenizer([path], vocab_size=270 if len(words) < 10 else 285, output=tmp_path / "t.model")
    assert len(tokenizer.encode(words)) == 2


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(100_000, r"too large for this text; set it to at most \d+"), (50, "too small")]
)
def test_impossible_vocabularies_are_refused(corpus, tmp_path, vocab_size, message):
    with pytest.raises(DataError, match=f"vocab_size={vocab_size} is {message}") as caught:
        train_tokenizer([corpus], vocab_size=vocab_size, output=tmp_path / "t.model")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == []


def test_bad_input_is_named_and_leaves_nothing(corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + "{oops\n")
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"bad\.jsonl:201: malformed JSON"):
        train_tokenizer([bad], vocab_size=VOCAB_SIZE, output=tmp_path / "t.model")
    assert listing(tmp_path) == before


def test_an_output_that_would_be_read_as_another_format_is_refused_before_training(tmp_path):
    with pytest.raises(DataError, match=r"t\.json is a SentencePiece model, and the extension \.json"):
        train_tokenizer([tmp_path / "no-text-yet.jsonl"], vocab_size=VOCAB_SIZE, output=tmp_path / "t.json")
    assert listing(tmp_path) == []


def test_missing_and_invalid_models_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.model does not exist"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "t.model").write_text("not a model")
    with pytest.raises(DataError, match=r"t\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")
