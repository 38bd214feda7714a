"""Perplexity: the sums of whole forwards, by length and position, in nats and in bits per byte."""

import copy
import itertools
import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from sambalm.evaluation.data import _checked, digest, documents
from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.loading import open_model
from sambalm.evaluation.runner import Plan, evaluate
from sambalm.evaluation.task import Surroundings
from sambalm.evaluation.tasks import likelihoods
from sambalm.evaluation.tasks.perplexity import Perplexity, PerplexitySettings
from sambalm.evaluation.tasks.sliding import Sliding, SlidingSettings
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.evaluation.test_runner import quiet
from tests.support.data import listing, write_jsonl, write_shard

TEXTS = ["one two three\n" * 5, "  def main(self):\n    return 'naïve 漢字'\n" * 40, "class Name:\n" * 60]


def surroundings(path, folder):
    opened = open_model(path, device="cpu", dtype=None, tokenizer=None)
    return Surroundings(opened.model, opened.run, folder)


def measured(task, path, folder, *overrides, data=(), batch_tokens=300):
    plan = Plan([task], [f"{task}.{override}" for override in overrides], data, folder, batch_tokens)
    (result,) = evaluate(plan, surroundings(path, folder), bar=quiet)
    return result


def values(result, name):
    return {score.at["length"]: score.value for score in result.scores if score.name == name}


@torch.no_grad()
def nats_of(path, ids):
    """Returns the loss of every token but the first, fp64 [tokens - 1], by one forward of transformers."""
    ids = torch.as_tensor(np.asarray(ids))[None]
    logits = AutoModelForCausalLM.from_pretrained(path)(ids).logits[:, :-1].double()
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]


@pytest.fixture
def text_file(tmp_path):
    return str(write_jsonl(tmp_path / "text.jsonl", TEXTS))


@pytest.mark.parametrize("kind", ["samba", "llama"])
def test_every_length_predicts_the_same_tokens(kind, hf_folders, text_file, tmp_path):
    path = hf_folders[kind]
    result = measured("perplexity", path, tmp_path, "lengths=[16,48,96]", "tokens=200", data=[text_file])
    ids = np.concatenate(list(documents([text_file], surroundings(path, tmp_path), of="x")))[:193]
    assert (ids == 2).any(), "documents end with the token that ends a text"
    tokenizer = surroundings(path, tmp_path).model
    size = len(tokenizer.decode(ids.tolist()).encode()) - len(tokenizer.decode(ids[:1].tolist()))
    for length in (16, 48, 96):
        windows = [nats_of(path, ids[start : start + length + 1]) for start in range(0, 192, length)]
        mean = torch.cat(windows).mean().item()
        assert values(result, "perplexity")[length] == pytest.approx(math.exp(mean), rel=1e-5)
        assert values(result, "bits per byte")[length] == pytest.approx(mean * 192 / math.log(2) / size, rel=1e-5)
        (score,) = [s for s in result.scores if s.name == "perplexity" and s.at["length"] == length]
        means = torch.stack([window.mean() for window in windows])
        error = math.exp(mean) * means.std().item() / math.sqrt(len(windows))
        assert score.standard_error == pytest.approx(error, rel=1e-4)
        assert (score.items, score.chance) == (192 // length, 384)
        (bits,) = [s for s in result.scores if s.name == "bits per byte" and s.at["length"] == length]
        of_nats = 192 / math.log(2) / size  # for each nat of the mean
        assert bits.standard_error == pytest.approx(means.std().item() / math.sqrt(len(windows)) * of_nats, rel=1e-4)
        assert (bits.items, bits.chance) == (192 // length, pytest.approx(math.log(384) * of_nats))
    assert [line.name for line in result.outcome.plot.lines] == ["windows of 16", "windows of 48", "windows of 96"]
    assert [line.points[-1][0] for line in result.outcome.plot.lines] == [16, 48, 96]
    assert (result.outcome.plot.x_name, result.outcome.plot.log_y) == ("tokens before, up to", False)
    (positions,) = [part["positions"] for part in result.outcome.details["by_position"] if part["length"] == 48]
    assert [(part["from"], part["to"]) for part in positions] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 48),
    ]
    windows = torch.stack([nats_of(path, ids[start : start + 49]) for start in range(0, 192, 48)])
    for part in positions:
        assert part["nats"] == pytest.approx(windows[:, part["from"] - 1 : part["to"]].mean().item(), rel=1e-5)


