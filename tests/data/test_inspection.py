import json
import re

import numpy as np
import pytest

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.inspection import Inspector
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.shards import check_shard
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from tests.support.data import VOCAB_SIZE, make_texts, write_jsonl, write_shard


@pytest.fixture
def texts():
    return [*make_texts(40, seed=3), "", "été 🦔\n\nend"]


@pytest.fixture
def prefix(tmp_path, tokenizer, texts):
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", shard_tokens=700)
    return tmp_path / "d"


def test_statistics(prefix, tokenizer, texts):
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts if text]
    calls = []
    found = Inspector(prefix).statistics(progress=lambda done, total: calls.append((done, total)))
    ids = np.concatenate(documents)
    assert (found.documents, found.tokens, found.dtype) == (41, len(ids), "uint16")
    assert calls[-1] == (len(ids), len(ids))
    assert found.text_bytes == sum(len(text.encode()) for text in texts)
    lengths = [len(document) for document in documents]
    assert (found.mean_tokens, found.median_tokens) == (pytest.approx(np.mean(lengths)), np.median(lengths))
    assert found.longest_tokens == max(lengths)
    for power, count in enumerate(found.histogram):
        assert count == sum(2**power <= length < 2 ** (power + 1) for length in lengths)
    assert found.frequencies.tolist() == np.bincount(ids).tolist()

    text = Inspector(prefix).describe(found)
    bars = {int(power): size for power, size in re.findall(r"^ *(\d+) to .* (#*)$", text, re.M)}
    least, most = min(n for n, count in enumerate(found.histogram) if count), max(found.histogram)
    assert min(bars) == 2**least
    assert all(
        len(bars[2**power]) == round(40 * count / most) for power, count in enumerate(found.histogram) if power >= least
    )
    assert f"{2**least:>11,} to {2 ** (least + 1) - 1:>11,}" in text
    assert "1 empty, 0 malformed" in text
    assert f"sentencepiece, {VOCAB_SIZE} ids" in text
    top = int(np.bincount(ids).argmax())
    assert f"{np.bincount(ids)[top]:>15,} {np.bincount(ids)[top] / len(ids):>7.2%} {tokenizer.piece(top)!r}" in text


def test_counting_stops_where_told(prefix, tokenizer, texts):
    ids = np.concatenate([[*tokenizer.encode(text), tokenizer.eos_id] for text in texts if text])
    for limit in (1, 699, 1500):
        found = Inspector(prefix).statistics(max_counted_tokens=limit)
        assert (found.counted_tokens, found.tokens) == (limit, len(ids))
        assert found.frequencies.tolist() == np.bincount(ids[:limit]).tolist()
    most = int(found.frequencies.max())
    assert f" {most:>15,} {most / 1500:>7.2%} " in Inspector(prefix).describe(found)


def test_the_text_s_size_is_not_known_where_a_shard_lacks_it(prefix):
    manifest = json.loads(prefix.with_name("d.json").read_text())
    del manifest["shards"][1]["text_bytes"]
    prefix.with_name("d.json").write_text(json.dumps(manifest))
    assert Inspector(prefix).statistics().text_bytes is None


def test_documents_are_counted_over_all_shards(prefix, texts):
    inspector = Inspector(prefix)
    kept = [text for text in texts if text]
    for number in (0, 20, 40):
        head, *lines = inspector.document(number).split("\n")
        assert head.startswith(f"--- document {number}: document ")
        assert "\n".join(lines[:-1]) == kept[number]
        assert lines[-1] == "--- end-of-text"
        shard, count, byte = re.search(r"of (\S+), ([\d,]+) tokens from byte (\d+)$", head).groups()
        dtype, count = check_shard(shard).dtype, int(count.replace(",", ""))
        ids = np.fromfile(f"{shard}.bin", dtype=dtype, offset=int(byte), count=count)
        assert inspector.text(ids) == kept[number]
    assert "of " + str(prefix) + "_00000," not in inspector.document(40).split("\n")[0]
    with pytest.raises(DataError, match=r"has no document 41: its 41 documents are numbered from 0"):
        inspector.document(41)


def test_a_samples_parts_are_its_documents(prefix, tokenizer):
    config = DataConfig(train=str(prefix), sequence_length=600, reset_at_document=True)
    tokens, _, starts, _ = build_train_dataset(config, open_sources(config), seed=0)[2]
    text = Inspector(prefix).sample(tokens.numpy(), starts.numpy())
    parts = text.split("\n--- tokens ")
    ends = np.flatnonzero(tokens.numpy()[:-1] == tokenizer.eos_id) + 1
    assert len(parts) == len(ends) + 1 > 1
    assert text.endswith(f"--- {len(parts)} documents in 600 tokens")
    for part, begin in zip(parts[1:], ends, strict=True):
        assert part.startswith(f"{begin} to ")
    assert parts[1].split("\n", 1)[1].split("\n---")[0] == tokenizer.decode(
        [i for i in tokens[ends[0] : [*ends, 600][1]].tolist() if i != tokenizer.eos_id]
    )


def test_what_cannot_be_shown_is_said(tmp_path, prefix, tokenizer):
    bare = write_shard(tmp_path / "bare", [[3, 4, 2], [5, VOCAB_SIZE]])
    inspector = Inspector(bare)
    assert "2 documents, 5 tokens" in inspector.describe(inspector.statistics())
    with pytest.raises(DataError, match=r"the tokenizer of .*bare \(none is named\) is missing: give its path"):
        inspector.document(0)
    given = Inspector(bare, tokenizer=tokenizer.path)
    assert given.document(0).endswith("--- end-of-text")
    with pytest.raises(DataError, match=f"holds token id {VOCAB_SIZE}, beyond the {VOCAB_SIZE}"):
        given.document(1)
    manifest = json.loads((tmp_path / "d.json").read_text())
    manifest["tokenizer"]["path"] = "gone.model"
    (tmp_path / "d.json").write_text(json.dumps(manifest))
    inspector = Inspector(prefix)
    assert "41 documents" in inspector.describe(inspector.statistics())
    with pytest.raises(DataError, match=r"gone\.model\) is missing"):
        inspector.document(0)


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(prefix, tokenizer, tmp_path):
    other = train_tokenizer([tmp_path / "a.jsonl"], vocab_size=VOCAB_SIZE - 1, output=tmp_path / "other.model")
    with pytest.raises(DataError, match=r"other\.model is not the one that made the tokens of .*give that one"):
        Inspector(prefix, tokenizer=other.path)
