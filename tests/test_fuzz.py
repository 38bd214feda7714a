"""Configs, overrides and JSONL that nobody would think of: every command ends well or in one sentence."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sambalm.pretrain.cli.config import show
from sambalm.pretrain.cli.data import OnError, preprocess
from sambalm.pretrain.cli.plan import params
from sambalm.pretrain.cli.train import train
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import ending_in_a_sentence
from tests.conftest import small_run

# The same cases each time, so that CI does not fail by chance; `long` has those of a run of minutes.
QUICK = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(QUICK, max_examples=1000)

SECTIONS = {name: list(getattr(field.annotation, "model_fields", {})) for name, field in RunConfig.model_fields.items()}
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]
ODD = [0, -1, 1, 2, 7, 2**31, 2**62, 1e-320, 1e308, float("inf"), float("nan"), "", "auto", "1e3", "20B", "4K", [], {}]
SCALARS = st.one_of(
    st.sampled_from(ODD),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*(".".join(pair) for pair in KEYS), "data.train.prefix", "trein.steps"]) | st.text(max_size=12)
OVERRIDES = st.lists(
    st.builds("{}={}".format, NAMES, st.text(max_size=16) | VALUES.map(lambda value: json.dumps(value, default=str)))
    | st.text(max_size=20),
    max_size=2,
)
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3)
COMMANDS = st.sampled_from([(params, {}), (show, {}), (show, {"as_json": True}), (train, {"dry_run": True})])


PIECES = [
    *("run:", "\n", "  dir: x", "  - ", "&a ", "*a", "<<: ", "{", "}", "[", "]"),
    *("? ", "!!int ", "'", '"\\0"', "\t", "#", "%", "---"),
]
TEXTS = st.binary(max_size=60) | st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=20).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)


@pytest.fixture
def ends_well(capfd):
    """Runs what a command does, which must end in peace, or with exit code 2 and one sentence."""

    def run(command, *arguments, **options):
        capfd.readouterr()
        code = 0
        try:
            with ending_in_a_sentence():
                command(*arguments, **options)
        except SystemExit as end:
            code = end.code
        errors = capfd.readouterr().err
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) in ((0, 0), (2, 1)), errors
        assert len("".join(lines)) < 1500, errors

    return run


def _changed(values, changes):
    values = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    for (section, key), value in changes:
        values.setdefault(section, {})[key] = value
    return values


@pytest.fixture
def check_configs(ends_well, tmp_path):
    """Runs commands on configs that are changed here and there, and on files of anything."""
    path, values = tmp_path / "run.yaml", small_run(tmp_path / "tokens", tmp_path / "run")

    def check(command, changes, overrides):
        path.write_text(yaml.dump(_changed(values, changes)), encoding="utf-8", errors="surrogatepass")
        ends_well(command[0], path, overrides, **command[1])

    def check_text(command, content):
        path.write_bytes(content)
        ends_well(command[0], path, [], **command[1])

    def run(cases):
        cases(given(command=COMMANDS, changes=CHANGES, overrides=OVERRIDES)(check))()
        cases(given(command=COMMANDS, content=TEXTS)(check_text))()

    return run


def test_configs_end_in_a_sentence(check_configs):
    check_configs(QUICK)


@pytest.mark.long
def test_very_many_configs_end_in_a_sentence(check_configs):
    check_configs(MANY)


RECORDS = st.dictionaries(
    st.sampled_from(["text", "messages", ""]) | st.text(max_size=5), VALUES | st.text(), max_size=3
)
LINES = (
    st.binary(max_size=40)
    | RECORDS.map(lambda record: json.dumps(record, default=str).encode("utf-8", "surrogatepass"))
    | st.sampled_from([b"\xef\xbb\xbf", b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": "a"', b'{"text": 1e999}'])
)


@pytest.fixture
def check_lines(ends_well, tokens, tmp_path):
    """Tokenises files of odd lines."""
    path, tokenizer = tmp_path / "text.jsonl", tokens.with_name("tokenizer.model")

    def check(lines, on_error):
        path.write_bytes(b"\n".join(lines))
        ends_well(preprocess, [str(path)], tokenizer, tmp_path / "out", on_error=on_error, overwrite=True, workers=1)

    return lambda cases: cases(given(lines=st.lists(LINES, max_size=6), on_error=st.sampled_from(OnError))(check))()


def test_lines_of_json_end_in_a_sentence(check_lines):
    check_lines(settings(QUICK, max_examples=15))


@pytest.mark.long
def test_very_many_lines_of_json_end_in_a_sentence(check_lines):
    check_lines(MANY)
