"""The report as a page: it parses, needs nothing from elsewhere, shows every series, and lets no name break it."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from sambalm.pretrain.reporting import charts, run_data
from sambalm.pretrain.reporting import page as page_file
from sambalm.pretrain.reporting.charts import Chart, Series, draw, linear_ticks, log_ticks, short
from sambalm.pretrain.reporting.page import render_page
from sambalm.pretrain.reporting.run_data import HappenedEvent, read_runs
from sambalm.pretrain.reporting.status import State, read_status
from tests.support import program
from tests.support.whole_runs import run_dir, train

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = '<script>alert("1")</script>&"'


class Page(HTMLParser):
    """Collects what a page holds, and fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def figures(self) -> list[str]:
        return self.texts["figcaption"]


def needs_nothing_else(page: Page) -> bool:
    names = {"src", "href", "srcset", "xlink:href", "action", "data"}
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in names]
    style = "".join(page.texts["style"])
    tags = {tag for tag, _ in page.tags}
    has_handlers = any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    return (
        all(link.startswith("#") for link in links)
        and not re.search(r"url\(|@import", style)
        and not tags & {"script", "link", "iframe", "img", "object", "embed"}
        and not has_handlers
    )


@pytest.fixture
def runs(run_values, tmp_path):
    """A run, and a copy of it with another name, learning rate and a crash."""
    train(run_values)
    first, second = run_dir(run_values), tmp_path / EVIL.replace("/", "|")
    shutil.copytree(first, second)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("peak_lr: 0.003", "peak_lr: 0.009"))
    return first, second


def test_the_page_of_a_run_shows_all_that_is_known(runs):
    page = Page(render_page(read_runs([runs[0]]), baselines={"unigram": 5.5}))
    assert needs_nothing_else(page)
    assert page.figures() == [
        "Training loss",
        "Held-out loss by length",
        "Throughput",
        "Peak memory of the first process",
        "Gradient norm",
        "Learning rate",
    ]
    headings = ["Summary", "Charts", "Where the time went", "Events", "Configuration", "Environment", "Data"]
    assert page.texts["h2"] == headings
    assert {"32 tokens", "64 tokens", "run"} <= set(page.texts["title"])  # of lines; one line has the run's name
    assert "unigram 5.500" in page.texts["text"]
    cells = page.texts["td"]
    assert "finished" in cells
    assert "6 of 6" in cells
    assert any(re.fullmatch(r"attempt \S+ finished at step 6 after \d+ s", cell) for cell in cells)
    assert "steps 3 to 6 saved" in cells
    assert "100.00% of the samples" in cells
    assert {"optimizer.peak_lr", "torch", "host", "productive", "hanging"} <= set(page.texts["th"])
    lines = [attrs for tag, attrs in page.tags if tag == "polyline"]
    assert len(lines) == 7  # one in each chart and two lengths
    styles = [attrs["style"] for tag, attrs in page.tags if tag == "span" and "title" in attrs]
    widths = [float(style.split("width:")[1].split("%")[0]) for style in styles]
    assert sum(widths) == pytest.approx(100, abs=1)


def test_runs_are_compared_in_the_same_charts_and_names_are_escaped(runs):
    page = Page(render_page(read_runs(runs), baselines={}))
    assert needs_nothing_else(page)
    evil = runs[1].name
    assert {"run", evil, "run, 32 tokens", f"{evil}, 64 tokens"} <= set(page.texts["title"])
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 14
    marked = page.tags.index(("tr", {"class": "differs"}))
    assert marked
    keys = [text for text in page.texts["th"] if text == "optimizer.peak_lr"]
    assert len(keys) == 2  # among the differences and among all
    assert len([text for text in page.texts["th"] if text == "optimizer.beta1"]) == 1
    assert {"0.003", "0.009"} <= set(page.texts["td"])


