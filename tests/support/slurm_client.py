"""The clients' side of the throw-away Slurm cluster that slurm_cluster.py runs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def why_not() -> str | None:
    """Why this machine cannot run the cluster."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"no Slurm here ({', '.join(missing)} missing): tests/slurm/install.sh installs it through apt"
    if os.geteuid() != 0:
        return "the test cluster's daemons need root"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode:
        return "this machine allows no namespaces, which stand for the test cluster's nodes"
    return None


class Cluster:
    """Starts the cluster and speaks to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "SAMBALM_CLUSTERS": str(TESTS / "slurm"),
            "SAMBALM_CLUSTER": "cpu",
            "SAMBALM_PYTHON": sys.executable,
        }
        with (folder.parent / "cluster.out").open("ab") as out:
            self.process = subprocess.Popen(
                [*NAMESPACES, sys.executable, str(TESTS / "support" / "slurm_cluster.py"), str(folder)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
            )

    @property
    def user_variables(self) -> dict[str, str]:
        """What a user's shell there has over this process's environment."""
        return {"SLURM_CONF": self.environment["SLURM_CONF"], "GLOO_SOCKET_IFNAME": "lo"}

    def wait_until_up(self) -> None:
        wait_until(lambda: (self.folder / "ready").exists() or self.process.poll() is not None, 90)
        assert self.process.poll() is None, (self.folder.parent / "cluster.out").read_text()

    def stop(self) -> None:
        self.process.kill()  # the namespace's first process, and with it everything
        self.process.wait()

    def tell(self, *words: str) -> None:
        self.process.stdin.write((" ".join(words) + "\n").encode())
        self.process.stdin.flush()

    def run(self, *command: object, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [str(word) for word in command],
            env=self.environment | variables,
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
        )
        assert not check or ended.returncode == 0, ended.stderr
        return ended

    def field(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.partition("=")[::2] for word in shown.split())[name]

    def wait_for_end(self, job: str, timeout_s: float = 240) -> str:
        """The job's state once it is over."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.field(job, "JobState") in over, timeout_s, lambda: self.field(job, "JobState"))
        return self.field(job, "JobState")


def wait_until(condition, timeout_s, shown=lambda: ""):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, shown()
        time.sleep(0.1)
