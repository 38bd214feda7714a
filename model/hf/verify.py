"""The proof that an exported folder is the trained model: same logits on real tokens, same tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.samba import Samba
from sambalm.parallel.sharding import canonical_slices

from .errors import HFError
from .folder import FolderState
from .generate import load_config, load_model
from .modeling_samba import SambaForCausalLM
from .names import CanonicalState, hf_dtype, hf_tensors
from .tokenizer import compare_tokenizers, load_tokenizer

MAX_LOGIT_DIFFERENCE = 1e-4
ROWS = 2
MIN_ROW_TOKENS = 16


def verify_export(
    output: Path, state: CanonicalState, config: ModelConfig, documents: Sequence[str], tokenizer_model: Path
) -> float:
    """Compare the folder with the training model, both in fp32 on the CPU, and its tokenizer with SentencePiece's.

    The training model's weights are rounded to the folder's dtype first and must then be equal, bit by bit. Two rows of
    tokens, longer than two windows where the documents suffice, are read at once and again in three pieces through the
    cache.

    Returns the largest difference of two logits. Raises HFError when it exceeds MAX_LOGIT_DIFFERENCE, when weights or
    ids differ, or when the documents are too short to tell.
    """
    compare_tokenizers(tokenizer_model, output, documents)
    _compare_weights(output, state, config)
    tokens = verification_tokens(output, documents, row_tokens=2 * config.window + 17)
    if int(tokens.max()) >= config.vocab_size:
        raise HFError(f"the tokenizer {tokenizer_model} gives ids beyond the model's vocab_size {config.vocab_size}")
    with torch.inference_mode():
        expected = _training_model(state, config, dtype=load_config(output).dtype)(tokens)
        model = load_model(output, dtype=torch.float32)
        whole = model(tokens, use_cache=False).logits
        difference = max(_difference(whole, expected), _difference(_in_pieces(model, tokens), expected))
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


def _training_model(state: CanonicalState, config: ModelConfig, *, dtype: torch.dtype) -> Samba:
    stored = _stored_dtypes(config, dtype)
    model = Samba(config)
    for name, parameter, piece in canonical_slices(model):
        weight = state.read(name).to(stored[name]).float()
        piece.of_local(parameter).copy_(piece.of_canonical(weight))
    return model


def _in_pieces(model: SambaForCausalLM, tokens: Tensor) -> Tensor:
    """Logits of the tokens read as half of them, one, and the rest, each continuing from the cache."""
    half = tokens.shape[1] // 2
    cache, logits = None, []
    for piece in tokens.split([half, 1, tokens.shape[1] - half - 1], dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def _difference(given: Tensor, expected: Tensor) -> float:
    return (given - expected).abs().max().item()
