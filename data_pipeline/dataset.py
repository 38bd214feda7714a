"""Training and validation samples through megatron-core's GPTDataset.

The datasets are constructed here rather than by BlendedMegatronDatasetBuilder, which loops for ever on an empty split,
cannot blend without torch.distributed and leaves half-written caches under their final names. What it does for
several ranks, building on rank 0 first, is done here once for all shards.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .config import DataConfig
from .errors import DataError
from .first_rank import on_first_rank
from .sources import Shard, open_sources

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about accelerator packages that datasets do not use
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

_VISIBLE_AFTER_S = 60


class Sample(NamedTuple):
    """int64 [S] each: tokens; labels, the tokens one position later; and for each token where its document begins.

    `document_starts` is None unless data.reset_at_document.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None


class SampleDataset(torch.utils.data.Dataset):
    """Samples by number.

    `len` is the number of samples that may be asked for; beyond it indexing raises IndexError.
    """

    def __init__(
        self, dataset: GPTDataset | BlendedDataset, *, num_samples: int, prefixes: list[str], reset_at_document: bool
    ) -> None:
        self._dataset = dataset
        self._reset_at_document = reset_at_document
        self._num_samples = num_samples
        self._prefixes = prefixes
        self.sequence_length: int = dataset.config.sequence_length

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < self._num_samples:
            raise IndexError(f"sample {number} of {self._num_samples}")
        sample = self._dataset[number]
        starts = self._document_starts(number) if self._reset_at_document else None
        return Sample(sample["tokens"], sample["labels"], starts)

    def _document_starts(self, number: int) -> torch.Tensor:
        dataset = self._dataset
        if isinstance(dataset, BlendedDataset):
            dataset, number = dataset.datasets[dataset.dataset_index[number]], dataset.dataset_sample_index[number]
        place = dataset.shuffle_index[number]
        (first, offset), (last, _) = dataset.sample_index[place], dataset.sample_index[place + 1]
        lengths = dataset.dataset.sequence_lengths[dataset.document_index[first : last + 1]].astype(np.int64)
        bounds = np.concatenate(([0], np.cumsum(lengths)[:-1] - offset))
        positions = np.arange(self.sequence_length)
        return torch.from_numpy(bounds[np.searchsorted(bounds, positions, side="right") - 1])

    def shard_prefix(self, number: int) -> str:
        """Path prefix of the shard that a sample comes from."""
        if isinstance(self._dataset, BlendedDataset):
            return self._prefixes[self._dataset.dataset_index[number]]
        return self._prefixes[0]


def build_train_dataset(config: DataConfig, *, num_samples: int, seed: int) -> SampleDataset:
    """Exactly `num_samples` training samples of `config.sequence_length`, shuffled by `seed`, over as many epochs as
    that takes.

    Shards of a source are drawn in proportion to their tokens. The order depends on `num_samples`, on the seed and
    on the content of the data. With torch.distributed initialised, every rank has to call this.
    Raises DataError where data is missing, damaged, or shorter than one sample.
    """
    length = config.sequence_length
    shards, shares = _select(config, length=length, held_out=False)
    plan = _Plan(
        length=length,
        seed=seed,
        held_out=False,
        sizes=_blend_sizes(shares, num_samples=num_samples),
        weights=[float(share) for share in shares],
        num_samples=num_samples,
        distributed=dist.is_initialized(),
    )
    return _build(plan, shards, config)


