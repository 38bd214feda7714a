"""A run in phases: the samples, batches and learning rates of every step, and where it goes on."""

import numpy as np
import pytest

from sambalm.data_pipeline.shards import ShardWriter
from tests.support.whole_runs import changed, stopped_after, train


@pytest.fixture
def phased_values(run_values, tmp_path) -> dict:
    """Three steps of 8 samples of 32 tokens, three of 2 of 64 from two sources, two of 6 of 32."""
    writer = ShardWriter(tmp_path / "other", 384)
    for document in np.split(np.random.RandomState(0).randint(0, 384, size=2400), 40):
        writer.add(document)
    writer.finish()
    writer.commit()
    mix = [{"prefix": run_values["data"]["train"], "weight": 1}, {"prefix": str(tmp_path / "other"), "weight": 1}]
    phases = [
        {"tokens": 768},
        {
            "tokens": 384,
            "train": mix,
            "sequence_length": 64,
            "global_batch_tokens": 128,
            "micro_batch_size": 1,
            "learning_rate": {"peak_lr": 1e-3, "warmup_fraction": 0.0},
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


def test_stop(phased_values, tmp_path):
    whole = train(phased_values)
    for r in whole:
        print(r)
    for step in range(1, 8):
        assert train(stopped_after(phased_values, step, tmp_path / f"resumed{step}")) == whole, step
