"""Runs that are killed, fill the disk or meet another, and what their next attempt makes of it."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sambalm.data_pipeline.files import sha256_file
from sambalm.data_pipeline.preprocess import preprocess
from sambalm.data_pipeline.progress import Position, ProgressLog, RunIdentity
from sambalm.data_pipeline.shards import ShardEntry, check_shard, read_manifest
from tests.support.data import make_texts, write_jsonl
from tests.support.marks import slow_except
from tests.support.power_loss import noted_operations
from tests.support.preprocess import contents, run, start

# Several to a piece of input, so that a part of one is on disk most of the time.
SHARD_TOKENS = 200_000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", make_texts(90_000, seed=5))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer, many):
    prefix = tmp_path_factory.mktemp("whole") / "d"
    preprocess([many], tokenizer=tokenizer.path, output_prefix=prefix, shard_tokens=SHARD_TOKENS)
    return contents(prefix)


def _kill(process: subprocess.Popen) -> None:
    """Without a chance to tidy up, as a scheduler or a lack of memory does; workers die with the first process."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def _committed(prefix) -> int:
    return len(list(prefix.parent.glob("d_*.idx")))


@pytest.mark.parametrize("workers", slow_except([], ["1", "2"], long=["2"]))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, tokenizer, many, whole, workers):
    prefix = tmp_path / "d"
    draw = random.Random(int(workers))
    options = ["--shard-tokens", str(SHARD_TOKENS), "--workers", workers]
    shards = sum(name.endswith(".idx") for name in whole)
    kills, before = 0, 0
    while kills < 4:
        process = start([many], tokenizer.path, prefix, *options)
        wanted = before + draw.randint(0, shards // 5)
        while process.poll() is None and _committed(prefix) < wanted:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        if process.poll() is not None:
            break
        _kill(process)
        kills += 1
        # Whatever is under a final name is whole and final.
        for name, content in contents(prefix).items():
            if not name.startswith(".") and name.endswith((".bin", ".idx")):
                assert content == whole[name]
        assert not (tmp_path / "d.json").exists()
        assert _committed(prefix) >= before
        before = _committed(prefix)
    assert kills >= 2
    code, output, errors = run([many], tokenizer.path, prefix, *options)
    assert code == 0, errors
    assert "shards were there already" in output
    assert contents(prefix) == whole


@pytest.mark.slow
def test_an_interrupt_ends_in_one_line_and_goes_on(tmp_path, tokenizer, many, whole):
    prefix = tmp_path / "d"
    process = start([many], tokenizer.path, prefix, "--shard-tokens", str(SHARD_TOKENS), "--workers", "2")
    while process.poll() is None and _committed(prefix) < 2:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C reaches the workers too
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    run([many], tokenizer.path, prefix, "--shard-tokens", str(SHARD_TOKENS))
    assert contents(prefix) == whole


@pytest.fixture
def small_disk(tmp_path):
    size = 5_000_000
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system takes root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_no_complete_shard(small_disk, tokenizer, many, whole):
    prefix = small_disk / "d"
    options = ["--shard-tokens", str(SHARD_TOKENS), "--workers", "2"]
    code, _, errors = run([many], tokenizer.path, prefix, *options)
    assert code == 2
    assert "No space left" in errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    found = contents(prefix)
    assert len(found) > 6
    assert not any(name.startswith(".") for name in found)
    assert all(content == whole[name] for name, content in found.items() if not name.endswith(".progress"))
    subprocess.run(["mount", "-o", "remount,size=200000000", small_disk], check=True)
    code, _, errors = run([many], tokenizer.path, prefix, *options)
    assert code == 0, errors
    assert contents(prefix) == whole


def stop_half_way(inputs, **options):
    def stop_after(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(inputs, progress=stop_after, **options)


def test_every_line_of_a_log_survives_a_power_loss(tmp_path, monkeypatch):
    calls = noted_operations(monkeypatch)
    identity = RunIdentity(tokenizer_sha256="", options={}, inputs_sha256="", parts=1)
    log = ProgressLog(tmp_path / "d.progress", identity, overwrite=False)
    assert [call[:2] for call in calls] == [("sync", str(log.path)), ("sync", str(tmp_path))]
    shard = ShardEntry(name="d_00000", documents=1, tokens=1, bin_bytes=2, bin_sha256="", idx_sha256="")
    log.commit(shard, Position(source=0, position=5, record=1))
    log.finish([])
    assert [call[:2] for call in calls[2:]] == [("sync", str(log.path))] * 2
    assert int(calls[2][2]) < int(calls[3][2]) == log.path.stat().st_size  # each with its line
    log.close()


def test_a_log_cut_in_a_line_counts_up_to_there(tmp_path, tokenizer, many, whole):
    prefix, options = tmp_path / "d", {"tokenizer": tokenizer.path, "shard_tokens": SHARD_TOKENS}
    stop_half_way([many], output_prefix=prefix, **options)
    log = tmp_path / "d.progress"
    log.write_bytes(log.read_bytes()[:-7])
    logged = log.read_bytes().count(b"\n") - 1
    summary = preprocess([many], output_prefix=prefix, **options)
    assert summary.resumed_shards == logged > 5
    assert contents(prefix) == whole


def cut_short(path):
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize(
    ("damage", "suffix"), [(Path.unlink, "idx"), (Path.unlink, "bin"), (cut_short, "bin")], ids=["idx", "bin", "size"]
)
def test_a_committed_shard_that_is_not_whole_is_made_again(damage, suffix, tmp_path, tokenizer, many, whole):
    prefix, options = tmp_path / "d", {"tokenizer": tokenizer.path, "shard_tokens": SHARD_TOKENS}
    stop_half_way([many], output_prefix=prefix, **options)
    damage(tmp_path / f"d_00002.{suffix}")
    assert preprocess([many], output_prefix=prefix, **options).resumed_shards == 2
    assert contents(prefix) == whole


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_ones_shards(tmp_path, tokenizer, many):
    prefix = tmp_path / "d"
    process = start([many], tokenizer.path, prefix, "--shard-tokens", str(SHARD_TOKENS), "--workers", "1")
    while process.poll() is None and _committed(prefix) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # it is not to end by itself while others start
    code, _, errors = run([many], tokenizer.path, prefix, "--shard-tokens", str(SHARD_TOKENS))
    assert code == 2
    assert "another process is writing" in errors
    _kill(process)
    other = ["--shard-tokens", str(2 * SHARD_TOKENS)]
    code, _, errors = run([many], tokenizer.path, prefix, *other)
    assert code == 2
    assert "d_00000.bin exists already" in errors
    code, _, errors = run([many], tokenizer.path, prefix, *other, "--overwrite")
    assert code == 0, errors
    manifest = read_manifest(prefix)
    assert len(manifest.shards) == _committed(prefix)
    for shard in manifest.shards:
        check_shard(tmp_path / shard.name, shard)
        assert sha256_file(tmp_path / f"{shard.name}.bin") == shard.bin_sha256
