"""The `data` section of a run's configuration."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .shards import read_manifest


class WeightedSource(BaseModel):
    """A prefix of token shards and its share of the training samples."""

    model_config = ConfigDict(extra="forbid")

    prefix: str = Field(description="Prefix that the data was preprocessed to.")
    weight: float = Field(gt=0, description="Share of the samples, relative to the other weights.")


class DataConfig(BaseModel):
    """Which tokens a run trains on, in samples of which length, and which part is held out."""

    model_config = ConfigDict(extra="forbid")

    train: str | list[str | WeightedSource] = Field(
        description="Prefix of token shards, or a list: prefixes, drawn in proportion to their tokens, or prefixes "
        "with weights."
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
    cache_dir: str | None = Field(
        default=None, description="Directory of the sample index; default: .index_cache beside the first prefix."
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
        return self

    @property
    def prefixes(self) -> list[str]:
        """Prefixes of all sources, in order."""
        sources = [self.train] if isinstance(self.train, str) else self.train
        return [source if isinstance(source, str) else source.prefix for source in sources]

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources, or None where their tokens decide."""
        if isinstance(self.train, list) and isinstance(self.train[0], WeightedSource):
            return [source.weight for source in self.train]
        return None

    @property
    def cache_path(self) -> Path:
        """Directory of the sample index."""
        return Path(self.cache_dir) if self.cache_dir else Path(self.prefixes[0]).parent / ".index_cache"

    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file, or None where neither this section nor a manifest names one.

        Raises DataError for a damaged manifest.
        """
        if self.tokenizer:
            return Path(self.tokenizer)
        for prefix in self.prefixes:
            if manifest := read_manifest(prefix):
                return Path(prefix).parent / manifest.tokenizer.path
        return None
