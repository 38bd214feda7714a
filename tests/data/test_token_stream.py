import os
import pickle
import resource
import sys
import threading

import numpy as np
import pytest

from sambalm.data_pipeline import token_stream
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.shard_index import IndexRequest, indexed_shards
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.token_stream import ShardFiles, TokenStream, allow_open_files
from tests.support.data import counting_documents, write_shard

DOCUMENTS = [counting_documents(40, start=10_000 * number, seed=number) for number in range(3)]


@pytest.fixture(params=[60_000, 70_000], ids=["uint16", "int32"])
def shards(request, tmp_path):
    """Three shards of 40 documents, 10 of them held out."""
    found = []
    for number, documents in enumerate(DOCUMENTS):
        prefix = write_shard(tmp_path / str(number), documents, vocab_size=request.param)
        found += indexed_shards(IndexRequest(prefix, 0.25, True, tmp_path / "cache"))
    return found


def _part(*, held_out: bool) -> list[np.ndarray]:
    return [document for documents in DOCUMENTS for document in (documents[30:] if held_out else documents[:30])]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_stream_is_its_documents_one_after_the_other(shards, held_out, monkeypatch):
    monkeypatch.setattr(token_stream, "_BOUNDS_AT_ONCE", 7)
    stream, expected = TokenStream(shards, held_out=held_out, files=ShardFiles()), _part(held_out=held_out)
    tokens = np.concatenate(expected)
    assert len(stream) == len(tokens)
    assert [document.tolist() for document in stream.documents()] == [document.tolist() for document in expected]
    begins = np.concatenate([np.full(len(d), len(np.concatenate([[], *expected[:n]]))) for n, d in enumerate(expected)])
    for start in range(0, len(tokens) - 90, 13):
        for count in (1, 2, 90):
            found = stream.read(start, count)
            assert found.dtype == np.int64
            assert found.tolist() == tokens[start : start + count].tolist()
            starts = stream.document_starts(start, count)
            assert starts.dtype == np.int64
            assert starts.tolist() == np.maximum(begins[start : start + count] - start, 0).tolist()
    whole = stream.document_starts(0, len(tokens))
    assert whole.tolist() == begins.tolist()


def test_a_token_s_place_is_where_the_file_has_it(shards):
    stream = TokenStream(shards, held_out=True, files=ShardFiles())
    for token in range(0, len(stream), 17):
        path, offset_bytes = stream.place(token)
        dtype = np.dtype(shards[0].dtype)
        assert np.fromfile(path, dtype, count=1, offset=offset_bytes)[0] == stream.read(token, 1)[0]


def test_there_is_nothing_outside(shards):
    stream = TokenStream(shards, held_out=False, files=ShardFiles())
    for start, count in ((-1, 2), (len(stream), 1), (len(stream) - 1, 2)):
        with pytest.raises(IndexError):
            stream.read(start, count)


def test_a_shard_cut_short_during_a_run_is_named_with_the_byte(shards):
    stream = TokenStream(shards, held_out=False, files=ShardFiles())
    size_bytes = np.dtype(shards[1].dtype).itemsize
    path = f"{shards[1].prefix}.bin"
    with open(path, "r+b") as file:
        file.truncate(100 * size_bytes)
    begin = shards[0].train_tokens
    assert stream.read(begin, 100).tolist() == np.concatenate(DOCUMENTS[1])[:100].tolist()
    with pytest.raises(DataError, match=rf"{path} ends at byte {100 * size_bytes} where .* from {90 * size_bytes} on"):
        stream.read(begin + 90, 11)


def test_a_shard_removed_during_a_run_is_named(shards, tmp_path):
    stream = TokenStream(shards, held_out=False, files=ShardFiles())
    (tmp_path / "1.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*1\.bin at byte 0: No such file"):
        stream.read(shards[0].train_tokens, 1)


@pytest.mark.parametrize(("limit", "most"), [(4, 1), (32, 4), (1024, 128), (resource.RLIM_INFINITY, 1024)])
def test_a_share_of_the_files_that_the_process_may_have_is_open(limit, most, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, resource.RLIM_INFINITY))
    assert ShardFiles()._most == most


def test_sources_share_the_files_that_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (48, 48))  # 6 of them
    prefixes = [write_shard(tmp_path / str(n), DOCUMENTS[n % 3]) for n in range(9)]
    config = DataConfig(train=prefixes, sequence_length=64, validation_fraction=0.25)
    sources = open_sources(config)
    streams = [source.stream(held_out=held_out) for source in sources for held_out in (False, True)]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for stream in streams:
            stream.read(0, 64)
            stream.document_starts(0, 64)  # of the index beside the tokens
    assert len(os.listdir("/proc/self/fd")) - before <= 6
    elsewhere = pickle.loads(pickle.dumps(sources))
    assert len({id(source.files) for source in elsewhere}) == 1
    assert elsewhere[0].stream(held_out=False).read(0, 64).tolist() == streams[0].read(0, 64).tolist()


def test_few_files_are_open_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 32))
    files = ShardFiles()
    for number in range(200):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 8)
    failures = []

    def read(seed: int) -> None:
        for number in np.random.RandomState(seed).randint(0, 200, size=2000).tolist():
            if files.read(str(tmp_path / str(number)), 2, 3) != bytes([number]) * 3:
                failures.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # closing a file that another thread still reads would give it another file's bytes
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert len(files._files) == 4


def test_a_run_raises_its_limit_of_open_files_as_far_as_it_is_of_use():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 2048:
        pytest.skip("this process may not raise its limit")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        assert ShardFiles()._most == 128
        allow_open_files()
        raised = min(8192, before[1])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (raised, before[1])
        assert ShardFiles()._most == raised // 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    allow_open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
