"""A few training steps on a layout through the product's own path, and what one process makes of the same samples."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.worlds import run_world

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
Slices = list[tuple[str, tuple[int, ...], np.ndarray]]  # canonical name, offsets and values of each slice of a rank


@dataclass(frozen=True)
class Steps:
    """What one rank saw: losses and unclipped norms of all steps, and the slices of the first step's gradient."""

    losses: list[float]
    norms: list[float]
    gradients: Slices


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
    starts = [_document_starts(begins) if config.data.reset_at_document else None for begins in DOCUMENTS]
    whole = [MicroBatch(s[:, :-1], s[:, 1:], start) for s, start in zip(samples, starts, strict=True)]
    return [batch.on_rank(world) for batch in whole[world.data_rank :: world.data_size]]


def _document_starts(begins: list[int]) -> torch.Tensor:
    return torch.tensor([[max(start for start in [0, *begins] if start <= token) for token in range(LENGTH)]])


def steps_on_rank(values: dict, steps: int = STEPS, mistake: Callable[[pytest.MonkeyPatch], None] | None = None):
    """Takes steps from the initial weights. The first gradient is read from what AdamW keeps of it, so that it has gone
    through everything that a gradient goes through: the schedule, ties, ZeRO's reductions and clipping.
    """
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import gradient_norm
    from sambalm.pretrain.config_file import parse_config
    from sambalm.pretrain.training import build_training

    config = parse_config(values, source="test")
    copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
    with start_world(config.parallel, copies=copies) as world, pytest.MonkeyPatch.context() as monkeypatch:
        if mistake:
            mistake(monkeypatch)
        training = build_training(config, world=world, checkpoint=None, bucket_elements=1)  # a bucket for each layer
        losses, norms, gradients = [], [], []
        for step in range(steps):
            loss = training.execution.train_step(batches(step, config=config, world=world))
            losses.append((world.sum_over_replicas(loss) / world.replica_size).item())
            norms.append(float(gradient_norm(training.engine)))
            if step == 0:
                gradients = _first_gradients(training.parts, norm=norms[0], optimizer=config.optimizer)
    return Steps(losses, norms, gradients)


def _first_gradients(parts, *, norm: float, optimizer) -> Slices:
    """The first step's gradient from AdamW's first moment after it: (1 - beta1) x clip / norm x gradient."""
    from sambalm.parallel.zero.engine import whole_moment

    scale = (1 - optimizer.beta1) * min(1.0, optimizer.clip_norm / norm)
    return local_slices(parts, lambda parameter: whole_moment(parameter, "exp_avg") / scale)


def local_slices(parts, value: Callable[[torch.nn.Parameter], torch.Tensor]) -> Slices:
    """Canonical slices of something that has the shape of each parameter. Collective where value is."""
    from sambalm.parallel.sharding import canonical_slices

    wholes: dict[torch.nn.Parameter, torch.Tensor] = {}
    slices = []
    for part in parts:
        for name, parameter, piece in canonical_slices(part):
            if parameter not in wholes:
                wholes[parameter] = value(parameter)
            slices.append((name, piece.offsets, piece.of_local(wholes[parameter]).numpy().copy()))
    return slices


@functools.cache
def _one_process(model: tuple, values: tuple) -> Steps:
    (result,) = run_world(steps_on_rank, run_values(model=dict(model), **dict(values)), ranks=1)
    return result


def one_process(model: dict | None = None, **values: Any) -> Steps:
    """Steps of a process alone, computed once for each model and values of a run."""
    return _one_process(tuple(sorted((model or {}).items())), tuple(sorted(values.items())))


def whole(slices: Slices) -> dict[str, np.ndarray]:
    """Tensors by name, of a process that holds all of them."""
    return {name: values for name, _, values in slices}


def differences(ranks: list[Slices], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """By tensor the largest relative difference of a rank's slice; every copy counts and nothing may be missing."""
    covered = {name: np.zeros(values.shape, dtype=bool) for name, values in expected.items()}
    worst = dict.fromkeys(expected, 0.0)
    for slices in ranks:
        for name, offsets, values in slices:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            covered[name][region] = True
            reference = expected[name][region].astype(np.float64)
            difference = np.linalg.norm(values - reference) / np.linalg.norm(reference)
            worst[name] = max(worst[name], float(np.nan_to_num(difference, nan=np.inf)))
    missing = [name for name, mask in covered.items() if not mask.all()]
    assert not missing, f"on no rank, wholly or in part: {missing}"
    return worst
