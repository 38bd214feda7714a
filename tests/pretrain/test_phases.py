"""A run in phases: the samples, batches and learning rates of every step, and where it goes on."""

import copy
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import build_train_dataset
from sambalm.data_pipeline.shards import ShardWriter
from sambalm.data_pipeline.sources import open_sources
from sambalm.pretrain.checkpointing.data_record import data_change
from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.load import check_data
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support import whole_runs
from tests.support.marks import slow_except
from tests.support.read_samples import samples_by_step
from tests.support.whole_runs import changed, stopped_after, train
from tests.support.worlds import run_world

TOKENS = [256, 256, 256, 128, 128, 128, 192, 192]  # of each step


@pytest.fixture
def phased_values(run_values, tmp_path) -> dict:
    """Three steps of 8 samples of 32 tokens, three of 2 of 64 from two sources, two of 6 of 32 from one."""
    writer = ShardWriter(tmp_path / "other", 384)
    for document in np.split(np.random.RandomState(0).randint(0, 384, size=2400), 40):
        writer.add(document)
    writer.finish()
    writer.commit()
    mix = [{"prefix": str(tmp_path / "other"), "weight": 1}, {"prefix": run_values["data"]["train"], "weight": 1}]
    phases = [
        {"tokens": 768},
        {
            "tokens": 384,
            "train": mix,
            "sequence_length": 64,
            "global_batch_tokens": 128,
            "micro_batch_size": 1,
            "learning_rate": {"peak_lr": 1e-3, "warmup_fraction": 0.0, "final_lr_ratio": 0.5},
        },
        {"tokens": 384, "global_batch_tokens": 192, "micro_batch_size": 3},
    ]
    values = changed(
        run_values,
        data={"phases": phases},
        validation={"every_steps": 8},
        checkpoint={"every_steps": 1, "keep": 20},
    )
    del values["train"]["steps"]
    return values


def phased(values: dict, number: int, **keys) -> dict:
    """A copy of a run with keys of a phase replaced."""
    values = copy.deepcopy(values)
    values["data"]["phases"][number].update(keys)
    return values


def config_of(values: dict):
    return parse_config(values, source="test")


def expected_samples(values: dict) -> list[torch.Tensor]:
    """Tokens and labels of each step's samples, [2, samples, length], without a word of phases.

    The first and the last phase are one run on the first source. The second phase takes turns between the two sources,
    of equal weight (the second one that it lists begins), each in its order in a run on the two.
    """
    first = values["data"]["train"]
    alone = build_train_dataset(*_opened(first, 32), seed=7)
    other = values["data"]["phases"][1]["train"][0]["prefix"]
    both = build_train_dataset(*_opened([first, other], 64), seed=7)
    of_both = {source: [n for n in range(400) if both.source_number(n) == source] for source in (0, 1)}
    mixed = [both[of_both[source][place]] for place in range(3) for source in (0, 1)]
    ordinary = [alone[number] for number in range(36)]
    steps = [*(ordinary[start : start + 8] for start in (0, 8, 16))]
    steps += [mixed[start : start + 2] for start in (0, 2, 4)]
    steps += [ordinary[24:30], ordinary[30:36]]
    return [torch.stack([torch.stack([sample[part] for sample in step]) for part in (0, 1)]) for step in steps]


def _opened(train, length: int):
    config = DataConfig(train=train, sequence_length=length, validation_fraction=0.2)
    return config, open_sources(config)


LAYOUTS = [(1, {}), (2, {}), (2, {"context": 2}), (2, {"pipeline": 2}), (2, {"tensor": 2}), (2, {"zero_stage": 3})]


@pytest.mark.parametrize(("ranks", "parallel"), slow_except([(2, {})], LAYOUTS, long=[LAYOUTS[0], *LAYOUTS[4:]]))
def test_every_step_reads_the_samples_of_its_phase_on_every_layout(ranks, parallel, phased_values):
    expected = expected_samples(phased_values)
    found = samples_by_step(changed(phased_values, parallel=parallel), ranks)
    assert [samples.shape for samples in found] == [samples.shape for samples in expected]
    for step, (samples, wanted) in enumerate(zip(found, expected, strict=True), start=1):
        assert torch.equal(samples, wanted), step


def learning_rates() -> list[float]:
    """By hand: a cosine over the 1,152 tokens of the outer phases, of which a fifth warm up, and one of its own."""

    def cosine(done: int, tokens: int, warmup: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (tokens - warmup)))

    shared = [3e-3 * (0.1 + 0.9 * cosine(done, 1152, 231)) for done in (256, 512, 768, 960, 1152)]
    own = [1e-3 * (0.5 + 0.5 * cosine(done, 384, 0)) for done in (128, 256, 384)]
    return [*shared[:3], *own, *shared[3:]]


