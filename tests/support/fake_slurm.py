"""Slurm's commands as far as slurm/common.sh calls them, for a job script that runs here in a fraction of a second.

Each command writes its call to a file. Ranks are a line of a plan: what an attempt does and how it ends.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

COMMANDS = {
    "squeue": 'case "$*" in *%T*) echo "$FAKE_STATE" ;; *%N*) echo allocated ;; *%x*) echo "$FAKE_EXCLUDED" ;; esac',
    "sinfo": 'case "$*" in *partition=*) printf "%s\\n" $FAKE_PARTITION ;; *) printf "%s\\n" "$FAKE_NODES" ;; esac',
    "scontrol": '[ "$1" != show ] || echo "$3" | tr , "\\n"\n'
    '[ "$1" != requeue ] || { kill -TERM "$(cat "$FAKE_FOLDER/pid")"; exit "$FAKE_REQUEUE"; }',
    "scancel": ":",
    "srun": 'while case "$1" in --*) true ;; *) false ;; esac; do shift; done; exec "$@"',
}

# What stands for the Python of the installation. Where a test says so, what decides of nodes and after an attempt is
# the real one, which takes long to start.
PYTHON = """\
case "$*" in
    *"sambalm.slurm.prepare "*)
        [ "$FAKE_PREPARE" = 0 ] || exit "$FAKE_PREPARE"
        echo "75 76 $FAKE_LIMIT $FAKE_RUN_DIR" ;;
    *"sambalm.slurm.health node "*)
        mkdir -p "$4"
        for node in $FAKE_GOOD; do echo '{"problem": null}' >"$4/$node.json"; done ;;
    *"sambalm.slurm.health links"*)
        [ -z "$FAKE_TOLD" ] || { kill -USR1 "$(cat "$FAKE_FOLDER/pid")"; sleep 0.3; }
        exit "$FAKE_LINKS" ;;
    *"sambalm.slurm.health pick "*)
        [ -z "$FAKE_PYTHON" ] || exec "$FAKE_PYTHON" "$@"
        shift 5; echo "$*" | tr " " , ;;
    *"sambalm.slurm.agent "*)
        attempt=$3
        read -r step code reason < <(head -n 1 "$FAKE_FOLDER/plan"); sed -i 1d "$FAKE_FOLDER/plan"
        [ "$step" = - ] || mkdir -p "$FAKE_RUN_DIR/checkpoints/step_$step"
        case $code in
            told) kill -USR1 "$(cat "$FAKE_FOLDER/pid")"; sleep 0.3; code=75 ;;
            told-crash) kill -USR1 "$(cat "$FAKE_FOLDER/pid")"; sleep 0.3; exit 1 ;;
            crash) exit 1 ;;
        esac
        printf '{\\n "exit_code": %s,\\n "step": 1,\\n "reason": "%s",\\n "ended_s": 1.5\\n}\\n' "$code" "$reason" \\
            >"$attempt/outcome.json"
        exit "$code" ;;
    *"sambalm.slurm.outcome "*)
        [ -z "$FAKE_PYTHON" ] || exec "$FAKE_PYTHON" "$@"
        [ -e "$3/outcome.json" ] || { echo retry; exit; }
        code=$(sed -n 's/.*"exit_code": \\([0-9]*\\).*/\\1/p' "$3/outcome.json")
        reason=$(sed -n 's/.*"reason": "\\(.*\\)",$/\\1/p' "$3/outcome.json")
        case $code in 0) next=finish ;; 74) next=retry ;; 75) next=requeue ;; *) next=end ;; esac
        echo "$next $code $reason" ;;
    *) exit 99 ;;
esac
"""


@dataclass(frozen=True)
class Ended:
    """A job that is over."""

    exit_code: int
    log: str
    calls: list[str]  # of Slurm's commands and of Python, with their arguments

    def of(self, start: str) -> list[str]:
        return [call for call in self.calls if call.startswith(start)]

    @property
    def attempts(self) -> int:
        return len([call for call in self.of("python") if "pretrain.cli train" in call])


def run_job(
    folder: Path,
    plan: list[str],
    *arguments: str,
    script: str = "samba_421m.sbatch",
    nodes: str = "n1 mixed",
    partition: str = "n1 n2 n3 n4 n5 n6",
    excluded: str = "(null)",
    good: str | None = None,
    real_python: bool = False,
    state: str = "RUNNING",
    limit: int = 3,
    requeue: int = 0,
    links: int = 0,
    prepare: int = 0,
    is_told_early: bool = False,
    **variables: str,
) -> Ended:
    """Runs a shipped job script to its end.

    Args:
        plan: a line an attempt: the checkpoint's step that it leaves or `-`, its exit code, `crash`, `told` (by USR1,
            on which it leaves) or `told-crash`, and the reason that it records.
        nodes: what sinfo says of the job's nodes, a line each. partition: all nodes of its partition. excluded: those
            that the job is not to be given, as squeue says it.
        good: those that pass their health check (default: all).
        real_python: whether the product's own programs pick nodes and read outcomes.
        state: of the job, by squeue. limit: run.max_attempts_without_progress.
        requeue, links, prepare: exit codes of `scontrol requeue`, of the check of links and of the config.
        is_told_early: whether USR1 comes while nodes are checked.
    """
    tools, run_dir, calls = folder / "tools", folder / "run", folder / "calls"
    tools.mkdir(exist_ok=True)
    (folder / "plan").write_text("".join(f"{line}\n" for line in plan))
    calls.write_text("")
    for name, body in {**COMMANDS, "python": PYTHON}.items():
        note = f'printf "%s\\n" "{name} $*" >>"$FAKE_FOLDER/calls"\n'
        (tools / name).write_text(f"#!/usr/bin/env bash\n{note}{body}\n")
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1001",
        "SLURM_JOB_PARTITION": "batch",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SAMBALM_SLURM": str(ROOT / "slurm"),
        "SAMBALM_PYTHON": str(tools / "python"),
        "FAKE_FOLDER": str(folder),
        "FAKE_RUN_DIR": str(run_dir),
        "FAKE_PYTHON": sys.executable if real_python else "",
        "FAKE_NODES": nodes,
        "FAKE_PARTITION": partition,
        "FAKE_EXCLUDED": excluded,
        "FAKE_GOOD": " ".join(line.split()[0] for line in nodes.splitlines()) if good is None else good,
        "FAKE_STATE": state,
        "FAKE_LIMIT": str(limit),
        "FAKE_REQUEUE": str(requeue),
        "FAKE_LINKS": str(links),
        "FAKE_PREPARE": str(prepare),
        "FAKE_TOLD": "1" if is_told_early else "",
    }
    command = [
        "bash",
        "-c",
        'echo $$ >"$FAKE_FOLDER/pid"; exec bash "$@"',
        "-",
        str(ROOT / "slurm" / script),
        *arguments,
    ]
    ended = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60)
    return Ended(ended.returncode, ended.stdout + ended.stderr, calls.read_text().splitlines())
