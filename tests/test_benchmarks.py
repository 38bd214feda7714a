"""Benchmarks of whole runs, which start the program as a user does, at tiny sizes on a CPU: that they still run."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support.benchmark_files import FOLDER, load_benchmark

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
TINY = [
    *("model.pattern=M-*-", "model.hidden_size=64", "model.num_query_heads=4", "model.mlp_size=64"),
    *("data.sequence_length=64", "train.global_batch_tokens=256", "train.micro_batch_size=1"),
]


def run(name, *arguments):
    command = [sys.executable, FOLDER / name, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def rows(output):
    """Cells of a Markdown table's rows, by the first of them."""
    cells = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in output.splitlines() if "|" in line)
    return {first: rest for first, *rest in cells}


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_steps_are_timed(processes):
    found = rows(run("step.py", CONFIG, "--steps", 4, "--gpus", processes, *TINY, "parallel={}"))["as it is"]
    assert float(found[0].replace(",", "")) > 0
    assert abs(float(found[-1]) - 7.62) < 0.3  # random tokens of 2,048: log(2048)


def test_what_a_device_waits_for_is_told_from_what_runs_beside():
    step = load_benchmark("step")

    def event(name, start, end):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=1e3 * start, end=1e3 * end))

    events = [event("a", 0, 30), event("nccl", 3, 12), event("b", 36, 39), event("nccl", 38, 60)]
    waits = {"a | b": 6 / step.PROFILED_STEPS}
    assert step.waits_ms(events) == pytest.approx(waits)
    assert step.busy_ms(events) == pytest.approx((60 - 6) / step.PROFILED_STEPS)


@pytest.mark.long
def test_layouts_are_compared(tmp_path):
    load_benchmark("step").write_tokens(tmp_path / "tokens", vocab_size=2048, tokens=40_000, document_tokens=None)
    data, folder = ("--data", tmp_path / "tokens"), ("--folder", tmp_path / "runs")
    layouts = ("--layouts", "one process", "TP2 + SP")
    output = run("layouts.py", CONFIG, *data, *folder, "--steps", 3, *TINY, "data.validation_fraction=0.2", *layouts)
    found = rows(output)
    assert found["one process"][0] == f"{read_metrics(tmp_path / 'runs' / 'oneprocess')[-1]['loss']:.4f}"
    assert float(found["TP2 + SP"][2]) < 1e-4  # of the first steps: rounding
    assert run("layouts.py", "--read", *folder, *layouts) == output


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_largest_micro_batch_is_the_last_that_fits(recompute):
    benchmark = load_benchmark("largest_micro_batch")
    sequences = int(benchmark.largest(CONFIG, recompute=recompute, limit_gib=1.0).split()[0])
    fits, exceeds = (
        benchmark.memory_gib(CONFIG, sequences=count, recompute=recompute) for count in (sequences, sequences + 1)
    )
    assert fits <= 0.9 < exceeds


@pytest.mark.long
def test_a_training_is_compared_with_itself_under_other_kernels(tmp_path):
    load_benchmark("step").write_tokens(tmp_path / "tokens", vocab_size=2048, tokens=40_000, document_tokens=None)
    data, folder = ("--data", tmp_path / "tokens"), ("--folder", tmp_path / "runs")
    settings = [*TINY, "parallel={}", "model.window=8", "data.validation_fraction=0.2", "train.steps=6"]
    only = ("--only", "main", "--only", "reference", "--only", "window")
    drawn = tmp_path / "training.png"
    output = run("training.py", CONFIG, *data, *folder, *only, "--compare-steps", 2, "--plot", drawn, *settings)
    found = rows(output)
    assert float(found["reference"][0]) == 0.0  # on a CPU it has the same kernels
    assert float(found["window"][0]) > 0.0
    assert drawn.stat().st_size > 1000
    assert run("training.py", "--read", *folder, "--compare-steps", 2) == output