def test_a_run_is_measured_on_what_it_held_out(run_dir, tmp_path):
    """The windows of the run's own validation are a part of these, so that only the sample differs."""
    result = measured("perplexity", run_dir, tmp_path, "lengths=[32,64]", "tokens=100K", batch_tokens=4000)
    last = read_metrics(run_dir)[-1]
    for length in (32, 64):
        assert math.log(values(result, "perplexity")[length]) == pytest.approx(
            last[f"validation_loss_{length}"], rel=0.05
        )
    stored = sum(len(ids) for ids in documents([], surroundings(run_dir, tmp_path), of="x"))
    assert result.scores[0].items == (stored - 1) // 64 * 2


@pytest.mark.parametrize("kind", ["samba", "mamba"])
def test_documents_are_read_once_with_the_state_carried(kind, hf_folders, text_file, tmp_path, monkeypatch):
    """Segments give the sums of one forward over the whole document, at every end: also where one of them ends."""
    monkeypatch.setattr(likelihoods, "_SEGMENT_TOKENS", 32 if kind == "samba" else 40)
    monkeypatch.setattr("sambalm.evaluation.tasks.sliding._FIRST_END", 32)
    path = hf_folders[kind]
    result = measured("sliding", path, tmp_path, "length=150", data=[text_file])
    texts = [ids[:151] for ids in documents([text_file], surroundings(path, tmp_path), of="x") if len(ids) > 150]
    assert len(texts) > 1
    for end in (32, 64, 128, 150):
        mean = torch.stack([nats_of(path, text)[:end].mean() for text in texts]).mean().item()
        assert values(result, "perplexity")[end] == pytest.approx(math.exp(mean), rel=1e-5)
    size = surroundings(path, tmp_path).model.bytes_until
    written = sum(int(size(text.tolist())[150] - size(text.tolist())[0]) for text in texts)  # not the first token's
    assert values(result, "bits per byte")[150] == pytest.approx(mean * 150 * len(texts) / math.log(2) / written)
    assert [part["to"] for part in result.outcome.details["by_position"]] == [1, 2, 4, 8, 16, 32, 64, 128, 150]
    assert result.outcome.plot.x_name == "tokens before, up to"


def test_joined_documents_are_texts_in_a_row(hf_folders, text_file, tmp_path):
    path = hf_folders["samba"]
    result = measured("sliding", path, tmp_path, "length=99", "join=true", "documents=18", data=[text_file])
    ids = np.concatenate(list(documents([text_file], surroundings(path, tmp_path), of="x")))
    texts = [ids[start : start + 100] for start in range(0, 1800, 100)]
    lengths = [len(text) for text in documents([text_file], surroundings(path, tmp_path), of="x")]
    assert sum(lengths[:-1]) % 100 > 0
    assert sum(lengths[:-1]) < 1800 < sum(lengths)
    mean = torch.stack([nats_of(path, text).mean() for text in texts]).mean().item()
    assert values(result, "perplexity")[99] == pytest.approx(math.exp(mean), rel=1e-5)


def test_shards_and_the_text_that_they_were_made_of_are_one(hf_folders, tokens, tmp_path):
    path = hf_folders["samba"]
    before = listing(tokens.parent)
    of_shards = list(documents([str(tokens)], surroundings(path, tmp_path), of="x"))
    of_text = list(documents([str(tokens.parent / "text.jsonl")], surroundings(path, tmp_path), of="x"))
    assert len(of_shards) == len(of_text) > 5
    assert all(np.array_equal(a, b) for a, b in zip(of_shards, of_text, strict=True))
    assert listing(tokens.parent) == before, "the index goes to the output, since data may be read-only"


