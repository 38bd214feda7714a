"""`sambalm check-layout`: right layouts pass; wrong gradients and failing ranks are found; no process is left."""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from sambalm.model.build import chunk_layers
from sambalm.parallel.groups import ContextParallel
from sambalm.parallel.shard import Shard
from sambalm.parallel.sharding import sharded_parameter
from sambalm.parallel.zero import engine
from sambalm.pretrain import check_layout as check_layout_module
from sambalm.pretrain import cli
from sambalm.pretrain.check_layout import (
    LayoutCheck,
    TensorDifference,
    _farthest,
    _first_gradients,
    check_layout,
    checked_config,
    compare_slices,
    document_starts,
    random_batches,
    whole,
)
from sambalm.pretrain.config_file import load_config, parse_config
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.local_ranks import Failure, RanksFailedError, _results, run_ranks
from tests.parallel.test_layouts import copied_twice, copies_of_a_tied_embedding_are_not_summed
from tests.support.layout_runs import one_process, run_values, steps_on_rank
from tests.support.signals import restored_signals
from tests.support.worlds import run_world

TOLERANCE = 1e-5  # of a model of five sublayers
CONFIGS = Path(__file__).parents[2] / "configs"


def test_documents_begin_at_the_borders_of_the_layouts_parts(monkeypatch):
    config = parse_config(run_values(parallel={"context": 2}, documents=True), source="test")
    told = []

    def stop(steps_on_rank, checked, steps, tokens, **_):
        told.append((checked.data.sequence_length, tokens["part_tokens"]))
        raise RanksFailedError("enough")

    monkeypatch.setattr(check_layout_module, "run_ranks", stop)
    with pytest.raises(RanksFailedError):
        check_layout(config, world_size=2, tolerance=TOLERANCE)
    ((length, part),) = told
    assert part == length // 2


