"""benchmarks/experiments: models of one size, jobs that go on where they were stopped, and a tiny comparison."""

import itertools
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from benchmarks.experiments.configs import write_config
from benchmarks.experiments.jobs import Job
from benchmarks.experiments.layout import Layout
from benchmarks.experiments.models import ARCHITECTURES, PATTERNS, ExperimentError, Variant, fitted_model
from benchmarks.experiments.results import Run, best_rate
from benchmarks.experiments.runner import Ending, run_jobs
from benchmarks.experiments.scales import SCALES
from sambalm.pretrain.reporting.metrics_file import metrics_line

ROOT = Path(__file__).parents[1]


def weights(model):
    """Weights of a model's matrices, vectors and convolutions, by the paper's formulas."""
    d, width = model["hidden_size"], model.get("mlp_size", 0)
    inner, rank, states = 2 * d, -(-d // 16), model.get("d_state", 16)
    block, _, times = model["pattern"].partition(" x ")
    letters = block * int(times)
    gla, retnet = (model.get("mixers", {}).get(name, {}) for name in ("gla", "retnet"))
    taps = model.get("d_conv", 4)
    mamba = d * 2 * inner + inner * (taps + 1) + inner * (rank + 2 * states) + (rank + 1) * inner
    mamba += inner * states + inner + inner * d
    keys = model.get("num_kv_heads", 1) * d // model.get("num_query_heads", 1)
    attention = 2 * d * d + 2 * d * keys
    sizes = {"M": mamba, "*": attention, "F": attention, "-": 3 * d * width, "=": 3 * d * 2 * d}
    if gla:
        keys, values = gla["num_heads"] * gla["head_dim"], 2 * gla["num_heads"] * gla["head_dim"]
        sizes["A"] = d * (2 * keys + 3 * values) + 16 * (d + keys) + keys + 2 * gla["head_dim"]
    if retnet:
        sizes["R"] = 8 * d * d + 2 * retnet["head_dim"]
    return sum(sizes[letter] + d for letter in letters) + d + model["vocab_size"] * d


@pytest.mark.parametrize("name", sorted(ARCHITECTURES | PATTERNS))
def test_all_models_have_one_size(name):
    model = fitted_model((ARCHITECTURES | PATTERNS)[name], SCALES["small"], vocab_size=16384)
    assert weights(model) == pytest.approx(35_512_832, rel=0.01)


def test_a_model_that_no_width_makes_as_large_is_refused():
    with pytest.raises(ExperimentError, match="M x 12 gives"):
        fitted_model(Variant("", "M", share=0.75), SCALES["small"], vocab_size=16384)


def test_a_config_of_other_settings_is_not_replaced(tmp_path):
    path = tmp_path / "configs" / "x.yaml"
    write_config({"train": {"steps": 1}}, path)
    write_config({"train": {"steps": 1}}, path)
    with pytest.raises(ExperimentError, match=r"x\.yaml was written with other settings"):
        write_config({"train": {"steps": 2}}, path)


def test_the_best_rate_is_that_of_the_lowest_last_loss(tmp_path):
    for rate, losses in {0.1: (3.0, 5.0), 0.2: (4.0, 2.0), 0.3: (4.5, 4.0)}.items():
        folder = tmp_path / str(rate)
        folder.mkdir()
        step = {"loss": 1.0, "tokens": 8, "step_time_s": 1.0, "tokens_per_second": 8.0}
        lines = [{"step": n, **step, "named_validation_loss_4096/held_out": loss} for n, loss in enumerate(losses)]
        (folder / "metrics.jsonl").write_text("".join(map(metrics_line, lines)))
    assert best_rate({float(folder.name): folder for folder in tmp_path.iterdir()}) == 0.2
    assert best_rate({1.0: tmp_path / "missing"}) is None


COUNTS = """
import signal, sys, time
from pathlib import Path
folder, name, starts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def say(word):
    with (folder / "log").open("a") as log:
        log.write(word + chr(10))
def stop(*_):
    say("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
say(name)
if (folder / "log").read_text().split().count(name) < starts:
    time.sleep(60)
(folder / name).touch()
"""


def counting(folder, name, *, starts=1, needs=()):
    """A job that is done at its nth start, and waits for a signal before that."""
    command = [sys.executable, "-c", COUNTS, str(folder), name, str(starts)]
    return Job(name, command, (folder / name).exists, needs)


def test_jobs_are_stopped_in_time_and_go_on_in_the_next_call(tmp_path):
    jobs = [
        counting(tmp_path, "a"),
        counting(tmp_path, "b", starts=2, needs=["a"]),
        counting(tmp_path, "c", needs=["b"]),
    ]
    keys = {"places": [None], "save_s": 1.0, "start_s": 0.1}
    assert run_jobs(jobs, Layout(tmp_path), minutes=3 / 60, **keys) is Ending.LEFT
    assert (tmp_path / "log").read_text().split() == ["a", "b", "saved"]
    assert run_jobs(jobs, Layout(tmp_path), minutes=None, **keys) is Ending.DONE
    assert (tmp_path / "log").read_text().split() == ["a", "b", "saved", "b", "c"]


def test_what_needs_a_failed_job_is_left_and_the_rest_done(tmp_path, capsys):
    fails = Job("fails", [sys.executable, "-c", "raise SystemExit('no data')"], lambda: False)
    jobs = [fails, counting(tmp_path, "after", needs=["fails"]), counting(tmp_path, "beside")]
    assert run_jobs(jobs, Layout(tmp_path), places=[None, None], minutes=None) is Ending.FAILED
    assert (tmp_path / "log").read_text().split() == ["beside"]
    output = capsys.readouterr().out
    assert "failed    fails: exit code 1, no data" in output
    assert output.endswith("left: fails, after\n")


def experiment(*words):
    command = [sys.executable, "-m", "benchmarks.experiments", *map(str, words)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def texts(path, files, *, characters):
    lines = [json.dumps({"text": file.read_text(encoding="utf-8")[:characters]}) + "\n" for file in files]
    path.write_text("".join(lines))


@pytest.mark.long
def test_a_tiny_comparison_from_text_to_tables(tmp_path):
    library = Path(sysconfig.get_path("stdlib"))
    sources = iter(sorted(library.glob("[a-t]*.py")))
    texts(tmp_path / "train.jsonl", itertools.islice(sources, 40), characters=4000)
    texts(tmp_path / "held_out.jsonl", itertools.islice(sources, 20), characters=4000)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": (library / "typing.py").read_text(encoding="utf-8")}) + "\n")
    data = tmp_path / "data"
    inputs = ("--train", tmp_path / "train.jsonl", "--held-out", tmp_path / "held_out.jsonl")
    experiment("prepare", *inputs, "--data", data, "--vocab-size", 384, "--long-characters", 4001)
    folder = ("--folder", tmp_path / "runs")
    settings = ("--data", data, "--scale", "tiny", "--seeds", 1, "--models", "samba", "llama", "--tokens", 2560)
    for name in ("architectures", "extrapolation", "reading", "passkey", "phonebook", "retrieval"):
        assert "all jobs are done" in experiment(name, *folder, *settings)
        assert "started" not in experiment(name, *folder, *settings)
        table = experiment(name, *folder, "--table", "--plot", tmp_path / f"{name}.png")
        assert "| Samba |" in table
        assert "| Llama, full attention |" in table
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    run = Run(tmp_path / "runs" / "runs" / "architectures" / "samba" / "seed1")
    assert f"{run.held_out[-1][1]:.4f}" in experiment("architectures", *folder, "--table")
    assert sorted(run.scores("table", "perplexity")) == [64, 128]
    assert len(run.reading) == 6
