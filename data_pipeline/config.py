"""The `data` section of a run's configuration."""

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WeightedSource(BaseModel):
    """A prefix of token shards and its share of the training samples."""

    model_config = ConfigDict(extra="forbid")

    prefix: str = Field(description="Prefix that the data was preprocessed to.")
    weight: float = Field(gt=0, allow_inf_nan=False, description="Share of the samples, relative to the other weights.")
    validation_fraction: float | None = Field(
        default=None, ge=0, lt=1, description="Held-out fraction of this source; default: data.validation_fraction."
    )


class DataConfig(BaseModel):
    """Which tokens a run trains on, in samples of which length, and which part is held out."""

    model_config = ConfigDict(extra="forbid")

    train: str | list[str | WeightedSource] = Field(
        description="Prefix of token shards, or a list: prefixes, drawn in proportion to their tokens, or prefixes "
        "with weights (and, where they differ, fractions to hold out)."
    )
    sequence_length: int = Field(gt=0, description="Tokens per training sample.")
    validation_fraction: float = Field(
        default=0.01, gt=0, lt=1, description="Fraction of each shard's documents, its last ones, held out."
    )
    reset_at_document: bool = Field(
        default=False,
        description="Whether a document sees nothing of those before it in its sample: attention, convolution, Mamba "
        "state and rotary positions start anew.",
    )
    verify: bool = Field(
        default=True,
        description="Whether every token is read once, when the data is new, and compared with the manifest's "
        "checksums and the vocabulary; false checks indices and sizes only.",
    )
    allow_changed: bool = Field(
        default=False, description="Whether a run may go on from a checkpoint whose data, weights or seed were others."
    )
    workers: int = Field(default=2, gt=0, description="Threads of each rank that read batches ahead.")
    cache_dir: str | None = Field(
        default=None,
        description="Directory of the index, which holds what was found in the shards; default: .index_cache beside "
        "the first prefix.",
    )
    tokenizer: str | None = Field(
        default=None, description="SentencePiece model of the data; default: the one that the manifest names."
    )

    @model_validator(mode="after")
    def _check_sources(self) -> "DataConfig":
        if not self.train:
            raise ValueError(f"data.train is {self.train!r}: give at least one prefix")
        if isinstance(self.train, list) and len({type(source) for source in self.train}) > 1:
            raise ValueError("data.train mixes entries with and without a weight; give every entry a weight, or none")
        prefix, times = Counter(self.prefixes).most_common(1)[0]
        if times > 1:
            raise ValueError(f"data.train names {prefix} {times} times: give it once, with the sum of the weights")
        return self

    @property
    def prefixes(self) -> list[str]:
        """Prefixes of all sources, in order."""
        sources = [self.train] if isinstance(self.train, str) else self.train
        return [source if isinstance(source, str) else source.prefix for source in sources]

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources, or None where their tokens decide."""
        sources = [] if isinstance(self.train, str) else self.train
        return [source.weight for source in sources if isinstance(source, WeightedSource)] or None

    @property
    def validation_fractions(self) -> list[float]:
        """Held-out fraction of each source."""
        sources = [self.train] if isinstance(self.train, str) else self.train
        own = [source.validation_fraction if isinstance(source, WeightedSource) else None for source in sources]
        return [self.validation_fraction if fraction is None else fraction for fraction in own]

    @property
    def cache_path(self) -> Path:
        """Directory of the index."""
        return Path(self.cache_dir) if self.cache_dir else Path(self.prefixes[0]).parent / ".index_cache"

    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file, or None where neither this section nor a manifest names one.

        Raises DataError for a damaged manifest.
        """
        if self.tokenizer:
            return Path(self.tokenizer)
        from .shards import read_manifest  # here, so that a config is checked without numpy

        for prefix in self.prefixes:
            if manifest := read_manifest(prefix):
                return Path(prefix).parent / manifest.tokenizer.path
        return None