@pytest.mark.parametrize(
    ("ranks", "parallel", "documents"),
    [
        (2, {"tensor": 2, "sequence": True}, False),
        (2, {"context": 2}, True),
        (2, {"pipeline": 2}, False),
        pytest.param(2, {"zero_stage": 3, "recompute": "full"}, False, marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}, True, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_right_layouts_pass(ranks, parallel, documents):
    config = parse_config(run_values(parallel=parallel, documents=documents), source="test")
    found = check_layout(config, world_size=ranks, steps=2, tolerance=TOLERANCE, timeout_s=240)
    assert found.passed
    assert 0 < found.worst < TOLERANCE
    assert found.losses == pytest.approx(found.expected_losses, rel=TOLERANCE)
    assert abs(found.losses[0] - math.log(96)) < 0.5
    assert len(found.tensors) == 37


@pytest.fixture
def sambalm(monkeypatch, capfd, tmp_path):
    """Runs the command on a config in this process: exit code, stdout and stderr."""

    def run(*arguments, **sections):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_values(**sections)))
        monkeypatch.setattr(sys, "argv", ["sambalm", "check-layout", str(tmp_path / "config.yaml"), *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return exit_info.value.code or 0, *capfd.readouterr()

    with restored_signals():
        yield run


def test_the_command_says_what_it_found(sambalm):
    options = ("--world-size", "2", "--tolerance")
    code, out, _ = sambalm(*options, "1e-5", "parallel.tensor=2")
    assert code == 0
    assert out.splitlines()[0].startswith("DP1 TP2 no ZeRO, recompute none, on 2 x")
    assert "and 27 more tensors, at most" in out
    assert out.rstrip().endswith("the layout gives the gradients of one process")
    code, out, _ = sambalm(*options, "0", "--json", "parallel.tensor=2")
    found = json.loads(out)
    assert code == 1  # no two orders of a sum are the same
    assert (found["passed"], len(found["tensors"])) == (False, 37)
    differences = [tensor["difference"] for tensor in found["tensors"]]
    assert differences == sorted(differences, reverse=True)


@pytest.mark.parametrize(
    ("world_size", "override", "sentence"),
    [
        (3, "parallel.tensor=2", "3 processes cannot hold whole copies"),
        (5, "parallel.tensor=5", "parallel.tensor is 5: 12 query heads"),
        (3, "parallel.zero_stage=2", "x 3 data-parallel ranks"),
        (2, "parallel.pipeline=7", "more than the 5 sublayers"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_in_a_sentence(sambalm, world_size, override, sentence):
    code, out, err = sambalm("--world-size", str(world_size), override)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("mistake", "parallel", "tensor"),
    [
        (copied_twice, {"tensor": 2}, "mixer.x_proj.weight"),
        (copies_of_a_tied_embedding_are_not_summed, {"pipeline": 2}, "embedding.weight"),
    ],
)
def test_a_mistake_is_found_and_named(mistake, parallel, tensor):
    expected = one_process()
    ranks = run_world(steps_on_rank, run_values(parallel=parallel), 1, mistake, ranks=2)
    tensors = compare_slices([rank.gradients for rank in ranks], whole(expected.gradients))
    assert tensors[0].name.endswith(tensor)
    found = LayoutCheck(
        layout="",
        device="",
        model={},
        losses=ranks[0].losses,
        norms=expected.norms[:1],
        expected_losses=expected.losses[:1],
        expected_norms=expected.norms[:1],
        tensors=tensors,
        tolerance=TOLERANCE,
    )
    assert not found.passed
    assert "DOES NOT GIVE" in found.describe(top=3)


def test_each_copy_and_each_element_counts():
    expected = {"a": np.ones((4, 2), np.float32), "b": np.zeros(3, np.float32)}
    right = [("a", (0, 0), np.ones((4, 2), np.float32)), ("b", (0,), np.zeros(3, np.float32))]
    assert [tensor.difference for tensor in compare_slices([right, right], expected)] == [0, 0]

    wrong = [("a", (2, 0), np.full((2, 2), 1.5, np.float32)), right[1]]
    worst, _ = compare_slices([right, wrong], expected)
    assert (worst.name, worst.difference, worst.place) == ("a", 0.5, "rank 1, [2:4, 0:2]")

    worst, _ = compare_slices([[("a", (0, 0), np.ones((3, 2), np.float32)), right[1]]], expected)
    assert (worst.difference, worst.rank) == (math.inf, None)
    worst, _ = compare_slices([[right[0], ("b", (0,), np.array([0, np.nan, 0], np.float32))]], expected)
    assert (worst.name, worst.difference) == ("b", math.inf)


def test_the_rank_that_is_farthest_from_one_process_is_told():
    expected = [4.0, 2.0]
    assert _farthest([[4.0, 2.0], [4.0, 2.5], [3.9, 2.1]], expected) == [4.0, 2.5]
    assert _farthest([[4.0, 2.0], [math.nan, 2.0]], [4.0, 2.0])[0] is math.nan


@pytest.mark.parametrize(
    ("losses", "norms", "difference", "worst"),
    [
        ([4.0, 2.0], [1.0, 8.0], 0.125, 0.125),
        ([4.0, 1.5], [1.0, 8.0], 0.125, 0.25),
        ([4.0, 2.0], [1.5, 8.0], 0.125, 0.5),
        ([4.0, 2.0], [1.0, math.nan], 0.125, math.inf),
        ([4.0, 2.0], [1.0, 8.0], math.inf, math.inf),
    ],
)
def test_the_largest_difference_decides_whichever_number_it_is_of(losses, norms, difference, worst):
    tensors = [TensorDifference("a", difference, 1, (2,), (3,)), TensorDifference("b", 0.0, 0, (0,), (5,))]
    numbers = {"losses": losses, "norms": norms, "expected_losses": [4.0, 2.0], "expected_norms": [1.0, 8.0]}
    for tolerance in (0.125, 0.25, 0.5):
        found = LayoutCheck("DP2", "cpu", {}, tensors=tensors, tolerance=tolerance, **numbers)
        assert found.worst == worst
        assert found.passed is (worst <= tolerance)
        told = found.as_json()
        assert (told["worst"], told["passed"]) == (worst if math.isfinite(worst) else None, found.passed)
        assert [one["difference"] for one in told["tensors"]] == [difference if math.isfinite(difference) else None, 0]
        json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("size", ["421m", "1.3b", "1.7b", "3.8b"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "sequence": True, "context": 2},
        {"pipeline": 4, "virtual_pipeline": 2},
        {"context": 8},
    ],
    ids=str,
)
def test_a_shrunk_model_has_the_same_stages_and_divisors(size, parallel):
    overrides = [f"parallel.{key}={str(value).lower()}" for key, value in parallel.items()]
    config = load_config(CONFIGS / f"samba_{size}.yaml", overrides)
    ranks = config.parallel.model_ranks
    small = checked_config(config, world_size=ranks, shrink=True, timeout_s=60)
    small.check_world(ranks)
    for key in ("pattern", "num_query_heads", "num_kv_heads", "d_state", "d_conv", "expand", "tie_embeddings"):
        assert getattr(small.model, key) == getattr(config.model, key)
    assert small.model.hidden_size <= 128
    assert small.model.window / small.data.sequence_length == config.model.window / config.data.sequence_length
    for key in ("mlp_size", "inner_size"):
        ours, theirs = (getattr(model, key) % config.parallel.tensor for model in (small.model, config.model))
        assert (ours == 0) == (theirs == 0)
    if config.parallel.pipeline > 1:
        layers = [chunk_layers(c.model, c.parallel, sequence_length=c.data.sequence_length) for c in (small, config)]
        assert layers[0] == layers[1]
    full = checked_config(config, world_size=ranks, shrink=False, timeout_s=60)
    assert full.model == config.model


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("paper/*.yaml"), *CONFIGS.glob("successors/*.yaml")]), ids=lambda p: p.stem
)
def test_each_other_config_has_a_shrunk_model(path):
    """Whose mixers have sizes of their own, which fit its width."""
    config = load_config(path, ["parallel.context=2"])
    small = checked_config(config, world_size=2, shrink=True, timeout_s=60).model
    assert 16 <= small.hidden_size <= 128
    assert small.pattern == config.model.pattern
    if "mega" in small.mixers:
        assert small.mixers["mega"] == {"key_dim": 4, "chunk_tokens": 32}  # half of a sequence, as in the config
    if "mamba2" in small.mixers:
        assert small.mixers["mamba2"]["head_dim"] == 24  # two heads a group


