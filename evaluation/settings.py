"""The keys of tasks: their types, what overrides make of them, and errors as sentences."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from sambalm.evaluation.errors import EvaluationError
from sambalm.pretrain.config_errors import sentence, validated
from sambalm.pretrain.config_file import apply_override

_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20}


def _parse_tokens(value: Any) -> Any:
    """Takes 4096, "4096", "4K" and "1M" for numbers; leaves the rest for pydantic to refuse."""
    match = re.fullmatch(r"(\d+)([KM]?)", value.strip().upper()) if isinstance(value, str) else None
    return int(match[1]) * _SUFFIXES[match[2]] if match else value


Tokens = Annotated[int, BeforeValidator(_parse_tokens), Field(gt=0)]


def _check_distinct(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("name each of them once")
    return values


Lengths = Annotated[list[Tokens], Field(min_length=1), AfterValidator(_check_distinct)]


class TaskSettings(BaseModel):
    """The keys of one task. What they hold is part of its protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse_settings(schemas: Mapping[str, type[TaskSettings]], overrides: Sequence[str]) -> dict[str, TaskSettings]:
    """Makes the settings of every task.

    Args:
        schemas: of each task by its name.
        overrides: such as "passkey.lengths=[4K,8K]".

    Raises:
        EvaluationError: naming the key, its value and what is allowed.
        ConfigError: an override is not of that form.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(override, values, example="passkey.lengths=[4K,8K]")
    fields: dict[str, Any] = {name: (schema, Field(default_factory=schema)) for name, schema in schemas.items()}
    whole = create_model("Settings", __config__=ConfigDict(extra="forbid"), **fields)
    try:
        checked = validated(whole, values)
    except ValidationError as error:
        raise EvaluationError(sentence(error, values, schema=whole)) from None
    return {name: getattr(checked, name) for name in schemas}


def shown_tokens(count: int) -> str:
    """Writes 4096 as 4K and 1048576 as 1M, others as they are."""
    for suffix, unit in (("M", 2**20), ("K", 2**10)):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)
