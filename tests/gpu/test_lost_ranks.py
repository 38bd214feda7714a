"""Ranks under NCCL end by themselves and name the one that was killed, which NCCL does not tell them."""

import json
import os
import signal
import subprocess
import sys
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

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")


def write_random_tokens(prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in np.random.default_rng(0).integers(0, VOCAB_SIZE, (60, 1000)):
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def start_rank(rank: int, config: Path, *, port: str, log: Path) -> subprocess.Popen:
    """Starts a process of its own: a forked one may not use CUDA where this one has."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-m", "sambalm.pretrain.cli", "train", str(config)]
    with log.open("a") as stream:
        return subprocess.Popen(command, env=os.environ | variables, stdout=stream, stderr=stream)


@pytest.mark.parametrize("layout", [{"zero_stage": 1}, {"tensor": 2, "sequence": True}], ids=str)
def test_the_survivor_names_the_rank_that_was_killed(layout, tmp_path):
    write_random_tokens(tmp_path / "tokens")
    values = endless(small_run(tmp_path / "tokens", tmp_path / "run"))
    config, log, metrics = tmp_path / "run.yaml", tmp_path / "log", tmp_path / "run/metrics.jsonl"
    config.write_text(json.dumps(changed(values, train={"precision": "bf16"}, parallel=layout)))
    port = free_port()
    ranks = [start_rank(rank, config, port=port, log=log) for rank in range(2)]
    try:
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, 120, log.read_text)
        ranks[1].kill()
        assert ranks[1].wait() == -signal.SIGKILL
        assert ranks[0].wait(60) == ExitCode.RANK_LOST, log.read_text()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    (attempt,) = read_attempts(tmp_path / "run")
    assert attempt.exit_code == ExitCode.RANK_LOST
    assert attempt.reason.startswith(f"rank 1 is gone (process {ranks[1].pid} on ")
    assert "Traceback" not in log.read_text()
