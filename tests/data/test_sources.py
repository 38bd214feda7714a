import json
import os
import shutil
from types import SimpleNamespace

import pytest

from sambalm.data_pipeline import shard_index
from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.sources import check_vocabulary, open_sources
from sambalm.data_pipeline.tokenizer_training import train_tokenizer
from tests.support.data import VOCAB_SIZE, counting_documents, listing, make_texts, write_jsonl, write_shard
from tests.support.worlds import run_world


def _config(prefix, **options) -> DataConfig:
    return DataConfig(train=prefix, sequence_length=8, **options)


def _check(config: DataConfig, vocab_size: int) -> None:
    check_vocabulary(config, open_sources(config), vocab_size=vocab_size)


@pytest.fixture
def prefix(tmp_path, tokenizer):
    """Several shards with a manifest."""
    path = write_jsonl(tmp_path / "text.jsonl", make_texts(100, seed=1))
    preprocess([path], tokenizer=tokenizer.path, output_prefix=tmp_path / "d", shard_tokens=2000)
    assert (tmp_path / "d_00003.bin").exists()
    return str(tmp_path / "d")


@pytest.fixture
def scans(monkeypatch):
    """Prefixes of the shards whose tokens are read."""
    found, scan = [], shard_index._scan
    monkeypatch.setattr(shard_index, "_scan", lambda prefix, dtype: found.append(prefix) or scan(prefix, dtype))
    return found


def test_the_index_holds_what_the_shards_hold(tmp_path, prefix):
    (source,) = open_sources(_config(prefix))
    manifest = json.loads((tmp_path / "d.json").read_bytes())
    assert [shard.tokens for shard in source.shards] == [entry["tokens"] for entry in manifest["shards"]]
    assert [shard.documents for shard in source.shards] == [entry["documents"] for entry in manifest["shards"]]
    assert source.tokens(held_out=False) + source.tokens(held_out=True) == sum(s.tokens for s in source.shards)
    assert source.name == "d"


def test_manifest_against_the_model(prefix):
    _check(_config(prefix), VOCAB_SIZE)
    message = rf"model\.vocab_size=399 is smaller than the {VOCAB_SIZE} ids of the tokenizer .*tokenizer\.model"
    with pytest.raises(DataError, match=message):
        _check(_config(prefix), VOCAB_SIZE - 1)


def test_different_tokenizers_are_refused(tmp_path, tokenizer, corpus):
    other = train_tokenizer([corpus], vocab_size=VOCAB_SIZE - 1, output=tmp_path / "other.model")
    for name, model in (("a", tokenizer), ("b", other)):
        preprocess([corpus], tokenizer=model.path, output_prefix=tmp_path / name)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    _check(_config([a], tokenizer=str(tokenizer.path)), 1000)
    for config in (_config([a, b]), _config(a, tokenizer=str(other.path))):
        with pytest.raises(DataError, match="belong to different tokenizers"):
            _check(config, 1000)


def test_an_index_is_of_what_was_asked_for(prefix, scans):
    held_out = []
    for fraction, verify in ((0.1, False), (0.1, True), (0.3, True)):
        (source,) = open_sources(_config(prefix, validation_fraction=fraction, verify=verify))
        assert all((shard.ids is not None) == verify for shard in source.shards)
        held_out.append(source.tokens(held_out=True))
    assert held_out[0] == held_out[1] < held_out[2]
    assert len(scans) == 2 * len(source.shards)


def test_shards_are_read_once(tmp_path, prefix, scans):
    first = open_sources(_config(prefix))
    assert len(scans) == len(first[0].shards)
    before = listing(tmp_path)
    assert open_sources(_config(prefix)) == first
    assert len(scans) == len(first[0].shards)
    assert listing(tmp_path) == before
    assert not any(".tmp" in name for name in before)
    open_sources(_config(prefix, verify=False, cache_dir=str(tmp_path / "other")))
    assert len(scans) == len(first[0].shards)


def test_ids_outside_the_vocabulary_are_named_with_their_byte(tmp_path, monkeypatch, scans):
    monkeypatch.setattr(shard_index, "_CHUNK_TOKENS", 3)
    prefix = write_shard(tmp_path / "d", [[1, 2, 3, 4], [5, 900, 900], [7, 0]])
    _check(_config(prefix), 901)
    message = r"d\.bin holds token id 900 at byte 10, outside the 900 ids of model\.vocab_size"
    with pytest.raises(DataError, match=message):
        _check(_config(prefix), 900)
    assert len(scans) == 1
    # The same lengths, so that only the time tells; file systems may count it in steps of milliseconds.
    write_shard(tmp_path / "d", [[1, 2, 3, 4], [5, 950, 900], [7, 0]])
    os.utime(tmp_path / "d.bin", (0, 0))
    with pytest.raises(DataError, match="token id 950"):
        _check(_config(prefix), 901)
    assert len(scans) == 2


