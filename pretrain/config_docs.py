"""docs/config.md, written from the types: `python -m sambalm.pretrain.config_docs > docs/config.md`."""

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sambalm.model.mixers.base import Mixer
from sambalm.model.registry import BUILT_IN, mixer
from sambalm.pretrain.config import FORMAT_VERSION, RunConfig
from sambalm.pretrain.config_file import RENAMED
from sambalm.pretrain.data_phases import DataPhase, PhaseLearningRate

HEADER = f"""# Configuration

A run is one YAML file; `configs/` holds one for each model of the paper and one for the demo. Any key can be given on
the command line as `section.key=value`, over the file's. This page is generated from the types:
`python -m sambalm.pretrain.config_docs > docs/config.md`.

`sambalm config show FILE [section.key=value ...]` prints every key with its value and where that came from: a line of
the file, an override or a default.

Numbers may be written as `1e3`, `1_000`, `20B` (20 x 10^9) or `3.2T`. K and M are refused: they mean powers of 10 to
some and of 2 to others. A key that is given twice is refused with both lines.

A relative path of `data.train`, `data.validation`, `data.tokenizer`, `train.init_from` or `run.dir` is taken from the
working directory. Where that has none of the name, the folder of the file is looked in, and the program says which it
took. A new run is made in the working directory.

`format_version` comes first and is {FORMAT_VERSION}; a file of another version is refused.
"""


def render() -> str:
    sections = [HEADER]
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append("\n".join(_section(name, field.annotation)))
        if name == "data":
            sections.append("\n".join(_section("data.phases.N", DataPhase)))
            sections.append("\n".join(_section("data.phases.N.learning_rate", PhaseLearningRate)))
        if name == "model":
            sections += ["\n".join(mixer_section(one)) for one in map(mixer, BUILT_IN) if one.sizes]
    return "\n".join([*sections, "\n".join(_renamed())])


def _section(name: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{inspect.cleandoc(section.__doc__ or '')}\n"
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in section.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        yield f"| `{name}.{key}` | {_type(field)} | {_default(field)} | {meaning} |"
    yield ""


def mixer_section(one: Mixer) -> Iterator[str]:
    """Yields the lines on the sizes of a mixer that has a section of its own."""
    assert one.sizes is not None, f"{one.name} has its sizes in the section model"
    yield from _section(f"model.mixers.{one.name}", one.sizes)


def _renamed() -> Iterator[str]:
    yield "## Renamed keys\n"
    yield "A file, an override or a checkpoint may use a former name; the program then says which name replaced it.\n"
    yield "| former name | key |"
    yield "| --- | --- |"
    for section, names in RENAMED.items():
        yield from (f"| `{section}.{former}` | `{section}.{present}` |" for former, present in names.items())
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(extra := field.json_schema_extra, dict) and "shown_default" in extra:
        return str(extra["shown_default"])
    return _yaml(field.default)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).replace("...", "")  # an end mark follows scalars
    return f"`{' '.join(text.split())}`"


def _type(field: FieldInfo) -> str:
    bounds = []
    for constraint in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if (bound := getattr(constraint, attribute, None)) is not None:
                bounds.append(f"{sign} {bound:g}")
    return " ".join([_name(field.annotation), ", ".join(bounds)]).strip()


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(_yaml(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _name(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list of {_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is Union or hasattr(annotation, "__args__"):
        return " or ".join(dict.fromkeys(_name(option) for option in get_args(annotation)))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return getattr(annotation, "__name__", str(annotation))


if __name__ == "__main__":
    print(render(), end="")
