"""Opens the model of a run, of a checkpoint or of a Hugging Face folder."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sambalm.evaluation.errors import EvaluationError
from sambalm.evaluation.models.base import LanguageModel
from sambalm.evaluation.models.causal_lm import CausalLM
from sambalm.evaluation.models.samba import SambaModel
from sambalm.model.hf import SambaConfig
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.generation.source import DTYPES, device_named, load_source


@dataclass(frozen=True)
class Opened:
    """A model, and the configuration of the run that trained it where that is known."""

    model: LanguageModel
    run: RunConfig | None


def open_model(
    path: Path, *, device: str | None, dtype: str | None, tokenizer: Path | None, step: int | None = None
) -> Opened:
    """Loads a model and its tokenizer.

    Args:
        path: a run, a checkpoint, or a Hugging Face folder of a Samba model or of any other causal language model.
        device: None for the GPU where there is one.
        dtype: a key of DTYPES; None for that of the weights.
        tokenizer: a file that training takes; None for the model's own.
        step: takes a run's checkpoint of this step and no other.

    Raises:
        EvaluationError, GenerationError, HFError, CheckpointError, DataError: one sentence each, for the user.
    """
    kind = _model_type(path)
    if kind in (None, SambaConfig.model_type):
        source = load_source(path, device=device, dtype=dtype, tokenizer=tokenizer, step=step)
        step = source.checkpoint.step if source.checkpoint else None
        return Opened(SambaModel(source, path=path, step=step), source.run)
    if step is not None:
        raise EvaluationError(f"--step is for a run, and {path} is a Hugging Face folder; leave it out")
    place = device_named(device)
    try:
        return Opened(CausalLM(path, device=place, dtype=DTYPES[dtype] if dtype else None, tokenizer=tokenizer), None)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(f"{path} does not fit the memory of {place}; take another --device or --dtype") from error


def _model_type(path: Path) -> str | None:
    """Returns what config.json calls the model, None where there is none that can be read."""
    try:
        content = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None
