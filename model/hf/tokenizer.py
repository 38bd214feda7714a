"""A tokenizer of training as Hugging Face's tokenizer files, with the same ids for every text.

A SentencePiece BPE model and a tiktoken rank file are converted, and a tokenizer.json is taken as it is, without what
would add tokens to a text. A SentencePiece model without an exact equivalent, such as every Unigram model, is read by
SentencePiece itself, through a class whose file lies in the folder.

No BOS and no EOS is added to a text, as in training, which puts an EOS after each document by itself. A literal "</s>"
in a text stays text: tokenizer_config.json sets split_special_tokens. With a chat template, whose control tokens are to
be recognised, it is off.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from . import tokenization_samba
from .errors import HFError
from .tiktoken import TiktokenFile, convert_tiktoken
from .tokenization_samba import SambaTokenizer

# Under the name that other tools look for; transformers takes tokenizer.json where there is one.
SENTENCEPIECE_FILE = "tokenizer.model"
JSON_SUFFIX = ".json"  # of a tokenizer.json's file; any other is a SentencePiece model
ODD_TEXTS = (
    "",
    " ",
    "  two spaces  and more   ",
    "\n\n\ttabs\r\nand lines\n",
    "</s><s><unk><|endoftext|> are text",
    "na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \ufb01 \uff21",
    "\u4f60\u597d\u3001\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \ud7ff\ue000\ufffd",
    "\u2581\u00a0\u200b\ufeff\u2028",
    "1234567890 3.14e-10 0x1F don't WE'LL",
    "    aaaaaaa =======    \n\n\n     \n -------------------------------- 000000000000",
)
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SAID = "Which mixers does a Samba have?"

TokenizerFile = Path | TiktokenFile
FolderTokenizer: TypeAlias = PreTrainedTokenizerFast | SambaTokenizer
Piece = ModelProto.SentencePiece
_SPACE = "\u2581"


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer's file says of itself.

    Attributes:
        vocab_size: the highest id plus one.
        ids: of the tokens bos, eos, unk and pad; None where there is none.
        names: how these tokens are written.
    """

    vocab_size: int
    ids: dict[str, int | None]
    names: dict[str, str]


def tokenizer_facts(path: TokenizerFile, *, given: Mapping[str, int | None] | None = None) -> TokenizerFacts:
    """
    Args:
        given: ids that training used, which take the place of the file's own.

    Raises:
        HFError: the file is neither a tokenizer.json nor a SentencePiece model.
    """
    if isinstance(path, TiktokenFile):
        by_id = dict.fromkeys(path.ranks.values(), "") | {index: name for name, index in path.special_tokens.items()}
        ids = dict.fromkeys(("bos", "eos", "unk", "pad"))
    elif path.suffix == JSON_SUFFIX:
        inner = _read_json(path)
        by_id = {index: token for token, index in inner.get_vocab(with_added_tokens=True).items()}
        ids = _ids_beside(path, inner)
    else:
        proto = read_model(path)
        by_id, ids = {index: piece.piece for index, piece in enumerate(proto.pieces)}, token_ids(proto)
    ids = ids | dict(given or {})
    if ids["pad"] is None:
        ids["pad"] = ids["eos"]
    names = {f"{name}_token": by_id[index] for name, index in ids.items() if index in by_id}
    return TokenizerFacts(max(by_id) + 1, ids, names)


class NoEquivalentError(HFError):
    """A SentencePiece model that no tokenizer.json gives the ids of."""


def save_tokenizer(path: TokenizerFile, folder: Path, *, given: Mapping[str, int | None] | None = None) -> None:
    """Writes tokenizer.json or the code of SambaTokenizer, tokenizer_config.json, and a copy of a SentencePiece model.

    Raises HFError for a file that is no tokenizer; `folder` exists, and `given` is that of `tokenizer_facts`.
    """
    inner: Tokenizer | None = None
    if isinstance(path, TiktokenFile):
        inner = convert_tiktoken(path)
    elif path.suffix == JSON_SUFFIX:
        inner = _read_json(path)
        if inner.encode("").ids:  # of the tokens that surround a text, training took none
            inner.post_processor = None
    else:
        with suppress(NoEquivalentError):
            inner = convert_tokenizer(read_model(path), source=path)
        (folder / SENTENCEPIECE_FILE).write_bytes(path.read_bytes())
    config = tokenizer_config(tokenizer_facts(path, given=given).names)
    if inner is not None:
        inner.save(str(folder / "tokenizer.json"))
    else:
        assert isinstance(path, Path)
        code = Path(tokenization_samba.__file__)
        shutil.copyfile(code, folder / code.name)
        config |= _class_by_name(code.stem) | {"added_tokens_decoder": _control_tokens(read_model(path))}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _class_by_name(module: str) -> dict[str, object]:
    """What tells transformers to read a folder's tokenizer by SambaTokenizer."""
    name = SambaTokenizer.__name__
    return {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"{module}.{name}", None]}}


