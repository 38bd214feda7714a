"""Whether a layout gives the gradients of one process: every tensor's, in fp32, on random tokens.

Losses alone show little: most mistakes in a backward leave the first loss as it is. `check_layout` lets the layout and
a process alone take the same steps through the path that training takes, and compares each slice that a rank holds.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from sambalm.model.config import ModelConfig
from sambalm.model.ops.config import KernelConfig
from sambalm.parallel.config import ParallelConfig
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import parse_config
from sambalm.pretrain.local_ranks import run_ranks
from sambalm.pretrain.planner.search import layout_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sambalm.parallel.groups import World
    from sambalm.parallel.micro_batch import MicroBatch

# A large epsilon: AdamW's first steps are signs of gradients, and signs turn rounding errors into whole steps.
ADAMW_EPSILON = 1e-4
# A shrunk model: widths of a few columns for each head and rank, and samples of a few tokens for each rank.
COLUMNS_OF_A_RANK, VOCABULARY = 16, 96
SAMPLE_TOKENS, TOKENS_OF_A_PART, LARGEST_MICRO_BATCH = 64, 16, 2

Slices = list[tuple[str, tuple[int, ...], np.ndarray]]  # canonical name, offsets and values of each slice of a rank
Batches = Callable[[int, RunConfig, "World"], "list[MicroBatch]"]  # of a step, on this rank


@dataclass(frozen=True)
class Steps:
    """What one rank saw: losses and unclipped norms of all steps, and the slices of the first step's gradient."""

    losses: list[float]
    norms: list[float]
    gradients: Slices


@dataclass(frozen=True)
class TensorDifference:
    """How far a tensor's gradient on a layout is from that of one process.

    Attributes:
        difference: the norm of the difference over the norm of one process's gradient, of the slice where it is
            largest; infinite where a number is not finite, or where no rank holds a part of the tensor.
        rank: that holds the slice; None where no rank does.
        offsets, sizes: of the slice in the canonical tensor.
    """

    name: str
    difference: float
    rank: int | None
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def place(self) -> str:
        """Where the difference is, as in 'rank 1, [48:96, 0:16]'."""
        if self.rank is None:
            return "on no rank, wholly or in part"
        region = ", ".join(f"{o}:{o + n}" for o, n in zip(self.offsets, self.sizes, strict=True))
        return f"rank {self.rank}, [{region}]"


@dataclass(frozen=True)
class LayoutCheck:
    """What came of a check.

    Attributes:
        layout: in a few words.
        device: that the ranks ran on, cpu or cuda.
        model: sizes of the model that was checked, where they are not the config's.
        losses, norms: of each step on the layout, from the rank that is farthest from one process.
        expected_losses, expected_norms: of one process.
        tensors: the largest difference first.
    """

    layout: str
    device: str
    model: dict[str, Any]
    losses: list[float]
    norms: list[float]
    expected_losses: list[float]
    expected_norms: list[float]
    tensors: list[TensorDifference]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest relative difference of a gradient, a loss or a norm."""
        numbers = zip(self.losses + self.norms, self.expected_losses + self.expected_norms, strict=True)
        return max(self.tensors[0].difference, *(_relative(*pair) for pair in numbers))

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is null."""
        tensors = [asdict(tensor) | {"difference": _finite(tensor.difference)} for tensor in self.tensors]
        lists = ("losses", "norms", "expected_losses", "expected_norms")
        numbers = {key: list(map(_finite, getattr(self, key))) for key in lists}
        return asdict(self) | numbers | {"tensors": tensors, "worst": _finite(self.worst), "passed": self.passed}

    def describe(self, *, top: int) -> str:
        """The check as text for a terminal, with so many tensors of the largest differences."""
        lines = [f"{self.layout}, on {self.device}, in fp32 with PyTorch kernels"]
        if self.model:
            lines.append("shrunk to " + ", ".join(f"{key} {value}" for key, value in self.model.items()))
        numbers = zip(self.losses, self.expected_losses, self.norms, self.expected_norms, strict=True)
        for step, (loss, expected_loss, norm, expected_norm) in enumerate(numbers, start=1):
            lines.append(
                f"step {step}: loss {loss:.7f}, one process {expected_loss:.7f}; "
                f"gradient norm {norm:.7f}, one process {expected_norm:.7f}"
            )
        shown, rest = self.tensors[:top], self.tensors[top:]
        width = max(len(tensor.name) for tensor in shown)
        lines.append(f"{'gradient of':<{width}}  difference  where")
        lines += [f"{tensor.name:<{width}}  {tensor.difference:>10.1e}  {tensor.place}" for tensor in shown]
        if rest:
            lines.append(f"and {len(rest)} more tensors, at most {rest[0].difference:.1e}")
        verdict = "gives the gradients of one process" if self.passed else "DOES NOT GIVE the gradients of one process"
        lines.append(f"largest difference {self.worst:.1e}, tolerance {self.tolerance:.1e}: the layout {verdict}")
        return "\n".join(lines)


