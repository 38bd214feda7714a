"""Traces of some steps: what they hold, and that the run is as it would be without."""

import json

import pytest

from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from tests.support.whole_runs import changed, run_dir, train


@pytest.mark.slow
def test_some_steps_are_traced_and_the_run_is_the_same(run_values, tmp_path):
    plain = train(run_values)
    values = changed(run_values, run={"dir": str(tmp_path / "traced")}, train={"profile_steps": [4, 5]})
    assert train(values) == plain
    (path,) = (run_dir(values) / "profile").iterdir()
    assert path.name == "steps_4_5.json"
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    updates = [name for name in names if name and name.startswith("Optimizer.step#")]
    assert len(updates) == 2, updates


@pytest.mark.parametrize("steps", [[5, 4], [0, 1], [1], [1, 2, 3], [90, 92]])
def test_steps_that_cannot_be_traced_are_refused(steps, run_values):
    with pytest.raises(ConfigError, match=r"train\.profile_steps"):
        parse_config(changed(run_values, train={"profile_steps": steps}), source="test")
