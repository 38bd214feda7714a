"""What a save costs training: written at once, as before saves had a thread, and written while training goes on.

    python benchmarks/checkpoint.py configs/demo.yaml --ranks 2 parallel='{zero_stage: 1}' \
        'model.pattern=M-*- x 3' model.hidden_size=384 model.num_query_heads=6 model.mlp_size=1536
    python benchmarks/checkpoint.py configs/samba_421m.yaml --gpus 1 train.global_batch_tokens=32768 \
        train.micro_batch_size=4

Steps take random tokens. `gathered` is the way of earlier versions: ranks gather whole tensors over the replicas, write
them and read the files again for the checksums, all while training waits. `at once` waits for the end of today's save.
`beside` is what `sambalm train` does: training waits for the copy alone, and `later` is by how much the steps beside
the writing were slower together than as many others. Saves go to a folder below --folder.
"""

import argparse
import functools
import operator
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sambalm.model.registry import weight_copies
from sambalm.parallel.groups import World, start_world
from sambalm.parallel.micro_batch import MicroBatch
from sambalm.parallel.zero.engine import MOMENTS, whole_moment, whole_parameter
from sambalm.parallel.zero.parameter_info import info_of
from sambalm.pretrain.checkpointing import format as files
from sambalm.pretrain.checkpointing.shard_file import write_shards
from sambalm.pretrain.checkpointing.snapshot import SavedSlice, all_slices
from sambalm.pretrain.checkpointing.write import CheckpointWriter
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_file import load_config
from sambalm.pretrain.local_ranks import run_ranks
from sambalm.pretrain.training import Training, build_training

WARM_UP_STEPS, TIMEOUT_S = 3, 3600.0


def gathered_save(training: Training, *, world: World, folder: Path) -> int:
    """Saves as earlier versions did, but for the manifest; returns the bytes of this rank's files."""
    if world.is_main:
        folder.mkdir(parents=True)
    world.barrier()
    saved: list[SavedSlice] = []
    for turn, (name, parameter, piece) in enumerate(all_slices(training.chunks)):
        mine = info_of(parameter).owned and turn % world.replica_size == world.replica_rank
        for kind, whole in _wholes(parameter):
            if mine:
                local = piece.of_local(whole).to("cpu", copy=True).contiguous()
                saved.append(SavedSlice(f"{kind}.{name}", piece.offsets, local))
    write_shards(folder, saved, rank=world.rank)
    world.barrier()
    names = sorted(path.name for path in folder.iterdir())[world.rank :: world.size]
    found = files.checksums(folder, names)
    world.barrier()
    return sum(entry["bytes"] for entry in found.values())


