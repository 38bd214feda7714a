"""Where values of a config come from: lines and overrides in errors, paths from its folder, and `config show`."""

import json
import os

import pytest
import yaml

from sambalm.pretrain.checkpointing.format import Checkpoint
from sambalm.pretrain.checkpointing.saved_config import saved_model, saved_run
from sambalm.pretrain.config_file import load_config, parse_config, resolve_config
from sambalm.pretrain.config_paths import started_in
from sambalm.pretrain.errors import ConfigError
from tests.conftest import small_run


@pytest.fixture
def values(tmp_path):
    return small_run(tmp_path / "tokens", tmp_path / "run")


@pytest.fixture
def config(values, tmp_path):
    """Path of a valid file; each section is a line and its keys follow."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return str(raised.value)


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_a_section_that_is_given_twice_is_refused_with_both_lines(config):
    config.write_text(f"{config.read_text()}train:\n  steps: 3\n")
    first, second = (number for number, line in enumerate(config.read_text().splitlines(), 1) if line == "train:")
    assert refusal(config) == f"{config}:{second}: train is given twice, first in line {first}: keep one of them"


def test_a_key_twice_in_a_section_or_an_override_is_refused(config):
    assert "a is given twice" in refusal(config, "data.train={a: 1, a: 2}")
    config.write_text(config.read_text().replace("  seed: 7\n", "  seed: 7\n  seed: 8\n"))
    line = line_of(config, "seed: 8")
    assert refusal(config) == f"{config}:{line}: seed is given twice, first in line {line - 1}: keep one of them"


def test_a_key_beside_a_merged_mapping_is_no_second_one(config):
    merged = "validation:\n  <<: {every_steps: 3}\n  every_steps: 4\n"
    config.write_text(config.read_text().replace("validation:\n  every_steps: 3\n", merged))
    assert load_config(config).validation.every_steps == 4


def test_errors_name_the_line_or_the_override(config):
    line = line_of(config, "window: 8")
    config.write_text(config.read_text().replace("window: 8", "window: 0"))
    assert refusal(config).startswith(f"{config}:{line}: model.window is 0: ")
    assert refusal(config, "model.window=-1").startswith("the override 'model.window=-1': model.window is -1: ")


@pytest.mark.parametrize(
    ("override", "question"),
    [
        ("train.step=3", "train.steps"),
        ("trein.steps=3", "train"),
        ("steps=3", "train.steps"),
        ("model.sequence_length=3", "data.sequence_length"),
        (
            "every_steps=3",
            "validation.every_steps or evaluation.every_steps or checkpoint.every_steps or stragglers.every_steps",
        ),
    ],
)
def test_an_unknown_key_is_asked_about(override, question, config):
    assert refusal(config, override).endswith(f"; did you mean {question}?")


def test_an_unknown_key_comes_before_what_is_missing_for_it(config):
    config.write_text(config.read_text().replace("\ntrain:\n", "\ntrein:\n"))
    assert f"{config}:{line_of(config, 'trein')}: unknown key trein" in refusal(config)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000), ("1_000", 1000), ("2B", 2 * 10**9), ("'1e3'", 1000), ("3.2T", 3_200_000_000_000), ("1.5e1", 15)],
)
def test_whole_numbers_as_people_write_them(text, number, config):
    assert load_config(config, [f"train.steps={text}"]).train.steps == number
    config.write_text(config.read_text().replace("steps: 6\n", f"steps: {text}\n", 1))
    assert load_config(config).train.steps == number


@pytest.mark.parametrize(
    "text", ["1.5", "1e-3", "4K", "2M", "1e30", "B", "1e400", ".inf", "true", "9223372036854775808"]
)
def test_what_is_no_whole_number_is_refused(text, config):
    assert "train.steps" in refusal(config, f"train.steps={text}")


def test_a_unit_that_means_two_things_is_refused_with_the_reason(config):
    assert "K is a power of 10 to some and of 2 to others" in refusal(config, "train.steps=4K")


def test_numbers_keep_their_type_and_texts_stay_texts(config):
    read = load_config(config, ["optimizer.peak_lr=1e-3", "parallel.timeout_s=1e3", "run.dir=20B"])
    assert (read.optimizer.peak_lr, read.parallel.timeout_s, read.run.dir) == (1e-3, 1000.0, "20B")
    assert "put it in quotes, as in '2024'" in refusal(config, "run.dir=2024")


@pytest.mark.parametrize(
    "content", [b"[" * 1200, b"a: \xff", b'run: {dir: "a\\0b"}', b'run: {dir: "\\ud800"}', b"run: &a [*a]"]
)
def test_files_that_are_none_end_in_a_sentence(content, config):
    config.write_bytes(content)
    assert "\n" not in refusal(config)


def test_a_mark_of_utf_8_is_no_part_of_a_file(config):
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert load_config(config).run.seed == 7


def test_paths_are_found_from_the_folder_of_the_config(values, tmp_path, monkeypatch, capsys):
    folder, here = tmp_path / "project", tmp_path / "elsewhere"
    (folder / "data").mkdir(parents=True)
    here.mkdir()
    (folder / "data" / "a.json").touch()
    (folder / "tokenizer.model").touch()
    values["data"] |= {"train": [{"prefix": "data/a", "weight": 1}], "tokenizer": "tokenizer.model"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(here)
    read = load_config(path)
    assert (read.data.prefixes, read.data.tokenizer) == ([str(folder / "data/a")], str(folder / "tokenizer.model"))
    assert read.run.dir == values["run"]["dir"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"data.train: data/a does not exist from here, and {folder / 'data/a'} is taken"
    assert len(told) == 2

    # A run is found there too, but for one that is here or that an override names; of a new one its place is told.
    values["run"]["dir"] = "runs/x"
    path.write_text(yaml.safe_dump(values))
    assert load_config(path).run.dir == "runs/x"
    assert capsys.readouterr().err.endswith(f"run.dir: runs/x is new, and made here as {here / 'runs/x'}\n")
    (folder / "runs" / "x").mkdir(parents=True)
    assert load_config(path).run.dir == str(folder / "runs" / "x")
    assert capsys.readouterr().err.endswith(f"runs/x does not exist from here, and {folder / 'runs/x'} is taken\n")
    assert load_config(path, ["run.dir=runs/x"]).run.dir == "runs/x"
    assert load_config(path, [f"data={{train: {folder / 'data/a'}, sequence_length: 8}}"]).run.dir == str(
        folder / "runs/x"
    )
    (here / "runs" / "x").mkdir(parents=True)
    assert load_config(path).run.dir == "runs/x"

    # What an override says is meant from here, and what exists from here comes first.
    assert load_config(path, ["data.train=data/a"]).data.train == "data/a"
    (here / "data").mkdir()
    (here / "data" / "a.json").touch()
    assert load_config(path).data.prefixes == ["data/a"]


def test_paths_of_a_saved_config_are_found_from_where_the_run_was_started(values, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").touch()
    values["data"]["train"], values["run"]["dir"] = "a", "runs/x"
    run_folder = tmp_path / "runs" / "x"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(os.path.sep)
    assert load_config(run_folder / "config.yaml").data.train == str(tmp_path / "a")
    assert parse_config(values, source="a checkpoint").data.train == "a"
    assert started_in(run_folder, "runs/x") == tmp_path
    assert started_in(run_folder, "runs/y") is None

    checkpoint = Checkpoint(run_folder / "checkpoints" / "step_00000003", {"config": values})
    capsys.readouterr()
    assert saved_model(checkpoint).hidden_size == values["model"]["hidden_size"]
    assert capsys.readouterr().err == ""  # where the data are found does not matter to the model
    assert saved_run(checkpoint).data.train == str(tmp_path / "a")
    assert capsys.readouterr().err.count("is taken") == 1
    assert started_in(run_folder, str(run_folder)) is None


def test_a_config_is_shown_with_where_its_values_came_from(config, sambalm, tmp_path):
    code, out, err = sambalm("config", "show", config, "train.steps=1e3", "parallel={zero_stage: 3}")
    assert (code, err) == (0, "")
    assert f"  window: 8  # {config}:{line_of(config, 'window: 8')}\n" in out
    assert "  steps: 1000  # the override 'train.steps=1e3'\n" in out
    assert "  zero_stage: 3  # the override 'parallel={zero_stage: 3}'\n" in out
    assert "  max_rollbacks: 2  # default\n" in out
    shown = tmp_path / "shown.yaml"
    shown.write_text(out)
    assert load_config(shown) == load_config(config, ["train.steps=1000", "parallel.zero_stage=3"])

    as_json = json.loads(sambalm("config", "show", config, "--json")[1])
    assert as_json["model.window"] == {"value": 8, "from": f"{config}:{line_of(config, 'window: 8')}"}
    assert as_json.keys() == resolve_config(config).values().keys()
