"""Devices that a plan can be made for: those of hardware.py by their names, and others by a YAML file."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sambalm.pretrain.config_errors import did_you_mean, sentence, validated
from sambalm.pretrain.config_yaml import read_yaml
from sambalm.pretrain.errors import ConfigError
from sambalm.pretrain.planner.hardware import DEVICES, Hardware

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class HardwareFile(BaseModel):
    """A device and its links; what is left out is as `like` has it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    like: Literal["h100", "h200", "a100", "b200"] = "h100"
    matrix_flops: Rate | None = None
    matrix_efficiency: Annotated[float, Field(gt=0, le=1)] | None = None
    memory_bytes_per_s: Rate | None = None
    multiprocessors: Annotated[int, Field(gt=0)] | None = None
    clock_ghz: Rate | None = None
    node_gpus: Annotated[int, Field(gt=0)] | None = None
    node_bytes_per_s: Rate | None = None
    network_bytes_per_s: Rate | None = None
    has_fp8: bool | None = None

    def hardware(self) -> Hardware:
        """What the planner reckons with."""
        return replace(DEVICES[self.like], **self.model_dump(exclude={"like"}, exclude_none=True))


def find_hardware(text: str) -> Hardware:
    """The device of a name in DEVICES, or of a YAML file with the keys of HardwareFile.

    Raises:
        ConfigError: it is neither; the message says what a file must hold.
    """
    if text in DEVICES:
        return DEVICES[text]
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"there is no device {text!r} among {', '.join(DEVICES)}, and a file that describes another ends in .yaml"
            f"{did_you_mean(text, list(DEVICES))}"
        )
    values, _ = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no keys: a device has {', '.join(HardwareFile.model_fields)}")
    try:
        return validated(HardwareFile, values).hardware()
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, values, schema=HardwareFile)}") from None