def test_documents_begin_where_they_are_said_to():
    assert document_starts([3, 4], length=6) == [0, 0, 0, 3, 4, 4]


def test_samples_of_a_step_have_documents_of_their_own():
    config = parse_config(run_values(documents=True), source="test")
    world = SimpleNamespace(data_rank=0, data_size=1, context=ContextParallel(), device=torch.device("cpu"))
    found = random_batches(0, config=config, world=world, seed=3, part_tokens=8)
    starts = [set(batch.document_starts[0].tolist()) for batch in found]
    assert starts[0] == {0}
    assert len({frozenset(each) for each in starts}) == len(starts) == 4
    assert {8, 16, 24} <= starts[2]
    assert {7, 15, 23} <= starts[3]


def pid_of(folder: str) -> None:
    rank = os.environ["RANK"]
    Path(folder, rank).write_text(str(os.getpid()))


def dies(folder: str) -> None:
    pid_of(folder)
    if os.environ["RANK"] == "1":
        print("out of memory", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def hangs(folder: str) -> None:
    pid_of(folder)
    if os.environ["RANK"] == "1":
        time.sleep(600)


def raises(folder: str) -> None:
    pid_of(folder)
    if os.environ["RANK"] == "1":
        raise ValueError("a number\nand more")
    time.sleep(600)


def refuses(folder: str) -> None:
    pid_of(folder)
    raise ConfigError("change this")


@pytest.mark.parametrize(
    ("function", "timeout_s", "sentence"),
    [
        (dies, 60, r"^rank 1 of 2 was killed by signal 9: out of memory$"),
        # Rank 0 may be slow on a busy machine.
        pytest.param(hangs, 15, r"^ranks? (0, )?1 of 2 did not finish within 15 s: ", marks=pytest.mark.slow),
        (raises, 60, r"^rank 1 of 2 failed: ValueError: a number \(test_check_layout.py:\d+\)$"),
        (refuses, 60, "^change this$"),
    ],
)
def test_ranks_that_fail_are_a_sentence_and_are_ended(function, timeout_s, sentence, tmp_path):
    start_s = time.monotonic()
    with pytest.raises(RanksFailedError, match=sentence) as error:
        run_ranks(function, str(tmp_path), ranks=2, timeout_s=timeout_s, output=tmp_path)
    assert error.value.exit_code == 2
    assert time.monotonic() - start_s < 60
    processes = [int(file.read_text()) for file in tmp_path.glob("[01]")]
    assert processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize("norm", [0.25, 2.0])  # shorter and longer than clip_norm
def test_a_gradient_is_what_it_was_before_clipping(norm, monkeypatch):
    config, gradient = parse_config(run_values(), source="test"), torch.tensor([0.5, -1.5])
    model = nn.Module()
    model.weight = sharded_parameter((0,), {"w": Shard(2, 0, 2)}, init=nn.init.zeros_)
    factor = min(1.0, config.optimizer.clip_norm / norm)
    moment = (1 - config.optimizer.beta1) * factor * gradient
    monkeypatch.setattr(engine, "whole_moment", lambda parameter, key: moment)
    ((_, _, found),) = _first_gradients([model], norm=norm, config=config)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-6)


def test_a_mistake_of_the_user_is_told_before_what_followed_from_it_or_came_first():
    workers = []
    for rank, is_users in enumerate((False, True)):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        theirs.send(Failure(rank, time_s=float(rank), message=f"of rank {rank}", details="", is_users=is_users))
        workers.append((None, ours))
    with pytest.raises(RanksFailedError, match=r"^of rank 1$"):
        _results(workers, timeout_s=10, output=None)
