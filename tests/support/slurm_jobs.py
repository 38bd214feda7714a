"""A tiny run as a job of the test cluster."""

import json
from pathlib import Path
from typing import Any

import yaml

from sambalm.pretrain.checkpointing.format import checkpoint_folders
from sambalm.pretrain.lifecycle.attempts import AttemptRecord, read_attempts
from tests.support.slurm_client import Cluster, wait_until
from tests.support.whole_runs import without_measured

SCRIPT = Path(__file__).parents[2] / "slurm" / "samba_421m.sbatch"
OPTIONS = ("--nodes=2", "--gpus-per-node=1", "--mem=1000", "--time=60")


class Job:
    """The shipped sbatch file with a small config on two nodes, a rank on each."""

    def __init__(self, cluster: Cluster, values: dict, *options: str, **variables: str) -> None:
        self.cluster, self.run_dir = cluster, Path(values["run"]["dir"])
        config = self.run_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(values))
        self.log = self.run_dir.with_suffix(".log")
        variables = {"SAMBALM_CONFIG": str(config), "SAMBALM_NODES": "2", "CHECK_LINKS": "0"} | variables
        command = ("sbatch", "--parsable", f"--output={self.log}", *OPTIONS, *options, SCRIPT)
        self.number = cluster.run(*command, **variables).stdout.strip()

    def steps(self) -> list[int]:
        return [record["step"] for record in self.records()]

    def records(self) -> list[dict[str, Any]]:
        """What the run logged, without the times."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = (json.loads(line) for line in lines if line.endswith("\n"))
        return [without_measured(record) for record in records]

    def saved_steps(self) -> list[int]:
        return [int(folder.name.removeprefix("step_")) for folder in checkpoint_folders(self.run_dir)]

    def attempts(self) -> list[AttemptRecord]:
        return read_attempts(self.run_dir)

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        wait_until(lambda: (self.steps() or [0])[-1] >= step, timeout_s, self.text)

    def wait_for_end(self, timeout_s: float = 240) -> str:
        return self.cluster.wait_for_end(self.number, timeout_s)

    def text(self) -> str:
        """The job's log and those of its attempts."""
        logs = [self.log, *sorted(self.run_dir.glob("attempts/*/*.log"))]
        return "\n".join(f"--- {log}\n{log.read_text()}" for log in logs if log.exists())
