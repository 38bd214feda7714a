"""Documents made from a seed whose last words can only be known by looking back: passkeys and phone books.

The passkey's text is that of Landmark Attention (arXiv 2305.16300), the phone book's task that of Jelassi et al.
(arXiv 2402.01032). The paper of Samba fine-tunes on both (arXiv 2406.07522).
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from .encoding import FastPath, NotProven
from .errors import DataError
from .loss_mask import counts_of_parts
from .output import shard_files
from .parts import Part
from .shards import (
    Manifest,
    ShardEntry,
    ShardWriter,
    SourceEntry,
    SourceRange,
    manifest_path,
    tokenizer_entry,
    write_manifest,
)
from .tokenizer import Tokenizer
from .tokenizer_formats import load_tokenizer

Parts = list[tuple[str, bool]]
"""A document's text in parts, each with whether it is an answer."""

PASSKEY_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)
PASSKEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION = "What is the pass key? The pass key is"
PHONEBOOK_HEADER = "Numbers from the phonebook above:"
PASSKEY_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# fmt: off
_GIVEN_NAMES = (
    "Ada", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis", "Marta",
    "Nils", "Olga", "Pedro", "Rosa", "Simon", "Tessa", "Urban", "Vera", "Wanda", "Xenia", "Yusuf", "Zoe", "Amir",
    "Berta", "Cyril", "Dora", "Emil", "Fiona", "Gustav", "Hanna", "Ivan", "Julia", "Kurt", "Lena", "Mario", "Nadia",
    "Oscar",
)
_FAMILY_NAMES = (
    "Adler", "Brandt", "Cohen", "Dubois", "Evans", "Fischer", "Garcia", "Hansen", "Ito", "Jensen", "Keller", "Lopez",
    "Moreau", "Novak", "Olsen", "Pavlov", "Quinn", "Rossi", "Silva", "Torres", "Ueda", "Vogel", "Weber", "Xu",
    "Yilmaz", "Zeller", "Archer", "Baker", "Carter", "Dawson", "Ellis", "Foster", "Grant", "Harper", "Irving",
)
# fmt: on
_INITIALS = tuple(f"{first}. {second}. " for first in "ABCDEFGHIJKLMNOPRSTW" for second in "ABCDEFGHIJKLMNOPRSTW")
_NAMES_WITHOUT_INITIAL = len(_GIVEN_NAMES) * len(_FAMILY_NAMES) // 2
_SHOTS = 2  # questions with answers before the last one
_BATCH_DOCUMENTS = 64


