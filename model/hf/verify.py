"""The proof that an exported folder is the trained model: same logits on real tokens, same tokenizer."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from sambalm.model.config import ModelConfig
from sambalm.model.registry import without_cuts_through_memories
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices

from .configuration_samba import SambaConfig
from .errors import HFError
from .folder import FolderState
from .generate import load_config
from .layers import SequenceContext
from .modeling_samba import SambaForCausalLM, new_cache
from .names import CanonicalState, hf_dtype, hf_tensors
from .tokenizer import TokenizerFile, compare_tokenizers, load_tokenizer

MAX_LOGIT_DIFFERENCE = 1e-4
ROWS = 2
MIN_ROW_TOKENS = 16
BEYOND_WINDOW_TOKENS = 17
LOGIT_TOKENS = 512  # of each row, whose logits are in memory at once


def verify_export(
    output: Path, state: CanonicalState, config: ModelConfig, documents: Sequence[str], tokenizer_model: TokenizerFile
) -> float:
    """Compare the folder with the training model, both in fp32 on the CPU, and its tokenizer with SentencePiece's.

    The training model's weights are rounded to the folder's dtype first and must then be equal, bit by bit. Two rows of
    tokens, longer than a window where the documents suffice, are read: one at once, the other in three pieces through
    the cache. Both models are in memory a block at a time, however large they are.

    Returns the largest difference of two logits. Raises HFError when it exceeds MAX_LOGIT_DIFFERENCE, when weights or
    ids differ, or when the documents are too short to tell.
    """
    compare_tokenizers(tokenizer_model, output, documents)
    _compare_weights(output, state, config)
    hf = load_config(output)
    tokens = verification_tokens(output, documents, row_tokens=config.window + BEYOND_WINDOW_TOKENS)
    if int(tokens.max()) >= config.vocab_size:
        raise HFError(f"the tokenizer {tokenizer_model} gives ids beyond the model's vocab_size {config.vocab_size}")
    difference = largest_difference(FolderState(output, hf), hf, state, config, tokens=tokens)
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN counts as different
        raise HFError(
            f"the logits of the exported model differ from the training model's by {difference:.3g}, more than "
            f"{MAX_LOGIT_DIFFERENCE:g}; the export is not usable"
        )
    return difference


def verification_tokens(output: Path, documents: Sequence[str], *, row_tokens: int) -> Tensor:
    """int64 [ROWS, row_tokens or fewer]: the documents' tokens one after the other, each document ended by EOS."""
    tokenizer = load_tokenizer(output)
    ids: list[int] = []
    for text in documents:
        ids += tokenizer.encode(text)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= ROWS * row_tokens:
            break
    length = min(row_tokens, len(ids) // ROWS)
    if length < MIN_ROW_TOKENS:
        raise HFError(
            f"the documents for the verification have {len(ids)} tokens; give at least {ROWS * MIN_ROW_TOKENS}, better "
            f"{ROWS * row_tokens}"
        )
    return torch.tensor(ids[: ROWS * length]).view(ROWS, length)


def _compare_weights(output: Path, state: CanonicalState, config: ModelConfig) -> None:
    folder_config = load_config(output)
    folder = FolderState(output, folder_config)
    for name, dtype in _stored_dtypes(config, folder_config.dtype).items():
        if not torch.equal(folder.read(name), state.read(name).to(dtype).float()):
            raise HFError(f"tensor {name} in {output} is not the checkpoint's; the export is not usable")


def _stored_dtypes(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that a folder of a dtype has each canonical tensor in."""
    tensors = hf_tensors(config.pattern, tie_embeddings=config.tie_embeddings).values()
    return {part: hf_dtype(tensor, dtype) for tensor in tensors for part in tensor.parts}


class HFWeights(Protocol):
    """The weights of a Hugging Face model, read one tensor at a time."""

    def read_hf(self, name: str) -> Tensor:
        """One tensor in fp32, by its name in the Hugging Face model."""


@torch.inference_mode()
def largest_difference(
    weights: HFWeights, hf_config: SambaConfig, state: CanonicalState, config: ModelConfig, *, tokens: Tensor
) -> float:
    """Returns the largest difference of two logits, NaN where one is, from running both models block by block.

    Args:
        weights, hf_config: the model in transformers.
        state, config: the training model, whose weights are rounded to the dtype of hf_config.
        tokens: int64 [2, S]; the first model reads the second row in pieces.
    """
    exported = _ExportedModel(weights, hf_config)
    parts = partial(_training_part, state, config, dtype=hf_config.dtype)
    trained = None
    for layers in _spans(hf_config):
        part = parts(layers)
        part.is_last = False  # the head is a part of its own
        trained = part(tokens, hidden=trained)  # [S, rows, width], as that model has it between its layers
    whole, pieces = (exported.embed(row) for row in tokens.split(1))
    cache = new_cache(hf_config)
    for number in range(len(hf_config.blocks)):
        whole, pieces = exported.block(number, whole=whole, pieces=pieces, cache=cache)
    assert trained is not None, "a pattern has a layer"
    head, read = parts(range(len(config.pattern), len(config.pattern))), torch.cat((whole, pieces))
    differences = [
        (exported.logits(read[:, place]) - head(tokens[:, place], hidden=trained[place])).abs().max()
        for place in (slice(i, i + LOGIT_TOKENS) for i in range(0, tokens.shape[1], LOGIT_TOKENS))
    ]
    return torch.stack(differences).max().item()


def _spans(config: SambaConfig) -> list[range]:
    """Lists the layers that the training model has at once: a block's, or all from one that writes to the last that
    reads it."""
    ends = [max(n for n in (block.mixer_sublayer, block.mlp_sublayer) if n is not None) + 1 for block in config.blocks]
    ends = without_cuts_through_memories(config.pattern or "", ends)
    return [range(start, end) for start, end in itertools.pairwise((0, *ends))]


def _training_part(state: CanonicalState, config: ModelConfig, layers: range, *, dtype: torch.dtype) -> Samba:
    """Returns a pipeline's part of the training model, with the weights that a folder of the dtype has."""
    stored = _stored_dtypes(config, dtype)
    model = Samba(config, layers=layers)
    for name, parameter, piece in canonical_slices(model):
        weight = state.read(name).to(stored[name]).float()
        piece.of_local(parameter).copy_(piece.of_canonical(weight))
    return model


class _ExportedModel:
    """The model in transformers, whose weights are in memory while they are used."""

    def __init__(self, weights: HFWeights, config: SambaConfig) -> None:
        self.weights = weights
        with torch.device("meta"):
            self.model = SambaForCausalLM(config).eval()
        self.tied = config.tie_word_embeddings
        # What layers have written, by where a piece begins; -1 is the whole row.
        self.memories: defaultdict[int, dict[int, Any]] = defaultdict(dict)

    @contextmanager
    def _loaded(self, name: str) -> Iterator[nn.Module]:
        """Yields a module of the model with its weights."""
        module = self.model.get_submodule(name)
        names = [key for key, _ in module.named_parameters()]
        source = "backbone.embeddings" if self.tied and name == "lm_head" else name
        module.load_state_dict({key: self.weights.read_hf(f"{source}.{key}") for key in names}, assign=True)
        yield module
        module.to("meta")

    def embed(self, tokens: Tensor) -> Tensor:
        with self._loaded("backbone.embeddings") as embeddings:
            return embeddings(tokens)

    def block(self, number: int, *, whole: Tensor, pieces: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Runs a block on a row at once, and on another as half of it, one token, and the rest, through the cache."""
        length = pieces.shape[1]
        half, outputs = length // 2, []
        with self._loaded(f"backbone.layers.{number}") as block:
            whole = block(whole, self._context(whole, None, first=0, memories=self.memories[-1]))
            for first, end in ((0, half), (half, half + 1), (half + 1, length)):
                piece = pieces[:, first:end]
                outputs.append(block(piece, self._context(piece, cache, first=first, memories=self.memories[first])))
        return whole, torch.cat(outputs, dim=1)

    def _context(self, x: Tensor, cache: Cache | None, *, first: int, memories: dict[int, Any]) -> SequenceContext:
        positions = torch.arange(first, first + x.shape[1])[None]
        context = SequenceContext(cache, None, None, None, memories=memories)
        return self.model.backbone.sequence_context(context, x, positions=positions)

    def logits(self, x: Tensor) -> Tensor:
        with self._loaded("backbone.norm_f") as norm, self._loaded("lm_head") as head:
            return head(norm(x))
