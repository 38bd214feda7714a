"""benchmarks/experiments: models of one size, jobs that go on where they were stopped, and a tiny comparison."""

import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.experiments.configs import pretraining, tuning, write_config
from benchmarks.experiments.documents import main as make_task_documents
from benchmarks.experiments.experiments import Plan, extrapolation, passkey
from benchmarks.experiments.jobs import Job
from benchmarks.experiments.layout import DataFolder, Layout, jobs_on_device, note_jobs_on_device
from benchmarks.experiments.models import ARCHITECTURES, PATTERNS, ExperimentError, Variant, fitted_model
from benchmarks.experiments.plots import draw
from benchmarks.experiments.prepare import prepare
from benchmarks.experiments.results import Run, best_rate
from benchmarks.experiments.runner import Ending, run_jobs
from benchmarks.experiments.scales import SCALES
from benchmarks.experiments.tables import architectures_table, extrapolation_table, reading_table
from sambalm.data_pipeline.errors import DataError
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.reporting.metrics_file import metrics_line
from tests.support.data import write_shard

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
    sizes |= {"X": 2 * d * d, "U": 2 * d * inner + inner}
    if gla:
        keys, values = gla["num_heads"] * gla["head_dim"], 2 * gla["num_heads"] * gla["head_dim"]
        sizes["A"] = d * (2 * keys + 3 * values) + 16 * (d + keys) + keys + 2 * gla["head_dim"]
    if delta := model.get("mixers", {}).get("gated_deltanet"):
        heads, keys = delta["num_heads"], delta["num_heads"] * delta["head_dim"]
        sizes["G"] = d * (8 * keys + 2 * heads) + taps * 4 * keys + 2 * heads + 2 * delta["head_dim"]
    if mamba2 := model.get("mixers", {}).get("mamba2"):
        heads, states = inner // mamba2["head_dim"], 2 * mamba2["d_state"]
        sizes["S"] = d * (2 * inner + states + heads) + (taps + 1) * (inner + states) + 3 * heads + inner + inner * d
    if retnet:
        sizes["R"] = 8 * d * d + 2 * retnet["head_dim"]
    if mega := model.get("mixers", {}).get("mega"):
        rank, key = -(-d // 32), mega["key_dim"]
        s6 = d * (taps + 1) + d * (rank + 32) + (rank + 1) * d + 17 * d
        sizes["Z"] = s6 + 5 * d * (d + 1) + key * (d + 1) + 5 * key
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


def test_documents_of_several_lengths_are_tuned_on_one_after_the_other(tmp_path):
    scale, model = SCALES["small"], fitted_model(ARCHITECTURES["samba"], SCALES["small"], vocab_size=16_384)
    options = {"run": tmp_path / "run", "start": tmp_path / "start", "seed": 1}
    alone = parse_config(tuning(model, scale, {4096: tmp_path / "d"}, **options), source="test")
    assert (alone.train.steps, alone.data.phases, alone.train.micro_batch_size) == (400, None, 16)
    scale = replace(scale, tuning=replace(scale.tuning, tokens=(768, 1536, 4096)))
    prefixes = {tokens: tmp_path / str(tokens) for tokens in scale.tuning.tokens}
    config = parse_config(tuning(model, scale, prefixes, **options), source="test")
    assert [(phase.sequence_length, phase.train) for phase in config.data.phases] == [
        (tokens, str(prefix)) for tokens, prefix in prefixes.items()
    ]
    steps = [phase.tokens // phase.global_batch_tokens for phase in config.data.phases]
    assert steps == [133, 133, 134]
    for phase in config.data.phases:
        assert 0.99 < phase.global_batch_tokens / (64 * 4096) <= 1
        assert phase.micro_batch_size * phase.sequence_length <= 16 * 4096
    assert config.data.train == str(prefixes[4096])


def test_longer_documents_are_fewer_and_as_many_tokens():
    usual = SCALES["small"].tuning
    assert usual.changed(steps=None, tokens=None) == usual
    longer = usual.changed(steps=600, tokens=[2048, 32_768])
    assert (longer.steps, longer.batch, longer.documents) == (600, 8, 1600)
    assert [longer.documents_of(tokens) for tokens in longer.tokens] == [25_600, 1600]


def test_tuned_runs_are_tuned_further_under_another_label(tmp_path):
    plan = Plan(
        layout=Layout(tmp_path, "long"),
        data=DataFolder(tmp_path / "data"),
        scale=SCALES["tiny"],
        models=["samba"],
        seeds=[1],
        rates=[1e-3],
        vocab_size=384,
        tuned_before="short",
    )
    (job,) = (job for job in passkey(plan) if job.name == "passkey-long/architectures/samba/seed1")
    before = plan.layout.run("passkey-short/architectures/samba/seed1")
    with pytest.raises(ExperimentError, match=rf"{before} is not tuned to its end"):
        job.prepare()
    ended = before / "attempts" / "a"
    ended.mkdir(parents=True)
    (ended / "attempt.json").write_text('{"started_s": 1.0, "start_step": 0}')
    (ended / "outcome.json").write_text('{"exit_code": 0, "step": 8, "reason": "finished", "ended_s": 2.0}')
    job.prepare()
    written = yaml.safe_load(plan.layout.config(job.name).read_text())
    assert written["train"]["init_from"] == str(before)
    assert written["run"]["dir"] == str(plan.layout.run(job.name))


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


MEETS = """
import sys, time
from pathlib import Path
folder, name, other = Path(sys.argv[1]), *sys.argv[2:]
(folder / name).touch()
while not (folder / other).exists():
    time.sleep(0.01)
"""


def test_what_is_timed_beside_other_jobs_is_noted(tmp_path):
    def job(name, *, other, timed=True):
        command = [sys.executable, "-c", MEETS, str(tmp_path), name, other]
        return Job(name, command, (tmp_path / name).exists, timed=tmp_path / "runs" / name if timed else None)

    layout = Layout(tmp_path)
    run_jobs([job("a", other="b"), job("b", other="a", timed=False)], layout, places=["0", "0"], minutes=None)
    run_jobs([job("c", other="d"), job("d", other="c")], layout, places=["0", "1"], minutes=None)
    assert [jobs_on_device(tmp_path / "runs" / name) for name in "abcd"] == [2, 1, 1, 1]
    (tmp_path / "a").unlink()
    run_jobs([job("a", other="a")], layout, places=["0"], minutes=None)
    assert jobs_on_device(tmp_path / "runs" / "a") == 2


def test_documents_are_made_beside_a_job_that_has_the_only_gpu(tmp_path):
    def job(name, *, other, on_device):
        command = [sys.executable, "-c", MEETS, str(tmp_path), name, other]
        folder = tmp_path / "runs" / name
        return Job(name, command, (tmp_path / name).exists, timed=folder, on_device=on_device)

    jobs = [job("trains", other="documents", on_device=True), job("documents", other="trains", on_device=False)]
    assert run_jobs(jobs, Layout(tmp_path), places=["0"], minutes=None) is Ending.DONE
    assert jobs_on_device(tmp_path / "runs" / "trains") == 1  # they are no company on the GPU


ALONE = """
import sys, time
from pathlib import Path
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / "begun").touch(exist_ok=False)
time.sleep(0.3)
(folder / "begun").unlink()
(folder / name).touch()
"""


def test_as_many_documents_are_made_at_a_time_as_there_are_cores_for(tmp_path, monkeypatch):
    def job(name, program, *arguments):
        command = [sys.executable, "-c", program, str(tmp_path), name, *arguments]
        return Job(name, command, (tmp_path / name).exists, on_device=False)

    def ending(*jobs, cores):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        return run_jobs(jobs, Layout(tmp_path), places=["0"], minutes=None)

    assert ending(job("a", MEETS, "b"), job("b", MEETS, "a"), cores=4) is Ending.DONE
    assert ending(job("c", ALONE), job("d", ALONE), cores=3) is Ending.DONE


def made_run(layout, name, *, model="samba", losses=(3.0, 2.0), seed=1):
    """A run folder of the tiny scale, as far as tables and plots read it."""
    scale, folder = SCALES["tiny"], layout.run(name)
    folder.mkdir(parents=True)
    section = fitted_model(ARCHITECTURES[model], scale, vocab_size=384)
    data = DataFolder(layout.folder / "data")
    tokens = len(losses) * scale.batch_tokens
    write_config(
        pretraining(section, scale, data, run=folder, seed=seed, peak_lr=0.01, tokens=tokens), folder / "config.yaml"
    )
    step = {"loss": 1.0, "tokens": tokens, "step_time_s": 1.0, "tokens_per_second": 1234.0}
    lines = [{"step": n + 1, **step, "named_validation_loss_64/held_out": loss} for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(map(metrics_line, lines)))
    return Run(folder)


def test_tables_leave_out_the_speed_of_runs_that_shared_a_gpu(tmp_path):
    layout = Layout(tmp_path)
    assert architectures_table(layout).startswith("There is nothing to show yet")
    alone, shared = (made_run(layout, f"architectures/{name}/seed1", model=name) for name in ("samba", "mamba"))
    assert [line.split("|")[-2].strip() for line in architectures_table(layout).split("\n")[-2:]] == ["1,234"] * 2
    note_jobs_on_device(shared.folder, 3)
    table, _, sentence = architectures_table(layout).rpartition("\n\n")
    assert [line.split("|")[-2].strip() for line in table.split("\n")[-2:]] == ["1,234", ""]
    assert sentence == "Speeds are left out where other jobs ran on the same device meanwhile (`--per-gpu`)."

    for run, jobs in ((alone, 1), (shared, 2)):
        (run.folder / "measured").mkdir()
        note_jobs_on_device(run.folder / "measured", jobs)
        record = {"length": 64, "tokens_per_second": 5678.0, "peak_bytes": 2**30}
        (run.folder / "measured" / "reading.jsonl").write_text(json.dumps(record) + "\n")
    memory, speeds = reading_table(layout).split("Tokens a second:")
    assert "| Samba | 1.00 |\n| Mamba | 1.00 |" in memory
    assert speeds.endswith(f"| Samba | 5,678 |\n\n{sentence}")


def test_losses_are_compared_seed_by_seed(tmp_path):
    layout = Layout(tmp_path)
    last = {"samba": {1: 2.0, 2: 1.5}, "llama": {1: 2.25, 2: 1.25}, "mamba": {2: 3.0}}
    for model, losses in last.items():
        for seed, loss in losses.items():
            made_run(layout, f"architectures/{model}/seed{seed}", model=model, losses=(4.0, loss), seed=seed)
    _, _, table = architectures_table(layout).partition("over that of Samba with the same seed")
    assert table.split("\n")[2:] == [
        "| model | seed 1 | seed 2 |",
        "| --- | ---: | ---: |",
        "| Llama, full attention | +0.2500 | -0.2500 |",
        "| Mamba |  | +1.5000 |",
    ]


@pytest.mark.parametrize("experiment", ["architectures", "patterns", "reading"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_plots_take_models_of_ones_own_and_runs_that_shared_a_gpu(experiment, jobs, tmp_path, monkeypatch):
    own = [f"own-{number}" for number in range(8)]
    for name in own:
        monkeypatch.setitem(ARCHITECTURES, name, Variant(name, "M-*-*-"))
        monkeypatch.setitem(PATTERNS, name, Variant(name, "M-*-*-"))
        kind = "patterns" if experiment == "patterns" else "architectures"
        note_jobs_on_device(made_run(Layout(tmp_path), f"{kind}/{name}/seed1", model=name).folder, jobs)
    draw(experiment, Layout(tmp_path), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_table_says_why_long_documents_are_not_measured(tmp_path):
    data, layout = DataFolder(tmp_path / "data"), Layout(tmp_path / "runs")
    made_run(layout, "architectures/samba/seed1")
    plan = Plan(layout, data, SCALES["tiny"], models=["samba"], seeds=[1], rates=[0.01], vocab_size=384)
    jobs = [replace(job, needs=()) for job in extrapolation(plan) if "measured" in str(job.command)]
    assert run_jobs(jobs, layout, places=[None], minutes=None) is Ending.FAILED
    missing = f"since {data.folder} has no long documents: prepare another one with fewer --long-characters."
    assert [line.endswith(missing) for line in extrapolation_table(layout).split("\n\n")] == [True] * 3

    data.folder.mkdir()
    write_shard(data.long, [[1] * 30, [1] * 64])
    documents = [job for job in jobs if job.name.endswith("/documents")]
    assert run_jobs(documents, layout, places=[None], minutes=None) is Ending.FAILED
    assert extrapolation_table(layout).split("\n\n")[1] == (
        f"Perplexity of the first tokens of long documents: nothing to show, since no document of {data.long} has the "
        "65 tokens that are read of each: the longest has 64."
    )


@pytest.mark.long
def test_documents_of_too_few_tokens_are_refused(tmp_path, tokens):
    """In one sentence, although it is a process of a pool that finds out."""
    words = [
        "--tokenizer",
        str(tokens.with_name("tokenizer.model")),
        "--task",
        "needles",
        "--output",
        str(tmp_path / "d"),
    ]

    def made(count):
        make_task_documents([*words, "--documents", "2", "--tokens", str(count)])

    with pytest.raises(ExperimentError, match=r"--tokens is 64, of which 64 are for the answer"):
        made(64)
    with pytest.raises(ExperimentError, match=r"--tokens is 100, and a document .* takes (\d+) or more") as caught:
        made(100)
    assert int(re.search(r"takes (\d+)", str(caught.value))[1]) > 100
    assert [*tmp_path.iterdir()] == []


def lines_of(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prepare_refuses_what_would_mix_data_or_leave_none(tmp_path):
    train, held_out = (lines_of(tmp_path / f"{name}.jsonl", {"content": "x" * 50}) for name in ("train", "held_out"))
    keys = {"long_characters": 40, "vocab_size": 384, "text_key": "content"}
    with pytest.raises(ExperimentError, match=r"none\.jsonl of --held-out does not exist"):
        prepare(train, tmp_path / "none.jsonl", tmp_path / "data", **keys)
    with pytest.raises(DataError, match=r"train\.jsonl:1: no key 'text'"):
        prepare(train, held_out, tmp_path / "other", **keys | {"text_key": "text"})
    with pytest.raises(ExperimentError, match=r"no document of .* has less than 40 characters"):
        prepare(train, held_out, tmp_path / "data", **keys)
    with pytest.raises(ExperimentError, match="data was prepared with long_characters=40: give the same again"):
        prepare(train, held_out, tmp_path / "data", **keys | {"long_characters": 60})


@pytest.mark.slow
def test_prepare_goes_on_and_says_that_no_document_is_long(tmp_path, capfd):
    train = lines_of(tmp_path / "train.jsonl", *({"content": f"the {n} quick brown foxes {n * n}"} for n in range(300)))
    held_out = lines_of(tmp_path / "held_out.jsonl", {"text": "no such key"})
    keys = {"long_characters": 4000, "vocab_size": 300, "text_key": "content"}
    with pytest.raises(SystemExit, match="2"):
        prepare(train, held_out, tmp_path / "data", **keys)
    assert "held_out.jsonl:1: no key 'content'" in capfd.readouterr().err
    lines_of(held_out, {"content": "quick foxes"})
    prepare(train, held_out, tmp_path / "data", **keys)
    output = capfd.readouterr().out
    assert "data/train: is there, and left as it is" in output
    assert "data/long: not written, as no document of" in output
    assert (tmp_path / "data" / "held_out.json").is_file()


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
