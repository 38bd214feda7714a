"""A run's YAML file: what all models share, and what one has of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .layout import DataFolder
from .models import ExperimentError
from .scales import Scale


def pretraining(
    model: Mapping[str, Any], scale: Scale, data: DataFolder, *, run: Path, seed: int, peak_lr: float, tokens: int
) -> dict[str, Any]:
    """Returns the values of a run from drawn weights: the paper's recipe at 421M, but for a longer warm-up."""
    steps = max(1, tokens // scale.batch_tokens)
    return {
        "format_version": 1,
        "run": {"dir": str(run), "seed": seed},
        "model": dict(model),
        "data": {
            "train": str(data.train.resolve()),
            "validation": str(data.held_out.resolve()),
            "validation_fraction": 0,
            "sequence_length": scale.length,
        },
        "train": {
            "steps": steps,
            "global_batch_tokens": scale.batch_tokens,
            "micro_batch_size": scale.micro_batch,
            "precision": scale.precision,
        },
        # 1% of so few steps would be about ten.
        "optimizer": _optimizer(peak_lr, warmup_fraction=0.05),
        "validation": {"every_steps": max(1, steps // 4), "tokens": scale.text_tokens, "length_multiples": [1]},
        **_saved(steps),
    }


def tuning(
    model: Mapping[str, Any], scale: Scale, documents: Mapping[int, Path], *, run: Path, start: Path, seed: int
) -> dict[str, Any]:
    """Returns the values of a run that starts from trained weights, on made documents as in configs/finetune/.

    Args:
        documents: prefixes by the tokens of a document, in the order in which they are trained on.
    """
    made, longest = scale.tuning, scale.tuning.tokens[-1]
    batches = {tokens: _batch(scale, tokens) for tokens in documents}
    phases = [
        {
            "tokens": steps * batches[tokens]["global_batch_tokens"],
            "train": str(prefix.resolve()),
            "sequence_length": tokens,
            **batches[tokens],
        }
        for (tokens, prefix), steps in zip(documents.items(), _shares(made.steps, len(documents)), strict=True)
    ]
    is_phased = len(phases) > 1
    return {
        "format_version": 1,
        "run": {"dir": str(run), "seed": seed},
        "model": dict(model),
        "data": {
            "train": str(documents[longest].resolve()),
            "packing": "documents",
            "sequence_length": longest,
            "validation_fraction": 0.02,
            **({"phases": phases} if is_phased else {}),
        },
        "train": {
            "init_from": str(start.resolve()),
            **({} if is_phased else {"steps": made.steps}),
            **batches[longest],
            "precision": scale.precision,
        },
        "optimizer": _optimizer(made.peak_lr, warmup_fraction=0.5),
        "validation": {
            "every_steps": max(1, made.steps // 8),
            "tokens": scale.text_tokens,
            "length_multiples": [1],
        },
        **_saved(made.steps),
    }


def _batch(scale: Scale, tokens: int) -> dict[str, int]:
    """Returns the batches of a step on documents of so many tokens: about as many tokens whatever their length."""
    documents = max(1, scale.tuning.batch * scale.tuning.tokens[-1] // tokens)
    micro_batch = scale.micro_batch * scale.length // tokens
    return {"global_batch_tokens": documents * tokens, "micro_batch_size": _divisor(documents, at_most=micro_batch)}


def _divisor(number: int, *, at_most: int) -> int:
    return max(size for size in range(1, max(1, min(number, at_most)) + 1) if number % size == 0)


def _shares(steps: int, parts: int) -> list[int]:
    """Deals steps to parts; the last has what is left over."""
    return [steps // parts] * (parts - 1) + [steps - steps // parts * (parts - 1)]


def _optimizer(peak_lr: float, *, warmup_fraction: float) -> dict[str, Any]:
    return {
        "peak_lr": peak_lr,
        "final_lr_ratio": 0.1,
        "schedule": "cosine",
        "warmup_fraction": warmup_fraction,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    }


def _saved(steps: int) -> dict[str, Any]:
    return {"checkpoint": {"every_steps": max(1, steps // 4), "keep": 1}, "reporting": {"writers": []}}


def write_config(values: Mapping[str, Any], path: Path) -> None:
    """Writes a config, which must not differ from the one that is there: its run may have begun.

    Raises:
        ExperimentError: it differs.
    """
    text = yaml.safe_dump(dict(values), sort_keys=False)
    if path.exists() and path.read_text() != text:
        raise ExperimentError(f"{path} was written with other settings: give those again, or another --folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