def test_the_command_writes_the_page_and_prints_json(runs, run_values, tmp_path):
    first, second = runs
    said = program.run("report", first, variables={"COLUMNS": "200"})
    assert (said.returncode, said.stderr) == (0, "")
    assert f"the page: {first}/report.html" in said.stdout
    assert "Held-out loss after step 6" in said.stdout
    Page((first / "report.html").read_text())
    output = tmp_path / "both.html"
    said = program.run("report", first, second, "--output", output, "--json")
    found = json.loads(said.stdout)
    assert [run["run_dir"] for run in found] == [str(first), str(second)]
    assert found[0]["held_out"].keys() == {"validation_loss_32", "validation_loss_64"}
    assert found[0]["status"]["state"] == "finished"
    assert found[0]["baselines"].keys() == {"unigram", "bigram"}
    page = Page(output.read_text())
    assert second.name in "".join(page.texts["title"])
    assert not [text for text in page.texts["text"] if text.startswith(("unigram", "bigram"))]  # which are of one run
    assert [text for text in Page((first / "report.html").read_text()).texts["text"] if text.startswith("unigram")]


@pytest.mark.parametrize(
    "change", [("global_batch_tokens: 256", "global_batch_tokens: 512"), ("sequence_length: 32", "sequence_length: 64")]
)
def test_runs_with_other_batches_are_compared_by_tokens(change, runs):
    config = (runs[1] / "config.yaml").read_text()
    assert change[0] in config
    (runs[1] / "config.yaml").write_text(config.replace(*change))
    page = Page(render_page(read_runs(runs), baselines={}))
    assert page.texts["text"].count("tokens") == 6


def test_a_run_without_attempts_and_ledger_has_a_page_too(runs):
    shutil.rmtree(runs[0] / "attempts")
    (runs[0] / "ledger.jsonl").unlink()
    page = Page(render_page(read_runs([runs[0]]), baselines={}))
    assert page.texts["h2"] == ["Summary", "Charts", "Configuration", "Data"]


def made_run(name: str, records: list[dict]) -> Any:
    return SimpleNamespace(
        name=name, records=records, status=None, phases=(), started_from=None, path=name, config={"train.steps": 9}
    )


def test_lengths_stand_in_their_order_and_each_run_has_a_colour():
    """Lengths are ordered as numbers, 512 before 1,024, which as text would come first."""
    record = {"step": 7, "tokens": 64, "loss": 1.0, "tokens_per_second": 2.0}
    record |= {f"validation_loss_{length}": 1.0 for length in (1024, 512)}
    record |= {f"evaluation/passkey/accuracy/{length}": 0.5 for length in (1024, 2048)}
    runs = [made_run(name, [record]) for name in "ab"]
    facts = page_file._facts(runs[0])
    assert [name for name in facts if name.startswith("held-out")] == [
        "held-out loss at 512 tokens",
        "held-out loss at 1,024 tokens",
    ]
    names = ["a, 512 tokens", "a, 1,024 tokens", "b, 512 tokens", "b, 1,024 tokens"]
    (evaluated,) = page_file._evaluation_charts(runs, "step", "step")
    held_out = page_file._held_out_series(runs, "step", "validation_loss_")
    assert [one.name for one in held_out] == names
    for series in (held_out, evaluated.series):
        assert [(one.colour, one.dash) for one in series] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    (alone,) = page_file._evaluation_charts(runs[:1], "step", "step")
    assert [(one.name, one.colour, one.dash) for one in alone.series] == [("1024", 0, 0), ("2048", 1, 0)]


@pytest.mark.parametrize(
    ("key", "of_whom"), [("peak_memory_bytes", "first GPU"), ("peak_host_memory_bytes", "first process")]
)
def test_memory_is_that_of_the_gpu_where_the_last_steps_had_one(key, of_whom):
    records = [
        {"step": 1, "peak_host_memory_bytes": 2**30},
        {"step": 2, "peak_host_memory_bytes": 2**30} | {key: 3 * 2**30},
    ]
    page = Page(page_file._charts([made_run("a", records)], {}))
    assert f"Peak memory of the {of_whom}" in page.figures()
    assert "a, 2: 3" in page.texts["title"]


def test_the_newest_events_are_shown_and_those_before_are_counted():
    events = [HappenedEvent(float(number), f"event {number}") for number in range(203)]
    page = Page(page_file._events([SimpleNamespace(name="a", events=events)]))
    assert [text for text in page.texts["td"] if text.startswith("event ")] == [f"event {n}" for n in range(3, 203)]
    assert page.texts["p"] == ["3 earlier ones are left out."]


