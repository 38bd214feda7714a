"""Traces of some steps: what they hold, and that the run is as it would be without."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.lifecycle.hooks import FinishedStep
from sambalm.pretrain.lifecycle.profile import Profiler
from sambalm.pretrain.lifecycle.signals import Request
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


def after(step: int) -> FinishedStep:
    result: Any = None
    return FinishedStep(step, result, Request.NOTHING)


@pytest.mark.parametrize(("last", "traces"), [(4, ["steps_2_3.json"]), (2, ["steps_2_2.json"])])
def test_a_run_has_one_trace_on_its_main_rank_of_what_it_came_to(last, traces, tmp_path):
    """Also where it goes back to an earlier checkpoint."""
    for world, expected in ((SimpleNamespace(is_main=True), traces), (SimpleNamespace(is_main=False), [])):
        profiler = Profiler([2, 3], run_dir=tmp_path / str(world.is_main), world=cast(Any, world))
        assert [step for step in range(1, 6) if profiler.acts_on(step)] == [3]
        for step in range(1, last + 1):
            profiler.before_step(step)
            profiler.after_step(after(step))
        if last > 3:
            profiler.before_step(2)
            assert profiler._profile is None
        profiler.on_end(None)
        assert [path.name for path in profiler.folder.glob("*")] == expected


@pytest.mark.parametrize("steps", [[5, 4], [0, 1], [1], [1, 2, 3], [90, 92]])
def test_steps_that_cannot_be_traced_are_refused(steps, run_values):
    with pytest.raises(ConfigError, match=r"train\.profile_steps"):
        parse_config(changed(run_values, train={"profile_steps": steps}), source="test")
