"""What reading ahead is worth: time that a step waits for its batch, with no thread and with several.

    python benchmarks/loader.py
    python benchmarks/loader.py --sources 64

Random tokens in shards in a temporary folder (or --folder, for the file system that matters). Each batch is waited
for after some milliseconds of other work, as a training step would; `cold` drops the files from the page cache first.

With --sources: what it costs that a process holds a bounded number of files open. Samples of several lengths are read
from so many sources, turn by turn with all of them open, and with a `ulimit -n` of 1,024 that a run raises or cannot.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from startup import VOCAB_SIZE, write_shards

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import TrainDataset, build_train_dataset
from sambalm.data_pipeline.loader import BatchLoader
from sambalm.data_pipeline.sources import open_sources
from sambalm.data_pipeline.token_stream import allow_open_files
from sambalm.parallel.micro_batch import MicroBatch

LENGTH, MICRO_BATCH, BATCHES = 4096, 8, 200
LENGTHS, SHARDS, READ, TURNS = (1024, 4096, 16384, 65536), 4, 256, 20


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def waits_s(next_batch: Callable[[], object], *, work_s: float) -> list[float]:
    waits = []
    for _ in range(BATCHES):
        end_s = time.perf_counter() + work_s
        while time.perf_counter() < end_s:
            time.sleep(work_s / 10)  # a GPU's work: the processor waits
        start_s = time.perf_counter()
        next_batch()
        waits.append(time.perf_counter() - start_s)
    return waits


def inline(dataset: TrainDataset) -> Callable[[], object]:
    numbers = iter(range(10**9))

    def next_batch() -> list[torch.Tensor]:
        samples = [dataset[next(numbers)] for _ in range(MICRO_BATCH)]
        return [torch.stack(parts) for parts in zip(*samples, strict=True)]

    return next_batch


def measure(prefix: str, *, workers: int, work_s: float, cold: bool) -> list[float]:
    if cold:
        drop_from_page_cache(Path(prefix).parent)
    config = DataConfig(train=prefix, sequence_length=LENGTH, reset_at_document=True, verify=False)
    dataset = build_train_dataset(config, open_sources(config), seed=0)
    if not workers:
        return waits_s(inline(dataset), work_s=work_s)
    loader = BatchLoader(
        dataset,
        make_batch=MicroBatch,
        micro_batch_samples=MICRO_BATCH,
        data_rank=0,
        data_size=1,
        vocab_size=VOCAB_SIZE,
        workers=workers,
    )
    found = waits_s(loader.next_micro_batch, work_s=work_s)
    loader.close()
    return found


def write_sources(folder: Path, *, sources: int) -> list[str]:
    """Makes sources of SHARDS small shards each; returns their prefixes."""
    prefixes = []
    for number in range(sources):
        (folder / str(number)).mkdir()
        prefixes.append(write_shards(folder / str(number), shards=SHARDS, shard_tokens=300_000, documents=300))
    return prefixes


def datasets(prefixes: list[str]) -> list[TrainDataset]:
    """A data set of each length, all of which share their files, as the phases of a run do."""
    configs = [
        DataConfig(train=prefixes, sequence_length=length, reset_at_document=True, verify=False) for length in LENGTHS
    ]
    sources = open_sources(configs[0])
    return [build_train_dataset(config, sources, seed=0) for config in configs]


def processor_s(sets: list[TrainDataset], numbers: range) -> float:
    """Processor time of reading samples, a length after the other; cached files make nobody wait."""
    start_s = time.process_time()
    for number in numbers:
        for dataset in sets:
            dataset[number]
    return time.process_time() - start_s


def compare_limits(folder: Path, *, sources: int) -> None:
    """Prints a table of what samples cost by what `ulimit -n` is."""
    prefixes = write_sources(folder, sources=sources)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = {}
    for name, limit in (("all", most), ("1,024, raised by the run", 1024), ("1,024, and no more allowed", 1024)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        if "raised" in name:
            allow_open_files()
        found[name] = datasets(prefixes)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for sets in found.values():
        processor_s(sets, range(READ))  # into the page cache
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(1, TURNS + 1):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            times[name].append(processor_s(found[name], range(turn * READ, (turn + 1) * READ)))
    lengths = ", ".join(f"{length:,}" for length in LENGTHS)
    print(f"{sources} sources, {2 * SHARDS * sources} files, samples of {lengths} tokens in turn, {TURNS} turns")
    print("| `ulimit -n` | processor time of a sample, us | median ratio | ratio of the least |")
    print("| --- | ---: | ---: | ---: |")
    for name, own in times.items():
        ratio = statistics.median(here / there for here, there in zip(own, times["all"], strict=True))
        least = min(own) / min(times["all"])
        print(f"| {name} | {min(own) / READ / len(LENGTHS) * 1e6:.0f} | {ratio:.3f} | {least:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, help="compare bounds of open files instead")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work-ms", type=float, default=10.0, help="other work before each batch")
    options = parser.parse_args()
    if options.sources:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            compare_limits(Path(folder), sources=options.sources)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = write_shards(Path(folder), shards=20, shard_tokens=20_000_000, documents=20_000)
        print(f"batches of {MICRO_BATCH} x {LENGTH:,} tokens, one each {options.work_ms:g} ms, {os.cpu_count()} cores")
        print("| threads | files | median wait, ms | 99th percentile, ms | of the time |")
        print("| ---: | --- | ---: | ---: | ---: |")
        for cold in (False, True):
            for workers in (0, 1, 2, 4):
                waits = measure(prefix, workers=workers, work_s=options.work_ms / 1000, cold=cold)
                share = sum(waits) / (sum(waits) + BATCHES * options.work_ms / 1000)
                late = statistics.quantiles(waits, n=100)[-1]
                print(
                    f"| {workers or 'none'} | {'cold' if cold else 'cached'} | {statistics.median(waits) * 1000:.2f} | "
                    f"{late * 1000:.2f} | {share:.1%} |"
                )


if __name__ == "__main__":
    main()
