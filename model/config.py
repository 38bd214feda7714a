"""What a model is: its sizes and layer pattern (arXiv 2406.07522, section 2 and table 12)."""

import re
from functools import cached_property
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sambalm.model.mixers.attention.sizes import CROSS_LETTER, FULL_LETTER, LETTER, AttentionSizes
from sambalm.model.mixers.base import Mixer
from sambalm.model.mixers.mamba.sizes import MambaSizes
from sambalm.model.mixers.mlp.sizes import MLPSizes
from sambalm.model.registry import MixerError, all_mixers, memory_writers, mixer, mixers_of

# Sizes that a config may leave out where no layer reads them, and the letters of those that do.
_ATTENTION = {LETTER, FULL_LETTER, CROSS_LETTER}
_READERS = {"num_query_heads": _ATTENTION, "num_kv_heads": _ATTENTION, "window": {LETTER}, "mlp_size": {"-"}}
_PATTERN = re.compile(r"\s*([^\sx\d]+)\s*(?:x\s*(\d+)\s*)?")


class Trunk(BaseModel):
    """What a model has beside its mixers."""

    pattern: str = Field(
        description="Sublayers in order, in megatron-core's notation: M Mamba-1, * sliding-window attention, - SwiGLU, "
        "F full attention, = a SwiGLU of another width, others as in docs/mixers.md; 'M-*- x 6' repeats a pattern"
    )
    hidden_size: int = Field(gt=0, description="Width of the residual stream (d_model)")
    vocab_size: int = Field(gt=0, description="Rows of the embedding; at least the tokenizer's vocabulary")
    tie_embeddings: bool = Field(True, description="Whether the LM head is the embedding matrix")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of every RMSNorm")
    embedding_std: float = Field(0.02, gt=0, description="Standard deviation of the initial embedding")


class ModelConfig(MambaSizes, MLPSizes, AttentionSizes, Trunk):
    """The shape of a model; it does not depend on how the model is spread over ranks.

    Heads, window and MLP width may be left out where no layer of the pattern reads them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mixers: dict[str, dict[str, Any]] = Field(
        {}, description="Sizes of other mixers of the pattern, a section for each under its name"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_unread(cls, values: Any) -> Any:
        pattern = values.get("pattern") if isinstance(values, dict) else None
        if not isinstance(pattern, str):
            return values
        return {key: 1 for key, letters in _READERS.items() if not letters & set(pattern)} | values

    @field_validator("pattern")
    @classmethod
    def _expand_pattern(cls, value: str) -> str:
        match = _PATTERN.fullmatch(value)
        if not match or match[2] == "0":
            raise ValueError(_allowed_letters())
        for letter in set(match[1]):
            try:
                mixer(letter)
            except MixerError:
                raise ValueError(_allowed_letters()) from None
        return match[1] * int(match[2] or 1)

    @model_validator(mode="after")
    def _check_mixers(self) -> Self:
        unknown = self.mixers.keys() - {one.name for one in self.kinds if one.sizes}
        if unknown:
            raise ValueError(
                f"model.mixers has a section {min(unknown)!r}, and no mixer of model.pattern {self.pattern} that has "
                "sizes there has that name: remove it"
            )
        for one in self.kinds:
            if one.sizes:
                self.sizes_of(one)
        memory_writers(self.pattern)
        return self

    @property
    def kinds(self) -> list[Mixer]:
        """Each mixer of the pattern once."""
        return mixers_of(self.pattern)

    def sizes_of(self, one: Mixer) -> Any:
        """Returns the section `model.mixers.NAME` of a mixer as its schema, defaults included.

        Raises:
            ValueError: the section does not fit the schema; a sentence that names the key.
        """
        if one.sizes is None:
            raise TypeError(f"the mixer {one.name} has no sizes of its own")
        return _checked_sizes(one, one.sizes, self.mixers.get(one.name, {}))

    def keys_of_weights(self) -> list[str]:
        """Returns the attributes that must be equal in a model that is to have these weights, but for vocab_size.

        Keys of mixers that the pattern lacks are not among them.
        """
        keys = ["pattern", "hidden_size", "tie_embeddings", "mixers"]
        readers = {key: {"M"} for key in ("d_state", "d_conv", "expand", "dt_rank_size")} | _READERS
        del readers["window"]
        return keys + [key for key, letters in readers.items() if letters & set(self.pattern)]

    def keys_beside_weights(self) -> list[str]:
        """Returns the keys of what a model computes that its weights do not depend on in shape or meaning."""
        readers = {"window": {LETTER}, "rope_base": _ATTENTION}
        return ["norm_eps", *(key for key, letters in readers.items() if letters & set(self.pattern))]

    @cached_property
    def _hash(self) -> int:
        return hash(self.model_dump_json())

    def __hash__(self) -> int:
        return self._hash


def _checked_sizes(one: Mixer, sizes: type[BaseModel], section: dict[str, Any]) -> BaseModel:
    try:
        return sizes.model_validate(section, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("model.mixers", one.name, *first["loc"])))
        if first["type"] == "extra_forbidden":
            allowed = f"allowed in model.mixers.{one.name}: {', '.join(sizes.model_fields)}"
            raise ValueError(f"unknown key {key} (value {first['input']!r}); {allowed}") from None
        raise ValueError(f"{key} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _allowed_letters() -> str:
    letters = [one.letter for one in all_mixers()]
    listed = f"{', '.join(letters[:-1])} and {letters[-1]}"
    return f"allowed are the letters {listed}, and an optional repetition as in 'M-*- x 6'"
