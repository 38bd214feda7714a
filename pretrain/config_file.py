"""Reading a run's YAML file, overrides from the command line, and errors as sentences."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sambalm.parallel.environment import is_main_process
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.credentials import without_credentials
from sambalm.pretrain.errors import ConfigError

# By section the former names of keys and their present ones. Files, overrides and checkpoints may use the former.
RENAMED = {"run": {"fruitless_attempts": "max_attempts_without_progress"}}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as 'train.steps=100'.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bad UTF-8, or a scalar such as the date 2026-13-45
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys: a config is a YAML mapping with the sections of docs/config.md")
    values = _with_present_names(values, source=str(path))
    for override in overrides:
        apply_override(override, values)
    return parse_config(values, source=str(path))


def parse_config(values: dict[str, Any], *, source: str) -> RunConfig:
    """Validates plain values, for example those that a checkpoint holds."""
    values = _with_present_names(values, source=source)
    try:
        return RunConfig.model_validate(values, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{source}: {sentence(error, values, schema=RunConfig)}") from None


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included."""
    return yaml.safe_dump(config_record(config), sort_keys=False)


def config_record(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as plain values for a run's folder; URLs name no user and no password."""
    return without_credentials(config.model_dump())


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 4e-4 as a string; this reads it as the number that it is everywhere else."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
)


def _with_present_names(values: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The values with renamed keys under their present names, each with a notice.

    Raises:
        ConfigError: a key has both names.
    """
    values = dict(values)
    for section, names in RENAMED.items():
        given = values.get(section)
        if not isinstance(given, dict):
            continue
        for former, present in names.items():
            if former not in given:
                continue
            if present in given:
                raise ConfigError(
                    f"{source} holds {section}.{present} and its former name {section}.{former}: remove the latter"
                )
            _tell_of_rename(section, former, source=source)
            given = {present if key == former else key: value for key, value in given.items()}
            values[section] = given
    return values


def _tell_of_rename(section: str, former: str, *, source: str) -> None:
    if is_main_process():
        present = RENAMED[section][former]
        print(f"{source}: {section}.{former} is now called {section}.{present}", file=sys.stderr)


def apply_override(override: str, values: dict[str, Any], *, example: str = "train.steps=100") -> None:
    """Sets what an override such as 'train.steps=100' says in plain values.

    Args:
        example: an override that an error shows.

    Raises:
        ConfigError: it is not of that form, or it contradicts the values.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"the override {override!r} is not of the form section.key=value, as in {example}")
    *sections, leaf = key.split(".")
    names = RENAMED.get(".".join(sections), {})
    if leaf in names:
        _tell_of_rename(sections[0], leaf, source=f"the override {override!r}")
        leaf = names[leaf]
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"the override {override!r} names {key!r}, but {section!r} is not a section")
    try:
        values[leaf] = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"the override {override!r} has a value that is not valid YAML") from None


def sentence(error: ValidationError, values: dict[str, Any], *, schema: type[BaseModel]) -> str:
    """What pydantic found wrong in plain values, as a sentence that names key, value and what is allowed."""
    return _sentence(_telling_error(error.errors()), values, schema)


def _telling_error(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first error; of a key with several allowed types, the one that went deepest into the given value."""
    place = errors[0]["loc"][:2]
    return max((error for error in errors if error["loc"][:2] == place), key=lambda error: len(error["loc"]))


def _sentence(error: ErrorDetails, values: dict[str, Any], schema: type[BaseModel]) -> str:
    kind, value = error["type"], error["input"]
    location = _keys(error, values)
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        section = _section(location[:-1], schema)
        allowed = f"; allowed in {'.'.join(map(str, location[:-1])) or 'a config'}: " if section else ""
        return f"unknown key {key} (value {value!r}){allowed}{', '.join(section.model_fields) if section else ''}"
    if kind == "missing":
        return f"{key} is missing; docs/config.md says what it holds"
    if kind == "model_type":
        section = _section(location, schema)
        keys = f" with the keys {', '.join(section.model_fields)}" if section else ""
        return f"{key} is {value!r}: it is a section{keys}"
    message = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if kind == "value_error" and isinstance(value, dict):  # a check over several keys: its message names them
        return message
    return f"{key} is {value!r}: {message[0].lower()}{message[1:]}"


def _keys(error: ErrorDetails, values: Any) -> list[str | int]:
    """Where an error is, without the names of types that pydantic puts between keys."""
    keys: list[int | str] = []
    for part in error["loc"]:
        is_key = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if is_key:
            values = values[part]
            keys.append(part)
    return [*keys, error["loc"][-1]] if error["type"] == "missing" else keys


def _section(location: Sequence[str | int], schema: type[BaseModel]) -> type[BaseModel] | None:
    section: Any = schema
    for part in location:
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else None
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None
