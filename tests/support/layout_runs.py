"""A few training steps on a layout through the product's own path, and what one process makes of the same samples."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sambalm.pretrain.check_layout import Slices, Steps, compare_slices, document_starts, take_steps, whole
from tests.support.worlds import Call, run_world

MODEL = {
    "pattern": "M-*-M",
    "hidden_size": 48,
    "num_query_heads": 12,
    "num_kv_heads": 2,
    "mlp_size": 82,  # uneven over two ranks already
    "window": 11,  # farther back than a neighbour's tokens on four context-parallel ranks
    "vocab_size": 96,
}
LENGTH, SAMPLES, STEPS = 32, 4, 5
# Where documents begin in each sample besides its start: often, nowhere, at the borders of context-parallel parts, and
# within the convolution's reach before one.
DOCUMENTS = [[3, 4, 15, 23], [], [8, 16, 25, 31], [14]]


def run_values(
    *,
    model: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    precision: str = "fp32",
    run_dir: str = "unused",
    documents: bool = False,
) -> dict[str, Any]:
    """A run as plain values; its data are random and made by `batches`."""
    return {
        "format_version": 1,
        "run": {"dir": run_dir, "seed": 5},
        "model": MODEL | (model or {}),
        "data": {
            "train": "unused",
            "sequence_length": LENGTH,
            "validation_fraction": 0.1,
            "reset_at_document": documents,
        },
        "train": {
            "steps": STEPS,
            "global_batch_tokens": LENGTH * SAMPLES,
            "micro_batch_size": 1,
            "precision": precision,
        },
        # A large epsilon: AdamW's first steps are signs of gradients, and signs turn rounding errors into whole steps.
        "optimizer": {"peak_lr": 1e-3, "clip_norm": 0.5, "eps": 1e-4},
        "parallel": parallel or {},
    }


def batches(step: int, *, config, world) -> list:
    """This rank's micro-batches of a step, one sample each."""
    from sambalm.parallel.micro_batch import MicroBatch

    generator = torch.Generator().manual_seed(step)
    samples = torch.randint(0, config.model.vocab_size, (SAMPLES, 1, LENGTH + 1), generator=generator)
    starts = [_starts(begins) if config.data.reset_at_document else None for begins in DOCUMENTS]
    whole = [MicroBatch(s[:, :-1], s[:, 1:], start) for s, start in zip(samples, starts, strict=True)]
    return [batch.on_rank(world) for batch in whole[world.data_rank :: world.data_size]]


def _starts(begins: list[int]) -> torch.Tensor:
    return torch.tensor([document_starts(begins, length=LENGTH)])


def steps_on_rank(values: dict, steps: int = STEPS, mistake: Callable[[pytest.MonkeyPatch], None] | None = None):
    """Takes steps from the initial weights, with a mistake made in the product's code."""
    from sambalm.pretrain.config_file import parse_config

    def given(step: int, config, world) -> list:
        return batches(step, config=config, world=world)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if mistake:
            mistake(monkeypatch)
        return take_steps(parse_config(values, source="test"), steps=steps, batches=given)


def steps_call(
    model: dict[str, Any],
    parallel: dict[str, Any],
    *,
    ranks: int,
    documents: bool = False,
    mistake: Callable[[pytest.MonkeyPatch], None] | None = None,
    steps: int = 2,
) -> Call:
    """Steps of a model on a layout. By default two: the second is of weights that the first has changed."""
    return Call(
        steps_on_rank, (run_values(model=model, parallel=parallel, documents=documents), steps, mistake), ranks=ranks
    )


@functools.cache
def _one_process(model: tuple, values: tuple) -> Steps:
    (result,) = run_world(steps_on_rank, run_values(model=dict(model), **dict(values)), ranks=1)
    return result


def one_process(model: dict | None = None, **values: Any) -> Steps:
    """Steps of a process alone, computed once for each model and values of a run."""
    return _one_process(tuple(sorted((model or {}).items())), tuple(sorted(values.items())))


def assert_like_one_process(ranks: list[Steps], expected: Steps, *, gradients: float, norms: float) -> None:
    """Compares what ranks saw of a step or several with the same of one process: gradients, losses and norms.

    Args:
        gradients, norms: how far these may differ, relative to one process's; losses may by 1e-5.
    """
    worst = differences([result.gradients for result in ranks], whole(expected.gradients))
    assert {name: value for name, value in worst.items() if value > gradients} == {}
    for result in ranks:
        steps = len(result.losses)
        assert result.losses == pytest.approx(expected.losses[:steps], rel=1e-5)
        assert result.norms == pytest.approx(expected.norms[:steps], rel=norms)


def largest_difference(ranks: list[Steps], expected: Steps) -> float:
    """The largest relative difference of a gradient."""
    return max(differences([result.gradients for result in ranks], whole(expected.gradients)).values())


def differences(ranks: list[Slices], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """By tensor the largest relative difference of a rank's slice; every copy counts and nothing may be missing."""
    found = compare_slices(ranks, expected)
    missing = [tensor.name for tensor in found if tensor.rank is None]
    assert not missing, f"on no rank, wholly or in part: {missing}"
    return {tensor.name: tensor.difference for tensor in found}
