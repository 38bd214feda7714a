"""Tokenizers by what their files are: SentencePiece's, Hugging Face's and tiktoken's, each by its own library."""

import base64
import functools
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import sentencepiece

from .errors import DataError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import gigatoken
    import tokenizers

_GIVE = "; give a file that `sambalm data tokenizer` wrote, a tokenizer.json or a .tiktoken file"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, by SentencePiece itself."""

    kind = "sentencepiece"
    splits_by_unicode = False

    def __init__(self, path: Path, *, special_tokens: bool = False) -> None:
        """Raises DataError where the file is no such model, or special tokens are to be read from texts."""
        super().__init__(path)
        if special_tokens:
            raise DataError(
                f"SentencePiece never reads special tokens out of a text, so {path} cannot; leave special_tokens off, "
                "or use a Hugging Face tokenizer.json"
            )
        content = path.read_bytes()
        if not content:  # SentencePiece takes an empty file for a model, and logs to stderr when asked
            raise DataError(f"the tokenizer {path} is not a SentencePiece model (an empty file){_GIVE}")
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise DataError(f"the tokenizer {path} is not a SentencePiece model{_GIVE}") from error
        self._processor = processor
        self._content = content
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()

    @functools.cached_property
    def literals(self) -> frozenset[str]:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        proto = ModelProto.FromString(self._content)
        kinds = type(proto.pieces[0])
        return frozenset(piece.piece for piece in proto.pieces if piece.type not in (kinds.NORMAL, kinds.BYTE))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def id_of(self, token: str) -> int:
        token_id = self._processor.piece_to_id(token)
        return token_id if self._processor.id_to_piece(token_id) == token else -1

    def fast(self) -> "gigatoken.Tokenizer":
        import gigatoken

        return gigatoken.Tokenizer.from_sentencepiece(self._content)


# Tried in this order where nothing beside the file names the token.
_END_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<eos>",
    "<EOT>",
)
_BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<bos>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. Its EOS is the one of tokenizer_config.json beside it, else a well-known one that it has."""

    kind = "huggingface"

    def __init__(self, path: Path, *, special_tokens: bool = False) -> None:
        """Raises DataError where the file is no tokenizer."""
        # Worker processes share the cores already, and a pool of threads does not survive a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        super().__init__(path)
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower one
            raise DataError(f"the tokenizer {path} is not a Hugging Face tokenizer.json ({error})") from error
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = not special_tokens
        self._inner = inner
        self._encoding = inner if special_tokens else _without_special_pieces(path, inner)
        self._by_id = {token_id: token for token, token_id in inner.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._by_id) + 1
        self.eos_id = self._special("eos_token", _END_TOKENS)
        self.bos_id = self._special("bos_token", _BEGIN_TOKENS)

    @property
    def literals(self) -> frozenset[str]:
        return frozenset(token.content for token in self._inner.get_added_tokens_decoder().values())

    def _special(self, key: str, known: Iterable[str]) -> int:
        config = self.path.with_name("tokenizer_config.json")
        if config.is_file():
            try:
                token = json.loads(config.read_bytes()).get(key)
            except (ValueError, AttributeError) as error:
                raise DataError(f"{config} is not a JSON object ({error}); mend or remove it") from error
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return self.id_of(token)
        return next((self.id_of(token) for token in known if self.id_of(token) >= 0), -1)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encoding.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids, skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        return self._by_id.get(token_id, f"<{token_id}>")

    def id_of(self, token: str) -> int:
        token_id = self._inner.token_to_id(token)
        return -1 if token_id is None else token_id

    def fast(self) -> "gigatoken.Tokenizer":
        import gigatoken

        return gigatoken.Tokenizer.from_json(self.path.read_bytes())


# Models that may take a special token's text for a piece of theirs.
_WHOLE_PIECES = ("Unigram", "WordLevel", "WordPiece")


