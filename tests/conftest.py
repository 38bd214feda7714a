"""What tests of every folder start with, and a small run."""

import json
import os
import random
import sysconfig
from pathlib import Path

import pytest


def has_cuda_device() -> bool:
    """Whether processes may see a CUDA device, without importing torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path("/dev").glob("nvidia[0-9]*"))


# Before torch is imported anywhere: the worlds' ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not has_cuda_device():  # dynamo would compile megatron's fusions; on a GPU it compiles the kernels under test
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported

VOCAB_SIZE = 384


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A throw-away Slurm cluster of three nodes; skips with the reason where there can be none."""
    from tests.support.slurm_client import Cluster, why_not  # not on top: few tests need it

    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    try:
        cluster.wait_until_up()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Prefix of real tokens: sources of the standard library in a small vocabulary."""
    return make_tokens(tmp_path_factory.mktemp("tokens"))


def make_tokens(folder: Path) -> Path:
    """Writes the tokens of the fixture to a folder, and returns their prefix."""
    # Not on top: most folders' tests need neither.
    from sambalm.data_pipeline.preprocess import preprocess
    from sambalm.data_pipeline.tokenizer_training import train_tokenizer

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    texts = [source.read_text(encoding="utf-8")[:4000] for source in sources]
    random.Random(0).shuffle(texts)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = folder / "tokenizer.model"
    train_tokenizer([text], vocab_size=VOCAB_SIZE, output=model)
    preprocess([text], tokenizer=model, output_prefix=folder / "tokens", workers=1)
    return folder / "tokens"


@pytest.fixture
def run_values(tokens, tmp_path) -> dict:
    """A run of seconds, as plain values: override what a test is about."""
    return small_run(tokens, tmp_path / "run")


def small_run(tokens: Path, run_dir: Path) -> dict:
    """The values of a run of seconds on some tokens."""
    return {
        "format_version": 1,
        "run": {"dir": str(run_dir), "seed": 7},
        "model": {
            "pattern": "M-*-",
            "hidden_size": 32,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "mlp_size": 48,
            "window": 8,
            "vocab_size": VOCAB_SIZE,
        },
        "data": {"train": str(tokens), "sequence_length": 32, "validation_fraction": 0.2},
        "train": {"steps": 6, "global_batch_tokens": 256, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"peak_lr": 3e-3, "warmup_fraction": 0.2},
        # 11 samples, and 5 of twice the length: no number of ranks shares either equally.
        "validation": {"every_steps": 3, "tokens": 352, "length_multiples": [1, 2]},
        "checkpoint": {"every_steps": 3, "keep": 10},
        "parallel": {},
    }
