"""Whether ranks that hold the same weights hold the same bits, by hashes that the device computes and compares.

Every rank names what it holds by canonical rectangles (`CanonicalSlice`), so ranks that hold the same rectangle are
replicas, whatever made them so: data or context parallelism, norms and biases that tensor parallelism leaves whole,
copied kv heads, or an embedding that a pipeline's first and last stage share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sambalm.parallel.groups import World
from sambalm.parallel.sharding import canonical_slices
from sambalm.parallel.zero.parameter_info import CanonicalSlice, info_of

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}  # elements that are hashed at a time, in 8 bytes each; a CPU's stay in cache
BITS = {4: torch.int32, 2: torch.int16}  # of an element, by its bytes
# Odd numbers of 64 bits whose bits look random; splitmix64 (Steele and others, OOPSLA 2014) has the first two.
STEP, MIX, FOLD = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0xD1342543DE82EF95))
NOTHING = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Difference:
    """A tensor of which ranks hold different bits.

    Attributes:
        name: the canonical tensor's.
        holders: the ranks that agree with each other, the most of them first.
    """

    name: str
    holders: Sequence[Sequence[int]]

    def __str__(self) -> str:
        most, *others = [_ranks(ranks) for ranks in self.holders]
        return f"{self.name} is not the same on {' and '.join(others)} as on {most}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


@dataclass(frozen=True)
class Comparison:
    """A comparison that the device may still be at.

    Attributes:
        differs: whether any rank found a difference, int64 [] on the host once the device is through.
        hashes: this rank's, int64 [held].
        suspects: which of them a group of this rank found different, bool [held].
    """

    differs: Tensor
    hashes: Tensor
    suspects: Tensor


class Replicas:
    """The weights of this rank that other ranks hold too. Making it is collective.

    Args:
        chunks: this rank's of the model, under the engine.
    """

    def __init__(self, chunks: Sequence[nn.Module], *, world: World) -> None:
        self._world = world
        held = {key: tensor for chunk in chunks for key, tensor in _held(chunk)}
        keys: list[list[str]] = [list(held)]
        if world.replica_size < world.size:
            keys = [[]] * (world.size // world.replica_size)
            dist.all_gather_object(keys, list(held), group=world.model_group)
        everyone = [key for of_rank in keys for key in of_rank]
        shared = sorted({key for key in everyone if everyone.count(key) > 1} if len(keys) > 1 else ())
        self._whole = world.replica_size > 1
        self.names = [key for key in held if self._whole or key in set(shared)]
        self._tensors = [held[key] for key in self.names]
        self._shared = len(shared)  # in the model group; this rank holds those whose places are these:
        places = [(number, shared.index(key)) for number, key in enumerate(self.names) if key in set(shared)]
        of_names, of_shared = ([pair[side] for pair in places] for side in (0, 1))
        self._of_names, self._of_shared = (
            torch.tensor(n, dtype=torch.int64, device=world.device) for n in (of_names, of_shared)
        )
        largest = max((tensor().numel() for tensor in self._tensors), default=0)
        self._factors = position_factors(min(CHUNK[world.device.type], max(1, largest)), device=world.device)

    @property
    def any(self) -> bool:
        """Whether there is something to compare; the same on every rank."""
        return self._whole or self._shared > 0

    @property
    def elements(self) -> int:
        """How many numbers of this rank are hashed."""
        return sum(tensor().numel() for tensor in self._tensors)

    @torch.no_grad()
    def compare(self) -> Comparison:
        """Hashes and compares; the host waits for nothing. Collective, and only where there is `any`."""
        hashes = [weights_hash(tensor(), self._factors) for tensor in self._tensors]
        mine = torch.stack(hashes) if hashes else self._factors.new_zeros(0)
        suspects = torch.zeros(len(mine), dtype=torch.bool, device=mine.device)
        if self._whole:
            suspects |= _disagree(mine, mine, group=self._world.replica_group)
        if self._shared:
            # A rank that does not hold a tensor has no say: nothing is less than what it gives.
            least, most = (mine.new_full((self._shared,), NOTHING) for _ in range(2))
            most[self._of_shared], least[self._of_shared] = mine[self._of_names], ~mine[self._of_names]
            found = _disagree(most, ~least, group=self._world.model_group)
            suspects[self._of_names] |= found[self._of_shared]
        differs = suspects.any().long() if len(mine) else mine.new_zeros(())
        dist.all_reduce(differs, op=dist.ReduceOp.MAX)
        if differs.is_cuda:
            differs = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(differs, non_blocking=True)
        return Comparison(differs, mine, suspects)

    def differences(self, comparison: Comparison) -> list[Difference]:
        """Names what a comparison found, in the order of names. Waits for the device. Collective, over the hosts."""
        suspects = zip(self.names, comparison.suspects.tolist(), strict=True)
        names = set().union(*self._world.all_gather_object({name for name, differs in suspects if differs}))
        hashes = zip(self.names, comparison.hashes.tolist(), strict=True)
        found = self._world.all_gather_object({name: value for name, value in hashes if name in names})
        return [Difference(name.partition(" ")[0], _holders(name, found)) for name in sorted(names)]


def _holders(name: str, found: Sequence[Mapping[str, int]]) -> list[list[int]]:
    """Returns the ranks that hold each version of a tensor."""
    holders: dict[int, list[int]] = {}
    for rank, hashes in enumerate(found):
        if name in hashes:
            holders.setdefault(hashes[name], []).append(rank)
    return sorted(holders.values(), key=lambda ranks: -len(ranks))


def _disagree(largest: Tensor, smallest: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Returns for which elements the ranks of a group do not all have the same, bool. Collective."""
    both = torch.stack([largest, ~smallest])  # ~ turns the order around, and no number has a smaller one than itself
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    return both[0] != ~both[1]