def _without_special_pieces(path: Path, inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """A tokenizer with the same ids that never finds a special token in a text, where the model itself would.

    Such a model has special tokens among its own pieces, which it looks up like any other. Here those pieces have names
    that no text can know of.
    """
    import tokenizers

    record = json.loads(path.read_bytes())
    model, added = record["model"], record.get("added_tokens") or []
    if model.get("type") not in _WHOLE_PIECES:
        return inner
    hidden = {token["content"] for token in added if token.get("special")} - {model.get("unk_token")}
    nonce = secrets.token_hex(16)

    def name(piece: str) -> str:
        return f"{piece}{nonce}" if piece in hidden else piece

    if isinstance(model["vocab"], dict):
        known, model["vocab"] = set(model["vocab"]), {name(piece): number for piece, number in model["vocab"].items()}
    else:
        known = {piece for piece, _ in model["vocab"]}
        model["vocab"] = [[name(piece), score] for piece, score in model["vocab"]]
    # The others keep their ids, which follow the model's in this order.
    record["added_tokens"] = [
        token for token in added if token["content"] not in hidden or token["content"] not in known
    ]
    found = tokenizers.Tokenizer.from_str(json.dumps(record))
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


@dataclass(frozen=True)
class _Scheme:
    """What a rank file does not say: how text is split first, the special tokens, and gigatoken's name for both."""

    pattern: str
    special_tokens: dict[str, int]
    fast_name: str | None = None


class TiktokenTokenizer(Tokenizer):
    """A .tiktoken rank file: one of OpenAI's by its name, any other with NAME.tiktoken.json beside it.

    That file holds {"pattern": REGEX, "special_tokens": {TOKEN: ID}}, which `pattern` and `special_tokens` then are.
    """

    kind = "tiktoken"

    def __init__(self, path: Path, *, special_tokens: bool = False) -> None:
        """Raises DataError where the file is no rank file or nothing says how text is split."""
        super().__init__(path)
        import tiktoken

        self._scheme = _scheme(path)
        try:
            lines = (line.split() for line in path.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            self._inner = tiktoken.Encoding(
                path.stem,
                pat_str=self._scheme.pattern,
                mergeable_ranks=ranks,
                special_tokens=self._scheme.special_tokens,
            )
        except Exception as error:  # ValueError for a bad line, a panic's message for a bad pattern
            raise DataError(f"the tokenizer {path} is not a tiktoken rank file ({error})") from error
        self._allowed: Literal["all"] | set[str] = "all" if special_tokens else set()
        self.pattern, self.special_tokens = self._scheme.pattern, self._scheme.special_tokens
        self.vocab_size = self._inner.n_vocab
        self.eos_id = next((self.id_of(token) for token in _END_TOKENS if self.id_of(token) >= 0), -1)
        self.bos_id = next((self.id_of(token) for token in _BEGIN_TOKENS if self.id_of(token) >= 0), -1)

    @property
    def literals(self) -> frozenset[str]:
        return frozenset(self._scheme.special_tokens)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._inner.encode(text, allowed_special=self._allowed, disallowed_special=()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        specials = self._scheme.special_tokens.values()
        return self._inner.decode([token for token in ids if token not in specials])

    def bytes_of(self, token_id: int) -> bytes:
        """What one id adds to the bytes that `decode` reads as UTF-8; nothing for special tokens and unknown ids."""
        if token_id in self._scheme.special_tokens.values():
            return b""
        try:
            return self._inner.decode_single_token_bytes(token_id)
        except KeyError:
            return b""

    def piece(self, token_id: int) -> str:
        try:
            return self._inner.decode_single_token_bytes(token_id).decode("utf-8", "backslashreplace")
        except KeyError:
            return f"<{token_id}>"

    def id_of(self, token: str) -> int:
        return self._scheme.special_tokens.get(token, -1)

    def fast(self) -> "gigatoken.Tokenizer":
        import gigatoken

        if self._scheme.fast_name is None:
            raise ValueError("its split pattern is not one of OpenAI's")
        return gigatoken.Tokenizer.from_tiktoken(
            self.path, pretokenizer=self._scheme.fast_name, special_tokens=self._scheme.special_tokens
        )


def _scheme(path: Path) -> _Scheme:
    beside = path.with_name(f"{path.name}.json")
    if beside.is_file():
        try:
            record = json.loads(beside.read_bytes())
            return _Scheme(str(record["pattern"]), {str(k): int(v) for k, v in record["special_tokens"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{beside} must hold {{"pattern": REGEX, "special_tokens": {{TOKEN: ID}}}} ({error!r})'
            ) from error
    scheme = _OPENAI.get(path.stem)
    if scheme is None:
        raise DataError(
            f"the rank file {path} does not say how text is split: name it as one of OpenAI's "
            f"({', '.join(_OPENAI)}), or write {beside.name} beside it with its pattern and special_tokens"
        )
    return scheme


_END = "<|endoftext|>"
# tiktoken_ext/openai_public.py (MIT), which would fetch the ranks themselves from the network.
_OPENAI = {
    "r50k_base": _Scheme(
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""", {_END: 50256}, "r50k"
    ),
    "cl100k_base": _Scheme(
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"""
        r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
        {
            _END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        "cl100k",
    ),
    "o200k_base": _Scheme(
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        {_END: 199999, "<|endofprompt|>": 200018},
        "o200k",
    ),
}

Format = type[SentencePieceTokenizer] | type[HuggingFaceTokenizer] | type[TiktokenTokenizer]
_FORMATS: dict[str, Format] = {".json": HuggingFaceTokenizer, ".tiktoken": TiktokenTokenizer}


def format_of(path: Path) -> Format:
    """What a tokenizer's file is, by its name: SentencePiece's unless the extension is another format's."""
    return _FORMATS.get(path.suffix, SentencePieceTokenizer)


def load_tokenizer(path: str | Path, *, eos_token: str | None = None, special_tokens: bool = False) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `.json` or a `.tiktoken` file.

    eos_token: the token that ends a document, where the file does not say it or another one is wanted.
    special_tokens: take special tokens written out in a text for what they name.
    Raises DataError if the file is missing or not what its extension says, or has no such token.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"the tokenizer {path} is a folder{_GIVE}")
    if not path.is_file():
        raise DataError(
            f"the tokenizer {path} does not exist; train one, or give the path of a SentencePiece model, a Hugging "
            "Face tokenizer.json or a .tiktoken file"
        )
    tokenizer = format_of(path)(path, special_tokens=special_tokens)
    if eos_token is not None:
        tokenizer.eos_id = tokenizer.id_of(eos_token)
        if tokenizer.eos_id < 0:
            raise DataError(f"the tokenizer {path} has no token {eos_token!r}; name the one that ends a document")
    return tokenizer
