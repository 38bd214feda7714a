"""Runs a tutorial page as a reader would: its files and its commands, in order, in one shell and one empty folder.

What a page's source says to the runner, which a reader does not see:

- A block with a title, as in ```` ```yaml title="run.yaml" ````, is a file that the reader writes.
- A block `bash` is run. Code blocks without a language after it are the output that it must show.
- The lines of an output must come in their order; the page marks those that it leaves out by `...`,
  and so the rest of a line. Each number stands for any number, as speeds and losses differ between machines.
- `<!-- exact -->` before an output compares numbers too.
- `<!-- exit code 2 -->` before a block `bash` says how it ends; others end with 0.
- `<!-- on a cluster -->` on a line of its own says that the page needs Slurm.
- `<!-- in the test: COMMANDS -->` before a block `bash` runs these in its place, where it needs hardware; its output is
  then not compared.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(
    r"(?:^<!-- (?P<comment>(?:(?!-->).)*?)\s*-->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.M | re.S,
)
ATTEMPT = re.compile(r"\b\d{8}T\d{6}-\d+|\bjob\d+\.\d+(?:\.\d+)?(?=[ :])")  # the second by Slurm
NUMBER = re.compile(r"(?<![A-Za-z\d])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")  # and not the 32 of fp32
HASH = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b")


@dataclass
class Step:
    """A file that a page writes, or commands that it runs and what they must show."""

    text: str
    file: str | None = None
    exit_code: int = 0
    instead: bool = False
    outputs: list[tuple[str, bool]] = field(default_factory=list)


def steps_of(page: str) -> list[Step]:
    """Files and commands of a page's text, in order; raises ValueError for a comment that no rule reads."""
    steps: list[Step] = []
    for found in FENCE.finditer(page):
        comment = found["comment"] or ""
        if found["title"]:
            steps.append(Step(found["text"], file=found["title"]))
        elif found["language"] == "bash":
            steps.append(_commands(found["text"], comment))
            comment = ""
        elif not found["language"] and steps and not steps[-1].instead and not steps[-1].file:
            steps[-1].outputs.append((found["text"], comment == "exact"))
        if comment not in ("", "exact"):
            raise ValueError(f"no block reads the comment {comment!r}")
    return steps


def start_of(page: str) -> str | None:
    """The name of the page in whose folder a page's text begins; None for an empty folder."""
    found = re.search(r"^<!-- folder of: (\S+) -->$", page, re.M)
    return found[1] if found else None


def is_on_a_cluster(page: str) -> bool:
    """Whether a page's text needs Slurm."""
    return re.search(r"^<!-- on a cluster -->$", page, re.M) is not None


def _commands(text: str, comment: str) -> Step:
    if found := re.fullmatch(r"exit code (\d+)", comment):
        return Step(text, exit_code=int(found[1]))
    if found := re.fullmatch(r"in the test:\s*(.*)", comment, re.S):
        return Step(found[1], instead=True)
    if comment:
        raise ValueError(f"no rule reads the comment {comment!r}")
    return Step(text)


def missing_line(shown: str, printed: str, *, exact: bool) -> str | None:
    """The first line of a shown output that the printed one does not have in its place."""
    lines = iter([_plain(line, exact) for line in printed.splitlines()])
    for line in shown.splitlines():
        if line.strip() in ("", "..."):
            continue
        start, cut, _ = _plain(line, exact).partition("...")
        if not any(one.startswith(start) if cut else one == start for one in lines):
            return line
    return None


def _plain(line: str, exact: bool) -> str:
    if not exact:
        line = NUMBER.sub("N", HASH.sub("N", ATTEMPT.sub("N", line)))
        line = re.sub(r"[━─]+", "-", line)  # tables are as wide as their numbers
    return " ".join(line.split())


def run_page(
    page: Path, folder: Path, *, variables: Mapping[str, str] | None = None, timeout_s: float = 600
) -> list[Step]:
    """Runs a page in an empty folder, fails with what went otherwise than it says, and returns its steps.

    Args:
        variables: over this process's environment.
    """
    steps = steps_of(page.read_text(encoding="utf-8"))
    outputs = folder.with_name(f"{folder.name}.outputs")
    outputs.mkdir()
    commands = [_script(step, outputs / f"{number}.txt") for number, step in enumerate(steps)]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "COLUMNS": "120"} | dict(variables or {})
    shell = subprocess.Popen(
        ["bash", "-c", "set -euo pipefail\n" + "\n".join(commands)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = shell.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        _end_session(shell)
    _compare(page, steps, outputs, code)
    return steps


def _script(step: Step, output: Path) -> str:
    text = step.text.rstrip("\n")
    if step.file:
        parent, name = shlex.quote(str(Path(step.file).parent)), shlex.quote(step.file)
        return f"mkdir -p {parent}\ncat >{name} <<'END OF FILE'\n{text}\nEND OF FILE"
    redirect = f"exec >{shlex.quote(str(output))} 2>&1\n"
    if step.exit_code:
        return f"{redirect}code=0\n(\n{text}\n) || code=$?\ntest $code = {step.exit_code} || exit 99"
    return redirect + text


def _end_session(shell: subprocess.Popen) -> None:
    """Ends what a page left in the background, and the shell where it is past its time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()


def _compare(page: Path, steps: list[Step], outputs: Path, code: int) -> None:
    printed = {number: outputs / f"{number}.txt" for number in range(len(steps))}
    ran = [number for number, path in printed.items() if path.exists()]
    if code or len(ran) < sum(not step.file for step in steps):
        last = ran[-1] if ran else 0
        said = printed[last].read_text(errors="replace") if ran else ""
        raise AssertionError(f"{page.name} ended with {code} at:\n{steps[last].text}\n--- which said:\n{said}")
    for number in ran:
        text = printed[number].read_text(errors="replace")
        for shown, exact in steps[number].outputs:
            if line := missing_line(shown, text, exact=exact):
                raise AssertionError(
                    f"{page.name} shows a line that is not printed in its place:\n{line}\n--- but:\n{text}"
                )
