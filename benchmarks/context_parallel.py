"""Bytes that context parallelism sends for each layer and rank, beside ring attention and all-to-all.

    python benchmarks/context_parallel.py

Counts what a small model hands to torch.distributed on real ranks, shows that the formulas give the same, and prints
the formulas for the paper's models.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml

from sambalm.model.config import ModelConfig
from sambalm.model.samba import Samba
from sambalm.parallel.config import ParallelConfig
from sambalm.parallel.groups import ContextParallel, start_world
from sambalm.parallel.sharding import initialize_parameters

CONFIGS = Path(__file__).parents[1] / "configs"
STATE_BYTES = 4  # scan states are fp32 whatever the activations are
SMALL = {"hidden_size": 16, "num_query_heads": 4, "num_kv_heads": 2, "mlp_size": 8, "window": 5, "vocab_size": 32}
# isend and irecv are not among them: in batches they serve as names.
UNCOUNTED = ("all_gather", "all_reduce", "all_to_all", "all_to_all_single", "broadcast", "gather", "recv", "reduce")
UNCOUNTED += ("reduce_scatter", "scatter", "send")


@dataclass(frozen=True)
class Shard:
    """One sequence a rank in `ranks` parts, and the bytes of an activation."""

    length: int
    ranks: int
    element_bytes: int = 2

    @property
    def part(self) -> int:
        return self.length // self.ranks


# Bytes that a rank sends for a layer, forward and backward together. Ours are those of a rank with enough ranks on
# either side, and less at the ends of the sequence.


def passed_states(config: ModelConfig, cut: Shard) -> int:
    """Ours, Mamba: the convolution's tokens to the next rank; decay and reached state to all others."""
    halo = min(config.d_conv - 1, cut.length - cut.part) * config.inner_size * cut.element_bytes
    states = (cut.ranks - 1) * 2 * config.inner_size * config.d_state * STATE_BYTES
    return 2 * (halo + states)


def passed_window(config: ModelConfig, cut: Shard) -> int:
    """Ours, attention: keys and values of the window, to one neighbour or to several."""
    return 2 * min(config.window - 1, cut.length - cut.part) * 2 * config.kv_size * cut.element_bytes


def ring(config: ModelConfig, cut: Shard) -> int:
    """Ring attention: keys and values go round forward and backward, with them their gradients, back to their owner."""
    key_values = cut.part * 2 * config.kv_size * cut.element_bytes
    return (cut.ranks - 1) * key_values + (cut.ranks - 1) * key_values + cut.ranks * key_values


def all_to_all_attention(config: ModelConfig, cut: Shard) -> int:
    """From sequence to heads and back; a rank needs a whole kv head at least. (Query heads often do not divide.)"""
    kv_width = max(config.kv_size / cut.ranks, config.head_dim)
    widths = 2 * config.hidden_size / cut.ranks + 2 * kv_width  # to each other rank: queries, output, keys, values
    return round(2 * (cut.ranks - 1) * cut.part * widths * cut.element_bytes)


def all_to_all_mamba(config: ModelConfig, cut: Shard) -> int:
    """From sequence to channels and back: x, z and the output; without what x_proj would need besides."""
    return round(2 * (cut.ranks - 1) * cut.part * 3 * config.inner_size / cut.ranks * cut.element_bytes)


COLUMNS = {
    "Mamba": passed_states,
    "attention": passed_window,
    "ring attention": ring,
    "all-to-all attention": all_to_all_attention,
    "all-to-all Mamba": all_to_all_mamba,
}


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Lists the bytes that this rank hands to torch.distributed for other ranks; refuses calls that it cannot count."""
    sent: list[int] = []
    batched, gather, scatter = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    isend = dist.isend

    def count_batch(operations: Sequence[dist.P2POp]) -> Any:
        sent.extend(o.tensor.nbytes for o in operations if o.op is isend)
        return batched(operations)

    def count_gather(output: torch.Tensor, own: torch.Tensor, group: Any) -> Any:
        sent.append(own.nbytes * (dist.get_world_size(group) - 1))
        return gather(output, own, group=group)

    def count_scatter(own: torch.Tensor, contributions: torch.Tensor, group: Any) -> Any:
        sent.append(own.nbytes * (dist.get_world_size(group) - 1))
        return scatter(own, contributions, group=group)

    counted = {
        "batch_isend_irecv": count_batch,
        "all_gather_into_tensor": count_gather,
        "reduce_scatter_tensor": count_scatter,
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in counted.items():
            stack.enter_context(mock.patch.object(dist, name, replacement))
        for name in UNCOUNTED:
            stack.enter_context(mock.patch.object(dist, name, side_effect=AssertionError(f"{name} is not counted")))
        yield sent


def count_sent(config: ModelConfig, *, batch: int, length: int, cp: ContextParallel) -> tuple[int, int]:
    """Bytes that this rank sends in a model's forward, and in its backward, in fp32. Collective."""
    model = Samba(config, cp=cp)
    initialize_parameters(model, seed=0)
    tokens = cp.part(torch.zeros(batch, length, dtype=torch.int64))
    with counting() as forward:
        loss = model(tokens, tokens).mean()
    with counting() as backward:
        loss.backward()
    return sum(forward), sum(backward)


def _count_on_rank(rank: int, ranks: int, store: str, length: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    with start_world(ParallelConfig(context=ranks)) as world:
        for letter, formula in (("M", passed_states), ("*", passed_window), ("-", None)):
            config = ModelConfig(pattern=letter, **SMALL)
            counted = sum(count_sent(config, batch=1, length=length, cp=world.context))
            expected = formula(config, Shard(length, ranks, element_bytes=4)) if formula else 0
            if rank == 1:  # neither first nor last
                print(f"  {letter} {length:4} tokens: {counted:6,} bytes counted, {expected:6,} by the formula")
            if rank == 1 and counted != expected:
                sys.exit(1)


def print_table(ranks: int, names: Sequence[str], lengths: Sequence[int]) -> None:
    for name in names:
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
        config = ModelConfig.model_validate(values)
        print(f"\n{name}, {ranks} context-parallel ranks, MB sent by a rank for one layer and sequence (bf16)\n")
        print("| tokens | " + " | ".join(COLUMNS) + " |\n| ---: |" + " ---: |" * len(COLUMNS))
        for length in lengths:
            sizes = [formula(config, Shard(length, ranks)) / 1e6 for formula in COLUMNS.values()]
            print(f"| {length // 1024}K | " + " | ".join(f"{size:,.2f}" for size in sizes) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["samba_421m", "samba_3.8b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1 << power for power in range(12, 21, 2)])
    arguments = parser.parse_args()
    print("counted on 3 ranks, a model of one layer, fp32:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for length in (24, 96):
            torch.multiprocessing.spawn(_count_on_rank, (3, f"{folder}/{length}", length), nprocs=3)
    for ranks in arguments.ranks:
        print_table(ranks, arguments.models, arguments.lengths)


if __name__ == "__main__":
    main()