def test_of_a_run_with_several_sources_the_held_out_part_of_each_is_read(hf_folders, tokens, tmp_path):
    before, prefixes = listing(tokens.parent), [str(tokens), str(tmp_path / "copy" / tokens.name)]
    shutil.copytree(tokens.parent, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    manifest = tmp_path / "copy" / f"{tokens.name}.json"
    others = re.sub(r'("bin_\w+": )"[0-9a-f]+"', lambda found: f'{found[1]}"{0:064x}"', manifest.read_text())
    manifest.write_text(others)  # hashes of all tokens, which training looks at and which take long

    def held_out(*train) -> list[list[int]]:
        run = SimpleNamespace(data=DataConfig(train=list(train), validation_fraction=0.2, sequence_length=32))
        where = replace(surroundings(hf_folders["samba"], tmp_path), run=run)
        return [ids.tolist() for ids in documents([], where, of="x")]

    own = held_out(prefixes[0])
    stored = sum(map(len, documents(prefixes[:1], surroundings(hf_folders["samba"], tmp_path), of="x")))
    assert 0.1 * stored < sum(map(len, own)) < 0.3 * stored
    assert held_out(*prefixes) == own * 2
    assert listing(tokens.parent) == before


def test_data_that_is_not_the_models_is_refused(hf_folders, tokens, tmp_path):
    other = tmp_path / "other.model"
    text = write_jsonl(tmp_path / "text.jsonl", ["a few other words, again and again, to train on"] * 40)
    train_tokenizer([text], vocab_size=300, output=other)
    preprocess([text], tokenizer=other, output_prefix=tmp_path / "shards", workers=1)
    where = surroundings(hf_folders["samba"], tmp_path)
    with pytest.raises(
        EvaluationError, match=r"shards was made by .*other.model, whose ids are not those of the model"
    ):
        list(documents([str(tmp_path / "shards")], where, of="x"))
    one = write_jsonl(tmp_path / "one.jsonl", ["a few other words"])
    preprocess([one], tokenizer=other, output_prefix=tmp_path / "alone", workers=1)
    with pytest.raises(EvaluationError, match="alone was made by"):
        list(documents([str(tmp_path / "alone")], where, of="x"))
    run = SimpleNamespace(data=DataConfig(train=str(tmp_path / "shards"), validation_fraction=0.5, sequence_length=8))
    with pytest.raises(EvaluationError, match="shards was made by"):
        list(documents([], replace(where, run=run), of="x"))
    with pytest.raises(EvaluationError, match="bare holds the id 384, but the model's vocab_size is 384"):
        list(documents([write_shard(tmp_path / "bare", [[1, 384]])], where, of="x"))
    with pytest.raises(EvaluationError, match=r"x has nothing to read, since .*samba is no run .* give --data"):
        list(documents([], where, of="x"))
    validated = {"train": "a", "validation": ["b/held_out"], "validation_fraction": 0, "sequence_length": 8}
    run = SimpleNamespace(data=DataConfig(**validated))
    with pytest.raises(
        EvaluationError, match=r"x has nothing .*samba holds out no part .* such as that of .*, b/held_out$"
    ):
        list(documents([], replace(where, run=run), of="x"))
    beyond = replace(where, model=copy.copy(where.model))
    beyond.model.end_id = 384
    with pytest.raises(EvaluationError, match=r"text.jsonl holds the id 384, but the model's vocab_size is 384"):
        list(documents([str(text)], beyond, of="x"))
    found = _checked(iter([np.zeros(0, dtype=np.int64)]), where.model, name="of other tools")
    assert list(map(len, found)) == [0]
    with pytest.raises(DataError, match="no file matches"):
        list(documents([str(tmp_path / "nothing.txt")], where, of="x"))


@pytest.mark.parametrize(
    ("stored", "windows", "wanted"),
    [(49, 1, 192), (96, 1, 192), (97, 2, 192), (192, 3, 192), (193, 4, 192), (200, 4, 192), (200, 1, 20)],
)
def test_a_window_takes_a_token_more_than_it_predicts(stored, windows, wanted, hf_folders, tmp_path):
    """Of lengths that divide the longest as many as predict the same tokens, and one of the longest at least."""
    prefix = write_shard(tmp_path / "bare", [[5] * (stored - 10), [6] * 10])
    settings = PerplexitySettings(data=[prefix], lengths=[48, 16], tokens=wanted)
    items = Perplexity(settings, surroundings(hf_folders["samba"], tmp_path)).items()
    expected = [(length, length * number) for length in (48, 16) for number in range(windows * 48 // length)]
    assert [item.content for item in items] == expected
    assert all(item.tokens == item.content[0] + 1 for item in items)
    few = PerplexitySettings(data=[write_shard(tmp_path / "few", [[5] * 48])], lengths=[48, 16])
    with pytest.raises(EvaluationError, match=r"perplexity.lengths has 48, but .*few holds 48 tokens"):
        Perplexity(few, surroundings(hf_folders["samba"], tmp_path))


@pytest.mark.parametrize(
    ("task", "overrides", "sentence"),
    [
        ("perplexity", "lengths=[16,100K]", r"perplexity.lengths has 102400, but .*text.jsonl holds \d+ tokens"),
        (
            "sliding",
            "length=1M",
            r"no text has the 1048577 tokens .* the longest in .*text.jsonl has LONGEST; set sliding.join",
        ),
        (
            "sliding",
            "length=1M join=true",
            r"no text has the 1048577 tokens .*: .*text.jsonl holds ALL tokens in all; low",
        ),
    ],
)
def test_lengths_that_the_data_does_not_have_are_refused(task, overrides, sentence, hf_folders, text_file, tmp_path):
    lengths = [len(text) for text in documents([text_file], surroundings(hf_folders["samba"], tmp_path), of="x")]
    assert max(lengths) > lengths[-1]
    sentence = sentence.replace("LONGEST", str(max(lengths))).replace("ALL", str(sum(lengths)))
    with pytest.raises(EvaluationError, match=sentence):
        measured(task, hf_folders["samba"], tmp_path, *overrides.split(), data=[text_file])


@pytest.mark.parametrize(
    ("stored", "changes", "texts"),
    [
        ([9, 10, 11, 30], {}, [9, 19, 30]),
        ([9, 10, 11, 30], {"documents": 2}, [9, 19]),
        ([9, 10, 11, 30], {"join": True}, [0, 10, 20, 30, 40, 50]),
        ([10, 5, 5, 3], {"join": True}, [0, 10]),
        ([4, 6], {"join": True}, [0]),
        ([9, 10, 11, 30], {"join": True, "documents": 4}, [0, 10, 20, 30]),
    ],
)
def test_documents_count_where_they_are_as_long_as_asked(stored, changes, texts, hf_folders, tmp_path):
    """Of 10 tokens and more, whose ids count up: the first one tells where a text begins."""
    ends = list(itertools.accumulate(stored))
    ids = [list(range(end - size, end)) for end, size in zip(ends, stored, strict=True)]
    prefix = write_shard(tmp_path / "bare", ids)
    settings = SlidingSettings(data=[prefix], length=9, **changes)
    items = Sliding(settings, surroundings(hf_folders["samba"], tmp_path)).items()
    assert [int(item.content[0]) for item in items] == texts
    assert {(item.tokens, len(item.content)) for item in items} == {(10, 10)}


def test_other_data_under_the_same_name_is_kept_apart(hf_folders, tmp_path):
    where, name = surroundings(hf_folders["samba"], tmp_path), str(tmp_path / "text.jsonl")
    kinds = (
        (Perplexity, PerplexitySettings(data=[name], lengths=[8])),
        (Sliding, SlidingSettings(data=[name], length=8)),
    )
    protocols = []
    for text in ("one two three four", "four three two one"):
        write_jsonl(tmp_path / "text.jsonl", [text * 4])
        protocols.append([task(settings, where).protocol() for task, settings in kinds])
    assert [before == after for before, after in zip(*protocols, strict=True)] == [False, False]


def test_sums_become_scores_however_large_they_are():
    """Of two texts of four tokens; text that has no bytes has no bits per byte."""
    records = [{"nats": [1.0, 2.0], "bytes": [1, 8]}, {"nats": [1.0, 6.0], "bytes": [1, 4]}]
    perplexity, bits = likelihoods.scores_at(records, 1, end=4, vocab_size=64, at={})
    assert (perplexity.value, bits.value) == (pytest.approx(math.e), pytest.approx(8 / math.log(2) / 12))
    assert perplexity.standard_error == pytest.approx(math.e / 2)  # of means of 1/2 and 3/2
    assert (bits.chance, bits.items) == (pytest.approx(6 * 8 / 12), 2)
    (alone,) = likelihoods.scores_at([{"nats": [4000.0], "bytes": [0]}], 0, end=4, vocab_size=64, at={})
    assert (alone.value, alone.standard_error) == (math.inf, None)


def test_ends_double():
    assert likelihoods.ends_until(1) == [1]
    assert likelihoods.ends_until(8) == [1, 2, 4, 8]
    ends = likelihoods.ends_until(1000)
    assert ends[-2:] == [512, 1000]
    assert all(a < b for a, b in pairwise(ends))


def test_positions_with_little_before_them_are_left_out_of_the_plot():
    parts = [{"from": to // 2 + 1, "to": to, "nats": math.log(to)} for to in (8, 16, 32)]
    line = likelihoods.position_line("a", [*parts, {"from": 33, "to": 40, "nats": 1e4}])
    assert line.points == [(16, pytest.approx(16)), (32, pytest.approx(32)), (40, math.exp(700))]


def test_the_hash_of_data_tells_where_documents_end():
    ids = np.arange(6)
    assert digest([ids]) == digest([ids.astype(np.int32)])
    assert len({digest(parts) for parts in ([ids], [ids[:2], ids[2:]], [ids[:3], ids[3:]], [ids[::-1]])}) == 4
