"""YAML as a config takes it: every value's line is known, and what YAML would let pass without a word is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sambalm.pretrain.errors import ConfigError, one_sentence

Key = tuple[str, ...]
_INTEGER_BOUND = 2**63  # beyond it neither torch nor numpy takes an integer


def read_yaml(path: Path) -> tuple[Any, dict[Key, int]]:
    """Reads a file: its values, and the line of each key, from 1, by the names that lead to it.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not valid YAML, because its byte {error.start} is not UTF-8: save the file as UTF-8"
        ) from None
    try:
        values, root = _load(text)
    except _DuplicateError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    except _REFUSED as error:
        raise ConfigError(f"{path} is not valid YAML: {_reason(error)}") from None
    return values, dict(_lines(root, (), set()))


def parse_value(text: str) -> Any:
    """The value that a text such as '4e-4' or '[1, 2]' stands for.

    Raises:
        ValueError: with the reason, where it is no YAML.
    """
    try:
        return _load(text)[0]
    except _REFUSED as error:
        raise ValueError(_reason(error)) from None


class _DuplicateError(Exception):
    """A key that a mapping holds twice, of which YAML would take the last without a word."""

    def __init__(self, key: str, *, line: int, first: int) -> None:
        super().__init__(f"{key} is given twice, first in line {first}: keep one of them")
        self.line = line


# PyYAML's own errors for a value that is not what its tag says, as in `!!int ''`, or that contains itself.
_OF_TAGS = (LookupError, AttributeError, TypeError)
# ValueError: a scalar such as the date 2026-13-45, or an integer of more digits than Python reads.
_REFUSED = (yaml.YAMLError, ValueError, RecursionError, _DuplicateError, *_OF_TAGS)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, _OF_TAGS):
        return "a value is not what its tag says"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        line = error.problem_mark.line + 1
        if isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError) and line > 1:
            return (
                f"{one_sentence(error.problem)} in line {line}; look at the colons and the indentation there and before"
            )
        return f"{one_sentence(error.problem)} in line {line}"
    return one_sentence(error)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 4e-4 as a string; this reads it as the number that it is everywhere else."""

    def integer(self, node: yaml.ScalarNode) -> int:
        value = self.construct_yaml_int(node)
        if abs(value) >= _INTEGER_BOUND:
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:20]} is larger than any number that this program takes", node.start_mark
            )
        return value

    def string(self, node: yaml.ScalarNode) -> str:
        value = str(self.construct_yaml_str(node))
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise yaml.constructor.ConstructorError(
                None, None, "a text holds a character that no file name and no output can have", node.start_mark
            )
        return value


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.string)


def _load(text: str) -> tuple[Any, yaml.Node | None]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _check_duplicates(root, set())
        return loader.construct_document(root), root
    finally:
        loader.dispose()


def _check_duplicates(node: yaml.Node, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise _DuplicateError(key.value, line=line, first=lines[key.value])
                lines[key.value] = line
            _check_duplicates(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_duplicates(value, seen)


def _lines(node: yaml.Node | None, above: Key, seen: set[int]) -> Iterator[tuple[Key, int]]:
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            names = (*above, key.value)
            yield names, key.start_mark.line + 1
            yield from _lines(value, names, seen)
