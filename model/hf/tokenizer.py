"""A SentencePiece BPE model as Hugging Face's tokenizer files, with the same ids for every text.

No BOS and no EOS is added to a text, as in training, which puts an EOS after each document by itself. A literal "</s>"
in a text stays text: tokenizer_config.json sets split_special_tokens. With a chat template, whose control tokens are to
be recognised, it is off.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from .errors import HFError

# Under the name that other tools look for; transformers takes tokenizer.json where there is one.
SENTENCEPIECE_FILE = "tokenizer.model"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_SAID = "Which mixers does a Samba have?"

Piece = ModelProto.SentencePiece
_SPACE = "\u2581"


def save_tokenizer(model: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and a copy of the SentencePiece model into an existing folder.

    Raises HFError for a file that is not a SentencePiece BPE model or has features without an exact equivalent.
    """
    proto = read_model(model)
    convert_tokenizer(proto, source=model).save(str(folder / "tokenizer.json"))
    config = tokenizer_config(proto)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / SENTENCEPIECE_FILE).write_bytes(model.read_bytes())


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
        raise HFError(f"the tokenizer {path} is not a SentencePiece model; give a .model file") from error
    if not proto.pieces:
        raise HFError(f"the tokenizer {path} has no pieces, so it is no SentencePiece model; give a .model file")
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


def tokenizer_config(proto: ModelProto) -> dict[str, object]:
    """The content of tokenizer_config.json."""
    tokens = {f"{name}_token": proto.pieces[i].piece for name, i in token_ids(proto).items() if i is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        **tokens,
    }


def convert_tokenizer(proto: ModelProto, *, source: Path) -> Tokenizer:
    """The equivalent of a SentencePiece BPE model. `source` is for messages. Raises HFError if there is none."""
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
        name = spec.ModelType.Name(spec.model_type).lower()
        raise HFError(f"the tokenizer {source} is a SentencePiece {name} model; only bpe models can be converted")
    if spec.treat_whitespace_as_suffix:
        raise HFError(
            f"the tokenizer {source} has treat_whitespace_as_suffix, which has no equivalent; train without it"
        )
    if Piece.USER_DEFINED in kinds or Piece.UNUSED in kinds:
        raise HFError(
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
                raise HFError(
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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder. Raises HFError if it has none."""
    if not (folder / "tokenizer.json").is_file():
        raise HFError(f"the folder {folder} has no tokenizer.json; give a folder that was exported with its tokenizer")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise HFError(f"the tokenizer in {folder} cannot be loaded ({_first_line(error)}); export it again") from error


def compare_tokenizers(sp_model: Path, hf_dir: Path, documents: Iterable[str]) -> None:
    """Raises HFError with the first document whose ids, or whose text decoded from them, differ between the two."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=read_model(sp_model).SerializeToString())
    tokenizer = load_tokenizer(hf_dir)
    tokenizer.split_special_tokens = True  # as in training, whatever a chat template asks for
    for number, text in enumerate(documents):
        expected = processor.encode(text)
        given = tokenizer.encode(text)
        if given != expected:
            raise HFError(
                f"the tokenizer in {hf_dir} differs from {sp_model} in document {number} "
                f"({_difference(given, expected)}): {_excerpt(text)}"
            )
        lossless = processor.unk_id() not in expected  # SentencePiece writes a sign of its own for unknown characters
        if lossless and tokenizer.decode(given, skip_special_tokens=True) != processor.decode(expected):
            raise HFError(
                f"the tokenizer in {hf_dir} decodes document {number} differently from {sp_model}: {_excerpt(text)}"
            )


def _difference(given: Sequence[int], expected: Sequence[int]) -> str:
    pairs = zip(given, expected, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(expected)))
    return f"token {place}: {list(given[place : place + 3])} instead of {list(expected[place : place + 3])}"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
