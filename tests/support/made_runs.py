"""Run folders without a training: what a run leaves there, made in milliseconds."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.config_file import dump_config, parse_config
from sambalm.pretrain.lifecycle.attempts import attempt_folder, write_outcome
from sambalm.pretrain.reporting.metrics_file import METRICS, metrics_line


def make_checkpoint(run_dir: Path, step: int, *, config: dict | None = None, hooks: dict | None = None) -> Path:
    """A committed checkpoint of a step that verifies, of one small tensor."""
    final = files.checkpoint_folder(run_dir, step)
    partial = files.partial_folder(final, "test")
    partial.mkdir(parents=True)
    save_file({"model.weight": torch.full((2000,), float(step))}, partial / "shard-00001.safetensors")
    state = {"step": step, "samples": 8 * step, "tokens": 256 * step, "data": {}}
    state |= {"config": config or {}, "hooks": hooks or {}}
    files.write_json(partial / files.STATE, state)
    files.write_manifest(partial, files.checksums(partial, [path.name for path in partial.iterdir()]))
    files.commit(partial, final)
    return final


def make_run(values: dict, *, steps: tuple[int, ...]) -> Path:
    """A run's folder with a checkpoint after each of some steps and an attempt that led to each; returns it."""
    config = parse_config(values, source="test")
    run_dir = Path(config.run.dir)
    for start, end in zip((0, *steps), steps, strict=False):
        folder = attempt_folder(run_dir, f"to{end}")
        folder.mkdir(parents=True)
        (folder / "attempt.json").write_text(
            json.dumps({"started_s": 1e9 + end, "start_step": start, "slurm_job": None})
        )
        (folder / "config.yaml").write_text(dump_config(config))
        make_checkpoint(run_dir, end, config=config.model_dump())
        write_outcome(folder, exit_code=75, step=end, reason="asked to leave")
    records = [
        {"step": step, "tokens": 256 * step, "loss": 5.0, "step_time_s": 0.5, "tokens_per_second": 512.0}
        for step in range(1, steps[-1] + 1)
    ]
    (run_dir / METRICS).write_text("".join(map(metrics_line, records)))
    (run_dir / "config.yaml").write_text(dump_config(config))
    return run_dir