class Maker(ABC):
    """Makes documents of any size; a subclass says of what. `least` is the fewest units that one must have."""

    least: int

    @abstractmethod
    def document(self, draw: random.Random, size: int) -> Parts:
        """A document with `size` units of what fills it."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


class Passkey(Maker):
    """A key of five digits at a uniform depth between sentences that say nothing, and the question for it.

    The last sentence ends anywhere, as in texts of an exact length: a small model that never read a cut one finds few
    keys in these.
    """

    least = 0

    def document(self, draw: random.Random, size: int) -> Parts:
        key, depth = draw.randrange(10_000, 100_000), draw.randint(0, size)
        *filler, last = [PASSKEY_FILLER[number % len(PASSKEY_FILLER)] for number in range(size + 1)]
        end = last[: draw.randrange(len(last))].rstrip()
        hidden = PASSKEY_LINE.format(key=key)
        lines = [PASSKEY_TASK, " ".join(filler[:depth]), hidden, " ".join([*filler[depth:], *([end] if end else [])])]
        text = "\n".join(line for line in lines if line)
        return [(f"{text}\n{PASSKEY_QUESTION}", False), (f" {key}.", True)]


class Phonebook(Maker):
    """Names with numbers of ten digits, and some of them once more with their numbers to tell."""

    least = _SHOTS + 1

    def document(self, draw: random.Random, size: int) -> Parts:
        chosen: dict[str, None] = {}
        while len(chosen) < size:
            initial = draw.choice(_INITIALS) if size > _NAMES_WITHOUT_INITIAL else ""
            chosen[f"{draw.choice(_GIVEN_NAMES)} {initial}{draw.choice(_FAMILY_NAMES)}"] = None
        numbers = {name: str(draw.randrange(10**9, 10**10)) for name in chosen}
        text = "\n".join(f"{name}: {number}" for name, number in numbers.items()) + "\n"
        parts: Parts = []
        before = f"{text}\n{PHONEBOOK_HEADER}"
        for name in draw.sample(list(chosen), _SHOTS + 1):
            parts += [(f"{before}\n{name}:", False), (f" {numbers[name]}", True)]
            before = ""
        return parts


@dataclass(frozen=True)
class MadeConfig:
    """Which documents to make.

    tokens: each document's length at most, its end-of-text included; it is filled as far as whole units go.
    loss: whether only the answers count in the loss, or all tokens.
    """

    tokenizer: Path
    documents: int
    tokens: int
    seed: int = 0
    loss: Literal["answer", "all"] = "answer"
    shard_tokens: int = 2**30


def make_documents(
    maker: Maker,
    config: MadeConfig,
    output_prefix: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Manifest:
    """Writes shards of made documents and their manifest; the same bytes for the same config.

    `progress` receives (documents written, documents).
    Raises DataError where a document of its least size does not fit, or the output is there without `overwrite`.
    """
    there = [path for path in (manifest_path(output_prefix), *shard_files(output_prefix, Part())) if path.exists()]
    if there and not overwrite:
        raise DataError(f"{there[0]} exists already; choose another output prefix, or overwrite it")
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.eos_id < 0:
        raise DataError(f"the tokenizer {config.tokenizer} names no EOS, which ends each document: take another")
    writer = _Writer(maker, config, tokenizer)
    try:
        shards = writer.write(output_prefix, replaced=there, progress=progress)
    except OSError as error:
        raise DataError(f"cannot write {output_prefix}: {error.strerror or error}; make room") from error
    manifest = Manifest(
        tokenizer=tokenizer_entry(tokenizer, output_prefix),
        shards=shards,
        skipped_documents=0,
        sources=[SourceEntry(path=f"made: {maker.name}, seed {config.seed}", records=config.documents)],
        options={
            "made": maker.name,
            "documents": config.documents,
            "tokens": config.tokens,
            "seed": config.seed,
            "loss": config.loss,
        },
    )
    write_manifest(output_prefix, manifest)
    return manifest


class _Writer:
    """Fits documents to their length, encodes and writes them."""

    def __init__(self, maker: Maker, config: MadeConfig, tokenizer: Tokenizer) -> None:
        self._maker, self._config, self._tokenizer = maker, config, tokenizer
        self._size = self._largest_size()
        try:
            example = "".join(text for text, _ in maker.document(random.Random(0), self._size))
            self._encode: Callable[[list[str]], list[list[int]]] = _fast(FastPath.proven(tokenizer, [example]))
        except NotProven:
            self._encode = tokenizer.encode_batch

    def _largest_size(self) -> int:
        """Units that fit an average document. Raises DataError where the least do not."""
        low, high = self._maker.least, self._maker.least + 1
        if not self._fits(low):
            raise DataError(
                f"a {self._maker.name} document of {self._config.tokens} tokens has no room for what it must hold, "
                f"{self._length(low)} tokens: give more tokens a document"
            )
        while self._fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle)
        return low

    def _fits(self, size: int) -> bool:
        return self._length(size) <= self._config.tokens

    def _length(self, size: int) -> int:
        parts = self._maker.document(random.Random(0), size)
        return len(self._tokenizer.encode("".join(text for text, _ in parts))) + 1

    def write(
        self, prefix: Path, *, replaced: list[Path], progress: Callable[[int, int | None], None] | None
    ) -> list[ShardEntry]:
        masked = self._config.loss == "answer"
        entries: list[ShardEntry] = []
        writer: ShardWriter | None = None
        first = 0
        try:
            for number, (ids, counts) in enumerate(self._documents()):
                if writer and writer.tokens + len(ids) > self._config.shard_tokens:
                    entries.append(self._committed(writer, replaced, first=first, stop=number))
                    writer, first = None, number
                if writer is None:
                    shard = prefix.with_name(f"{prefix.name}_{len(entries):05d}")
                    writer = ShardWriter(shard, self._tokenizer.vocab_size, masked=masked)
                writer.add(np.array(ids), np.array(counts) if masked else None)
                if progress:
                    progress(number + 1, self._config.documents)
            assert writer is not None, "there is at least one document"
            entries.append(self._committed(writer, replaced, first=first, stop=self._config.documents))
            writer = None
        finally:
            if writer:
                writer.discard()
        return entries

    def _committed(self, writer: ShardWriter, replaced: list[Path], *, first: int, stop: int) -> ShardEntry:
        entry = writer.finish()
        while replaced:  # the manifest first, so that none ever describes other shards
            replaced.pop(0).unlink(missing_ok=True)
        writer.commit()
        return entry.model_copy(update={"sources": [SourceRange(source=0, first=first, records=stop - first)]})

    def _documents(self) -> Iterator[tuple[list[int], list[bool]]]:
        """Document n depends on the seed and n alone."""
        for first in range(0, self._config.documents, _BATCH_DOCUMENTS):
            numbers = range(first, min(first + _BATCH_DOCUMENTS, self._config.documents))
            sizes = dict.fromkeys(numbers, self._size)
            done: dict[int, tuple[list[int], list[bool]]] = {}
            while len(done) < len(numbers):
                left = [number for number in numbers if number not in done]
                made = [self._maker.document(random.Random(f"{self._config.seed} {n}"), sizes[n]) for n in left]
                for number, found in zip(left, self._encoded(made), strict=True):
                    if len(found[0]) <= self._config.tokens or sizes[number] == self._maker.least:
                        done[number] = found
                    sizes[number] -= 1
            yield from (done[number] for number in numbers)

    def _encoded(self, documents: list[Parts]) -> list[tuple[list[int], list[bool]]]:
        """Ids and what counts of each; a token across parts is the later part's."""
        texts = [text for parts in documents for text in accumulate(text for text, _ in parts)]
        encoded = iter(self._encode(texts))
        found = []
        for parts in documents:
            prefixes = [next(encoded) for _ in parts]
            counts = counts_of_parts(prefixes, [is_answer for _, is_answer in parts])
            found.append(([*prefixes[-1], self._tokenizer.eos_id], [*counts, True]))
        return found


def _fast(path: FastPath) -> Callable[[list[str]], list[list[int]]]:
    def encode(texts: list[str]) -> list[list[int]]:
        ids, counts = path.encode(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]

    return encode
