"""A model and its tokenizer, from a Hugging Face folder, a checkpoint or a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from sambalm.data_pipeline.chat import ChatEncoder, ChatError, ChatOptions
from sambalm.data_pipeline.config import DataConfig, no_tokenizer
from sambalm.data_pipeline.shards import check_tokenizer, read_manifest
from sambalm.data_pipeline.tokenizer_formats import load_tokenizer
from sambalm.model.hf import SambaForCausalLM, load_for_generation
from sambalm.model.hf.generate import model_of_state
from sambalm.model.hf.tokenization_samba import SambaTokenizer
from sambalm.model.hf.tokenizer import FolderTokenizer
from sambalm.pretrain.checkpointing.format import MANIFEST, Checkpoint, checkpoint_folders, newest_checkpoint
from sambalm.pretrain.checkpointing.saved_config import saved_model, saved_run
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.errors import print_warning
from sambalm.pretrain.generation.errors import GenerationError
from sambalm.pretrain.generation.text import TextStream, folder_text, training_text

_PROBE = "The grass is green.\nKey: 12345; def f(x):\n    return x ** 2  # \u00e9t\u00e9, \u6f22\u5b57 \U0001f600\t"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Chat:
    """The template of a tokenizer that has one.

    Args:
        render: the text of messages, each {"role": ..., "content": ...}, up to where the answer begins.
        encode: the ids of such a text, with control tokens taken for what they name.
    """

    render: Callable[[list[dict[str, str]]], str]
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Source:
    """A model and what makes ids of text and text of ids.

    Args:
        new_text: makes the text of a new list of ids, as it comes.
        eos_ids: the tokens that end a text.
        chat: None where the tokenizer has no template.
        checkpoint: where the weights come from; None for a Hugging Face folder.
        run: the run that saved the checkpoint; None for a model that was converted to one, too.
    """

    model: SambaForCausalLM
    encode: Callable[[str], list[int]]
    new_text: Callable[[], TextStream]
    eos_ids: frozenset[int]
    chat: Chat | None = None
    checkpoint: Checkpoint | None = None
    run: RunConfig | None = None


def load_source(
    path: Path, *, device: str | None, dtype: str | None, tokenizer: Path | None, step: int | None = None
) -> Source:
    """Loads a model and its tokenizer.

    Args:
        path: a Hugging Face folder of a Samba model, a checkpoint, or a run folder: its newest good checkpoint.
        device: None for the GPU where there is one.
        dtype: a key of DTYPES; None for that of the weights, and of a run on a GPU for the one that it trained in.
        tokenizer: a file that training takes; None for the folder's or the run's own.
        step: takes a run's checkpoint of this step and no other.

    Raises:
        GenerationError, HFError, CheckpointError, DataError: one sentence each, for the user.
    """
    disable_progress_bar()  # transformers' own, for loading a few files
    place, kind = device_named(device), DTYPES[dtype] if dtype else None
    is_checkpoint = (path / MANIFEST).is_file() or checkpoint_folders(path)
    if not is_checkpoint and not (path / "config.json").is_file():
        raise GenerationError(_no_model(path))
    if step is not None and not is_checkpoint:
        raise GenerationError(f"--step is for a run, and {path} is a Hugging Face folder; leave it out")
    try:
        if is_checkpoint:
            checkpoint = newest_checkpoint(path, step=step, warn=print_warning)
            return _checkpoint_source(checkpoint, device=place, dtype=kind, tokenizer=tokenizer)
        return _folder_source(path, device=place, dtype=kind, tokenizer=tokenizer)
    except torch.OutOfMemoryError as error:
        raise GenerationError(f"{path} does not fit the memory of {place}; take another --device or --dtype") from error


def _no_model(path: Path) -> str:
    if not path.exists():
        where = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        return f"{path} is no model: there is no such folder{where}; give a run, a checkpoint or a Hugging Face folder"
    if path.is_file():
        return f"{path} is no model: it is a file; give the folder of a run, a checkpoint or a Hugging Face model"
    return (
        f"{path} is no model: it has neither the config.json of a Hugging Face folder nor the {MANIFEST} of a "
        "checkpoint nor the checkpoints of a run; give a folder that has one of them"
    )


def device_named(name: str | None) -> torch.device:
    """Returns the device of a name, None for the GPU where there is one.

    Raises:
        GenerationError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch answers an unknown name with a list of every device that it has ever known
        reason = "no such device" if "Expected one of" in str(error) else str(error).strip().split("\n")[0]
        raise GenerationError(f"the device {name!r} cannot be used ({reason}); give cpu, or cuda with a GPU") from error
    return device


