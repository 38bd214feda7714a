"""Memory and speed of `sambalm data preprocess --shuffle`, without the tokenising before it.

    python benchmarks/shuffle.py [--gigabytes 2] [--folder .]

Makes shards of random documents of 50 to 2,000 tokens, then shuffles them in a process of its own: the documents are
dealt to buckets, and each bucket is sorted and written to the new shards.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from sambalm.data_pipeline.shards import Manifest, ShardEntry, ShardWriter, TokenizerEntry
from sambalm.data_pipeline.shuffle import Buckets

VOCAB_SIZE = 32_000
SHARD_BYTES = 250_000_000


def made_shard(prefix: Path, *, seed: int) -> ShardEntry:
    random, writer = np.random.RandomState(seed), ShardWriter(prefix, VOCAB_SIZE)
    lengths = random.randint(50, 2001, size=SHARD_BYTES // 2 // 1025)
    writer.add_documents(random.randint(0, VOCAB_SIZE, size=int(lengths.sum()), dtype=np.uint16), lengths)
    entry = writer.finish()
    writer.commit()
    return entry


def shuffled(folder: Path, manifest: Manifest) -> tuple[float, float, float]:
    """Seconds of both passes, and the most memory in MB."""
    start_s = time.perf_counter()
    buckets = Buckets(folder / "data", manifest, seed=0)
    buckets.fill()
    dealt_s, writer = time.perf_counter(), None
    for number, batch in buckets.batches(bucket=0, document=0):
        if writer is None:
            writer = ShardWriter(folder / f"shuffled_{number:05d}", VOCAB_SIZE)
        writer.add_documents(batch.tokens, batch.lengths)
        if 2 * writer.tokens >= SHARD_BYTES or number == buckets.count - 1:
            writer.finish()
            writer.commit()
            writer = None
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return dealt_s - start_s, time.perf_counter() - dealt_s, peak_mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of tokens; the disk holds them twice")
    parser.add_argument("--folder", type=Path, default=Path(), help="where they are made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        count = max(1, round(arguments.gigabytes * 1e9 / SHARD_BYTES))
        shards = [made_shard(folder / f"data_{number:05d}", seed=number) for number in range(count)]
        tokenizer = TokenizerEntry(path="none", sha256="", vocab_size=VOCAB_SIZE, eos_id=2)
        manifest = Manifest(tokenizer=tokenizer, shards=shards, skipped_documents=0, sources=[], options={})
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            deal_s, sort_s, peak_mb = pool.apply(shuffled, (folder, manifest))
    size, documents = sum(shard.bin_bytes for shard in shards) / 1e6, sum(shard.documents for shard in shards)
    print(f"{documents:,} documents, {size:,.0f} MB of tokens")
    print(f"{deal_s:.1f} s to deal, {sort_s:.1f} s to sort: {size / (deal_s + sort_s):.0f} MB/s; peak {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