def _wholes(parameter: torch.nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    yield "model", whole_parameter(parameter)
    yield from ((key, whole_moment(parameter, key)) for key in MOMENTS)


class Steps:
    """A rank's steps on random tokens, each timed until the device is through."""

    def __init__(self, config: RunConfig, training: Training, *, world: World) -> None:
        self.training = training
        count = config.accumulation_steps(data_size=world.data_size, batch_samples=config.global_batch_samples)
        shape = (config.train.micro_batch_size, config.data.sequence_length + 1)
        generator = torch.Generator().manual_seed(world.data_rank)
        tokens = [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(count)]
        self.batches = [MicroBatch(t[:, :-1], t[:, 1:], None).on_rank(world) for t in tokens]

    def take(self) -> float:
        """Takes a step; returns its seconds."""
        start_s = time.perf_counter()
        loss = self.training.executor.train_step(self.batches)
        loss.item()
        return time.perf_counter() - start_s


def measure(path: str, overrides: list[str], folder: str, saves: int, steps: int) -> dict[str, float]:
    """One rank's part of the measurement; seconds are means of the saves."""
    config = load_config(Path(path), [*overrides, f"run.dir={folder}", "data.train=unused"])
    copies = weight_copies(config.model, tensor_ranks=config.parallel.tensor)
    with start_world(config.parallel, copies=copies) as world:
        training = build_training(config, world=world, checkpoint=None)
        timed = Steps(config, training, world=world)
        for _ in range(WARM_UP_STEPS):
            timed.take()
        step_s = statistics.median(timed.take() for _ in range(steps))
        found = {"step_s": step_s, "parameters": sum(p.numel() for c in training.chunks for p in c.parameters())}
        writer = CheckpointWriter(config, world=world, data={})
        writer.reserve(training.chunks)
        measured: dict[str, list[float]] = {}
        for number in range(saves):
            for way, save in (("gathered", gathered), ("at once", at_once), ("beside", beside)):
                timed.take()
                world.barrier()
                for name, value in save(timed, writer, world=world, folder=folder, step=number, step_s=step_s).items():
                    measured.setdefault(f"{way} {name}", []).append(value)
                world.barrier()
                if world.is_main:
                    shutil.rmtree(folder)
                os.sync()
        writer.close()
        training.executor.close()
        return found | {name: statistics.mean(values) for name, values in measured.items()}


def gathered(timed: Steps, _: CheckpointWriter, *, world: World, folder: str, **__: object) -> dict[str, float]:
    start_s = time.perf_counter()
    size = gathered_save(timed.training, world=world, folder=Path(folder) / "old")
    return {"stall": time.perf_counter() - start_s, "bytes": float(size)}


def at_once(timed: Steps, writer: CheckpointWriter, *, step: int, **_: object) -> dict[str, float]:
    start_s = time.perf_counter()
    writer.start(timed.training.chunks, step=step, samples=0)
    saved = writer.result()
    return {"stall": time.perf_counter() - start_s, "bytes": float(saved.bytes)}


def beside(
    timed: Steps, writer: CheckpointWriter, *, world: World, step: int, step_s: float, **_: object
) -> dict[str, float]:
    start_s = time.perf_counter()
    writer.start(timed.training.chunks, step=step, samples=0)
    stall_s, later_s = time.perf_counter() - start_s, 0.0
    while int(world.largest([not writer.is_done])):
        later_s += timed.take() - step_s
    saved = writer.result()
    return {"stall": stall_s, "later": later_s, "bytes": float(saved.bytes), "written": saved.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--ranks", type=int, default=1, help="on the CPU")
    parser.add_argument("--gpus", type=int, default=0, help="a rank each, instead")
    parser.add_argument("--saves", type=int, default=3, help="of each way, in turn")
    parser.add_argument("--steps", type=int, default=6, help="timed without a save")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; by default a temporary one")
    arguments, overrides = parser.parse_known_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        values = (arguments.config, overrides, f"{folder}/run", arguments.saves, arguments.steps)
        ranks = arguments.gpus or arguments.ranks
        results = run_ranks(measure, *values, ranks=ranks, timeout_s=TIMEOUT_S, on_gpus=bool(arguments.gpus))
    print_table(results)


def print_table(results: list[dict[str, float]]) -> None:
    """Prints the slowest rank's times, and the bytes of all."""
    of: Callable[[str], float] = lambda name: max(result.get(name, 0.0) for result in results)  # noqa: E731
    step_s = of("step_s")
    size = functools.reduce(operator.add, (result["gathered bytes"] for result in results))
    print(f"{of('parameters') / 1e6:.1f}M parameters a rank, {len(results)} ranks, a step takes {step_s:.3f} s")
    print("| save | stall (s) | stall (steps) | of `at once` | later (s) | until committed (s) | GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way in ("gathered", "at once", "beside"):
        stall_s = of(f"{way} stall")
        written_s = of(f"{way} written") or stall_s
        gigabytes = (size if way == "gathered" else of(f"{way} bytes")) / 1e9
        print(
            f"| {way} | {stall_s:.3f} | {stall_s / step_s:.2f} | {stall_s / of('at once stall'):.1%} "
            f"| {of(f'{way} later'):.3f} | {written_s:.3f} | {gigabytes:.3f} |"
        )


if __name__ == "__main__":
    main()