def _folder_source(path: Path, *, device: torch.device, dtype: torch.dtype | None, tokenizer: Path | None) -> Source:
    model, own = load_for_generation(path, dtype=dtype, device=device)
    eos = model.generation_config.eos_token_id
    eos_ids = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
    if tokenizer is not None:
        encode, new_text, _ = _training_tokenizer(tokenizer)
        if encode(_PROBE) != own.encode(_PROBE, add_special_tokens=False):
            raise GenerationError(
                f"the tokenizer {tokenizer} gives other ids than the one in {path}, with which the model was trained: "
                "leave --tokenizer out"
            )
        return Source(model, encode, new_text, eos_ids)
    begin = begin_ids(own)

    def encode_prompt(text: str) -> list[int]:  # a token that ends a text would end the prompt, so none is appended
        return begin + own.encode(text, add_special_tokens=False)

    return Source(
        model=model,
        encode=encode_prompt,
        new_text=folder_text(own),
        eos_ids=eos_ids,
        chat=_chat(own) if own.chat_template else None,
    )


def begin_ids(tokenizer: FolderTokenizer) -> list[int]:
    """Returns what a tokenizer puts before a text. It may be the token that ends one, too."""
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])


def _chat(tokenizer: FolderTokenizer) -> Chat:
    def render(messages: list[dict[str, str]]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's, or what a template raises by itself
            raise GenerationError(f"the chat template cannot be applied ({error}); mend it in the folder") from error

    def encode(text: str) -> list[int]:
        if isinstance(tokenizer, SambaTokenizer):
            return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
        inner = tokenizer.backend_tokenizer
        splits, inner.encode_special_tokens = inner.encode_special_tokens, False
        try:
            return inner.encode(text, add_special_tokens=False).ids
        finally:
            inner.encode_special_tokens = splits

    return Chat(render, encode)


def _checkpoint_source(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None, tokenizer: Path | None
) -> Source:
    run = saved_run(checkpoint)
    dtype = dtype or dtype_of_run(run, device)
    file = tokenizer or (run.data.tokenizer_path() if run else None)
    if file is None:
        raise GenerationError(no_tokenizer(checkpoint.path, run.data if run else None))
    for prefix in run.data.prefixes if run and file.is_file() else ():
        check_tokenizer(prefix, load_tokenizer(file))
    model = model_of_state(checkpoint, saved_model(checkpoint), dtype=dtype).to(device)
    source = source_of_model(model, tokenizer=file, data=None if tokenizer or run is None else run.data)
    return replace(source, checkpoint=checkpoint, run=run)


def dtype_of_run(run: RunConfig | None, device: torch.device) -> torch.dtype:
    """Returns what a run's weights are loaded in where nobody says: as they are stored, on a GPU as it trained."""
    return DTYPES[run.train.precision] if run and device.type == "cuda" else torch.float32


def source_of_model(model: SambaForCausalLM, *, tokenizer: Path, data: DataConfig | None) -> Source:
    """Returns a model with a tokenizer that training takes.

    Args:
        data: of the run that trained it with that tokenizer, whose end of a text and chat template count; None: the
            tokenizer's own end, and no template.
    """
    encode, new_text, eos_id = _training_tokenizer(tokenizer)
    manifest = read_manifest(data.prefixes[0]) if data else None
    if manifest is not None:
        eos_id = manifest.tokenizer.eos_id  # which may be another than the tokenizer's own
    template = data.chat_template() if data else None
    chat = _trained_chat(template, tokenizer) if template else None
    return Source(model, encode, new_text, frozenset([eos_id] if eos_id >= 0 else []), chat=chat)


def _trained_chat(template: str, tokenizer: Path) -> Chat:
    """The template of a run's data, with ids as in training."""
    encoder = ChatEncoder(ChatOptions(template), load_tokenizer(tokenizer), append_eos=False)

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return encoder.prompt(messages)
        except ChatError as error:
            raise GenerationError(f"the conversation cannot go on: {error}") from error

    return Chat(render, encoder.encode_prompt)


def _training_tokenizer(file: Path) -> tuple[Callable[[str], list[int]], Callable[[], TextStream], int]:
    """Returns how text is encoded, how ids become text, and the id that ends a document, -1 without one."""
    tokenizer: Any = load_tokenizer(file)
    return tokenizer.encode, training_text(tokenizer), tokenizer.eos_id
