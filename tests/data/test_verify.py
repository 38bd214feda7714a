import json
import re

import numpy as np
import pytest

from sambalm.data_pipeline import shards
from sambalm.data_pipeline import verify as module
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from sambalm.data_pipeline.verify import verify
from tests.support.data import VOCAB_SIZE, make_texts, write_jsonl, write_shard


@pytest.fixture
def prefix(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(shards, "CHECKSUM_BLOCK_BYTES", 512)
    monkeypatch.setattr(module, "CHECKSUM_BLOCK_BYTES", 512)
    tokenizer = train_tokenizer([corpus], vocab_size=VOCAB_SIZE, output=tmp_path / "t.model")
    preprocess([corpus], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", shard_tokens=1000)
    return tmp_path / "d"


def _flip(path, offset, mask=1):
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def test_sound_data(prefix):
    calls = []
    for workers in (1, 3):
        found = verify(prefix, workers=workers, progress=lambda done, total: calls.append((done, total)))
        assert found.problems == []
        manifest = json.loads((prefix.parent / "d.json").read_text())
        assert found.shards == len(manifest["shards"]) > 4
        assert found.tokens == sum(shard["tokens"] for shard in manifest["shards"])
    assert calls[-1][0] == calls[-1][1] == 2 * found.tokens


def _swap(folder):
    for extension in ("bin", "idx"):
        a, b = folder / f"d_00000.{extension}", folder / f"d_00001.{extension}"
        content = a.read_bytes(), b.read_bytes()
        b.write_bytes(content[0])
        a.write_bytes(content[1])


DAMAGES = {
    "cut": (
        lambda folder: (folder / "d_00002.bin").write_bytes((folder / "d_00002.bin").read_bytes()[:-1]),
        [r"d_00002\.bin has \d+ bytes .* says \d+", r"d_00002\.bin has changed .* in bytes \d+ to \d+"],
    ),
    "a flipped bit": (lambda folder: _flip(folder / "d_00001.bin", 700), [r"d_00001\.bin .* in bytes 512 to 1024;"]),
    "bits in neighbouring blocks": (
        lambda folder: (
            _flip(folder / "d_00001.bin", 10),
            _flip(folder / "d_00001.bin", 600),
            _flip(folder / "d_00001.bin", 1600),
        ),
        [r"d_00001\.bin .* in bytes 0 to 1024;", r"d_00001\.bin .* in bytes 1536 to \d+;"],
    ),
    "a flipped bit in the index": (
        lambda folder: _flip(folder / "d_00001.idx", 40),
        [r"d_00001\.idx is not a valid shard index", r"d_00001\.idx has changed"],
    ),
    "exchanged": (
        _swap,
        [
            r"d_00000\.\w+ has",
            "d_00000.idx has changed",
            r"d_00000\.bin holds the content of d_00001",
            r"d_00001\.\w+ has",
            "d_00001.idx has changed",
            r"d_00001\.bin holds the content of d_00000",
        ],
    ),
    "missing": (
        lambda folder: [(folder / f"d_00003.{extension}").unlink() for extension in ("bin", "idx")],
        [r"cannot read the shard file .*d_00003\.idx"],
    ),
    "foreign": (
        lambda folder: write_shard(folder / "d_00099", [[1, 2]]),
        [r"d_00099\.bin is no shard of the manifest", r"d_00099\.idx is no shard of the manifest"],
    ),
    "another tokenizer": (lambda folder: _flip(folder / "t.model", 9), [r"t\.model is not the tokenizer that made"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(prefix, damage):
    act, messages = DAMAGES[damage]
    act(prefix.parent)
    problems = verify(prefix).problems
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert re.search(message, problem), problem


@pytest.mark.parametrize("document", [1, 5])
def test_ids_outside_the_vocabulary(document, prefix):
    # Whoever wrote it recorded what he wrote: checksums are right, the tokens are not.
    content = np.fromfile(prefix.parent / "d_00000.bin", dtype=np.uint16)
    lengths = shards.check_shard(f"{prefix}_00000").lengths
    place = sum(lengths[:document]) + 3
    assert (place * 2 > module.CHECKSUM_BLOCK_BYTES) == (document > 1)
    content[place] = VOCAB_SIZE
    content.tofile(prefix.parent / "d_00000.bin")
    problems = verify(prefix).problems
    assert problems[-1].endswith(
        f"d_00000.bin holds token id {VOCAB_SIZE} at byte {2 * place} in document {document}, outside the "
        f"vocabulary of {VOCAB_SIZE}"
    )


def test_data_without_a_manifest(tmp_path):
    prefix = write_shard(tmp_path / "bare", [[1, 2, 3], [4, 900]])
    assert verify(prefix).problems == []
    assert "token id 900 at byte 8 in document 1" in verify(prefix, vocab_size=900).problems[0]
    with pytest.raises(DataError, match="no data under the prefix"):
        verify(tmp_path / "none")


def test_old_manifests_have_no_block_checksums(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20, seed=0))
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "d")
    manifest = json.loads((tmp_path / "d.json").read_text())
    manifest["shards"][0]["bin_crc32"] = ""
    (tmp_path / "d.json").write_text(json.dumps(manifest))
    assert verify(tmp_path / "d").problems == []
    _flip(tmp_path / "d_00000.bin", 7)
    assert verify(tmp_path / "d").problems[0].endswith("has changed since it was written; fetch or preprocess it again")
