import pytest

from sambalm.data_pipeline.blend import Draw, blend_draws, describe_draws, parse_blend
from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from tests.support.data import VOCAB_SIZE, make_texts, write_jsonl, write_shard


@pytest.fixture
def prefixes(tmp_path, tokenizer):
    for name, documents in (("web", 300), ("code", 60)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", make_texts(documents, seed=documents))
        preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / name)
    return str(tmp_path / "web"), str(tmp_path / "code")


def test_the_draws_are_those_of_a_run(prefixes):
    web, code = prefixes
    config = parse_blend([f"{web}=3", f"{code}=1"], validation_fraction=0.05)
    config = config.model_copy(update={"sequence_length": 16})
    samples = 8000
    dataset = build_train_dataset(config, open_sources(config), seed=0)
    draws = blend_draws(config, tokens=samples * 16)
    assert [draw.share for draw in draws] == [0.75, 0.25]
    for draw, epochs in zip(draws, dataset.epochs(samples), strict=True):
        assert draw.epochs == pytest.approx(epochs, rel=0.05)
    text = describe_draws(draws)
    assert f"warning: {code} is gone through" in text
    assert draws[1].epochs > 4
    assert f"{draws[0].drawn_tokens:,}" in text


def test_without_weights_tokens_decide(prefixes):
    draws = blend_draws(parse_blend(prefixes, validation_fraction=0.01), tokens=10_000)
    assert draws[0].epochs == pytest.approx(draws[1].epochs, rel=1e-3)
    assert sum(draw.drawn_tokens for draw in draws) == pytest.approx(10_000, abs=2)
    quiet = describe_draws(blend_draws(parse_blend(prefixes, validation_fraction=0.01), tokens=100))
    assert "repeated" not in quiet
    assert "warning" not in quiet


@pytest.mark.parametrize(
    ("drawn_tokens", "says"),
    [
        (100, None),
        (101, "code is repeated: 1.01 epochs"),
        (400, "code is repeated: 4.00 epochs"),
        (410, "warning: code is gone through 4.1 times; beyond 4 epochs"),
    ],
)
def test_repeated_text_is_told_of_and_warned_of_beyond_four_epochs(drawn_tokens, says):
    lines = describe_draws([Draw("code", 1.0, train_tokens=100, drawn_tokens=drawn_tokens)]).splitlines()
    assert len(lines) == (3 if says is None else 4)
    assert says is None or lines[-1].startswith(says)


def test_what_is_no_blend_is_refused(tmp_path, prefixes, corpus):
    web, code = prefixes
    for sources, message in (
        ([f"{web}=0"], "has no weight above 0 after '='"),
        ([f"{web}=much"], "has no weight above 0 after '='"),
        ([f"{web}=1", code], "mixes entries with and without a weight"),
        ([web, web], "2 times: give it once"),
    ):
        with pytest.raises(DataError, match=message):
            parse_blend(sources, validation_fraction=0.01)
    bare = write_shard(tmp_path / "bare", [[1, 2]])
    with pytest.raises(DataError, match=r"bare\.json does not exist"):
        blend_draws(parse_blend([web, bare], validation_fraction=0.01), tokens=10)
    other = train_tokenizer([corpus], vocab_size=VOCAB_SIZE - 1, output=tmp_path / "other.model")
    preprocess([corpus], tokenizer=other.path, output_prefix=tmp_path / "third")
    with pytest.raises(DataError, match="belong to different tokenizers"):
        blend_draws(parse_blend([web, str(tmp_path / "third")], validation_fraction=0.01), tokens=10)
