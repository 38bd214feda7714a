"""Text to a tokenizer and token shards: what is trained on, what is held out, and long documents that are held out."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from sambalm.data_pipeline.documents import read_documents
from sambalm.data_pipeline.files import atomic_write
from sambalm.data_pipeline.shards import manifest_path

from .layout import DataFolder
from .models import ExperimentError

SETTINGS = "prepare.json"
PROGRAM = (sys.executable, "-m", "sambalm.pretrain.cli")


def prepare(train: Path, held_out: Path, folder: Path, *, long_characters: int, vocab_size: int, text_key: str) -> None:
    """Writes the data of all experiments; goes on where it was stopped, and leaves what is there as it is.

    Args:
        train: JSONL with the key `text_key`, as held_out.
        folder: gets the tokenizer and the prefixes of `DataFolder`.
        long_characters: from which on a document of `train` is held out, to read it as a long text. Where none has
            as many, there is no prefix of long documents, and a line says so.

    Raises:
        ExperimentError: the folder is of other settings, `held_out` is missing, or all of `train` is long.
        DataError: `train` is missing or has a line without text.
        SystemExit: a command failed, and has said why.
    """
    data = DataFolder(folder)
    if not held_out.is_file():
        raise ExperimentError(f"the file {held_out} of --held-out does not exist: check the path")
    settings = {"train": str(train), "held_out": str(held_out), "text_key": text_key}
    _keep_settings(folder / SETTINGS, settings | {"long_characters": long_characters, "vocab_size": vocab_size})
    with _split(train, folder, long_characters=long_characters, text_key=text_key) as (rest, long):
        has_long = long.stat().st_size > 0
        if not rest.stat().st_size:
            raise ExperimentError(
                f"no document of {train} has less than {long_characters:,} characters, so nothing is left to train on: "
                "raise --long-characters"
            )
        if not data.tokenizer.exists():
            _run("tokenizer", "--input", rest, "--vocab-size", vocab_size, "--output", data.tokenizer)
        texts = [(data.train, rest, "text"), (data.held_out, held_out, text_key), (data.long, long, "text")]
        for prefix, text, key in texts if has_long else texts[:2]:
            if manifest_path(prefix).is_file():
                print(f"{prefix}: is there, and left as it is", flush=True)
            else:
                words = ("--input", text, "--text-key", key, "--tokenizer", data.tokenizer, "--output", prefix)
                _run("preprocess", *words)
    if not has_long:
        print(
            f"{data.long}: not written, as no document of {train} has {long_characters:,} characters; `extrapolation` "
            "needs some: lower --long-characters and take another --data"
        )


def _keep_settings(path: Path, settings: Mapping[str, str | int]) -> None:
    """Writes what data are made with; other values would train on what the first call held out.

    Raises:
        ExperimentError: the data that are there were made with other values.
    """
    there = json.loads(path.read_text()) if path.is_file() else settings
    if other := [key for key, value in settings.items() if there.get(key) != value]:
        raise ExperimentError(
            f"{path.parent} was prepared with {', '.join(f'{key}={there.get(key)}' for key in other)}: give the same "
            "again, or another --data"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(settings).encode())


@contextlib.contextmanager
def _split(train: Path, folder: Path, *, long_characters: int, text_key: str) -> Iterator[tuple[Path, Path]]:
    """Yields files with the shorter and with the longer documents, which are removed afterwards."""
    rest, long = folder / "rest.jsonl", folder / "long.jsonl"
    try:
        with rest.open("w") as of_rest, long.open("w") as of_long:
            for document in read_documents(train, text_key=text_key):
                _write(of_long if len(document.text) >= long_characters else of_rest, document.text)
        yield rest, long
    finally:
        for path in (rest, long):
            path.unlink(missing_ok=True)


def _write(file: TextIO, text: str) -> None:
    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _run(command: str, *words: object) -> None:
    finished = subprocess.run([*PROGRAM, "data", command, *map(str, words)])
    if finished.returncode:
        sys.exit(finished.returncode)
