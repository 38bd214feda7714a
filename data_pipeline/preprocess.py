"""Documents to token shards: worker processes read and tokenise, this process writes, in the order of the input."""

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .chat import ChatOptions, ChatTemplate
from .documents import PIECE_BYTES, Document, LineRange, Piece, ReadOptions, pieces, place
from .encoding import Encoder, EncoderConfig, FastPath, NotProven, TokenBatch
from .errors import DataError
from .files import remove
from .inputs import InputFile, expand_inputs
from .output import foreign_files, merge_parts, shard_files
from .parts import Part, Span, part_spans, spans_from
from .progress import Position, Progress, ProgressLog, RunIdentity
from .shard_sequence import ShardSequence
from .shards import Manifest, manifest_path, read_manifest, tokenizer_entry, write_manifest
from .shuffle import Buckets
from .tokenizer import Tokenizer
from .workers import in_order, tokenising_pool

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 15


@dataclass(frozen=True)
class PreprocessSummary:
    """What a prefix, or one part of it, holds now.

    `resumed_shards` of the `shards` were there before. `complete` tells whether the manifest is written, which the
    last of several parts does. `slow_because` is why the fast path was not taken, None where it was.
    """

    documents: int
    skipped_documents: int
    malformed_documents: int
    tokens: int
    shards: int
    resumed_shards: int
    read_bytes: int
    duration_s: float
    complete: bool
    slow_because: str | None = None

    def describe(self, prefix: Path) -> str:
        """For people to read: a line, and one more for each thing that they may not expect."""
        lines = [f"{prefix}: {_documents(self.documents)}, {self.tokens:,} tokens"]
        if self.resumed_shards:
            lines.append(f"{self.resumed_shards:,} of {self.shards:,} shards were there already")
        for count, what in ((self.skipped_documents, "empty"), (self.malformed_documents, "malformed")):
            if count:
                lines.append(f"{_documents(count, what)} {'was' if count == 1 else 'were'} skipped")
        if self.slow_because:
            lines.append(f"this was the slow way: {self.slow_because}")
        if not self.complete:
            lines.append("this part is complete, and the last part to end writes the manifest")
        return "\n".join(lines)


def _documents(count: int, kind: str = "") -> str:
    """Says how many documents, of a kind if it is given."""
    return " ".join(filter(None, (f"{count:,}", kind, "document" if count == 1 else "documents")))


@dataclass(frozen=True)
class PreprocessConfig:
    """How text becomes shards.

    shard_tokens: a shard takes at most so many, or one longer document.
    chat_template: a file with a jinja template. Documents are then conversations under `messages_key` of lines of JSON,
        and with `loss` "assistant" only what the assistant says counts in the loss.
    on_error: "stop" at a malformed record, or "skip" and count it.
    eos_token, special_tokens: as in `load_tokenizer`.
    shuffle_seed: documents are stored in an order drawn from it, all parts' together; None: in input order.
    """

    tokenizer: Path
    workers: int = 1
    shard_tokens: int = 2**30
    text_key: str = "text"
    text_documents: Literal["file", "line"] = "file"
    append_eos: bool = True
    eos_token: str | None = None
    special_tokens: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    chat_template: Path | None = None
    messages_key: str = "messages"
    loss: Literal["assistant", "all"] = "assistant"
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "shard_tokens"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def reading(self) -> ReadOptions:
        """How files become documents."""
        messages_key = self.messages_key if self.chat_template else None
        return ReadOptions(self.text_key, self.text_documents, messages_key)

    @cached_property
    def chat(self) -> ChatOptions | None:
        """How conversations become ids; None where documents are texts. Raises DataError for a file that is none."""
        if self.chat_template is None:
            return None
        try:
            return ChatOptions(self.chat_template.read_text("utf-8"), self.loss)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the chat template {self.chat_template} cannot be read "
                f"({getattr(error, 'strerror', None) or error}); give a text file with jinja"
            ) from error

    def encoder(self) -> EncoderConfig:
        """How documents become ids."""
        return EncoderConfig(
            self.tokenizer,
            self.reading,
            append_eos=self.append_eos,
            eos_token=self.eos_token,
            special_tokens=self.special_tokens,
            chat=self.chat,
        )

    def recorded(self) -> dict[str, str | int | bool | None]:
        """The options that the shards depend on."""
        names = ("append_eos", "eos_token", "shard_tokens", "special_tokens", "text_documents", "text_key")
        recorded = {name: getattr(self, name) for name in names}
        if self.chat:
            recorded |= {"chat_template": self.chat.template, "loss": self.loss, "messages_key": self.messages_key}
        if self.shuffle_seed is not None:
            recorded["shuffle_seed"] = self.shuffle_seed
        return recorded