def _control_tokens(proto: ModelProto) -> dict[str, dict[str, object]]:
    kinds = (Piece.CONTROL, Piece.UNKNOWN)
    content = {str(index): piece.piece for index, piece in enumerate(proto.pieces) if piece.type in kinds}
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {index: {"content": name, "special": True, **plain} for index, name in content.items()}


def _read_json(path: Path) -> Tokenizer:
    try:
        inner = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise HFError(f"the tokenizer {path} cannot be read ({_first_line(error)}); give a tokenizer.json") from error
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return inner


def _ids_beside(path: Path, inner: Tokenizer) -> dict[str, int | None]:
    """Returns the ids of the tokens that a tokenizer_config.json beside a tokenizer.json names."""
    beside = path.with_name("tokenizer_config.json")
    try:
        content = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        tokens = {name: content.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    except (OSError, ValueError, AttributeError) as error:
        raise HFError(f"{beside} cannot be read ({error}); mend or remove it") from error
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: inner.token_to_id(text) if isinstance(text, str) else None for name, text in texts.items()}


def save_chat_template(template: str, folder: Path) -> None:
    """Gives the tokenizer in a folder a chat template, and lets it recognise control tokens in texts.

    Raises:
        HFError: the template does not render a conversation.
    """
    (folder / CHAT_TEMPLATE_FILE).write_text(template, "utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) | {"split_special_tokens": False}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    tokenizer = load_tokenizer(folder)
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _SAID}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # jinja2's, or what a template raises by itself
        raise HFError(f"the chat template cannot be applied to a user's message ({_first_line(error)})") from error
    if _SAID not in text:
        raise HFError("the chat template leaves out what a user says: it must render the content of each message")


def read_model(path: Path) -> ModelProto:
    """The content of a `.model` file. Raises HFError if it is not one."""
    try:
        proto = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise HFError(f"the tokenizer {path} cannot be read ({error.strerror}); give a SentencePiece model") from error
    except DecodeError as error:
        raise HFError(f"the tokenizer {path} is not a SentencePiece model; give one or a tokenizer.json") from error
    if not proto.pieces:
        raise HFError(f"the tokenizer {path} has no pieces, so it is no SentencePiece model; give one")
    return proto


def token_ids(proto: ModelProto) -> dict[str, int | None]:
    """bos, eos, unk and pad. Without a piece for padding it is unk's where bytes stand for unknown characters, so that
    no text has it, and eos's otherwise."""
    spec = proto.trainer_spec
    ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    ids = {name: index if 0 <= index < len(proto.pieces) else None for name, index in ids.items()}
    if ids["pad"] is None:
        ids["pad"] = ids["unk"] if spec.byte_fallback else ids["eos"]
    return ids


def tokenizer_config(names: Mapping[str, str]) -> dict[str, object]:
    """The content of tokenizer_config.json, of the control tokens by their keys there."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        **names,
    }


def convert_tokenizer(proto: ModelProto, *, source: Path) -> Tokenizer:
    """The equivalent of a SentencePiece BPE model. `source` is for messages. Raises NoEquivalentError without one."""
    _refuse_unsupported(proto, source)
    pieces, spec = proto.pieces, proto.trainer_spec
    vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(proto, vocabulary, source),
            unk_token=pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto.normalizer_spec)
    special = [piece.piece for piece in pieces if piece.type in (Piece.CONTROL, Piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(content, normalized=False, special=True) for content in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _refuse_unsupported(proto: ModelProto, source: Path) -> None:
    spec = proto.trainer_spec
    kinds = {piece.type for piece in proto.pieces}
    if spec.model_type != spec.BPE:
        # Of a Unigram model SentencePiece adds scores in fp32 and tokenizers in fp64: ways to split a text that are
        # equally likely, such as the pieces of a run of spaces in another order, are then told apart by rounding.
        name = spec.ModelType.Name(spec.model_type).lower()
        raise NoEquivalentError(
            f"the tokenizer {source} is a SentencePiece {name} model; only bpe models can be converted"
        )
    if spec.treat_whitespace_as_suffix:
        raise NoEquivalentError(
            f"the tokenizer {source} has treat_whitespace_as_suffix, which has no equivalent; train without it"
        )
    if Piece.USER_DEFINED in kinds or Piece.UNUSED in kinds:
        raise NoEquivalentError(
            f"the tokenizer {source} has user-defined or unused pieces, which have no exact equivalent; leave them out"
        )


def _merges(proto: ModelProto, vocabulary: dict[str, int], source: Path) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best score first.

    SentencePiece joins the neighbours that make the piece of the best score, whichever neighbours they are. It also
    joins characters that are no pieces themselves, which Hugging Face's BPE cannot.
    """
    normal = [i for i, piece in enumerate(proto.pieces) if piece.type == Piece.NORMAL]
    known = {proto.pieces[i].piece for i in normal}
    merges = []
    for index in sorted(normal, key=lambda i: (-proto.pieces[i].score, i)):
        piece = proto.pieces[index].piece
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            missing = next((part for part in (left, right) if part not in known), None)
            if missing is None:
                merges.append((left, right))
            elif len(missing) == 1 and (right if missing == left else left) in known | {missing}:
                raise NoEquivalentError(
                    f"the tokenizer {source} joins the character {missing!r} into {piece!r} but has no piece for it; "
                    "such a model cannot be converted"
                )
    return merges


