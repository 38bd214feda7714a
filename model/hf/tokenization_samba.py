"""A SentencePiece model read by SentencePiece itself, for models without an exact equivalent in tokenizer.json."""

import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer


class SambaTokenizer(PreTrainedTokenizer):
    """Gives SentencePiece's ids and texts. Neither BOS nor EOS is added to a text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - transformers reads it of the class
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = str(vocab_file)
        self.processor = SentencePieceProcessor(model_file=self.vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {
            self.processor.id_to_piece(index): index for index in range(self.vocab_size)
        } | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        # By way of ids, since an unknown run of characters may be written as a control token is.
        return [self.processor.id_to_piece(index) for index in self.processor.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.processor.decode([self.processor.piece_to_id(token) for token in tokens if token])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