@pytest.mark.long
def test_streams_are_timed_in_windows(tmp_path):
    output, picture = tmp_path / "windows.jsonl", tmp_path / "plot.png"
    sizes = ("--tokens", 60, "--generate-tokens", 40, "--window-tokens", 20, "--read-tokens", 30)
    table = run("inference/streaming.py", *sizes, "--output", output, "--plot", picture)
    assert "read 30 tokens at" in table
    records = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [*(("generate()", tokens) for tokens in (20, 40)), *(("stream", tokens) for tokens in (20, 40, 60))]
    assert [(record["name"], record["tokens"]) for record in records] == expected
    assert all(record["processor_ms"] > 0 and record["mib"] > 10 for record in records)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert rows(run("inference/streaming.py", "--read", output)) == rows(table)


@pytest.mark.long
def test_a_stream_of_a_config_that_is_killed_leaves_its_windows_and_its_plot(tmp_path):
    output, picture = tmp_path / "windows.jsonl", tmp_path / "plot.png"
    sizes = ("--window-tokens", "10", "--device", "cpu", "--dtype", "bf16", "--output", output, "--plot", picture)
    command = [sys.executable, FOLDER / "inference" / "streaming.py", CONFIG, *sizes, *TINY]
    process = subprocess.Popen(command)
    try:
        while not picture.exists():
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    first = json.loads(output.read_text().splitlines()[0])
    assert (first["tokens"], first["dtype"], first["device"]) == (10, "bfloat16", "cpu")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_stream_ends_with_its_minutes(tmp_path):
    output = tmp_path / "windows.jsonl"
    sizes = ("--tokens", 10**9, "--minutes", 0.03, "--window-tokens", 1, "--output", output)
    run("inference/streaming.py", *sizes)
    seconds = [json.loads(line)["seconds"] for line in output.read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert 1.5 < seconds[-1] < 10.0


@pytest.mark.long
def test_runs_that_learn_are_compared_by_their_losses(tmp_path):
    load_benchmark("step").write_tokens(tmp_path / "tokens", vocab_size=2048, tokens=40_000, document_tokens=None)
    data, folder = ("--data", tmp_path / "tokens"), ("--folder", tmp_path / "runs")
    settings = [*TINY, "parallel={}", "model.window=8", "data.validation_fraction=0.2", "train.steps=4"]
    settings += ["validation.every_steps=2", "validation.tokens=512", "validation.length_multiples=[1]"]
    runs = ("--run", "main=", "--run", "another seed=run.seed=2")
    output = run("learning.py", CONFIG, *data, *folder, *runs, *settings)
    records = {name: read_metrics(tmp_path / "runs" / name) for name in ("main", "another-seed")}
    last = [f"{found[-1]['validation_loss_64']:.4f}" for found in records.values()]
    assert last[0] != last[1]
    assert rows(output)["4"][1:] == last
    assert rows(output)["another seed, 4"][0] == f"{float(last[1]) - float(last[0]):+.4f}"
    assert run("learning.py", "--read", *folder, "--plot", tmp_path / "learning.png") == output
    assert (tmp_path / "learning.png").stat().st_size > 10_000


@pytest.mark.long
def test_saves_are_timed_in_a_folder_that_is_not_there_yet(tmp_path):
    found = rows(run("checkpoint.py", CONFIG, "--saves", 1, "--folder", tmp_path / "new", *TINY, "parallel={}"))
    assert {"gathered", "at once", "beside"} <= set(found)
    assert len({found[way][-1] for way in ("gathered", "at once", "beside")}) == 1  # the same bytes
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_comparisons_of_replicas_are_timed(ranks):
    output = run("replicas.py", CONFIG, "--ranks", ranks, "--steps", 2, *TINY, "parallel={}")
    assert f"{ranks} ranks, a step takes" in output
    alone_ms, of_training = (output.splitlines()[-1].strip("| ").split(" | ")[cell] for cell in (0, -1))
    assert float(alone_ms) > 0
    assert 0 < float(of_training.rstrip("%")) < 100


@pytest.mark.long
def test_imports_are_timed():
    found = rows(run("imports.py", "--processes", 1))
    assert float(found["PyTorch"][0]) > 0.1
    assert abs(sum(float(found[name][0]) for name in list(found)[2:-1]) - float(found["all"][0])) < 0.05


@pytest.mark.long
def test_a_shuffle_is_measured(tmp_path):
    output = run("shuffle.py", "--gigabytes", 0.25, "--folder", tmp_path)
    assert "250 MB of tokens" in output
    assert float(output.split("peak ")[1].split()[0]) < 400
