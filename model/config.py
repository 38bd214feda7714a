"""What a model is: its sizes and layer pattern (arXiv 2406.07522, section 2 and table 12)."""

import math
import re
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sambalm.model.mixers.attention.sizes import CROSS_LETTER, FULL_LETTER, LETTER, AttentionSizes
from sambalm.model.mixers.base import Mixer
from sambalm.model.mixers.mamba.sizes import MambaSizes
from sambalm.model.mixers.mlp.sizes import MLPSizes
from sambalm.model.registry import MixerError, all_mixers, memory_writers, mixer, mixers_of

# Sizes that a config may leave out where no layer reads them, and the letters of those that do.
_ATTENTION = {LETTER, FULL_LETTER, CROSS_LETTER}
_READERS = {"num_query_heads": _ATTENTION, "num_kv_heads": _ATTENTION, "window": {LETTER}, "mlp_size": {"-"}}
_NOT_OF_BASE = {"vocab_size", "tie_embeddings", "embedding_std", "scaling", "base"}
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
    scaling: Literal["mup"] | None = Field(
        None,
        description="How learning rates and initial weights follow from those of a smaller model, model.base: mup (muP "
        "and Depth-muP, docs/scaling-width.md); null: every width and depth has its own to tune",
    )
    base: dict[str, Any] = Field(
        {},
        description="Sizes in which the model that optimizer.* was tuned on differs from this one, as keys of this "
        "section: hidden_size, pattern, num_query_heads, mlp_size, ...",
    )


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
        sized = {one.name for one in self.kinds if one.sizes}
        if unknown := self.mixers.keys() - sized:
            name = min(unknown)
            if name in {one.name for one in self.kinds}:
                raise ValueError(
                    f"model.mixers has a section {name!r}, whose sizes are keys of model itself, as d_state is: move "
                    "them there"
                )
            known = f"those of its mixers are {', '.join(sorted(sized))}" if sized else "its mixers have none"
            raise ValueError(
                f"model.mixers has a section {name!r}, which is none for model.pattern {self.pattern} ({known}): "
                "remove it"
            )
        for one in self.kinds:
            if one.sizes:
                self.sizes_of(one)
        memory_writers(self.pattern)
        return self

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if bool(self.base) != (self.scaling is not None):
            given, lacks = ("base", "scaling") if self.base else ("scaling", "base")
            raise ValueError(f"model.{given} is set and model.{lacks} is not: set both, or none")
        missing = set(self.pattern) - set(self.base_model.pattern)
        if missing:
            raise ValueError(
                f"model.base.pattern is {self.base['pattern']!r}, which lacks the letter {min(missing)} of "
                f"model.pattern {self.pattern}: add a layer of it"
            )
        return self

    @property
    def base_model(self) -> "ModelConfig":
        """The model whose learning rates and initial weights this one's follow from; itself without `scaling`."""
        return self if self.scaling is None else self._base_model

    @cached_property
    def _base_model(self) -> "ModelConfig":
        unfit = self.base.keys() & _NOT_OF_BASE
        if unfit:
            raise ValueError(f"model.base has the key {min(unfit)!r}, in which the two models cannot differ: remove it")
        mixers = self.mixers | {name: self.mixers.get(name, {}) | sizes for name, sizes in self._base_mixers().items()}
        values = self.model_dump() | self.base | {"mixers": mixers, "scaling": None, "base": {}}
        try:
            return ModelConfig.model_validate(values, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            message, keys = first["msg"].removeprefix("Value error, "), ".".join(map(str, first["loc"]))
            at = f"model.base.{keys} is {first['input']!r}" if keys else "model.base makes no model"
            raise ValueError(f"{at}: {message[0].lower()}{message[1:]}") from None

    def _base_mixers(self) -> dict[str, dict[str, Any]]:
        found = self.base.get("mixers", {})
        if not isinstance(found, dict) or not all(isinstance(sizes, dict) for sizes in found.values()):
            raise ValueError(f"model.base.mixers is {found!r}: it is a mapping of sections, as model.mixers is")
        return found

    @property
    def output_scale(self) -> float:
        """What the last norm's weight begins with: its sum with the head grows with the width otherwise."""
        return self.base_model.hidden_size / self.hidden_size

    @property
    def query_scale(self) -> float:
        """What query weights are multiplied by: with it scores are divided by the head dim, without by its root."""
        return math.sqrt(self.base_model.head_dim / self.head_dim)

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