def _normalizer(spec: Any) -> normalizers.Normalizer | None:
    steps: list[normalizers.Normalizer] = []
    space = _SPACE if spec.escape_whitespaces else " "
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps) if steps else None


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)


def load_tokenizer(folder: Path) -> FolderTokenizer:
    """The tokenizer of a model folder, without executing any code of it. Raises HFError if it has none."""
    by_sentencepiece = _tokenizer_class(folder) == SambaTokenizer.__name__
    kind, file = (
        (SambaTokenizer, SENTENCEPIECE_FILE) if by_sentencepiece else (PreTrainedTokenizerFast, "tokenizer.json")
    )
    if not (folder / file).is_file():
        raise HFError(f"the folder {folder} has no {file}; give a folder that was exported with its tokenizer")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise HFError(f"the tokenizer in {folder} cannot be loaded ({_first_line(error)}); export it again") from error


def _tokenizer_class(folder: Path) -> str | None:
    """Returns what tokenizer_config.json says, None where it says nothing."""
    try:
        return json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None


def compare_tokenizers(path: TokenizerFile, hf_dir: Path, documents: Iterable[str]) -> None:
    """Raises HFError with the first text whose ids, or whose text decoded from them, differ between the two.

    Args:
        path: the tokenizer of training.
        documents: are compared after ODD_TEXTS and the names of control tokens.
    """
    encode, decode, is_lossless = _of_training(path)
    tokenizer = load_tokenizer(hf_dir)
    tokenizer.split_special_tokens = True  # as in training, whatever a chat template asks for
    controls = tuple(path.special_tokens) if isinstance(path, TiktokenFile) else ()
    odd = (*ODD_TEXTS, *controls, "".join(controls), "".join(f" {name}" for name in controls))
    for number, text in enumerate((*odd, *documents), start=-len(odd)):
        place = f"document {number}" if number >= 0 else "an odd text"
        expected, given = encode(text), tokenizer.encode(text)
        if given != expected:
            raise HFError(
                f"the converted tokenizer differs from {path} in {place} "
                f"({_difference(given, expected)}): {_excerpt(text)}"
            )
        if is_lossless(expected) and tokenizer.decode(given, skip_special_tokens=True) != decode(expected):
            raise HFError(f"the converted tokenizer decodes {place} differently from {path}: {_excerpt(text)}")


def _of_training(
    path: TokenizerFile,
) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str], Callable[[list[int]], bool]]:
    """Returns a tokenizer's encode and decode, and whether ids decode to the text that they were made of."""
    if isinstance(path, TiktokenFile):
        encoding = path.encoding()
        return lambda text: encoding.encode(text, disallowed_special=()), encoding.decode, lambda ids: True
    if path.suffix == JSON_SUFFIX:
        inner = _read_json(path)
        return lambda text: inner.encode(text, add_special_tokens=False).ids, inner.decode, lambda ids: True
    processor = sentencepiece.SentencePieceProcessor(model_proto=read_model(path).SerializeToString())
    # SentencePiece writes a sign of its own for unknown characters.
    return processor.encode, processor.decode, lambda ids: processor.unk_id() not in ids


def _difference(given: Sequence[int], expected: Sequence[int]) -> str:
    pairs = zip(given, expected, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(expected)))
    return f"token {place}: {list(given[place : place + 3])} instead of {list(expected[place : place + 3])}"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