@pytest.mark.parametrize(
    ("ranks", "parallel", "steps"),
    slow_except(
        [],
        [(1, {}, [3, 5]), (1, {}, [1, 2, 4, 6, 7]), (2, {"context": 2}, [3, 4, 6, 7]), (2, {"zero_stage": 2}, [3, 5])],
        long=[(1, {}, [1, 2, 4, 6, 7]), (2, {"zero_stage": 2}, [3, 5])],
    ),
)
def test_a_run_stopped_at_any_step_goes_on_with_the_same_bits(ranks, parallel, steps, phased_values, tmp_path):
    values = changed(phased_values, parallel=parallel)
    whole = train(values, ranks=ranks)
    assert [record["batch_tokens"] for record in whole] == TOKENS
    assert [record["tokens"] for record in whole] == np.cumsum(TOKENS).tolist()
    assert [record["phase"] for record in whole] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [record["lr"] for record in whole] == pytest.approx(learning_rates(), rel=1e-9)
    for step in steps:
        assert train(stopped_after(values, step, tmp_path / f"resumed{step}"), ranks=ranks) == whole, step


@pytest.mark.slow
def test_layouts_may_change_where_a_phase_begins(phased_values, tmp_path):
    """One process, then context parallelism for the long phase, then data parallelism; each start stops by itself."""
    alone, expected = train(phased_values), expected_samples(phased_values)
    values = phased(phased(phased_values, 0, stop_at_end=True), 1, stop_at_end=True)
    values = changed(values, run={"dir": str(tmp_path / "changing")})
    assert train(values) == alone[:3]
    long = train(changed(values, parallel={"context": 2}), ranks=2)
    assert len(long) == 6
    found = samples_by_step(values, 2)
    assert all(torch.equal(samples, wanted) for samples, wanted in zip(found, expected[6:], strict=True))
    for record, wanted in zip([*long, *read_metrics(tmp_path / "changing")[6:]], alone, strict=True):
        assert {key: record[key] for key in ("loss", "grad_norm", "lr", "tokens", "phase")} == pytest.approx(
            {key: wanted[key] for key in ("loss", "grad_norm", "lr", "tokens", "phase")}, rel=1e-4
        )
    (attempt, *_) = sorted((tmp_path / "changing" / "attempts").iterdir())
    assert "asked to stop: saved" in "".join(path.read_text() for path in attempt.glob("*.json"))


def executors_that_began_anew(values: dict) -> list[int]:
    """The steps taken when an executor was told of micro-batches of another size."""
    from sambalm.parallel.execution import AccumulatingExecutor
    from sambalm.pretrain.trainer import Trainer

    trainers, steps, begin = [], [], Trainer._begin

    def begin_known(trainer, phase):
        trainers.append(trainer)
        begin(trainer, phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_begin", begin_known)
        patch.setattr(AccumulatingExecutor, "begin_anew", lambda _: steps.append(trainers[-1].step))
        whole_runs.train_on_rank(values)
    return steps


@pytest.mark.long
def test_each_phase_begins_with_graphs_of_its_own(phased_values):
    assert run_world(executors_that_began_anew, phased_values, ranks=1) == [[3, 6]]


@pytest.mark.slow
def test_a_run_without_phases_goes_on_in_phases(phased_values, run_values, tmp_path):
    """What it has done is the first phase, whose samples are the same."""
    begun = changed(run_values, train={"steps": 3}, validation={"every_steps": 3}, run={"dir": str(tmp_path / "begun")})
    train(begun)
    values = stopped_after(begun, 3, tmp_path / "phased")
    found = samples_by_step(changed(phased_values, run=values["run"]), 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_samples(phased_values)[3:], strict=True))


