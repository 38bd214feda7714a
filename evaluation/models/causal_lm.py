"""Any causal language model that transformers loads without executing code from its folder, to compare with."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.base import Identity, LanguageModel, Reader
from sambalm.evaluation.models.folder_tokenizer import FolderTokenizer, first_line, folder_tokenizer
from sambalm.model.hf.stream import Scores, fingerprint, scores_of
from sambalm.pretrain.generation.text import TextStream

_PIECE_TOKENS = 2048
_LOGIT_BYTES = 1 << 28  # of the logits of a piece in fp32
_PROBE_TOKENS, _PROBE_TOLERANCE = 24, 0.05  # nats


class _WithFolderTokenizer(LanguageModel):
    def _take(self, tokenizer: FolderTokenizer) -> None:
        self._tokenizer = tokenizer
        self.end_id, self.begin_ids, self.begin_id = tokenizer.end_id, tokenizer.begin_ids, tokenizer.begin_id

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def new_text(self) -> TextStream:
        return self._tokenizer.new_text()


class CausalLM(_WithFolderTokenizer):
    """A model of transformers with its tokenizer.

    `carries_state` tells whether pieces are read as a whole text is. Some models with recurrent layers lose their state
    where a piece of several tokens follows another; these get the first piece whole and the rest token by token.
    """

    def __init__(self, path: Path, *, device: torch.device, dtype: torch.dtype | None, tokenizer: Path | None) -> None:
        """Loads the model.

        Args:
            dtype: None for that of the weights.
            tokenizer: a file that training takes; None for the folder's own tokenizer.

        Raises:
            EvaluationError: the folder cannot be loaded.
            DataError: the file is no tokenizer.
        """
        disable_progress_bar()  # transformers' own, for loading a few files
        self._take(folder_tokenizer(path, tokenizer))
        self.model = _model(path, dtype=dtype).to(device).eval()
        self.device = device
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        self.eos_ids = _ends_of_text(self.model) | ({self.end_id} if self.end_id is not None else frozenset())
        self.max_tokens = _learned_positions(self.model)
        self.identity = Identity(
            path=str(path),
            kind=type(self.model).__name__,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(device),
            fingerprint=fingerprint(self.model),
        )
        self.carries_state = self._reads_pieces_as_a_whole()

    def new_reader(self, rows: int) -> Reader:
        return _CacheReader(self, rows)

    def _reads_pieces_as_a_whole(self) -> bool:
        self.carries_state = True
        count = min(_PROBE_TOKENS, self.max_tokens or _PROBE_TOKENS)
        ids = torch.arange(count, device=self.device)[None] * 7919 % self.vocab_size
        whole, pieces = self.new_reader(1), self.new_reader(1)
        expected = whole.score(ids).log_likelihoods
        found = torch.cat(
            [pieces.score(piece).log_likelihoods for piece in ids.split([9, 7, count - 16], dim=1)], dim=1
        )
        return bool((found - expected)[:, 1:].abs().max() < _PROBE_TOLERANCE)


class TokenizerOnly(_WithFolderTokenizer):
    """The tokenizer of a folder, to make texts with."""

    def __init__(self, path: Path) -> None:
        """Raises EvaluationError where the folder has no tokenizer."""
        self._take(folder_tokenizer(path, None))
        self.vocab_size = sys.maxsize  # of a model that nobody has named

    def new_reader(self, rows: int) -> Reader:
        raise TypeError("this has no weights")


class _CacheReader(Reader):
    """Tokens read with the cache that the model makes itself."""

    def __init__(self, owner: CausalLM, rows: int) -> None:
        self._owner, self._model, self._rows = owner, owner.model, rows
        self._cache: Any = None
        self._cache_name = _cache_name(owner.model)
        self._seen_tokens = 0
        self.logits: Tensor | None = None

    @torch.no_grad()
    def score(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Scores:
        scores = []
        for piece in self._pieces(ids):
            before = self.logits
            logits = self._forward(piece)
            scores += [self._first(before, piece), scores_of(logits[:, :-1], piece[:, 1:])]
            if progress:
                progress(piece.numel())
        likelihoods, is_likeliest = zip(*scores, strict=True)
        return Scores(torch.cat(likelihoods, dim=1), torch.cat(is_likeliest, dim=1))

    @staticmethod
    def _first(before: Tensor | None, piece: Tensor) -> Scores:
        """Returns the scores of a piece's first token by the logits of the piece before, [B, 1] each."""
        if before is not None:
            return scores_of(before[:, None], piece[:, :1])
        unknown = torch.full(piece[:, :1].shape, float("nan"), device=piece.device)
        return Scores(unknown, torch.zeros_like(unknown, dtype=torch.bool))

    @torch.no_grad()
    def read(self, ids: Tensor, *, progress: Callable[[int], None] | None = None) -> Tensor:
        for piece in self._pieces(ids):
            self._forward(piece)
            if progress:
                progress(piece.numel())
        assert self.logits is not None
        return self.logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        self._refuse_beyond_positions(1)
        return self._forward(ids[:, None])[:, -1]

    def _pieces(self, ids: Tensor) -> Iterator[Tensor]:
        self._refuse_beyond_positions(ids.shape[1])
        size = max(1, min(_PIECE_TOKENS, _LOGIT_BYTES // (4 * self._rows * self._owner.vocab_size)))
        if not self._owner.carries_state:
            size = 1 if self._seen_tokens else ids.shape[1]
        yield from ids.to(self._owner.device).split(size, dim=1)

    def _refuse_beyond_positions(self, tokens: int) -> None:
        """
        Raises:
            EvaluationError: the model has no positions for so many more tokens.
        """
        limit = self._owner.max_tokens
        if limit is not None and self._seen_tokens + tokens > limit:
            raise EvaluationError(
                f"{self._owner.identity.path} has learned positions for {limit} tokens, and a text of "
                f"{self._seen_tokens + tokens} was to be read; give shorter lengths"
            )

    def _forward(self, ids: Tensor) -> Tensor:
        given = {} if self._cache is None else {self._cache_name: self._cache}
        positions = torch.arange(self._seen_tokens, self._seen_tokens + ids.shape[1], device=ids.device)
        if "cache_position" in inspect.signature(self._model.forward).parameters:
            given["cache_position"] = positions
        outputs = self._model(input_ids=ids, use_cache=True, **given)
        self._cache = getattr(outputs, self._cache_name, None)
        self._seen_tokens += ids.shape[1]
        self.logits = outputs.logits[:, -1].clone()  # not a view, which would keep the others
        return outputs.logits


def _model(path: Path, *, dtype: torch.dtype | None) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a bad folder
        raise EvaluationError(
            f"transformers cannot load a causal language model from {path} ({first_line(error)}); give a whole folder "
            "of a model that needs no code of its own"
        ) from error


def _ends_of_text(model: Any) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)


def _learned_positions(model: Any) -> int | None:
    """Returns how many positions a table of the model holds, None where positions are computed or there are none."""
    limit = getattr(model.config, "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    has_table = limit is not None and any(limit <= table.num_embeddings <= limit + 2 for table in tables)
    return limit if has_table else None


def _cache_name(model: Any) -> str:
    """Returns what the model calls its cache: until transformers 5.23 Mamba's had a name of its own."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in parameters)