def test_what_a_run_s_folder_tells_of_its_last_attempt(tmp_path):
    folder = tmp_path / "attempts" / "one"
    folder.mkdir(parents=True)
    facts = {
        "host": "h",
        "world_size": 4,
        "slurm_job": "7",
        "slurm_nodes": "n[1-2]",
        "revision": "abc",
        "changed": True,
    }
    (folder / "attempt.json").write_text(json.dumps(facts))
    (folder / "packages.txt").write_text("torch==2.1\nother==3\nnumpy==2.0\n")
    assert run_data._environment(folder) == {
        **{"host": "h", "processes": "4", "Slurm job": "7", "Slurm nodes": "n[1-2]", "revision": "abc"},
        **{"code changed": "yes, see code.diff", "torch": "2.1", "numpy": "2.0"},
    }
    for step in (3, 12):
        (tmp_path / "checkpoints" / f"step_{step:08}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step:08}" / "state.json").write_text(json.dumps({"step": step}))
    assert run_data._newest_state(tmp_path) == {"step": 12}


def test_events_are_in_order_and_failures_are_bad(runs):
    status = read_status(runs[0])
    last = status.attempts[-1]
    lost = replace(last, name="lost", state=State.KILLED, started_s=last.started_s - 20, ended_s=last.started_s - 10)
    events = run_data._events(runs[0], replace(status, attempts=[last, lost]))
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    assert [event.what for event in events if event.is_bad] == ["attempt lost killed at step 6 after 10 s"]


def test_a_chart_s_range_shows_most_and_its_bands_close():
    points = [(float(step), 3.0 if step % 20 == 0 else 1.0) for step in range(100)]
    assert "up to" not in draw(Chart("x", [Series("a", points, 0)], "step", "y"))  # for 5 of 100 points
    buckets = [charts._Bucket(float(step), 10.0**step, 10.0**step, 10.0**step) for step in (-2, 3)]
    low, high = charts._range(Chart("x", [], "step", "y", is_log=True), buckets)
    assert (low, high) == pytest.approx((0.01 / 1.2, 1000 * 1.2))
    many = [(float(step), float(step % 7)) for step in range(1000)]
    page = Page(draw(Chart("x", [Series("a", many, 0)], "step", "y")))
    (band,) = [attrs["points"] for tag, attrs in page.tags if tag == "polygon"]
    x = [float(point.split(",")[0]) for point in band.split()]
    assert x == sorted(x[: len(x) // 2]) + sorted(x[len(x) // 2 :], reverse=True)


def test_a_chart_leaves_gaps_keeps_spikes_and_stays_small():
    points = [(step, 2.0 + (7.0 if step == 5000 else 0.0)) for step in range(10_000)]
    points[3000:3100] = [(step, math.nan) for step in range(3000, 3100)]
    drawn = draw(Chart("loss", [Series("a", points, 0)], "step", "nats"))
    page = Page(drawn)
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 2
    assert len(drawn) < 30_000
    assert "up to 9" in page.texts["text"]
    assert "nothing recorded" in draw(Chart("x", [Series("a", [(1, math.nan)], 0)], "step", "y"))
    assert "<circle" in draw(Chart("x", [Series("a", [(1, 0.0)], 0)], "step", "y", from_zero=True))
    assert "nothing recorded" in draw(Chart("x", [Series("a", [(1, 0.0)], 0)], "step", "y", is_log=True))


def test_ticks_are_round_numbers():
    assert linear_ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(0.0, 40.0) == [0, 10, 20, 30, 40]
    assert log_ticks(1e-12, 1e12) == pytest.approx([10.0**n for n in range(-12, 13, 4)])
    assert linear_ticks(2.31, 2.39) == pytest.approx([2.32, 2.34, 2.36, 2.38])
    assert log_ticks(0.03, 200.0) == pytest.approx([0.1, 1, 10, 100])
    assert log_ticks(0.4, 2.5) == pytest.approx([0.5, 1, 2])
    assert [short(value) for value in (0, 8e-4, 0.5, 1500, 2.5e7, -3e9)] == ["0", "8e-4", "0.5", "1.5k", "25M", "-3B"]


def test_a_step_on_the_axis_is_a_whole_number():
    page = draw(Chart("held out", [Series("256 tokens", [(60.0, 4.6)], 0)], "step", "nats"))
    assert ">60<" in page
    assert not re.search(r">(59|60)\.\d<", page)
