"""Matrix products in FP8: what is multiplied is rounded to 8 bits, products are summed in fp32.

Inputs and weights are e4m3, gradients e5m2 (arXiv 2209.05433), one scale a tensor. The scales of inputs and gradients
come from the largest numbers of the step before, so that one pass over memory rounds a tensor and finds its largest;
what has grown beyond a scale's reach becomes the largest number of the format. A new run's first step is in the
activations' precision and only finds largest numbers. Weights have the scale of their own largest number, and are
rounded once a step. GPUs take both sides of an FP8 product with the summed dimension innermost (cuBLASLt on Hopper), so
each matrix is written twice, as it is and transposed: the second is what a backward needs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.layers.fp8_rounding import round_both_ways
from sambalm.parallel.zero.parameter_info import find_info, info_of

INPUTS, GRADIENTS = 0, 1  # columns of the store's tables
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)  # of each column
WEIGHTS = torch.float8_e4m3fn
MARGIN = 2.0  # how much larger than in the step before a number may be before it is cut off
ALIGNMENT = 16  # elements of a row, of both sides of a product


@dataclass(frozen=True)
class Rounded:
    """A matrix in FP8, written twice; its numbers are those here times `inverse`."""

    rows: Tensor  # [rows, columns], contiguous
    columns: Tensor  # [columns, rows], contiguous
    inverse: Tensor  # fp32 []


class Fp8Store:
    """All that products in FP8 keep between steps, and between the micro-batches of one.

    Args:
        parameters: of the model on this rank. Those that `ParameterInfo.takes_fp8` get their scales.
        groups: ranks that hold the same or other shares of the same layers, along each dimension of the layout.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, groups: Sequence[dist.ProcessGroup], device: torch.device
    ) -> None:
        infos = [info for info in map(info_of, parameters) if info.takes_fp8]
        shape = (len(infos), len(FORMATS))
        self.groups, self.is_new = groups, True  # until a step has found the largest numbers
        self.largest, self.scales = (torch.zeros(shape, device=device) for _ in range(2))
        self.inverses = torch.zeros(*shape, 4, device=device)[..., 0]  # 16 bytes apart, where cuBLAS looks for them
        self.weights: dict[int, Rounded] = {}
        self.renewed: set[int] | None = None  # while a step's first micro-batch rounds weights
        self.keeps = False
        for number, info in enumerate(infos):
            info.fp8 = ProductScales(self, number)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Goes around a step's micro-batches, within which weights do not change."""
        self.keeps = True
        try:
            yield
        finally:
            self.keeps = False

    @contextmanager
    def renewing(self) -> Iterator[None]:
        """Goes around the first micro-batch, or all of them: each weight is rounded anew at its first use."""
        self.renewed = set()
        try:
            yield
        finally:
            self.renewed = None

    def finish_step(self) -> None:
        """Sets the scales of the next step, which are the same on all ranks. Collective."""
        for group in self.groups:
            dist.all_reduce(self.largest, op=dist.ReduceOp.MAX, group=group)
        for kind in range(len(FORMATS)):
            _set_scale(self.largest[:, kind], self.scales[:, kind], self.inverses[:, kind], dtype=FORMATS[kind])
        self.largest.zero_()
        self.is_new = False


class ProductScales:
    """One product's scales and weight in the store."""

    def __init__(self, store: Fp8Store, number: int) -> None:
        self.store, self.number = store, number

    def round(self, parts: Sequence[Tensor], kind: int, *, records: bool) -> Rounded:
        """Rounds a matrix whose parts [rows, some columns] stand side by side.

        Args:
            kind: INPUTS or GRADIENTS.
            records: whether the next step's scale shall know the largest number.
        """
        store = self.store
        scale, inverse = store.scales[self.number, kind], store.inverses[self.number, kind]
        largest = store.largest[self.number, kind] if records else None
        return Rounded(*round_both_ways(parts, scale, largest=largest, dtype=FORMATS[kind]), inverse)

    def observe(self, tensor: Tensor, kind: int) -> None:
        """Lets the next step's scale know of a tensor that is not rounded."""
        largest = self.store.largest[self.number, kind]
        largest.copy_(torch.maximum(largest, _largest_of(tensor)))

    def weight(self, get: Callable[[], Tensor]) -> Rounded:
        """Rounds the product's whole weight [out, in], or returns what the step's first micro-batch has rounded."""
        store, kept = self.store, self.store.weights.get(self.number) if self.store.keeps else None
        renews = store.renewed is not None and self.number not in store.renewed
        if kept and not renews:
            return kept
        weight = get()
        scale, inverse = (torch.ones((), device=weight.device) for _ in range(2))
        _set_scale(_largest_of(weight), scale, inverse, dtype=WEIGHTS)
        out = (kept.rows, kept.columns) if kept else None  # at the same place, where CUDA graphs look for them
        rows, columns = round_both_ways([weight], scale, largest=None, dtype=WEIGHTS, out=out)
        if kept:
            kept.inverse.copy_(inverse)
        rounded = kept or Rounded(rows, columns, inverse)
        if store.keeps:
            store.weights[self.number] = rounded
        if store.renewed is not None:
            store.renewed.add(self.number)
        return rounded

    @property
    def state(self) -> list[float]:
        """What a run needs to go on with the same bits; empty before its first step."""
        return [] if self.store.is_new else self.store.scales[self.number].tolist()

    def load(self, state: list[float]) -> None:
        store, scales = self.store, torch.tensor(state)
        store.scales[self.number].copy_(scales)
        store.inverses[self.number].copy_(1 / scales)
        store.is_new = False


def product(left: Tensor, right: Tensor, inverses: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """Returns left @ right.T of [m, k] and [n, k], whose numbers are those here times `inverses`.

    Args:
        options: those of torch._scaled_mm.
    """
    return torch._scaled_mm(left, right.t(), *inverses, **options)


def scales_of(weights: Sequence[Tensor], *, rows: int) -> ProductScales | None:
    """Returns the scales of a product with weights taken as one, which the first has; None if it is not in FP8.

    Args:
        rows: of its input.
    """
    info = find_info(weights[0])
    if info is None or info.fp8 is None:
        return None
    sizes = (rows, weights[0].shape[1], sum(len(weight) for weight in weights))
    return None if any(size % ALIGNMENT for size in sizes) else cast(ProductScales, info.fp8)


def _largest_of(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float32)


def _set_scale(largest: Tensor, scale: Tensor, inverse: Tensor, *, dtype: torch.dtype) -> None:
    """Sets scales, powers of two, and their inverses; those of numbers that are all zero or not finite stay."""
    found = torch.exp2(torch.floor(torch.log2(torch.finfo(dtype).max / MARGIN / largest)))
    known = torch.isfinite(found) & (found > 0)
    scale.copy_(torch.where(known, found, scale))
    inverse.copy_(torch.where(known, 1 / found, inverse))
