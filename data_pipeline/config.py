"""The `data` section of a run's configuration."""

from collections import Counter
from pathlib import Path
from typing import Literal

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
    validation: str | list[str | WeightedSource] | None = Field(
        default=None,
        description="Data to validate on beside the held-out parts, all of it, each prefix by its name: a prefix, or "
        "a list as data.train takes, whose weights or tokens share validation.tokens; null: none.",
    )
    sequence_length: int = Field(gt=0, description="Tokens per training sample.")
    validation_fraction: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Fraction of each shard's documents, its last ones, held out; 0 (nothing) takes data.validation.",
    )
    packing: Literal["stream", "documents"] = Field(
        default="stream",
        description="What a sample is: consecutive tokens of the stream of documents, wherever they begin and end, or "
        "whole documents, as many consecutive ones as fit; what is left of the sample then does not count in the loss.",
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
        check_list(self.train, "data.train")
        if self.validation is not None:
            check_list(self.validation, "data.validation")
            self._check_validation(self.validation)
        elif not self.validation_fraction and not any(self.validation_fractions):
            raise ValueError(
                f"data.validation_fraction is {self.validation_fraction:g}, which holds out nothing to validate on: "
                "raise it, or give data.validation"
            )
        return self

    def _check_validation(self, given: "str | list[str | WeightedSource]") -> None:
        for source in _entries(given):
            if not isinstance(source, str) and source.validation_fraction is not None:
                raise ValueError(
                    f"data.validation gives {source.prefix} a validation_fraction, and all of it is validated on: "
                    "remove that key"
                )
            if _prefix(source) in self.prefixes:
                raise ValueError(
                    f"data.validation names {_prefix(source)}, which data.train trains on: give other data, or use its "
                    "held-out part alone (data.validation_fraction)"
                )

    @property
    def separate_validation(self) -> "DataConfig | None":
        """What opens data.validation, all of whose tokens are its training part; None where there is none."""
        if self.validation is None:
            return None
        return self.model_copy(update={"train": self.validation, "validation": None, "validation_fraction": 0.0})

    @property
    def prefixes(self) -> list[str]:
        """Prefixes of all sources, in order."""
        return [_prefix(source) for source in _entries(self.train)]

    @property
    def weights(self) -> list[float] | None:
        """Weights of the sources, or None where their tokens decide."""
        return [source.weight for source in _entries(self.train) if isinstance(source, WeightedSource)] or None

    @property
    def validation_fractions(self) -> list[float]:
        """Held-out fraction of each source."""
        own = [
            source.validation_fraction if isinstance(source, WeightedSource) else None
            for source in _entries(self.train)
        ]
        return [self.validation_fraction if fraction is None else fraction for fraction in own]

    @property
    def cache_path(self) -> Path:
        """Directory of the index."""
        return Path(self.cache_dir) if self.cache_dir else Path(self.prefixes[0]).parent / ".index_cache"

    def chat_template(self) -> str | None:
        """The one chat template that training data were made with; None where there is none, or several.

        Raises DataError for a damaged manifest.
        """
        from .shards import read_manifest

        manifests = [manifest for prefix in self.prefixes if (manifest := read_manifest(prefix))]
        templates = {manifest.options.get("chat_template") for manifest in manifests} - {None}
        (template,) = templates if len(templates) == 1 else (None,)
        return template if isinstance(template, str) else None

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


def no_tokenizer(model: str | Path, data: DataConfig | None) -> str:
    """Says why nobody knows a model's tokenizer, in a sentence: a run's data may lie seen from another folder.

    Args:
        model: what is loaded.
        data: of the run that trained it; None where no run did.
    """
    if data is None:
        return f"{model} names no tokenizer: give one with --tokenizer"
    prefix = data.prefixes[0]
    where = "" if Path(prefix).is_absolute() else f", seen from {Path.cwd()}"
    return (
        f"{model} has its tokenizer from the data {prefix}, of which there is no manifest {prefix}.json{where}: "
        "work in the folder where the run was started, or give a tokenizer with --tokenizer"
    )


def _entries(given: str | list[str | WeightedSource]) -> list[str | WeightedSource]:
    return [given] if isinstance(given, str) else given


def _prefix(source: str | WeightedSource) -> str:
    return source if isinstance(source, str) else source.prefix


def check_list(given: str | list[str | WeightedSource], key: str) -> None:
    """Raises ValueError unless the sources under a key are at least one, all with a weight or none, each once."""
    if not given:
        raise ValueError(f"{key} is {given!r}: give at least one prefix")
    entries = _entries(given)
    if len({type(source) for source in entries}) > 1:
        raise ValueError(f"{key} mixes entries with and without a weight; give every entry a weight, or none")
    prefix, times = Counter(map(_prefix, entries)).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{key} names {prefix} {times} times: give it once, with the sum of the weights")