def _held(chunk: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yields a key for each rectangle that a chunk's parameters hold, the same on all ranks with it, and its numbers.

    Left out is what ZeRO-3 has taken apart: only products read that, no tensor-parallel rank holds a copy of it, and of
    a replica's share there is one.
    """
    for name, parameter, piece in canonical_slices(chunk):
        if not info_of(parameter).is_partitioned:
            yield f"{name} {piece.offsets} {piece.sizes}", partial(_slice, parameter, piece)


def _slice(parameter: nn.Parameter, piece: CanonicalSlice) -> Tensor:
    return piece.of_local(_weight(parameter))


def _weight(parameter: nn.Parameter) -> Tensor:
    """Returns what this rank computes with: the parameter, or its compute weights where ZeRO gathers those alone."""
    store = info_of(parameter).compute_weights
    adopted = store.adopted_copy(parameter) if store else None
    return parameter.detach() if adopted is None else adopted


def position_factors(count: int, *, device: torch.device) -> Tensor:
    """Returns an odd number for each position in a chunk, int64 [count]."""
    factors = torch.arange(1, count + 1, device=device) * STEP
    factors = (factors ^ (factors >> 32)) * MIX
    return (factors ^ (factors >> 29)) | 1


def weights_hash(tensor: Tensor, factors: Tensor) -> Tensor:
    """Returns a sum of the elements' bits, each times an odd number of its position, modulo 2^64, int64 [].

    An odd number can be divided out, so that a change of a single element always changes the hash. Sums of integers are
    the same in any order.

    Args:
        tensor: of elements of 2 or 4 bytes.
        factors: `position_factors` of at least the tensor's elements, or of a chunk.
    """
    bits = tensor.contiguous().flatten().view(BITS[tensor.element_size()])
    total = factors.new_zeros(())
    for chunk in bits.split(len(factors)):
        total = total * FOLD + (chunk * factors[: len(chunk)]).sum()
    return total
