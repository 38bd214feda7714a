"""What a schema finds wrong in plain values, in a sentence that says what to do; and numbers as people write them."""

import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_NUMBER = re.compile(r"([-+]?\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?) ?([kKMGBT]?)")
_UNITS = {"": 1, "B": 10**9, "T": 10**12}
_LARGEST = 2**63
_NUMBER_ERRORS = {"int_type", "int_from_float", "float_type"}

Schema = TypeVar("Schema", bound=BaseModel)


def validated(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Makes a schema of plain values, of which numbers may be written as 1e3, 1_000, 20B or 3.2T.

    Raises:
        ValidationError: as pydantic does; `sentence` makes words of it.
    """
    try:
        return schema.model_validate(values, strict=True)
    except ValidationError as error:
        numbers = dict(_numbers(error, values))
        if not numbers:
            raise
    for keys, number in numbers.items():
        values = _replaced(values, keys, number)
    return schema.model_validate(values, strict=True)


def whole_number(value: Any) -> int | None:
    """The whole number that a value or its text stands for, such as 20B; None where it stands for none."""
    if isinstance(value, int):
        return value
    number = _number(value, whole=True)
    return None if number is None else int(number)


def _numbers(error: ValidationError, values: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], int | float]]:
    for one in error.errors():
        if (
            one["type"] in _NUMBER_ERRORS
            and (number := _number(one["input"], whole=one["type"] != "float_type")) is not None
        ):
            yield tuple(key_path(one, values)), number


def _number(value: Any, *, whole: bool) -> int | float | None:
    """The number that a value of another type stands for; None where it stands for none."""
    if isinstance(value, float):
        return int(value) if whole and value.is_integer() and abs(value) < _LARGEST else None
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if not found or found[2] not in _UNITS:
        return None
    number = float(found[1]) * _UNITS[found[2]]
    if abs(number) >= _LARGEST:
        return None
    if whole and not round(number, 3).is_integer():  # 3.2 x 10^12 need not be exact in binary
        return None
    return round(number) if whole else number


def _replaced(values: Any, keys: Sequence[str | int], number: int | float) -> Any:
    """A copy of the values with one of them replaced; the caller's stay as they are."""
    if not keys:
        return number
    copied = values.copy()
    copied[keys[0]] = _replaced(values[keys[0]], keys[1:], number)
    return copied


def sentence(error: ValidationError, values: dict[str, Any], *, schema: type[BaseModel]) -> str:
    """What pydantic found wrong in plain values, as a sentence that names key, value and what is allowed."""
    return _sentence(telling_error(error), values, schema)


def telling_error(error: ValidationError) -> ErrorDetails:
    """The error to tell of: an unknown key before what is missing for it, then the first.

    Of a key with several allowed types it is the one that went deepest into the given value.
    """
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    place = first["loc"][:2]
    return max((one for one in errors if one["loc"][:2] == place), key=lambda one: len(one["loc"]))


def key_path(error: ErrorDetails, values: Any) -> list[str | int]:
    """Where an error is, without the names of types that pydantic puts between keys."""
    keys: list[int | str] = []
    for part in error["loc"]:
        is_key = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if is_key:
            values = values[part]
            keys.append(part)
    return [*keys, error["loc"][-1]] if error["type"] == "missing" else keys


def did_you_mean(name: str, names: Sequence[str], *, above: str = "") -> str:
    """A question after a name that is none, with the nearest of the names; empty where none is near.

    Args:
        above: goes before that name, such as "train.".
    """
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {above}{near[0]}?" if near else ""


def _sentence(error: ErrorDetails, values: dict[str, Any], schema: type[BaseModel]) -> str:
    kind, value = error["type"], error["input"]
    location = key_path(error, values)
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return _unknown(location, value, schema)
    if kind == "missing":
        return f"{key} is missing; docs/config.md says what it holds"
    if kind == "model_type":
        section = _section(location, schema)
        keys = f" with the keys {', '.join(section.model_fields)}" if section else ""
        return f"{key} is {shown(value)}: it is a section{keys}"
    message = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if kind == "value_error" and isinstance(value, dict):  # a check over several keys: its message names them
        return message
    hint = _taken_beside(location, value, schema) if kind == "literal_error" else _hint(kind, value)
    return f"{key} is {shown(value)}: {message[0].lower()}{message[1:]}{hint}"


def _hint(kind: str, value: Any) -> str:
    """What to write instead, where that is likely."""
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if kind in _NUMBER_ERRORS and found and found[2] not in _UNITS:
        return f", and {found[2]} is a power of 10 to some and of 2 to others: write the number out"
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        return f": put it in quotes, as in '{value}'"
    return ""


def _taken_beside(location: Sequence[str | int], value: Any, schema: type[BaseModel]) -> str:
    """Names the keys of the section that take a value which another one refuses, such as fp8."""
    fields = getattr(_section(location[:-1], schema), "model_fields", {})
    keys = [".".join(map(str, (*location[:-1], name))) for name in fields if value in _choices(fields[name].annotation)]
    return f"; {' or '.join(keys)} takes {shown(value)}" if keys else ""


def _choices(annotation: Any) -> list[Any]:
    """Returns the values that a type names one by one."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _unknown(location: Sequence[str | int], value: Any, schema: type[BaseModel]) -> str:
    key = ".".join(map(str, location))
    section = _section(location[:-1], schema)
    told = f"unknown key {key} (value {shown(value)})"
    if section is None:
        return told
    names, above = list(section.model_fields), "".join(f"{part}." for part in location[:-1])
    leaf = str(location[-1])
    near = did_you_mean(leaf, names, above=above) or _elsewhere(leaf, schema)
    return f"{told}; allowed in {above.removesuffix('.') or 'a config'}: {', '.join(names)}{near}"


def _elsewhere(leaf: str, schema: type[BaseModel]) -> str:
    """Names the sections that have the key, which is not one of the section where it was given."""
    sections = {name: getattr(_section([name], schema), "model_fields", {}) for name in schema.model_fields}
    found = [f"{name}.{leaf}" for name, keys in sections.items() if leaf in keys]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _section(location: Sequence[str | int], schema: type[BaseModel]) -> type[BaseModel] | None:
    section: Any = schema
    for part in location:
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else None
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None


def shown(value: Any) -> str:
    """A value in an error, cut where it is long or deep."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 4, 20, 20