def check_layout(
    config: RunConfig,
    *,
    world_size: int,
    steps: int = 1,
    seed: int = 0,
    shrink: bool = True,
    tolerance: float,
    timeout_s: float = 600.0,
) -> LayoutCheck:
    """Compares the layout of a config on `world_size` local ranks with one process, gradient by gradient.

    Args:
        steps: that both take; gradients are those of the first.
        seed: of the tokens.
        shrink: whether to check a small model of the same layout; see `_shrunk`.
        tolerance: the largest relative difference that passes.
        timeout_s: for the ranks of the layout, and for the process alone.

    Raises:
        ConfigError, ParallelError: the run does not fit the world.
        RanksFailedError: a rank failed, died or did not finish.
    """
    config.check_world(world_size)
    on_gpus = _gpus() >= world_size
    checked = checked_config(config, world_size=world_size, shrink=shrink, timeout_s=timeout_s)
    alone = checked.model_copy(update={"parallel": ParallelConfig(timeout_s=checked.parallel.timeout_s)})
    tokens = {"seed": seed, "part_tokens": checked.data.sequence_length // checked.parallel.context}
    with tempfile.TemporaryDirectory() as output:
        settings: dict[str, Any] = {"timeout_s": timeout_s, "on_gpus": on_gpus, "output": Path(output)}
        (expected,) = run_ranks(_steps_on_rank, alone, steps, tokens, ranks=1, **settings)
        found = run_ranks(_steps_on_rank, checked, steps, tokens, ranks=world_size, **settings)
    return LayoutCheck(
        layout=_layout(config, world_size=world_size),
        device=f"{world_size} x {'cuda' if on_gpus else 'cpu'}",
        model=_changes(config, checked),
        losses=_farthest([rank.losses for rank in found], expected.losses),
        norms=_farthest([rank.norms for rank in found], expected.norms),
        expected_losses=expected.losses,
        expected_norms=expected.norms,
        tensors=compare_slices([rank.gradients for rank in found], whole(expected.gradients)),
        tolerance=tolerance,
    )


def checked_config(config: RunConfig, *, world_size: int, shrink: bool, timeout_s: float) -> RunConfig:
    """The run that is checked: the same layout in fp32 with PyTorch's kernels, a few micro-batches a step.

    Kernels of fp32 are not those of bf16, and tests/gpu compares each with PyTorch's; here they would only add their
    own rounding. A pipeline gets two rounds of micro-batches, so that each stage has several at once, and its stages
    hold the sublayers that they hold in the config's model, whatever the shrunk one would balance.
    """
    parallel, values = config.parallel, config.model_dump()
    if shrink:
        _update(values, _shrunk(config))
    size, length = min(config.train.micro_batch_size, LARGEST_MICRO_BATCH), values["data"]["sequence_length"]
    samples = size * 2 * parallel.pipeline * (world_size // parallel.model_ranks)
    train = {"precision": "fp32", "micro_batch_size": size, "global_batch_tokens": samples * length}
    fields = KernelConfig.model_fields.items()
    changes = {
        "data": {"phases": None},
        "train": train | {"batch_ramp": None, "cuda_graphs": False},
        "optimizer": {"eps": ADAMW_EPSILON},
        # The ranks are ended at timeout_s, with a sentence that names those that hang; until then none gives up.
        "parallel": {"pipeline_layers": _sublayers(config), "timeout_s": 2 * timeout_s},
        "kernels": {name: "torch" for name, field in fields if "torch" in get_args(field.annotation)},
    }
    _update(values, changes)
    return parse_config(values, source="the model to check" + (" (shrunk)" if shrink else ""))


def _update(values: dict[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> None:
    for section, keys in changes.items():
        values[section].update(keys)


def _sublayers(config: RunConfig) -> list[int] | None:
    """The sublayers of each chunk of a pipeline."""
    if config.parallel.pipeline == 1:
        return None
    from sambalm.model.build import chunk_layers

    chunks = chunk_layers(config.model, config.parallel, sequence_length=config.data.sequence_length)
    return [len(layers) for layers in chunks]


def _shrunk(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Changes that make a model small and leave alone what a layout depends on.

    Unchanged are the layer pattern, the numbers of query and kv heads, states, taps and ties. Widths still divide by
    the tensor-parallel ranks, or still do not. The window keeps its share of the sequence, and so the neighbours that
    it reaches on context-parallel ranks. A size that is smaller already stays.
    """
    model, parallel = config.model, config.parallel
    ranks, unit = parallel.tensor, parallel.context * (parallel.tensor if parallel.sequence else 1)
    length = unit * math.ceil(max(SAMPLE_TOKENS, TOKENS_OF_A_PART * parallel.context) / unit)
    length = min(length, config.data.sequence_length)
    hidden_size = model.num_query_heads * _head_dim(config)
    changes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "mlp_size": min(model.mlp_size, COLUMNS_OF_A_RANK * ranks + model.mlp_size % ranks),
        "window": max(min(model.window, 2), round(model.window * length / config.data.sequence_length)),
        "vocab_size": min(model.vocab_size, ranks * math.ceil(VOCABULARY / ranks)),
        "mixers": _shrunk_mixers(model, hidden_size=hidden_size, share=length / config.data.sequence_length),
        "scaling": None,  # whose base the small model would not fit
        "base": {},
    }
    if model.dt_rank:
        changes["dt_rank"] = math.ceil(model.dt_rank * hidden_size / model.hidden_size)
    return {"model": changes, "data": {"sequence_length": length}}


def _shrunk_mixers(model: ModelConfig, *, hidden_size: int, share: float) -> dict[str, dict[str, Any]]:
    kinds = (one for one in model.kinds if one.sizes)
    changes = {one.name: one.shrunk(model, hidden_size=hidden_size, sequence_share=share) for one in kinds}
    return model.mixers | {name: model.mixers.get(name, {}) | keys for name, keys in changes.items() if keys}


def _head_dim(config: RunConfig) -> int:
    """The smallest even one from 4 on with which Mamba's channels divide by the ranks as those of the config do."""
    model, ranks = config.model, config.parallel.tensor

    def divides(width: int) -> bool:
        return width % ranks == 0

    for head_dim in range(4, model.head_dim, 2):
        hidden_size = model.num_query_heads * head_dim
        inner_size = model.expand * hidden_size
        enough = inner_size >= min(model.inner_size, COLUMNS_OF_A_RANK * ranks)
        enough &= hidden_size >= min(model.hidden_size, COLUMNS_OF_A_RANK)
        if enough and divides(inner_size) == divides(model.inner_size):
            return head_dim
    return model.head_dim


def _changes(config: RunConfig, checked: RunConfig) -> dict[str, Any]:
    """Sizes of the checked model that are not the config's."""
    before = config.model.model_dump() | {"sequence_length": config.data.sequence_length}
    after = checked.model.model_dump() | {"sequence_length": checked.data.sequence_length}
    return {key: value for key, value in after.items() if value != before[key]}


def _layout(config: RunConfig, *, world_size: int) -> str:
    parallel = config.parallel
    documents = ", packed documents" if config.data.reset_at_document else ""
    name = f"DP{world_size // parallel.model_ranks} {layout_name(parallel, world_size=world_size)}"
    return f"{name}, recompute {parallel.recompute}{documents}"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _steps_on_rank(config: RunConfig, steps: int, tokens: dict[str, int]) -> Steps:
    def batches(step: int, config: RunConfig, world: "World") -> "list[MicroBatch]":
        return random_batches(step, config=config, world=world, **tokens)

    return take_steps(config, steps=steps, batches=batches)


def random_batches(step: int, *, config: RunConfig, world: "World", seed: int, part_tokens: int) -> "list[MicroBatch]":
    """This rank's micro-batches of a step: uniform tokens, the same samples whatever the layout.

    Where documents run as if alone, they begin at random places, and in some samples also where a context-parallel
    rank's part of the sequence begins, or one token before; every fourth sample is one document.

    Args:
        part_tokens: of a sequence on one context-parallel rank of the layout that is checked.
    """
    import torch

    from sambalm.parallel.micro_batch import MicroBatch

    length, size = config.data.sequence_length, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    shape = (config.global_batch_samples, length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    starts = None
    if config.data.reset_at_document:
        drawn = torch.randint(1, max(2, length), (shape[0], 4), generator=generator).tolist()
        borders = list(range(part_tokens, length, part_tokens))
        before = [border - 1 for border in borders]
        begins: list[list[int]] = [
            ([], some, some + borders, some + before)[number % 4] for number, some in enumerate(drawn)
        ]
        starts = torch.tensor([document_starts(some, length=length) for some in begins])
    micro_batches = [
        MicroBatch(tokens[rows, :-1], tokens[rows, 1:], None if starts is None else starts[rows])
        for rows in (slice(first, first + size) for first in range(0, shape[0], size))
    ]
    return [batch.on_rank(world) for batch in micro_batches[world.data_rank :: world.data_size]]


def document_starts(begins: Iterable[int], *, length: int) -> list[int]:
    """Where each token's document begins, in a sample whose documents begin at 0 and at some further tokens."""
    first = {0, *begins}
    starts: list[int] = []
    for token in range(length):
        starts.append(token if token in first else starts[-1])
    return starts


def take_steps(config: RunConfig, *, steps: int, batches: Batches) -> Steps:
    """Takes optimizer steps from the initial weights on this rank, through the path that training takes. Collective.

    The first gradient is read from what AdamW keeps of it, so that it has gone through everything that a gradient goes
    through: the schedule, ties, ZeRO's reductions and clipping.

    Args:
        batches: gives this rank's micro-batches of a step, of which the first is 0.
    """
    from sambalm.model.registry import weight_copies
    from sambalm.parallel.groups import start_world
    from sambalm.parallel.zero.engine import gradient_norm
    from sambalm.pretrain.training import build_training

    copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
    with start_world(config.parallel, copies=copies) as world:
        training = build_training(config, world=world, checkpoint=None, bucket_elements=1)  # a bucket for each layer
        losses, norms, gradients = [], [], []
        for step in range(steps):
            loss = training.executor.train_step(batches(step, config, world))
            losses.append((world.sum_over_replicas(loss) / world.replica_size).item())
            norms.append(float(gradient_norm(training.engine)))
            if step == 0:
                gradients = _first_gradients(training.chunks, norm=norms[0], config=config)
    return Steps(losses, norms, gradients)


def _first_gradients(chunks: "Iterable[nn.Module]", *, norm: float, config: RunConfig) -> Slices:
    """The first step's gradient from AdamW's first moment after it: (1 - beta1) x clip / norm x gradient."""
    from sambalm.parallel.zero.engine import whole_moment

    scale = (1 - config.optimizer.beta1) * min(1.0, config.optimizer.clip_norm / norm)
    return local_slices(chunks, lambda parameter: whole_moment(parameter, "exp_avg") / scale)


def local_slices(chunks: "Iterable[nn.Module]", value: "Callable[[nn.Parameter], torch.Tensor]") -> Slices:
    """Canonical slices of something that has the shape of each parameter. Collective where value is."""
    from sambalm.parallel.sharding import canonical_slices

    wholes: dict[nn.Parameter, torch.Tensor] = {}
    slices: Slices = []
    for chunk in chunks:
        for name, parameter, piece in canonical_slices(chunk):
            if parameter not in wholes:
                wholes[parameter] = value(parameter).cpu()
            slices.append((name, piece.offsets, piece.of_local(wholes[parameter]).numpy().copy()))
    return slices


def whole(slices: Slices) -> dict[str, np.ndarray]:
    """Tensors by name, of a process that holds all of them."""
    return {name: values for name, _, values in slices}


def compare_slices(ranks: Sequence[Slices], expected: Mapping[str, np.ndarray]) -> list[TensorDifference]:
    """The largest difference of each tensor over all ranks' slices, largest first; every copy of a slice counts."""
    covered = {name: np.zeros(values.shape, dtype=bool) for name, values in expected.items()}
    worst: dict[str, TensorDifference] = {}
    for rank, slices in enumerate(ranks):
        for name, offsets, values in slices:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            covered[name][region] = True
            difference = _distance(values, expected[name][region])
            if name not in worst or difference > worst[name].difference:
                worst[name] = TensorDifference(name, difference, rank, offsets, values.shape)
    for name, mask in covered.items():
        if not mask.all():
            worst[name] = TensorDifference(name, math.inf, None, (0,) * mask.ndim, mask.shape)
    return sorted(worst.values(), key=lambda tensor: -tensor.difference)


def _distance(values: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference over the reference's; infinite where a number is not finite."""
    exact = reference.astype(np.float64)
    return _ratio(float(np.linalg.norm(values - exact)), float(np.linalg.norm(exact)))


def _ratio(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) and math.isfinite(size) else math.inf


def _relative(number: float, reference: float) -> float:
    return _ratio(abs(number - reference), abs(reference))


def _farthest(ranks: Sequence[list[float]], expected: list[float]) -> list[float]:
    """The ranks' numbers that are farthest from the expected ones."""
    return max(ranks, key=lambda numbers: max(map(_relative, numbers, expected)))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
