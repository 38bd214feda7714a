"""The tokenizer of a Hugging Face folder, or one from a file that training takes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.evaluation.errors import EvaluationError
from sambalm.model.hf.tokenization_samba import SambaTokenizer
from sambalm.pretrain.errors import one_sentence
from sambalm.pretrain.generation.source import begin_ids
from sambalm.pretrain.generation.text import TextStream, folder_text, training_text


@dataclass(frozen=True)
class FolderTokenizer:
    """What LanguageModel says of a tokenizer, under the same names."""

    encode: Callable[[str], list[int]]
    new_text: Callable[[], TextStream]
    end_id: int | None
    begin_ids: list[int]
    begin_id: int | None


def folder_tokenizer(path: Path, file: Path | None) -> FolderTokenizer:
    """Loads the tokenizer of a folder; a file takes its place.

    Raises:
        EvaluationError: the folder has none that transformers loads.
        DataError: the file is no tokenizer.
    """
    if file is not None:
        own = load_tokenizer(file)
        end, begin = (None if number < 0 else number for number in (own.eos_id, own.bos_id))
        return FolderTokenizer(own.encode, training_text(own), end, [], begin)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast and not isinstance(tokenizer, SambaTokenizer):
            raise ValueError("it cannot be made a tokenizer.json")
    except Exception as error:  # transformers raises many kinds for a bad folder
        raise EvaluationError(
            f"the tokenizer in {path} cannot be loaded ({first_line(error)}); give one with --tokenizer"
        ) from error

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    return FolderTokenizer(
        encode=encode,
        new_text=folder_text(tokenizer),
        end_id=tokenizer.eos_token_id,
        begin_ids=begin_ids(tokenizer),
        begin_id=tokenizer.bos_token_id,
    )


def first_line(error: Exception) -> str:
    """Returns the first line of a library's message."""
    return one_sentence((str(error).strip() or type(error).__name__).split("\n")[0])
