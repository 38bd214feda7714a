"""The report as a page: it parses, needs nothing from elsewhere, shows every series, and lets no name break it."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from sambalm.pretrain.reporting.charts import Chart, Series, draw, linear_ticks, log_ticks, short
from sambalm.pretrain.reporting.page import render_page
from sambalm.pretrain.reporting.run_data import read_runs
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
    assert second.name in "".join(Page(output.read_text()).texts["title"])


def test_runs_with_other_batches_are_compared_by_tokens(runs):
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace("global_batch_tokens: 256", "global_batch_tokens: 512"))
    page = Page(render_page(read_runs(runs), baselines={}))
    assert page.texts["text"].count("tokens") == 6


def test_a_run_without_attempts_and_ledger_has_a_page_too(runs):
    shutil.rmtree(runs[0] / "attempts")
    (runs[0] / "ledger.jsonl").unlink()
    page = Page(render_page(read_runs([runs[0]]), baselines={}))
    assert page.texts["h2"] == ["Summary", "Charts", "Configuration", "Data"]


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
    assert linear_ticks(2.31, 2.39) == pytest.approx([2.32, 2.34, 2.36, 2.38])
    assert log_ticks(0.03, 200.0) == pytest.approx([0.1, 1, 10, 100])
    assert log_ticks(0.4, 2.5) == pytest.approx([0.5, 1, 2])
    assert [short(value) for value in (0, 8e-4, 0.5, 1500, 2.5e7, -3e9)] == ["0", "8e-4", "0.5", "1.5k", "25M", "-3B"]


def test_a_step_on_the_axis_is_a_whole_number():
    page = draw(Chart("held out", [Series("256 tokens", [(60.0, 4.6)], 0)], "step", "nats"))
    assert ">60<" in page
    assert not re.search(r">(59|60)\.\d<", page)
