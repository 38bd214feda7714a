"""tiktoken's rank files as Hugging Face's tokenizers, with the same ids for every text.

tiktoken joins, of all neighbours, those that make the token of the lowest rank. Hugging Face's BPE has a list of pairs
instead: here every way to make a token of two, in the order of the tokens' ranks.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from .errors import HFError

# Of a regular expression: an escape, a class, the possessive repetition of a counted atom, or any other character.
_ATOM = r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\\[\](){}|*+?$^]"
_PARTS = re.compile(
    rf"(?P<counted>(?P<atom>{_ATOM})(?P<count>\{{\d+(?:,\d*)?\}})\+)|(?P<atom2>{_ATOM})|(?P<other>.)", re.S
)


@dataclass(frozen=True)
class TiktokenFile:
    """A rank file and what it does not say.

    Args:
        path: the file, each line a token in base64 and its rank.
        pattern: the regular expression that splits a text first.
        special_tokens: control tokens and their ids.
    """

    path: Path
    pattern: str
    special_tokens: Mapping[str, int]

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """The rank of each token. Raises HFError for a file that is no rank file."""
        try:
            lines = [line.split() for line in self.path.read_bytes().splitlines() if line]
            return {base64.b64decode(token): int(rank) for token, rank in lines}
        except (OSError, ValueError) as error:
            raise HFError(f"the tokenizer {self} cannot be read ({error}); give a tiktoken rank file") from error

    def encoding(self) -> Any:
        """Returns tiktoken's own."""
        import tiktoken

        return tiktoken.Encoding(
            self.path.stem,
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens=dict(self.special_tokens),
        )


def convert_tiktoken(file: TiktokenFile) -> Tokenizer:
    """Returns the equivalent of a rank file, with its control tokens, which stay text in texts.

    Raises:
        HFError: it has none.
    """
    alphabet = byte_letters()
    written = {token: "".join(alphabet[byte] for byte in token) for token in file.ranks}
    vocabulary = {written[token]: rank for token, rank in file.ranks.items()}
    taken = set(vocabulary) & set(file.special_tokens)
    if taken:
        raise HFError(f"the tokenizer {file} has the control token {min(taken)!r} as a token, too: rename one of them")
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(file.ranks, key=file.ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in file.ranks and token[cut:] in file.ranks
    ]
    model = models.BPE(vocab=vocabulary | dict(file.special_tokens), merges=merges)
    # tiktoken takes a piece that is a token as it is. Pairs give all tokens of an ordinary file; where they do not,
    # pieces are looked up first, among which the names of control tokens are then found as well.
    model.ignore_merges = any(len(model.tokenize(letters)) != 1 for letters in written.values())
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(oniguruma_pattern(file.pattern)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(file.special_tokens, key=file.special_tokens.__getitem__)
    tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_letters() -> list[str]:
    """Returns the letter that GPT-2's alphabet has for each byte."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in seen}
    others = (byte for byte in range(0x100) if byte not in letters)
    letters |= {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(0x100)]


def oniguruma_pattern(pattern: str) -> str:
    """Returns a pattern of tiktoken's regular expressions for those of tokenizers, which read two things differently.

    There `$` and `^` also match at line breaks, and `{1,3}+` repeats the repetition instead of being possessive.
    """
    ends = {"$": r"\z", "^": r"\A"}

    def rewritten(part: re.Match[str]) -> str:
        if part["counted"]:
            return f"(?>{part['atom']}{part['count']})"
        return ends.get(part[0], part[0])

    return _PARTS.sub(rewritten, pattern)