def build_validation_dataset(
    config: DataConfig, *, num_samples: int, seed: int, length_multiple: int = 1
) -> SampleDataset:
    """At most `num_samples` different samples of the held-out part, `length_multiple` times the training length.

    Where there are fewer, `len` of the result says how many. Sources keep their training proportions as far as the
    held-out part lasts. With torch.distributed initialised, every rank has to call this.
    Raises DataError where the held-out part is shorter than one sample.
    """
    length = config.sequence_length * length_multiple
    shards, shares = _select(config, length=length, held_out=True)
    available = np.array([(shard.tokens(held_out=True) - 1) // length for shard in shards])
    counts = _allocate(num_samples, shares=shares, available=available)
    drawn = [(shard, int(count)) for shard, count in zip(shards, counts, strict=True) if count]
    plan = _Plan(
        length=length,
        seed=seed,
        held_out=True,
        sizes=[None] * len(drawn),
        weights=[count for _, count in drawn],
        num_samples=int(counts.sum()),
        distributed=dist.is_initialized(),
    )
    return _build(plan, [shard for shard, _ in drawn], config)


def _select(config: DataConfig, *, length: int, held_out: bool) -> tuple[list[Shard], np.ndarray]:
    """Shards whose part makes at least one sample, and the share of the samples that each should give."""
    sources = open_sources(config)
    shards, weights = [], []
    for source, source_weight in zip(sources, config.weights or [None] * len(sources), strict=True):
        # A shorter part, often the end of a prefix, would repeat itself within one sample.
        usable = [shard for shard in source.shards if shard.tokens(held_out=held_out) > length]
        if not usable and not held_out:
            raise DataError(
                f"no shard of {source.prefix} has {length + 1} training tokens, which one sample needs; "
                "give more data or lower data.sequence_length"
            )
        tokens = np.array([shard.tokens(held_out=held_out) for shard in usable], dtype=np.float64)
        shards += usable
        weights += list(tokens if source_weight is None else tokens / tokens.sum() * source_weight)
    if not shards:
        raise DataError(
            f"no shard of {', '.join(config.prefixes)} has {length + 1} held-out tokens, which one validation sample "
            f"needs; raise data.validation_fraction (now {config.validation_fraction}) or lower data.sequence_length"
        )
    return shards, np.array(weights) / np.sum(weights)


def _blend_sizes(shares: np.ndarray, *, num_samples: int) -> list[int]:
    """How many samples megatron-core's blend draws from each shard at most.

    It draws from a shard only when that is behind its share, which leaves it less than one sample ahead.
    """
    return [int(size) for size in np.ceil(shares * num_samples)]


def _allocate(asked: int, *, shares: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Split `asked` samples by `shares`, none above `available`; what one cannot give, the others do."""
    counts = np.zeros_like(available)
    left = min(asked, int(available.sum()))
    while left:
        open_shares = np.where(counts < available, shares, 0.0)
        grants = np.floor(open_shares / open_shares.sum() * left).astype(counts.dtype)
        grants = np.minimum(grants, available - counts)
        if not grants.any():
            neediest = np.argsort(-open_shares, kind="stable")[: min(left, np.count_nonzero(open_shares))]
            grants[neediest] = 1
        counts += grants
        left -= int(grants.sum())
    return counts


@dataclass(frozen=True)
class _Plan:
    """All that decides the samples apart from the shards. A size of None stands for one epoch of a shard.

    `weights` are shares in training, numbers of samples in validation, one for each shard.
    """

    length: int
    seed: int
    held_out: bool
    sizes: list[int | None]
    weights: list[float] | list[int]
    num_samples: int
    distributed: bool  # megatron-core caches a blend only under torch.distributed

    def key(self, shards: list[Shard]) -> str:
        """Name of the cache; other content under the same prefixes gets another."""
        parts = [(shard.content, shard.prefix, shard.train_documents) for shard in shards]
        return hashlib.sha256(json.dumps([asdict(self), parts]).encode()).hexdigest()[:32]


class _MegatronTokenizer:
    """What GPTDataset asks of a tokenizer, which it keeps for its configuration and the name of its caches."""

    vocab_size = None
    eod = 0  # used by document masks only, which are off
    # GPTDataset replaces this id by 0 wherever it occurs; no shard can hold one below int32.
    pad = -(2**40)

    def __init__(self, key: str) -> None:
        self.unique_identifiers = {"content": key}


def _build(plan: _Plan, shards: list[Shard], config: DataConfig) -> SampleDataset:
    key = plan.key(shards)
    directory = config.cache_path / key
    on_first_rank(lambda: _write_cache(plan, shards, directory))
    _wait_for(directory)
    _refuse_pickles(directory)
    dataset = _assemble(plan, shards, directory, key=key)
    return SampleDataset(
        dataset,
        num_samples=plan.num_samples,
        prefixes=[shard.prefix for shard in shards],
        reset_at_document=config.reset_at_document,
    )


def _wait_for(directory: Path) -> None:
    # A network file system may show a new directory late to other nodes.
    deadline_s = time.monotonic() + _VISIBLE_AFTER_S
    while not directory.is_dir():
        if time.monotonic() > deadline_s:
            raise DataError(f"{directory} is not visible on every node; set data.cache_dir to a shared directory")
        time.sleep(0.5)


def _refuse_pickles(directory: Path) -> None:
    """megatron-core loads the cache with allow_pickle, which runs code from a file that somebody else put there."""
    for path in sorted(directory.glob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is not an array of numbers; remove {directory}, which is made anew") from error


def _write_cache(plan: _Plan, shards: list[Shard], directory: Path) -> None:
    """Write the index of all shards in a temporary directory and rename it, so that a cache is whole or absent."""
    if directory.is_dir():
        return
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _assemble(plan, shards, temporary, key=directory.name)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        # Another run may have got there first, with the same content.
        if not directory.is_dir():
            os.replace(temporary, directory)
    except OSError as error:
        if not directory.is_dir():
            raise DataError(
                f"cannot write the index cache {directory.parent}: {error.strerror or error}; "
                "set data.cache_dir to a writable directory"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _assemble(plan: _Plan, shards: list[Shard], cache: Path, *, key: str) -> GPTDataset | BlendedDataset:
    with _quiet_megatron():
        config = _megatron_config(plan, shards, cache, key=key)
        datasets = [
            _gpt_dataset(shard, size=size, held_out=plan.held_out, config=config)
            for shard, size in zip(shards, plan.sizes, strict=True)
        ]
        if len(datasets) == 1:
            return datasets[0]
        blend_config = config if plan.distributed else replace(config, path_to_cache=None)
        size = None if plan.held_out else plan.num_samples
        return BlendedDataset(datasets, plan.weights, size, blend_config)


def _megatron_config(plan: _Plan, shards: list[Shard], cache: Path, *, key: str) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=plan.seed,
        sequence_length=plan.length,
        blend=([shard.prefix for shard in shards], None),
        split="0,1,0" if plan.held_out else "1,0,0",
        path_to_cache=str(cache),
        mmap_bin_files=True,
        tokenizer=_MegatronTokenizer(key),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=True,
        add_extra_token_to_sequence=True,
    )


def _gpt_dataset(shard: Shard, *, size: int | None, held_out: bool, config: GPTDatasetConfig) -> GPTDataset:
    part = shard.documents(held_out=held_out)
    documents = np.arange(part.start, part.stop, dtype=np.int32)
    split = Split.valid if held_out else Split.train
    return GPTDataset(IndexedDataset(shard.prefix, mmap=True), shard.prefix, documents, size, split, config)


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
