"""Reading a run's YAML file and overrides from the command line, with where each value came from."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sambalm.parallel.environment import is_main_process
from sambalm.pretrain.config import RunConfig
from sambalm.pretrain.config_errors import key_path, sentence, shown, telling_error, validated
from sambalm.pretrain.config_paths import RUN_DIR, folders_of_paths, with_found_paths, with_found_run
from sambalm.pretrain.config_yaml import Key, parse_value, read_yaml
from sambalm.pretrain.credentials import without_credentials
from sambalm.pretrain.errors import ConfigError, print_line
from sambalm.pretrain.shipped_configs import config_file

# By section the former names of keys and their present ones. Files, overrides and checkpoints may use the former.
RENAMED = {"run": {"fruitless_attempts": "max_attempts_without_progress"}}
DEFAULT = "default"
_OVERRIDE = "the override "
_KEYS = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)+")


@dataclass(frozen=True)
class Origins:
    """Where the values of a config came from: lines of its file, and overrides.

    source: what the values as a whole came from, for messages.
    places: by the names that lead to a key.
    """

    source: str
    places: dict[Key, str] = field(default_factory=dict)

    def of(self, keys: Sequence[str | int]) -> str | None:
        """The place of the value under a key, or of what it was given within; None where nobody gave it."""
        for length in range(len(keys), 0, -1):
            if place := self.places.get(tuple(map(str, keys[:length]))):
                return place
        return None

    def in_error(self, keys: Sequence[str | int], text: str) -> str:
        """What an error about a key begins with.

        Args:
            text: what the error says. Where it names keys, it is about them: about an override's before the file's.
        """
        named = [place for key in _KEYS.findall(text) if (place := self.of(key.split(".")))]
        return next((place for place in named if _is_override(place)), None) or self.of(keys) or self.source

    def override(self, keys: Key, override: str) -> None:
        """Notes that an override has replaced what is under a key."""
        for known in [known for known in self.places if known[: len(keys)] == keys]:
            del self.places[known]
        self.places[keys] = f"{_OVERRIDE}{shown(override)}"


@dataclass(frozen=True)
class ResolvedConfig:
    """A run's configuration, and where its values came from."""

    config: RunConfig
    origins: Origins

    def values(self) -> dict[str, tuple[Any, str]]:
        """Each key as section.key, its value as plain data, and its place or DEFAULT."""
        found: dict[str, tuple[Any, str]] = {}
        for section, values in config_record(self.config).items():
            if not isinstance(values, dict):
                found[section] = (values, self.origins.of([section]) or DEFAULT)
                continue
            for key, value in values.items():
                found[f"{section}.{key}"] = (value, self._place(section, key))
        return found

    def _place(self, section: str, key: str) -> str:
        """That of the key itself: a section that a file begins says nothing of the keys that it leaves out."""
        place = self.origins.places.get((section, key))
        given = self.origins.places.get((section,))
        return place or (given if given and _is_override(given) else DEFAULT)

    def show(self) -> str:
        """The whole configuration as YAML, each value with its place in a comment."""
        lines: list[str] = []
        section = ""
        for name, (value, place) in self.values().items():
            above, _, key = name.rpartition(".")
            if above and above != section:
                lines.append(f"{above}:")
            section = above
            lines.append(f"{'  ' if above else ''}{key or name}: {_flow(value)}  # {place}")
        return "\n".join(lines)


def _is_override(place: str | None) -> bool:
    return place is not None and place.startswith(_OVERRIDE)


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, or a config that the package brings, and applies overrides such as 'train.steps=100'.

    Paths of data and weights that do not exist from the working directory are looked for from the file's folder, and
    with them that of the run.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    return resolve_config(path, overrides).config


def resolve_config(path: Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Reads a config as `load_config` does, and keeps where each value came from."""
    path = config_file(path)
    values, lines = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys: a config is a YAML mapping with the sections of docs/config.md")
    values = _with_present_names(values, source=str(path))
    origins = Origins(str(path), {_present_name(keys): f"{path}:{line}" for keys, line in lines.items()})
    from_file = {keys for keys in origins.places}
    for override in overrides:
        origins.override(apply_override(override, values), override)
    given = {keys for keys in from_file if not _is_override(origins.of(keys))}
    folders = folders_of_paths(path.parent, values)
    found = with_found_paths(values, keys=given, folders=folders, tell=_tell)
    if RUN_DIR in given:
        found = with_found_run(found, folders=folders, tell=_tell, tells_of_new=found != values)
    return ResolvedConfig(_checked(found, origins), origins)


def parse_config(values: dict[str, Any], *, source: str, folders: Iterable[Path] = ()) -> RunConfig:
    """Validates plain values, for example those that a checkpoint holds.

    Args:
        folders: where paths of data and weights are looked for that do not exist from here.
    """
    values = _with_present_names(values, source=source)
    return _checked(with_found_paths(values, folders=folders, tell=_tell), Origins(source))


def _checked(values: dict[str, Any], origins: Origins) -> RunConfig:
    try:
        return validated(RunConfig, values)
    except ValidationError as error:
        text = sentence(error, values, schema=RunConfig)
        place = origins.in_error(key_path(telling_error(error), values), text)
        raise ConfigError(f"{place}: {text}") from None
    except RecursionError:
        raise ConfigError(f"{origins.source} nests too deeply: docs/config.md says what its keys hold") from None


def _tell(text: str) -> None:
    if is_main_process():
        print_line(text)


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included."""
    return yaml.safe_dump(config_record(config), sort_keys=False)


def config_record(config: RunConfig) -> dict[str, Any]:
    """The whole configuration as plain values for a run's folder; URLs name no user and no password."""
    return without_credentials(config.model_dump())


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


def _present_name(keys: Key) -> Key:
    return (*keys[:-1], RENAMED.get(".".join(keys[:-1]), {}).get(keys[-1], keys[-1]))


def apply_override(override: str, values: dict[str, Any], *, example: str = "train.steps=100") -> Key:
    """Sets what an override such as 'train.steps=100' says in plain values, and returns the names of its key.

    Args:
        example: an override that an error shows.

    Raises:
        ConfigError: it is not of that form, or it contradicts the values.
    """
    key, separator, text = override.partition("=")
    *sections, leaf = key.split(".")
    if not separator or not all((*sections, leaf)):
        raise ConfigError(f"the override {shown(override)} is not of the form section.key=value, as in {example}")
    names = RENAMED.get(".".join(sections), {})
    if leaf in names:
        _tell_of_rename(sections[0], leaf, source=f"the override {shown(override)}")
        leaf = names[leaf]
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"the override {shown(override)} names {key!r}, but {section!r} is not a section")
    try:
        values[leaf] = parse_value(text)
    except ValueError as error:
        raise ConfigError(
            f"the override {shown(override)} has a value that is not valid YAML: {error}; "
            f"""quote a text twice, the outer marks for the shell, as in "{key}='...'\""""
        ) from None
    return (*sections, leaf)
