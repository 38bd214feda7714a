"""Whole training runs in worlds of real ranks."""

import copy
import shutil
from pathlib import Path
from typing import Any

from sambalm.pretrain.checkpointing.format import checkpoint_folder
from sambalm.pretrain.reporting.metrics_file import read_metrics
from tests.support.worlds import run_world

MEASURED = ("tokens_per_second", "step_time_s", "peak_host_memory_bytes", "slowest_rank_ratio")  # no two runs alike
# Names that begin so tell of saves, in whichever step's record their outcome came, and of ranks that were slow.
OF_CHANCE = ("checkpoint_", "straggler")


def changed(values: dict, **sections: dict[str, Any]) -> dict:
    """A copy of plain configuration values with keys of some sections replaced."""
    values = copy.deepcopy(values)
    for section, keys in sections.items():
        values.setdefault(section, {}).update(keys)
    return values


def endless(run_values: dict, *, save_every_steps: int = 100_000) -> dict:
    """The values of a run under ZeRO-1 with more steps than a test lets pass, each of tens of milliseconds."""
    return changed(
        run_values,
        train={"steps": 4000},
        validation={"every_steps": 100_000},
        checkpoint={"every_steps": save_every_steps},
        parallel={"zero_stage": 1},
    )


def run_dir(values):
    return Path(values["run"]["dir"])


def stopped_after(values, step, folder):
    """A copy of a run as a stop right after a step's checkpoint would have left it, metrics beyond it included."""
    stopped = changed(values, run={"dir": str(folder)})
    kept = checkpoint_folder(run_dir(values), step)
    shutil.copytree(kept, folder / "checkpoints" / kept.name)
    shutil.copy(run_dir(values) / "metrics.jsonl", folder)
    return stopped


def train(values: dict, *, ranks: int = 1) -> list[dict[str, float]]:
    """Trains and returns what metrics.jsonl holds, without the times."""
    run_world(train_on_rank, values, ranks=ranks)
    records = read_metrics(Path(values["run"]["dir"]))
    return [without_measured(record) for record in records]


def without_measured(record: dict[str, float]) -> dict[str, float]:
    """What two runs of the same values have alike in a record of metrics.jsonl."""
    return {name: value for name, value in record.items() if name not in MEASURED and not name.startswith(OF_CHANCE)}


def train_on_rank(values: dict) -> None:
    """Trains as the program does, on a rank of a world."""
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.trainer import train

    config, evaluation = parse_config(values, source="test"), None
    if config.evaluation.tasks:  # as the program does
        from sambalm.evaluation.in_loop import InLoopEvaluation as evaluation
    train(config, evaluation=evaluation)
