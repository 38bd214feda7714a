"""Atomic writes, removal and content hashes."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import DataError


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`: in the same directory, so that os.replace can move it into place atomically.

    Drawn anew each time, since processes of two nodes may have one number and write the same file at once.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def create(path: Path) -> BinaryIO:
    """Open `path` for writing bytes, with the directories above it. Raises DataError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")
    except OSError as error:
        raise DataError(f"cannot write in {path.parent}: {error.strerror}; choose a writable directory") from error


def flush_to_disk(file: BinaryIO) -> None:
    """Make the bytes written so far survive a power loss; a rename alone may reach the disk before them."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file's content, or renames and removals in a directory, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that it holds; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that appears as `path` when the block ends, and not at all when the block raises."""
    temporary = temporary_name(path)
    file = create(temporary)
    try:
        with file:
            yield file
            flush_to_disk(file)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """As `atomic_write`, for a file that a user asked for. Raises DataError where it cannot be written."""
    try:
        with atomic_write(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; make room, or choose another output") from error


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raises DataError where an output is a folder, or exists and nobody asked to replace it."""
    if path.is_dir():
        raise DataError(f"the output {path} is a folder; give the name of a file, in it or elsewhere")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; choose another output, or replace it with --overwrite")


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the content of `path`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
