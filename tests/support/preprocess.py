"""Runs of `sambalm data preprocess` as processes of their own, which tests can kill."""

import subprocess
import sys
from pathlib import Path


def start(inputs, tokenizer: Path, prefix: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sambalm.pretrain.cli", "data", "preprocess"]
    for path in inputs:
        command += ["--input", str(path)]
    command += ["--tokenizer", str(tokenizer), "--output", str(prefix), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def run(inputs, tokenizer: Path, prefix: Path, *options: str) -> tuple[int, str, str]:
    process = start(inputs, tokenizer, prefix, *options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def contents(prefix: Path) -> dict[str, bytes]:
    """All files that belong to a prefix by name, hidden ones included."""
    paths = [path for path in prefix.parent.iterdir() if path.name.lstrip(".").startswith(prefix.name)]
    return {path.name: path.read_bytes() for path in sorted(paths)}
