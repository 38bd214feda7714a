"""Runs of `sambalm data preprocess` as processes of their own, which tests can kill."""

import functools
import signal
import subprocess
import sys
from pathlib import Path


def start(inputs, tokenizer: Path, prefix: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sambalm.pretrain.cli", "data", "preprocess"]
    for path in inputs:
        command += ["--input", str(path)]
    command += ["--tokenizer", str(tokenizer), "--output", str(prefix), *options]
    pipe = subprocess.PIPE
    # A shell lets what it runs in the background ignore interrupts, and so would the program.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, preexec_fn=heeds)


def run(inputs, tokenizer: Path, prefix: Path, *options: str) -> tuple[int, str, str]:
    process = start(inputs, tokenizer, prefix, *options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def contents(prefix: Path) -> dict[str, bytes]:
    """All files that belong to a prefix by name, hidden ones included."""
    paths = [path for path in prefix.parent.iterdir() if path.name.lstrip(".").startswith(prefix.name)]
    return {path.name: path.read_bytes() for path in sorted(paths)}
