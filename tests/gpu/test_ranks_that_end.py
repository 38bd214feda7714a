"""Runs on GPUs in which a rank is killed or hangs: the others end and say why, which NCCL does not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import read_attempts
from tests.conftest import VOCAB_SIZE, small_run
from tests.support.program import free_port, wait_until
from tests.support.whole_runs import changed, endless

PROGRAM = "from sambalm.pretrain.cli import main; main()"
HANGS = "from tests.support import hangs; hangs.in_the_loader()"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")


def write_random_tokens(prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in np.random.default_rng(0).integers(0, VOCAB_SIZE, (60, 1000)):
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@contextmanager
def started(values: dict, folder: Path, *, world: int = 2, before: str = "") -> Iterator[list[subprocess.Popen]]:
    """Ranks as processes of their own: a forked one may not use CUDA where this one has. Their log is in a file."""
    (folder / "run.yaml").write_text(json.dumps(values))
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    variables |= {"LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, "-c", f"{before}\n{PROGRAM}", "train", str(folder / "run.yaml")]
    with (folder / "log").open("w") as log:
        ranks = [
            subprocess.Popen(
                command, env=os.environ | variables | {"RANK": rank, "LOCAL_RANK": rank}, stdout=log, stderr=log
            )
            for rank in map(str, range(world))
        ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture
def values(tmp_path) -> dict:
    write_random_tokens(tmp_path / "tokens")
    return changed(endless(small_run(tmp_path / "tokens", tmp_path / "run")), train={"precision": "bf16"})


@needs_two
@pytest.mark.parametrize("layout", [{"zero_stage": 1}, {"tensor": 2, "sequence": True}], ids=str)
def test_the_survivor_names_the_rank_that_was_killed(layout, values, tmp_path):
    metrics, log = tmp_path / "run/metrics.jsonl", tmp_path / "log"
    with started(changed(values, parallel=layout), tmp_path) as ranks:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, 120, log.read_text)
        ranks[1].kill()
        assert ranks[1].wait() == -signal.SIGKILL
        assert ranks[0].wait(60) == ExitCode.RANK_LOST, log.read_text()
    (attempt,) = read_attempts(tmp_path / "run")
    assert attempt.exit_code == ExitCode.RANK_LOST
    assert attempt.reason.startswith(f"rank 1 is gone (process {ranks[1].pid} on ")
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=needs_two)])
def test_a_hang_leaves_stacks_and_what_nccl_was_doing(world, values, tmp_path):
    """Rank 0 hangs as it fetches step 6, and rank 1 waits for it in a message."""
    limits = {"fetch_s": 6, "step_s": 3}
    with started(changed(values, watchdog=limits), tmp_path, world=world, before=HANGS) as ranks:
        assert [rank.wait(180) for rank in ranks] == [ExitCode.HANGING] * world, (tmp_path / "log").read_text()
    (attempt,) = read_attempts(tmp_path / "run")
    assert attempt.reason.startswith("rank 0: hanging in phase fetch of step 6 since ")
    (folder,) = tmp_path.glob("run/attempts/*/hang")
    stacks, traces = sorted(folder.glob("rank_*.txt")), sorted(folder.glob("nccl_trace_rank_*"))
    assert (len(stacks), len(traces)) == (world, world)
    assert all("MainThread" in path.read_text() for path in stacks)
    assert all(path.stat().st_size > 0 for path in traces)
