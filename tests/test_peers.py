"""The benchmark that compares training steps of several models, on a CPU and at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.benchmark_files import FOLDER, load_benchmark

ROOT = Path(__file__).parents[1]
SCRIPT = FOLDER / "peers.py"
peers = load_benchmark("peers")

TINY = ["model.pattern=M-*-", "model.hidden_size=64", "model.mlp_size=256", "model.vocab_size=256", "model.window=32"]
SIZES = ["--lengths", "64", "--step-tokens", "256", "--micro-batch-tokens", "128", "--seconds", "0.1"]


def run_peers(output, *arguments):
    command = [sys.executable, SCRIPT, ROOT / "configs/demo.yaml", *TINY, "--output", output, *arguments, *SIZES]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.long
def test_our_models_run_and_a_second_run_reads_them(tmp_path):
    output = tmp_path / "results.jsonl"
    first = run_peers(output, "--models", "samba", "llama")
    assert first.returncode == 0, first.stderr
    lines = output.read_text().splitlines()
    samba, llama = map(json.loads, lines)
    assert (samba["model"], llama["model"]) == ("samba", "llama")
    for record in (samba, llama):
        assert record["outcome"] == "measured"
        assert 2 <= len(record["step_times_s"]) <= 7
        assert min(record["step_times_s"]) > 1e-3  # of each step, not of reading results that were there
        assert abs(record["loss"] - 5.55) < 0.2  # random tokens of 256: log(256)
    assert abs(llama["parameters"] / samba["parameters"] - 1) < 0.2  # multiples of 128 are coarse at this size
    assert f"{samba['tokens_per_s']:,.0f}" in first.stdout

    with output.open("a") as file:
        file.write('{"config": "demo", "cut o')
    second = run_peers(output, "--models", "samba", "llama")
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert output.read_text().splitlines()[:-1] == lines


@pytest.mark.long
def test_a_cell_over_its_time_is_ended_and_the_mistake_of_a_config_is_one_sentence(tmp_path):
    output = tmp_path / "results.jsonl"
    ended = run_peers(output, "--models", "samba", "--limit-s", "0.5")
    assert json.loads(output.read_text())["outcome"] == "time limit"
    assert "holds nothing measured of samba" in ended.stderr
    wrong = subprocess.run(
        [sys.executable, SCRIPT, ROOT / "configs/demo.yaml", "model.window=0", "--output", tmp_path / "other.jsonl"],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"{ROOT}/configs/demo.yaml: model.window is 0")
    assert len(wrong.stderr.splitlines()) == 1
    assert not (tmp_path / "other.jsonl").exists()


ARCHITECTURES = FOLDER / "peer_steps" / "architectures.py"


@pytest.mark.long
def test_architectures_run_in_one_process_at_equal_parameters(tmp_path):
    output, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    sizes = [*TINY[1:], "model.num_query_heads=4", "model.num_kv_heads=4", "train.precision=fp32"]
    sizes += ["model.mixers.mamba2.head_dim=32", "model.mixers.mamba2.d_state=24", "model.mixers.mamba2.groups=3"]

    def run_rows(*arguments):
        options = ("--lengths", "64", "--step-tokens", "128", "--micro-batch-tokens", "64", "--seconds", "0.1")
        names = ("--architectures", "samba", "mamba2", "llama_swa")
        command = [sys.executable, ARCHITECTURES, "--output", output, *options, *names, *arguments, *sizes]
        return subprocess.run(command, capture_output=True, text=True)

    ended = run_rows("--plot", picture)
    assert ended.returncode == 0, ended.stderr
    samba, mamba2, llama = map(json.loads, output.read_text().splitlines())
    assert [samba["outcome"], mamba2["outcome"], llama["outcome"]] == ["measured", "failed", "measured"]
    assert "no multiple of head_dim 32 x groups 3" in mamba2["reason"]  # the other rows are run all the same
    assert f"| Samba with Mamba-2 |  |  | failed: {mamba2['reason']} |" in ended.stdout
    assert abs(llama["parameters"] / samba["parameters"] - 1) < 0.2  # multiples of 64 are coarse at this size
    assert llama["mlp_size"] > samba["mlp_size"] == 256
    for row in (samba, llama):
        assert abs(row["loss"] - 5.55) < 0.2  # random tokens of 256: log(256)
    assert picture.stat().st_size > 10_000

    again = run_rows("--minutes", "0")
    assert again.returncode == 0, again.stderr
    assert json.loads(output.read_text().splitlines()[-1])["outcome"] == "no time left"
    assert len(output.read_text().splitlines()) == 4  # what was measured is not run again
    assert "| Samba with Mamba-2 |  |  | no time left |" in again.stdout


def record(**values):
    cell = {"config": "c", "settings": [], "model": "samba", "length": 4096, "step_tokens": 65536}
    cell |= {"micro_batch_tokens": 32768, "recompute": "none", "outcome": "measured", "device": "GPU", "torch": "2"}
    cell |= {"packages": {}, "parameters": 1, "tokens_per_s": 100.0, "kept_bytes": 10, "peak_bytes": 50}
    return cell | {"device_bytes": 100} | values


@pytest.mark.parametrize(
    ("known", "length", "found"),
    [
        (record(), 65536, False),  # 10 + 2 * 40 bytes of 100
        (record(), 131072, True),  # 10 + 4 * 40
        (record(), 16384, False),  # as many tokens in a micro-batch as at 4096
        (record(recompute="full"), 131072, False),
        (record(model="fla"), 131072, False),
        (record(device_bytes=0), 131072, False),  # a CPU
        (record(outcome="out of memory"), 65536, True),
        (record(outcome="out of memory"), 24576, False),  # fewer tokens in a micro-batch than at 4096
        (record(outcome="failed"), 131072, False),
    ],
)
def test_what_cannot_fit_is_foreseen(known, length, found):
    cell = {name: record(length=length)[name] for name in peers.CELL}
    assert (peers.foreseen(cell, [known]) is not None) == found


def test_the_table_takes_the_fastest_level_and_keeps_configurations_apart(tmp_path, capsys, monkeypatch):
    out_of_memory = {name: record(length=65536)[name] for name in peers.CELL} | {"outcome": "out of memory"}
    records = [
        record(tokens_per_s=100.0),
        record(tokens_per_s=80.0, recompute="full"),
        out_of_memory,
        record(length=65536, tokens_per_s=75.0, recompute="full", peak_bytes=2**30),
        record(settings=["model.window=1"], device="other", tokens_per_s=50.0),
    ]
    output = tmp_path / "results.jsonl"
    output.write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(output), "--table"])
    peers.main()
    printed = capsys.readouterr().out
    assert "| Samba, this project | 1 | 100 (0.0 GiB) | 75 (1.0 GiB, recomputed) | 0.75 |" in printed
    assert "c model.window=1, other, torch 2" in printed
    assert "| Samba, this project | 1 | 50 (0.0 GiB) |" in printed
    monkeypatch.setattr(sys, "argv", ["peers.py", "--output", str(output), "--plot", str(tmp_path / "plot.svg")])
    with pytest.raises(SystemExit, match="results of 2 devices or configurations"):
        peers.main()
    output.write_text("".join(json.dumps(r) + "\n" for r in records[:-1]))
    peers.main()
    drawn = (tmp_path / "plot.svg").read_bytes()
    assert b"<!-- Samba, this project -->" in drawn
    peers.main()
    assert (tmp_path / "plot.svg").read_bytes() == drawn
