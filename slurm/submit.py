"""`sambalm slurm submit`: the shipped sbatch files with overrides, judged by Slurm before anything is submitted."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sambalm.slurm.errors import SlurmError

if TYPE_CHECKING:
    from sambalm.pretrain.config import RunConfig

SCRIPTS = Path(__file__).parent
HERE = Path("configs/clusters")  # where the scripts look, from the folder that a job is submitted in


@dataclass(frozen=True)
class Job:
    """One sbatch call."""

    script: Path
    options: Sequence[str]
    arguments: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)  # beside those of this process

    def command(self, *extra: str) -> list[str]:
        return ["sbatch", *self.options, *extra, str(self.script), *self.arguments]

    def shown(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command())])

    def test(self) -> str:
        """Slurm's judgement, such as when the job would start. Raises SlurmError when Slurm would refuse it."""
        return self._run("--test-only").stderr.strip()

    def submit(self, *extra: str) -> str:
        """Submits the job and returns its number. Raises SlurmError when Slurm refuses it."""
        return self._run("--parsable", *extra).stdout.strip().partition(";")[0]

    def _run(self, *extra: str) -> subprocess.CompletedProcess[str]:
        try:
            result = subprocess.run(
                self.command(*extra), env={**os.environ, **self.variables}, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise SlurmError("sbatch is not installed here: submit from a node of the cluster") from None
        if result.returncode:
            lines = [
                re.sub(r"^(sbatch: (error|fatal): |allocation failure: )+", "", line)
                for line in result.stderr.splitlines()
            ]
            if any(re.search("configuration source|[Uu]nable to contact slurm controller", line) for line in lines):
                raise SlurmError(f"Slurm is not reached from this machine: {'; '.join(lines)}")
            asked = shlex.join([self.script.name, *(o for o in self.options if not o.startswith("--job-name"))])
            raise SlurmError(f"Slurm refuses {asked}: {'; '.join(lines)}")
        return result


def training_job(
    config: Path,
    *,
    nodes: int,
    spares: int = 0,
    gpus_per_node: int = 8,
    script: Path | None = None,
    overrides: Sequence[str] = (),
) -> "tuple[Job, RunConfig]":
    """The job of a run and the run's config.

    Args:
        nodes, spares: to train on, and to take beside them so that a lost one can be replaced.
        script: default: the shipped file of the config's name, else train.sbatch.

    Raises:
        SlurmError: no script, no cluster file, or a time limit that leaves no time to train.
        ConfigError, ParallelError: the run cannot start on so many GPUs.
    """
    from sambalm.pretrain.config_file import load_config

    checked = load_config(config, overrides)
    checked.check_world(nodes * gpus_per_node)
    name = config.name.removesuffix(config.suffix if config.suffix in (".yaml", ".yml") else "")
    own = SCRIPTS / f"{name}.sbatch"
    script = script or (own if own.is_file() else SCRIPTS / "train.sbatch")
    if not script.is_file():
        raise SlurmError(f"{script} does not exist: without --script, {SCRIPTS / 'train.sbatch'} runs any config")
    check_time_limit(os.environ.get("SBATCH_TIMELIMIT"), script=script)
    job = Job(
        script=script,
        options=[
            f"--job-name={name}",
            f"--nodes={nodes}-{nodes + spares}" if spares else f"--nodes={nodes}",
            f"--gpus-per-node={gpus_per_node}",
        ],
        arguments=list(overrides),
        variables=_variables()
        | {"SAMBALM_CONFIG": str(config), "SAMBALM_NODES": str(nodes), "RANKS_PER_NODE": str(gpus_per_node)},
    )
    return job, checked


def check_time_limit(limit: str | None, *, script: Path) -> None:
    """Refuses a time limit of which nothing is left before the moment at which Slurm tells the script's job to leave.

    Args:
        limit: of SBATCH_TIMELIMIT, which goes before the script's own; None where it is not set. In one of sbatch's
            forms: minutes, minutes:seconds, hours:minutes:seconds, or days-hours and what may follow them. Words such
            as UNLIMITED and what sbatch refuses are left to Slurm.
    """
    text = script.read_text()
    margin = re.search(r"^#SBATCH --signal=\S*@(\d+)", text, re.MULTILINE)
    name = "SBATCH_TIMELIMIT"
    if limit is None and (own := re.search(r"^#SBATCH (?:--time[= ]|-t ?)(\S+)", text, re.MULTILINE)):
        name, limit = f"--time of {script.name}", own[1]
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if margin is None or form is None:
        return
    days, *parts = (int(part) if part else 0 for part in form.groups())
    starts_with_hours = form[1] is not None or form[4] is not None
    hours, minutes, seconds = parts if starts_with_hours else (0, *parts[:2])
    limit_s, margin_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds, int(margin[1])
    if 0 < limit_s <= margin_s:  # Slurm takes 0 for no limit
        raise SlurmError(
            f"{name} is {limit}, and {script.name} has its job save and leave {margin_s} s before the "
            f"end: give more than {margin_s // 60} minutes, or lower --signal in a copy of the script and name it with "
            "--script"
        )


def convert_job(run_dir: str) -> Job:
    """Converts a run's newest checkpoint to a Hugging Face folder in it."""
    return Job(SCRIPTS / "convert.sbatch", options=[], arguments=[run_dir], variables=_variables())


def submit_all(job: Job, *, chain: int, after: Sequence[Job] = ()) -> list[str]:
    """Submits a run as `chain` jobs, each going on where the one before left, and then the jobs of `after`.

    A job whose predecessor failed is cancelled by Slurm. Returns the jobs' numbers in order.
    """
    for tested in (job, *after):
        tested.test()
    successor = Job(job.script, job.options, job.arguments, {**job.variables, "SAMBALM_SUCCESSOR": "1"})
    numbers: list[str] = []
    for part in [successor] * (chain - 1) + [job, *after]:
        waits = [f"--dependency=afterok:{numbers[-1]}", "--kill-on-invalid-dep=yes"] if numbers else []
        numbers.append(part.submit(*waits))
    return numbers


def _variables() -> dict[str, str]:
    """What the scripts need to find this installation."""
    _check_cluster()
    return {"SAMBALM_SLURM": str(SCRIPTS), "SAMBALM_PYTHON": os.environ.get("SAMBALM_PYTHON") or sys.executable}


def _check_cluster() -> None:
    """Refuses the name of a cluster whose file slurm/common.sh would not find."""
    from sambalm.pretrain.shipped_configs import FOLDER

    named, shipped = os.environ.get("SAMBALM_CLUSTERS"), FOLDER / "clusters"
    name = os.environ.get("SAMBALM_CLUSTER", "generic")
    if any((folder / f"{name}.env").is_file() for folder in ([Path(named)] if named else [HERE, shipped])):
        return
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.env")))
    where = named or f"{HERE} here"
    raise SlurmError(
        f"{where} has no {name}.env, which SAMBALM_CLUSTER names: put one there, or name one that the package brings "
        f"({known})" + (" and unset SAMBALM_CLUSTERS" if named else "")
    )
