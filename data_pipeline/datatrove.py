"""Steps of a datatrove pipeline that write token shards. Only who has datatrove installed imports this file.

`EncodeShards` ends a pipeline: each rank encodes its documents into shards of its own. `JoinShards` then writes the
manifest over all ranks. `KeepLanguage` needs no model that must be downloaded first, as datatrove's own filter does.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.logging import logger

from .documents import BadRecord, Document, ReadOptions
from .encoding import Encoder, EncoderConfig, FastPath, NotProven
from .errors import DataError
from .output import foreign_files, merge_parts, remove_logs, shard_files
from .parts import Part
from .progress import Position, ProgressLog, RunIdentity, read_progress
from .shard_sequence import ShardSequence
from .shards import Manifest, manifest_path, read_manifest, tokenizer_entry
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from datatrove.data import Document as DatatroveDocument
    from datatrove.data import DocumentsPipeline

_BATCH_CHARACTERS = 1 << 22
_SAMPLES, _SAMPLE_CHARACTERS = 16, 1 << 15


@dataclass(frozen=True)
class ShardOutput:
    """Where shards go and what decides their bytes, the same for every rank and for the step that joins them.

    shard_tokens: a shard takes at most so many, or one longer document.
    eos_token, special_tokens: as in `load_tokenizer`.
    """

    prefix: Path
    tokenizer: Path
    shard_tokens: int = 2**30
    append_eos: bool = True
    eos_token: str | None = None
    special_tokens: bool = False

    def encoder(self) -> EncoderConfig:
        """How documents become ids."""
        return EncoderConfig(
            self.tokenizer,
            ReadOptions(),
            append_eos=self.append_eos,
            eos_token=self.eos_token,
            special_tokens=self.special_tokens,
        )

    def identity(self, tokenizer: Tokenizer, *, ranks: int) -> RunIdentity:
        """What all ranks must have in common. Which documents come is the pipeline's affair, and not known before."""
        options = {name: value for name, value in asdict(self).items() if name not in ("prefix", "tokenizer")}
        return RunIdentity(tokenizer_sha256=tokenizer.sha256, options=options, inputs_sha256="", parts=ranks)


