import os

import pytest
from data_support import VOCAB_SIZE, listing, write_shard

from sambalm.data_pipeline import checks
from sambalm.data_pipeline.checks import check_vocabulary
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.tokenizer import train_tokenizer


def _config(prefix, **options) -> DataConfig:
    return DataConfig(train=prefix, sequence_length=8, **options)


def test_manifest_against_the_model(tmp_path, tokenizer, corpus):
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "d")
    config = _config(str(tmp_path / "d"))
    check_vocabulary(config, VOCAB_SIZE)
    message = rf"model\.vocab_size=399 is smaller than the {VOCAB_SIZE} ids of the tokenizer .*tokenizer\.model"
    with pytest.raises(DataError, match=message):
        check_vocabulary(config, VOCAB_SIZE - 1)
    assert ".index_cache" not in listing(tmp_path)


def test_different_tokenizers_are_refused(tmp_path, tokenizer, corpus):
    other = train_tokenizer([corpus], vocab_size=VOCAB_SIZE - 1, output=tmp_path / "other.model")
    for name, model in (("a", tokenizer), ("b", other)):
        preprocess([corpus], tokenizer=model.path, output_prefix=tmp_path / name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    check_vocabulary(_config([a], tokenizer=str(tokenizer.path)), 1000)
    for config in (_config([a, b]), _config(a, tokenizer=str(other.path))):
        with pytest.raises(DataError, match="belong to different tokenizers"):
            check_vocabulary(config, 1000)


def test_bare_shards_are_scanned_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_CHUNK_TOKENS", 3)
    prefix = write_shard(tmp_path / "d", [[1, 2, 3, 4], [5, 900, 900], [7, 0]])
    config = _config(prefix)
    check_vocabulary(config, 901)
    scans = []
    scan = checks._scan
    monkeypatch.setattr(checks, "_scan", lambda shard: scans.append(shard) or scan(shard))
    message = r"d\.bin holds token id 900 at byte 10, outside model\.vocab_size=900"
    with pytest.raises(DataError, match=message):
        check_vocabulary(config, 900)
    assert scans == []
    # The same lengths, so that only the time tells; file systems may count it in steps of milliseconds.
    write_shard(tmp_path / "d", [[1, 2, 3, 4], [5, 950, 900], [7, 0]])
    os.utime(tmp_path / "d.bin", (0, 0))
    with pytest.raises(DataError, match="token id 950"):
        check_vocabulary(config, 901)
    assert len(scans) == 1


def test_negative_ids_are_found(tmp_path):
    prefix = write_shard(tmp_path / "d", [[1, 2, 3], [4, 5]], vocab_size=70_000)
    content = bytearray((tmp_path / "d.bin").read_bytes())
    content[12:16] = (-7).to_bytes(4, "little", signed=True)
    (tmp_path / "d.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"d\.bin holds token id -7 at byte 12"):
        check_vocabulary(_config(prefix), 1000)
