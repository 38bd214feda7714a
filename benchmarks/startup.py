"""From a config to the first batch with thousands of shards, beside megatron-core's builder on the same files.

    python benchmarks/startup.py --shards 10000

The shards are random tokens in a temporary folder. `first` is the first start on new data, in which every token is
read and compared with the checksums; `again` is every later one. megatron-core checks nothing, and its index belongs
to one number of samples.
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import Queue
from pathlib import Path

import numpy as np

from sambalm.data_pipeline.config import DataConfig
from sambalm.data_pipeline.dataset import build_train_dataset, build_validation_dataset
from sambalm.data_pipeline.loader import BatchLoader
from sambalm.data_pipeline.shards import Manifest, ShardWriter, TokenizerEntry, write_manifest
from sambalm.data_pipeline.sources import check_vocabulary, open_sources
from sambalm.parallel.micro_batch import MicroBatch

VOCAB_SIZE, LENGTH = 32_000, 4096


def write_shards(folder: Path, *, shards: int, shard_tokens: int, documents: int) -> str:
    random, entries = np.random.RandomState(0), []
    for number in range(shards):
        writer = ShardWriter(folder / f"data_{number:05d}", VOCAB_SIZE)
        for tokens in np.array_split(random.randint(0, VOCAB_SIZE, size=shard_tokens), documents):
            writer.add(tokens)
        entries.append(writer.finish())
        writer.commit()
    tokenizer = TokenizerEntry(path="none", sha256=hashlib.sha256().hexdigest(), vocab_size=VOCAB_SIZE, eos_id=2)
    manifest = Manifest(tokenizer=tokenizer, shards=entries, skipped_documents=0, sources=[], options={})
    write_manifest(folder / "data", manifest)
    return str(folder / "data")


def ours(prefix: str) -> None:
    config = DataConfig(train=prefix, sequence_length=LENGTH, validation_fraction=0.01, reset_at_document=True)
    sources = open_sources(config)
    check_vocabulary(config, sources, vocab_size=VOCAB_SIZE)
    build_validation_dataset(config, sources, num_samples=256)
    loader = BatchLoader(
        build_train_dataset(config, sources, seed=0),
        make_batch=MicroBatch,
        micro_batch_samples=8,
        data_rank=0,
        data_size=1,
        vocab_size=VOCAB_SIZE,
    )
    loader.next_micro_batch()
    loader.close()


def megatrons(prefix: str, *, shards: int, samples: int) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = VOCAB_SIZE, 2, -1, {"class": "none"}

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        blend=([f"{prefix}_{number:05d}" for number in range(shards)], None),
        split="1,0,0",  # with fewer held-out tokens than a sample in some shard it fails,
        path_to_cache=str(Path(prefix).parent / "megatron"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: True, config).build()
    for number in range(8):
        train[number]


def seconds(action: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def megatrons_seconds(prefix: str, results: Queue, **sizes: int) -> None:
    """In a process of its own: two memory maps of each shard stay open, and a limit on them ends it noisily."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        results.put([seconds(lambda: megatrons(prefix, **sizes)) for _ in range(2)])
    except Exception as error:
        while error.__context__:  # it wraps what went wrong
            error = error.__context__
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        results.put(f"{reason} (at most {most:,})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--shard-tokens", type=int, default=50_000)
    parser.add_argument("--documents", type=int, default=50, help="of each shard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = write_shards(
            Path(folder), shards=options.shards, shard_tokens=options.shard_tokens, documents=options.documents
        )
        samples = options.shards * options.shard_tokens // LENGTH // 2
        print(f"{options.shards:,} shards of {options.shard_tokens:,} tokens, {os.cpu_count()} cores")
        found = [seconds(lambda: ours(prefix)) for _ in range(2)]
        print(f"sambalm         first {found[0]:7.2f} s   again {found[1]:7.2f} s")
        context = multiprocessing.get_context("spawn")
        results, sizes = context.Queue(), {"shards": options.shards, "samples": samples}
        process = context.Process(target=megatrons_seconds, args=(prefix, results), kwargs=sizes)
        process.start()
        theirs = results.get()
        process.join()
    if isinstance(theirs, str):
        print(f"megatron-core   {theirs}")
        return
    print(f"megatron-core   first {theirs[0]:7.2f} s   again {theirs[1]:7.2f} s")
    ratios = [there / here for there, here in zip(theirs, found, strict=True)]
    print(f"ratio           first {ratios[0]:7.1f}     again {ratios[1]:7.1f}")


if __name__ == "__main__":
    main()