class EncodeShards(PipelineStep):
    """Encodes a rank's documents into the shards PREFIX_RANK_00000, ..., as `sambalm data preprocess` does.

    A rank's shards depend on nothing but its documents and their order. A rank that has not ended starts anew. The
    documents' `file_path`, which datatrove's readers set, names their sources.
    """

    type = "🔢 - TOKENIZER"
    name = "Samba shards"

    def __init__(self, output: ShardOutput) -> None:
        super().__init__()
        self.output = output

    def run(self, data: "DocumentsPipeline", rank: int = 0, world_size: int = 1) -> None:
        """Write the shards of rank `rank` of `world_size`. The documents end here.

        Raises DataError where the prefix holds something else, another process writes this rank's shards, a tokenizer
        gives ids outside its vocabulary, or the shards cannot be written.
        """
        tokenizer = self.output.encoder().load_tokenizer()
        prefix, part = self.output.prefix, Part(rank, world_size)
        identity = self.output.identity(tokenizer, ranks=world_size)
        if foreign := foreign_files(prefix, part, identity):
            raise DataError(
                f"{foreign[0]} exists already, and is no shard of this pipeline; choose another output prefix, or "
                "remove it"
            )
        with closing(ProgressLog(part.progress_path(prefix), identity, overwrite=False)) as log:
            log.restart()
            for path in shard_files(prefix, part):
                path.unlink()
            self._write(data, log, part, tokenizer)

    def _write(self, data: "DocumentsPipeline", log: ProgressLog, part: Part, tokenizer: Tokenizer) -> None:
        prefix = self.output.prefix
        shards = ShardSequence(
            log,
            shard_prefix=lambda number: part.shard_prefix(prefix, number),
            vocab_size=tokenizer.vocab_size,
            shard_tokens=self.output.shard_tokens,
            before_first_commit=lambda: None,
        )
        encoder: Encoder | None = None
        sources: list[str] = []
        try:
            for path, documents in groupby(data or (), lambda document: _source(document, part)):
                sources.append(path)
                for records in _batches(documents):
                    encoder = encoder or self._encoder(tokenizer, records)
                    with self.track_time("batch"):
                        batch = encoder.encode_records(records)
                        shards.add(len(sources) - 1, batch)
                    self.stat_update("tokens", value=int(batch.tokens.size), unit="batch")
                    self.stat_update("documents", value=int((batch.lengths > 0).sum()), unit="batch")
                    if batch.bad:
                        self.stat_update("malformed", value=len(batch.bad), unit="batch")
            shards.finish(Position(source=len(sources), position=0, record=0), sources)
        except OSError as error:
            raise DataError(
                f"rank {part.index} cannot write {prefix} or read its input: {error.strerror or error}; run it again"
            ) from error
        finally:
            shards.discard()
            log.remove_if_empty()

    def _encoder(self, tokenizer: Tokenizer, records: list[Document | BadRecord]) -> Encoder:
        """With the fast path where it is proven on texts of the rank's first batch."""
        texts = [record.text for record in records if isinstance(record, Document)]
        sample = [text[:_SAMPLE_CHARACTERS] for text in texts[:: max(len(texts) // _SAMPLES, 1)]]
        fast_path = None
        try:
            fast_path = FastPath.proven(tokenizer, sample)
        except NotProven as reason:
            logger.warning(f"this rank encodes the slow way: {reason}")
        return Encoder(self.output.encoder(), tokenizer, fast_path=fast_path)


def _source(document: "DatatroveDocument", part: Part) -> str:
    return str(document.metadata.get("file_path", f"rank {part.index} of {part.count}"))


def _batches(documents: Iterable["DatatroveDocument"]) -> Iterator[list[Document | BadRecord]]:
    """A file's documents as the encoder takes them, in lists of about _BATCH_CHARACTERS."""
    batch: list[Document | BadRecord] = []
    characters = 0
    for number, document in enumerate(documents):
        batch.append(_record(document.text, number))
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _record(text: str, number: int) -> Document | BadRecord:
    try:
        return Document(text, number, len(text.encode()))
    except UnicodeEncodeError as error:
        return BadRecord(f"character {error.start} is an unpaired surrogate", number, 0)


class JoinShards(PipelineStep):
    """Writes PREFIX.json over the shards of all ranks, in the order of the ranks. Runs as one task, after all of them.

    Run again after it has ended, it does nothing.
    """

    type = "🔢 - TOKENIZER"
    name = "Samba manifest"

    def __init__(self, output: ShardOutput, *, ranks: int) -> None:
        super().__init__()
        self.output = output
        self.ranks = ranks

    def run(self, data: "DocumentsPipeline" = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the manifest.

        Raises DataError for ranks that have not ended, a manifest of something else, and more than one task.
        """
        if world_size != 1:
            raise DataError(f"{world_size} tasks would write one manifest; give this pipeline one task")
        prefix, all_parts = self.output.prefix, Part(0, self.ranks)
        tokenizer = self.output.encoder().load_tokenizer()
        identity = self.output.identity(tokenizer, ranks=self.ranks)
        made = read_manifest(prefix)
        if made:
            if (made.tokenizer.sha256, made.options) != (identity.tokenizer_sha256, identity.options):
                raise DataError(f"{manifest_path(prefix)} was made in another way; choose another output prefix")
            remove_logs(prefix, all_parts)
            return
        missing = [part.index for part in all_parts.all() if not _ended(part.progress_path(prefix))]
        if missing:
            named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise DataError(
                f"{len(missing)} of {self.ranks} ranks have not ended ({named}); run their pipeline again before this"
            )
        manifest = merge_parts(
            prefix, part=all_parts, run=identity, files=[], tokenizer=tokenizer_entry(tokenizer, prefix)
        )
        assert manifest is not None, "every rank has ended"
        self._count(manifest)

    def _count(self, manifest: Manifest) -> None:
        self.stat_update("shards", value=len(manifest.shards), unit="manifest")
        self.stat_update("tokens", value=sum(shard.tokens for shard in manifest.shards), unit="manifest")


def _ended(path: Path) -> bool:
    progress = read_progress(path)
    return progress is not None and progress.complete


class KeepLanguage(BaseFilter):
    """Keeps documents that py3langid, whose model comes with the package, takes for a language.

    language: two letters of ISO 639-1.
    threshold: the least probability, of all languages that the model knows.
    """

    name = "🌍 py3langid"
    _requires_dependencies = ("py3langid",)

    def __init__(self, language: str, *, threshold: float) -> None:
        super().__init__()
        self.language = language
        self.threshold = threshold
        self._identifier: Any = None

    def filter(self, doc: "DatatroveDocument") -> bool | tuple[bool, str]:
        """Whether a document stays. A rank loads the model at its first document.

        Raises DataError for a language that the model does not know.
        """
        if self._identifier is None:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier

            self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
            if self.language not in self._identifier.labels:
                known = ", ".join(sorted(self._identifier.labels))
                raise DataError(f"py3langid does not know the language {self.language!r}; it knows {known}")
        language, probability = self._identifier.classify(doc.text)
        if language == self.language and probability >= self.threshold:
            return True
        return False, f"language_{language}" if language != self.language else "language_unsure"
