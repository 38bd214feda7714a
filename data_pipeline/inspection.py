"""What a prefix holds, for people to read: statistics, single documents, and training samples with their documents."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataError
from .loss_mask import mask_bytes, mask_path, unpacked
from .shards import Manifest, ShardIndex, check_shard, check_tokenizer, read_manifest, shard_prefixes
from .tokenizer import Tokenizer
from .tokenizer_formats import load_tokenizer

_CHUNK_TOKENS = 1 << 24
_OPEN, _CLOSE = "[[", "]]"  # around what counts in the loss
_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")  # how SentencePiece writes the bytes of unknown characters
_FREQUENT, _BAR_WIDTH = 15, 40


@dataclass(frozen=True)
class Statistics:
    """Counts and lengths over all documents of a prefix.

    `histogram` counts documents by their number of tokens: entry n those of 2**n to 2**(n+1) - 1. `frequencies`, int64
    [highest id + 1], counts the ids of the first `counted_tokens`. `text_bytes` is None where no manifest knows it.
    """

    documents: int
    tokens: int
    shards: int
    dtype: str
    mean_tokens: float
    median_tokens: float
    longest_tokens: int
    text_bytes: int | None
    histogram: list[int]
    frequencies: np.ndarray
    counted_tokens: int


class Inspector:
    """Reads one prefix. Opens the tokenizer that its manifest names unless another is given."""

    def __init__(self, prefix: str | Path, *, tokenizer: str | Path | None = None) -> None:
        """Raises DataError where the data is missing or damaged, or a given tokenizer is not one."""
        self.prefix = str(prefix)
        self.manifest: Manifest | None = read_manifest(prefix)
        self._shards: list[ShardIndex] = [check_shard(path) for path in shard_prefixes(prefix)]
        path = Path(tokenizer) if tokenizer else self._named_tokenizer()
        # Statistics need no tokenizer, so one that has moved is only missed where text is asked for.
        self._tokenizer = load_tokenizer(path) if path and (tokenizer or path.is_file()) else None
        if self._tokenizer:
            check_tokenizer(prefix, self._tokenizer)

    def _named_tokenizer(self) -> Path | None:
        return Path(self.prefix).parent / self.manifest.tokenizer.path if self.manifest else None

    def statistics(
        self, *, max_counted_tokens: int = 10**9, progress: Callable[[int, int | None], None] | None = None
    ) -> Statistics:
        """Statistics of all documents; frequencies of `max_counted_tokens` ids, because all may be a day's reading.

        `progress` receives (tokens counted, tokens to count).
        """
        lengths = np.concatenate([shard.lengths for shard in self._shards])
        tokens = int(lengths.sum(dtype=np.int64))
        to_count = min(tokens, max_counted_tokens)
        frequencies, counted = np.zeros(0, dtype=np.int64), 0
        for shard in self._shards:
            ids = np.memmap(f"{shard.prefix}.bin", dtype=shard.dtype, mode="r")
            for start in range(0, len(ids), _CHUNK_TOKENS):
                chunk = ids[start : start + min(_CHUNK_TOKENS, to_count - counted)]
                found = np.bincount(chunk, minlength=len(frequencies))
                found[: len(frequencies)] += frequencies
                frequencies, counted = found, counted + len(chunk)
                if progress:
                    progress(counted, to_count)
                if counted == to_count:
                    break
            if counted == to_count:
                break
        entries = self.manifest.shards if self.manifest else []
        text_bytes = [entry.text_bytes for entry in entries if entry.text_bytes is not None]
        return Statistics(
            documents=len(lengths),
            tokens=tokens,
            shards=len(self._shards),
            dtype=str(self._shards[0].dtype),
            mean_tokens=float(lengths.mean()),
            median_tokens=float(np.median(lengths)),
            longest_tokens=int(lengths.max()),
            text_bytes=sum(text_bytes) if self.manifest and len(text_bytes) == len(entries) else None,
            histogram=np.bincount(np.log2(lengths).astype(np.int64)).tolist(),
            frequencies=frequencies,
            counted_tokens=counted,
        )

    def describe(self, found: Statistics) -> str:
        """Statistics as lines of text."""
        lines = [
            f"{self.prefix}: {found.documents:,} documents, {found.tokens:,} tokens ({found.dtype}), "
            f"{found.shards:,} shard{'s' * (found.shards != 1)}"
        ]
        if self.manifest:
            made_by = self.manifest.tokenizer
            lines.append(f"tokenizer            {made_by.path}, {made_by.kind}, {made_by.vocab_size:,} ids")
        if found.text_bytes is not None:
            bytes_a_token = found.text_bytes / found.tokens
            lines.append(f"text                 {found.text_bytes / 1e6:,.1f} MB, {bytes_a_token:.2f} bytes a token")
        lines.append(
            f"tokens a document    mean {found.mean_tokens:,.1f}, median {found.median_tokens:,.0f}, "
            f"longest {found.longest_tokens:,}"
        )
        if self.manifest:
            lines.append(
                f"left out             {self.manifest.skipped_documents:,} empty, "
                f"{self.manifest.malformed_documents:,} malformed documents"
            )
        lines += ["", "documents by tokens", *self._histogram(found.histogram)]
        lines += ["", f"most frequent of {found.counted_tokens:,} tokens", *self._frequent(found)]
        return "\n".join(lines)

    def _histogram(self, counts: list[int]) -> list[str]:
        first, most = int(np.flatnonzero(counts)[0]), max(counts)
        return [
            f"{2**number:>11,} to {2 ** (number + 1) - 1:>11,} {count:>13,} {'#' * round(_BAR_WIDTH * count / most)}"
            for number, count in enumerate(counts)
            if number >= first
        ]

    def _frequent(self, found: Statistics) -> list[str]:
        lines = []
        for token_id in np.argsort(-found.frequencies, kind="stable")[:_FREQUENT].tolist():
            if count := int(found.frequencies[token_id]):
                piece = repr(self._tokenizer.piece(token_id)) if self._tokenizer else ""
                lines.append(f"{token_id:>11} {count:>15,} {count / found.counted_tokens:>7.2%} {piece}")
        return lines

    def document(self, number: int) -> str:
        """One document, counted from 0 over all shards, as text between lines that say where it lies.

        Raises DataError where there is no such document, or no tokenizer.
        """
        left = number
        for shard in self._shards:
            if 0 <= left < len(shard.lengths):
                start = int(shard.lengths[:left].sum(dtype=np.int64))
                ids = np.memmap(f"{shard.prefix}.bin", dtype=shard.dtype, mode="r")[start:][: shard.lengths[left]]
                place = (
                    f"document {left} of {shard.prefix}, {len(ids):,} tokens from byte {start * shard.dtype.itemsize}"
                )
                counts = self._counts(shard, start, len(ids))
                shown, end = self.text(ids), self._end(ids)
                if counts is not None:
                    shown, end = (
                        self._marked(ids, counts),
                        f"{end}; {int(counts.sum()):,} tokens count, in {_OPEN} {_CLOSE}",
                    )
                return f"--- document {number}: {place}\n{shown}\n--- {end}"
            left -= len(shard.lengths)
        documents = sum(len(shard.lengths) for shard in self._shards)
        raise DataError(f"{self.prefix} has no document {number}: its {documents:,} documents are numbered from 0")

    def _counts(self, shard: ShardIndex, start: int, count: int) -> np.ndarray | None:
        """Which tokens of a shard count in the loss, bool [count]; None where it has no mask."""
        path = mask_path(shard.prefix)
        if not path.exists():
            return None
        first = start // 8
        content = np.memmap(path, dtype=np.uint8, mode="r")[first : mask_bytes(start + count)].tobytes()
        return unpacked(content, first=start - 8 * first, count=count)

    def _marked(self, ids: np.ndarray, counts: np.ndarray) -> str:
        """The text of ids, with marks around what counts in the loss."""
        bounds = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(ids)]
        parts = []
        for begin, end in itertools.pairwise(bounds):
            text = self._exact(ids[begin:end])
            parts.append(f"{_OPEN}{text}{_CLOSE}" if counts[begin] else text)
        return "".join(parts)

    def _exact(self, ids: np.ndarray) -> str:
        """The text of ids with first space and control tokens, where the tokenizer writes them in its pieces."""
        tokenizer = self._decoder()
        if tokenizer.kind != "sentencepiece":
            return tokenizer.decode(ids.tolist())
        pieces = "".join(map(tokenizer.piece, ids.tolist())).replace("\u2581", " ")
        return _BYTES.sub(
            lambda found: bytes.fromhex(found[0][1:-1].replace("><", "").replace("0x", "")).decode(errors="replace"),
            pieces,
        )

    def _end(self, ids: np.ndarray) -> str:
        return "end-of-text" if len(ids) and ids[-1] == self._decoder().eos_id else "no end-of-text"

    def sample(self, tokens: np.ndarray, document_starts: np.ndarray) -> str:
        """A training sample, tokens [S] and for each where its document begins [S], as text, a part a document."""
        begins = np.flatnonzero(np.diff(document_starts, prepend=document_starts[0] - 1))
        parts = []
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            cut = " (perhaps from within a document)" if begin == 0 else ""
            parts.append(f"--- tokens {begin} to {end - 1}{cut}\n{self.text(tokens[begin:end])}")
        return "\n".join([*parts, f"--- {len(parts)} document{'s' * (len(parts) != 1)} in {len(tokens):,} tokens"])

    def text(self, ids: np.ndarray) -> str:
        """The text of ids, without the end-of-text. Raises DataError without a tokenizer, and for ids it lacks."""
        tokenizer = self._decoder()
        if len(ids) and (highest := int(ids.max())) >= tokenizer.vocab_size:
            raise DataError(
                f"{self.prefix} holds token id {highest}, beyond the {tokenizer.vocab_size} of {tokenizer.path}: "
                "name the tokenizer of this data"
            )
        return tokenizer.decode([token for token in ids.tolist() if token != tokenizer.eos_id])

    def _decoder(self) -> Tokenizer:
        if self._tokenizer is None:
            named = self._named_tokenizer()
            raise DataError(f"the tokenizer of {self.prefix} ({named or 'none is named'}) is missing: give its path")
        return self._tokenizer
