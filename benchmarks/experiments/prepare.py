"""Text to a tokenizer and token shards: what is trained on, what is held out, and long documents that are held out."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .layout import TOKENIZER, DataFolder

PROGRAM = (sys.executable, "-m", "sambalm.pretrain.cli")


def prepare(train: Path, held_out: Path, folder: Path, *, long_characters: int, vocab_size: int) -> None:
    """Writes the data of all experiments; what is there is left as it is.

    Args:
        train: JSONL with `text`, as held_out.
        folder: gets the tokenizer and the prefixes of `DataFolder`.
        long_characters: from which on a document of `train` is held out, to read it as a long text.
    """
    data = DataFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _split(train, folder, long_characters=long_characters) as (rest, long):
        if not data.tokenizer.exists():
            _run("tokenizer", "--input", rest, "--vocab-size", vocab_size, "--output", data.tokenizer)
        for prefix, text in ((data.train, rest), (data.held_out, held_out), (data.long, long)):
            _run("preprocess", "--input", text, "--tokenizer", folder / TOKENIZER, "--output", prefix)


@contextlib.contextmanager
def _split(train: Path, folder: Path, *, long_characters: int) -> Iterator[tuple[Path, Path]]:
    """Yields files with the shorter and with the longer documents, which are removed afterwards."""
    rest, long = folder / "rest.jsonl", folder / "long.jsonl"
    try:
        with train.open() as lines, rest.open("w") as of_rest, long.open("w") as of_long:
            for line in lines:
                text = json.loads(line)["text"]
                _write(of_long if len(text) >= long_characters else of_rest, text)
        yield rest, long
    finally:
        for path in (rest, long):
            path.unlink(missing_ok=True)


def _write(file: TextIO, text: str) -> None:
    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _run(command: str, *words: object) -> None:
    subprocess.run([*PROGRAM, "data", command, *map(str, words)], check=True)