def test_negative_ids_are_found(tmp_path):
    prefix = write_shard(tmp_path / "d", [[1, 2, 3], [4, 5]], vocab_size=70_000)
    content = bytearray((tmp_path / "d.bin").read_bytes())
    content[12:16] = (-7).to_bytes(4, "little", signed=True)
    (tmp_path / "d.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"d\.bin holds token id -7 at byte 12"):
        _check(_config(prefix), 1000)


def _flip(path, byte: int, *, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def _swap(folder) -> None:
    for extension in ("bin", "idx"):
        os.rename(folder / f"d_00000.{extension}", folder / "aside")
        os.rename(folder / f"d_00001.{extension}", folder / f"d_00000.{extension}")
        os.rename(folder / "aside", folder / f"d_00001.{extension}")


DAMAGES = {
    "a flipped bit": (
        lambda d: _flip(d / "d_00002.bin", 400),
        r"d_00002\.bin has changed since it was written, in bytes 0 to \d+; fetch",
    ),
    "an id out of vocabulary": (
        lambda d: _flip(d / "d_00002.bin", 401, bit=6),
        r"d_00002\.bin holds token id \d+ at byte 400",
    ),
    "a cut": (lambda d: os.truncate(d / "d_00001.bin", 100), r"d_00001\.bin has 100 bytes where its index says"),
    "a longer file": (lambda d: (d / "d_00001.bin").open("ab").write(b"xx"), r"d_00001\.bin has \d+ bytes where"),
    "a missing .bin": (lambda d: (d / "d_00003.bin").unlink(), r"cannot read the shard file .*d_00003\.bin: No such"),
    "a missing .idx": (lambda d: (d / "d_00003.idx").unlink(), r"cannot read the shard file .*d_00003\.idx: No such"),
    "a flipped bit of an index": (lambda d: _flip(d / "d_00000.idx", 40), r"d_00000\.idx is not"),
    "a cut index": (lambda d: os.truncate(d / "d_00000.idx", 60), r"d_00000\.idx is not a valid shard index"),
    "swapped shards": (_swap, r"d_0000[01]\.idx has \d+ documents and \d+ tokens where the manifest says"),
    "a damaged manifest": (lambda d: os.truncate(d / "d.json", 300), r"cannot read the manifest .*d\.json"),
}


@pytest.mark.parametrize("indexed", [False, True], ids=["first seen", "seen whole before"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage, indexed, prefix, tmp_path):
    inflict, message = DAMAGES[damage]
    if indexed:
        open_sources(_config(prefix))
    inflict(tmp_path)
    with pytest.raises(DataError, match=message):
        open_sources(_config(prefix))


def test_without_verification_only_the_tokens_are_unseen(prefix, tmp_path):
    _flip(tmp_path / "d_00002.bin", 400)
    open_sources(_config(prefix, verify=False))
    _flip(tmp_path / "d_00002.idx", 60)
    with pytest.raises(DataError, match=r"d_00002\.idx is not"):
        open_sources(_config(prefix, verify=False))


def test_the_content_s_hash_is_that_of_the_tokens(tmp_path, prefix):
    (whole,) = open_sources(_config(prefix))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("d[._]*"):
        shutil.copy(path, copy)
    (moved,) = open_sources(_config(str(copy / "d")))
    assert moved.content() == whole.content()

    bare = [str(tmp_path / f"bare{number}") for number in range(2)]
    for prefix, last in zip(bare, (900, 901), strict=True):
        write_shard(prefix, [[1, 2, 3, 4], [5, last]])
    one, other = open_sources(_config(bare))
    assert one.content() != other.content()
    write_shard(bare[1], [[1, 2, 3, 4], [5, 900]])
    assert {source.content() for source in open_sources(_config(bare))} == {one.content()}


def test_a_damaged_index_is_made_anew(tmp_path, prefix, scans):
    expected = open_sources(_config(prefix))
    (path,) = (tmp_path / ".index_cache").iterdir()
    os.truncate(path, path.stat().st_size // 2)
    assert open_sources(_config(prefix)) == expected
    assert len(scans) == 2 * len(expected[0].shards)


def test_a_disk_that_fills_up_leaves_no_index(tmp_path, prefix, monkeypatch):
    def fill(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(DataError, match=r"cannot write the index in .*\.index_cache: No space left .*data\.cache_dir"):
        open_sources(_config(prefix))
    assert list((tmp_path / ".index_cache").iterdir()) == []


def test_an_index_that_cannot_be_written_is_refused(tmp_path, prefix):
    with pytest.raises(DataError, match=r"cannot write the index in .*d\.json: .*; set data\.cache_dir"):
        open_sources(_config(prefix, cache_dir=str(tmp_path / "d.json")))


def test_sources_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    prefixes = [write_shard(tmp_path / name, counting_documents(9)) for name in ("a/text", "b/text", "a/code")]
    names = [source.name for source in open_sources(_config(prefixes))]
    assert names == [prefixes[0], prefixes[1], "code"]


def test_progress_counts_the_shards(prefix):
    seen = []
    shards = len(open_sources(_config(prefix), progress=lambda *values: seen.append(values))[0].shards)
    assert seen == [(number, shards) for number in range(1, shards + 1)]


def sources_on_rank(folder: str, nodes: int) -> tuple[list[str], list[str], str | None]:
    """What a rank of two on each node gets; each node sees a folder of its own where there are several."""
    import torch.distributed as dist

    from sambalm.data_pipeline.shared import shared_sources

    os.environ["LOCAL_RANK"] = str(dist.get_rank() % 2)
    node = dist.get_rank() // 2 if nodes > 1 else 0
    os.chdir(f"{folder}/{node}")
    built, check = [], shard_index._check_shards
    shard_index._check_shards = lambda request, *rest, **more: (
        built.append(request.prefix) or check(request, *rest, **more)
    )
    try:
        return built, [source.content() for source in shared_sources(_config(["a", "b"]))], None
    except DataError as error:
        return built, [], str(error)


def _nodes(tmp_path, number: int) -> None:
    for node in range(number):
        (tmp_path / str(node)).mkdir()
        for name, start in (("a", 0), ("b", 10_000)):
            write_shard(tmp_path / str(node) / name, counting_documents(50, start=start))


def test_a_rank_ends_for_what_is_wrong_on_another_node(tmp_path, monkeypatch):
    from sambalm.data_pipeline import shared

    sources = open_sources(_config(write_shard(tmp_path / "a", counting_documents(50))))

    def broadcast(box: list, src: int) -> None:
        box[0] = sources

    def gather(found: list, mine: str | None) -> None:
        found[:] = [None, mine, failure, None]

    world = {"is_initialized": lambda: True, "get_rank": lambda: 1, "get_world_size": lambda: 4}
    replaced = world | {"broadcast_object_list": broadcast, "all_gather_object": gather}
    monkeypatch.setattr(shared, "dist", SimpleNamespace(**replaced))
    monkeypatch.setenv("LOCAL_RANK", "1")
    failure = None
    assert shared.shared_sources(_config("nowhere")) is sources
    failure = "b.bin has 10 bytes"
    with pytest.raises(DataError, match=r"^on the node of rank 2: b\.bin has 10 bytes$"):
        shared.shared_sources(_config("nowhere"))


@pytest.mark.slow
def test_on_a_shared_file_system_one_rank_makes_the_index(tmp_path):
    _nodes(tmp_path, 1)
    results = run_world(sources_on_rank, str(tmp_path), 1, ranks=4)
    assert [built for built, _, _ in results] == [["a", "b"], [], [], []]
    assert len({tuple(contents) for _, contents, _ in results}) == 1
    assert len(results[0][1]) == 2


@pytest.mark.long
def test_on_unshared_file_systems_each_node_s_first_rank_does(tmp_path):
    _nodes(tmp_path, 2)
    results = run_world(sources_on_rank, str(tmp_path), 2, ranks=4)
    assert [built for built, _, _ in results] == [["a", "b"], [], ["a", "b"], []]
    assert len({tuple(contents) for _, contents, _ in results}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "0" / "b.bin", 10), r"^b\.bin has 10 bytes"),
        (lambda folder: os.truncate(folder / "1" / "b.bin", 10), r"^on the node of rank 2: b\.bin has 10 bytes"),
        (
            lambda folder: write_shard(folder / "1" / "b", counting_documents(50, start=10_001)),
            r"^on the node of rank 2: the data under b is not that of the first rank's node",
        ),
    ],
    ids=["first node", "other node", "other content"],
)
def test_every_rank_hears_what_is_wrong_on_any_node(tmp_path, damage, message):
    _nodes(tmp_path, 2)
    damage(tmp_path)
    results = run_world(sources_on_rank, str(tmp_path), 2, ranks=4)
    (failure,) = {failure for _, _, failure in results}
    with pytest.raises(DataError, match=message):
        raise DataError(failure)
