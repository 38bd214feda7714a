"""Writing a model as a Hugging Face folder, one tensor in memory at a time; the caller makes the folder durable."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sambalm.model.config import ModelConfig
from sambalm.model.mixers.base import HFTensor

from .configuration_samba import SambaConfig
from .errors import HFError
from .folder import INDEX_FILE
from .folder_code import folder_code
from .model_card import TrainingFacts, model_card
from .names import CanonicalState, hf_config, hf_dtype, hf_shape, hf_tensors
from .tokenizer import TokenizerFile, compare_tokenizers, save_chat_template, save_tokenizer, tokenizer_facts
from .verify import verify_export

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
AUTO_MAP = {
    "AutoConfig": "configuration_samba.SambaConfig",
    "AutoModel": "modeling_samba.SambaModel",
    "AutoModelForCausalLM": "modeling_samba.SambaForCausalLM",
}

Progress = Callable[[int, int], None]


def export_hf(
    state: CanonicalState,
    config: ModelConfig,
    *,
    folder: Path,
    tokenizer_model: TokenizerFile,
    documents: Sequence[str],
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    token_ids: Mapping[str, int | None] | None = None,
    chat_template: str | None = None,
    card: TrainingFacts = TrainingFacts(),
    progress: Progress | None = None,
) -> None:
    """Writes a model into an empty folder and verifies what lies there.

    Args:
        state: the canonical weights.
        folder: exists and is empty; it is of no use when this raises.
        documents: text for the verification, at least a few windows of it if there is so much.
        dtype: of the weights, fp32, bf16 or fp16; tensors that a mixer marks as fp32 are so in any case.
        max_shard_bytes: weights in one file at most; a tensor that is larger has a file of its own.
        token_ids: of bos and eos as training used them; None: those that the tokenizer's file names.
        chat_template: jinja text for the tokenizer's apply_chat_template; with one, control tokens that are written out
            in a text are taken for what they name, as the template's own must be.
        progress: receives (bytes written, bytes in all).

    Raises HFError when the state does not fit the configuration, the tokenizer or a mixer's code cannot be converted,
    or the folder does not give the training model's logits and the tokenizer's ids.
    """
    if dtype not in DTYPES:
        raise HFError(f"dtype is {dtype}; weights are exported as torch.float32, torch.bfloat16 or torch.float16")
    tensors = hf_tensors(config.pattern, tie_embeddings=config.tie_embeddings)
    _refuse_unfit_state(state, tensors)
    hf = _write_all_but_weights(
        folder,
        config,
        tokenizer_model=tokenizer_model,
        dtype=dtype,
        token_ids=token_ids,
        chat_template=chat_template,
        sequence_tokens=card.sequence_tokens,
    )
    shapes = state.shapes()
    parameters = sum(math.prod(shapes[part]) for tensor in tensors.values() for part in tensor.parts)
    readme = model_card(hf, card, parameters=parameters, dtype=str(dtype).removeprefix("torch."))
    (folder / "README.md").write_text(readme, "utf-8")
    _write_weights(folder, state, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress)
    verify_export(folder, state, config, documents, tokenizer_model)


def check_convertible(
    config: ModelConfig,
    *,
    tokenizer_model: TokenizerFile,
    token_ids: Mapping[str, int | None] | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes what a folder has besides weights, into a temporary one, and compares the tokenizer on odd texts.

    Raises:
        HFError: as `export_hf` does for a model, a tokenizer or a template that cannot be converted, before there are
            weights to convert.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_all_but_weights(
            folder, config, tokenizer_model=tokenizer_model, token_ids=token_ids, chat_template=chat_template
        )
        compare_tokenizers(tokenizer_model, folder, ())


def _write_all_but_weights(
    folder: Path,
    config: ModelConfig,
    *,
    tokenizer_model: TokenizerFile,
    token_ids: Mapping[str, int | None] | None,
    chat_template: str | None,
    dtype: torch.dtype = torch.float32,
    sequence_tokens: int | None = None,
) -> SambaConfig:
    """Writes configuration, code and tokenizer, and returns the first; arguments and errors are `export_hf`'s."""
    code = folder_code(config.pattern)  # refuses mixers first, whatever the tokenizer is
    facts = tokenizer_facts(tokenizer_model, given=token_ids)
    if facts.vocab_size > config.vocab_size:
        raise HFError(
            f"the tokenizer {tokenizer_model} has {facts.vocab_size} pieces but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )
    tokens = {f"{name}_token_id": facts.ids[name] for name in ("bos", "eos", "pad")}
    lengths = {} if sequence_tokens is None else {"training_sequence_tokens": sequence_tokens}
    hf = hf_config(config, dtype=str(dtype).removeprefix("torch."), **tokens, **lengths)
    _write_config(folder, hf, tokens)
    save_tokenizer(tokenizer_model, folder, given=token_ids)
    if chat_template is not None:
        save_chat_template(chat_template, folder)
    for file, text in code.items():
        (folder / file).write_text(text, "utf-8")
    return hf


def _refuse_unfit_state(state: CanonicalState, tensors: dict[str, HFTensor]) -> None:
    expected = {part for tensor in tensors.values() for part in tensor.parts}
    given = set(state.shapes())
    for names, word in ((expected - given, "lacks"), (given - expected, "has an unknown")):
        if names:
            raise HFError(f"the checkpoint {word} tensor {min(names)}: its weights do not fit its model configuration")


def _write_config(folder: Path, config: SambaConfig, tokens: dict[str, int | None]) -> None:
    content = config.to_diff_dict()
    content["dtype"] = str(config.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", content | {"architectures": ["SambaForCausalLM"], "auto_map": AUTO_MAP})
    known = {name: index for name, index in tokens.items() if index is not None}
    _write_json(folder / "generation_config.json", known)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path,
    state: CanonicalState,
    tensors: dict[str, HFTensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    shapes = state.shapes()
    sizes = {n: math.prod(hf_shape(t, shapes)) * hf_dtype(t, dtype).itemsize for n, t in tensors.items()}
    shards = plan_shards(sizes, max_shard_bytes=max_shard_bytes)
    total, done = sum(sizes.values()), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        for size in _write_shard(folder / file, state, {name: tensors[name] for name in names}, dtype=dtype):
            done += size
            if progress:
                progress(done, total)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def plan_shards(sizes: dict[str, int], *, max_shard_bytes: int) -> list[list[str]]:
    """The tensors of each file, in order: as many as fit, at least one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(
    path: Path, state: CanonicalState, tensors: dict[str, HFTensor], *, dtype: torch.dtype
) -> Iterator[int]:
    """Writes a safetensors file tensor by tensor, which the safetensors package cannot; yields the bytes of each."""
    shapes = state.shapes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        shape, kind = hf_shape(tensor, shapes), hf_dtype(tensor, dtype)
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are to be aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            for part in tensor.parts:  # concatenated along the first dimension, so one after the other
                _write_tensor(file, state.read(part), hf_dtype(tensor, dtype), name=part, shape=shapes[part])
            start, end = header[name]["data_offsets"]
            yield end - start


def _write_tensor(file: BinaryIO, whole: Tensor, dtype: torch.dtype, *, name: str, shape: tuple[int, ...]) -> None:
    tensor = whole.to(dtype)
    if dtype == torch.float16 and bool((tensor.isinf() & ~whole.isinf()).any()):
        raise HFError(f"tensor {name} holds values beyond fp16's {torch.finfo(dtype).max:g}: export it as bf16")
    if tuple(tensor.shape) != tuple(shape):
        raise HFError(f"tensor {name} of the checkpoint has shape {tuple(tensor.shape)} instead of {tuple(shape)}")
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
