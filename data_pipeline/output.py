"""What lies under a prefix: which files are whose, and the manifest over the shards of all parts."""

import re
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError
from .inputs import InputFile
from .parts import Part
from .progress import Progress, RunIdentity, read_progress
from .shards import (
    Manifest,
    ShardEntry,
    SourceEntry,
    SourceRange,
    TokenizerEntry,
    manifest_path,
    write_manifest,
)


def _listing(prefix: Path) -> Iterator[tuple[Path, re.Match]]:
    if not prefix.parent.is_dir():
        return
    name = re.compile(
        re.escape(prefix.name) + r"(?:\.json|(?:\.\d{5}-of-(?P<parts>\d{5}))?\.progress"
        r"|(?:_(?P<part>\d{5}))?_(?P<number>\d{5,})\.(?:bin|idx|mask))"
    )
    for path in sorted(prefix.parent.iterdir()):
        if match := name.fullmatch(path.name):
            # PREFIX_00001 may be a prefix of its own.
            if match["part"] and manifest_path(f"{prefix}_{match['part']}").exists():
                continue
            yield path, match


def shard_files(prefix: Path, part: Part) -> list[Path]:
    """The .bin, .idx and .mask files of one part, sorted by name."""
    wanted = f"{part.index:05d}" if part.count > 1 else None
    return [path for path, match in _listing(prefix) if match["number"] and match["part"] == wanted]


def shard_files_of_any_part(prefix: Path) -> list[Path]:
    """All .bin, .idx and .mask files under the prefix, sorted by name."""
    return [path for path, match in _listing(prefix) if match["number"]]


def check_prefix(prefix: Path) -> None:
    """Raises DataError where a prefix of shards is a folder, beside which they would lie rather than in it."""
    if prefix.is_dir():
        raise DataError(f"the output {prefix} is a folder; give a prefix in it, such as {prefix / 'text'}")


def foreign_files(prefix: Path, part: Part, run: RunIdentity) -> list[Path]:
    """What this part of this run would replace: a manifest, shards of its own names, and those of another split.

    The shards of the other parts are theirs to replace, as are those that this run has begun to write.
    """
    progress = _read_or_none(part.progress_path(prefix))
    mine = f"{part.index:05d}" if part.count > 1 else None
    parts = f"{part.count:05d}" if part.count > 1 else None
    split = {None} if part.count == 1 else {f"{other.index:05d}" for other in part.all()}
    found = []
    for path, match in _listing(prefix):
        if path.suffix == ".progress":
            foreign = match["parts"] != parts
        elif match["number"]:
            own = match["part"] == mine and (progress is None or progress.run != run)
            foreign = own or match["part"] not in split
        else:
            foreign = True
        if foreign:
            found.append(path)
    return found


def _read_or_none(path: Path) -> Progress | None:
    try:
        return read_progress(path)
    except DataError:
        return None


def merge_parts(
    prefix: Path, *, part: Part, run: RunIdentity, files: list[InputFile], tokenizer: TokenizerEntry
) -> Manifest | None:
    """Write the manifest once every part is complete and remove their logs; None while one is not.

    Whichever part ends last does this, or any part that is run again. Two at once write the same bytes.
    Sources that only a part's log names follow `files`, part by part.
    Raises DataError where a part was made in another way, or nothing holds a token.
    """
    done = []
    for other in part.all():
        path = other.progress_path(prefix)
        progress = read_progress(path)
        if progress is None or not progress.complete:
            return None
        if progress.run != run:
            raise DataError(
                f"{path} was made with other values of {progress.run.differences(run)}; "
                "run that part again with overwrite"
            )
        done.append(progress)
    sources = [SourceEntry(path=file.name, size_bytes=file.size_bytes, records=0) for file in files]
    shards: list[ShardEntry] = []
    for progress in done:
        first = len(sources) if progress.sources else 0
        sources += [SourceEntry(path=path, records=0) for path in progress.sources]
        shards += _numbered(progress, sources, first_source=first)
    skipped = sum(source.skipped for source in sources)
    malformed = sum(source.malformed for source in sources)
    if not shards:
        remove_logs(prefix, part)
        raise DataError(
            f"the inputs hold no tokens (empty documents: {skipped}, malformed records: {malformed}); give other inputs"
        )
    manifest = Manifest(
        tokenizer=tokenizer,
        shards=shards,
        skipped_documents=skipped,
        malformed_documents=malformed,
        sources=sources,
        options=run.options,
    )
    write_manifest(prefix, manifest)
    remove_logs(prefix, part)
    return manifest


def remove_logs(prefix: Path, part: Part) -> None:
    """Remove the logs of all parts, which the manifest has replaced."""
    for other in part.all():
        other.progress_path(prefix).unlink(missing_ok=True)


def _numbered(progress: Progress, sources: list[SourceEntry], *, first_source: int) -> list[ShardEntry]:
    """The part's shards with records numbered from the beginning of each file, which only the parts before know.

    The part numbers its sources from `first_source` on.
    """
    before = {found.source: sources[first_source + found.source].records or 0 for found in _ranges(progress)}
    for found in _ranges(progress):
        entry = sources[first_source + found.source]
        entry.records = (entry.records or 0) + found.records
        entry.skipped += found.skipped
        entry.malformed += found.malformed
    return [
        shard.model_copy(
            update={
                "sources": [
                    found.model_copy(
                        update={"first": found.first + before[found.source], "source": first_source + found.source}
                    )
                    for found in shard.sources
                ]
            }
        )
        for shard in progress.shards
    ]


def _ranges(progress: Progress) -> list[SourceRange]:
    return [*(found for shard in progress.shards for found in shard.sources), *(progress.rest or [])]