def test_each_phase_is_a_run_of_its_own(phased_values):
    schedule = config_of(phased_values).schedule
    assert schedule.config.train.steps == 8
    assert schedule.config.run_tokens == 1536
    samples = [0, 8, 16, 24, 26, 28, 30, 36, 42]
    assert [schedule.consumed_samples(step) for step in range(9)] == samples
    assert [schedule.tokens(one) for one in samples] == [0, *np.cumsum(TOKENS).tolist()]
    assert [schedule.samples(schedule.tokens(one)) for one in range(43)] == list(range(43))
    assert [schedule.at(one).number for one in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [phase.config.train.steps for phase in schedule.phases] == [3, 3, 2]
    # A run that leaves samples out goes on in its last phase, at its last learning rate.
    assert schedule.step_samples(48) == 6
    assert schedule.learning_rate(9, samples=48) == pytest.approx(3e-4)
    again = config_of(schedule.config.model_dump())  # as a checkpoint holds it, with the steps that phases make
    assert again == schedule.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: phased(v, 0, tokens=800), r"data\.phases\.0\.tokens is 800, .* of 256 tokens: make it 768 or 1024"),
        (lambda v: phased(v, 0, tokens="20M"), r"data\.phases\.0\.tokens is '20M': .* and M is a power of 10 to some"),
        (
            lambda v: phased(v, 1, sequence_length=48),
            r"in data\.phases\.1, train\.global_batch_tokens is 128, which is",
        ),
        (
            lambda v: changed(v, parallel={"context": 3}),
            r"data\.sequence_length is 32, which cannot be cut into 3 parts",
        ),
        (
            lambda v: changed(phased(v, 1, sequence_length=2, tokens=128), parallel={"context": 4}),
            r"in data\.phases\.1, data\.sequence_length is 2, which cannot be cut into 4 parts",
        ),
        (
            lambda v: changed(v, train={"steps": 9}),
            r"train\.steps is 9, and .* data\.phases make 8 steps: remove train",
        ),
        (
            lambda v: changed(v, train={"batch_ramp": {"start_tokens": 64, "increment_tokens": 64, "ramp_tokens": 64}}),
            r"train\.batch_ramp is set with data\.phases: give the growing batches as phases",
        ),
        (lambda v: changed(v, data={"phases": None}), r"train\.steps is missing; docs/config\.md says what it holds"),
        (lambda v: changed(v, data={"phases": []}), r"data\.phases is \[\]: "),
        (lambda v: phased(v, 0, train=[]), r"data\.phases\.0\.train is \[\]: give at least one prefix"),
        (lambda v: phased(v, 0, steps=3), r"unknown key data\.phases\.0\.steps \(value 3\)"),
        (
            lambda v: changed(v, data={"validation": v["data"]["phases"][1]["train"][0]["prefix"]}),
            r"data\.validation names .*other, which data\.phases\.1\.train trains on: give other data",
        ),
        (
            lambda v: phased(v, 0, train=[{"prefix": v["data"]["train"], "weight": 1, "validation_fraction": 0.1}]),
            r"data\.phases\.0\.train holds out 0\.1 of .*tokens, and the run elsewhere 0\.2, so that it would train on",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(change, message, phased_values):
    with pytest.raises(ConfigError, match=message) as error:
        config_of(change(phased_values))
    assert "\n" not in str(error.value)


def test_a_phase_that_ranks_do_not_divide_is_refused(phased_values):
    config = config_of(phased_values)
    config.check_world(2)
    with pytest.raises(
        ConfigError, match=r"^in data\.phases\.1, train\.global_batch_tokens is 128, which is not a mult"
    ):
        config.check_world(4)
    stopping = config_of(phased(phased_values, 0, stop_at_end=True))
    stopping.check_world(4)  # for the first phase, and no further
    assert [phase.number for phase in stopping.schedule.fitting(4)] == [0]
    assert [phase.number for phase in stopping.schedule.fitting(2)] == [0, 1, 2]
    assert [phase.number for phase in stopping.schedule.stretch(28)] == [1, 2]
    with pytest.raises(ConfigError, match=r"^in data\.phases\.1, "):
        stopping.schedule.check_stretch(24, world_size=4)


def record(*phases: tuple[int, int, str], **keys) -> dict:
    """A record of phases by samples, length and content."""
    found = [
        {
            "samples": samples,
            "sequence_length": length,
            "sources": [{"prefix": "p", "weight": 1, "validation_fraction": 0.1, "content": content}],
        }
        for samples, length, content in phases
    ]
    return (
        {"seed": 7, "packing": "stream", "sequence_length": 32, "sources": found[0]["sources"]}
        | keys
        | {"phases": found}
    )


SAVED = record((24, 32, "a"), (6, 64, "b"), (12, 32, "a"))


@pytest.mark.parametrize(
    ("now", "samples", "change"),
    [
        (SAVED, 28, None),
        # What has not begun may change, up to its very first sample.
        (record((24, 32, "a"), (9, 128, "c")), 24, None),
        (record((24, 32, "a"), (9, 64, "b")), 28, None),
        (record((24, 32, "a"), (4, 64, "b"), (3, 64, "c")), 28, None),
        (record((99, 32, "a")), 24, None),
        (record((24, 32, "a"), (9, 128, "b")), 26, "data.phases.1.sequence_length has changed from 64 to 128"),
        (record((24, 32, "a"), (9, 64, "c")), 26, "the data under p has changed"),
        (record((24, 32, "c"), (6, 64, "b")), 26, "the data under p has changed"),
        (
            record((32, 32, "a"), (6, 64, "b")),
            26,
            "data.phases.0.tokens has changed from 768 to 1024, which the run is beyond",
        ),
        (
            record((24, 32, "a"), (3, 64, "b")),
            28,
            "data.phases.1.tokens has changed from 384 to 192, which the run is beyond",
        ),
        (record((24, 32, "a")), 26, "data.phases has changed from 3 phases to 1"),
        (
            {key: value for key, value in SAVED.items() if key != "phases"},
            26,
            "data.phases, of which one has ended, has been removed",
        ),
        ({key: value for key, value in SAVED.items() if key != "phases"}, 24, None),
        (record((24, 32, "a"), seed=8), 3, "run.seed has changed from 7 to 8"),
    ],
)
def test_only_phases_that_have_not_begun_may_change(now, samples, change):
    assert data_change(SAVED, now, samples=samples) == change


@pytest.mark.parametrize(("samples", "is_refused"), [(24, False), (25, True)])
def test_a_run_is_held_to_the_phases_that_it_has_begun(samples, is_refused, phased_values):
    saved = Checkpoint(Path("step_3"), {"data": SAVED, "samples": samples})
    message = r"^data\.phases\.1\.sequence_length has changed from 64 to 128 since step_3 was saved: "
    with pytest.raises(ConfigError, match=message) if is_refused else nullcontext():
        check_data(saved, record((24, 32, "a"), (9, 128, "b")), config=config_of(phased_values))


def test_a_run_whose_batch_was_another_is_refused(phased_values):
    schedule = config_of(phased_values).schedule
    schedule.check_position(26, step=4)
    with pytest.raises(ConfigError, match=r"the run has consumed 26 samples in 3 steps, and data\.phases make 24"):
        schedule.check_position(26, step=3)


def test_the_commands_show_the_phases(phased_values, sambalm, tmp_path):
    first = phased_values["data"]["train"]
    bare = phased(phased_values, 1, train=first)  # since the other one has no manifest, which a blend is reckoned from
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(bare))
    code, out, _ = sambalm("data", "blend", "--config", path)
    assert code == 0
    assert "phase 2 of 3: 384 tokens in 3 steps of 128, sequences of 64\n" in out
    drawn = [line.split()[-2] for line in out.splitlines() if line.startswith(first)]
    assert drawn == ["768", "384", "384", "1,536"]
    assert sambalm("data", "blend", first, "--config", path)[0] == 2
    assert sambalm("data", "blend", first)[0] == 2

    path.write_text(yaml.safe_dump(phased_values))
    code, out, _ = sambalm("data", "index", path)
    assert code == 0
    assert out.count("Training data of") == 3
    assert out.count("50.00%") == 2
    sample = sambalm("data", "inspect", "--config", path, "--sample", 24)[1]
    assert re.search(r"tokens \d+ to 63\b", sample), sample

    options = ("--gpus", 2, "--gpu-memory-gib", 80, "--top", 1, "train.precision=bf16")
    code, out, _ = sambalm("plan", path, *options, "--json")
    plans = json.loads(out)
    assert [plan["phase"] for plan in plans] == [1, 2, 3]
    assert [plan["run_tokens"] for plan in plans] == [768, 384, 384]
    shown = sambalm("plan", path, *options)[1]
    assert "phase 3 of 3: 384 tokens in 2 steps of 192, sequences of 32" in shown
    assert "all phases, each on its fastest layout: " in shown
    said = sambalm("train", path, "--dry-run", "--world-size", 2)[1]
    assert "2 micro-batches of 2 a step, then 1 micro-batches of 1 a step, then 1 micro-batches of 3 a step" in said


@pytest.mark.long
def test_a_report_lists_the_phases(phased_values, sambalm):
    train(phased_values)
    run = phased_values["run"]["dir"]
    code, out, _ = sambalm("report", run)
    assert code == 0
    assert "Phases" in out
    page = (Path(run) / "report.html").read_text()
    assert "<th>1</th><td>1 to 3</td><td>768</td><td>32</td><td>256</td><td>0.003</td>" in page
    assert "<th>2</th><td>4 to 6</td><td>384</td><td>64</td><td>128</td><td>0.001</td>" in page
    assert "(50%)" in page
    assert "<td>3 of 3</td>" in page
