"""A run for the planner, small enough to be run on the CPU as well."""

from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import parse_config


def config_of(*, parallel: dict | None = None, train: dict | None = None, **model) -> RunConfig:
    values = {
        "format_version": 1,
        "run": {"dir": "unused"},
        "model": {
            "pattern": "M-*-",
            "hidden_size": 64,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "mlp_size": 96,
            "window": 16,
            "vocab_size": 2048,
        }
        | model,
        "data": {"train": "unused", "sequence_length": 192},
        "train": {"steps": 2, "global_batch_tokens": 4 * 192, "micro_batch_size": 2, "precision": "bf16"}
        | (train or {}),
        "optimizer": {"peak_lr": 1e-3},
        "parallel": parallel or {},
    }
    return parse_config(values, source="test")
