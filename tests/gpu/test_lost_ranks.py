"""Ranks under NCCL end by themselves and name the one that was killed, which NCCL does not tell them."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from sambalm.pretrain.errors import ExitCode
from sambalm.pretrain.lifecycle.attempts import read_attempts
from tests.conftest import VOCAB_SIZE, small_run
from tests.support.runs import Run
from tests.support.whole_runs import changed, endless

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")


def write_random_tokens(prefix: Path) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in np.random.default_rng(0).integers(0, VOCAB_SIZE, (60, 1000)):
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("layout", [{"zero_stage": 1}, {"tensor": 2, "sequence": True}], ids=str)
def test_the_survivor_names_the_rank_that_was_killed(layout, tmp_path):
    write_random_tokens(tmp_path / "tokens")
    values = endless(small_run(tmp_path / "tokens", tmp_path / "run"))
    run = Run(changed(values, train={"precision": "bf16"}, parallel=layout), tmp_path)
    with run.started() as (first, second):
        run.wait_for_step(2)
        second.kill()
        assert second.wait() == -signal.SIGKILL
        assert first.wait() == ExitCode.RANK_LOST, run.text()
    (attempt,) = read_attempts(run.dir)
    assert attempt.exit_code == ExitCode.RANK_LOST
    assert attempt.reason.startswith(f"rank 1 is gone (process {second.pid} on ")
    assert "Traceback" not in run.text()
