"""Separate validation data: all of it, by name, at the lengths of the held-out parts, and never what is trained on."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sambalm.data_pipeline.errors import DataError
from sambalm.data_pipeline.shards import ShardWriter
from sambalm.data_pipeline.sources import check_separate, open_sources
from sambalm.parallel.groups import ContextParallel, Pipeline
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.reporting.console import RunConsole
from sambalm.pretrain.reporting.data_index import index_data
from sambalm.pretrain.reporting.summary import write_report
from sambalm.pretrain.validation import Validator
from tests.support.whole_runs import changed, run_dir, train


def ids(seed: int, tokens: int = 600) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 384, size=tokens)


def write_source(prefix: Path, seed: int) -> str:
    """Ten documents of 60 random ids."""
    writer = ShardWriter(prefix, 384)
    for document in np.split(ids(seed), 10):
        writer.add(document)
    writer.finish()
    writer.commit()
    return str(prefix)


@pytest.fixture
def prefixes(tmp_path) -> dict[str, str]:
    return {name: write_source(tmp_path / name, seed) for seed, name in enumerate(("train", "web", "code"))}


@pytest.fixture
def values(run_values, prefixes) -> dict:
    data = {"train": prefixes["train"], "validation": [prefixes["web"], prefixes["code"]]}
    return changed(run_values, data=data, validation={"tokens": 10**6})


def validated(values: dict) -> dict[str, float]:
    """What a validation says where the loss of a token is its id."""
    config = parse_config(values, source="test")
    world = SimpleNamespace(
        device=torch.device("cpu"), context=ContextParallel(), pipeline=Pipeline(), data_rank=0, data_size=1
    )
    world.sum_over_replicas = lambda sums: sums
    separate = open_sources(config.data.separate_validation) if config.data.separate_validation else []
    validator = Validator(config, open_sources(config.data), world=world, separate=separate)
    executor = SimpleNamespace(losses=lambda batches: [batch.tokens.float() for batch in batches])
    return validator.losses(executor)


def test_runs_of_other_seeds_validate_on_the_same_samples(run_values, prefixes):
    data = {"train": prefixes["train"], "validation_fraction": 0.5}
    few = changed(run_values, data=data, validation={"tokens": 64})
    first, second = (validated(changed(few, run={"seed": seed})) for seed in (1, 2))
    assert first == second
    assert first != validated(changed(few, validation={"tokens": 32}))


def test_every_token_of_each_prefix_counts_by_its_name(values):
    """But for those at the end that make no whole sample, nothing is held back; the held-out part is as it was."""
    found = validated(values)
    for seed, name in ((1, "web"), (2, "code")):
        for length in (32, 64):
            whole = (600 - 1) // length * length
            assert found.pop(f"named_validation_loss_{length}/{name}") == pytest.approx(ids(seed)[:whole].mean())
    assert found == validated(changed(values, data={"validation": None}))
    assert found.keys() == {"validation_loss_32", "validation_loss_64"}


def test_nothing_need_be_held_out_beside_it(values, prefixes):
    alone = changed(values, data={"validation_fraction": 0, "validation": prefixes["web"]})
    assert validated(alone).keys() == {"named_validation_loss_32/web", "named_validation_loss_64/web"}
    with pytest.raises(ConfigError, match=r"data.validation_fraction is 0, which holds out nothing .* data.validation"):
        parse_config(changed(values, data={"validation_fraction": 0, "validation": None}), source="test")


def test_weights_share_the_tokens_of_a_validation(values, prefixes):
    """Of 8 samples of 32 tokens, one of them is for the prefix of a seventh of the weight."""
    sources = [{"prefix": prefixes["web"], "weight": 7}, {"prefix": prefixes["code"], "weight": 1}]
    one = {"tokens": 256, "length_multiples": [1]}
    found = validated(changed(values, data={"validation": sources}, validation=one))["named_validation_loss_32/code"]
    samples = [ids(2)[start : start + 32].mean() for start in range(0, 576, 32)]
    assert min(abs(found - sample) for sample in samples) < 1e-4


@pytest.mark.parametrize(("ranks", "parallel"), [(2, {"pipeline": 2})])
def test_a_run_tells_of_it_everywhere_and_alike_on_every_layout(ranks, parallel, values, tmp_path, capsys):
    short = changed(values, train={"steps": 1})
    (record,) = train(short)
    names = {f"named_validation_loss_{length}/{name}" for length in (32, 64) for name in ("web", "code")}
    assert names <= record.keys()
    capsys.readouterr()

    write_report([run_dir(short)], as_json=True)
    (report,) = json.loads(capsys.readouterr().out)
    assert {name: value for name, value in record.items() if name in names}.items() <= report["held_out"].items()
    page = Path(report["page"]).read_text()
    assert "Loss on validation data by name" in page
    assert "loss on web at 32 tokens" in page
    written = b"".join(path.read_bytes() for path in run_dir(short).glob("tensorboard/*"))
    assert b"named_validation_loss_64/code" in written

    again = changed(short, run={"dir": str(tmp_path / "again")}, parallel=parallel)
    assert train(again, ranks=ranks) == [pytest.approx(record, rel=1e-5)]


def test_the_console_has_a_line_for_each_name(tmp_path, capfd):
    console = RunConsole(tmp_path, steps=2, done_steps=0)
    step = {"step": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0}
    named = {f"named_validation_loss_{length}/web": length / 10 for length in (32, 64)}
    console.step(step | named)
    assert "step 1: loss on web 3.2000 at 32 tokens, 6.4000 at 64 tokens\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], r"data.validation is \[\]: give at least one prefix"),
        (["web", "web"], r"data.validation names .*web 2 times"),
        (["train"], r"data.validation names .*train, which data.train trains on"),
        ([{"prefix": "web", "weight": 1, "validation_fraction": 0.5}], "remove that key"),
        ([{"prefix": "web", "weight": 1}, "code"], "data.validation mixes entries with and without a weight"),
    ],
)
def test_what_cannot_be_is_refused(given, sentence, values, prefixes):
    given = [prefixes[one] if isinstance(one, str) else one | {"prefix": prefixes[one["prefix"]]} for one in given]
    with pytest.raises(ConfigError, match=sentence):
        parse_config(changed(values, data={"validation": given}), source="test")


def test_a_copy_of_the_training_data_is_refused(values, tmp_path):
    """`sambalm data index` and `train` both look."""
    copied = changed(values, data={"validation": write_source(tmp_path / "copy", 0)})
    config = parse_config(copied, source="test")
    with pytest.raises(DataError, match=r"data.validation .*copy holds the very tokens of .*train in data.train"):
        index_data(config, progress=lambda *_: None)
    sources = open_sources(config.data)
    check_separate(sources, open_sources(parse_config(values, source="test").data.separate_validation))


def test_masked_data_of_which_no_label_counts_are_refused_before_training(values, tmp_path):
    """They gave no loss, without a word; a source of which some labels count is validated on these."""
    prefixes = {}
    for name, counted in (("all", np.ones), ("none", np.zeros)):
        writer = ShardWriter(tmp_path / name, 384, masked=True)
        for document in np.split(ids(5), 10):
            writer.add(document, counted(len(document), bool))
        writer.finish()
        writer.commit()
        prefixes[name] = str(tmp_path / name)
    found = validated(changed(values, data={"validation": prefixes["all"]}))
    assert "named_validation_loss_32/all" in found
    with pytest.raises(DataError, match=rf"no label of data.validation's {prefixes['none']} counts in the loss"):
        validated(changed(values, data={"validation": [prefixes["all"], prefixes["none"]]}))
    with pytest.raises(DataError, match=rf"no label of the held-out part of {prefixes['none']} counts in the loss"):
        validated(changed(values, data={"train": prefixes["none"], "validation": None}))


def test_data_too_short_for_a_sample_are_named(values):
    with pytest.raises(DataError, match=r"data.validation \(.*\) has 600 tokens at most, and one .* needs 1025"):
        validated(changed(values, data={"validation_fraction": 0}, validation={"length_multiples": [32]}))


def test_the_index_refuses_what_holds_nothing_out(values, capsys):
    """As `train` would, after the table: its advice would lead nowhere for a text of one document."""
    config = parse_config(changed(values, validation={"length_multiples": [1, 32]}), source="test")
    with pytest.raises(DataError, match=r"the held-out parts of .*train have 120 tokens at most, .* needs 1025; raise"):
        index_data(config, progress=lambda *_: None)
    assert " 120 " in capsys.readouterr().out