def preprocess(
    inputs: Iterable[str | Path],
    *,
    tokenizer: str | Path,
    output_prefix: str | Path,
    part: Part = Part(),
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> PreprocessSummary:
    """Tokenise documents into shards OUTPUT_PREFIX_00000.bin/.idx, ... and write the manifest OUTPUT_PREFIX.json last.

    The files are the same bytes for any number of workers. A shard appears under its name when it is complete, and
    OUTPUT_PREFIX.progress has a line for it; the same call after a crash goes on after the last one, and does nothing
    where all is done. Of several parts, which may run at the same time on machines that share the output's directory,
    each names its shards OUTPUT_PREFIX_PART_00000, and the last one to end writes the manifest.
    `options` are fields of PreprocessConfig. `progress` receives (stored bytes read, bytes to read).
    Raises DataError for bad input, output of something else without `overwrite`, or output that cannot be written.
    """
    config, prefix = PreprocessConfig(tokenizer=Path(tokenizer), **options), Path(output_prefix)
    files = expand_inputs(inputs)
    if config.shuffle_seed is None:
        return _Run(files, config, prefix, part).run(overwrite=overwrite, progress=progress)
    shuffled = _Run(files, config, prefix, Part())
    made = shuffled.made(overwrite=overwrite)
    if made:
        remove(_unshuffled(prefix).parent)  # which a crash may have left
        return made
    unshuffled = _Run(files, replace(config, shuffle_seed=None), _unshuffled(prefix), part)
    ordered = unshuffled.run(overwrite=overwrite, progress=progress, keeps_made=True)
    return shuffled.run_shuffled(ordered, _unshuffled(prefix), overwrite=overwrite) if ordered.complete else ordered


def _unshuffled(prefix: Path) -> Path:
    """Where documents are in input order until they are shuffled: in a hidden folder beside the output."""
    return prefix.parent / f".{prefix.name}.unshuffled" / prefix.name


class _Run:
    """One call of `preprocess`."""

    def __init__(self, files: list[InputFile], config: PreprocessConfig, prefix: Path, part: Part) -> None:
        self._start_s = time.perf_counter()
        self._files = files
        self._config = config
        self._prefix = prefix
        self._part = part
        self._tokenizer = config.encoder().load_tokenizer()
        if config.chat:
            _check_conversations(files, config.chat, self._tokenizer)
        self._identity = RunIdentity(
            tokenizer_sha256=self._tokenizer.sha256,
            options=config.recorded(),
            inputs_sha256=_inputs_sha256(files),
            parts=part.count,
        )
        self._read_bytes = 0
        self._slow_because: str | None = None

    def made(self, *, overwrite: bool, keeps_made: bool = False) -> PreprocessSummary | None:
        """What the prefix holds, where this call would write the same; None where it is to be written.

        Args:
            keeps_made: whether that goes for what is to be overwritten, too.

        Raises:
            DataError: it holds something else, and is not to be overwritten.
        """
        manifest = read_manifest(self._prefix)
        if manifest and (keeps_made or not overwrite) and self._made(manifest):
            return self._summary(manifest, resumed_shards=len(manifest.shards))
        if manifest and not overwrite:
            raise DataError(
                f"{manifest_path(self._prefix)} exists already{self._made_with_other(manifest)}; choose another output "
                "prefix, or replace it with --overwrite"
            )
        return None

    def _foreign(self, *, overwrite: bool) -> list[Path]:
        """Files of something else that this run replaces. Raises DataError where it may not."""
        foreign = foreign_files(self._prefix, self._part, self._identity)
        if foreign and not overwrite:
            raise DataError(
                f"{foreign[0]} exists already; choose another output prefix, or replace it with --overwrite"
            )
        return foreign

    def run(
        self, *, overwrite: bool, progress: Callable[[int, int | None], None] | None, keeps_made: bool = False
    ) -> PreprocessSummary:
        if made := self.made(overwrite=overwrite, keeps_made=keeps_made):
            return made
        foreign = self._foreign(overwrite=overwrite)
        log = ProgressLog(self._part.progress_path(self._prefix), self._identity, overwrite=overwrite)
        with closing(log):
            resumed = len(log.progress.shards)
            if not log.progress.complete:
                self._write_shards(log, replaced=foreign, progress=progress)
            self._remove_strays(log)
            manifest = merge_parts(
                self._prefix,
                part=self._part,
                run=self._identity,
                files=self._files,
                tokenizer=tokenizer_entry(self._tokenizer, self._prefix),
            )
            return self._summary(manifest or log.progress, resumed_shards=resumed)

    def run_shuffled(self, ordered: PreprocessSummary, staged: Path, *, overwrite: bool) -> PreprocessSummary:
        """Stores the documents of another run in their drawn order, and removes that run's files.

        Goes on after the last complete shard, as `run` does.
        """
        manifest, seed = read_manifest(staged), self._config.shuffle_seed
        assert manifest is not None, "the other run is complete"
        assert seed is not None, "this one shuffles"
        foreign = self._foreign(overwrite=overwrite)
        log = ProgressLog(self._part.progress_path(self._prefix), self._identity, overwrite=overwrite)
        with closing(log):
            resumed = len(log.progress.shards)
            buckets = Buckets(staged, manifest, seed=seed)
            if not log.progress.complete:
                shards = self._sequence(log, replaced=foreign)
                try:
                    buckets.fill()
                    following = log.progress.next or Position(source=0, position=0, record=0)
                    for bucket, batch in buckets.batches(bucket=following.source, document=following.position):
                        shards.add(bucket, batch)
                    shards.finish(Position(source=buckets.count, position=0, record=0))
                except OSError as error:
                    raise _cannot_write(self._prefix, error) from error
                finally:
                    shards.discard()
                    log.remove_if_empty()
            self._remove_strays(log)
            # A shard's documents come from everywhere, so that it has no ranges of records.
            stored = [one.model_copy(update={"sources": [], "text_bytes": None}) for one in log.progress.shards]
            tokenizer = tokenizer_entry(self._tokenizer, self._prefix)
            update = {"shards": stored, "options": self._identity.options, "tokenizer": tokenizer}
            manifest = manifest.model_copy(update=update)
            write_manifest(self._prefix, manifest)
            self._part.progress_path(self._prefix).unlink()
            remove(staged.parent)
        summary = self._summary(manifest, resumed_shards=resumed)
        return replace(summary, read_bytes=ordered.read_bytes, slow_because=ordered.slow_because)

    def _sequence(self, log: ProgressLog, *, replaced: list[Path]) -> ShardSequence:
        return ShardSequence(
            log,
            shard_prefix=lambda number: self._part.shard_prefix(self._prefix, number),
            vocab_size=self._tokenizer.vocab_size,
            shard_tokens=self._config.shard_tokens,
            before_first_commit=lambda: _remove(replaced),
            masked=self._config.encoder().masks,
        )

    def _write_shards(
        self, log: ProgressLog, *, replaced: list[Path], progress: Callable[[int, int | None], None] | None
    ) -> None:
        spans = list(part_spans(self._files, self._config.reading, self._part))
        if following := log.progress.next:
            spans = list(spans_from(spans, following.source, following.position))
        total_bytes = sum(_size_bytes(span, self._files[span.source], self._config.reading) for span in spans)
        shards = self._sequence(log, replaced=replaced)
        try:
            with closing(self._encoded(spans)) as batches:
                for source, piece, batch in batches:
                    if batch.bad and self._config.on_error == "stop":
                        first = batch.bad[0]
                        where = place(piece.file, first.position)
                        raise DataError(f"{where}: {first.reason}; --on-error skip leaves such records out")
                    shards.add(source, batch)
                    self._read_bytes += piece.size_bytes
                    if progress:
                        progress(self._read_bytes, total_bytes)
            shards.finish(Position(source=len(self._files), position=0, record=0))
        except OSError as error:
            raise _cannot_write(self._prefix, error) from error
        finally:
            shards.discard()
            log.remove_if_empty()

    def _encoded(self, spans: list[Span]) -> Generator[tuple[int, Piece, TokenBatch]]:
        """Batches in the order of the input, each with its file's number. A bounded number of pieces is under way."""
        reading, encoder = self._config.reading, self._config.encoder()
        work = (
            (span.source, piece)
            for span in spans
            for piece in pieces(
                self._files[span.source], reading, start=span.start, stop=span.stop, piece_bytes=PIECE_BYTES
            )
        )
        if self._config.workers == 1:
            alone = Encoder(encoder, self._tokenizer, fast_path=self._prove())
            for source, piece in work:
                yield source, piece, alone.encode_piece(piece)
            return
        # Workers start with the fast path, which loads slowly, while this process proves it.
        with tokenising_pool(self._config.workers, replace(encoder, fast=True)) as pool:
            encoder = replace(encoder, fast=self._prove() is not None)
            yield from in_order(work, pool, encoder, workers=self._config.workers)

    def _prove(self) -> FastPath | None:
        if self._config.chat:
            return None
        try:
            return FastPath.proven(self._tokenizer, _sample(self._files, self._config.reading))
        except NotProven as reason:
            self._slow_because = str(reason)
            return None

    def _remove_strays(self, log: ProgressLog) -> None:
        """Shards of an overwritten run that a crash left, beyond those that this one has replaced."""
        names = {shard.name for shard in log.progress.shards}
        _remove([path for path in shard_files(self._prefix, self._part) if path.stem not in names])

    def _made(self, manifest: Manifest) -> bool:
        """Whether this call would write the same manifest, as far as names, sizes and times tell."""
        made_ns = manifest_path(self._prefix).stat().st_mtime_ns
        return (
            manifest.tokenizer.sha256 == self._identity.tokenizer_sha256
            and manifest.options == self._identity.options
            and [(source.path, source.size_bytes) for source in manifest.sources]
            == [(file.name, file.size_bytes) for file in self._files]
            and all(int(file.modified) <= made_ns for file in self._files if file.modified.isdigit())
        )

    def _made_with_other(self, manifest: Manifest) -> str:
        """What differs from this call, for a message."""
        theirs = RunIdentity(
            tokenizer_sha256=manifest.tokenizer.sha256,
            options=manifest.options,
            inputs_sha256=self._identity.inputs_sha256,
            parts=self._identity.parts,
        )
        found = self._identity.differences(theirs) or "input files"
        return f", made with other values of {found}" if manifest.options else ""

    def _summary(self, made: Manifest | Progress, *, resumed_shards: int) -> PreprocessSummary:
        if isinstance(made, Manifest):
            skipped, malformed = made.skipped_documents, made.malformed_documents
        else:
            ranges = [*(found for shard in made.shards for found in shard.sources), *(made.rest or [])]
            skipped, malformed = (sum(getattr(found, what) for found in ranges) for what in ("skipped", "malformed"))
        return PreprocessSummary(
            documents=sum(shard.documents for shard in made.shards),
            skipped_documents=skipped,
            malformed_documents=malformed,
            tokens=sum(shard.tokens for shard in made.shards),
            shards=len(made.shards),
            resumed_shards=resumed_shards,
            read_bytes=self._read_bytes,
            duration_s=time.perf_counter() - self._start_s,
            complete=isinstance(made, Manifest),
            slow_because=self._slow_because,
        )


def _cannot_write(prefix: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write {prefix}: {error.strerror or error}; make room, and the same command goes on after the last "
        "complete shard"
    )


def _check_conversations(files: list[InputFile], chat: ChatOptions, tokenizer: Tokenizer) -> None:
    """Raises DataError where the template is none, or a file cannot hold conversations."""
    ChatTemplate(chat.template, tokenizer)
    for file in files:
        if file.kind != "jsonl":
            raise DataError(f"{file.name} is no JSONL, which conversations are read from: give lines of JSON")


def _remove(paths: list[Path]) -> None:
    """A manifest goes before what it describes, so that none ever describes other shards."""
    for path in sorted(paths, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)


def _inputs_sha256(files: list[InputFile]) -> str:
    listed = [[file.name, file.size_bytes, file.modified] for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _size_bytes(span: Span, file: InputFile, options: ReadOptions) -> int:
    """Stored bytes of a span, as its pieces will report them or close to it."""
    if options.has_lines(file) and not file.compression:
        return max((file.size_bytes if span.stop is None else span.stop) - span.start, 0)
    return file.size_bytes


def _sample(files: list[InputFile], options: ReadOptions) -> list[str]:
    """The beginnings of texts from places spread evenly over the input, the same for every part and attempt."""
    total_bytes = sum(file.size_bytes for file in files)
    texts, begin, places = [], 0, [total_bytes * number // _SAMPLES for number in range(_SAMPLES)]
    for file in files:
        inside = [place - begin for place in places if begin <= place < begin + file.size_bytes]
        begin += file.size_bytes
        for start in inside:
            piece: Piece | None = None
            if options.has_lines(file) and not file.compression:
                piece = LineRange(file, start, min(start + _SAMPLE_BYTES, file.size_bytes))
            elif start == inside[0]:
                piece = next(pieces(file, options, piece_bytes=_SAMPLE_BYTES), None)
            try:
                texts += _beginnings(piece, options) if piece else []
            except OSError as error:
                raise DataError(f"cannot read {file.name}: {error.strerror or error}") from error
    return texts


def _beginnings(piece: Piece, options: ReadOptions) -> list[str]:
    texts, characters = [], 0
    for record in piece.records(options):
        if isinstance(record, Document):
            texts.append(record.text[: _SAMPLE_BYTES - characters])
            characters += len(texts[-1])
            if characters >= _SAMPLE_BYTES:
                break
    return texts
