"""A small text corpus that every machine with Python already has, so that a first run needs no download."""

import importlib
import inspect
import json
import pydoc
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from .files import check_new, output_file

_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# readline changes the terminal when it is imported; the xx modules are templates.
_SKIPPED_MODULES = re.compile(r"_|xx|readline$")


@dataclass(frozen=True)
class CorpusSummary:
    """What was written: number of documents, UTF-8 bytes of their texts, and the file."""

    documents: int
    text_bytes: int
    output: Path


def write_python_corpus(
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> CorpusSummary:
    """Write {"text", "source"} lines from the standard library's sources, the language reference and C docstrings.

    The order is a shuffle by `seed`, so that the last documents, which a run holds out, are mixed like the rest.
    The same Python and seed give the same bytes. `progress` receives (bytes read, None).
    Raises DataError where `output` cannot be written, or exists without `overwrite`.
    """
    check_new(Path(output), overwrite=overwrite)
    documents = []
    text_bytes = 0
    for source, text in _python_texts():
        documents.append((source, text))
        text_bytes += len(text.encode())
        if progress:
            progress(text_bytes, None)
    documents.sort()
    random.Random(seed).shuffle(documents)
    with output_file(Path(output)) as file:
        for source, text in documents:
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False).encode() + b"\n")
    return CorpusSummary(documents=len(documents), text_bytes=text_bytes, output=Path(output))


def _python_texts() -> Iterator[tuple[str, str]]:
    yield from _library_sources(Path(sysconfig.get_path("stdlib")))
    for topic, text in topics.topics.items():
        yield f"reference/{topic}", text
    for name in sys.builtin_module_names:
        if not _SKIPPED_MODULES.match(name):
            yield f"docstrings/{name}", _module_docstrings(name)


def _library_sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # pydoc_data/topics.py is the language reference again, as one literal.
        if _SKIPPED_DIRECTORIES.intersection(relative.parts) or relative.parts[0] == "pydoc_data":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield f"stdlib/{relative.as_posix()}", text


def _module_docstrings(name: str) -> str:
    module = importlib.import_module(name)
    parts = [f"module {name}", inspect.getdoc(module) or ""]
    # Only functions and classes: a module's data holds the state of this machine, such as environment variables.
    for member_name, member in sorted(vars(module).items()):
        if not member_name.startswith("_") and (inspect.isroutine(member) or inspect.isclass(member)):
            parts.append(pydoc.plain(pydoc.TextDoc().document(member, member_name)))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n\n".join(parts))
