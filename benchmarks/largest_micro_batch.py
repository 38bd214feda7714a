"""Prints the largest micro-batch of each config that one GPU holds, by the plan's memory, with each kind of recompute.

    python benchmarks/largest_micro_batch.py configs/samba_*.yaml --gpu-memory-gib 80 141

Nothing is run: docs/planning.md holds the estimates against runs. A tenth of the memory stays free, as `sambalm plan`
has it.
"""

import argparse
import itertools
from pathlib import Path
from typing import get_args

from sambalm.parallel.config import ParallelConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.planner.kernels import planned_kernels
from sambalm.pretrain.planner.memory import stage_memories
from sambalm.pretrain.planner.search import GIB, USABLE_SHARE

LEVELS = get_args(ParallelConfig.model_fields["recompute"].annotation)


def memory_gib(path: Path, *, sequences: int, recompute: str) -> float:
    """The peak of a step of one micro-batch of so many sequences."""
    settings = [
        "run.dir=unused",
        "data.train=unused",
        "data.phases=null",
        "train.steps=1",
        "train.batch_ramp=null",
        f"train.micro_batch_size={sequences}",
    ]
    length = load_config(path, settings).data.sequence_length
    settings += [f"train.global_batch_tokens={sequences * length}", "parallel={recompute: " + recompute + "}"]
    config = load_config(path, settings)
    (memory,) = stage_memories(config, world_size=1, kernels=planned_kernels(config))
    return memory.total_bytes / GIB


def largest(path: Path, *, recompute: str, limit_gib: float) -> str:
    """Sequences and GiB of them."""
    found = ""
    for sequences in itertools.count(1):
        needed = memory_gib(path, sequences=sequences, recompute=recompute)
        if needed > limit_gib * USABLE_SHARE:
            return found or f"none ({needed:.1f} for one)"
        found = f"{sequences} ({needed:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--gpu-memory-gib", nargs="+", type=float, default=[80.0])
    arguments = parser.parse_args()
    columns = [(limit_gib, level) for limit_gib in arguments.gpu_memory_gib for level in LEVELS]
    print("| sequences (GiB) |" + "".join(f" {limit_gib:g} GiB, {level} |" for limit_gib, level in columns))
    print("| --- |" + " ---: |" * len(columns))
    for path in arguments.configs:
        cells = [largest(path, recompute=level, limit_gib=limit_gib) for limit_gib, level in columns]
        print(f"| {path.stem} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
